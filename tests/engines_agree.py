"""Every engine that searches vectors, asked the same: do they agree with arithmetic, and what do they cost?

    python -m tests.engines_agree --vectors 200000 --dim 384
    python -m tests.engines_agree --engines "faiss,torch" --out engines.json

Makes one catalogue of segments in topics (recordings of ten, in several collections, with metadata), and
lets each engine, in a process of its own and on a copy, build its index from it through `Library`. All are
asked the same: plain questions, in a collection, by a narrow filter (one recording in 100), for segments, and
again after one in a hundred was deleted. What is right says numpy in float64, over everything. An exact
engine must give the same hits in the same order with scores within 1e-5 (what scores alike within that may
change places); an approximate one must find 95 % of the ten best in each kind of question. The exit status is
1 where one does not.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from app import opening
from app.settings import Settings
from clasp_core.catalog import Catalog, EmbeddedSegment, StoredModel, note_change, store_vectors
from clasp_core.database import RECORDINGS
from clasp_core.errors import IndexUnavailable
from clasp_core.filters import Condition, Filter
from clasp_core.index import Grouping
from clasp_core.library import CATALOG_FILE, Hit, Library, Question
from clasp_core.types import Embeddings
from tests.core.doubles import unit
from tests.load_proof import percentiles
from tests.service import ROOT

SEGMENTS = 10
"""Of each recording."""
COLLECTIONS = 5
NARROW = 100
"""One recording in so many has the metadata that the narrow filter wants."""
LIMIT = 10
WITHIN = 1e-5
FLOOR = 0.95
FINGERPRINT = "a9eea9eea9eea9ee"


@dataclass(frozen=True, slots=True)
class Engine:
    """Settings that choose it, and whether it promises to find what is best, or only most of that."""

    settings: dict[str, Any]
    exact: bool = True


ENGINES = {
    "faiss": Engine({"vector_store": "faiss", "vector_index": "flat"}),
    "torch": Engine({"vector_store": "torch", "vector_index": "flat"}),
    "faiss half": Engine({"vector_store": "faiss", "vector_index": "half"}),
    "faiss ivf": Engine({"vector_store": "faiss", "vector_index": "ivf"}, exact=False),
    "milvus lite": Engine({"vector_store": "milvus:lite"}),
    "milvus": Engine({"vector_store": "milvus:server"}),
    "milvus ivf": Engine({"vector_store": "milvus:server", "vector_index": "ivf"}, exact=False),
}
"""`milvus:lite` and `milvus:server` are servers of our own."""


class EngineAbsent(Exception):
    """This version of the program, or this machine, does not have that engine."""


class Pool:
    """The vectors, what recordings they are of, and the questions; the same for the same arguments."""

    def __init__(self, vectors: int, dim: int, questions: int) -> None:
        chance = np.random.default_rng(0)
        self.dim = dim
        self.recordings = vectors // SEGMENTS
        self.vectors = _in_topics(chance, self.recordings, dim)
        gaps = unit(chance.normal(size=(questions, dim)))
        self.questions = unit(self.vectors[chance.integers(len(self.vectors), size=questions)] + 0.8 * gaps)
        self.deleted = chance.permutation(self.recordings)[: self.recordings // 100]

    @cached_property
    def scores(self) -> NDArray[np.float64]:
        """Of every vector for every question (questions, vectors)."""
        scores = np.empty((len(self.questions), len(self.vectors)))
        for first in range(0, len(self.vectors), 20_000):
            some = slice(first, first + 20_000)
            scores[:, some] = self.questions.astype(np.float64) @ self.vectors[some].astype(np.float64).T
        return scores

    def name(self, recording: int) -> str:
        return f"r{recording:07}"

    def collection(self, recording: int) -> str:
        return f"c{recording % COLLECTIONS}"

    def fill(self, folder: Path) -> None:
        """A catalogue of ready recordings with keys from 1 on, as workers would have left them."""
        with closing(Catalog(f"sqlite:///{folder / CATALOG_FILE}")) as catalog:
            self._fill(catalog)

    def _fill(self, catalog: Catalog) -> None:
        catalog.adopt(StoredModel(FINGERPRINT, "agreeing", self.dim))
        now = datetime.now(UTC).replace(tzinfo=None)
        for first in range(0, self.recordings, 500):
            some = range(first, min(first + 500, self.recordings))
            rows = [
                {
                    "key": 1 + number,
                    "id": self.name(number),
                    "collection": self.collection(number),
                    "sha256": f"{number:064x}",
                    "size_bytes": 1,
                    "metadata": {"narrow": number % NARROW == 0},
                    "created_at": now,
                    "status": "ready",
                    "duration_s": float(SEGMENTS),
                    "segments": SEGMENTS,
                    "model": FINGERPRINT,
                    "attempts": 1,
                }
                for number in some
            ]
            with catalog.database.writing() as db:
                db.execute(sa.insert(RECORDINGS), rows)
                for number in some:
                    theirs = self.vectors[SEGMENTS * number : SEGMENTS * (number + 1)]
                    segments = [EmbeddedSegment(float(n), n + 1.0, row) for n, row in enumerate(theirs)]
                    store_vectors(db, 1 + number, FINGERPRINT, segments)
                note_change(db, [1 + number for number in some])


def _in_topics(chance: np.random.Generator, recordings: int, dim: int) -> Embeddings:
    """Segments of recordings, each about a topic, some topics far more often than others (Zipf): centres and
    what differs within a topic lie in 64 dimensions, and some noise in all."""
    latent = min(64, dim)
    topics = max(2, recordings * SEGMENTS // 200)
    centres = chance.normal(size=(topics, latent)) / np.sqrt(latent)
    shares = 1 / np.arange(1, topics + 1)
    topic = np.repeat(chance.choice(topics, size=recordings, p=shares / shares.sum()), SEGMENTS)
    turn = np.linalg.qr(chance.normal(size=(dim, latent)))[0].T
    rows = []
    for some in np.array_split(topic, max(1, len(topic) // 20_000)):
        inside = centres[some] + 0.55 * chance.normal(size=(len(some), latent)) / np.sqrt(latent)
        rows.append(unit(inside @ turn + 0.35 * chance.normal(size=(len(some), dim)) / np.sqrt(dim)))
    return np.concatenate(rows)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of question."""

    question: Question
    meant: Callable[[NDArray[np.int64]], NDArray[np.bool_]]
    """Which recordings, by their numbers, pass its filter."""
    after_deletion: bool = False


def kinds() -> dict[str, Kind]:
    narrow = Filter(metadata=(Condition("narrow", "eq", "true"),))
    everything = np.ones_like
    return {
        "plain": Kind(Question(LIMIT), lambda n: everything(n, bool)),
        "collection": Kind(Question(LIMIT, Filter(collection="c3")), lambda n: n % COLLECTIONS == 3),
        "narrow": Kind(Question(LIMIT, narrow), lambda n: n % NARROW == 0),
        "segments": Kind(Question(LIMIT, group_by="segment"), lambda n: everything(n, bool)),
        "after deletion": Kind(Question(LIMIT), lambda n: everything(n, bool), after_deletion=True),
    }


Found = list[tuple[str, int, float]]
"""For each hit the recording's id, the place of its best segment, and the score."""


def oracle(pool: Pool, kind: Kind) -> list[Found]:
    """What is right, and what is behind it that may change places with the last."""
    here = kind.meant(np.arange(pool.recordings))
    if kind.after_deletion:
        here[pool.deleted] = False
    inside = np.repeat(here, SEGMENTS)
    return [_best(pool, np.where(inside, row, -np.inf), kind.question.group_by) for row in pool.scores]


def _best(pool: Pool, scores: NDArray[np.float64], group_by: Grouping) -> Found:
    if group_by == "recording":
        table = scores.reshape(-1, SEGMENTS)
        segments = np.arange(len(table)) * SEGMENTS + table.argmax(axis=1)
    else:
        segments = np.arange(len(scores))
    bests = scores[segments]
    cutoff = np.partition(bests, -LIMIT)[-LIMIT] - 2 * WITHIN
    chosen = segments[(bests >= cutoff) & np.isfinite(bests)]
    found = [(pool.name(place // SEGMENTS), int(place % SEGMENTS), float(scores[place])) for place in chosen]
    return sorted(found, key=lambda hit: (-hit[2], hit[0], hit[1]))


@dataclass(frozen=True, slots=True)
class Agreement:
    """How one engine's answers to one kind of question compare with the right ones."""

    recall: float
    """Mean share of the right hits that were found."""
    equal: float
    """Share of the questions with the same hits in the same order, but for what scores alike."""
    off: float
    """Largest difference of a score from the right one."""
    p50_ms: float
    p99_ms: float


def compare(right: Sequence[Found], given: Sequence[Found], seconds: list[float]) -> Agreement:
    recalls, equal, off = [], 0, 0.0
    for wanted, found in zip(right, given, strict=True):
        known = {hit[:2]: hit[2] for hit in wanted}
        best = wanted[:LIMIT]
        named = {hit[:2] for hit in found}
        recalls.append(len(named & {hit[:2] for hit in best}) / len(best) if best else 1.0)
        differences = [abs(known[hit[:2]] - hit[2]) for hit in found if hit[:2] in known]
        off = max([off, *differences])
        placed = [abs(one[2] - known.get(hit[:2], np.inf)) for one, hit in zip(best, found, strict=False)]
        equal += len(found) == len(best) == len(named) and max(placed, default=0.0) <= WITHIN
    took = percentiles(seconds)
    return Agreement(float(np.mean(recalls)), equal / len(right), off, took["p50"], took["p99"])


def ask(library: Library, pool: Pool, kind: Kind) -> tuple[list[Found], list[float]]:
    """The hits of each question, asked by itself, and the seconds that each took."""
    given, seconds = [], []
    library.search(pool.questions[:1], [kind.question])
    for row in range(len(pool.questions)):
        began = time.perf_counter()
        (hits,) = library.search(pool.questions[row : row + 1], [kind.question])
        seconds.append(time.perf_counter() - began)
        given.append([_hit(hit) for hit in hits])
    return given, seconds


def _hit(hit: Hit) -> tuple[str, int, float]:
    return hit.recording.id, int(hit.segments[0].start_s), hit.score


def measure(name: str, engine: Engine, folder: Path, pool: Pool) -> dict[str, Any]:
    """One engine on a copy of the catalogue, whose index it has to build. Raises EngineAbsent."""
    if missing := engine.settings.keys() - Settings.model_fields.keys() - {"vector_index"}:
        raise EngineAbsent(f"there is no setting {missing}")
    if "vector_index" not in Settings.model_fields and engine.settings.get("vector_index", "flat") != "flat":
        raise EngineAbsent("there is no setting vector_index")
    chosen = engine.settings | {"vector_store": _with_server(engine.settings["vector_store"])}
    model = SimpleNamespace(fingerprint=FINGERPRINT, name="agreeing", dim=pool.dim)
    copy = folder / "copy"
    copy.mkdir()
    try:
        shutil.copy(folder / CATALOG_FILE, copy)
        assert pool.scores.size  # made before memory is measured
        before = _resident_mib()
        settings = Settings(data_dir=copy, device="cpu", _env_file=None, **chosen)  # type: ignore[call-arg]
        with patch.object(opening, "open_configured_model", lambda *_: model):
            _, library = opening.open_configured_library(settings)
        with closing(library):
            began = time.perf_counter()
            library.refresh()
            if (rescale := getattr(library, "rescale", None)) is not None:
                rescale()
            built_s = time.perf_counter() - began
            agreements = {}
            for what, kind in kinds().items():
                if kind.after_deletion:
                    for recording in pool.deleted:
                        library.delete(pool.name(recording))
                agreements[what] = compare(oracle(pool, kind), *ask(library, pool, kind))
            return {
                "engine": name,
                "exact": engine.exact,
                "built_s": round(built_s, 2),
                "memory_mib": round(_resident_mib() - before),
                "agreement": {what: asdict(agreement) for what, agreement in agreements.items()},
                "complaints": list(complaints(name, engine, agreements)),
            }
    except IndexUnavailable as error:
        raise EngineAbsent(error.detail) from error
    finally:
        shutil.rmtree(copy)


def _with_server(store: str) -> str:
    kind, _, which = store.partition(":")
    if kind != "milvus":
        return store
    try:
        from tests import milvus
    except ImportError as error:
        raise EngineAbsent(f"there is no {error.name}") from error
    return f"milvus:{milvus.lite_server() if which == 'lite' else milvus.whole_server()}"


def complaints(name: str, engine: Engine, agreements: dict[str, Agreement]) -> list[str]:
    return [
        f"{name}, {what}: {agreement}"
        for what, agreement in agreements.items()
        if agreement.off > WITHIN or (agreement.equal < 1 if engine.exact else agreement.recall < FLOOR)
    ]


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / (1 << 20)


def table(results: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| engine | built, s | memory, MiB | question | recall@10 | as it should be | p50, ms | p99, ms |"
    ]
    lines.append("|" + " --- |" * 8)
    for result in results:
        for number, (what, one) in enumerate(result["agreement"].items()):
            about = [result["engine"], str(result["built_s"]), str(result["memory_mib"])]
            figures = f"{one['recall']:.3f} | {one['equal']:.3f} | {one['p50_ms']:.1f} | {one['p99_ms']:.1f}"
            lines.append(f"| {' | '.join(['', '', ''] if number else about)} | {what} | {figures} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--vectors", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--questions", type=int, default=200, help="of each kind")
    parser.add_argument("--engines", default=",".join(ENGINES), help="by commas")
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON")
    parser.add_argument("--in-folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    pool = Pool(options.vectors, options.dim, options.questions)
    names = [name.strip() for name in options.engines.split(",")]
    if options.in_folder:
        try:
            print(json.dumps(measure(names[0], ENGINES[names[0]], options.in_folder, pool)))
        except EngineAbsent as absent:
            print(json.dumps({"absent": str(absent)}))
        return 0
    results = []
    with tempfile.TemporaryDirectory() as folder:
        pool.fill(Path(folder))
        for name in names:
            size = ["--vectors", options.vectors, "--dim", options.dim, "--questions", options.questions]
            command = [sys.executable, "-m", "tests.engines_agree", "--engines", name, "--in-folder", folder]
            done = subprocess.run(
                [*command, *map(str, size)], cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True
            )
            result = json.loads(done.stdout.splitlines()[-1])
            if "absent" in result:
                print(f"without {name}: {result['absent']}", file=sys.stderr)
            else:
                results.append(result)
    summary = {
        "vectors": options.vectors,
        "dim": options.dim,
        "questions": options.questions,
        "engines": results,
    }
    if options.out:
        options.out.write_text(json.dumps(summary, indent=1) + "\n")
    print(table(results))
    wrong = [complaint for result in results for complaint in result["complaints"]]
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
