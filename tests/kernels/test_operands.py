"""Operands that do not belong together are refused in a line: what, what is allowed, the remedy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as kernels
from pallas_kernels import dispatch

Q, S, N = jnp.float8_e4m3fn, jnp.float32, 40


def codes(*shape, dtype=Q):
    return jnp.zeros(shape, dtype)


def scales(*shape, dtype=S):
    return jnp.ones(shape, dtype)


def counts(*n):
    return jnp.array(n, jnp.int32)


LEFT = codes(64, 200), scales(64, 2)
RIGHT = codes(N, 200), scales(1, 2)
GROUPS = codes(3, N, 200), scales(3, 1, 2)
COLUMNS = codes(24, 256), scales(24, 2), codes(N, 256), scales(N, 2)
MASKED = codes(3, 16, 200), scales(3, 16, 2)
TILES = r"make it with quantize_tiles\(x_MK\)"
BLOCKS = r"make it with quantize_blocks\(w_NK\)"

CASES = {
    "fp8_matmul": [
        ((codes(64, 200, dtype=S), LEFT[1], *RIGHT), rf"q_MK is float32\[64, 200\].*{TILES}"),
        ((LEFT[0], scales(64, 1), *RIGHT), rf"s_MT is float32\[64, 1\].*\[64, 2\]; {TILES}"),
        ((LEFT[0], scales(2, 64), *RIGHT), rf"s_MT is float32\[2, 64\].*\[64, 2\]; {TILES}"),
        ((LEFT[0], scales(64, 2, dtype=jnp.bfloat16), *RIGHT), "s_MT is bfloat16"),
        ((*LEFT, codes(N, 128), RIGHT[1]), rf"q_NK is .*\[40, 128\].*\[\*, 200\]; {BLOCKS}"),
        ((*LEFT, codes(3, N, 200), RIGHT[1]), r"q_NK is .*\[3, 40, 200\]"),
        ((*LEFT, RIGHT[0], scales(2, 1)), rf"s_BT is .*\[1, 2\] or \[40, 2\]; {BLOCKS}"),
        ((*LEFT, *RIGHT, jnp.int8), "out_dtype is int8; allowed: bfloat16, float16, float32"),
        ((*LEFT, *RIGHT, S, None, scales(N, 64)), r"add_MN is float32\[40, 64\].*\[64, 40\]"),
        (
            (*LEFT, *RIGHT, jnp.bfloat16, None, scales(64, N)),
            "bfloat16; allowed with add_MN: float32",
        ),
        ((*LEFT, *RIGHT, S, "cuda"), "no implementation 'cuda'; allowed: .*reference"),
    ],
    "grouped_fp8_matmul": [
        ((codes(64, 100), scales(64, 1), *GROUPS, counts(1, 2, 3)), r"q_GNK .*\[\*, \*, 100\]"),
        ((*LEFT, GROUPS[0], scales(3, N, 2), counts(1, 2, 3)), r"s_GBT .*\[3, 1, 2\]; .*a group"),
        ((*LEFT, *GROUPS, counts(1, 2)), r"group_sizes_G is int32\[2\]; allowed: int32\[3\]"),
        ((*LEFT, *GROUPS, scales(3)), r"group_sizes_G is float32\[3\]; allowed: int32\[3\]"),
        (
            (*LEFT, *GROUPS, counts(60, 3, 2)),
            "sums to 65; allowed: at most 64, the rows that there are",
        ),
        ((*LEFT, *GROUPS, counts(60, -3, 2)), "holds -3; allowed: >= 0"),
        ((*LEFT, codes(0, N, 200), scales(0, 1, 2), counts()), "at least one"),
    ],
    "grouped_fp8_weight_gradient": [
        ((*COLUMNS, counts(128, 64)), "holds 64; allowed: multiples of 128; pad every group"),
        ((*COLUMNS, counts(128, 256)), "sums to 384; allowed: at most 256"),
        ((*COLUMNS[:2], codes(N, 128), scales(N, 1), counts(128)), r"q_OM .*\[\*, 256\]"),
        ((COLUMNS[0], scales(1, 2), *COLUMNS[2:], counts(128)), r"quantize_columns\(x_MK\)"),
        ((*COLUMNS, counts(128, 0), scales(2, N, 24)), r"add_GIO .*float32\[2, 24, 40\]"),
    ],
    "masked_fp8_matmul": [
        ((*MASKED, *GROUPS, counts(16, 17, 0)), "holds 17; allowed: at most 16, the rows that a"),
        ((*MASKED, codes(2, N, 200), scales(2, 1, 2), counts(1, 1, 1)), r"q_GNK .*\[3, \*, 200\]"),
        ((MASKED[0], scales(3, 2), *GROUPS, counts(1, 1, 1)), r"s_GMT .*\[3, 16, 2\]"),
    ],
    **{
        operation: [
            ((jnp.zeros((4, 130), jnp.int32),), r"_[MN]K is int32\[4, 130\].*float32\[\*, \*\]"),
            ((codes(4, 130),), "is float8_e4m3fn.*allowed: bfloat16, float16 or float32"),
            ((scales(2, 4, 130),), r"is float32\[2, 4, 130\].*float32\[\*, \*\]"),
            ((scales(4, 130), 2), "power_of_two is 2; allowed: True or False"),
            ((scales(4, 130), "reference"), "power_of_two is 'reference'"),
        ]
        for operation in (
            "quantize_tiles",
            "quantize_columns",
            "quantize_tiles_and_columns",
            "quantize_blocks",
        )
    },
    "quantize_blocks_both": [
        ((scales(4),), r"w_IO is float32\[4\].*float32\[\*, \*\]"),
        ((codes(3, 4, 4),), r"w_IO is float8_e4m3fn.*float32\[\*, \*, \*\]"),
    ],
    "retile": [
        ((codes(4, 200), scales(2, 4)), rf"s_MT is float32\[2, 4\].*\[4, 2\]; {TILES}"),
        ((scales(4, 200), scales(4, 2)), rf"q_MK is float32\[4, 200\].*{TILES}"),
        ((codes(4, 200), scales(4, 2), None), "power_of_two is None"),
    ],
    "swiglu_quantize_tiles": [
        ((scales(4, 201),), "h_M2F has 201 columns; allowed: an even number"),
        ((scales(4, 200), scales(4)), r"weight_M1 is float32\[4\]; allowed: float32\[4, 1\]"),
        ((scales(4, 200), None, 1), "power_of_two is 1"),
    ],
    "rms_norm_quantize_tiles": [
        ((scales(4, 200), scales(4), 1e-6), r"gain_D is float32\[4\].*float32\[200\]"),
        ((scales(4), scales(4), 1e-6), r"x_MD is float32\[4\]"),
    ],
    "dequantize_tiles": [((codes(4, 200), scales(4, 1)), rf"allowed: float32\[4, 2\]; {TILES}")],
    "dequantize_blocks": [
        ((codes(4, 200), scales(4, 2)), rf"allowed: float32\[1, 2\]; {BLOCKS}"),
        ((jnp.zeros((4, 200), jnp.float8_e5m2), scales(1, 2)), "is float8_e5m2"),
    ],
    "pack_rows": [((codes(4, 200), scales(4, 1)), rf"allowed: float32\[4, 2\]; {TILES}")],
    "unpack_rows": [
        ((jnp.zeros((3, 256), jnp.uint8), 256), r"allowed: uint8\[\*, 264\], 256 codes a row"),
        ((jnp.zeros((3, 264), jnp.int8), 256), r"payload_MW is int8\[3, 264\]"),
    ],
}


@pytest.mark.parametrize("operation", CASES)
def test_mistakes_are_named_in_one_line(operation):
    for operands, expected in CASES[operation]:
        with pytest.raises(ValueError, match=expected) as mistake:
            getattr(kernels, operation)(*operands)
        message = str(mistake.value)
        assert message.startswith(operation) and "; allowed" in message and "\n" not in message


def test_every_operation_is_covered():
    assert set(CASES) == set(kernels.__all__)


def test_a_traced_flag_is_refused_and_shapes_are_checked_under_jit():
    with pytest.raises(ValueError, match="power_of_two is traced; allowed: .* static argument"):
        jax.jit(kernels.quantize_tiles)(scales(4, 128), True)
    with pytest.raises(ValueError, match=r"q_NK is float8_e4m3fn\[40, 128\]"):
        jax.jit(kernels.fp8_matmul)(*LEFT, codes(N, 128), scales(1, 1))


def test_numpy_operands_are_taken():
    q_MK, s_MT = kernels.quantize_tiles(np.ones((3, 200), np.float32), np.bool_(True))
    y_MN = kernels.fp8_matmul(*map(np.asarray, (q_MK, s_MT, q_MK[:1], s_MT[:1])))
    np.testing.assert_array_equal(y_MN, np.full((3, 1), 200))


def test_an_implementation_that_refuses_is_passed_over_and_its_reason_kept():
    def refuses(x):
        raise NotImplementedError(f"{x} is odd")

    tried = {"xla": refuses, "reference": lambda x: x + 1}
    assert dispatch.call("add", tried, None, 1) == 2
    with pytest.raises(NotImplementedError, match="add takes no such operands; xla: 1 is odd"):
        dispatch.call("add", tried, "xla", 1)
    with pytest.raises(NotImplementedError, match="xla: 1 is odd; reference: 1 is odd"):
        dispatch.call("add", dict.fromkeys(tried, refuses), None, 1)


def test_the_default_device_decides_who_is_tried(monkeypatch):
    """Checkpoints are converted on the CPU of a machine with a GPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    by_name = {name: lambda name=name: name for name in ("hopper", "tpu", "reference")}
    assert dispatch.call("op", by_name, None) == "hopper"
    for device in ("cpu", jax.devices("cpu")[0]):
        with jax.default_device(device):
            assert dispatch.call("op", by_name, None) == "reference"
