"""Resident memory of a running service, by part, sampled by a thread while something else goes on."""

import os
import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tests.service import RunningService

PARTS = ("api", "workers", "decoders")
MIB = 1 << 20
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Sample:
    """Seconds since the watch began, and bytes by part. Pages that processes share count once for each of
    them, so a sum is never too small; `decoders` are the zygotes and their children."""

    at_s: float
    resident: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.resident.values())


class MemoryWatch:
    """`samples` of a service's processes, from `__enter__` to `__exit__`."""

    def __init__(self, service: RunningService, every_s: float) -> None:
        self.samples: list[Sample] = []
        self._service = service
        self._every_s = every_s
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join()

    def peak(self, part: str | None = None) -> int:
        """Bytes; of the sum where no part is named."""
        return max(sample.resident[part] if part else sample.total for sample in self.samples)

    def _run(self) -> None:
        assert self._service.process is not None
        began = time.monotonic()
        while not self._ending.wait(self._every_s):
            resident = dict.fromkeys(PARTS, 0)
            _add(self._service.process.pid, "api", resident)
            self.samples.append(Sample(time.monotonic() - began, resident))


def _add(pid: int, part: str, resident: dict[str, int]) -> None:
    """This process and all below it; one that ends meanwhile is left out."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"worker" in arguments:
            part = "workers"
        elif any(b"sandbox" in argument for argument in arguments):
            part = "decoders"
        resident[part] += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
        children = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return
    for child in {int(child) for some in children for child in some}:
        _add(child, part, resident)


@dataclass(frozen=True, slots=True)
class Trend:
    """How a part's memory moved over the last half of a watch, in MiB: medians of the third and of the last
    quarter, and the least-squares slope over both, a minute."""

    third: float
    last: float
    slope: float

    def is_flat(self, share: float, slack_mib: float) -> bool:
        """Whether the last quarter's median is at most this share and this slack above the third's."""
        return self.last <= self.third * (1 + share) + slack_mib


def trend(samples: list[Sample], part: str) -> Trend:
    values = [(sample.at_s / 60, sample.resident[part] / MIB) for sample in samples]
    quarter = len(values) // 4
    third, last = values[2 * quarter : 3 * quarter], values[3 * quarter :]
    slope = statistics.linear_regression(*zip(*(third + last), strict=True)).slope
    return Trend(statistics.median(v for _, v in third), statistics.median(v for _, v in last), slope)
