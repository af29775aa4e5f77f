"""The policy of a GRPO run: its answers to problems, their rewards, and the arrays of updates.

Shape letters: N answers, G answers to one problem, A micro-batches, B rows of one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsv3_jax.checkpoint.pretrained import load_run_tokenizer
from dsv3_jax.config import Config
from dsv3_jax.data.chat import ChatTemplate, load_chat_template
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.parallel.mesh import batch_sharding
from dsv3_jax.posttrain.grpo import group_advantages, make_score
from dsv3_jax.posttrain.problems import REWARDS, Problem, Problems, load_problems
from dsv3_jax.posttrain.rewards import Reward, Sample, Scores, score_all
from dsv3_jax.posttrain.rollout import Rollout, policy_rows, sample_answers
from dsv3_jax.train.state import TrainState, inference_graphdef

MAX_ROWS = 64  # answers decoded together


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is asked, and how answers are read and judged."""

    problems: Problems
    reward: Reward
    tokenizer: Tokenizer
    template: ChatTemplate


def load_task(config: Config) -> Task:
    """The task of a config, with the tokenizer and template of `checkpoint.initial_weights`.

    Raises:
      UserError: something is missing or cannot be used.
    """
    path = config.checkpoint.initial_weights
    tokenizer, template = load_run_tokenizer(path), load_chat_template(path)
    tokenizer.check_fits(config.model.vocab_size)
    problems = load_problems(config, tokenizer, template)
    return Task(
        problems=problems,
        reward=REWARDS[config.grpo.reward](),
        tokenizer=tokenizer,
        template=template,
    )


@dataclass(frozen=True, kw_only=True)
class Round:
    """Rewarded answers."""

    problems: Sequence[Problem]  # one an answer
    rollouts: Sequence[Rollout]
    texts: Sequence[str]
    scores: Scores

    def statistics(self, group_size: int) -> dict[str, float]:
        """Means over the answers; `truncated` are those cut at `grpo.max_answer_tokens`."""
        lengths = [len(rollout.answer) for rollout in self.rollouts]
        groups_XG = self.scores.values_N.reshape(-1, group_size)
        return {
            "reward": float(self.scores.values_N.mean()),
            "reward_failures": float((~self.scores.valid_N).sum()),
            "equal_groups": float((groups_XG.min(1) == groups_XG.max(1)).mean()),
            "answer_tokens": float(np.mean(lengths)),
            "answer_tokens_longest": float(np.max(lengths)),
            "answer_errors": float(sum(r.finish_reason == "error" for r in self.rollouts)),
            "truncated": float(np.mean([r.finish_reason == "length" for r in self.rollouts])),
        }


class Policy:
    """Samples from weights, and computes what its updates need to know of them."""

    def __init__(self, config: Config, task: Task, mesh: Mesh):
        self._config, self._task, self._mesh = config, task, mesh
        self._graphdef = inference_graphdef(config, mesh)
        answers = config.data.sequences_per_step * config.grpo.updates_per_rollout
        # A step of the engine takes in one prompt a device: with short answers few rows are busy.
        busy = mesh.shape["data"] * mesh.shape["expert"] * (config.grpo.max_answer_tokens + 1)
        self._max_rows = min(MAX_ROWS, answers, busy)  # for evaluation too: one set of programs
        score = partial(make_score, self._graphdef, config.grpo.temperature)
        self._score = score()
        self._score_with_routes = score(routes=True) if config.grpo.routing_replay else None

    def sample(
        self, state: TrainState, problems: Sequence[Problem], seed: int, *, greedy: bool = False
    ) -> list[Rollout]:
        """Answers to problems: a group each, or the single most likely one."""
        config, group_size = self._config, 1 if greedy else self._config.grpo.group_size
        return sample_answers(
            nnx.merge(self._graphdef, state.params, state.router_bias),
            [problem.ids for problem in problems],
            group_size=group_size,
            max_tokens=config.grpo.max_answer_tokens,
            context_tokens=config.data.sequence_length + 1,
            temperature=0.0 if greedy else config.grpo.temperature,
            seed=seed,
            eos_id=self._task.tokenizer.eos_id,
            max_rows=self._max_rows,
        )

    def judge(self, problems: Sequence[Problem], rollouts: Sequence[Rollout]) -> Round:
        """The answers that `sample` gave to these problems, with their rewards."""
        grpo, group_size = self._config.grpo, len(rollouts) // len(problems)
        asked = [problem for problem in problems for _ in range(group_size)]
        texts = [self._text(rollout) for rollout in rollouts]
        samples = [
            Sample(problem.messages, text, problem.reference)
            for problem, text in zip(asked, texts, strict=True)
        ]
        scores = score_all(
            self._task.reward,
            samples,
            seconds=grpo.reward_seconds,
            max_failed_fraction=grpo.max_failed_fraction,
        )
        return Round(problems=asked, rollouts=rollouts, texts=texts, scores=scores)

    def batches(self, state: TrainState, reference: Any, played: Round) -> list[dict[str, Any]]:
        """The [A, B, ...] arrays of each update on a round; see `grpo.policy_losses`."""
        config, grpo = self._config, self._config.grpo
        rows = policy_rows(played.rollouts, config.data.sequence_length)
        has_answer_N = np.array([r.finish_reason != "error" for r in played.rollouts])
        rows["advantages"] = group_advantages(
            played.scores.values_N,
            played.scores.valid_N & has_answer_N,
            grpo.group_size,
            sample_std=grpo.sample_std,
        )
        size, microbatch = config.data.sequences_per_step, config.microbatch_sequences
        sharding = batch_sharding(self._mesh, leading=1)
        out = []
        for start in range(0, len(played.rollouts), size):
            batch = {
                name: jax.device_put(
                    x[start : start + size].reshape(-1, microbatch, *x.shape[1:]), sharding
                )
                for name, x in rows.items()
            }
            texts = {name: batch[name] for name in ("tokens", "segments")}
            batch["reference"], _ = self._score(reference, state.router_bias, texts)
            score = self._score_with_routes or self._score
            batch["old"], routes = score(state.params, state.router_bias, texts)
            out.append(batch if routes is None else batch | {"routes": routes})
        return out

    def _text(self, rollout: Rollout) -> str:
        ends = rollout.finish_reason == "stop"
        return self._task.tokenizer.decode(rollout.answer[:-1] if ends else rollout.answer)
