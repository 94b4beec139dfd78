"""Whether this service should be asked: what is looked at once a second, and what the last look saw.

`/readyz` never waits for a look. It repeats the last one, a second or two old, or says which look does not
come to an end.
"""

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog

from clasp_core.types import Seconds

_log = structlog.get_logger()

LOOK_EVERY_S: Seconds = 1.0
HANGS_AFTER_S: Seconds = 10.0
"""A look that has gone on for so long is trouble itself."""

Check = Callable[[], str | None]
"""What is wrong, in a sentence that anybody may read, or None."""


@dataclass(frozen=True, slots=True)
class Readiness:
    """Each check's trouble or None; which of them stop the service; the age of the oldest look."""

    checks: Mapping[str, str | None]
    stopping: frozenset[str]
    age_s: Seconds

    @property
    def why_not(self) -> str | None:
        """None where questions are answered and recordings embedded; else what is missing."""
        return next((why for name, why in self.checks.items() if why and name in self.stopping), None)

    @property
    def degraded(self) -> list[str]:
        """Checks that see trouble which does not stop the service."""
        return [name for name, why in self.checks.items() if why and name not in self.stopping]


class Watch:
    """Runs checks by turns on a thread of its own. Before the first look at something, it counts as well."""

    def __init__(self, checks: Mapping[str, Check], stopping: frozenset[str]) -> None:
        """`stopping` are those whose trouble stops the service."""
        self._checks = checks
        self._stopping = stopping
        self._seen: dict[str, str | None] = dict.fromkeys(checks)
        self._at = {name: time.monotonic() for name in checks}
        self._looking: tuple[str, Seconds] | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Does not wait for a look that hangs."""
        self._over.set()
        self._thread.join(LOOK_EVERY_S)

    def readiness(self, at_once: Mapping[str, str | None]) -> Readiness:
        """With checks that the caller has made itself, all of them such as stop the service."""
        now, looking = time.monotonic(), self._looking
        seen = dict(self._seen)
        stopping = self._stopping | frozenset(at_once)
        if looking is not None and now - looking[1] > HANGS_AFTER_S:
            name, since = looking
            seen[name] = f"A look at this has not come to an end for {now - since:.0f} s."
            stopping |= {name}  # nothing else is looked at any more
        return Readiness({**at_once, **seen}, stopping, now - min(self._at.values()))

    def _run(self) -> None:
        while not self._over.is_set():
            for name, check in self._checks.items():
                self._look(name, check)
            self._over.wait(LOOK_EVERY_S)

    def _look(self, name: str, check: Check) -> None:
        self._looking = (name, time.monotonic())
        try:
            trouble = check()
        except Exception as error:
            trouble = f"It failed: {type(error).__name__}."
            if self._seen[name] != trouble:
                _log.error("a check failed", check=name, exc_info=error)
        if trouble != self._seen[name] and not self._over.is_set():
            if trouble is None:
                _log.info("trouble is over", check=name)
            else:
                _log.warning("trouble", check=name, reason=trouble)
        self._seen[name], self._at[name] = trouble, time.monotonic()
        self._looking = None


def why_not_writable(folder: Path) -> str | None:
    """By writing to a file without a name, of which a crash leaves nothing."""
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(b"x")
    except OSError as error:
        return f"The data directory cannot be written to: {error.strerror}."
    return None


def why_too_full(folder: Path, needed_bytes: int) -> str | None:
    if shutil.disk_usage(folder).free < needed_bytes:
        return "The data directory's disk has no room for one upload of the largest size that is accepted."
    return None
