"""Plans a run on devices that need not be there: memory, time and cost, and what would be better.

python -m tools.plan --config=NAME --topology=CHIP:SHAPE [--set KEY=VALUE]... [--format=table|json]
    [--compile] [--search] [--dollars_per_hour=2]

SHAPE of GPUs is slices x hosts x GPUs of a host (h200:256x1x8), of TPUs the chips along each side
(v5p:8x8x16). Shows parameters, FLOPs, memory of a device by category, whether it fits and what
would help, and the predicted step. --compile also has the real compiler plan the step (minutes;
pip install 'dsv3-jax[aot]'). --search shows the ten fastest plans for the devices, whatever the
mesh of the configuration is. Exit code 2, with one line: a mistake in the call.
"""

import json
from typing import Any

from absl import flags

from dsv3_jax.errors import UserError, run_main

_CONFIG = flags.DEFINE_string("config", "tiny", "Name of the configuration, see dsv3_jax/configs.")
_SET = flags.DEFINE_multi_string("set", [], "Override: KEY=VALUE, e.g. parallel.data=2.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "Devices, e.g. h200:256x1x8 or v5p:8x8x16.")
_FORMAT = flags.DEFINE_enum("format", "table", ["table", "json"], "What to print.")
_COMPILE = flags.DEFINE_bool("compile", False, "Have the device's compiler plan the step too.")
_SEARCH = flags.DEFINE_bool("search", False, "Rank the plans that fit the devices.")
_DOLLARS = flags.DEFINE_float("dollars_per_hour", 2.0, "Price of a device.", lower_bound=0.0)


def compiled(config, topology: str) -> dict[str, Any]:
    """Bytes on a device as the compiler planned them."""
    import dataclasses

    from dsv3_jax.plan import aot

    mesh = aot.described_mesh(topology, config.parallel)
    memory = aot.compiled_memory(aot.compile_step(aot.lower_train_step(config, mesh), mesh))
    return dataclasses.asdict(memory)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; overrides are written --set KEY=VALUE")
    if _TOPOLOGY.value is None:
        raise UserError("--topology is missing; give the devices, e.g. --topology=h200:256x1x8")
    if _SEARCH.value and _COMPILE.value:
        raise UserError("--search compiles nothing; run --compile with the plan of your choice")
    from rich.console import Console

    from dsv3_jax.overrides import load_config
    from dsv3_jax.plan import report, topology

    config = load_config(_CONFIG.value, _SET.value)
    where = topology.parse_topology(_TOPOLOGY.value)
    if _SEARCH.value:
        from dsv3_jax.plan.search import search

        data = report.search_data(config, search(config, where))
        tables = report.search_table(data, where)
    else:
        from dsv3_jax.plan.cost import predict

        topology.check_mesh(config, where)
        prediction = predict(config, where.chip, dollars_per_hour=_DOLLARS.value)
        data = report.plan_data(config, where, prediction)
        if _COMPILE.value:
            data["memory"]["compiled"] = compiled(config, _TOPOLOGY.value)
        tables = report.plan_tables(data)
    if _FORMAT.value == "json":
        print(json.dumps(data, indent=2, allow_nan=False))
    else:
        Console(highlight=False).print(tables)


if __name__ == "__main__":
    run_main(main)
