"""Search beside what one would take instead, with the recall of both: part `index` of `make bench`.

Ours goes through the index as a service has it: a library with its catalogue, nearest vectors, recordings,
exact scores, for which the 16-bit kinds read vectors from the catalogue. Rivals give the numbers of the ten
nearest vectors. One thread for each. Vectors are those of `Topics`; recall is of ten recordings here, of ten
segments there. What is approximate is set, on other questions than those that are measured, to find as much
as ours.

`full` adds a million vectors, graphs at 100,000 x 768, more of them at 100,000 x 384, and a start with a
million segments.
"""

import gc
import importlib
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import httpx
import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from clasp_core.catalog import Changes
from clasp_core.errors import IndexUnavailable
from clasp_core.index import VectorIndex
from clasp_core.ivf import SAMPLE_PER_LIST
from clasp_core.library import Library
from clasp_core.models import open_model
from clasp_core.scaling import Scaling
from clasp_core.types import Embeddings
from clasp_core.vectors import Kind, StoreMaker, store_for
from tests.bench.measuring import Curve, Result, Row, in_turn, seconds
from tests.core.doubles import store_ready, unit
from tests.service import RunningService, eventually

PART = "index"
MODEL = "bench"
SIZES = [(10_000, 384), (10_000, 768), (100_000, 384), (100_000, 768)]
MORE_SIZES = [(1_000_000, 384), (1_000_000, 768)]
CURVE_DIM = 384
CURVE_SIZES = (3_000, 30_000)
"""Beside those above."""
BATCH = 32
LIMIT = 10
SEGMENTS = 10
"""Of each recording."""
QUESTIONS = 128
"""So many to measure by, and as many others to choose settings by."""
KINDS: tuple[Kind, ...] = ("flat", "half", "ivf")
STORES = {
    "torch, CPU": partial(store_for, "torch", "cpu"),
    "faiss, GPU": partial(store_for, "faiss", "cuda"),
    "faiss, GPU, half": partial(store_for, "faiss", "cuda", half=True),
    "torch, GPU": partial(store_for, "torch", "cuda"),
}
"""Of ours, beside the default."""
ROUND_S = 0.2
"""How long one contender is asked in one round, about: then questions are enough."""
EFFORTS = (10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 80, 96, 128, 192, 256, 384, 512, 768, 1024)
"""What HNSW is tried with: how many candidates it keeps (ef)."""
BUILD_WITHIN_S, BUILD_FULL_WITHIN_S = 60, 900
RECORDINGS = 100_000
START_WITHIN_S = 5.0
"""The issue's target for so many recordings."""
STARTS = 5


def measure(full: bool) -> Iterator[Result]:
    yield from starts(full)
    lines: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    sizes = [*SIZES, *((count, CURVE_DIM) for count in CURVE_SIZES), *(MORE_SIZES if full else [])]
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(1):
        for place, (count, dim) in enumerate(sizes):
            here = Path(folder) / f"{place}"
            bench = Bench.made(here, count, dim, full=full)
            if count in CURVE_SIZES:
                for kind in KINDS:
                    with bench.ours(kind) as ours:
                        lines[kind].append((count, in_turn({"": ours.asked(1)}, 3)[""][1]))
            else:
                for row in bench.rows():
                    if isinstance(row, Row):
                        yield row
                for kind, milliseconds in bench.alone.items():
                    if dim == CURVE_DIM:
                        lines[kind].append((count, milliseconds))
            shutil.rmtree(here)
            del bench
            gc.collect()
    yield Curve(
        part=PART,
        name="search-by-size",
        title="One question, by the number of segments",
        x=f"segments x {CURVE_DIM}",
        y="ms",
        series={kind: sorted(points) for kind, points in lines.items()},
        log=True,
        note="`flat` and `half` read every vector: linear, and steeper where they leave the processor's cache"
        " for memory; half of the bytes are half of the time. At the left end is what a question costs at"
        " least, which for `half` and `ivf` includes reading the catalogue. `ivf` has 4 x sqrt(n) lists, and"
        " looks at those of them that recall needs.",
    )


# --- the vectors


class Topics:
    """Segments in recordings of ten, around topics of about 200 segments whose sizes follow Zipf's law, in 64
    dimensions with noise in all; and questions that are segments seen through another modality: cosines with
    what they ask for are around 0.78."""

    LATENT = 64

    def __init__(self, recordings: int, dim: int) -> None:
        self._dim = dim
        self._chance = np.random.default_rng(0)
        per_topic = max(2, recordings * SEGMENTS // 200)
        self._centres = self._chance.standard_normal((per_topic, self.LATENT)).astype(np.float32)
        shares = 1 / np.arange(1, len(self._centres) + 1) ** 0.8
        self.topics = self._chance.choice(len(self._centres), recordings, p=shares / shares.sum())
        """By recording."""
        normal = self._chance.standard_normal((dim, self.LATENT))
        self._lift = np.linalg.qr(normal)[0].T.astype(np.float32)

    def of(self, recordings: slice) -> Embeddings:
        """The segments (n, 10, dim) of the next recordings; others each time."""
        chosen = self.topics[recordings]
        latent = np.repeat(self._centres[chosen], SEGMENTS, axis=0)
        latent += 0.55 * self._chance.standard_normal(latent.shape).astype(np.float32)
        noise = self._chance.standard_normal((len(latent), self._dim), np.float32) / np.sqrt(self._dim)
        vectors = unit(unit(latent) @ self._lift + 0.35 * noise.astype(np.float32))
        return vectors.reshape(len(chosen), SEGMENTS, self._dim)

    def asking_for(self, vectors: Embeddings) -> Embeddings:
        """A question for each of these."""
        return unit(vectors + 0.8 * unit(self._chance.standard_normal(vectors.shape)))


AT_ONCE = 2000
"""Recordings written in one transaction."""


def filled(folder: Path, count: int, dim: int) -> tuple[Topics, Embeddings]:
    """A library of so many segments in the folder; its vectors."""
    recordings = count // SEGMENTS
    topics = Topics(recordings, dim)
    vectors = np.empty((recordings, SEGMENTS, dim), np.float32)
    with closing(Library(folder, model=MODEL, dim=dim, scaling=Scaling(kind="flat"))) as library:
        for start in range(0, recordings, AT_ONCE):
            some = slice(start, min(start + AT_ONCE, recordings))
            vectors[some] = topics.of(some)
            parts = {start + 1 + row: part for row, part in enumerate(vectors[some])}
            store_ready(library.catalog, MODEL, parts)
    return topics, vectors.reshape(-1, dim)


def speech_like(count: int, dim: int) -> tuple[Embeddings, Embeddings]:
    """Segments in topics of about 200, and questions that are segments seen through another modality."""
    chance = np.random.default_rng(0)
    topics = chance.normal(size=(count // 200, dim)).astype(np.float32)
    vectors = topics[chance.integers(len(topics), size=count)]
    vectors = unit(vectors + 0.8 * chance.standard_normal((count, dim), np.float32))
    chosen = vectors[chance.integers(count, size=QUESTIONS)]
    return vectors, unit(chosen + 0.8 * unit(chance.normal(size=(QUESTIONS, dim))))


def everything(vectors: Embeddings) -> Changes:
    owners, ordinals = np.divmod(np.arange(len(vectors)), SEGMENTS)
    return Changes(1, frozenset(owners.tolist()), owners, ordinals, vectors)


# --- contenders

Search = Callable[[Embeddings], list[set[int]]]
"""What is found of each question: ten segments or, ours, ten recordings."""


@dataclass
class Contender:
    search: Search
    questions: Embeddings
    right: list[set[int]]
    """What is to be found of each."""

    def asked(self, batch: int) -> Callable[[], float]:
        """A call that asks for a while, and gives the milliseconds of a batch."""
        batches = [self.questions[at : at + batch] for at in range(0, len(self.questions) - batch + 1, batch)]
        self.search(batches[0])
        once = seconds(lambda: self.search(batches[-1]))
        chosen = batches[: max(1, min(len(batches), int(ROUND_S / once)))]

        def ask() -> float:
            began = time.perf_counter()
            for some in chosen:
                self.search(some)
            return 1000 * (time.perf_counter() - began) / len(chosen)

        return ask

    def recall(self, of: int = QUESTIONS) -> float:
        """Of the first questions."""
        return recall(self.right[:of], self.search(self.questions[:of]))


def recall(right: Sequence[set[int]], found: Sequence[set[int]]) -> float:
    return float(np.mean([len(a & b) / len(a) for a, b in zip(right, found, strict=True)]))


def rows_of(found: NDArray[np.integer]) -> list[set[int]]:
    return [set(row) for row in found.tolist()]


@dataclass
class Bench:
    """One size: the library, and what is right."""

    folder: Path
    vectors: Embeddings
    others: Embeddings
    """Questions to choose settings by."""
    questions: Embeddings
    full: bool
    build_within_s: float
    alone: dict[Kind, float] = field(default_factory=dict)
    """Milliseconds of one question to each kind of ours."""

    @classmethod
    def made(cls, folder: Path, count: int, dim: int, *, full: bool) -> "Bench":
        topics, vectors = filled(folder, count, dim)
        chosen = np.random.default_rng(1).choice(count, 2 * QUESTIONS, replace=False)
        asked = topics.asking_for(vectors[chosen])
        within_s = BUILD_FULL_WITHIN_S if full else BUILD_WITHIN_S
        return cls(folder, vectors, asked[:QUESTIONS], asked[QUESTIONS:], full, within_s)

    def __post_init__(self) -> None:
        count, dim = self.vectors.shape
        self.size = f"{count:,} x {dim}"
        self.segments, self.recordings = {}, {}
        for name, questions in (("others", self.others), ("questions", self.questions)):
            best = faiss.knn(questions, self.vectors, 100, metric=faiss.METRIC_INNER_PRODUCT)[1]
            self.segments[name] = rows_of(best[:, :LIMIT])
            # keys begin with 1; ten recordings are in a hundred segments, being of ten each
            self.recordings[name] = [
                set(list(dict.fromkeys(row))[:LIMIT]) for row in (best // SEGMENTS + 1).tolist()
            ]

    def rival(self, search: Search, which: str = "questions") -> Contender:
        return Contender(search, getattr(self, which), self.segments[which])

    @contextmanager
    def ours(self, kind: Kind) -> Iterator[Contender]:
        scaling = Scaling(kind=kind)
        with closing(
            Library(self.folder, model=MODEL, dim=self.vectors.shape[1], scaling=scaling)
        ) as library:
            library.rescale()
            index = library.refresh()
            assert isinstance(index, VectorIndex)
            assert index.kind == kind
            if index.recall is not None:
                self.lists, self.probes = index.lists, index.recall.probes
            library.save_index()
            yield Contender(partial(self._search, index), self.questions, self.recordings["questions"])

    @staticmethod
    def _search(index: VectorIndex, questions: Embeddings) -> list[set[int]]:
        found = index.search(questions, [LIMIT] * len(questions))
        return [{match.recording for match in matches[:LIMIT]} for matches in found]

    # --- what memory and arithmetic allow

    def reading(self, share: float = 1.0) -> Callable[[], float]:
        """Milliseconds to read such a share of the vectors' bytes, on one thread: their sum, by torch."""
        import torch

        numbers = torch.from_numpy(self.vectors).view(-1)
        numbers = numbers[: max(1, int(share * len(numbers)))]
        return lambda: 1000 * seconds(numbers.sum)

    def multiplying(self) -> Callable[[], float]:
        """Milliseconds of the bare product with a batch: blocks that stay in the cache, into one place."""
        queries = np.ascontiguousarray(self.questions[:BATCH].T)
        products = np.empty((4096, BATCH), np.float32)

        def multiply() -> None:
            for start in range(0, len(self.vectors), len(products)):
                block = self.vectors[start : start + len(products)]
                np.matmul(block, queries, out=products[: len(block)])

        return lambda: 1000 * seconds(multiply)

    # --- rows

    def rows(self) -> Iterator[Result]:
        for kind in KINDS:
            with self.ours(kind) as ours:
                of = QUESTIONS if kind == "ivf" else BATCH
                ours_recall = ours.recall(of)
                rivals = self.exact(kind) if kind != "ivf" else self.approximate(ours_recall)
                read = {"flat": 1.0, "half": 0.5, "ivf": 0.0}[kind]
                if kind == "ivf":
                    read = 0.5 * self.probes / self.lists
                label = {"flat": "exact", "half": "exact, half", "ivf": "approximate"}[kind]
                for name, build, batches in rivals:
                    found = built(name, build)
                    if found is None:
                        continue
                    note, search = found
                    theirs = self.rival(search)
                    note = f"recall {ours_recall:.3f}, theirs {theirs.recall(of):.3f}{note}"
                    for batch in batches:
                        yield self.row(label, kind, read, ours, name, theirs, batch, note)
                    del theirs, search, found
                    gc.collect()
            if len(self.vectors) >= 100_000:
                yield self.memory(kind)
        if len(self.vectors) <= SIZES[-1][0]:
            for name, maker in stores():
                yield from self.store(name, maker)

    def row(
        self,
        label: str,
        kind: Kind,
        read: float,
        ours: Contender,
        name: str,
        theirs: Contender,
        batch: int,
        note: str,
    ) -> Row:
        calls = {"ours": ours.asked(batch), "theirs": theirs.asked(batch)}
        limit = "reading what is looked at" if kind == "ivf" else "reading the vectors"
        calls["limit"] = self.reading(read)
        if batch > 1 and kind != "ivf":
            limit = "the bare product"
            calls["limit"] = self.multiplying()
        elif batch > 1:
            limit = ""
            del calls["limit"]
        values = in_turn(calls)
        if batch == 1:
            self.alone.setdefault(kind, float(np.median(values["ours"])))
        return Row(
            part=PART,
            what=f"{label}, {self.size}, {'one question' if batch == 1 else f'{batch} questions'}",
            unit="ms",
            better="lower",
            ours=values["ours"],
            against=name,
            theirs=values["theirs"],
            limit=limit,
            limits=values.get("limit", []),
            note=note,
        )

    def store(self, name: str, maker: StoreMaker) -> Iterator[Row]:
        """Another store of ours, beside the default's rival: all stores find the same."""
        index = VectorIndex(self.vectors.shape[1], MODEL, maker)
        index.apply(everything(self.vectors))
        ours = Contender(partial(self._search, index), self.questions, self.recordings["questions"])
        flat = faiss.IndexFlatIP(self.vectors.shape[1])
        flat.add(self.vectors)
        theirs = self.rival(lambda questions: rows_of(flat.search(questions, LIMIT)[1]))
        for batch in (1, BATCH):
            yield self.row(f"{name} store", "flat", 1.0, ours, "faiss IndexFlatIP", theirs, batch, "")

    def memory(self, kind: Kind) -> Row:
        """Of a process that opens the library, from the snapshot that is there."""
        count, dim = self.vectors.shape
        command = [sys.executable, "-m", "tests.bench.scale", "--open", str(self.folder), "--dim", str(dim)]
        grown = []
        for _ in range(3):
            done = subprocess.run(command, input="\n\n", capture_output=True, text=True, check=True)
            grown.append(float(done.stdout.split()[1]) * 2**20 / 1e6 * 1e6 / count)
        width = 4 if kind == "flat" else 2
        return Row(
            part=PART,
            what=f"memory, {kind}, {self.size}",
            unit="MB a million segments",
            better="lower",
            ours=grown,
            limit="the vectors' bytes",
            limits=[width * dim * 1.0],
        )

    # --- rivals: a name, what makes it (in the clock's time; raises TooLong), and the batches it answers

    def exact(self, kind: Kind) -> Iterator[tuple[str, Callable[[], tuple[str, Search]], Sequence[int]]]:
        both = (1, BATCH)
        if kind == "half":
            yield "faiss scalar quantizer fp16", self.faiss_half, both
            yield "usearch f16, exact", partial(self.usearch_exact, np.float16), both
            return
        yield "faiss IndexFlatIP", self.faiss_flat, both
        yield "faiss IndexFlatIP, threshold of products lowered", partial(self.faiss_flat, 3072), (BATCH,)
        yield "numpy, product and argpartition", self.numpy, both
        yield "usearch f32, exact", partial(self.usearch_exact, np.float32), both
        if len(self.vectors) <= 100_000 or self.full:
            yield "pgvector, exact", partial(self.pgvector, None), (1,)

    def approximate(
        self, floor: float
    ) -> Iterator[tuple[str, Callable[[], tuple[str, Search]], Sequence[int]]]:
        both = (1, BATCH)
        yield "faiss IVF,Flat", self.faiss_ivf, both
        large = len(self.vectors) >= 100_000 and not self.full
        if large and self.vectors.shape[1] > CURVE_DIM:
            return
        yield "faiss IndexHNSWFlat 32", partial(self.faiss_hnsw, floor), both
        yield "usearch HNSW f32", partial(self.usearch_hnsw, "f32", floor), both
        yield "hnswlib", partial(self.hnswlib, floor), both
        if not large:
            yield "usearch HNSW f16", partial(self.usearch_hnsw, "f16", floor), both
            yield "pgvector, HNSW", partial(self.pgvector, floor), (1,)

    def tuned(self, floor: float, with_effort: Callable[[int], Search]) -> tuple[str, Search]:
        """At the least effort that finds as much as `floor` of the other questions."""
        for effort in EFFORTS:
            search = with_effort(effort)
            if self.rival(search, "others").recall() >= floor:
                break
        return f" at ef {effort}", search

    def in_time(self, add: Callable[[NDArray[np.int64], Embeddings], object]) -> None:
        """Add everything by parts, on all processors. Raises TooLong."""
        began = time.perf_counter()
        with threadpool_limits(os.cpu_count()):
            for start in range(0, len(self.vectors), 5000):
                if time.perf_counter() - began > self.build_within_s:
                    raise TooLong(f"{start:,} of {self.size} in {self.build_within_s:.0f} s")
                part = self.vectors[start : start + 5000]
                add(np.arange(start, start + len(part)), part)

    def faiss_flat(self, threshold: int = 128_000) -> tuple[str, Search]:
        """By default a batch of ours is searched one by one; with ours, by products."""
        flat = faiss.IndexFlatIP(self.vectors.shape[1])
        flat.add(self.vectors)

        def search(questions: Embeddings) -> list[set[int]]:
            before = faiss.cvar.distance_compute_blas_threshold
            faiss.cvar.distance_compute_blas_threshold = threshold
            try:
                return rows_of(flat.search(questions, LIMIT)[1])
            finally:
                faiss.cvar.distance_compute_blas_threshold = before

        return "", search

    def faiss_half(self) -> tuple[str, Search]:
        dim = self.vectors.shape[1]
        half = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        half.add(self.vectors)
        return "", lambda questions: rows_of(half.search(questions, LIMIT)[1])

    def faiss_ivf(self) -> tuple[str, Search]:
        """As many lists and probes as ours has, trained by as many vectors a list."""
        inverted = faiss.index_factory(
            self.vectors.shape[1], f"IVF{self.lists},Flat", faiss.METRIC_INNER_PRODUCT
        )
        inverted.cp.max_points_per_centroid = SAMPLE_PER_LIST
        inverted.train(self.vectors)
        inverted.add(self.vectors)
        inverted.nprobe = self.probes
        return f", {self.probes} of {self.lists} lists", lambda questions: rows_of(
            inverted.search(questions, LIMIT)[1]
        )

    def faiss_hnsw(self, floor: float) -> tuple[str, Search]:
        graph = faiss.IndexHNSWFlat(self.vectors.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
        self.in_time(lambda _, part: graph.add(part))

        def with_effort(effort: int) -> Search:
            settings = faiss.SearchParametersHNSW(efSearch=effort)
            return lambda questions: rows_of(graph.search(questions, LIMIT, params=settings)[1])

        return self.tuned(floor, with_effort)

    def numpy(self) -> tuple[str, Search]:
        def search(questions: Embeddings) -> list[set[int]]:
            block = 16_384
            scores, places = [], []
            for start in range(0, len(self.vectors), block):
                products = questions @ self.vectors[start : start + block].T
                best = np.argpartition(products, -LIMIT, axis=1)[:, -LIMIT:]
                scores.append(np.take_along_axis(products, best, 1))
                places.append(best + start)
            likely = np.concatenate(places, axis=1)
            best = np.argpartition(np.concatenate(scores, axis=1), -LIMIT, axis=1)[:, -LIMIT:]
            return rows_of(np.take_along_axis(likely, best, 1))

        return "", search

    def usearch_exact(self, dtype: type) -> tuple[str, Search]:
        usearch = rival_package("usearch.index")
        vectors = self.vectors.astype(dtype)

        def search(questions: Embeddings) -> list[set[int]]:
            found = usearch.search(
                vectors, questions.astype(dtype), LIMIT, usearch.MetricKind.IP, exact=True, threads=1
            )
            return rows_of(found.keys.reshape(len(questions), -1).astype(np.int64))

        return "", search

    def usearch_hnsw(self, dtype: str, floor: float) -> tuple[str, Search]:
        usearch = rival_package("usearch.index")
        graph = usearch.Index(ndim=self.vectors.shape[1], metric="ip", dtype=dtype)
        self.in_time(graph.add)

        def with_effort(effort: int) -> Search:
            def search(questions: Embeddings) -> list[set[int]]:
                graph.expansion_search = effort
                found = graph.search(questions, LIMIT, threads=1)
                return rows_of(found.keys.reshape(len(questions), -1).astype(np.int64))

            return search

        return self.tuned(floor, with_effort)

    def hnswlib(self, floor: float) -> tuple[str, Search]:
        """M 16 and ef 200, as its examples build it."""
        hnswlib = rival_package("hnswlib")
        graph = hnswlib.Index(space="ip", dim=self.vectors.shape[1])
        graph.init_index(max_elements=len(self.vectors), ef_construction=200, M=16)
        self.in_time(lambda numbers, part: graph.add_items(part, numbers))

        def with_effort(effort: int) -> Search:
            def search(questions: Embeddings) -> list[set[int]]:
                graph.set_ef(effort)
                return rows_of(graph.knn_query(questions, LIMIT, num_threads=1)[0].astype(np.int64))

            return search

        return self.tuned(floor, with_effort)

    def pgvector(self, floor: float | None) -> tuple[str, Search]:
        """Vectors in line with their rows rather than beside them, which its authors recommend for so few
        numbers; prepared statements; numbers as binary; in shared buffers."""
        psycopg = rival_package("psycopg")
        dim = self.vectors.shape[1]
        db = psycopg.connect(postgres(), autocommit=True)
        db.execute("CREATE EXTENSION IF NOT EXISTS vector")
        db.execute("DROP TABLE IF EXISTS items")
        db.execute(f"CREATE TABLE items (id integer, v vector({dim}))")
        db.execute("ALTER TABLE items ALTER v SET STORAGE PLAIN")
        with db.cursor().copy("COPY items FROM STDIN (FORMAT BINARY)") as copy:
            copy.write(b"PGCOPY\n\xff\r\n\0" + bytes(8))
            for start in range(0, len(self.vectors), 5000):
                copy.write(as_copied(start, self.vectors[start : start + 5000]))
            copy.write(struct.pack("!h", -1))
        db.execute("VACUUM ANALYZE items")
        db.execute("SET max_parallel_workers_per_gather = 0")
        if floor is not None:
            db.execute("SET maintenance_work_mem = '4GB'")
            db.execute(f"SET statement_timeout = {1000 * int(self.build_within_s)}")
            try:
                db.execute("CREATE INDEX ON items USING hnsw (v vector_ip_ops)")
            except psycopg.errors.QueryCanceled:
                raise TooLong(f"not built in {self.build_within_s:.0f} s") from None
            db.execute("SET statement_timeout = 0")

        def with_effort(effort: int) -> Search:
            def search(questions: Embeddings) -> list[set[int]]:
                found = []
                for question in questions:
                    text = "[" + ",".join(map(repr, question.tolist())) + "]"
                    query = "SELECT id FROM items ORDER BY v <#> %s::vector LIMIT 10"
                    found.append({row[0] for row in db.execute(query, (text,), prepare=True)})
                return found

            db.execute(f"SET hnsw.ef_search = {effort}")
            return search

        if floor is None:
            return "", with_effort(10)
        return self.tuned(floor, with_effort)


def as_copied(first: int, vectors: Embeddings) -> bytes:
    """Rows (id, vector) of PostgreSQL's binary COPY. A vector is its dimension, two zeros, and numbers."""
    dim = vectors.shape[1]
    numbers = ("numbers", ">f4", (dim,))
    heads = [
        ("fields", ">i2"),
        ("four", ">i4"),
        ("id", ">i4"),
        ("bytes", ">i4"),
        ("dim", ">i2"),
        ("zero", ">i2"),
    ]
    row = np.dtype([*heads, numbers])
    rows = np.zeros(len(vectors), row)
    rows["fields"], rows["four"], rows["bytes"], rows["dim"] = 2, 4, 4 + 4 * dim, dim
    rows["id"], rows["numbers"] = np.arange(first, first + len(vectors)), vectors
    return rows.tobytes()


class TooLong(Exception):
    """A rival was not built in time."""


class NotInstalled(Exception):
    """A rival is not there."""


def rival_package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotInstalled(f"{error}; the extra `bench` has it") from None


def built(name: str, build: Callable[[], tuple[str, Search]]) -> tuple[str, Search] | None:
    """None, and a word on stderr, where there is no such rival or it takes too long."""
    try:
        return build()
    except (TooLong, NotInstalled) as error:
        print(f"without {name}: {error}", file=sys.stderr)
        return None


def postgres() -> str:
    """The URL of a fresh database, of a server that keeps everything in memory. Raises NotInstalled."""
    rival_package("pgserver")
    from tests.postgres import postgres_url

    return postgres_url()


def stores() -> Iterator[tuple[str, StoreMaker]]:
    for name, choose in STORES.items():
        try:
            yield name, choose()
        except IndexUnavailable as error:
            print(f"without {name}: {error.detail}", file=sys.stderr)


# --- starts


def starts(full: bool) -> Iterator[Result]:
    """`clasp serve` from its first instruction to the first answer, with the real model, and empty files."""
    model = open_model("mini")
    with_snapshot: list[tuple[float, float]] = []
    without: list[tuple[float, float]] = []
    shapes = [(1_000, 1), (10_000, 1), (RECORDINGS, 1), *([(RECORDINGS, 10)] if full else [])]
    for recordings, each in shapes:
        with tempfile.TemporaryDirectory() as folder:
            data_dir = Path(folder) / "index_data"
            registered(data_dir, model.fingerprint, model.dim, recordings, each)
            values = started(data_dir, STARTS if recordings == RECORDINGS else 2)
        if each == 1:
            with_snapshot.append((recordings, float(np.median(values["with"]))))
            without.append((recordings, float(np.median(values["without"]))))
        if recordings == RECORDINGS:
            for how in ("with", "without"):
                yield Row(
                    part=PART,
                    what=f"start to the first answer, {recordings:,} recordings of {each}, {how} a snapshot",
                    unit="s",
                    better="lower",
                    ours=values[how],
                    against=f"{START_WITHIN_S:g} s",
                    theirs=[START_WITHIN_S],
                    target=1.0 if how == "with" else None,
                    limit="reading the same bytes",
                    limits=values["reading"],
                )
    yield Curve(
        part=PART,
        name="start-by-recordings",
        title="From the start of `clasp serve` to the first answer, one segment a recording",
        x="recordings",
        y="s",
        series={"with a snapshot": with_snapshot, "without": without},
        note="At the left end are imports and the model. The rest is linear: the catalogue's check, the list"
        " of what is stored, which is held against it, and the snapshot or, without one, all vectors from the"
        " catalogue.",
    )


def started(data_dir: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of starts `with` and `without` a snapshot, and of `reading` the files they read."""
    service = RunningService(data_dir.parent, model="mini")
    service.new_process = subprocess.Popen  # not one that has imported everything already
    with service:
        first_start(service, data_dir, snapshot=False)  # which leaves one
        contenders = {
            "with": lambda: first_start(service, data_dir, snapshot=True),
            "without": lambda: first_start(service, data_dir, snapshot=False),
            "reading": lambda: seconds(lambda: read_all(data_dir)),
        }
        return in_turn(contenders, rounds, warm=False)


def registered(data_dir: Path, model: str, dim: int, recordings: int, each: int) -> None:
    chance = np.random.default_rng(0)
    with closing(Library(data_dir, model=model, name="mini", dim=dim)) as library:
        for start in range(1, recordings + 1, AT_ONCE):
            keys = range(start, min(start + AT_ONCE, recordings + 1))
            vectors = unit(chance.standard_normal((len(keys) * each, dim), np.float32))
            parts = dict(zip(keys, vectors.reshape(len(keys), each, dim), strict=True))
            store_ready(library.catalog, model, parts)
            for recording in library.catalog.by_key(list(keys)).values():
                path = Path(library.store.where(recording.sha256))
                path.parent.mkdir(exist_ok=True)
                path.touch()


def first_start(service: RunningService, data_dir: Path, *, snapshot: bool) -> float:
    if not snapshot:
        shutil.rmtree(data_dir / "index", ignore_errors=True)
    began = time.perf_counter()
    service.start(wait=False)
    eventually(lambda: answers(service), within_s=60)
    took = time.perf_counter() - began
    service.wait_until_ready()  # its workers, too: they are not to be there while the next one starts
    service.stop()
    return took


def answers(service: RunningService) -> bool:
    try:
        return service.client.get("/search", params={"q": "where does the train leave from"}).is_success
    except httpx.TransportError:
        return False


def read_all(data_dir: Path) -> None:
    for path in [data_dir / "catalog.sqlite3", *(data_dir / "index").glob("vectors-*")]:
        with path.open("rb", buffering=0) as file:
            room = bytearray(1 << 24)
            while file.readinto(room):
                pass
