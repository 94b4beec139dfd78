"""Indexes that processes share: they answer as the local one does, whoever writes to them, dies or is late.

On milvus-lite's server; those marked `slow`, on Milvus proper.
"""

import random
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from clasp_core import faults, milvus
from clasp_core.backup import backup, restore
from clasp_core.errors import IndexUnavailable
from clasp_core.filters import EVERYTHING, Filter
from clasp_core.library import Library, Question
from clasp_core.milvus import MilvusIndex, milvus_at
from clasp_core.scaling import Scaling
from tests.core.doubles import DIM, MODEL, add, complete, processes, random_vectors, unit, upload
from tests.milvus import free_port, lite_server, start_lite, whole_server

POOL = unit(np.concatenate([random_vectors(0, 6), [[1.0] + [0.0] * (DIM - 1)], np.eye(DIM)[:3]]))
"""Few vectors for many segments: most scores come several times."""
ENGINES = [
    pytest.param(lite_server, id="lite"),
    pytest.param(whole_server, id="server", marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
]


def open_shared(folder: Path, uri: str, model: str = MODEL, dim: int = DIM) -> Library:
    return Library(folder, model=model, dim=dim, shared_index=milvus_at(uri))


def open_listed(folder: Path, uri: str, exhaustive_up_to: int) -> Library:
    listed = milvus_at(uri, kind="ivf", exhaustive_up_to=exhaustive_up_to)
    return Library(folder, model=MODEL, dim=DIM, shared_index=listed, scaling=Scaling(kind="ivf"))


def answers(library: Library, queries: np.ndarray, **question: object) -> list[list[tuple[object, ...]]]:
    """All that hits say, but for segments that are not the best: how many are shown may differ."""
    results = library.search(queries, [Question(**question)] * len(queries))  # type: ignore[arg-type]
    return [[(hit.recording.id, hit.score, hit.segments[0], hit.among) for hit in hits] for hits in results]


def check_same(shared: Library, local: Library, queries: np.ndarray) -> None:
    """That two indexes of one catalogue give the same hits, in the same order, with the same scores."""
    for wanted in (
        EVERYTHING,
        Filter(collection="a"),
        Filter(within=frozenset({"a", "c", 'no such " one'})),
        Filter(collection="a", within=frozenset({"b"})),
        Filter(langs=frozenset({"fa"})),
        Filter(ids=frozenset({"r1", "r2", "r3"}), within=frozenset({"a", "b"})),
    ):
        for more in ({"limit": 3}, {"limit": 40}, {"limit": 4, "group_by": "segment"}, {"min_score": 0.5}):
            asked = {"filter": wanted, **more}
            assert answers(shared, queries, **asked) == answers(local, queries, **asked), asked


@pytest.mark.parametrize("engine", ENGINES)
def test_a_shared_index_answers_as_the_local_one(engine: Callable[[], str], tmp_path: Path) -> None:
    """Whoever outgrows one machine must find what they found before. The local index is compared with the
    slow search elsewhere; here, through additions, deletions, embedding anew and restarts, with as many ties
    as there can be, the other gives the same hits, order, scores and numbers of what was searched."""
    chance = random.Random(7)
    local = Library(tmp_path / "data", model=MODEL, dim=DIM)
    shared = open_shared(tmp_path / "data", engine())
    names: list[str] = []
    for step in range(3):
        for number in range(8):
            name = f"r{len(names)}"
            vectors = POOL[chance.choices(range(len(POOL)), k=chance.randint(1, 9))]
            add(local, name, vectors, collection="abc"[number % 3], lang=chance.choice(["fa", "de"]))
            names.append(name)
        check_same(shared, local, POOL[[0, 6]])
        local.delete(names[step])
        again = local.catalog.get(names[-1])
        local.catalog.embed_anew({again.key}, MODEL)
        check_same(shared, local, POOL[[7]])
        assert complete(local.catalog, again, POOL[[step, 7]])
        check_same(shared, local, POOL[[step, 7]])
        if step == 1:
            shared = open_shared(tmp_path / "data", engine())
    assert answers(shared, POOL[:0]) == []


def test_what_hides_behind_more_neighbours_than_there_are_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Milvus gives 16,384 neighbours and no more, and one long recording can fill them all. The others must
    be found nevertheless."""
    monkeypatch.setattr(milvus, "DEEPEST", 32)
    monkeypatch.setattr(milvus, "KEYS_AT_ONCE", 5)
    close = np.eye(DIM)[0] + np.random.default_rng(0).normal(0, 0.01, (100, DIM))
    local = Library(tmp_path / "data", model=MODEL, dim=DIM)
    shared = open_shared(tmp_path / "data", lite_server())
    add(local, "long", unit(close), lang="fa")
    for number in range(12):
        add(local, f"r{number}", random_vectors(number, 3), lang="fa")
    query = unit(np.eye(DIM)[:1])
    for limit in (1, 2, 13):
        for wanted in (EVERYTHING, Filter(langs=frozenset({"fa"}))):
            asked = {"limit": limit, "filter": wanted}
            assert answers(shared, query, **asked) == answers(local, query, **asked)


def index_of(library: Library) -> MilvusIndex:
    index = library.refresh()
    assert isinstance(index, MilvusIndex)
    return index


def rows(index: MilvusIndex) -> int:
    (row,) = index._client.query(index._state.name, filter="", output_fields=["count(*)"])
    return int(row["count(*)"])


def die_following(folder: Path, uri: str, point: str) -> None:
    """In a process of its own: be killed at a point of applying what is new."""
    faults._armed = faults._from_environment(point)
    milvus.TURN_S = 0.5
    open_shared(folder, uri).refresh()


@pytest.mark.parametrize("point", [point for point in faults.POINTS if point.startswith("milvus.")])
def test_a_process_that_dies_while_it_applies_changes_leaves_nothing_wrong(
    point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes are killed at every moment. The next one has all that is ready, nothing twice, and does not
    wait for the dead longer than its turn lasts."""
    monkeypatch.setattr(milvus, "TURN_S", 0.5)
    local = Library(tmp_path / "data", model=MODEL, dim=DIM)
    if point not in ("milvus.created", "milvus.named"):
        add(local, "gone", random_vectors(90, 2))
        add(local, "changed", random_vectors(91, 3))
        open_shared(tmp_path / "data", lite_server()).refresh()
        local.delete("gone")
        changed = local.catalog.get("changed")
        local.catalog.embed_anew({changed.key}, MODEL)
        assert complete(local.catalog, changed, random_vectors(92, 2))
    for number in range(3):
        add(local, f"r{number}", random_vectors(number, 2))
    dying = processes("clasp_core.milvus").Process(
        target=die_following, args=(tmp_path / "data", lite_server(), point)
    )
    dying.start()
    dying.join(60)
    assert dying.exitcode == -9
    began = time.monotonic()
    shared = open_shared(tmp_path / "data", lite_server())
    check_same(shared, local, random_vectors(5, 1))
    assert time.monotonic() - began < 15
    assert rows(index_of(shared)) == len(local.refresh())


def test_what_comes_late_takes_nothing_away(tmp_path: Path) -> None:
    """A process can stand still between any two of its calls, and go on when others are far ahead: its rows
    and its removals are of the past. Nothing that is ready may be lost by them, nor anything else found; and
    where two apply the same at once, it is there once."""
    local = Library(tmp_path / "data", model=MODEL, dim=DIM)
    recordings = [add(local, f"r{number}", random_vectors(number, 2)) for number in range(3)]
    shared = open_shared(tmp_path / "data", lite_server())
    index = index_of(shared)
    catalog, before = local.catalog, index._state
    catalog.embed_anew({recordings[0].key}, MODEL)
    assert complete(catalog, recordings[0], random_vectors(20, 2))
    past = catalog.changes(before.point[0], limit=100, model=MODEL, dim=DIM)
    index_of(shared)
    index._apply(before, past)
    assert rows(index) == 6
    catalog.embed_anew({recordings[0].key}, MODEL)
    assert complete(catalog, recordings[0], random_vectors(30, 2))
    local.delete("r1")
    check_same_but_for_counts(shared, local)
    index._apply(before, past)
    check_same_but_for_counts(shared, local)
    check_same_but_for_counts(open_shared(tmp_path / "data", lite_server()), local)
    # two at once, neither of whom heeds turns
    add(local, "both", random_vectors(40, 3))
    indexes = [MilvusIndex(catalog, MODEL, DIM, uri=lite_server()) for _ in range(2)]
    for one in indexes:
        one._connect()
        one._look()
    for one in indexes:
        one._fill(1)
    check_same_but_for_counts(shared, local)


def check_same_but_for_counts(shared: Library, local: Library) -> None:
    queries = np.concatenate([random_vectors(seed, 1) for seed in (0, 1, 20, 30, 40)])
    for limit in (1, 10):
        found, expected = (
            [[hit[:3] for hit in hits] for hits in answers(library, queries, limit=limit)]
            for library in (shared, local)
        )
        assert found == expected


def test_a_catalogue_put_back_and_its_copy_share_nothing_of_the_lost_future(tmp_path: Path) -> None:
    """After a restore keys and numbers of changes are given out again. What Milvus has of the history that
    never was must not be taken for this one's; and the original, which may still be at work, not be disturbed
    by its copy."""
    data, kept = tmp_path / "data", tmp_path / "kept"
    with closing(Library(data, model=MODEL, dim=DIM)) as local:
        add(local, "old", random_vectors(1, 2))
        backup(data, tmp_path / "backup")
    shutil.copytree(data, kept)
    uri = lite_server()
    original = open_shared(data, uri)
    add(original, "lost", random_vectors(2, 4))
    assert len(answers(original, random_vectors(2, 1))[0]) == 2
    # in place, and grown anew to the same length
    original.catalog.close()
    shutil.rmtree(data)
    shutil.copytree(kept, data)
    local, back = Library(data, model=MODEL, dim=DIM), open_shared(data, uri)
    add(local, "new", random_vectors(3, 4))
    check_same(back, local, random_vectors(2, 2))
    # and a copy of it
    restore(tmp_path / "backup", tmp_path / "copy")
    copy = open_shared(tmp_path / "copy", uri)
    assert [hit[0] for hit in answers(copy, random_vectors(2, 1))[0]] == ["old"]
    assert copy.catalog.identity() != back.catalog.identity()
    check_same(back, local, random_vectors(2, 2))


def test_a_milvus_that_is_away_or_was_put_back_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While Milvus is away, searches say so at once, time and again, and deletions and uploads go on; when it
    is back, and has lost its last hour, or everything, then what it lost is put there again. Nobody has to
    do anything."""
    monkeypatch.setattr(milvus, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(milvus, "REST_S", 0.3)
    monkeypatch.setattr(milvus, "ANSWER_WITHIN_S", 2.0)
    volume, port = tmp_path / "milvus", free_port()
    uri, server = start_lite(volume, port)
    local, shared = (Library(tmp_path / "data", model=MODEL, dim=DIM) for _ in range(2))
    shared = open_shared(tmp_path / "data", uri)
    add(local, "first", random_vectors(1, 2))
    check_same(shared, local, random_vectors(1, 1))

    def stop() -> None:
        server.kill()
        server.wait()

    stop()
    shutil.copytree(volume, tmp_path / "older")
    _, server = start_lite(volume, port)
    add(local, "second", random_vectors(2, 2))
    assert eventually_answers(shared, random_vectors(2, 1)) == ["second", "first"]
    stop()
    for _ in range(3):
        with pytest.raises(IndexUnavailable, match="Milvus does not answer") as refused:
            shared.search(random_vectors(2, 1), [Question()])
        assert "127.0.0.1" not in refused.value.detail
    upload(shared, b"meanwhile")
    shared.delete("first")
    for earlier in (tmp_path / "older", tmp_path / "nothing"):
        shutil.rmtree(volume)
        if earlier.exists():
            shutil.copytree(earlier, volume)
        _, server = start_lite(volume, port)
        assert eventually_answers(shared, random_vectors(2, 1)) == ["second"]
        stop()


def eventually_answers(library: Library, queries: np.ndarray) -> list[object]:
    for _ in range(20):
        try:
            return [hit[0] for hit in answers(library, queries)[0]]
        except IndexUnavailable:
            time.sleep(0.2)
    raise AssertionError("Milvus is back, and nobody noticed")


def test_what_no_model_needs_any_more_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that moves from model to model would leave all their vectors in Milvus."""
    uri = lite_server()
    library = open_shared(tmp_path / "data", uri)
    add(library, "one", random_vectors(1, 2))
    index = index_of(library)
    left = index._state.name
    other = MilvusIndex(library.catalog, "another model", 4, uri=uri)
    other.follow(library.catalog, 10)
    monkeypatch.setattr(milvus, "UNUSED_KEPT_S", -1.0)
    index.forget_others({MODEL, "another model"})
    assert {left, other._state.name} <= set(index._client.list_collections())
    index._begin()  # as after the loss of its point
    library.forget_retired()
    names = [name for name in index._client.list_collections() if name.startswith(index._library)]
    assert left not in names
    assert len(names) == 1
    assert eventually_answers(library, random_vectors(1, 1)) == ["one"]


def fill(library: Library, recordings: int) -> np.ndarray:
    """Recordings of ten segments, each about one of sixty topics; and questions that are near to some."""
    chance = np.random.default_rng(3)
    centres = unit(chance.normal(size=(60, DIM)))
    for number in range(recordings):
        near = 0.1 * chance.normal(size=(10, DIM))
        lang = "fa" if number % 20 == 0 else "de"
        add(library, f"r{number}", unit(centres[number % 60] + near), collection="ab"[number % 2], lang=lang)
    return unit(centres[:40] + 0.15 * chance.normal(size=(40, DIM)))


def recall_of(shared: Library, local: Library, questions: np.ndarray, **asked: object) -> float:
    """The share of the ten best that is found; every score must be right."""
    shares = []
    for found, right in zip(
        answers(shared, questions, **asked), answers(local, questions, **asked), strict=True
    ):
        known = {hit[0]: hit[1] for hit in right}
        assert all(hit[1] == known[hit[0]] for hit in found if hit[0] in known)
        shares.append(len({hit[0] for hit in found} & known.keys()) / len(known))
    return float(np.mean(shares))


def in_lists(index: MilvusIndex) -> bool:
    """Whether a search of one list finds less than there is."""
    found = index._client.search(
        index._state.name, data=list(POOL[:1]), limit=100, search_params={"params": {"nprobe": 1}}
    )
    return len(found[0]) < 100


def test_lists_miss_nothing_until_measured_and_little_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An approximate index must not be a gamble: unmeasured it looks at everything, and measured it keeps
    its promise. What a filter leaves few of, and what is asked for in numbers, is found whole. Indexes of
    both kinds are not taken for each other, and the one that is left does not stay for ever."""
    monkeypatch.setattr(milvus, "SEALED_BYTES", 4 * DIM * 1024)
    monkeypatch.setattr(milvus, "QUESTIONS", 40)
    uri = lite_server()
    local = Library(tmp_path / "data", model=MODEL, dim=DIM)
    questions = fill(local, 120)
    shared = open_listed(tmp_path / "data", uri, 100)
    check_same(shared, local, questions[:1])
    index = index_of(shared)
    index._client.flush(index._state.name)
    for _ in range(50):
        if in_lists(index):
            break
        time.sleep(0.1)
    assert in_lists(index)
    check_same(shared, local, questions[1:2])
    shared.rescale()  # milvus-lite does not tell what is in lists
    assert (index.recall, shared.index_kind()) == (None, ("ivf", 1.0, 1))

    monkeypatch.setattr(MilvusIndex, "_settled", lambda *_: True)
    index._unsettled_until = 0.0
    shared.rescale()
    assert index.recall is not None
    assert (index.recall.at_least >= 0.95, index.recall.count) == (True, 1200)
    assert 1 <= index.recall.probes < index.lists == 128
    assert recall_of(shared, local, questions, limit=10) >= 0.95
    few = {"filter": Filter(langs=frozenset({"fa"})), "limit": 6}
    assert answers(shared, questions, **few) == answers(local, questions, **few)
    whole = {"limit": 120}
    assert answers(shared, questions[:3], **whole) == answers(local, questions[:3], **whole)
    # another process goes by the same figure
    another = open_listed(tmp_path / "data", uri, 100)
    assert index_of(another).recall == index.recall
    # and one that was set otherwise has its own
    flat = open_shared(tmp_path / "data", uri)
    check_same(flat, local, questions[:1])
    names = {index._state.name, index_of(flat)._state.name}
    assert len(names) == 2
    monkeypatch.setattr(milvus, "UNUSED_KEPT_S", -1.0)
    flat.forget_retired()
    assert names & set(index._client.list_collections()) == {index_of(flat)._state.name}
    assert eventually_answers(shared, questions[:1]) == eventually_answers(local, questions[:1])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_milvus_keeps_the_measured_recall(tmp_path: Path) -> None:
    """On Milvus proper rows are in lists only some time after they were written. What is measured must be
    true of the lists, not of rows that wait for them: 19 of 20 are found then, also behind wide filters, and
    all behind narrow ones; and again when the library has grown."""
    local = Library(tmp_path / "data", model=MODEL, dim=DIM)
    questions = fill(local, 600)
    shared = open_listed(tmp_path / "data", whole_server(), 1000)
    check_same(shared, local, questions[:2])
    shared.rescale()
    index = index_of(shared)
    assert in_lists(index)
    assert index.recall is not None
    assert (index.recall.count, index.recall.at_least >= 0.95) == (6000, True)
    assert index.recall.probes < 6000 // 39
    for wanted in (EVERYTHING, Filter(collection="a")):
        assert recall_of(shared, local, questions, filter=wanted) >= 0.95, wanted
    few = {"filter": Filter(langs=frozenset({"fa"})), "limit": 6}
    assert answers(shared, questions, **few) == answers(local, questions, **few)
    before = index.recall
    for number in range(200):
        add(local, f"more{number}", random_vectors(number, 10))
    assert recall_of(shared, local, questions) >= 0.95
    shared.rescale()
    assert index.recall is not None
    assert (before.count, index.recall.count) == (6000, 8000)
    assert recall_of(shared, local, questions) >= 0.95


@pytest.mark.parametrize("uri", ["ftp://me:secret@host", "http://", "me:secret@host:19530"])
def test_a_uri_that_is_none_is_refused_without_being_told(uri: str) -> None:
    """Whoever mistypes a URI with a password must not read it in a log."""
    with pytest.raises(IndexUnavailable) as refused:
        milvus_at(uri)
    assert "secret" not in refused.value.detail


def test_what_has_no_snapshot_makes_none(tmp_path: Path) -> None:
    """The data directory of a replica holds nothing that grows."""
    with closing(open_shared(tmp_path / "data", lite_server())) as library:
        add(library, "one", random_vectors(1, 2))
        library.refresh()
        library.save_index()
        assert (library.unsaved_changes(), library.saved_at()) == (0, None)
    assert not (tmp_path / "data" / "index").exists()
