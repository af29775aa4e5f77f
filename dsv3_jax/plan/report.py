"""What a plan says: as data for JSON, and as tables for people."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dsv3_jax.config import Config
from dsv3_jax.parallel.mesh import axis_sizes
from dsv3_jax.plan.cost import Prediction
from dsv3_jax.plan.flops import flops_per_token
from dsv3_jax.plan.kv_cache import latent_cache
from dsv3_jax.plan.memory import CATEGORIES, FRACTION, device_memory
from dsv3_jax.plan.parameters import count_parameters
from dsv3_jax.plan.search import Plan, knobs
from dsv3_jax.plan.topology import Topology, changes


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.2f} MB"


def plan_data(config: Config, where: Topology, prediction: Prediction) -> dict[str, Any]:
    """The whole plan, JSON-safe: bytes, seconds, FLOP and dollars."""
    parallel, memory = config.parallel, device_memory(config)
    counts = count_parameters(config.model)
    fits = memory.fits(where.chip.hbm_bytes)
    cost, tokens = prediction.cost, config.total_tokens
    found = knobs(config, where) if not fits else []
    return {
        "config": config.run.name,
        "topology": where.name,
        "devices": where.num_devices,
        "mesh": axis_sizes(parallel),
        "schedule": parallel.schedule if parallel.pipe > 1 else None,
        "microbatches": config.data.sequences_per_step // config.microbatch_sequences,
        "tokens_per_step": config.tokens_per_step,
        "parameters": {
            "total": counts.total,
            "activated": counts.activated,
            "mtp": counts.mtp_unique,
        },
        "flops_per_token": flops_per_token(config.model, config.data.sequence_length),
        "kv_cache_bytes_per_token": latent_cache(config.model).bytes_per_token(),
        "memory": {
            "estimated": dataclasses.asdict(memory) | {"total": memory.total},
            "device": where.chip.hbm_bytes,
            "fits": fits,
            "largest": [name for name, _ in memory.largest(3)],
            "knobs": [
                {"set": sets, "total": less.total, "fits": less.fits(where.chip.hbm_bytes)}
                for sets, less in found
            ],
        },
        "step": dataclasses.asdict(prediction.step) | {"seconds": prediction.step.seconds},
        "mfu": prediction.model_flops_utilization,
        "tokens_per_second": cost.tokens_per_second,
        "tokens_per_day": cost.tokens_per_day,
        "total_tokens": tokens,
        "days": cost.days(tokens),
        "device_hours": cost.device_hours(tokens),
        "dollars": cost.dollars(tokens),
    }


def plan_tables(data: dict[str, Any]) -> RenderableType:
    """What `plan_data` gives, for a terminal."""
    return Group(_run_table(data), _memory_table(data), *_verdict(data), _time_table(data))


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    return table


def _run_table(data: dict[str, Any]) -> Table:
    counts = data["parameters"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in data["mesh"].items())
    schedule = f", {data['schedule']}" if data["schedule"] else ""
    table = Table(show_header=False, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.title = f"{data['config']} on {data['topology']}"
    for name, value in (
        (
            "mesh",
            f"{mesh} = {data['devices']:,} devices{schedule}, "
            f"{data['microbatches']:,} micro-batches",
        ),
        (
            "parameters",
            f"{counts['total']:,}, {counts['activated']:,} active a token"
            + (f", {counts['mtp']:,} more in MTP" if counts["mtp"] else ""),
        ),
        ("compute", f"{data['flops_per_token'] / 1e9:.5g} GFLOP a token, forward and backward"),
        ("batch", f"{data['tokens_per_step']:,} tokens a step"),
        ("KV cache", f"{data['kv_cache_bytes_per_token'] / 1e3:.3f} kB a token, when served"),
    ):
        table.add_row(name, value)
    return table


def _memory_table(data: dict[str, Any]) -> Table:
    memory = data["memory"]
    table = _table("memory of a device", "", "")
    for name, label in CATEGORIES.items():
        if memory["estimated"][name]:
            table.add_row(label, _size(memory["estimated"][name]))
    table.add_section()
    total = memory["estimated"]["total"]
    table.add_row("estimated", _size(total))
    if compiled := memory.get("compiled"):
        table.add_row("compiled, at its peak", _size(compiled["peak"]))
        table.add_row("estimate over compiled", f"{total / compiled['peak'] - 1:+.1%}")
    table.add_row(f"{FRACTION:.0%} of the device", _size(FRACTION * memory["device"]))
    return table


def _verdict(data: dict[str, Any]) -> Iterable[RenderableType]:
    memory = data["memory"]
    sizes = memory["estimated"]
    largest = ", ".join(f"{CATEGORIES[n]} {_size(sizes[n])}" for n in memory["largest"])
    yield Text(f"{'fits' if memory['fits'] else 'does not fit'}; largest: {largest}")
    if memory["fits"]:
        return
    if not memory["knobs"]:
        yield Text("no single key helps enough; try --search")
        return
    table = _table("what helps", "--set", "memory then", "fits")
    for knob in memory["knobs"]:
        total = _size(knob["total"])
        table.add_row(" ".join(knob["set"]), total, "yes" if knob["fits"] else "no")
    yield table


def _time_table(data: dict[str, Any]) -> Table:
    step = data["step"]
    table = _table("predicted", "", "")
    for name, seconds in step.items():
        if name != "seconds" and seconds:
            table.add_row(name, f"{seconds:.4g} s")
    table.add_section()
    for name, value in (
        ("step", f"{step['seconds']:.4g} s"),
        ("MFU, causal, of BF16", f"{data['mfu']:.1%}"),
        ("tokens a second", f"{data['tokens_per_second']:,.0f}"),
        ("tokens a day", f"{data['tokens_per_day'] / 1e9:,.2f} B"),
        (f"days for {data['total_tokens'] / 1e9:,.6g} B tokens", f"{data['days']:,.1f}"),
        ("device-hours", f"{data['device_hours']:,.0f}"),
        ("dollars", f"{data['dollars']:,.0f}"),
    ):
        table.add_row(name, value)
    return table


def search_data(config: Config, plans: list[Plan]) -> list[dict[str, Any]]:
    """Plans of a search, JSON-safe, best first."""
    return [
        {
            "set": changes(config, plan.config),
            "memory": plan.memory.total,
            "step_seconds": plan.prediction.step.seconds,
            "tokens_per_second": plan.prediction.cost.tokens_per_second,
            "mfu": plan.prediction.model_flops_utilization,
            **_choices(plan.config),
        }
        for plan in plans
    ]


def _choices(config: Config) -> dict[str, Any]:
    parallel = config.parallel
    piped = parallel.pipe > 1
    return {
        "pipe": parallel.pipe,
        "data": parallel.data,
        "expert": parallel.expert,
        "schedule": parallel.schedule if piped else parallel.layout,
        "sequences": config.microbatch_sequences // (parallel.data * parallel.expert),
        "remat": config.precision.remat,
        "max_deferred": parallel.max_deferred if piped else None,
        "buffer_factor": parallel.buffer_factor,
    }


def search_table(found: list[dict[str, Any]], where: Topology) -> RenderableType:
    """What `search_data` gives, for a terminal."""
    columns = ("mesh", "schedule", "rows", "remat", "queue", "room", "GB", "step s", "MFU")
    table = _table(f"plans for {where.name}, fastest first", *columns, "tokens/s")
    for plan in found:
        queue, room = plan["max_deferred"], plan["buffer_factor"]
        table.add_row(
            f"{plan['pipe']}x{plan['data']}x{plan['expert']}",
            plan["schedule"],
            str(plan["sequences"]),
            plan["remat"],
            "any" if queue is None else str(queue),
            "any" if room is None else f"{room:g}",
            f"{plan['memory'] / 1e9:.1f}",
            f"{plan['step_seconds']:.2f}",
            f"{plan['mfu']:.1%}",
            f"{plan['tokens_per_second']:,.0f}",
        )
    if not found:
        return Text(f"nothing fits {where.name}; take more devices, or --set precision=fp8")
    best = " ".join(f"--set {change}" for change in found[0]["set"]) or "the configuration as it is"
    meaning = (
        "mesh: pipe x data x expert; rows: sequences of a micro-batch on a device; queue: "
        "parallel.max_deferred; room: parallel.buffer_factor"
    )
    return Group(table, Text(meaning), Text(f"the first: {best}"))
