"""Speed of one training step: ours and the transformers package's, side by side in one run.

    python -m tools.bench_pretrain [--config=small] [--peer=compiled,eager] [--json=FILE]

Both train the same model, MTP left out, on random tokens with bf16 matmuls: forward, backward and
AdamW. Ours also keeps float32 master weights, clips gradients, counts and balances expert loads and
adds the sequence-wise balance loss; the peer's weights and moments are bf16. Each system runs in a
process of its own, so jax and torch never share one, nor a GPU's memory. The peer needs torch and
transformers.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

from absl import flags

from dsv3_jax import configs
from dsv3_jax.config import Config
from dsv3_jax.errors import UserError, run_main
from dsv3_jax.plan.flops import flops_per_token
from dsv3_jax.plan.parameters import count_parameters
from pallas_kernels import regression
from tools.bench_peer import NUM_BATCHES, random_tokens, run_process, time_steps

_CONFIG = flags.DEFINE_string("config", "small", "run whose model and batch are measured")
_PEER = flags.DEFINE_list("peer", ["compiled", "eager"], "peers: compiled, eager; none for neither")
_STEPS = flags.DEFINE_integer("steps", 24, "timed steps", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "file that receives the results")
_PROFILE_DIR = flags.DEFINE_string("profile_dir", None, "folder for one profile a system")
_PEAK = flags.DEFINE_float("peak_tflops", 989.0, "bf16 peak of the device: the MFU's denominator")
_OURS = flags.DEFINE_string("measure_ours", None, "internal: measure ours here, write this file")


def measured_config(name: str) -> Config:
    """The named run on one device: MTP off, bf16, its whole batch in one micro-batch."""
    config, replace = configs.get(name), dataclasses.replace
    return replace(
        config,
        model=replace(config.model, mtp_depth=0),
        parallel=replace(config.parallel, pipe=1, data=1, expert=1),
        precision=replace(config.precision, compute="bfloat16"),
        data=replace(config.data, microbatch_sequences=None, sequences_per_step_start=None),
    )


def measure_ours(config: Config) -> dict:
    """The train step that the training loop runs."""
    import jax

    from dsv3_jax.parallel.mesh import make_mesh
    from dsv3_jax.train.state import init_state
    from dsv3_jax.train.step import make_train_step

    graphdef, state, shardings = init_state(config, make_mesh(config.parallel))
    train_step = make_train_step(config, graphdef, shardings)
    data = config.data
    tokens = random_tokens(
        config.model.vocab_size, data.sequences_per_step, data.sequence_length + 1
    )
    batches = [{"tokens": jax.device_put(batch[None])} for batch in tokens]  # one micro-batch each
    taken = 0

    def run(count: int) -> float:
        nonlocal state, taken
        for _ in range(count):
            batch = batches[taken % NUM_BATCHES]
            state, metrics = train_step(state, batch, 1e-4, 0.001, 0.0)
            taken += 1
        jax.block_until_ready(state)
        return float(metrics["loss"])

    result = time_steps(run, _STEPS.value)
    if _PROFILE_DIR.value:
        with jax.profiler.trace(str(Path(_PROFILE_DIR.value) / "ours")):
            run(3)
    device = jax.devices()[0]
    return result | {
        "device": device.device_kind,
        "peak_memory_gib": (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "versions": {"jax": jax.__version__, "python": sys.version.split()[0]},
    }


def run_ours(folder: Path) -> dict:
    path = folder / "ours.json"
    arguments = ["tools.bench_pretrain", f"--measure_ours={path}", f"--config={_CONFIG.value}"]
    arguments.append(f"--steps={_STEPS.value}")
    if _PROFILE_DIR.value:
        arguments.append(f"--profile_dir={_PROFILE_DIR.value}")
    return run_process(arguments, path)


def run_peer(config: Config, peer: str, folder: Path) -> dict:
    profile = f"{_PROFILE_DIR.value}/peer_{peer}.json.gz" if _PROFILE_DIR.value else None
    spec = {
        "model": dataclasses.asdict(config.model),
        "sequences": config.data.sequences_per_step,
        "length": config.data.sequence_length,
        "steps": _STEPS.value,
        "compiled": peer == "compiled",
        "profile": profile,
    }
    spec_path, result_path = folder / "spec.json", folder / f"{peer}.json"
    spec_path.write_text(json.dumps(spec))
    return run_process(["tools.bench_peer", str(spec_path), str(result_path)], result_path)


def with_rates(result: dict, config: Config) -> dict:
    """Adds tokens a second and MFU: FLOPs of the causal model over the device's bf16 peak."""
    if "error" in result:
        return result
    tokens_per_second = config.tokens_per_step / result["ms_a_step"] * 1e3
    flops = flops_per_token(config.model, config.data.sequence_length)
    mfu = flops * tokens_per_second / (_PEAK.value * 1e12)
    return result | {"tokens_per_second": tokens_per_second, "mfu": mfu}


HEADER = f"{'system':<14}{'ms a step':>10}{'tokens/s':>11}{'ours/it':>9}{'MFU':>8}{'GiB':>7}  loss"


def row(system: str, result: dict, ours: dict) -> str:
    """One line of the table; the ratio is our speed over that system's."""
    if "error" in result:
        return f"{system:<14}failed: {result['error'][:100]}"
    speed = result["tokens_per_second"]
    ratio = f"{ours['tokens_per_second'] / speed:.2f}" if "error" not in ours else "-"
    return (
        f"{system:<14}{result['ms_a_step']:>10.1f}{speed:>11,.0f}{ratio:>9}"
        f"{100 * result['mfu']:>7.1f}%{result['peak_memory_gib']:>7.1f}"
        f"  {result['first_loss']:.3f} -> {result['last_loss']:.3f}"
        f" (first step {result['first_step_seconds']:.0f} s)"
    )


def main(argv: list[str]) -> int | None:
    del argv
    config = measured_config(_CONFIG.value)
    if _OURS.value:
        Path(_OURS.value).write_text(json.dumps(measure_ours(config)))
        return None
    peers = [peer for peer in _PEER.value if peer != "none"]
    if unknown := set(peers) - {"compiled", "eager"}:
        raise UserError(f"--peer={','.join(unknown)} is unknown; allowed: compiled, eager, none")
    parameters, data = count_parameters(config.model).total_without_biases, config.data
    print(
        f"{_CONFIG.value} without MTP: {parameters:,} parameters, "
        f"{data.sequences_per_step} x {data.sequence_length} tokens a step\n{HEADER}",
        flush=True,
    )
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for system in ("ours", *peers):
            raw = (
                run_ours(Path(folder))
                if system == "ours"
                else run_peer(config, system, Path(folder))
            )
            results[system] = with_rates(raw, config)
            name = system if system == "ours" else f"peer {system}"
            print(row(name, results[system], results["ours"]), flush=True)
    if _JSON.value:
        report = {"config": dataclasses.asdict(config), "results": results}
        Path(_JSON.value).write_text(json.dumps(report, indent=1))
    if any("error" in result for result in results.values()):
        return 1
    ours = results["ours"]
    kept = [
        regression.holds(
            ours["device"],
            f"{_CONFIG.value} without MTP: peer {peer} / ours",
            results[peer]["ms_a_step"] / ours["ms_a_step"],
        )
        for peer in peers
    ]
    return int(not all(kept))


if __name__ == "__main__":
    run_main(main)
