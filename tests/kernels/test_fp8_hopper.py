"""The Hopper products against the definitions: interpreted, and on the chip.

The interpreter stands in for the tensor cores; jax before 0.11 interprets whole tiles only (no
copy may reach past an array, no group may end inside a tile).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import checking, hopper_gemm, specs
from pallas_kernels.checking import relative_error
from pallas_kernels.fp8_matmul.gpu import fp8_matmul_hopper
from pallas_kernels.grouped_fp8_matmul import gpu as grouped
from pallas_kernels.hopper_gemm import Config

try:
    from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams

    JAX_INTERPRETS_EDGES = True
except ImportError:  # jax < 0.11
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    JAX_INTERPRETS_EDGES = False

edges = pytest.mark.skipif(
    not JAX_INTERPRETS_EDGES, reason="jax before 0.11 does not interpret copies past an edge"
)
# Products of 128 are summed by the tensor cores with about 14 bits (spec §5.2).
CHIP_ERROR = 5e-4
# Of rounding to bfloat16: of many numbers, and the most that one can have.
ROUNDED_ERROR, LARGEST_ROUNDING = 2e-3, 2.0**-8


def draw(spec):
    return spec.operands(np.random.default_rng().integers(99))


class TestInterpreted:
    @pytest.fixture(autouse=True)
    def few_multiprocessors(self, monkeypatch):
        """So that one has several tiles, and the interpreter few threads."""
        monkeypatch.setattr(hopper_gemm, "SMS", 2)
        with jax.default_device(jax.devices("cpu")[0]):
            yield

    def check(self, function, operands, expected, **kwargs):
        y = function(*operands, interpret=InterpretGPUParams(), **kwargs)
        assert relative_error(y, expected) <= (1e-6 if y.dtype == jnp.float32 else LARGEST_ROUNDING)

    def test_whole_tiles(self):
        spec = specs.Dense(M=128, N=256, K=256, scales="tiles")
        operands = draw(spec)
        add_MN = jax.random.normal(jax.random.key(0), (spec.M, spec.N))
        expected = checking.product(*operands) + np.asarray(add_MN)
        self.check(fp8_matmul_hopper, operands, expected, out_dtype=jnp.float32, add_MN=add_MN)

    @edges
    @pytest.mark.parametrize(
        ("spec", "config"),
        [
            (specs.Dense(M=130, N=208, K=300), Config(columns=192)),
            (specs.Dense(M=200, N=72, K=520), Config(warpgroups=3, columns=64, overlap=True)),
            (specs.Dense(M=5, N=33, K=96), Config(warpgroups=1, columns=32, stages=8)),
            (specs.Dense(M=70, N=130, K=200, scales="tiles"), Config(overlap=True)),
        ],
        ids=lambda value: getattr(value, "name", ""),
    )
    def test_any_shape_and_configuration(self, spec, config):
        operands = draw(spec)
        self.check(fp8_matmul_hopper, operands, checking.product(*operands), config=config)

    @edges
    def test_groups_of_any_size(self):
        operands = draw(specs.SMALL_GROUPED[0])
        expected = checking.grouped_product(*operands)
        function = grouped.grouped_fp8_matmul_hopper
        self.check(function, operands, expected, config=Config(columns=64))

    @edges
    def test_weight_gradients_of_groups(self):
        operands = draw(specs.SMALL_GROUPED_GRADIENTS[0])
        expected = checking.grouped_weight_gradient(*operands)
        self.check(grouped.grouped_fp8_weight_gradient_hopper, operands, expected)

    @edges
    def test_masked_groups(self):
        operands = draw(specs.SMALL_MASKED[0])
        expected = checking.masked_product(*operands)
        self.check(grouped.masked_fp8_matmul_hopper, operands, expected)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
class TestOnTheChip:
    @pytest.mark.parametrize("spec", specs.SMALL, ids=lambda spec: spec.name)
    def test_any_shape(self, spec):
        operands = draw(spec)
        expected = checking.product(*operands)
        y_MN = fp8_matmul_hopper(*operands, jnp.float32)
        assert relative_error(y_MN, expected) <= CHIP_ERROR
        assert relative_error(fp8_matmul_hopper(*operands), y_MN) <= LARGEST_ROUNDING
        added_MN = fp8_matmul_hopper(*operands, jnp.float32, -y_MN)
        assert relative_error(added_MN + expected, expected) <= CHIP_ERROR

    @pytest.mark.parametrize(
        "spec", [*specs.V3[::2], specs.V3_TILES[0]], ids=lambda spec: spec.name
    )
    def test_shapes_of_v3(self, spec):
        operands = draw(spec)
        rows = np.random.default_rng().choice(spec.M, 8, replace=False)
        expected = checking.product(operands[0][rows], operands[1][rows], *operands[2:])
        assert relative_error(fp8_matmul_hopper(*operands)[rows], expected) <= ROUNDED_ERROR

    @pytest.mark.parametrize("spec", specs.SMALL_GROUPED, ids=lambda spec: spec.name)
    def test_groups_of_any_size(self, spec):
        operands = draw(spec)
        y_MN = jax.jit(grouped.grouped_fp8_matmul_hopper)(*operands)
        assert relative_error(y_MN, checking.grouped_product(*operands)) <= LARGEST_ROUNDING
        assert not np.asarray(y_MN, np.float32)[sum(spec.sizes) :].any()

    @pytest.mark.parametrize("spec", specs.SMALL_GROUPED_GRADIENTS, ids=lambda spec: spec.name)
    def test_weight_gradients_of_groups(self, spec):
        operands = draw(spec)
        add_GIO = jax.random.normal(jax.random.key(0), (len(spec.sizes), spec.I, spec.O))
        expected = checking.grouped_weight_gradient(*operands)
        dw_GIO = grouped.grouped_fp8_weight_gradient_hopper(*operands)
        assert relative_error(dw_GIO, expected) <= CHIP_ERROR
        added_GIO = grouped.grouped_fp8_weight_gradient_hopper(*operands, add_GIO)
        assert relative_error(added_GIO, expected + np.asarray(add_GIO)) <= CHIP_ERROR

    @pytest.mark.parametrize("spec", specs.SMALL_MASKED, ids=lambda spec: spec.name)
    def test_masked_groups(self, spec):
        operands = draw(spec)
        y_GMN = grouped.masked_fp8_matmul_hopper(*operands)
        assert relative_error(y_GMN, checking.masked_product(*operands)) <= LARGEST_ROUNDING

    def test_nan_stays_in_its_row(self):
        q_MK, s_MT, *weight = draw(specs.SMALL[6])
        y_MN = np.asarray(fp8_matmul_hopper(q_MK, s_MT.at[3, 1].set(jnp.nan), *weight), np.float32)
        assert np.isnan(y_MN[3]).all() and not np.isnan(np.delete(y_MN, 3, axis=0)).any()
