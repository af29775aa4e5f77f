"""When training waits for a save, and what it does about one that fails."""

import pytest

from dsv3_jax.config import CheckpointConfig
from dsv3_jax.errors import UserError
from dsv3_jax.train import saving
from dsv3_jax.train.saving import Saver


class SlowManager:
    """Completes a save only when it is waited for; the first `failing` of them fail."""

    def __init__(self, failing=0):
        self.under_way, self.complete, self.failing = None, [], failing
        self.starts = []

    @property
    def saving(self):
        return self.under_way is not None

    def save(self, step, state, extra):
        assert self.under_way is None
        self.starts.append(step)
        self.under_way = step

    def wait(self):
        step, self.under_way = self.under_way, None
        if step is not None and self.failing:
            self.failing -= 1
            raise UserError("no room")
        if step is not None:
            self.complete.append(step)


def train(manager, config, first_step=0, num_steps=40):
    """The loop without a model. Returns how far every step was from the last complete save."""
    saver = Saver(manager, config, first_step, lambda line: None)
    ahead = []
    for step in range(first_step + 1, num_steps + 1):
        ahead.append(step - max(manager.complete, default=first_step))
        save = lambda step=step: saver.save(step, None, {})  # noqa: E731
        if saver.due(step % config.interval_steps == 0):
            save()
        if saver.must_wait(step):
            saver.wait(step, save)
    return ahead


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(saving, "PAUSES", (0.0, 0.0, 0.0))


@pytest.mark.parametrize("interval", [1, 2, 5])
@pytest.mark.parametrize("spare", [0, 1, 3])
def test_no_step_is_further_than_the_bound_from_a_complete_save(interval, spare):
    bound = min(interval + spare, 2 * interval)
    config = CheckpointConfig(interval_steps=interval, max_lost_steps=bound)
    manager = SlowManager()
    assert max(train(manager, config, first_step=7)) == bound  # no sooner than it must
    assert manager.starts == [s for s in range(8, 41) if s % interval == 0]


def test_without_a_bound_a_save_has_an_interval_of_time():
    assert max(train(SlowManager(), CheckpointConfig(interval_steps=5))) == 10


def test_a_failed_save_is_tried_again_before_the_bound_is_passed():
    config = CheckpointConfig(interval_steps=4, max_lost_steps=6)
    manager = SlowManager(failing=3)
    assert max(train(manager, config)) == 6
    assert manager.starts[:5] == [4, 6, 6, 6, 8]


def test_when_every_try_failed_the_run_ends_or_goes_on_as_it_was_told():
    stop = CheckpointConfig(interval_steps=4, max_lost_steps=6)
    with pytest.raises(UserError, match="no room"):
        train(SlowManager(failing=100), stop)
    config = CheckpointConfig(interval_steps=4, max_lost_steps=6, on_save_error="continue")
    manager = SlowManager(failing=4)
    assert max(train(manager, config)) == 8  # 4 tries at 4 and 6, then the next interval's
    assert manager.starts[:5] == [4, 6, 6, 6, 8]
    assert max(manager.complete) == 36
