"""The vector index: what a slow search by hand finds, whatever store the vectors are in, and never anything
from a damaged snapshot."""

import fcntl
import json
import random
import signal
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from clasp_core.catalog import Changes
from clasp_core.encoders.weights import sha256_of
from clasp_core.index import Match, Reader, VectorIndex
from clasp_core.types import Embeddings
from clasp_core.vectors import FaissStore, Kind, StoreMaker
from tests.core.doubles import processes, random_vectors, unit
from tests.core.stores import EVERY_STORE, IN_MAIN_MEMORY, ROUNDED, kind_of, store_named

Contents = Mapping[int, Embeddings]
"""Each recording's vectors, in order."""

MODEL = "a model"


@pytest.fixture(scope="session", params=EVERY_STORE)
def new_store(request: pytest.FixtureRequest) -> StoreMaker:
    """Each store in turn."""
    return store_named(request.param)


def changes(seq: int, recordings: Contents, gone: Iterable[int] = (), dim: int = 16) -> Changes:
    """That these recordings now have these vectors, and those `gone` have none."""
    rows = [(key, ordinal, row) for key, rows in recordings.items() for ordinal, row in enumerate(rows)]
    return Changes(
        seq=seq,
        recordings=frozenset([*recordings, *gone]),
        owners=np.array([key for key, _, _ in rows], np.int64),
        ordinals=np.array([ordinal for _, ordinal, _ in rows], np.int64),
        vectors=np.stack([row for _, _, row in rows]) if rows else np.empty((0, dim), np.float32),
    )


class Told(VectorIndex):
    """An index beside a catalogue, which here is a dictionary of what it was given."""

    def __init__(
        self,
        dim: int,
        model: str,
        new_store: StoreMaker = FaissStore,
        *,
        kind: Kind = "flat",
        read: Reader | None = None,
        flat: StoreMaker | None = None,
    ) -> None:
        self.kept: dict[tuple[int, int], NDArray[np.float32]] = {}
        super().__init__(dim, model, new_store, kind=kind, read=read or self._kept, flat=flat)

    def _kept(self, segments: Sequence[tuple[int, int]]) -> dict[tuple[int, int], NDArray[np.float32]]:
        return {segment: self.kept[segment] for segment in segments if segment in self.kept}

    def apply(self, changes: Changes) -> None:
        super().apply(changes)
        named = zip(changes.owners.tolist(), changes.ordinals.tolist(), strict=True)
        now = dict(zip(named, changes.vectors, strict=True))
        others = {name: row for name, row in self.kept.items() if name[0] not in changes.recordings}
        self.kept = others | now  # at once: others search meanwhile


def filled(
    recordings: Contents, seq: int = 1, new_store: StoreMaker = FaissStore, kind: Kind = "flat"
) -> Told:
    index = Told(len(next(iter(recordings.values()))[0]), MODEL, new_store, kind=kind)
    index.apply(changes(seq, recordings))
    return index


def cosines(recordings: Contents, query: NDArray[np.float32]) -> dict[int, list[float]]:
    """The slow and obvious search: of every recording every segment's cosine, in order."""
    exact = query.astype(np.float64)
    return {key: [float(exact @ row.astype(np.float64)) for row in rows] for key, rows in recordings.items()}


def check_matches(
    matches: list[Match],
    recordings: Contents,
    query: NDArray[np.float32],
    limit: int,
    among: Sequence[int] | None = None,
    segments: int = 5,
) -> None:
    """That these are the best recordings by the slow search, all ties with the last of them included."""
    everything = cosines(recordings, query)
    truth = {key: all_of for key, all_of in everything.items() if all_of and (among is None or key in among)}
    best = {key: max(all_of) for key, all_of in truth.items()}
    ranked = sorted(best.values(), reverse=True)
    cutoff = ranked[:limit][-1] if ranked else 0.0
    found = {match.recording for match in matches}
    assert len(found) == len(matches)
    assert {key for key, score in best.items() if score >= cutoff} <= found
    assert all(best[key] >= cutoff - 1e-12 for key in found)
    for match in matches:
        assert match.score == pytest.approx(best[match.recording], abs=1e-12)
        ordinals = [ordinal for ordinal, _ in match.segments]
        scores = [score for _, score in match.segments]
        assert 1 <= len(set(ordinals)) == len(ordinals) <= segments
        assert scores[0] == match.score
        assert list(match.segments) == sorted(match.segments, key=lambda item: (-item[1], item[0]))
        assert scores == pytest.approx([truth[match.recording][ordinal] for ordinal in ordinals], abs=1e-12)
        assert scores == pytest.approx(sorted(truth[match.recording], reverse=True)[: len(scores)], abs=1e-12)


def check_segments(
    matches: list[Match],
    recordings: Contents,
    query: NDArray[np.float32],
    limit: int,
    among: Sequence[int] | None = None,
) -> None:
    """That these are the best segments by the slow search, all ties with the last of them included."""
    truth = {
        (key, ordinal): score
        for key, scores in cosines(recordings, query).items()
        if among is None or key in among
        for ordinal, score in enumerate(scores)
    }
    found = {(match.recording, *(ordinal for ordinal, _ in match.segments)): match.score for match in matches}
    assert len(found) == len(matches)
    cutoff = sorted(truth.values(), reverse=True)[:limit][-1] if truth else 0.0
    assert {place for place, score in truth.items() if score >= cutoff + 1e-12} <= found.keys()
    assert len(found) >= min(limit, len(truth))
    for place, score in found.items():
        assert score == pytest.approx(truth[place], abs=1e-12)
        assert score >= cutoff - 1e-12


# --- searching

POOL = unit(
    np.concatenate(
        [
            np.eye(4),
            -np.eye(4)[:1],
            [[1, 1, 0, 0], [1, 1, 1, 1]],
            np.random.default_rng(0).normal(size=(3, 4)),
        ]
    )
)
"""Few vectors for many segments: most cosines come several times, exactly."""

vectors = st.integers(0, len(POOL) - 1)
updates = st.dictionaries(st.integers(1, 12), st.lists(vectors, max_size=12), min_size=1, max_size=6)
"""Some recordings, and the vectors each has from now on; without vectors it is gone."""
questions = st.lists(st.tuples(vectors, st.integers(1, 15)), min_size=1, max_size=6)
selections = st.none() | st.lists(st.integers(0, 14), unique=True, max_size=8).map(sorted)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(updates, max_size=6), questions, selections, st.integers(1, 6))
def test_it_finds_what_the_slow_search_finds(
    new_store: StoreMaker,
    history: list[dict[int, list[int]]],
    asked: list[tuple[int, int]],
    among: list[int] | None,
    segments: int,
) -> None:
    """Whatever was added, replaced and removed before, however many cosines are the same: the right
    recordings, in full where they tie, with the right scores and segments. Anything less is a hit lost."""
    index = Told(4, MODEL, new_store)
    recordings: dict[int, Embeddings] = {}
    for seq, update in enumerate(history, 1):
        now = {key: POOL[chosen] for key, chosen in update.items() if chosen}
        recordings = {key: rows for key, rows in recordings.items() if key not in update} | now
        index.apply(changes(seq, now, gone=update, dim=4))
    assert len(index) == sum(map(len, recordings.values()))
    assert index.seq == len(history)
    queries = POOL[[query for query, _ in asked]]
    limits = [limit for _, limit in asked]
    selected = None if among is None else np.array(among, np.int64)
    results = index.search(queries, limits, among=selected, segments=segments)
    assert len(results) == len(asked)
    for query, limit, matches in zip(queries, limits, results, strict=True):
        check_matches(matches, recordings, query, limit, among, segments)
    by_segment = index.search(queries, limits, among=selected, group_by="segment")
    for query, limit, matches in zip(queries, limits, by_segment, strict=True):
        check_segments(matches, recordings, query, limit, among)


@pytest.mark.parametrize("among", [None, range(0, 400, 3)])
def test_it_finds_what_the_slow_search_finds_at_the_size_of_a_library(
    new_store: StoreMaker, among: range | None
) -> None:
    """The same with vectors as long as ours, some recordings of hundreds of segments and many queries at
    once, where FAISS goes other ways than for a handful."""
    chance = np.random.default_rng(3)
    lengths = chance.choice([1, 2, 5, 300], p=[0.5, 0.3, 0.18, 0.02], size=400)
    recordings = {key: random_vectors(key, length, 256) for key, length in enumerate(lengths)}
    index = filled(recordings, new_store=new_store)
    queries = random_vectors(999, 40, 256)
    limits = [1, 10, 37, 400] * 10
    selected = None if among is None else np.array(among, np.int64)
    for query, limit, matches in zip(
        queries, limits, index.search(queries, limits, among=selected), strict=True
    ):
        check_matches(matches, recordings, query, limit, among)


def test_one_recording_of_a_thousand_close_segments_hides_no_other(new_store: StoreMaker) -> None:
    """A long recording on the topic of the question must not fill all the places of the answer."""
    close = np.tile([1.0, 0.0, 0.0, 0.0], (1000, 1)) + np.random.default_rng(0).normal(0, 0.01, (1000, 4))
    recordings = {1: unit(close)} | {key: POOL[[1, 5]] for key in range(2, 30)}
    query = POOL[0]
    for limit in (1, 2, 5, 29):
        (matches,) = filled(recordings, new_store=new_store).search(query[None], [limit])
        check_matches(matches, recordings, query, limit)


def test_a_search_for_nothing_or_in_nothing_is_empty(new_store: StoreMaker) -> None:
    """A fresh library answers; so does a filter that nobody passes."""
    index = Told(4, MODEL, new_store)
    assert index.search(POOL[:2], [10, 10]) == [[], []]
    assert index.search(POOL[:0], []) == []
    index.apply(changes(1, {1: POOL}))
    nobody = np.empty(0, np.int64)
    assert index.search(POOL[:2], [10, 10], among=nobody) == [[], []]
    assert index.search(POOL[:2], [10, 10], among=np.array([7, 9])) == [[], []]
    index.apply(changes(2, {}, gone=[1], dim=4))
    assert len(index) == 0
    assert index.search(POOL[:2], [10, 10]) == [[], []]


def test_a_batch_gives_what_each_question_gives_alone(new_store: StoreMaker) -> None:
    """Questions of different people are searched together; nobody's answer may depend on the others'."""
    recordings = {key: random_vectors(key, 1 + key % 7, 64) for key in range(500)}
    index = filled(recordings, new_store=new_store)
    queries = random_vectors(999, 100, 64)  # enough for FAISS to use matrix products
    limits = [1 + number % 20 for number in range(100)]
    together = index.search(queries, limits)
    for query, limit, matches in zip(queries, limits, together, strict=True):
        (alone,) = index.search(query[None], [limit])
        assert by_rank(matches)[:limit] == by_rank(alone)[:limit]


def by_rank(matches: list[Match]) -> list[Match]:
    return sorted(matches, key=lambda match: (-match.score, match.recording))


def test_a_change_applied_twice_changes_nothing(new_store: StoreMaker) -> None:
    """A replica that is unsure reads a change again; a segment found twice would be a hit too many."""
    recordings = {key: random_vectors(key, 3) for key in range(5)}
    index = filled(recordings, new_store=new_store)
    index.apply(changes(1, recordings))
    index.apply(changes(2, {2: recordings[2]}))
    assert len(index) == 15
    (matches,) = index.search(recordings[2][:1], [5], segments=10)
    check_matches(matches, recordings, recordings[2][0], 5, segments=10)


@pytest.mark.parametrize(
    "bad",
    [
        np.array([[np.nan, 0, 0, 0]], np.float32),
        np.array([[np.inf, 0, 0, 0]], np.float32),
        np.array([[0, 0, 0, 0]], np.float32),
        np.array([[1, 1, 0, 0]], np.float32),
        np.array([[1, 0, 0]], np.float32),
        np.array([1, 0, 0, 0], np.float32),
    ],
    ids=["nan", "infinite", "zero", "not unit", "other dimension", "no rows"],
)
def test_vectors_without_a_cosine_are_refused(new_store: StoreMaker, bad: NDArray[np.float32]) -> None:
    """FAISS takes a NaN in silence and then finds nothing, or anything; the index is to say no and stay as
    it was."""
    index = filled({1: POOL[:2]}, new_store=new_store)
    with pytest.raises(ValueError, match="vector"):
        index.search(bad, [1])
    one = np.ones(1, np.int64)
    with pytest.raises(ValueError, match="vector"):
        index.apply(Changes(2, frozenset({1}), one, one, bad))
    assert (len(index), index.seq) == (2, 1)
    assert index.search(POOL[:1], [1])[0][0].score == 1.0


def test_searches_during_changes_see_only_what_was_there(new_store: StoreMaker) -> None:
    """FAISS crashes the process when it grows under a search. Here one thread replaces and removes while
    others search: what never changes is always found, and whatever else is found is one recording in one of
    the states it really had, never half of one and half of another."""
    steady = {key: random_vectors(key, 2) for key in range(1, 6)}
    states = {
        key: [np.repeat(random_vectors(100 * key + state, 1), 4, axis=0) for state in range(4)]
        for key in range(10, 16)
    }
    index = filled(steady | {key: versions[0] for key, versions in states.items()}, new_store=new_store)
    queries = random_vectors(999, 3)
    steady_scores = [
        {key: max(all_of) for key, all_of in cosines(steady, query).items()} for query in queries
    ]
    state_scores = [
        {
            key: [cosines({0: state[:1]}, query)[0][0] for state in versions]
            for key, versions in states.items()
        }
        for query in queries
    ]
    over = threading.Event()
    searches = [0, 0]
    failures: list[BaseException] = []
    among = np.array([*steady, *states], np.int64)

    def search_on(worker: int, selected: NDArray[np.int64] | None) -> None:
        try:
            while not over.is_set():
                for number, matches in enumerate(index.search(queries, [20] * 3, among=selected)):
                    found = {match.recording: match for match in matches}
                    for key, score in steady_scores[number].items():
                        assert found.pop(key).score == pytest.approx(score, abs=1e-6)
                    for key, match in found.items():
                        assert any(abs(match.score - score) < 1e-6 for score in state_scores[number][key])
                        assert [score for _, score in match.segments] == [match.score] * 4
                searches[worker] += 1
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=search_on, args=item) for item in enumerate((None, among))]
    for thread in threads:
        thread.start()
    chance = random.Random(0)
    seq = 1
    while (min(searches) < 200 or seq < 500) and not failures:
        seq += 1
        chosen = chance.sample(sorted(states), 2)
        if chance.random() < 0.3:
            index.apply(changes(seq, {}, gone=chosen))
        else:
            index.apply(changes(seq, {key: chance.choice(states[key]) for key in chosen}))
    over.set()
    for thread in threads:
        thread.join()
    assert failures == []


# --- the snapshot

RECORDINGS = {key: random_vectors(key, key % 3 + 1) for key in range(1, 20)}
DIM = 16
SEQ = 37


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved index of RECORDINGS."""
    filled(RECORDINGS, SEQ).save(tmp_path / "index")
    return tmp_path / "index"


def data_file(folder: Path) -> Path:
    (path,) = folder.glob("vectors-*")
    return path


def assert_empty(index: VectorIndex) -> None:
    """Empty, and at number 0, so that all of it is read from the catalogue again."""
    assert (len(index), index.seq, index.dim, index.model) == (0, 0, DIM, MODEL)
    index.apply(changes(SEQ, RECORDINGS))
    assert_whole(index)


def assert_whole(index: VectorIndex) -> None:
    assert (len(index), index.seq) == (sum(map(len, RECORDINGS.values())), SEQ)
    queries = random_vectors(999, 3)
    for query, matches in zip(queries, index.search(queries, [5] * 3), strict=True):
        check_matches(matches, RECORDINGS, query, 5)


def test_a_saved_index_comes_back_and_goes_on(folder: Path) -> None:
    """A restart takes milliseconds instead of a rebuild, and the replica goes on from where it was."""
    index = VectorIndex.load(folder, DIM, MODEL)
    assert_whole(index)
    now = {key: RECORDINGS[key] for key in RECORDINGS if key != 5} | {3: RECORDINGS[7], 40: RECORDINGS[8]}
    index.apply(changes(SEQ + 1, {3: RECORDINGS[7], 40: RECORDINGS[8]}, gone=[5]))
    query = RECORDINGS[7][0]
    check_matches(index.search(query[None], [30])[0], now, query, 30)
    index.save(folder)
    again = VectorIndex.load(folder, DIM, MODEL)
    assert (len(again), again.seq) == (len(index), SEQ + 1)
    check_matches(again.search(query[None], [30])[0], now, query, 30)
    assert len(list(folder.glob("vectors-*"))) == 1, "old snapshots fill the disk"


IN_TURN = [
    *(("faiss", name) for name in IN_MAIN_MEMORY),
    *((name, "faiss") for name in IN_MAIN_MEMORY),
    *(("half" if kind_of(name) == "half" else "ivf", name) for name in ROUNDED),
    *((name, "half" if kind_of(name) == "half" else "ivf") for name in ROUNDED),
]


@pytest.mark.parametrize(("before", "after"), IN_TURN)
def test_stores_of_a_kind_go_on_from_each_other_s_snapshots(folder: Path, before: str, after: str) -> None:
    """To change CLASP_VECTOR_STORE is to restart, not to read everything again; and what was rounded for a
    GPU's sake does not stay rounded."""
    first = filled(RECORDINGS, SEQ, store_named(before), kind_of(before))
    first.save(folder)

    def loaded(name: str) -> VectorIndex:
        others = {kind_of(name): store_named(name)}
        return VectorIndex.load(folder, DIM, MODEL, store_named(name), others=others, read=first._kept)

    index = loaded(after)
    assert index.kind == kind_of(before)
    assert_whole(index)
    now = {key: rows for key, rows in RECORDINGS.items() if key != 5} | {40: random_vectors(40, 3)}
    first.apply(changes(SEQ + 1, {40: now[40]}, gone=[5]))
    index.apply(changes(SEQ + 1, {40: now[40]}, gone=[5]))
    index.save(folder)
    again = loaded(before)
    assert again.seq == SEQ + 1
    for query in (RECORDINGS[7][0], now[40][1]):
        check_matches(index.search(query[None], [30])[0], now, query, 30)
        check_matches(again.search(query[None], [30])[0], now, query, 30)


def test_an_empty_index_can_be_saved(tmp_path: Path, new_store: StoreMaker) -> None:
    """A library from which all was deleted has a history, too, and need not read it again."""
    index = Told(DIM, MODEL, new_store)
    index.apply(changes(9, {}, gone=[1]))
    index.save(tmp_path)
    again = Told.load(tmp_path, DIM, MODEL, new_store)
    assert again.seq == 9
    again.apply(changes(10, RECORDINGS))
    query = RECORDINGS[7][0]
    check_matches(again.search(query[None], [5])[0], RECORDINGS, query, 5)


Damage = Callable[[Path], object]


def manifest_with(**fields: object) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return damage


def with_manifest(content: bytes) -> Damage:
    return lambda folder: (folder / "manifest.json").write_bytes(content)


def rewritten(folder: Path, index: object) -> None:
    """Another index under the file's name, vouched for by the manifest."""
    faiss.write_index(index, str(data_file(folder)))
    manifest_with(sha256=sha256_of(data_file(folder)), count=0)(folder)


DAMAGES: dict[str, Damage] = {
    "no folder": lambda folder: folder.rename(folder.with_name("elsewhere")),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "no data": lambda folder: data_file(folder).unlink(),
    "no bytes": lambda folder: data_file(folder).write_bytes(b""),
    "half": lambda folder: data_file(folder).write_bytes(data_file(folder).read_bytes()[:500]),
    "last byte gone": lambda folder: data_file(folder).write_bytes(data_file(folder).read_bytes()[:-1]),
    "one byte more": lambda folder: data_file(folder).write_bytes(data_file(folder).read_bytes() + b"\0"),
    "index of another kind": lambda folder: rewritten(folder, faiss.IndexFlatIP(DIM)),
    "vectors of another length": lambda folder: rewritten(
        folder, faiss.IndexIDMap2(faiss.IndexFlatIP(DIM + 1))
    ),
    "another index": lambda folder: filled({1: POOL}).save(folder) or manifest_with(dim=DIM)(folder),
    "data is a folder": lambda folder: (
        data_file(folder).unlink() or (folder / f"vectors-{SEQ}.faiss").mkdir()
    ),
    "model": manifest_with(model="another model"),
    "dimension": manifest_with(dim=DIM + 1),
    "format": manifest_with(format=3),
    "kind": manifest_with(kind="half"),
    "unknown kind": manifest_with(kind="quarter"),
    "kind of another type": manifest_with(kind=["flat"]),
    "format before kinds": manifest_with(format=1, kind="half"),
    "recall of nothing": manifest_with(recall={}),
    "count": manifest_with(count=3),
    "checksum": manifest_with(sha256="0" * 64),
    "newer": manifest_with(seq=SEQ + 1),
    "older": manifest_with(seq=SEQ - 1),
    "number as text": manifest_with(seq=str(SEQ)),
    "no number": manifest_with(seq=None),
    "file outside": manifest_with(file="../../etc/passwd"),
    "file of another kind": manifest_with(file=["a"]),
    "a member more": manifest_with(surprise=1),
    "nothing in it": with_manifest(b""),
    "not JSON": with_manifest(b"\x89PNG\r\n\x1a\n\xff\xfe"),
    "half JSON": with_manifest(b'{"format": 1, "file": "vec'),
    "a list": with_manifest(b"[1, 2]"),
    "a number": with_manifest(b"1"),
    "no members": with_manifest(b"{}"),
    "bottomless": with_manifest(b"[" * 100_000),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_snapshot_that_cannot_be_trusted_is_not_used(folder: Path, damage: str) -> None:
    """It is a copy: rather read everything again than answer one question wrongly."""
    DAMAGES[damage](folder)
    assert_empty(VectorIndex.load(folder, DIM, MODEL))


def test_another_model_or_dimension_starts_empty(folder: Path) -> None:
    """The cosines between vectors of two models are numbers without meaning."""
    assert len(VectorIndex.load(folder, DIM, "another model")) == 0
    assert len(VectorIndex.load(folder, DIM + 1, MODEL)) == 0


def test_one_flipped_bit_anywhere_in_the_vectors_is_noticed(folder: Path) -> None:
    """FAISS loads such a file in silence and ranks by it; disks do this."""
    path = data_file(folder)
    whole = path.read_bytes()
    chance = random.Random(0)
    for place in [0, len(whole) - 1, *chance.sample(range(len(whole)), 60)]:
        path.write_bytes(flipped(whole, place, chance))
        assert_empty(VectorIndex.load(folder, DIM, MODEL))
    path.write_bytes(whole)
    assert_whole(VectorIndex.load(folder, DIM, MODEL))


def test_one_flipped_bit_anywhere_in_the_manifest_is_noticed_or_harmless(folder: Path) -> None:
    """A number of change that is off by a bit would leave recordings out, or bring deleted ones back."""
    path = folder / "manifest.json"
    whole = path.read_bytes()
    chance = random.Random(0)
    for place in range(len(whole)):
        path.write_bytes(flipped(whole, place, chance))
        index = VectorIndex.load(folder, DIM, MODEL)
        if index.seq == SEQ:
            assert_whole(index)
        else:
            assert_empty(index)


def flipped(content: bytes, place: int, chance: random.Random) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1 << chance.randrange(8)
    return bytes(changed)


def test_only_one_process_saves_at_a_time(folder: Path) -> None:
    """The service and a command line may end together; two writers in one temporary file would mix."""
    newer = filled(RECORDINGS, SEQ + 1)
    with (folder / "saving").open("w") as other_process:
        fcntl.flock(other_process, fcntl.LOCK_EX)
        newer.save(folder)
        assert VectorIndex.load(folder, DIM, MODEL).seq == SEQ
    newer.save(folder)
    assert VectorIndex.load(folder, DIM, MODEL).seq == SEQ + 1


def twenty_each(segments: Sequence[tuple[int, int]]) -> dict[tuple[int, int], NDArray[np.float32]]:
    """A catalogue in which each recording has twenty vectors of its number."""
    return {(key, ordinal): random_vectors(key, 20)[ordinal] for key, ordinal in segments}


def loaded(folder: Path, name: str) -> VectorIndex:
    """The index of such a catalogue, of that kind from its beginning."""
    index = VectorIndex.load(folder, DIM, MODEL, store_named(name), read=twenty_each)
    index.kind = kind_of(name)
    return index


def save_until_killed(folder: Path, saved: Connection, name: str) -> None:
    """Each change adds a recording of its own number and removes the thirtieth before it."""
    index = loaded(folder, name)
    while True:
        seq = index.seq + 1
        index.apply(changes(seq, {seq: random_vectors(seq, 20)}, gone=[seq - 30]))
        index.save(folder)
        saved.send(seq)


@pytest.mark.parametrize("name", ["faiss", *(pytest.param(n, marks=pytest.mark.slow) for n in ROUNDED)])
def test_a_process_killed_while_saving_leaves_a_whole_snapshot(tmp_path: Path, name: str) -> None:
    """Between "new file" and "new manifest" there is no moment at which a restart finds something wrong, or
    has to do without what an earlier save had finished."""
    context = processes()
    saved = 0
    for life in range(6):
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=save_until_killed, args=(tmp_path, writer, name))
        process.start()
        writer.close()
        for _ in range(2 + life):
            saved = reader.recv()
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        reader.close()
        index = loaded(tmp_path, name)
        assert index.seq >= saved
        now = {key: random_vectors(key, 20) for key in range(max(1, index.seq - 29), index.seq + 1)}
        assert len(index) == 20 * len(now)
        query = random_vectors(life, 1)[0]
        check_matches(index.search(query[None], [10])[0], now, query, 10)
