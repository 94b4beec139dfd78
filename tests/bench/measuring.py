"""What every benchmark shares: rounds in turn, rows of ratios, the files they go to, and what got worse.

Contenders are measured in turn, A B A B, so that whatever else the machine does falls on all of them alike. A
ratio is ours by theirs within a round; of the rounds the median counts, and the spread is all of them.
"""

import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeAlias

ROOT = Path(__file__).parent.parent.parent
OUT = ROOT / "bench-results"
FORMAT = "clasp-bench/1"
ROUNDS = 5
WORSE = 0.15
"""Change of a ratio that counts as worse."""
PACKAGES = ("torch", "openvino", "faiss-cpu", "ctranslate2", "fastapi", "uvicorn", "numpy")
"""Whose versions stand beside the figures."""

Better: TypeAlias = Literal["lower", "higher"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One quantity of ours, a value each round; beside it what it is compared with, and what bounds it."""

    part: str
    what: str
    unit: str
    better: Better
    """Which values are better; the same goes for the ratios."""
    ours: list[float]
    against: str = ""
    """What `theirs` is; empty where there is no contender."""
    theirs: list[float] = field(default_factory=list)
    target: float | None = None
    """Of the ratio ours / theirs: at most, where lower is better, otherwise at least."""
    limit: str = ""
    """What the machine allows at best: a bare model call, memory's bandwidth, arithmetic."""
    limits: list[float] = field(default_factory=list)
    """In the same unit, a value each round, or one for all of them."""
    note: str = ""
    """What belongs beside the figure, such as recall."""

    @property
    def name(self) -> str:
        """By which it is known again in another run."""
        return " / ".join(filter(None, (self.part, self.what, self.against)))

    @property
    def ratios(self) -> list[float]:
        return _ratios(self.ours, self.theirs)

    @property
    def of_limit(self) -> list[float]:
        return _ratios(self.ours, self.limits)

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.target is None:
            return None
        ratio = statistics.median(self.ratios)
        return ratio <= self.target if self.better == "lower" else ratio >= self.target


def _ratios(ours: Sequence[float], others: Sequence[float]) -> list[float]:
    if len(others) == 1:
        others = list(others) * len(ours)
    return (
        [mine / other if other else math.inf for mine, other in zip(ours, others, strict=True)]
        if others
        else []
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """How one quantity grows with another: points (x, y) of each series. It becomes a picture."""

    part: str
    name: str
    """In lower case with hyphens: also the picture's file name."""
    title: str
    x: str
    y: str
    series: dict[str, list[tuple[float, float]]]
    log: bool = False
    """Both axes."""
    note: str = ""
    """What bends it."""


Result: TypeAlias = Row | Curve


def in_turn(
    contenders: Mapping[str, Callable[[], float]], rounds: int = ROUNDS, *, warm: bool = True
) -> dict[str, list[float]]:
    """What each contender's call gives, once a round, in turn; to `warm` up, once before."""
    if warm:
        for call in contenders.values():
            call()
    values: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            values[name].append(call())
    return values


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def document(results: Iterable[Result]) -> dict[str, Any]:
    """What is written as JSON."""
    results = list(results)
    return {
        "format": FORMAT,
        "machine": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "rows": [asdict(one) for one in results if isinstance(one, Row)],
        "curves": [asdict(one) for one in results if isinstance(one, Curve)],
    }


def read(path: Path) -> list[Result]:
    """The inverse. Raises ValueError for a file of another format."""
    found = json.loads(path.read_text())
    if found.get("format") != FORMAT:
        raise ValueError(f"{path} is no {FORMAT}")
    curves = [
        Curve(
            **{**curve, "series": {name: [(x, y) for x, y in line] for name, line in curve["series"].items()}}
        )
        for curve in found["curves"]
    ]
    return [*(Row(**row) for row in found["rows"]), *curves]


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def table(rows: Sequence[Row]) -> str:
    """Markdown, a line each; the part is left to a heading."""
    lines = [
        "| what | ours | against | theirs | ours / theirs | target | limit | ours / limit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        what = f"{row.what}, {row.unit}" + (f" ({row.note})" if row.note else "")
        target = ""
        if row.target is not None:
            bound = "at most" if row.better == "lower" else "at least"
            target = f"{bound} {row.target:g}: {'met' if row.met else 'missed'}"
        limit = f"{row.limit}: {_middle(row.limits)}" if row.limits else row.limit
        cells = (
            what,
            _middle(row.ours),
            row.against,
            _middle(row.theirs),
            _middle(row.ratios, spread=True),
            target,
            limit,
            _middle(row.of_limit, spread=True),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def targets(rows: Sequence[Row]) -> str:
    """Markdown: what was aimed at, and what came of it."""
    lines = ["| what | against | ours / theirs | target | |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        bound = "at most" if row.better == "lower" else "at least"
        ratio = _middle(row.ratios, spread=True)
        met = "met" if row.met else "**missed**"
        lines.append(f"| {row.what} | {row.against} | {ratio} | {bound} {row.target:g} | {met} |")
    return "\n".join(lines) + "\n"


def _middle(values: Sequence[float], *, spread: bool = False) -> str:
    if not values:
        return ""
    middle = _short(statistics.median(values))
    if not spread or len(values) == 1:
        return middle
    return f"{middle} ({_short(min(values))} to {_short(max(values))})"


def _short(value: float) -> str:
    if value and abs(value) < 100:
        return f"{value:.3g}"
    return f"{value:,.0f}" if math.isfinite(value) else str(value)


@dataclass(frozen=True, slots=True)
class Change:
    """A ratio then and now; `worse` by this share: 0.2 is a fifth worse, below 0 is better."""

    name: str
    then: float
    now: float
    worse: float


def changes(then: Iterable[Result], now: Iterable[Result]) -> list[Change]:
    """Of every ratio that both runs have, to a contender or else to a limit; the worst first.

    Quantities without either are the machine's own, and not compared.
    """
    before = {row.name: row for row in then if isinstance(row, Row)}
    found = []
    for row in now:
        if not isinstance(row, Row) or row.name not in before:
            continue
        for label, old, new in (
            ("", before[row.name].ratios, row.ratios),
            (f" / {row.limit}", before[row.name].of_limit, row.of_limit),
        ):
            if old and new:
                a, b = statistics.median(old), statistics.median(new)
                worse = b / a - 1 if row.better == "lower" else a / b - 1
                found.append(Change(row.name + label, a, b, worse))
    return sorted(found, key=lambda change: -change.worse)


def absent(package: str) -> None:
    """Say that rows of a rival are left out."""
    print(f"{package} is not installed: its rows are left out", file=sys.stderr)
