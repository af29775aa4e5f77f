"""Replays a table with names in place of arrays, and fails where the executor would go wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsv3_jax.parallel.pipeline.tables import Table

Name = tuple[str, int, int]  # (what, stage that uses it, micro-batch)
NEUTRAL = {"b_entry": 0}  # of a column whose chunk is absent; all others -1


def check_table(table: Table) -> None:
    """Runs every tick as the executor would, on values named (what, stage, micro-batch).

    Raises:
      ValueError: a chunk reads another value than its own, a live slot is overwritten, a chunk is
        missing, done twice or out of order, or a value is never used; it names tick, rank, column.
    """
    replays = [_Rank(table, rank) for rank in range(table.ranks)]
    for tick in range(table.ticks):
        arrivals: list[dict[str, Name]] = [{} for _ in replays]
        for replay in replays:
            for letter, step, value in replay.run(tick):
                to = replay.rank + step
                if 0 <= to < table.ranks:
                    arrivals[to][f"{letter}_{'left' if step > 0 else 'right'}"] = value
                else:  # beyond the end of the line: the rank's own other stage goes on (spec §6.5)
                    arrivals[replay.rank][f"{letter}_own"] = value
        for replay, arrived in zip(replays, arrivals, strict=True):
            replay.receive(arrived)
    for replay in replays:
        replay.finish()


class _Rank:
    """One rank's buffers: slot -> the name of the value it holds, while that is still needed."""

    def __init__(self, table: Table, rank: int):
        self._table, self.rank, self._tick = table, rank, 0
        self._sizes = {
            "activation": table.num_activation_slots,
            "gradient": table.num_gradient_slots,
            "residual": table.num_residual_slots,
            "weight": table.num_weight_slots,
        }
        self._buffers: dict[str, dict[int, Name]] = {buffer: {} for buffer in self._sizes}
        self._used: list[tuple[str, int]] = []  # slots whose last reader is in this tick
        self._done: set[Name] = set()

    def run(self, tick: int) -> list[tuple[str, int, Name]]:
        """Runs a tick's chunks; returns (a or g, step to the receiving rank, value) of all sent.

        The backward and the weight gradients come first: a forward may write no slot that they
        still read, since the executor runs the layers of both side by side.
        """
        self._tick = tick
        sent = self._backward()
        self._weights()
        sent += self._forward()
        for buffer, slot in self._used:
            del self._buffers[buffer][slot]
        self._used.clear()
        return sent

    def receive(self, arrived: dict[str, Name]) -> None:
        """Writes what arrived at the end of the tick, each to the slot of its column."""
        for buffer, letter in (("activation", "a"), ("gradient", "g")):
            for column in (f"{letter}_left", f"{letter}_right", f"{letter}_own"):
                if column in arrived:
                    self._write(column, buffer, arrived[column])
                elif self._entry(column) != self._sizes[buffer]:
                    self._fail(column, f"writes {buffer} slot {self._entry(column)}, nothing came")

    def finish(self) -> None:
        """Every chunk was done, and every value used."""
        for stage in self._table.stage_of[self.rank].tolist():
            for kind in "FBW":
                for microbatch in range(self._table.num_microbatches):
                    mine = self._takes(stage, microbatch)
                    if mine != ((kind, stage, microbatch) in self._done):
                        state = "missing" if mine else "not of this rank"
                        self._fail(
                            f"{kind.lower()}_microbatch",
                            f"{kind} of stage {stage}, micro-batch {microbatch} is {state}",
                        )

    def _takes(self, stage: int, microbatch: int) -> bool:
        """Whether this rank runs the micro-batch on the stage; dualpipe shares them out (§6.2)."""
        if self._table.name != "dualpipe":
            return True
        direction = int(microbatch >= self._table.num_microbatches // 2)
        return self._table.stage_of[self.rank, direction] == stage

    def _forward(self) -> list[tuple[str, int, Name]]:
        chunk = self._chunk("F", ("f_microbatch", "f_input", "f_residual", "f_exit"))
        if chunk is None:
            return []
        slot, stage, microbatch = chunk
        if stage > 0:
            self._read("f_input", "activation", ("x", stage, microbatch))
        else:
            self._expect("f_input", -1)
        self._write("f_residual", "residual", ("residual", stage, microbatch))
        if stage == self._table.num_stages - 1:
            self._write("f_exit", "gradient", ("dy", stage, microbatch))
            return []
        self._expect("f_exit", -1)
        return [("a", -1 if slot else 1, ("x", stage + 1, microbatch))]

    def _backward(self) -> list[tuple[str, int, Name]]:
        chunk = self._chunk("B", ("b_microbatch", "b_input", "b_residual", "b_weights", "b_entry"))
        if chunk is None:
            return []
        slot, stage, microbatch = chunk
        deferred = self._entry("b_weights") != -1
        self._read("b_input", "gradient", ("dy", stage, microbatch))
        self._read("b_residual", "residual", ("residual", stage, microbatch), last=not deferred)
        if deferred:
            self._write("b_weights", "weight", ("queued", stage, microbatch))
        else:
            self._finish_chunk("W", stage, microbatch)
        self._expect("b_entry", int(stage == 0))
        return [("g", 1 if slot else -1, ("dy", stage - 1, microbatch))] if stage > 0 else []

    def _weights(self) -> None:
        chunk = self._chunk("W", ("w_microbatch", "w_residual", "w_weights"))
        if chunk is None:
            return
        _, stage, microbatch = chunk
        self._read("w_residual", "residual", ("residual", stage, microbatch))
        self._read("w_weights", "weight", ("queued", stage, microbatch))

    def _chunk(self, kind: str, columns: tuple[str, ...]) -> tuple[int, int, int] | None:
        """(slot, stage, micro-batch) of the tick's chunk of a kind, or None."""
        letter = kind.lower()
        slot = self._entry(f"{letter}_slot")
        if slot == -1:
            for column in columns:
                self._expect(column, NEUTRAL.get(column, -1))
            return None
        if not 0 <= slot < self._table.slots_per_rank:
            self._fail(f"{letter}_slot", f"{slot} is not a slot")
        stage = int(self._table.stage_of[self.rank, slot])
        microbatch = self._entry(f"{letter}_microbatch")
        self._finish_chunk(kind, stage, microbatch)
        return slot, stage, microbatch

    def _finish_chunk(self, kind: str, stage: int, microbatch: int) -> None:
        if (kind, stage, microbatch) in self._done:
            self._fail(
                f"{kind.lower()}_microbatch",
                f"{kind} of stage {stage}, micro-batch {microbatch} is done twice",
            )
        self._done.add((kind, stage, microbatch))

    def _read(self, column: str, buffer: str, value: Name, last: bool = True) -> None:
        slot = self._entry(column)
        found = self._buffers[buffer].get(slot)
        if found != value or (buffer, slot) in self._used:
            self._fail(column, f"{buffer} slot {slot} holds {found}, not {value}")
        if last:
            self._used.append((buffer, slot))

    def _write(self, column: str, buffer: str, value: Name) -> None:
        slot = self._entry(column)
        if not 0 <= slot < self._sizes[buffer]:
            self._fail(column, f"{value} goes to {buffer} slot {slot} of {self._sizes[buffer]}")
        if slot in self._buffers[buffer]:
            live = self._buffers[buffer][slot]
            self._fail(column, f"{value} overwrites {live} in {buffer} slot {slot}")
        self._buffers[buffer][slot] = value

    def _expect(self, column: str, entry: int) -> None:
        if self._entry(column) != entry:
            self._fail(column, f"{self._entry(column)} should be {entry}")

    def _entry(self, column: str) -> int:
        return int(self._table.columns[column][self._tick, self.rank])

    def _fail(self, column: str, what: str) -> None:
        raise ValueError(f"tick {self._tick}, rank {self.rank}, {column}: {what}")
