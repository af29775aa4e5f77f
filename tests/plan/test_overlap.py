"""What is read from compiled programs and profiles: small ones written in their formats."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from dsv3_jax.config import ParallelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.plan import hlo, overlap, overlap_figure
from dsv3_jax.plan.overlap_profile import read_profile
from tools.overlap import profile_report, program_report

ROOT = Path(__file__).parents[2]
PATH = "jit(step)/shard_map/while/body"

# One tick: the forward all-to-all flies over a fused gemm, a cuBLAS call, a loop with a matmul and
# a kernel; the backward one over nothing; then come collectives in their other forms.
GPU = rf"""HloModule jit_step, is_scheduled=true, entry_computation_layout={{(bf16[2,8,8]{{2,1,0}})->s32[]}}

FileNames
1 "step.py"

%gemm_computation (p.0: bf16[8,8], p.1: bf16[8,8]) -> bf16[8,8] {{
  %p.0 = bf16[8,8]{{1,0}} parameter(0)
  %p.1 = bf16[8,8]{{1,0}} parameter(1)
  ROOT %dot.0 = bf16[8,8]{{1,0}} dot(%p.0, %p.1), lhs_contracting_dims={{1}}, metadata={{op_name="{PATH}/transpose(jvp(backward))/dot_general" stack_frame_id=4}}
}}

%copy_computation (p.2: bf16[2,8,8]) -> (bf16[2,8,8], bf16[8,8]) {{
  %p.2 = bf16[2,8,8]{{2,1,0}} parameter(0)
  %copy.1 = bf16[2,8,8]{{2,1,0}} copy(%p.2)
  %slice.1 = bf16[8,8]{{1,0}} bitcast(%p.2)
  ROOT %tuple.1 = (bf16[2,8,8]{{2,1,0}}, bf16[8,8]{{1,0}}) tuple(%copy.1, %slice.1)
}}

%groups_body (p.3: (s32[], bf16[8,8])) -> (s32[], bf16[8,8]) {{
  %p.3 = (s32[], bf16[8,8]{{1,0}}) parameter(0)
  %x.3 = bf16[8,8]{{1,0}} get-tuple-element(%p.3), index=1
  %dot.3 = bf16[8,8]{{1,0}} dot(%x.3, %x.3), metadata={{op_name="{PATH}/backward/jit(forward)/while/body/dot_general"}}
  %i.3 = s32[] get-tuple-element(%p.3), index=0
  ROOT %tuple.3 = (s32[], bf16[8,8]{{1,0}}) tuple(%i.3, %dot.3)
}}

%groups_condition (p.4: (s32[], bf16[8,8])) -> pred[] {{
  %p.4 = (s32[], bf16[8,8]{{1,0}}) parameter(0)
  ROOT %true.4 = pred[] constant(true)
}}

%ragged_computation (p.5: bf16[8,8], p.6: bf16[8,8]) -> bf16[8,8] {{
  %p.5 = bf16[8,8]{{1,0}} parameter(0)
  %p.6 = bf16[8,8]{{1,0}} parameter(1)
  ROOT %ragged.5 = bf16[8,8]{{1,0}} ragged-all-to-all(%p.5, %p.6), metadata={{op_name="{PATH}/backward/ragged_all_to_all"}}
}}

%tick (p.7: (s32[], bf16[8,8], bf16[2,8,8])) -> (s32[], bf16[8,8], bf16[2,8,8]) {{
  %p.7 = (s32[], bf16[8,8]{{1,0}}, /*index=2*/bf16[2,8,8]{{2,1,0}}) parameter(0)
  %i.7 = s32[] get-tuple-element(%p.7), index=0
  %x.7 = bf16[8,8]{{1,0}} get-tuple-element(%p.7), index=1
  %ring.7 = bf16[2,8,8]{{2,1,0}} get-tuple-element(%p.7), index=2
  %all-to-all-start = ((bf16[8,8]{{1,0}}), bf16[8,8]{{1,0}}) all-to-all-start(%x.7), channel_id=1, metadata={{op_name="{PATH}/forward/all_to_all"}}, backend_config={{"collective_backend_config":{{"is_sync":false}}}}
  %gemm.7 = bf16[8,8]{{1,0}} fusion(%x.7, %x.7), kind=kCustom, calls=%gemm_computation, metadata={{op_name="{PATH}/forward/mul"}}
  %cublas.7 = (bf16[8,8]{{1,0}}, s8[64]{{0}}) custom-call(%gemm.7, %x.7), custom_call_target="__cublas$lt$matmul", metadata={{op_name="{PATH}/weight/dot_general"}}
  %start.7 = (s32[], bf16[8,8]{{1,0}}) tuple(%i.7, %gemm.7)
  %groups.7 = (s32[], bf16[8,8]{{1,0}}) while(%start.7), condition=%groups_condition, body=%groups_body
  %kernel.7 = bf16[8,8]{{1,0}} custom-call(%x.7), custom_call_target="mosaic_gpu_v2", metadata={{op_name="{PATH}/backward/mpmd_map"}}, backend_config={{module = "(\0B"}}
  %all-to-all-done = bf16[8,8]{{1,0}} all-to-all-done(%all-to-all-start), metadata={{op_name="{PATH}/forward/all_to_all"}}
  %all-to-all-start.1 = ((bf16[8,8]{{1,0}}), bf16[8,8]{{1,0}}) all-to-all-start(%gemm.7), channel_id=1, metadata={{op_name="{PATH}/backward/all_to_all"}}, backend_config={{"collective_backend_config":{{"is_sync":true}}}}
  %all-to-all-done.1 = bf16[8,8]{{1,0}} all-to-all-done(%all-to-all-start.1)
  %ragged-start.7 = ((bf16[8,8]{{1,0}}, bf16[8,8]{{1,0}}), bf16[8,8]{{1,0}}) async-start(%gemm.7, %x.7), calls=%ragged_computation
  %gemm.8 = bf16[8,8]{{1,0}} fusion(%x.7, %x.7), kind=kCustom, calls=%gemm_computation
  %ragged-update.7 = ((bf16[8,8]{{1,0}}, bf16[8,8]{{1,0}}), bf16[8,8]{{1,0}}) async-update(%ragged-start.7)
  %dot.8 = bf16[8,8]{{1,0}} dot(%gemm.8, %x.7), metadata={{op_name="{PATH}/forward/dot_general"}}
  %ragged-done.7 = bf16[8,8]{{1,0}} async-done(%ragged-update.7)
  %collective-permute-start = (bf16[8,8]{{1,0}}, bf16[8,8]{{1,0}}) collective-permute-start(%dot.8), source_target_pairs={{{{0,1}}}}
  %copies.7 = (bf16[2,8,8]{{2,1,0}}, bf16[8,8]{{1,0}}) fusion(%ring.7), kind=kLoop, calls=%copy_computation
  %ring.8 = bf16[2,8,8]{{2,1,0}} get-tuple-element(%copies.7), index=0
  %small.7 = s32[] copy(%i.7)
  %collective-permute-done = bf16[8,8]{{1,0}} collective-permute-done(%collective-permute-start)
  ROOT %tuple.7 = (s32[], bf16[8,8]{{1,0}}, bf16[2,8,8]{{2,1,0}}) tuple(%small.7, %collective-permute-done, %ring.8)
}}

ENTRY %main (ring: bf16[2,8,8]) -> s32[] {{
  %ring = bf16[2,8,8]{{2,1,0}} parameter(0)
  %outside = bf16[2,8,8]{{2,1,0}} copy(%ring)
  %zero = s32[] constant(0)
  %x = bf16[8,8]{{1,0}} bitcast(%outside)
  %carry = (s32[], bf16[8,8]{{1,0}}, bf16[2,8,8]{{2,1,0}}) tuple(%zero, %x, %outside)
  %ticks = (s32[], bf16[8,8]{{1,0}}, bf16[2,8,8]{{2,1,0}}) while(%carry), condition=%groups_condition, body=%tick
  ROOT %result = s32[] get-tuple-element(%ticks), index=0
}}
"""  # noqa: E501

# A TPU's matmuls are convolutions, its layouts have tiles, its blocking all-to-alls no start.
TPU = f"""HloModule jit_step, is_scheduled=true

%fused_computation (p.0: bf16[512,1024]) -> bf16[512,1024] {{
  %p.0 = bf16[512,1024]{{1,0:T(8,128)(2,1)S(1)}} parameter(0)
  ROOT %convolution.0 = bf16[512,1024]{{1,0:T(8,128)(2,1)}} convolution(%p.0, %p.0), dim_labels=bf_io->bf, metadata={{op_name="{PATH}/forward/dot_general"}}
}}

ENTRY %main.1_spmd (x: bf16[512,1024]) -> bf16[512,1024] {{
  %x = bf16[512,1024]{{1,0:T(8,128)(2,1)}} parameter(0)
  %all-to-all-start.2 = ((bf16[512,1024]{{1,0:T(8,128)(2,1)}}), bf16[512,1024]{{1,0:T(8,128)(2,1)}}, u32[]{{:S(2)}}, u32[]{{:S(2)}}) all-to-all-start(%x), channel_id=1, metadata={{op_name="{PATH}/backward/all_to_all"}}
  %fusion.1 = bf16[512,1024]{{1,0:T(8,128)(2,1)}} fusion(%x), kind=kOutput, calls=%fused_computation
  %all-to-all-done.2 = bf16[512,1024]{{1,0:T(8,128)(2,1)}} all-to-all-done(%all-to-all-start.2)
  %all_to_all.3 = bf16[512,1024]{{1,0:T(8,128)(2,1)}} all-to-all(%fusion.1), channel_id=1, metadata={{op_name="{PATH}/forward/all_to_all"}}
  ROOT %add.1 = bf16[512,1024]{{1,0:T(8,128)(2,1)}} add(%all_to_all.3, %all-to-all-done.2)
}}
"""  # noqa: E501


def by_name(text):
    return {move.name: move for move in overlap.transfers(hlo.parse(text))}


def test_matmuls_between_start_and_end_are_counted_by_chunk():
    moves = by_name(GPU)
    forward = moves["all-to-all-start"]
    assert (forward.kind, forward.scope, forward.computation) == ("all-to-all", "forward", "tick")
    assert forward.asynchronous and forward.num_bytes == 8 * 8 * 2
    # The matmul in the loop ran a function called `forward`, but for the backward chunk.
    assert forward.matmuls == {"backward": 2, "weight": 1}
    assert forward.kernels == {"backward": 1}
    assert forward.other_chunk_matmuls == 3


def test_collectives_that_block_span_nothing():
    assert not by_name(GPU)["all-to-all-start.1"].asynchronous
    blocking = by_name(TPU)["all_to_all.3"]
    assert not blocking.asynchronous and blocking.scope == "forward" and blocking.matmuls == {}


def test_wrapped_collective_ends_after_its_updates():
    ragged = by_name(GPU)["ragged-start.7"]
    assert (ragged.kind, ragged.scope) == ("ragged-all-to-all", "backward")
    assert ragged.matmuls == {"backward": 1, "forward": 1}
    assert ragged.other_chunk_matmuls == 1
    assert ragged.num_bytes == 8 * 8 * 2  # not the buffer that it fills


def test_permutes_are_listed_apart():
    program = hlo.parse(GPU)
    permute = by_name(GPU)["collective-permute-start"]
    assert permute.kind == "collective-permute" and permute.scope == overlap.OTHER
    fused = overlap.in_fused_bodies(overlap.transfers(program))
    assert {move.name for move in fused} == {
        "all-to-all-start",
        "all-to-all-start.1",
        "ragged-start.7",
    }


def test_matmuls_of_a_tpu_are_convolutions_in_fusions():
    move = by_name(TPU)["all-to-all-start.2"]
    assert move.asynchronous and move.matmuls == {"forward": 1}
    assert move.num_bytes == 2**20


def test_copies_in_loops_are_found_by_size():
    program = hlo.parse(GPU)
    ring = [("tick", "copies.7", 2 * 8 * 8 * 2)]
    found = [(c.computation, c.name, c.num_bytes) for c in overlap.copies_of(program, 256)]
    assert found == ring  # not the one outside of the loop
    assert len(overlap.copies_of(program, 4)) == 2
    assert overlap.copies_of(program, 257) == []


@pytest.mark.parametrize(
    ("op_name", "scope"),
    [
        ("jit(step)/while/body/transpose(jvp(backward))/dot_general", "backward"),
        ("jit(step)/transpose(jvp(backward/mlp))/checkpoint/forward/mul", "backward"),
        ("jit(step)/jvp(forward)/jit(silu)/mul", "forward"),
        ("jit(forward)/weights/forwarded/mul", overlap.OTHER),
        ("", overlap.OTHER),
    ],
)
def test_scope_is_the_outermost_name(op_name, scope):
    assert overlap.scope_of(op_name) == scope


def test_program_of_this_machine_is_read():
    mesh = make_mesh(ParallelConfig(expert=2), jax.devices()[:2])

    @jax.jit
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=PartitionSpec("expert"),
        out_specs=PartitionSpec("expert"),
    )
    def move(x):
        with jax.named_scope("forward"):
            return jax.lax.all_to_all(x, "expert", 0, 0, tiled=True)

    compiled = move.lower(jax.ShapeDtypeStruct((8, 16), jnp.float32)).compile()
    (found,) = overlap.transfers(hlo.parse(compiled.as_text()))
    assert (found.kind, found.scope, found.asynchronous) == ("all-to-all", "forward", False)
    assert found.num_bytes == 4 * 16 * 4


def test_report_of_a_program_sums_up():
    lines = program_report(GPU, copies_above=256)
    summary = next(line for line in lines if "asynchronous" in line)
    assert summary.startswith("3 of 4 are asynchronous") and "2 of 3 all-to-alls span" in summary
    assert lines[-2:] == [
        "copies of 0.000244141 MiB or more in loops: 1",
        "  tick copies.7 0.0 MiB",
    ]


@pytest.mark.parametrize("text", ["", "def f(): pass", "HloModule jit_f\n\nENTRY %main {\n}\n"])
def test_other_text_is_refused(text):
    with pytest.raises(UserError, match="not the text of a compiled program"):
        hlo.parse(text)


def write_profile(folder, planes):
    """Writes {plane: {line: [(name, start us, length us, stats)]}} in the profiler's format."""
    protos = []
    for plane, lines in planes.items():
        numbers: dict[str, int] = {}
        number = lambda name, n=numbers: n.setdefault(name, len(n) + 1)  # noqa: E731
        body = ""
        for line, events in lines.items():
            body += f'lines {{ id: {number(line)} name: "{line}" '
            for name, start, length, stats in events:
                body += f"events {{ metadata_id: {number(name)} "
                body += f"offset_ps: {start * 10**6} duration_ps: {length * 10**6} "
                for key, value in stats.items():
                    body += f'stats {{ metadata_id: {number(key)} str_value: "{value}" }} '
                body += "} "
            body += "} "
        for kind in ("event_metadata", "stat_metadata"):
            for name, n in numbers.items():
                body += f'{kind} {{ key: {n} value {{ id: {n} name: "{name}" }} }} '
        protos.append(f'planes {{ name: "{plane}" {body} }}')
    serialized = jax.profiler.ProfileData.text_proto_to_serialized_xspace("\n".join(protos))
    run = folder / "plugins" / "profile" / "2026_01_01_00_00_00"
    run.mkdir(parents=True)
    (run / "host.xplane.pb").write_bytes(serialized)


def test_hidden_time_on_gpus(tmp_path):
    """Two of ten microseconds are hidden on one device, all ten on the other."""
    operation = {"hlo_op": "all-to-all-start.1", "name": f"{PATH}/forward/all_to_all"}
    move = ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 10, 10, operation)
    unnamed = ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(void*)", 40, 4, {})
    gemm = lambda start, length: ("nvjet_tst_128x64", start, length, {"hlo_op": "gemm.3"})  # noqa: E731
    write_profile(
        tmp_path,
        {
            "/device:GPU:0": {
                "Stream #13(Compute)": [gemm(5, 7), gemm(11, 1), ("MemcpyD2D", 12, 8, {})],
                "Stream #20(Compute)": [move, unnamed],
                "XLA Ops": [("all-to-all-start.1", 10, 10, {}), ("gemm.3", 5, 30, {})],
            },
            "/device:GPU:1": {"Stream #13(Compute)": [gemm(8, 20)], "Stream #20(Compute)": [move]},
            "/host:CPU": {"python": [("$step.py", 0, 100, {})]},
        },
    )
    moved, reduced = read_profile(tmp_path)
    assert (moved.name, moved.scope, moved.runs) == ("all-to-all-start.1", "forward", 2)
    assert (moved.total_ns, moved.hidden_ns) == (20_000, 12_000)
    assert (reduced.name, reduced.scope) == ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "other")
    assert (reduced.total_ns, reduced.hidden_share) == (4_000, 0)
    assert profile_report([moved, reduced])[-1].split() == "all 3 0.024 0.012 50.0%".split()


def test_hidden_time_on_tpus(tmp_path):
    """A transfer lasts from its start to the end of the wait for it; loops are no compute."""
    write_profile(
        tmp_path,
        {
            "/device:TPU:0": {
                "XLA Ops": [
                    ("%while.1 = (s32[]) while(%tuple.1)", 0, 100, {}),
                    ("%all-to-all-start.2 = (bf16[8]) all-to-all-start(%x)", 10, 1, {}),
                    ("%fusion.7 = bf16[8] fusion(%y)", 11, 6, {}),
                    ("%copy-done.4 = bf16[8] copy-done(%z)", 17, 1, {}),
                    (
                        "%all-to-all-done.2 = bf16[8] all-to-all-done(%all-to-all-start.2)",
                        *(18, 2, {"tf_op": f"{PATH}/backward/all_to_all"}),
                    ),
                    ("%all_to_all.3 = bf16[8] all-to-all(%w)", 30, 5, {}),
                ],
                "XLA Modules": [("jit_step(1)", 0, 100, {})],
            }
        },
    )
    flying, blocking = read_profile(tmp_path)
    assert (flying.name, flying.scope) == ("all-to-all-start.2", "backward")
    assert (flying.total_ns, flying.hidden_ns) == (10_000, 6_000)
    assert (blocking.name, blocking.total_ns, blocking.hidden_ns) == ("all_to_all.3", 5_000, 0)


def test_figure_of_a_profile(tmp_path):
    operation = {"hlo_op": "all_to_all.1"}
    streams = {
        "Stream #13(Compute)": [("nvjet_tst_128x64", 5, 7, {}), ("loop_fusion", 12, 3, {})],
        "Stream #20(Compute)": [("ncclDevKernel_SendRecv(void*)", 10, 10, operation)],
    }
    write_profile(tmp_path, {"/device:GPU:0": streams})
    arguments = [f"--profile={tmp_path}", f"--trace_figure={tmp_path / 'f.svg'}", "--window_ms=0.1"]
    done = subprocess.run(
        [sys.executable, "-m", "tools.overlap", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    last = [line.split() for line in done.stdout.splitlines()[-2:]]
    assert last == ["all all-to-all 1 0.010 0.005 50.0%".split(), "all 1 0.010 0.005 50.0%".split()]
    picture = (tmp_path / "f.svg").read_text()
    assert all(colour in picture for colour in list(overlap_figure.COLOURS.values())[:4])


def test_profile_without_devices_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no profile"):
        read_profile(tmp_path)
    write_profile(tmp_path, {"/host:CPU": {"python": [("$step.py", 0, 1, {})]}})
    with pytest.raises(UserError, match="no GPU and no TPU"):
        read_profile(tmp_path)


@pytest.mark.parametrize("arguments", [[], ["--hlo=a", "--profile=b"], ["--hlo=missing.txt"]])
def test_command_tells_mistakes_in_one_line(arguments, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tools.overlap", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_command_prints_the_table(tmp_path):
    (tmp_path / "program.txt").write_text(TPU)
    done = subprocess.run(
        [sys.executable, "-m", "tools.overlap", f"--hlo={tmp_path / 'program.txt'}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "1 of 2 are asynchronous" in done.stdout
