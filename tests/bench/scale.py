"""What each kind of index costs and finds in a library of a size: `python -m tests.bench.scale`.

    python -m tests.bench.scale --count 200000 --dim 384

Fills a catalogue with that many segments, ten in a recording, and lets the library make each kind of index of
it, as a service would. One table: seconds to make it beside another (reading the catalogue, training and
measuring included), bytes of its snapshot, milliseconds of single questions (the exact vectors read from the
catalogue included), the share of the ten best recordings that it finds of those that flat finds, and both
under filters; then seconds to start from the snapshot, and what two processes share of it. One thread.

Recordings and questions are those of `tests.bench.index.Topics`.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clasp_core.index import VectorIndex
from clasp_core.ivf import IvfStore
from clasp_core.library import Library
from clasp_core.scaling import Scaling
from clasp_core.types import Embeddings
from tests.bench.index import KINDS, LIMIT, MODEL, filled
from tests.core.doubles import unit

QUESTIONS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=200_000, help="segments")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--folder", type=Path, help="where the library is made; by default a temporary one")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--mapped", action="store_true", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.open is not None:
        opened(wanted.open, wanted.dim, mapped=wanted.mapped)
        return
    with tempfile.TemporaryDirectory(dir=wanted.folder) as folder:
        measure(Path(folder), wanted.count, wanted.dim)


def measure(folder: Path, count: int, dim: int) -> None:
    began = time.perf_counter()
    made, vectors = filled(folder, count, dim)
    chosen = np.random.default_rng(1).choice(count, QUESTIONS, replace=False)
    questions, topics = made.asking_for(vectors[chosen]), made.topics
    del vectors
    print(f"{count:,} x {dim}, written in {time.perf_counter() - began:.0f} s\n", flush=True)
    chance = np.random.default_rng(3)
    keys = np.arange(1, len(topics) + 1)
    filters: dict[str, NDArray[np.int64] | None] = {
        "no filter": None,
        "50 %": keys[chance.random(len(keys)) < 0.5],
        "half of the topics": keys[np.isin(topics, np.flatnonzero(chance.random(topics.max() + 1) < 0.5))],
        "1 %": keys[chance.random(len(keys)) < 0.01],
        "0.01 %": keys[chance.random(len(keys)) < max(1e-4, 2 / len(keys))],
    }
    columns = "".join(f" {name}: ms p50 / p99, recall |" for name in filters)
    print(f"| kind | made in, s | MB |{columns}\n|{' --- |' * (3 + len(filters))}", flush=True)
    truth: dict[str, list[set[int]]] = {}
    started = []
    for kind in KINDS:
        scaling = Scaling(kind=kind, ivf=partial(IvfStore, exhaustive_up_to=count // 4))
        with closing(Library(folder, model=MODEL, dim=dim, scaling=scaling)) as library:
            began = time.perf_counter()
            library.rescale()
            made_s = time.perf_counter() - began
            index = library.refresh()
            assert index.kind == kind
            cells = []
            for name, among in filters.items():
                found, milliseconds = asked(index, questions, among)
                right = truth.setdefault(name, found)
                pairs = [(len(a & b), len(a)) for a, b in zip(right, found, strict=True) if a]
                recall = np.mean([both / all_of for both, all_of in pairs])
                p50, p99 = np.percentile(milliseconds, [50, 99])
                cells.append(f" {p50:.1f} / {p99:.1f}, {recall:.3f} |")
            library.save_index()
            size = sum(path.stat().st_size for path in (folder / "index").glob("vectors-*")) / 1e6
            note = "" if index.recall is None else f" ({index.recall.probes} of {index.lists} lists)"
            print(f"| {kind}{note} | {made_s:.1f} | {size:.0f} |{''.join(cells)}", flush=True)
            if index.recall is not None:
                print(f"measured while it was made: {index.recall}", file=sys.stderr)
        started += [f"| {kind} | {line} |" for line in starts(folder, dim)]
    print("\n| kind | snapshot | start, s | one process, MB | each of two, MB |\n|" + " --- |" * 5)
    print("\n".join(started))


def asked(
    index: VectorIndex, questions: Embeddings, among: NDArray[np.int64] | None
) -> tuple[list[set[int]], list[float]]:
    """What is found for each question alone, and how long that took, in milliseconds."""
    found, milliseconds = [], []
    for question in questions:
        began = time.perf_counter()
        (matches,) = index.search(question[None], [LIMIT], among=among)
        milliseconds.append(1000 * (time.perf_counter() - began))
        found.append({match.recording for match in matches})
    return found, milliseconds


def starts(folder: Path, dim: int) -> Iterator[str]:
    """Two processes that open the library, the second while the first still has it: seconds, and memory."""
    for mapped in (False, True):
        command = [sys.executable, "-m", "tests.bench.scale", "--open", str(folder), "--dim", str(dim)]
        command += ["--mapped"] if mapped else []
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        processes = []
        lines = []
        for _ in range(2):
            process = subprocess.Popen(command, **pipes)  # type: ignore[call-overload]
            processes.append(process)
            lines.append(process.stdout.readline().split())
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        shared = [process.stdout.readline().strip() for process in processes]
        for process in processes:
            process.communicate("\n")
        alone_s, alone_mb = lines[0]
        how = "mapped" if mapped else "read"
        yield f"{how} | {alone_s} | {alone_mb} | {' and '.join(shared)}"


def opened(folder: Path, dim: int, *, mapped: bool) -> None:
    """Open, search, and say how long it took and how much memory is ours: now, and when told."""
    bare = proportional_mb()
    began = time.perf_counter()
    library = Library(folder, model=MODEL, dim=dim, scaling=Scaling(mapped=mapped))
    index = library.refresh()
    index.search(unit(np.ones((1, dim))), [LIMIT])
    print(f"{time.perf_counter() - began:.2f} {proportional_mb() - bare:.0f}", flush=True)
    for question in unit(np.random.default_rng(0).standard_normal((20, dim))):
        index.search(question[None], [LIMIT])
    sys.stdin.readline()
    print(f"{proportional_mb() - bare:.0f}", flush=True)
    sys.stdin.readline()


def proportional_mb() -> float:
    """This process's memory, of which what it shares with others counts in parts (PSS; Linux)."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    return 0.0


if __name__ == "__main__":
    main()
