"""Indexes that grow into another kind: that recall is what was promised, and that nothing is lost or comes
back while one is made beside the other."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import pytest

from clasp_core.encoders.weights import sha256_of
from clasp_core.errors import IndexUnavailable
from clasp_core.index import VectorIndex
from clasp_core.ivf import GivenUp, IvfStore, Wanted, train
from clasp_core.library import Library, Question
from clasp_core.scaling import Scaling, made_aside, scaling_for
from clasp_core.types import Embeddings
from clasp_core.vectors import Kind, MappedStore
from tests.core.doubles import DIM, MODEL, random_vectors, store_ready, unit
from tests.core.test_index import Told, by_rank, changes, check_matches, filled

# --- recall


def zipf(seed: int, topics: Embeddings, count: int) -> tuple[Embeddings, np.ndarray]:
    """Vectors around topics, a few of which have most of them."""
    chance = np.random.default_rng(seed)
    shares = 1 / np.arange(1, len(topics) + 1)
    topic = chance.choice(len(topics), count, p=shares / shares.sum())
    return unit(topics[topic] + 0.12 * chance.normal(size=(count, topics.shape[1]))), topic


@pytest.mark.parametrize("shape", ["topics of Zipf's sizes", "no topics"])
def test_recall_is_what_was_asked_for_with_filters_and_without(shape: str) -> None:
    """Half of a library that is not looked at is half of the answers lost, if nobody measures it; a filter
    that lets little through, or nothing of what is near, must not make it worse. Filters that leave few are
    exact. Questions here are others than those that were measured by."""
    topics = random_vectors(1, 60, 32)
    vectors, topic = zipf(2, topics, 5000)
    if shape == "no topics":
        vectors = random_vectors(3, 5000, 32)
    recordings = {key: vectors[key : key + 1] for key in range(5000)}
    flat = filled(recordings)
    scaling = Scaling(kind="ivf", ivf=partial(IvfStore, exhaustive_up_to=500))

    def follow(index: VectorIndex, given_up: Wanted) -> None:
        if index.seq == 0:
            index.apply(changes(1, recordings))

    index = made_aside(flat, scaling, flat._kept, follow, lambda: False)
    assert index.recall is not None
    assert index.recall.share >= index.recall.at_least >= 0.95
    assert 1 < index.recall.probes < index.lists or shape == "no topics"
    chance = np.random.default_rng(4)
    aside = random_vectors(5, 150, 32)
    questions = unit(vectors[chance.choice(5000, 150, replace=False)] + 0.8 * aside)
    everybody = np.arange(5000)
    filters = {
        "none": None,
        "half": everybody[chance.random(5000) < 0.5],
        "half of the topics": everybody[np.isin(topic, np.arange(0, 60, 2))],
        "1 %": everybody[chance.random(5000) < 0.01],
        "0.04 %": np.sort(chance.choice(5000, 2, replace=False)),
    }
    for name, among in filters.items():
        truth = flat.search(questions, [10] * 150, among=among)
        found = index.search(questions, [10] * 150, among=among)
        shares = []
        for right, got in zip(truth, found, strict=True):
            scores = {match.recording: match.score for match in right}
            shares.append(np.mean([match.recording in scores for match in by_rank(got)[: len(right)]]))
            assert all(scores.get(match.recording, match.score) == match.score for match in got)
            assert len(got) >= len(right) or among is None
        assert np.mean(shares) >= (0.95 if among is None or len(among) > 500 else 1), name


def test_the_ivf_goes_on_after_many_changes_and_a_restart(tmp_path: Path) -> None:
    """Lists are trained once and changed for months; what was measured is kept with the snapshot."""
    vectors = random_vectors(1, 2000, 16)
    centres = train(vectors, 40)
    recordings = {key: vectors[4 * key : 4 * key + 4] for key in range(500)}
    index = filled(recordings, new_store=partial(IvfStore, centres=centres, exhaustive_up_to=50), kind="ivf")
    index.calibrate(0.9)
    for seq in range(2, 8):
        gone = list(range(seq * 20, seq * 20 + 15))
        now = {1000 * seq + key: random_vectors(1000 * seq + key, 3) for key in range(20)}
        recordings = {key: rows for key, rows in recordings.items() if key not in gone} | now
        index.apply(changes(seq, now, gone=gone))
    index.save(tmp_path)
    again = Told.load(tmp_path, 16, index.model, read=index._kept)
    assert (again.kind, again.recall, again.point) == ("ivf", index.recall, index.point)
    keys = np.sort(np.array(list(recordings), np.int64))
    for seed, query in enumerate(random_vectors(77, 10)):
        some = np.sort(np.random.default_rng(seed).choice(keys, 10, replace=False))
        for one in (index, again):
            (matches,) = one.search(query[None], [3], among=some)
            check_matches(matches, recordings, query, 3, some.tolist())
        assert by_rank(index.search(query[None], [10])[0]) == by_rank(again.search(query[None], [10])[0])
        own = recordings[int(some[0])][:1]  # in the first list that is looked at
        assert some[0] in {match.recording for match in index.search(own, [1])[0]}


# --- the choice


def test_the_kind_goes_by_size_and_does_not_waver() -> None:
    """At a bound, where one recording comes and one goes, an index must not be made anew each time."""
    scaling = Scaling(flat_up_to=100, half_up_to=200)
    now: Kind = "flat"
    kinds = []
    for count in (0, 100, 101, 60, 50, 51, 150, 201, 101, 100, 51, 50, 1000, 10):
        now = scaling.wanted(count, now)
        kinds.append(now)
    expected = "flat flat half half flat flat half ivf ivf half half flat ivf flat"
    assert kinds == expected.split()
    assert Scaling(kind="ivf").wanted(3, "flat") == "ivf"


def test_settings_that_contradict_each_other_are_refused() -> None:
    """At the start, and with the name of the setting."""
    with pytest.raises(IndexUnavailable, match="CLASP_INDEX_MMAP"):
        scaling_for("torch", "cpu", mapped=True)
    with pytest.raises(IndexUnavailable, match="CLASP_VECTOR_INDEX"):
        scaling_for("torch", "cpu", kind="ivf")
    assert scaling_for("torch", "cpu").wanted(10**7, "flat") == "half"


# --- in a library

SMALL = Scaling(flat_up_to=60, half_up_to=120, floor=0.9)
Opener = Callable[[Scaling], Library]


@pytest.fixture
def open_library(tmp_path: Path) -> Iterator[Opener]:
    with contextlib.ExitStack() as opened:

        def open_one(scaling: Scaling = SMALL) -> Library:
            one = Library(tmp_path, model=MODEL, dim=DIM, scaling=scaling)
            opened.callback(one.catalog.close)
            return one

        yield open_one


def put(library: Library, numbers: range) -> None:
    """Recordings of these numbers and names."""
    store_ready(library.catalog, MODEL, {number: random_vectors(number, 2) for number in numbers})


def first(library: Library, number: int) -> str:
    """Who is found first by a recording's own vector."""
    (hits,) = library.search(random_vectors(number, 2)[:1], [Question(1)])
    return hits[0].recording.id if hits[0].score > 0.99999 else ""


def test_what_comes_and_goes_while_an_index_is_made_is_in_it_and_not(open_library: Opener) -> None:
    """A deletion that was answered may not be undone by an index that began before it; an upload that was
    answered is found at once, before and after the exchange. The old index answers all the while."""
    library = open_library(SMALL)
    put(library, range(1, 71))
    assert library.refresh().kind == "flat"
    steps = iter(range(1000))

    def meanwhile() -> bool:
        step = next(steps)
        if step == 0:
            library.delete("5")
            put(library, range(100, 105))
        assert first(library, 5) != "5" or step > 0
        assert first(library, 6) == "6"
        return False

    library.rescale(meanwhile)
    assert next(steps) > 1
    assert library.refresh().kind == "ivf"
    assert first(library, 5) == ""
    assert [first(library, number) for number in (7, 100, 104)] == ["7", "100", "104"]
    assert library.indexed() == 2 * 74


def test_an_index_that_is_given_up_leaves_the_old_one(open_library: Opener) -> None:
    """A service that is told to end has seconds, and training takes minutes."""
    library = open_library(SMALL)
    put(library, range(1, 71))
    with pytest.raises(GivenUp):
        library.rescale(lambda: True)
    assert library.refresh().kind == "flat"
    assert first(library, 7) == "7"


def test_a_restart_goes_on_with_the_kind_that_there_was(open_library: Opener, tmp_path: Path) -> None:
    """And a library that is set back to another kind answers by the old one until the other is made."""
    library = open_library(SMALL)
    put(library, range(1, 71))
    library.rescale()
    library.save_index()
    again = open_library(SMALL)
    assert (again.refresh().kind, again.refresh().recall) == ("ivf", library.refresh().recall)
    assert first(again, 7) == "7"
    forced = open_library(Scaling(kind="half"))
    assert forced.refresh().kind == "ivf"
    forced.rescale()
    assert forced.refresh().kind == "half"
    assert len({first(forced, number) for number in range(1, 71)}) == 70
    forced.save_index()
    assert len(list((tmp_path / "index").glob("vectors-*"))) == 1


def test_what_the_catalogue_has_no_more_is_no_hit(open_library: Opener) -> None:
    """Scores of a rounded index come from the catalogue, which may be ahead of it by a deletion."""
    library = open_library(Scaling(kind="half"))
    put(library, range(1, 10))
    library.rescale()
    index = library.refresh()
    library.catalog.delete("3")
    for group_by in ("recording", "segment"):
        (matches,) = index.search(random_vectors(3, 2)[:1], [18], group_by=group_by)  # type: ignore[arg-type]
        assert len({match.recording for match in matches}) == 8


def test_a_snapshot_of_the_first_format_is_read(open_library: Opener, tmp_path: Path) -> None:
    """An upgrade must not read a library of a million segments anew."""
    library = open_library(SMALL)
    put(library, range(1, 6))
    library.refresh()
    library.close()
    manifest = tmp_path / "index" / "manifest.json"
    said = json.loads(manifest.read_text())
    path = tmp_path / "index" / said["file"]
    now = faiss.read_index(str(path))
    old = faiss.IndexIDMap2(faiss.IndexFlatIP(DIM))
    old.add_with_ids(now.index.reconstruct_n(0, 10), faiss.vector_to_array(now.id_map))
    faiss.write_index(old, str(path))
    kept = {name: said[name] for name in ("file", "count", "dim", "model", "seq", "token")}
    manifest.write_text(json.dumps({"format": 1, "sha256": sha256_of(path), **kept}))
    assert len(VectorIndex.load(tmp_path / "index", DIM, MODEL)) == 10
    assert first(open_library(SMALL), 3) == "3"


# --- mapped


@pytest.mark.parametrize("kind", ["flat", "half", "ivf"])
def test_processes_that_map_a_snapshot_follow_and_take_the_next(
    open_library: Opener, tmp_path: Path, kind: Kind
) -> None:
    """Each has what changed in memory, over one file for all; once somebody has saved a newer file they go
    over to it. The old one may be gone by then, and was never written to."""
    scaling = Scaling(kind=kind, mapped=True)
    writer = open_library(scaling)
    put(writer, range(1, 91))
    writer.rescale()
    writer.save_index()
    readers = [open_library(scaling) for _ in range(2)]
    for reader in readers:
        reader.refresh()
    (before,) = (tmp_path / "index").glob("vectors-*")
    digest = sha256_of(before)
    writer.delete("4")
    put(writer, range(200, 203))
    stores = [reader.refresh()._store for reader in readers]
    assert all(isinstance(store, MappedStore) and store.changed == 8 for store in stores)
    for library in (writer, *readers):
        assert [first(library, number) for number in (4, 5, 201)] == ["", "5", "201"]
    readers[0].save_index()
    assert sha256_of(before) == digest, "a few changes are not worth a new file"
    writer._index.save(tmp_path / "index")  # type: ignore[union-attr]
    assert not before.exists()
    assert [first(readers[1], number) for number in (4, 5, 201)] == ["", "5", "201"]
    for reader in readers:
        reader.rescale()
        index = reader.refresh()
        assert (index.changed, len(index), index.kind) == (0, 2 * 92, kind)
        assert [first(reader, number) for number in (4, 5, 201)] == ["", "5", "201"]


@pytest.mark.slow
def test_searches_go_on_while_kinds_are_exchanged(open_library: Opener) -> None:
    """FAISS crashes the process where two threads meet in it wrongly; here they have every chance."""
    library = open_library(SMALL)
    put(library, range(1, 31))
    over = threading.Event()
    failures: list[BaseException] = []

    def ask() -> None:
        number = 0
        try:
            while not over.is_set():
                number = number % 30 + 1
                assert first(library, number) == f"{number}"
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    kinds = []
    for round_ in range(4):
        put(library, range(100 * (round_ + 1), 100 * (round_ + 1) + 20))
        library.rescale()
        kinds.append(library.refresh().kind)
        if round_ == 3:
            for number in [n for r in range(4) for n in range(100 * (r + 1), 100 * (r + 1) + 20)]:
                library.delete(f"{number}")
            library.rescale()
            kinds.append(library.refresh().kind)
    over.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert kinds == ["half", "ivf", "ivf", "ivf", "half"]
