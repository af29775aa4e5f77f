"""The model and its loss against golden files of an independent torch reading of the spec."""

import jax
import numpy as np
import pytest
from flax import nnx
from golden import cases
from golden.weights import nested

from dsv3_jax.config import BalanceConfig
from dsv3_jax.model.router import RouterBias
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.plan.parameters import weights
from dsv3_jax.train.losses import model_losses

BALANCE = BalanceConfig(sequence_weight=cases.SEQUENCE_WEIGHT)


def with_weights(case: cases.Case) -> DeepSeekV3:
    """The model, its weights and router biases replaced by the case's."""
    model = nnx.eval_shape(lambda: DeepSeekV3(case.model, runtime=Runtime(), rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    nnx.replace_by_pure_dict(state, nested(case.weights()))
    return nnx.merge(graphdef, state)


def run_model(case: cases.Case) -> dict[str, np.ndarray]:
    """What a golden file holds, by the same names, from one compiled program."""
    tokens = case.tokens()
    graphdef, params, router_bias = nnx.split(with_weights(case), nnx.Param, RouterBias)

    def total_loss(params):
        model = nnx.merge(graphdef, params, router_bias)
        main_BTD, mtp_hidden, stats = model.hidden_states(tokens[:, :-1])
        # The training loss looks at these states: running the blocks again compiles them again.
        model.hidden_states = lambda *_, **__: (main_BTD, mtp_hidden, stats)
        losses, _ = model_losses(model, {"tokens": tokens}, BALANCE, cases.MTP_WEIGHT)
        logits = [model.logits(hidden) for hidden in (main_BTD, *mtp_hidden)]
        return losses.total, (losses, logits, stats)

    grads, (losses, logits, stats) = jax.jit(jax.grad(total_loss, has_aux=True))(params)
    named = {
        "logits": logits[0],
        "loss_main": losses.main,
        "loss_mtp": losses.mtp,
        "loss_total": losses.total,
        **stats._asdict(),
    }
    named["counts"] = named.pop("counts_E")
    assert not named.pop("overflow").any() and named.pop("ids_BTK") is None
    for k, logits_BTV in enumerate(logits[1:], start=1):  # the last k positions mean nothing
        named[f"mtp_logits_{k}"] = logits_BTV[:, :-k]
    for path, leaf in nnx.to_flat_state(grads):
        named["gradient/" + ".".join(path)] = leaf[...]
    return jax.tree.map(np.asarray, named)


def relative_difference(ours: np.ndarray, golden: np.ndarray) -> float:
    """Largest difference over the largest golden value."""
    assert ours.shape == golden.shape, (ours.shape, golden.shape)
    return float(np.abs(ours - golden).max() / max(np.abs(golden).max(), 1e-30))


OFTEN = {"query_latent", "yarn", "groups_negative", "softmax_groups", "mtp_two_deep"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in OFTEN else pytest.mark.slow) for n in cases.CASES],
)
def test_model_agrees_with_the_torch_reading(name):
    case, golden = cases.CASES[name], dict(np.load(cases.FOLDER / f"{name}.npz"))
    ours = run_model(case)
    assert set(ours) == set(golden)

    np.testing.assert_array_equal(ours["counts"], golden["counts"])
    differences = {name: relative_difference(ours[name], golden[name]) for name in golden}
    logits = ["logits"] + [f"mtp_logits_{k + 1}" for k in range(case.model.mtp_depth)]
    assert max(differences[name] for name in logits) < 2e-5, differences

    losses = ["loss_main", "loss_mtp", "loss_total", "sequence_loss"]
    losses += ["expert_loss", "device_loss", "communication_loss"]
    assert max(differences[name] for name in losses) < 2e-5, differences

    gradients = [name for name in golden if name.startswith("gradient/")]
    assert len(gradients) == sum(leaf.trained for leaf in weights(case.model))
    assert max(differences[name] for name in gradients) < 2e-5, differences
