"""When a request is sent again, and after how long."""

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime


@dataclass(frozen=True, slots=True)
class Retries:
    """How patient the client is. `Retries(attempts=1)` sends everything once."""

    attempts: int = 6
    """How often a request is sent at most. A download that got further begins to count anew."""
    within_s: float = 120.0
    """No attempt begins later than this after the first one failed. Where the service wants to be left alone
    for longer (`Retry-After`), the request fails at once."""
    base_s: float = 0.5
    """Before the n-th repetition a random time of up to `base_s * 2**(n-1)` passes (full jitter), on top of
    what the service asked for,"""
    cap_s: float = 20.0
    """but never more than this on top."""


class Patience:
    """What is left of it for one request."""

    def __init__(self, retries: Retries) -> None:
        self._retries = retries
        self.renew()

    def renew(self) -> None:
        """Something was achieved."""
        self._failures = 0
        self._since = 0.0

    def pause_s(self, retry_after: float | None) -> float | None:
        """After a failure: seconds to wait before the next attempt; None to give up."""
        retries = self._retries
        self._failures += 1
        if self._failures == 1:
            self._since = time.monotonic()
        if self._failures >= retries.attempts:
            return None
        bound = min(retries.cap_s, retries.base_s * 2 ** (self._failures - 1))
        pause = (retry_after or 0.0) + random.uniform(0, bound)  # noqa: S311 - nothing secret
        return pause if time.monotonic() - self._since + pause <= retries.within_s else None


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """`Retry-After` in seconds from now (RFC 9110, 10.2.3: seconds, or a date); None where there is none that
    can be read. A date counts by the answer's own clock, if it has one."""
    given = headers.get("retry-after", "").strip()
    if given.isdecimal():
        return float(given)
    then = _date(given)
    if then is None:
        return None
    now = _date(headers.get("date", "")) or datetime.now(UTC)
    return max(0.0, (then - now).total_seconds())


def _date(text: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)
