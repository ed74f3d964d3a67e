"""What time it must be at least. Signed times and the agent's own date say so; the device's clock never does.

The factory writes into the root and into the timestamp when it signed them (`signed_at`). Factories of before did not, so for their
metadata the time follows from the expiry, because it is known how long they signed for.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from ota.errors import TrustError

# A version of the agent, and a day of its making. Tests set clocks back by up to three days, so take one that lies a few days back.
VERSION, BUILT = "0.3.0", datetime(2026, 11, 25, tzinfo=UTC)
SLACK = 24 * 3600  # seconds that a clock may run behind
SIGNED_AT = "signed_at"  # the field, and its form; the form is that of `expires`
FORM = "%Y-%m-%dT%H:%M:%SZ"
DAYS = {"root": 365, "timestamp": 14}  # for which factories that wrote no `signed_at` signed these roles


@dataclass(frozen=True)
class Signed:
    """When metadata were signed, in seconds since 1970."""

    at: int
    said: bool
    """Whether the metadata say so; otherwise it follows from the expiry."""
    until: int
    """When they expire."""

    def counts(self, now: int) -> bool:
        """Tell whether the clock may be held against this time.

        One that follows from the expiry may lie too late, if the factory signs for longer than it did. So it only counts once the
        clock has reached it.
        """
        return self.said or self.at <= now + SLACK


def signed(role: str, expires: datetime, said: object) -> Signed:
    """Return when metadata of a role were signed, by their expiry and by their field `signed_at`, which may be anything."""
    until = int(expires.replace(tzinfo=UTC).timestamp())
    try:
        at = int(datetime.strptime(str(said), FORM).replace(tzinfo=UTC).timestamp())
    except ValueError:
        at = until + 1
    if 0 <= at <= until:
        return Signed(at, True, until)
    return Signed(max(0, until - DAYS[role] * 86_400), False, until)


def check_built(now: int) -> None:
    """Refuse a clock that is behind the day on which the agent was made, before anything is fetched.

    Raises:
        TrustError: the clock is behind by more than `SLACK`.
    """
    if now < BUILT.timestamp() - SLACK:
        raise TrustError(
            f"the clock says {datetime.fromtimestamp(now, UTC):%Y-%m-%d}, but this agent was made on {BUILT:%Y-%m-%d}, so expired signatures would "
            "look fresh; set the clock; until then the running model is kept"
        )
