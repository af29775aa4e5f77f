"""Failures by reason, and the limit at which they end a run."""

from collections import Counter

from dsv3_jax.errors import UserError


class Failures:
    """Counts what failed, so that nothing is dropped unseen.

    Attributes:
      counts: failures by reason.
    """

    def __init__(self, what: str, limit: int, remedy: str):
        """`limit` failures are accepted; `what` and `remedy` open and close the error's line."""
        self.what, self.limit, self._remedy = what, limit, remedy
        self.counts: Counter[str] = Counter()

    def add(self, reason: str) -> None:
        """Counts one.

        Raises:
          UserError: more than `limit` failed.
        """
        self.counts[reason] += 1
        if self.total > self.limit:
            raise UserError(
                f"{self.what}: {self.total:,} failed ({self}), more than the {self.limit:,} "
                f"accepted; {self._remedy}"
            )

    @property
    def total(self) -> int:
        return self.counts.total()

    def __str__(self) -> str:
        """`timeout 3, HTTP 500 1`, the most frequent first."""
        return ", ".join(f"{reason} {count:,}" for reason, count in self.counts.most_common())
