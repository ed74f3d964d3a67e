"""Quotas as token buckets, by device or by address, in bounded memory; rules without I/O."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass


@dataclass
class _Bucket:
    left: float
    at: float
    """When `left` was true, in seconds of a monotonic clock."""


class Quota:
    """How often something may happen, for each name apart.

    Whoever was quiet for long has a full bucket, which is the same as none. So the names that were quiet longest are forgotten
    first, and names that somebody makes up cost no memory beyond `most`.
    """

    def __init__(self, burst: float, per_second: float, most: int = 10_000) -> None:
        """Set the limits.

        Args:
            burst: how often it may happen at once.
            per_second: how often it may happen in the long run.
            most: how many names are remembered.
        """
        self._burst, self._rate, self._most = burst, per_second, most
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def __len__(self) -> int:
        """Return how many names are remembered."""
        return len(self._buckets)

    def wait(self, name: str, count: float, now: float) -> float:
        """Return how many seconds pass until it may happen `count` times; 0: it may happen now.

        Args:
            name: whose quota.
            count: how often; more than a full bucket counts as a full bucket.
            now: seconds of a monotonic clock.
        """
        missing = min(count, self._burst) - self._left(name, now)
        return max(0.0, missing / self._rate)

    def take(self, name: str, count: float, now: float) -> None:
        """Count that it happened; a negative count gives back. The arguments are those of `wait`."""
        if not count:
            return
        left = min(self._burst, max(0.0, self._left(name, now) - count))
        self._buckets[name] = _Bucket(left, now)
        self._buckets.move_to_end(name)
        while len(self._buckets) > self._most:
            self._buckets.popitem(last=False)

    def _left(self, name: str, now: float) -> float:
        found = self._buckets.get(name)
        return self._burst if found is None else min(self._burst, found.left + (now - found.at) * self._rate)
