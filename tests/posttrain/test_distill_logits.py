"""The divergence from a teacher, its gradients, and a student's run."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_policy import MODEL, small_config

from dsv3_jax import DeepSeekV3
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.posttrain.distill_logits import Teacher, checked, distill_losses, distributions
from dsv3_jax.train.losses import model_losses
from dsv3_jax.train.state import init_state

ROOT = Path(__file__).parents[2]
TAU, V = 1.7, MODEL.vocab_size


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder with a wider model than the student's."""
    path = tmp_path_factory.mktemp("teacher") / "folder"
    wide = replace(MODEL, width=24, init_std=0.4)
    model = DeepSeekV3(wide, runtime=Runtime(), rngs=nnx.Rngs(7))
    tokenizer = train_tokenizer(["1+2=3 15-4=11 What is it?\n"], 300)
    model.save_pretrained(path, dtype="f32", tokenizer=tokenizer)
    return path


def make_config(teacher, mesh=(1, 1), **distill):
    distill = {"teacher": str(teacher), "temperature": TAU, "weight": 0.6} | distill
    return small_config(mesh=mesh, distill=distill)


def draw_batch(config, rng):
    """[A, B, T+1] of two micro-batches, with documents, padding and weights."""
    shape = 2, 4, config.data.sequence_length + 1
    segments = np.sort(rng.integers(1, 4, shape))
    segments[..., -2:] = 0
    return {
        "tokens": rng.integers(0, 300, shape).astype(np.int32),
        "segments": segments.astype(np.int32),
        "weights": rng.random(shape).astype(np.float32),
    }


def on_mesh(config, batch):
    mesh = make_mesh(config.parallel)
    graphdef, state, _ = init_state(config, mesh)
    prepared = Teacher(config, mesh)(batch)
    first = jax.tree.map(lambda x: x[0], prepared)

    @jax.jit
    def gradients(params, batch):
        def total(params):
            model = nnx.merge(graphdef, params, state.router_bias)
            losses, counts_LE = distill_losses(
                model, batch, config.balance, 0.3, config=config.distill
            )
            return losses.total, (losses, counts_LE)

        return jax.value_and_grad(total, has_aux=True)(params)

    return graphdef, state, prepared, jax.device_get(gradients(state.params, first))


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def by_the_formula(config, graphdef, state, batch, top_k):
    """KL of a micro-batch from the logits of both models, in float64."""
    model = nnx.merge(graphdef, state.params, state.router_bias)

    def logits(model):
        hidden, _, _ = model.hidden_states(
            batch["tokens"][:, :-1], segments_BT=jnp.asarray(batch["segments"][:, :-1]), mtp=False
        )
        return np.asarray(hidden, np.float64) @ np.asarray(model.head.kernel[...], np.float64)

    from dsv3_jax.checkpoint.pretrained import load_model

    log_p = log_softmax(logits(load_model(config.distill.teacher)) / TAU)
    log_q = log_softmax(logits(model) / TAU)
    if top_k:
        kept = np.argsort(-log_p, -1)[..., :top_k]
        mask = np.zeros(log_p.shape, bool)
        np.put_along_axis(mask, kept, True, -1)

        def coarse(x):
            rest = np.where(mask, 0, np.exp(x)).sum(-1, keepdims=True)
            return np.concatenate([np.take_along_axis(x, kept, -1), np.log(rest)], -1)

        log_p, log_q = coarse(log_p), coarse(log_q)
    kl_BT = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    segments = batch["segments"]
    counts = (segments[:, :-1] == segments[:, 1:]) & (segments[:, 1:] != 0)
    return (kl_BT * counts * batch["weights"][:, 1:]).sum()


@pytest.fixture(scope="module", params=[0, 20])
def measured(request, teacher):
    """A config with that `top_k`, the first micro-batch, and what `on_mesh` returns."""
    config = make_config(teacher, top_k=request.param)
    batch = draw_batch(config, np.random.default_rng())
    return config, {name: x[0] for name, x in batch.items()}, on_mesh(config, batch)


def test_divergence_is_that_of_the_formula(measured):
    config, first, (graphdef, state, prepared, ((total, (losses, counts_LE)), _)) = measured
    top_k = config.distill.top_k
    expected = by_the_formula(config, graphdef, state, first, top_k)
    np.testing.assert_allclose(losses.kl, expected, rtol=2e-5)
    model = nnx.merge(graphdef, state.params, state.router_bias)
    plain, plain_counts_LE = model_losses(model, first, config.balance, 0.3)
    wanted = plain.total + 0.6 * (TAU**2 * expected - plain.main)
    np.testing.assert_allclose(total, wanted, rtol=2e-5)
    np.testing.assert_array_equal(counts_LE, plain_counts_LE)
    size = (20 if top_k else V,)
    assert prepared["teacher_logprobs"].shape == (2, 4, config.data.sequence_length, *size)


def test_gradient_is_the_difference_of_the_distributions(measured):
    """d KL / d logits = (q - p) / tau; with the K best, p of the others is spread as q is."""
    config, first, (graphdef, state, prepared, (_, gradients)) = measured
    model = nnx.merge(graphdef, state.params, state.router_bias)
    hidden, _, _ = model.hidden_states(
        first["tokens"][:, :-1], segments_BT=jnp.asarray(first["segments"][:, :-1])
    )
    hidden = np.asarray(hidden, np.float64)
    q = np.exp(log_softmax(hidden @ np.asarray(model.head.kernel[...], np.float64) / TAU))
    p = np.exp(np.asarray(prepared["teacher_logprobs"][0], np.float64))
    if config.distill.top_k:
        kept = np.asarray(prepared["teacher_tokens"][0])
        spread = q.copy()
        np.put_along_axis(spread, kept, 0, -1)
        spread *= np.exp(np.asarray(prepared["teacher_rest"][0]))[..., None] / spread.sum(
            -1, keepdims=True
        )
        np.put_along_axis(spread, kept, p, -1)
        p = spread
    segments = first["segments"]
    counts = (segments[:, :-1] == segments[:, 1:]) & (segments[:, 1:] != 0)
    weights = (counts * first["weights"][:, 1:])[..., None]
    expected = 0.6 * np.einsum("btd,btv->dv", hidden, TAU * weights * (q - p))

    @jax.jit
    @jax.grad
    def others(params):
        model = nnx.merge(graphdef, params, state.router_bias)
        losses, _ = model_losses(model, first, config.balance, 0.3)
        return 0.4 * losses.main + 0.3 * losses.mtp

    of_texts = others(state.params)["head"]["kernel"]
    ours = np.asarray(gradients["head"]["kernel"], np.float64) - np.asarray(of_texts)
    assert np.linalg.norm(ours - expected) < 2e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize(("top_k", "context"), [(0, 1), (20, 2)])
def test_eight_devices_give_the_gradients_of_one(teacher, top_k, context):
    """With `context` the teacher's and the student's sequences are split too."""
    batch = draw_batch(make_config(teacher), np.random.default_rng())
    batch = {name: np.concatenate([x, x[:, ::-1]], 1) for name, x in batch.items()}
    config = make_config(teacher, (2, 4 // context), top_k=top_k)
    split = replace(config, parallel=replace(config.parallel, context=context))
    one, eight = (on_mesh(c, batch)[-1] for c in (make_config(teacher, top_k=top_k), split))
    np.testing.assert_allclose(one[0][0], eight[0][0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(one[1]), jax.tree.leaves(eight[1]), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a)


def test_a_teacher_of_its_own_is_no_divergence(teacher):
    """And where student and teacher agree, the gradient of KL vanishes."""
    config = make_config(teacher, weight=1.0)
    graphdef, state = nnx.split(DeepSeekV3(MODEL, runtime=Runtime(), rngs=nnx.Rngs(3)))
    batch = draw_batch(config, np.random.default_rng())
    made = jax.jit(partial(distributions, graphdef, config.distill))(state, batch)
    batch = {name: x[0] for name, x in (batch | made).items()}

    @jax.jit
    @jax.value_and_grad
    def kl(state):
        model = nnx.merge(graphdef, state)
        return distill_losses(model, batch, config.balance, 0.0, config=config.distill)[0].kl

    value, gradients = kl(state)
    assert abs(value) < 1e-5
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradients)) < 1e-4


def test_a_low_precision_head_has_a_float32_gradient(teacher):
    config = make_config(teacher)
    config = replace(config, precision=replace(config.precision, compute="bfloat16"))
    batch = draw_batch(config, np.random.default_rng())
    *_, ((_, (low, _)), gradients) = on_mesh(config, batch)
    *_, ((_, (high, _)), expected) = on_mesh(make_config(teacher), batch)
    np.testing.assert_allclose(low.kl, high.kl, rtol=0.05)
    ours, theirs = gradients["head"]["kernel"], expected["head"]["kernel"]
    assert ours.dtype == np.float32
    # 0.02, or 0.1 to 0.15 where rounding sends a token to another expert.
    assert np.linalg.norm(ours - theirs) < 0.5 * np.linalg.norm(theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill": {"teacher": ""}}, "distill.teacher is empty"),
        ({"distill": {"top_k": V}}, "not less than model.vocab_size=320"),
        ({"model": {"vocab_size": 384}}, "has 320 tokens and the student model.vocab_size=384"),
        ({"parallel": {"pipe": 2}}, "use parallel.pipe=1"),
    ],
)
def test_what_cannot_be_distilled_is_said(teacher, changes, message):
    config = make_config(teacher)
    for section, values in changes.items():
        config = replace(config, **{section: replace(getattr(config, section), **values)})
    with pytest.raises(UserError, match=message):
        checked(config)


def test_other_tokens_are_refused(teacher, tmp_path):
    train_tokenizer(["Other words entirely.\n"], 300).save(tmp_path / "tokenizer.json")
    config = make_config(teacher)
    config = replace(config, data=replace(config.data, tokenizer=str(tmp_path)))
    with pytest.raises(UserError, match="must have the same tokens"):
        checked(config)
    own = checked(make_config(teacher)).data.tokenizer
    assert Path(own).read_bytes() == (teacher / "tokenizer.json").read_bytes()


def test_a_student_comes_nearer_to_its_teacher(teacher, tmp_path):
    fields = {k: getattr(MODEL, k) for k in MODEL.__dataclass_fields__ if k != "yarn"}
    changes = {f"model.{k}": value for k, value in fields.items() if value is not None} | {
        "distill.teacher": teacher, "distill.weight": 1.0, "distill.top_k": 50,
        "run.num_steps": 30, "run.num_samples": 0, "run.eval_interval": 100,
        "parallel.data": 1, "parallel.expert": 2, "precision": "f32", "optim.warmup_steps": 0,
        "optim.peak_lr": 1e-2, "optim.mtp_weight": 0, "optim.total_tokens": 30 * 8 * 16,
        "data.max_documents": 20, "data.sequence_length": 16, "data.sequences_per_step": 8,
        "data.cache_dir": tmp_path / "cache", "checkpoint.interval_steps": 20,
    }  # fmt: skip
    command = [sys.executable, "-m", "experiments.distill_logits", f"--workdir={tmp_path}/run"]
    command += [f"--set={key}={value}" for key, value in changes.items()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    kl = [record["kl"] for record in records]
    assert len(kl) == 30 and np.mean(kl[-3:]) < 0.8 * kl[0]
