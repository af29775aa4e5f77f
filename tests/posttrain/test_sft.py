"""Records to samples, samples to rows, and that a packed sample trains as it does alone."""

import json

import chex
import jax
import numpy as np
import pytest
from flax import nnx
from small_policy import small_config, small_mesh

from dsv3_jax.data.chat import ChatTemplate, encode_chat
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.evals.failures import Failures
from dsv3_jax.posttrain.conversations import Sample, read_samples
from dsv3_jax.posttrain.sft import SftRows, pack_samples, row_arrays, with_weights
from dsv3_jax.train import schedules
from dsv3_jax.train.losses import model_losses
from dsv3_jax.train.state import init_state

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What is 2+2?"}
ANSWER = {"role": "assistant", "content": "It is 4."}
AGAIN = {"role": "user", "content": "Sure?"}
YES = {"role": "assistant", "content": "<think>2+2</think>Yes."}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["What is 2+2? It is 4. Sure? Yes. Be brief.\n"], 320)


def read(tokenizer, *records, max_tokens=200, limit=0):
    failures = Failures("records", limit, "mend them")
    lines = [x if isinstance(x, str) else json.dumps(x) for x in records]
    samples = read_samples(
        lines, tokenizer, ChatTemplate(), max_tokens=max_tokens, failures=failures
    )
    return samples, dict(failures.counts)


def learnt_texts(tokenizer, sample) -> list[str]:
    """The text of each run of learnt tokens."""
    edges = np.flatnonzero(np.diff(sample.learnt_X, prepend=False, append=False))
    pairs = edges.reshape(-1, 2)
    return [tokenizer.decode(sample.tokens_X[start:end]) for start, end in pairs]


def test_loss_is_on_responses_only(tokenizer):
    eos = tokenizer.decode([tokenizer.eos_id])
    record = {"messages": [SYSTEM, USER, ANSWER, AGAIN, ANSWER, AGAIN]}
    (sample,), failures = read(tokenizer, record)
    assert not failures
    assert learnt_texts(tokenizer, sample) == [f"It is 4.{eos}"] * 2
    whole = encode_chat(tokenizer, ChatTemplate(), record["messages"][:-1])
    assert sample.tokens_X.tolist() == whole  # a turn that nobody answers is not read


def test_both_forms_are_the_same_conversation(tokenizer):
    (one, two, three), _ = read(
        tokenizer,
        {"messages": [SYSTEM, USER, ANSWER]},
        {"system": "Be brief.", "prompt": USER["content"], "completion": ANSWER["content"]},
        {"prompt": [SYSTEM, USER], "completion": ANSWER["content"]},
    )
    for other in (two, three):
        np.testing.assert_array_equal(other.tokens_X, one.tokens_X)
        np.testing.assert_array_equal(other.learnt_X, one.learnt_X)


def test_reasoning_is_learnt_in_the_last_answer_alone(tokenizer):
    """The template takes it out of earlier ones, which then are no answers to learn."""
    (sample,), _ = read(tokenizer, {"messages": [USER, YES, AGAIN, YES]})
    eos = tokenizer.decode([tokenizer.eos_id])
    assert learnt_texts(tokenizer, sample) == [f"<think>2+2</think>Yes.{eos}"]
    assert tokenizer.decode(sample.tokens_X).count("<think>") == 1


BAD = {
    "not JSON": '{"messages": [',
    "not an object": [1],
    "neither messages nor prompt and completion": {"prompt": "What?"},
    "no assistant turn": {"messages": [SYSTEM, USER]},
    "unknown role": {"messages": [{"role": "robot", "content": "Hi"}, ANSWER]},
    "content is not text": {"messages": [USER, {"role": "assistant", "content": None}]},
    "messages is not a list of objects": {"messages": "What?"},
    "longer than the context": {"prompt": "What? " * 100, "completion": "It."},
}


def test_bad_records_are_counted_by_reason_up_to_a_limit(tokenizer):
    good = {"messages": [USER, ANSWER]}
    samples, failures = read(tokenizer, good, *BAD.values(), good, limit=len(BAD))
    assert len(samples) == 2 and failures == dict.fromkeys(BAD, 1)
    with pytest.raises(UserError, match=r"7 accepted; mend them") as error:
        read(tokenizer, *BAD.values(), limit=len(BAD) - 1)
    assert "\n" not in str(error.value) and "unknown role 1" in str(error.value)


def random_samples(rng, lengths):
    samples = []
    for length in lengths:
        tokens, learnt = rng.integers(1, 320, length), rng.random(length) < 0.6
        learnt[0], learnt[-1] = False, True
        samples.append(Sample(tokens_X=tokens.astype(np.int32), learnt_X=learnt, messages=()))
    return samples


def test_rows_hold_every_sample_whole_once(tokenizer):
    rng = np.random.default_rng()
    samples = random_samples(rng, rng.integers(2, 18, 60))
    rows = pack_samples(samples, 16)
    arrays = row_arrays(rows, 16)
    found = []
    for tokens, segments, learnt in zip(*arrays.values(), strict=True):
        for number in range(1, segments.max() + 1):
            at = segments == number
            assert np.all(np.diff(np.flatnonzero(at)) == 1)
            found.append((tokens[at].tolist(), learnt[at].tolist()))
        assert not learnt[segments == 0].any()
    wanted = [(s.tokens_X.tolist(), s.learnt_X.tolist()) for s in samples]
    assert sorted(found) == sorted(wanted)
    filled = sum(len(s.tokens_X) for s in samples) / arrays["tokens"].size
    assert filled > 0.75  # 0.84 to 0.93


LENGTHS = (7, 4, 9, 2, 10, 5)


@pytest.fixture(scope="module")
def losses_and_gradients():
    """(batch) -> main loss, MTP loss, their weighted gradients, balance loss and expert counts."""
    config = small_config(data={"sequence_length": 20})
    graphdef, state, _ = init_state(config, small_mesh(config))

    def loss(params, batch):
        model = nnx.merge(graphdef, params, state.router_bias)
        losses, counts = model_losses(model, batch, config.balance, 0.3)
        return losses.main + 0.3 * losses.mtp, (losses, counts)

    gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return lambda batch: jax.device_get(gradients(state.params, batch))


@pytest.fixture(scope="module")
def packed():
    samples = random_samples(np.random.default_rng(), LENGTHS)
    rows = pack_samples(samples, 20)
    assert len(rows) == 2
    return samples, with_weights(row_arrays(rows, 20), 1)


def test_packed_samples_train_as_they_do_alone(losses_and_gradients, packed):
    """Loss, every gradient leaf and every expert's count, MTP included."""
    samples, batch = packed
    (_, (losses, counts)), gradients = losses_and_gradients(batch)
    num_targets = sum(int(s.learnt_X.sum()) for s in samples)
    main = mtp = 0.0
    counts_sum, sums = 0.0, jax.tree.map(np.zeros_like, gradients)
    for sample in samples:
        alone = row_arrays([[sample], []], 20)
        alone["weights"] = alone.pop("learnt").astype(np.float32) / num_targets
        (_, (losses_1, counts_1)), gradients_1 = losses_and_gradients(alone)
        main, mtp, counts_sum = main + losses_1.main, mtp + losses_1.mtp, counts_sum + counts_1
        sums = jax.tree.map(np.add, sums, gradients_1)
    np.testing.assert_allclose(losses.main, main, rtol=1e-5)
    np.testing.assert_allclose(losses.mtp, mtp, rtol=1e-5)
    assert losses.main > 1 and losses.mtp > 0.1
    np.testing.assert_array_equal(counts, counts_sum)
    for path, wanted in jax.tree_util.tree_leaves_with_path(sums):
        got = dict(jax.tree_util.tree_leaves_with_path(gradients))[path]
        assert np.linalg.norm(got - wanted) <= 1e-5 * np.linalg.norm(wanted), path
    # Two experts for every input; in MTP, whose next token is an input of the same sample.
    inputs = batch["segments"][:, :-1]
    joined = (inputs[:, 1:] == inputs[:, :-1]) & (inputs[:, 1:] > 0)
    assert counts.sum(-1).tolist() == [2 * (inputs > 0).sum(), 2 * joined.sum()]


def test_padding_is_in_no_statistic(losses_and_gradients, packed):
    """Whatever tokens stand in it: losses, gradients, balance and counts keep every bit."""
    samples, _ = packed
    clean = with_weights(row_arrays([[samples[0]], [samples[2]]], 20), 1)
    rng = np.random.default_rng()
    noise = rng.integers(0, 320, clean["tokens"].shape).astype(np.int32)
    dirty = clean | {"tokens": np.where(clean["segments"] > 0, clean["tokens"], noise)}
    first, second = losses_and_gradients(clean), losses_and_gradients(dirty)
    chex.assert_trees_all_close(first, second, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(first[0][1][1], second[0][1][1])
    assert first[0][1][0].balance > 0


def test_microbatches_share_one_mean(losses_and_gradients, packed):
    """Weights make unequal micro-batches add up to the mean over all targets."""
    samples, batch = packed
    halves = with_weights(row_arrays([samples[:2], samples[2:4], samples[4:], []], 20), 2)
    (_, (whole, _)), gradients = losses_and_gradients(batch)
    parts = [losses_and_gradients({k: x[i : i + 2] for k, x in halves.items()}) for i in (0, 2)]
    np.testing.assert_allclose(sum(p[0][1][0].main for p in parts) / 2, whole.main, rtol=1e-5)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, parts[0][1], parts[1][1])
    chex.assert_trees_all_close(mean, gradients, rtol=1e-3, atol=1e-5)


def test_epochs_are_orders_of_their_own_and_continue_exactly():
    rng = np.random.default_rng()
    samples = random_samples(rng, rng.integers(2, 14, 50))
    config = small_config(data={"sequences_per_step": 4, "microbatch_sequences": 2})
    rows = SftRows(config, samples, 0, 1)
    steps = -(-rows.get_state()["order"]["rows"] // 4)
    batches = [rows.next_rows(4) for _ in range(steps)]
    assert sum((b["segments"] == 1).any(1).sum() for b in batches) == len(rows._rows)
    starts = sum(int((np.diff(b["segments"], prepend=0) > 0).sum()) for b in batches)
    assert starts == 2 * len(samples)
    for batch in batches:
        np.testing.assert_allclose(batch["weights"].sum(), 2.0, rtol=1e-5)
    continued = SftRows(config, samples, 0, 1)
    continued.set_state(json.loads(json.dumps({**rows.get_state(), "row": 4})))
    chex.assert_trees_all_equal(continued.next_rows(4), batches[1])
    halves = [SftRows(config, samples, i, 2).next_rows(2) for i in range(2)]
    for name, x in batches[0].items():
        np.testing.assert_array_equal(np.stack([h[name] for h in halves], 1).reshape(x.shape), x)
    with pytest.raises(UserError, match="samples=50 but this run has 49"):
        SftRows(config, samples[1:], 0, 1).set_state(rows.get_state())


def test_the_rate_is_one_cosine():
    config = small_config(
        run={"num_steps": 10},
        optim={"schedule": "cosine", "peak_lr": 5e-6, "final_lr": 1e-6, "warmup_steps": 0},
        balance={"bias_speed": 0.0},
    )
    tokens = config.tokens_per_step
    rates = [schedules.learning_rate(config, step, step * tokens) for step in range(11)]
    assert rates[0] == 5e-6 and rates[10] == pytest.approx(1e-6) and rates[5] == pytest.approx(3e-6)
    assert rates == sorted(rates, reverse=True)
    assert schedules.mtp_weight(config, 9 * tokens) == config.optim.mtp_weight
