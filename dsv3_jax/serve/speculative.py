"""Speculative decoding with the MTP module (spec §4): draft tokens, verify them in one pass.

A token comes out only if the model itself samples it, with the random key of its position: drafts
decide how many come out a pass, never which. So the text is that of decoding without drafts, and
its distribution the model's, whatever the settings. A draft is sampled from the module's logits
with the settings and the key of the position it is meant for. Equal noise makes equal choices
likely: at a distance d in total variation between the two distributions, a draft is the model's
choice with probability (1 - d) / (1 + d) or more.

Shape letters: B rows, T tokens a row (a last token and its drafts), D width, V vocabulary, K
drafts, E experts.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.model import rope
from dsv3_jax.model.paged_cache import PagedCache, Paging
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.serve.sampling import SamplingRows, counted, sample


def verify(
    logits_BTV: jax.Array, tokens_BT: jax.Array, paging: Paging, rows: SamplingRows
) -> tuple[jax.Array, jax.Array, SamplingRows]:
    """What the model chooses after each token, as long as the next draft is that choice.

    Args:
      logits_BTV: after the T tokens.
      tokens_BT: the last token of each row, then its drafts.
      paging: positions of the tokens; a masked draft is not accepted, a masked row gets nothing.

    Returns:
      int32 tokens [B, T]; how many of them count, 1..T or 0; and the settings with those counted.
    """
    # A choice matters only after accepted drafts, so those stand for the choices before it.
    counts = [rows.output_counts_BV]
    for token_B in tokens_BT[:, 1:].T:
        counts.append(counts[-1] + jax.nn.one_hot(token_B, logits_BTV.shape[-1], dtype=jnp.int32))

    def choose(logits_BV, counts_BV, position_B):
        return sample(logits_BV, rows._replace(output_counts_BV=counts_BV), position_B + 1)

    counts_BTV = jnp.stack(counts, axis=1)
    chosen_BT = jax.vmap(choose, 1, 1)(logits_BTV, counts_BTV, paging.position_BT)
    kept_BT = paging.mask_BT.at[:, 1:].min(chosen_BT[:, :-1] == tokens_BT[:, 1:])
    kept_BT = jnp.cumprod(kept_BT, axis=1, dtype=jnp.int32)
    row_B1 = jnp.arange(len(chosen_BT))[:, None]
    counts_BV = rows.output_counts_BV.at[row_B1, chosen_BT].add(kept_BT)
    return chosen_BT, kept_BT.sum(1), rows._replace(output_counts_BV=counts_BV)


def draft(
    model: DeepSeekV3,
    hidden_BTD: jax.Array,
    next_BT: jax.Array,
    cache: PagedCache,
    paging: Paging,
    limit_B: jax.Array,
    rows: SamplingRows,
    *,
    num_drafts: int,
    absorbed: bool,
) -> tuple[jax.Array, PagedCache, jax.Array]:
    """The tokens that may follow the last of `next_BT`, from the first MTP module.

    The module runs over new tokens of the row, then over its own drafts: the state that it returns
    takes the place of the model's, one position on (spec §4, trap 6). What that writes to its cache
    is written anew before it is read again.

    Args:
      hidden_BTD: the model's states at the positions of `paging`, as `config.mtp_hidden` has them.
      next_BT: int32, the token after each position.
      paging: the mask is True for a first few tokens of a row, or none.
      limit_B: int32, positions from this on are not computed.
      rows: settings with all tokens of `next_BT` counted.
      absorbed: the form of attention of the first pass.

    Returns:
      int32 drafts [B, num_drafts], the module's cache, and its float32 load [E].
    """
    graphdef, modules = nnx.split(model.mtp)
    module = nnx.merge(graphdef, jax.tree.map(lambda weight: weight[0], modules))
    active_B = paging.mask_BT[:, 0]
    last_B = jnp.maximum(paging.mask_BT.sum(-1) - 1, 0)
    end_B = jnp.take_along_axis(paging.position_BT, last_B[:, None], axis=1)[:, 0]
    load_E, drafts = 0.0, []
    for i in range(num_drafts):
        h_BTD, output_BTD, cache, stats = module.paged(
            hidden_BTD,
            model.embedded(next_BT),
            cache,
            0,
            paging,
            cos_sin=rope.cos_sin(paging.position_BT, model.config),
            absorbed=absorbed,
        )
        load_E += stats.counts_E
        output_BD = output_BTD[jnp.arange(len(last_B)), last_B]
        token_B = sample(model.logits(output_BD), rows, end_B + i + 2)
        rows = counted(rows, token_B, active_B)
        drafts.append(token_B)
        recycled_BTD = output_BTD if model.config.mtp_hidden == "post_norm" else h_BTD
        hidden_BTD = recycled_BTD[jnp.arange(len(last_B)), last_B][:, None]
        position_B = end_B + i + 1
        mask_B = active_B & (position_B < limit_B)
        paging = Paging(paging.pages_BZ, position_B[:, None], mask_B[:, None])
        next_BT, last_B, absorbed = token_B[:, None], jnp.zeros_like(last_B), True
    return jnp.stack(drafts, axis=1), cache, load_E
