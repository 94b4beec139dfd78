"""The vector stores: that they agree, that a GPU is asked as it must be, and which one is chosen."""

import contextlib
import gc
import logging
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from clasp_core.errors import IndexUnavailable
from clasp_core.index import VectorIndex
from clasp_core.library import Library, Question
from clasp_core.types import Embeddings
from clasp_core.vectors import (
    DEEPEST,
    FaissStore,
    HalfStore,
    MirroredStore,
    OwnerThread,
    TorchStore,
    store_for,
)
from tests.core.doubles import DIM, MODEL, add, random_vectors, unit
from tests.core.stores import EVERY_STORE, IN_MAIN_MEMORY, FlatIndexWithAGpusManners, store_named
from tests.core.test_index import Told, changes, check_matches, filled

# --- agreement


@pytest.mark.parametrize("new_store", [FaissStore, HalfStore])
def test_a_batch_finds_what_each_of_its_questions_finds_alone(new_store: type[FaissStore]) -> None:
    """Batches are multiplied by blocks where FAISS would go through everything once a question, and of many
    blocks the best are kept. What is found must not depend on who else asks at the moment."""
    store, vectors = new_store(32), clustered(1, 70_000, 32)
    for part in np.split(np.arange(70_000), 7):  # which moves them in memory
        store.add(part, vectors[part])
    gone = np.random.default_rng(2).random(70_000) < 0.01
    store.remove(gone)
    np.testing.assert_allclose(store.rows(np.arange(len(store.numbers))), vectors[~gone], atol=1e-3)
    queries = clustered(3, 100, 32)
    chance = np.random.default_rng(4).random(len(store.numbers))
    for among in (None, chance < 0.4, chance < 0.001):
        scores, places = store.nearest(queries, 40, among)
        assert among is None or among[places].all()
        for query, found, where in zip(queries[:20], scores, places, strict=False):
            alone, _ = store.nearest(query[None], 40, among)
            np.testing.assert_allclose(found, alone[0], atol=1e-6)
            np.testing.assert_allclose(store.rows(where) @ query, found, atol=1e-6)
            assert len(set(where.tolist())) == 40


def clustered(seed: int, count: int, dim: int) -> Embeddings:
    """Vectors of few topics, as real ones are: what is near a query has much company."""
    chance = np.random.default_rng(seed)
    topics = np.random.default_rng(0).normal(size=(12, dim))
    return unit(topics[chance.integers(12, size=count)] + 0.7 * chance.normal(size=(count, dim)))


@pytest.mark.parametrize("name", EVERY_STORE[1:])
def test_stores_give_the_same_answers_through_any_history(name: str) -> None:
    """Whoever changes CLASP_VECTOR_STORE or moves to a GPU gets the same recordings with the very same
    scores; a result that depends on the machine cannot be reproduced or reported."""
    index, reference = Told(32, MODEL, store_named(name)), VectorIndex(32, MODEL)
    chance = random.Random(5)
    contents: dict[int, Embeddings] = {}
    for seq in range(1, 25):
        chosen = chance.sample(range(400), 60 if seq < 12 else 5)
        now = {
            key: clustered(1000 * seq + key, chance.choice([1, 3, 9, 60]), 32)
            for key in chosen
            if chance.random() < 0.8
        }
        contents = {key: rows for key, rows in contents.items() if key not in chosen} | now
        for one in (index, reference):
            one.apply(changes(seq, now, gone=chosen, dim=32))
        queries = clustered(seq, 6, 32)
        limits = [1, 2, 10, 40, 150, 1000]
        for among in (None, np.arange(0, 400, 2), np.array(chance.sample(range(400), 5))):
            selected = None if among is None else np.sort(among).astype(np.int64)
            answers = index.search(queries, limits, among=selected)
            expected = reference.search(queries, limits, among=selected)
            for found, wanted in zip(answers, expected, strict=True):
                segments = {match.recording: match.segments for match in found}
                assert {match.recording: match.score for match in found} == {
                    match.recording: match.score for match in wanted
                }
                for match in wanted:
                    both = min(len(match.segments), len(segments[match.recording]))
                    assert segments[match.recording][:both] == match.segments[:both]
    assert len(index) == sum(map(len, contents.values())) > DEEPEST


@pytest.mark.parametrize("name", EVERY_STORE)
def test_scores_are_as_near_the_exact_ones_as_the_store_says(name: str) -> None:
    """The index stops looking where this bound tells it to; were it too small, hits would be lost in silence.
    Sums of equal products are the worst: all their roundings go the same way."""
    store = store_named(name)(384)
    vectors = np.concatenate([random_vectors(1, 2000, 384), clustered(2, 2000, 384)])
    vectors = np.concatenate([vectors, unit(np.sign(vectors[:200]) * (1 + 2.0**-11.1))])
    store.add(np.arange(len(vectors)), vectors)
    queries = np.concatenate([vectors[::40], random_vectors(3, 20, 384)])
    scores, places = store.nearest(queries, 500)
    exact = np.take_along_axis(queries.astype(np.float64) @ vectors.astype(np.float64).T, places, 1)
    worst = np.abs(scores - exact).max()
    assert worst < store.noise
    if "half" in name or "ivf" in name:
        assert worst > 1e-5, "nothing was rounded: this is no half precision"


@pytest.mark.parametrize("name", EVERY_STORE)
def test_recordings_closer_than_half_precision_tells_are_told_apart(name: str) -> None:
    """Near-duplicates are ordered by exact cosines, however the vectors are kept on a device."""
    centre, aside = random_vectors(1, 2, 64)
    vectors = unit(centre + 0.02 * np.random.default_rng(0).normal(size=(800, 64)) + 0.05 * aside)
    recordings = {key: vectors[key : key + 1] for key in range(800)}
    index = filled(recordings, new_store=store_named(name))
    query = unit(centre[None])[0]
    for limit in (1, 3, 20):
        (matches,) = index.search(query[None], [limit])
        check_matches(matches, recordings, query, limit)
        assert len(matches) == limit


@pytest.mark.parametrize("name", EVERY_STORE)
def test_a_segment_is_not_shown_in_a_better_one_s_place(name: str) -> None:
    """Of a long recording only what is surely its best is shown: of many segments as good as equal, a search
    that has not seen all of them knows none to be the second best."""
    query, *others = random_vectors(1, 101, 64).astype(np.float64)
    aside = unit(np.array(others) - np.outer(np.array(others) @ query, query))
    cosine = np.random.default_rng(0).normal(0.5, 1e-5, size=(100, 1))
    cosine[0] = 0.9
    recordings = {1: unit(cosine * query + np.sqrt(1 - cosine**2) * aside), 2: unit(aside[:5])}
    index = filled(recordings, new_store=store_named(name))
    asked = unit(query[None])
    (matches,) = index.search(asked, [1])
    check_matches(matches, recordings, asked[0], 1)
    (matches,) = index.search(asked, [2])  # all are seen, for want of another recording
    check_matches(matches, recordings, asked[0], 2)
    assert [len(match.segments) for match in sorted(matches, key=lambda match: match.recording)] == [5, 5]


@pytest.mark.parametrize("name", EVERY_STORE)
def test_a_store_keeps_order_and_bits(name: str) -> None:
    """Places are how the index names vectors to its store, and exact scores are made of these rows."""
    store = store_named(name)(8)
    vectors = random_vectors(1, 200_000, 8)
    vectors.flags.writeable = False
    numbers = np.arange(200_000) * 3 + 7
    for start, end in ((0, 3), (3, 3), (3, 90_000), (90_000, 200_000)):
        store.add(numbers[start:end], vectors[start:end])
    gone = np.random.default_rng(0).random(200_000) < 0.3
    gone[:10] = False
    store.nearest(vectors[:1], 1)
    store.remove(gone)
    store.remove(np.zeros(len(store.numbers), np.bool_))
    assert np.array_equal(store.numbers, numbers[~gone])
    everything = np.arange(len(store.numbers))
    some = everything[:: 1 if "ivf" not in name else 5000]
    rows = store.rows(some)
    if store.exact:
        assert np.array_equal(rows, vectors[~gone][some])
    assert np.allclose(rows, vectors[~gone][some], rtol=2.0**-11, atol=1e-7)
    scores, places = store.nearest(vectors[:3], 5)
    assert scores.shape == places.shape == (3, 5)
    assert np.all(np.diff(scores, axis=1) <= 0)
    store.remove(np.ones(len(everything), np.bool_))
    assert len(store.numbers) == 0


# --- a device


@pytest.fixture
def mirrors() -> list[FlatIndexWithAGpusManners]:
    """The device's indexes that a test's stores have made."""
    return []


@pytest.fixture
def device(mirrors: list[FlatIndexWithAGpusManners]) -> partial[MirroredStore]:
    """A store over a device that writes down its indexes."""

    def new_mirror(dim: int) -> FlatIndexWithAGpusManners:
        mirrors.append(FlatIndexWithAGpusManners(dim))
        return mirrors[-1]

    return partial(MirroredStore, new_mirror=new_mirror, owner=OwnerThread("device"))


def test_the_device_answers_what_it_can(
    device: partial[MirroredStore], mirrors: list[FlatIndexWithAGpusManners]
) -> None:
    """A mirror that is never asked would pass every other test, at the price of a GPU. Wide filters go to it,
    narrow ones and very deep searches cannot."""
    recordings = {key: random_vectors(key, 10) for key in range(1000)}
    index = filled(recordings, new_store=device)
    queries = random_vectors(9999, 4)
    asked = [
        (10, None, True),
        (10, range(0, 1000, 2), True),
        (10, range(5), False),
        (DEEPEST, None, False),
    ]
    for limit, among, there in asked:
        before = sum(mirror.searches for mirror in mirrors)
        selected = None if among is None else np.array(among, np.int64)
        for query, matches in zip(queries, index.search(queries, [limit] * 4, among=selected), strict=True):
            check_matches(matches, recordings, query, limit, among)
        assert (sum(mirror.searches for mirror in mirrors) > before) is there
    assert len(mirrors) == 1


def test_what_is_not_where_it_was_looked_for_is_found_on_the_host(
    device: partial[MirroredStore], mirrors: list[FlatIndexWithAGpusManners]
) -> None:
    """A filter may let half of the library through, and yet nothing of what is near the question."""
    near = np.tile([1.0, 0, 0, 0], (500, 1)) + np.random.default_rng(0).normal(0, 0.1, (500, 4))
    far = np.tile([-1.0, 0, 0, 0], (500, 1)) + np.random.default_rng(1).normal(0, 0.1, (500, 4))
    recordings = {key: row[None] for key, row in enumerate(unit(np.concatenate([near, far])))}
    index = filled(recordings, new_store=device)
    query = np.array([1, 0, 0, 0], np.float32)
    (matches,) = index.search(query[None], [5], among=np.arange(500, 1000))
    check_matches(matches, recordings, query, 5, range(500, 1000))
    assert mirrors[0].searches > 0


def test_few_removals_leave_the_device_alone(
    device: partial[MirroredStore], mirrors: list[FlatIndexWithAGpusManners]
) -> None:
    """Uploading millions of vectors anew for one deleted recording would take seconds; never doing it would
    fill the device with what is gone."""
    recordings = {key: random_vectors(key, 10) for key in range(100)}
    index = filled(recordings, new_store=device)
    query = random_vectors(999, 1)[0]

    def check() -> None:
        (matches,) = index.search(query[None], [5])
        check_matches(matches, recordings, query, 5)

    check()
    (mirror,) = mirrors
    assert mirror.added == 1000
    for seq in range(2, 12):
        del recordings[seq]
        index.apply(changes(seq, {}, gone=[seq]))
        check()
    assert mirror.added == 1000
    recordings[3] = random_vectors(3, 7)
    index.apply(changes(12, {3: recordings[3]}))
    check()
    assert mirror.added == 1007
    for key in range(50, 90):
        del recordings[key]
    index.apply(changes(13, {}, gone=range(50, 90)))
    check()
    assert mirror.added == 1007 + len(index)
    assert mirror._flat.ntotal == len(index)


class OutOfMemoryOnce(FlatIndexWithAGpusManners):
    """Takes half of its second addition, then fails like a GPU that is full."""

    failing = True

    def add(self, vectors: NDArray[np.float32]) -> None:
        if self.added and self.failing:
            type(self).failing = False
            super().add(vectors[: len(vectors) // 2])
            raise RuntimeError("cudaMalloc failed: out of memory")
        super().add(vectors)


def test_a_full_device_is_an_error_and_not_a_wrong_answer() -> None:
    """Half of an addition on the device must neither be searched as if it were all nor be added twice."""
    index = VectorIndex(
        DIM, MODEL, partial(MirroredStore, new_mirror=OutOfMemoryOnce, owner=OwnerThread("device"))
    )
    recordings = {key: random_vectors(key, 10) for key in range(20)}
    query = random_vectors(999, 1)[0]
    index.apply(changes(1, {key: recordings[key] for key in range(10)}))
    index.search(query[None], [5])
    index.apply(changes(2, {key: recordings[key] for key in range(10, 20)}))
    with pytest.raises(RuntimeError, match="out of memory"):
        index.search(query[None], [5])
    (matches,) = index.search(query[None], [20])
    check_matches(matches, recordings, query, 20)


def test_the_device_s_memory_is_freed_by_its_own_thread() -> None:
    """GPU FAISS frees memory through the resources that its searches use; a replaced index is dropped by
    whichever thread holds it last."""
    dropped_by: list[int] = []

    class Mourned(FlatIndexWithAGpusManners):
        def __del__(self) -> None:
            dropped_by.append(threading.get_ident())

    owner = OwnerThread("device")
    for _ in range(3):
        index = filled(
            {key: random_vectors(key, 10) for key in range(20)},
            new_store=partial(MirroredStore, new_mirror=Mourned, owner=owner),
        )
        index.search(random_vectors(999, 1), [5])
        del index
        gc.collect()
    assert dropped_by.count(owner.call(threading.get_ident)) == len(dropped_by) == 3


def test_an_owner_is_one_thread_for_everybody() -> None:
    """The calls of many threads come one after the other, each gets its own result or its own failure."""
    owner = OwnerThread("owner")
    busy = threading.Lock()

    def square(number: int) -> tuple[int, int]:
        assert busy.acquire(blocking=False), "two calls at once"
        try:
            if number % 5 == 0:
                raise ValueError(str(number))
            return number * number, threading.get_ident()
        finally:
            busy.release()

    def ask(number: int) -> tuple[int, int]:
        try:
            return owner.call(square, number)
        except ValueError as error:
            return -int(str(error)), -1

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(ask, range(2000)))
    assert [result for result, _ in results] == [n * n if n % 5 else -n for n in range(2000)]
    assert len({thread for _, thread in results} - {-1, threading.get_ident()}) == 1


# --- the choice

NO_GPU_FAISS = not hasattr(faiss, "StandardGpuResources")


def test_the_cpu_is_always_there() -> None:
    """On a machine without a GPU nothing needs to be set, and nothing is refused."""
    assert store_for("faiss", "cpu") is FaissStore
    assert isinstance(store_for("torch", "cpu")(DIM), TorchStore)
    for name in ("faiss", "torch"):
        assert len(store_for(name, "auto")(DIM).numbers) == 0


@pytest.mark.skipif(not NO_GPU_FAISS, reason="this FAISS can use a GPU")
def test_a_gpu_that_was_demanded_and_cannot_be_used_is_said_at_the_start() -> None:
    """Not at the first search, and not by searching on the CPU: who demands a GPU has a reason."""
    with pytest.raises(IndexUnavailable, match="CPU only"):
        store_for("faiss", "cuda")
    with pytest.raises(IndexUnavailable, match="CLASP_VECTOR_STORE"):
        store_for("annoy", "cpu")


@pytest.fixture
def faiss_gpu_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip leaves behind of faiss-gpu when faiss-cpu is installed after it: its name."""
    if not NO_GPU_FAISS:
        pytest.skip("this FAISS can use a GPU")
    metadata = tmp_path / "faiss_gpu-1.15.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: faiss-gpu\nVersion: 1.15.1\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("faiss_gpu_installed")
def test_one_faiss_installed_over_the_other_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """Both packages fill the same folder without a word, so that a GPU is paid for and not used. Where it was
    demanded that is an error; where it was not, a line in the log."""
    with pytest.raises(IndexUnavailable, match="pip install --force-reinstall --no-deps"):
        store_for("faiss", "cuda")
    with caplog.at_level(logging.WARNING):
        assert store_for("faiss", "auto") is FaissStore
    assert "faiss-cpu lie over those of faiss-gpu" in caplog.text


def test_torch_is_loaded_only_where_it_is_the_store() -> None:
    """It costs seconds and hundreds of megabytes in every process that imports it."""
    program = """
import sys
import numpy as np
from clasp_core.library import Library
from clasp_core.vectors import store_for
for device in ("cpu", "auto"):
    store = store_for("faiss", device)(4)
    store.add(np.arange(4), np.eye(4, dtype=np.float32))
    store.nearest(np.eye(4, dtype=np.float32), 2)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("name", IN_MAIN_MEMORY)
def test_a_library_changes_its_store_and_keeps_its_index(tmp_path: Path, name: str) -> None:
    """The setting is for trying out; a library of a million segments must not start anew for it."""

    def answers(store: str, *, spared: int) -> list[tuple[str, float]]:
        library = Library(tmp_path, model=MODEL, dim=DIM, new_store=store_named(store))
        with contextlib.closing(library):
            loaded = VectorIndex.load(tmp_path / "index", DIM, MODEL, store_named(store))
            assert len(loaded) == spared
            (hits,) = library.search(random_vectors(999, 1), [Question(5)])
            return [(hit.recording.id, hit.score) for hit in hits]

    with contextlib.closing(Library(tmp_path, model=MODEL, dim=DIM)) as library:
        for number in range(8):
            add(library, f"{number}", random_vectors(number, 3))
    expected = answers("faiss", spared=0)
    assert answers(name, spared=24) == expected
    assert answers("faiss", spared=24) == expected
