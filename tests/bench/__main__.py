"""`make bench`, or `python -m tests.bench [PART ...]`: this system beside what one would take instead.

Writes bench-results/bench.json, bench.md and a picture for each curve. Then tells which ratios are worse
by more than 15 % than those of docs/measured/bench.json; where there are any, it fails. Parts that are not
run keep what an earlier run wrote there. `--full` adds what takes hours: millions of vectors. Uses the
bundled samples only.
"""

import argparse
import importlib
import json
import shutil
import sys
from pathlib import Path

from tests.bench.measuring import (
    OUT,
    ROOT,
    WORSE,
    Curve,
    Result,
    Row,
    changes,
    document,
    read,
    table,
    targets,
)

KEPT = ROOT / "docs" / "measured"
PARTS = ("encoders", "ingest", "query", "index", "growth", "paper")
"""Modules of this package: each has `measure(full)`, which yields rows and curves as they come."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--against", type=Path, default=KEPT / "bench.json", help="the run to compare with")
    parser.add_argument("--compare", action="store_true", help="measure nothing: compare what was written")
    parser.add_argument("--keep", action="store_true", help="put what was written into docs/measured")
    wanted = parser.parse_args()
    if unknown := set(wanted.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    if not wanted.compare and not wanted.keep:
        for part in wanted.parts or PARTS:
            run(part, wanted.out, full=wanted.full)
    if wanted.keep:
        shutil.copytree(wanted.out, KEPT, dirs_exist_ok=True, ignore=_not_ours)
        return 0
    return compare(wanted.against, wanted.out / "bench.json")


def run(part: str, out: Path, *, full: bool) -> None:
    """Measure one part; written after every result, so that an end before the end loses little."""
    kept = [one for one in read(out / "bench.json") if one.part != part] if _written(out) else []
    results: list[Result] = []
    print(f"## {part}\n", flush=True)
    for result in importlib.import_module(f"tests.bench.{part}").measure(full):
        results.append(result)
        print(
            table([result]).splitlines()[-1] if isinstance(result, Row) else f"curve {result.name}",
            flush=True,
        )
        write(out, [*kept, *results])


def write(out: Path, results: list[Result]) -> None:
    results = sorted(results, key=lambda one: PARTS.index(one.part))
    out.mkdir(parents=True, exist_ok=True)
    found = document(results)
    (out / "bench.json").write_text(json.dumps(found, indent=1) + "\n")
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    text = f"# Measured\n\n`make bench` on {found['machine']}, {found['cores']} cores; {packages}.\n"
    if aimed := [one for one in results if isinstance(one, Row) and one.target is not None]:
        text += f"\n## Targets\n\n{targets(aimed)}"
    for part in PARTS:
        rows = [one for one in results if isinstance(one, Row) and one.part == part]
        curves = [one for one in results if isinstance(one, Curve) and one.part == part]
        if rows or curves:
            text += f"\n## {part.capitalize()}\n"
        if rows:
            text += f"\n{table(rows)}"
        for curve in curves:
            draw(curve, out / f"{curve.name}.svg")
            text += f"\n![{curve.title}]({curve.name}.svg)\n\n{curve.note}\n"
    (out / "bench.md").write_text(text)


def draw(curve: Curve, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "clasp"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, points in curve.series.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    if curve.log:
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.set(title=curve.title, xlabel=curve.x, ylabel=curve.y)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def compare(then: Path, now: Path) -> int:
    if not then.exists():
        print(f"\nnothing to compare with: {then} is not there")
        return 0
    found = changes(read(then), read(now))
    worse = [change for change in found if change.worse > WORSE]
    print(
        f"\n{len(found)} ratios compared with {then.parent.name}/{then.name}:"
        f" {len(worse)} worse by more than {WORSE:.0%}"
    )
    for change in worse:
        print(f"  {change.worse:+.0%}  {change.then:.3g} -> {change.now:.3g}  {change.name}")
    return 1 if worse else 0


def _written(out: Path) -> bool:
    return (out / "bench.json").exists()


def _not_ours(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if not (name.startswith("bench.") or name.endswith(".svg"))}


if __name__ == "__main__":
    sys.exit(main())
