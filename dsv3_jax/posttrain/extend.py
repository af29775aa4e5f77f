"""Long-context extension (spec §9): the phases of a run that YaRN takes from 4K to 128K tokens.

Each phase is a pre-training run of its own, with longer sequences, fewer of them, and a constant
learning rate; it starts from the weights of the one before. YaRN has the same settings in all.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dsv3_jax.config import Config
from dsv3_jax.errors import UserError
from dsv3_jax.train.workdir import TOKENIZER


@dataclass(frozen=True)
class Phase:
    """A run of `train.loop.train`."""

    number: int  # from 1
    config: Config
    workdir: Path


def phases(config: Config, workdir: Path) -> Iterator[Phase]:
    """The runs that extend `checkpoint.initial_weights` by `config.extend`, in order.

    `config` is that of the pre-training: a phase keeps its tokens a step, so that the batch shrinks
    as the sequences grow (1920 x 32K and 480 x 128K for V3), its data, mesh and precision, and the
    last values of its schedules: the router bias stands still and lambda is the late one.

    Raises:
      UserError: a length that is not longer than what was trained, or does not divide the tokens of
        a step into whole micro-batches.
    """
    extend, data = config.extend, config.data
    weights = config.checkpoint.initial_weights
    if not weights:
        raise UserError(
            "checkpoint.initial_weights is empty; set it to the run or the folder to extend"
        )
    tokenizer = data.tokenizer
    if (Path(weights) / TOKENIZER).exists():
        tokenizer = str(Path(weights) / TOKENIZER)
    lengths = [("extend.first_length", extend.first_length)]
    if extend.second_length:
        lengths.append(("extend.second_length", extend.second_length))
    shorter = config.model.yarn.original_length
    for number, (key, length) in enumerate(lengths, start=1):
        if length <= shorter:
            raise UserError(f"{key}={length} must exceed the {shorter} tokens before it")
        reached = int(config.model.yarn.original_length * config.model.yarn.factor)
        if length > reached:
            raise UserError(
                f"{key}={length} is more than YaRN reaches: model.yarn.factor="
                f"{config.model.yarn.factor:g} times original_length is {reached}"
            )
        sequences, rest = divmod(config.tokens_per_step, length)
        if rest or not sequences:
            raise UserError(
                f"{key}={length} does not divide the {config.tokens_per_step} tokens of a step; "
                f"change data.sequences_per_step"
            )
        microbatch = data.microbatch_sequences and min(data.microbatch_sequences, sequences)
        phase = replace(
            config,
            run=replace(config.run, name=f"{config.run.name}_{length}", num_steps=extend.steps),
            model=replace(config.model, yarn=replace(config.model.yarn, enabled=True)),
            balance=replace(config.balance, bias_speed=0.0),
            optim=replace(
                config.optim,
                schedule="cosine",  # from a rate to itself: constant
                peak_lr=extend.learning_rate,
                final_lr=extend.learning_rate,
                warmup_steps=0,
                total_tokens=float(extend.steps * config.tokens_per_step),
                mtp_weight=config.optim.mtp_weight_late,
            ),
            data=replace(
                data,
                tokenizer=tokenizer,
                sequence_length=length,
                sequences_per_step=sequences,
                sequences_per_step_start=None,
                batch_ramp_sequences=None,
                microbatch_sequences=microbatch,
            ),
            checkpoint=replace(config.checkpoint, initial_weights=weights),
        )
        folder = workdir / f"phase_{number}_{length}"
        yield Phase(number, phase, folder)
        shorter, weights = length, str(folder)
