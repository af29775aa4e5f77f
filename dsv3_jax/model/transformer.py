"""DeepSeek-V3: embedding, dense and MoE blocks, final norm, head, MTP modules (spec §1, §4).

The layers of a kind are stacked and scanned. Shape letters: B batch, T tokens, D width, V
vocabulary.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import rope
from dsv3_jax.model.block import Block, BlockContext, remat
from dsv3_jax.model.generate import generate
from dsv3_jax.model.layers import Embedding, Linear, RMSNorm
from dsv3_jax.model.mtp import MTP, run_modules
from dsv3_jax.model.router import RouterStats
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.parallel.context import balanced, shard_tokens
from dsv3_jax.precision.policy import dot

if TYPE_CHECKING:
    from dsv3_jax.checkpoint.hf_load import Source
    from dsv3_jax.data.tokenizer import Tokenizer


def _stack(make, num: int, rngs: nnx.Rngs):
    """`num` modules of independent weights as one, each array with a leading layer dim."""
    return nnx.vmap(make)(rngs.split(num)) if num else None


class DeepSeekV3(nnx.Module):
    """The whole model. Executors take it apart with `nnx.split(model, nnx.Param, RouterBias)`."""

    def __init__(self, config: ModelConfig, *, runtime: Runtime, rngs: nnx.Rngs):
        c = config
        self.config, self.runtime = config, runtime
        self.source: Source | None = None  # of a loaded model, what an export gives back
        block = partial(Block, c, runtime=runtime)
        self.embed = Embedding(rngs, c.vocab_size, c.width, c.init_std, runtime)
        self.dense_blocks = _stack(lambda r: block(moe=False, rngs=r), c.num_dense_layers, rngs)
        self.moe_blocks = _stack(lambda r: block(moe=True, rngs=r), c.num_moe_layers, rngs)
        self.final_norm = RMSNorm(c.width, c.norm_epsilon)
        self.head = Linear(
            rngs, c.width, c.vocab_size, ("embed", "vocab"), c.init_std, runtime, "head"
        )
        self.mtp = _stack(lambda r: MTP(c, runtime=runtime, rngs=r), c.mtp_depth, rngs)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, dtype: jnp.dtype = jnp.float32, mesh: Mesh | None = None
    ) -> "DeepSeekV3":
        """Loads a Hugging Face folder or a run of ours; see `pretrained.load_model`.

        Args:
          path: a folder of safetensors (fp8 with scales, bf16, f32), or a run's working directory.
          dtype: of the weights and the arithmetic; jnp.float8_e4m3fn keeps FP8 weights as they are.
          mesh: where the weights live; None: one device.
        """
        from dsv3_jax.checkpoint.pretrained import load_model  # it builds this class

        return load_model(path, dtype, mesh)

    def save_pretrained(
        self, path: str | Path, dtype: str = "bf16", tokenizer: "Tokenizer | None" = None
    ) -> None:
        """Writes a Hugging Face folder, with the MTP layer; see `hf_save.save_folder`.

        Args:
          path: a folder that does not exist yet.
          dtype: 'fp8' (with scales), 'bf16' or 'f32'.
          tokenizer: None: the one that the model was loaded with.
        """
        from dsv3_jax.checkpoint.hf_save import save_folder  # it knows the names of the weights

        save_folder(self, path, dtype, tokenizer)

    def hidden_states(
        self, tokens_BT: jax.Array, *, segments_BT: jax.Array | None = None, mtp: bool = True
    ) -> tuple[jax.Array, list[jax.Array], RouterStats | None]:
        """States ready for the head.

        Args:
          tokens_BT: int32.
          segments_BT: int32 documents of packed rows, 0 for padding: attention stays inside a
            document and positions restart in each. None: one text a row (spec §8).
          mtp: whether to run the MTP modules.

        Returns:
          The main model's state, after the final norm; the state of each MTP depth k, after its
          output norm (position i predicts token i + k + 1; the last k positions mean nothing); the
          statistics of all MoE layers, main ones first, or None where there is none.
        """
        context = self.block_context(tokens_BT.shape[1], segments_BT)
        embedding_BTD = self.embedded(tokens_BT)
        x_BTD = balanced(embedding_BTD, self.runtime.mesh)
        x_BTD = self.dense_layers(x_BTD, context)
        x_BTD, moe_stats = _run_blocks(self.moe_blocks, x_BTD, context, self.runtime)
        main_BTD, mtp_hidden, mtp_stats = self.last_states(x_BTD, embedding_BTD, context, mtp=mtp)
        all_stats = [stats for stats in (moe_stats, mtp_stats) if stats is not None]
        if not all_stats:
            return main_BTD, mtp_hidden, None
        return main_BTD, mtp_hidden, jax.tree.map(lambda *s: jnp.concatenate(s), *all_stats)

    def block_context(self, num_tokens: int, segments_BT: jax.Array | None) -> BlockContext:
        """What all blocks are told about the tokens; `segments_BT` as in `hidden_states`.

        Tokens are in the order that blocks work in, balanced where sequences are split
        (parallel/context.py).
        """
        mesh = self.runtime.mesh
        positions_BT = balanced(rope.positions(num_tokens, segments_BT), mesh)
        if segments_BT is not None:
            segments_BT = balanced(segments_BT, mesh)
        return BlockContext(
            cos_sin=rope.cos_sin(positions_BT, self.config),
            segments_BT=segments_BT,
            token_mask_BT=None if segments_BT is None else segments_BT > 0,
        )

    def embedded(self, tokens_BT: jax.Array) -> jax.Array:
        """int32 tokens -> [B, T, D] in the compute dtype."""
        return shard_tokens(self.embed(tokens_BT), self.runtime.mesh)

    def dense_layers(self, x_BTD: jax.Array, context: BlockContext) -> jax.Array:
        """Runs the leading blocks, those with a dense FFN, by a scan."""
        return _run_blocks(self.dense_blocks, x_BTD, context, self.runtime)[0]

    def dense_layers_unrolled(self, x_BTD: jax.Array, context: BlockContext) -> jax.Array:
        """As `dense_layers`, one by one: no loop hides a weight's cast from who moves it out."""
        if self.dense_blocks is None:
            return x_BTD
        layer, state = _layer_function(self.dense_blocks, context, self.runtime)
        for i in range(self.config.num_dense_layers):
            x_BTD, _ = layer(x_BTD, jax.tree.map(lambda weight, i=i: weight[i], state))
        return x_BTD

    def last_states(
        self, x_BTD: jax.Array, embedding_BTD: jax.Array, context: BlockContext, *, mtp: bool = True
    ) -> tuple[jax.Array, list[jax.Array], RouterStats | None]:
        """What follows the blocks, as `hidden_states` returns it; statistics are the MTP ones."""
        main_BTD = self.final_norm(x_BTD)
        if not mtp or self.mtp is None:
            return balanced(main_BTD, self.runtime.mesh), [], None
        mtp_hidden, stats = run_modules(
            self.mtp,
            main_BTD if self.config.mtp_hidden == "post_norm" else x_BTD,
            embedding_BTD,
            config=self.config,
            runtime=self.runtime,
            cos_sin=context.cos_sin,
            segments_BT=context.segments_BT,
        )
        mesh = self.runtime.mesh  # back to natural order
        return balanced(main_BTD, mesh), [balanced(h_BTD, mesh) for h_BTD in mtp_hidden], stats

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 [..., V] from [..., D]; a bf16 product is not rounded to bf16."""
        return dot(hidden, self.head.kernel[...], self.runtime.compute_dtype, jnp.float32)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """float32 logits [B, T, V] of the main model: position i predicts token i + 1."""
        return _logits(*nnx.split(self), tokens_BT)

    def generate(
        self,
        tokens_BT: jax.Array,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        speculative: bool = False,
    ) -> jax.Array:
        """Continues each row by `max_new_tokens` tokens; see `generate.generate`."""
        return generate(self, tokens_BT, max_new_tokens, temperature, seed, speculative)


def _run_blocks(blocks: Block | None, x_BTD, context: BlockContext, runtime: Runtime):
    """Runs stacked blocks; returns the last output and the layers' statistics."""
    if blocks is None:
        return x_BTD, None
    layer, state = _layer_function(blocks, context, runtime)
    # A loop's residuals are zeroed, copied to their place and read from it, which takes a tenth of
    # a small model's step.
    return jax.lax.scan(layer, x_BTD, state, unroll=1 if runtime.scan_layers else True)


def _layer_function(blocks: Block, context: BlockContext, runtime: Runtime):
    """(x_BTD, weights of a layer) -> (y_BTD, statistics), recomputing; and the stacked weights."""
    graphdef, state = nnx.split(blocks)

    def layer(x_BTD, layer_state):
        return nnx.merge(graphdef, layer_state)(x_BTD, **context._asdict())

    return remat(layer, runtime, in_scan=runtime.scan_layers), state


@partial(jax.jit, static_argnums=0)
def _logits(graphdef, state, tokens_BT):
    model = nnx.merge(graphdef, state)
    return model.logits(model.hidden_states(tokens_BT, mtp=False)[0])
