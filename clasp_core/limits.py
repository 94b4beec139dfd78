"""How much is let in: what one key may ask and keep, and how many recordings may wait.

The arithmetic only. Who counts what is held is the catalogue, in the transaction that would add to it; who
counts requests is the process that answers them.
"""

import re
import threading
import time
from dataclasses import dataclass
from typing import Literal

from clasp_core.errors import InvalidInput, QuotaExceeded
from clasp_core.types import Seconds

HOUR: Seconds = 3600.0


@dataclass(frozen=True, slots=True)
class Rate:
    """So many requests a second or a minute; as many at once, where none were made for as long."""

    requests: int
    per: Literal["second", "minute"]

    @classmethod
    def parse(cls, text: str) -> "Rate":
        """`10/second` or `600/minute`. Raises InvalidInput."""
        if (parts := re.fullmatch(r"([1-9]\d{0,8})/(second|minute)", text)) is None:
            raise InvalidInput(f"A rate is such as 10/second or 600/minute, not {text!r}.")
        return cls(int(parts[1]), parts[2])  # type: ignore[arg-type]

    @property
    def window_s(self) -> Seconds:
        return 1.0 if self.per == "second" else 60.0

    def __str__(self) -> str:
        return f"{self.requests}/{self.per}"


@dataclass(frozen=True, slots=True)
class Held:
    """What the library holds of one key's uploads: recordings of any status, their bytes, and the sound of
    those that were decoded."""

    recordings: int = 0
    size_bytes: int = 0
    duration_s: Seconds = 0.0


@dataclass(frozen=True, slots=True)
class Quota:
    """The most that the library may hold of one key's uploads; None: no bound."""

    recordings: int | None = None
    size_bytes: int | None = None
    hours: float | None = None

    def check(self, held: Held, size_bytes: int) -> None:
        """Raise QuotaExceeded where one more recording, of so many bytes, is too much.

        Its hours are known only once it is decoded, so it may be the one that goes beyond them; after that
        none is taken.
        """
        if self.recordings is not None and held.recordings >= self.recordings:
            raise QuotaExceeded(f"The key's {self.recordings} recordings are there; delete some first.")
        if self.size_bytes is not None and held.size_bytes + size_bytes > self.size_bytes:
            left = max(0, self.size_bytes - held.size_bytes)
            raise QuotaExceeded(
                f"Of the key's {self.size_bytes} bytes {left} are left, too few for this recording; delete"
                " some first."
            )
        if self.hours is not None and held.duration_s >= self.hours * HOUR:
            raise QuotaExceeded(f"The key's {self.hours:g} hours of sound are used up; delete some first.")


NO_QUOTA = Quota()


@dataclass(frozen=True, slots=True)
class Admission:
    """On what terms a new recording is taken: whose it is (`key`, the id of an API key), what that one may
    keep, and how many recordings may wait to be embedded (`max_pending`; 0: any number)."""

    key: str | None = None
    quota: Quota = NO_QUOTA
    max_pending: int = 0

    @property
    def is_free(self) -> bool:
        """Whether anything is taken, so that nothing need be counted."""
        return not self.max_pending and not self.is_counted

    @property
    def is_counted(self) -> bool:
        return self.key is not None and self.quota != NO_QUOTA


FREELY = Admission()


class Pace:
    """Keeps keys to their rates: a bucket for each, from which a request takes one and which fills steadily.

    By the generic cell rate algorithm (ITU-T I.371), which is one number a key. The libraries for this keep
    each request of a window, or count by fixed windows, where twice the rate passes around their edges.
    In this process only, and anew after a restart. Thread-safe.
    """

    def __init__(self) -> None:
        self._full_at: dict[str, tuple[Rate, float]] = {}
        """When each key's bucket, which is for a rate, is full again, on the clock of `time.monotonic`."""
        self._lock = threading.Lock()

    def take(self, key: str, rate: Rate) -> Seconds:
        """0 for a request that may be made; else the seconds until the next may be, and none is taken."""
        each = rate.window_s / rate.requests
        now = time.monotonic()
        with self._lock:
            known, full_at = self._full_at.get(key, (rate, now))
            full_at = (max(now, full_at) if known == rate else now) + each
            if (too_early := full_at - now - rate.window_s) > 1e-9:
                return too_early
            self._full_at[key] = (rate, full_at)
        return 0.0
