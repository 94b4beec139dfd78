"""The library: what is ready is found, what is deleted is not, by whomever and whatever was lost between."""

import base64
import contextlib
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from clasp_core import library as library_module
from clasp_core.errors import DataMismatch, IdConflict, InvalidField, InvalidLanguage, RecordingNotFound
from clasp_core.filters import Condition, Filter
from clasp_core.index import VectorIndex
from clasp_core.library import Hit, Library, Question, check_name
from clasp_core.types import Embeddings
from tests.core.doubles import DIM, MODEL, add, complete, random_vectors, unit, upload

Opener = Callable[[], Library]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "index_data"


@pytest.fixture
def open_library(data_dir: Path) -> Iterator[Opener]:
    """Opens the same directory again and again, as processes would."""
    with contextlib.ExitStack() as opened:

        def open_one() -> Library:
            one = Library(data_dir, model=MODEL, dim=DIM)
            opened.callback(one.catalog.close)  # without saving the index: like a process that dies
            return one

        yield open_one


@pytest.fixture
def library(open_library: Opener) -> Library:
    return open_library()


def search(library: Library, vector: Embeddings, limit: int = 10, **question: object) -> list[Hit]:
    (hits,) = library.search(vector[None], [Question(limit, **question)])  # type: ignore[arg-type]
    return hits


def ids(hits: list[Hit]) -> list[str]:
    return [hit.recording.id for hit in hits]


def best_by_hand(contents: Mapping[str, Embeddings], query: Embeddings, limit: int) -> list[str]:
    """The slow and obvious search."""
    exact = query.astype(np.float64)
    best = {
        name: max(float(exact @ row.astype(np.float64)) for row in rows) for name, rows in contents.items()
    }
    return sorted(best, key=lambda name: (-best[name], name))[:limit]


# --- keeping and finding


def test_a_recording_is_found_as_soon_as_it_is_ready(library: Library) -> None:
    """ "201 Created" means searchable, not "soon"; and what is not embedded yet cannot be a hit."""
    vectors = random_vectors(1, 3)
    recording = upload(library, b"bytes", "one", metadata={"title": "گلستان"})
    assert search(library, vectors[1]) == []
    complete(library.catalog, recording, vectors)
    (hit,) = search(library, vectors[1])
    assert (hit.rank, hit.recording) == (1, library.catalog.get("one"))
    assert hit.recording.metadata == {"title": "گلستان"}
    assert hit.score == pytest.approx(1.0, abs=1e-6)
    assert (hit.segments[0].start_s, hit.segments[0].end_s) == (1.0, 2.0)
    expected = sorted((float(vectors[1] @ vector) for vector in vectors), reverse=True)
    assert [segment.score for segment in hit.segments] == pytest.approx(expected, abs=1e-6)


def test_what_another_process_did_is_seen_by_the_next_search(open_library: Opener) -> None:
    """Workers and several services share a directory: each must find what the others added, and must not
    find what they deleted, without being told."""
    reader, writer = open_library(), open_library()
    vectors = random_vectors(1, 1)
    assert search(reader, vectors[0]) == []
    add(writer, "one", vectors)
    assert ids(search(reader, vectors[0])) == ["one"]
    writer.delete("one")
    assert search(reader, vectors[0]) == []
    assert search(writer, vectors[0]) == []


def test_a_deleted_recording_is_forgotten_entirely(library: Library) -> None:
    """Deleting is a promise to a person: no hit, no record, no bytes."""
    vectors = random_vectors(1, 2)
    recording = add(library, "one", vectors)
    search(library, vectors[0])
    library.delete("one")
    assert search(library, vectors[0]) == []
    assert not library.store.path(recording.sha256).exists()
    with pytest.raises(RecordingNotFound):
        library.catalog.get("one")
    with pytest.raises(RecordingNotFound):
        library.delete("one")
    assert len(library.refresh()) == 0


def test_bytes_stay_while_another_collection_has_them(library: Library) -> None:
    """Equal bytes share a file; deleting one of two recordings must not silence the other."""
    one = upload(library, b"the same", "one", collection="a")
    upload(library, b"the same", "two", collection="b")
    library.delete("one")
    assert library.store.path(one.sha256).read_bytes() == b"the same"
    library.delete("two")
    assert not library.store.path(one.sha256).exists()


def test_once_deleted_it_is_never_a_hit_however_many_are_searching(library: Library) -> None:
    """A search that begins after the delete was acknowledged must not show it, even while other threads
    bring the index up to date."""
    vectors = random_vectors(7, 12)
    deleted: set[str] = set()
    over = threading.Event()
    wrong: list[set[str]] = []
    failures: list[BaseException] = []
    for number, vector in enumerate(vectors):
        add(library, f"{number}", vector[None])

    def search_on() -> None:
        try:
            while not over.is_set():
                gone_before = set(deleted)
                wrong.append(gone_before & set(ids(search(library, vectors[0], limit=20))))
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=search_on) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(12):
        library.delete(f"{number}")
        deleted.add(f"{number}")
    while not failures and not (wrong and len(wrong) > 50):
        over.wait(0.001)
    over.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert set().union(*wrong) == set()


def test_the_same_upload_twice_is_one_recording(library: Library) -> None:
    """Sending again is always safe, whatever the client says the second time."""
    first = upload(library, b"bytes", "one", lang="fa", metadata={"a": 1})
    with library.store.receive() as arriving:
        arriving.write(b"bytes")
        arriving.seal()
        again, created = library.register(arriving, recording_id="two", lang="en", metadata={"b": 2})
    assert (again, created) == (first, False)
    with pytest.raises(IdConflict):
        upload(library, b"other bytes", "one")
    assert len(list(library.store.stored())) == 1


def test_bytes_that_were_lost_come_back_with_the_next_upload(library: Library) -> None:
    """A disk that lost a file is mended by sending the file again; the record alone is worth nothing."""
    recording = upload(library, b"bytes", "one")
    library.store.remove(recording.sha256)
    upload(library, b"bytes")
    assert library.store.path(recording.sha256).read_bytes() == b"bytes"


# --- ranking


def test_equal_scores_are_ordered_by_id(library: Library) -> None:
    """The same question must give the same page every time: jingles and standard greetings do tie exactly."""
    names = [f"{number:02d}" for number in range(40)]
    random.Random(0).shuffle(names)
    same = random_vectors(1, 1)
    for name in names:
        add(library, name, same)
    add(library, "another", random_vectors(2, 1))
    for query in (same[0], unit(same[0] + 0.1 * random_vectors(3, 1)[0])):
        for limit in (1, 3, 40, 41):
            assert ids(search(library, query, limit)) == [*sorted(names), "another"][:limit]


def test_hits_are_ranked_by_their_best_segment(library: Library) -> None:
    """A long recording with one right sentence comes before a short one that is nearly right throughout."""
    axes = np.eye(DIM, dtype=np.float32)
    add(library, "right-once", np.stack([axes[1], axes[0], axes[2], axes[3]]))
    add(library, "nearly-right", np.repeat(unit(axes[0] + 0.3 * axes[1])[None], 3, axis=0))
    hits = search(library, axes[0])
    assert ids(hits) == ["right-once", "nearly-right"]
    assert [hit.rank for hit in hits] == [1, 2]
    assert hits[0].segments[0].start_s == 1.0


def test_min_score_keeps_what_reaches_it(library: Library) -> None:
    """Below the caller's threshold there is nothing; a score that just reaches it counts."""
    axes = np.eye(DIM, dtype=np.float32)
    for number, cosine in enumerate([1.0, 0.5, 0.0, -1.0]):
        vector = cosine * axes[0] + np.sqrt(1 - cosine**2, dtype=np.float32) * axes[1]
        add(library, f"{number}", vector.astype(np.float32)[None])
    for min_score, expected in [(None, 4), (-1.0, 4), (0.0, 3), (0.5, 2), (0.51, 1), (1.0, 1), (1.01, 0)]:
        assert len(search(library, axes[0], min_score=min_score)) == expected


def test_each_question_of_a_batch_keeps_its_own_conditions(library: Library) -> None:
    """Questions are searched together for speed; filters, limits and thresholds stay with their question."""
    contents = {}
    for number in range(24):
        collection, lang, parity = "ab"[number % 2], ["fa", "en", None][number % 3], number % 4 < 2
        contents[f"{number:02d}"] = random_vectors(number, 2)
        add(
            library,
            f"{number:02d}",
            contents[f"{number:02d}"],
            collection=collection,
            lang=lang,
            metadata={"parity": parity},
        )
    numbers = {name: int(name) for name in contents}
    cases: list[tuple[Filter, Callable[[int], bool]]] = [
        (Filter(), lambda n: True),
        (Filter(collection="a"), lambda n: n % 2 == 0),
        (Filter(langs=frozenset({"fa"})), lambda n: n % 3 == 0),
        (Filter(collection="b", langs=frozenset({"en"})), lambda n: n % 2 == 1 and n % 3 == 1),
        (Filter(metadata=(Condition.of("parity", "eq", True),)), lambda n: n % 4 < 2),
        (Filter(metadata=(Condition.of("parity", "eq", 1),)), lambda n: False),  # True, to Python
        (Filter(collection="nobody's"), lambda n: False),
    ]
    questions = [
        (Question(limit, wanted), passes)
        for limit in (1, 4, 30)
        for wanted, passes in cases
        for _ in range(2)
    ]
    queries = random_vectors(99, len(questions))
    answers = library.search(queries, [question for question, _ in questions])
    for query, (question, passes), hits in zip(queries, questions, answers, strict=True):
        allowed = {name: rows for name, rows in contents.items() if passes(numbers[name])}
        assert ids(hits) == best_by_hand(allowed, query, question.limit)
    assert library.search(queries[:0], []) == []


def test_the_best_segments_are_the_best_of_all(library: Library) -> None:
    """Grouped by segment, a recording may fill every place of a page; in it stand the best segments there
    are, of what the filter allows, and equal ones always in one order."""
    pool = random_vectors(5, 6)  # few vectors for many segments: most cosines come several times
    contents = {f"{number}": pool[np.random.default_rng(number).integers(0, 6, 7)] for number in range(20)}
    for name, rows in contents.items():
        add(library, name, rows, collection="ab"[int(name) % 2])
    query = random_vectors(6, 1)[0]
    for wanted, names in (
        (Filter(), list(contents)),
        (Filter(collection="b"), [name for name in contents if int(name) % 2]),
    ):
        truth = sorted(
            (-float(query.astype(np.float64) @ row.astype(np.float64)), name, float(second))
            for name in names
            for second, row in enumerate(contents[name])
        )
        for limit in (1, 3, 10, 1000):
            hits = search(library, query, limit=limit, filter=wanted, group_by="segment")
            shown = [(hit.recording.id, span.start_s) for hit in hits for span in hit.segments]
            assert shown == [(name, start_s) for _, name, start_s in truth[:limit]]
            assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
            assert [hit.score for hit in hits] == pytest.approx([-score for score, *_ in truth[:limit]])


def test_a_vector_of_another_model_is_refused(library: Library) -> None:
    """A question embedded by the wrong model must be an error, not a bad answer."""
    add(library, "one", random_vectors(1, 1))
    with pytest.raises(ValueError, match="vector"):
        search(library, random_vectors(1, 1, DIM + 1)[0])


# --- pages and names


def test_pages_end_and_meet(library: Library) -> None:
    """Walking the cursors shows each recording once, newest first, and then says that it is over."""
    for number in range(7):
        upload(library, b"%d" % number, f"{number}")
    seen: list[str] = []
    cursor: str | None = None
    for _ in range(4):
        page, cursor = library.page(limit=2, cursor=cursor)
        seen += [recording.id for recording in page]
    assert seen == ["6", "5", "4", "3", "2", "1", "0"]
    assert cursor is None
    page, cursor = library.page(limit=7)
    assert (len(page), cursor) == (7, None)


def test_a_cursor_outlives_the_recording_it_was_made_at(library: Library) -> None:
    """Between two pages the last recording of the first may be deleted; the second page is the same."""
    for number in range(4):
        upload(library, b"%d" % number, f"{number}")
    page, cursor = library.page(limit=2)
    library.delete(page[-1].id)
    upload(library, b"new", "new")
    assert [recording.id for recording in library.page(limit=2, cursor=cursor)[0]] == ["1", "0"]


@pytest.mark.parametrize(
    "cursor",
    ["", "5", "a", "!!!!", "é", "\0", "A" * 10_000]
    + [
        base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")
        for text in (
            *("5", "1:5", "null", "{}", "[]", '["2026-01-01T00:00:00", "a"]', '["now", "a", "default"]'),
            *(
                '["2026-01-01T00:00:00+00:00", "a", "b"]',
                '["2026-01-01T00:00:00", "a\\u0000", "b"]',
                "[" * 9000,
            ),
        )
    ],
)
def test_a_cursor_that_nobody_gave_out_is_refused(library: Library, cursor: str) -> None:
    """Cursors come back from the network; a made-up one is the caller's mistake and never ours."""
    with pytest.raises(InvalidField, match="cursor"):
        library.page(cursor=cursor)


@pytest.mark.parametrize("name", ["a", "A9", "a.b", "a-b_c:d", "-", "_", ":", "a..", "0" * 128])
def test_names_that_are_safe_in_urls_and_files_are_taken(name: str) -> None:
    """What the documentation allows must work."""
    assert check_name("id", name) == name


NOT_ASCII = ("é", "१", "²", "ｆ", "سعدی", "\ud800")


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", ".hidden", "a/b", "a\\b", "a b", "a\n", "\0", "a?b", "a#b", "a%41"),
        *NOT_ASCII,
        "0" * 129,
    ],
)
def test_names_that_mean_something_elsewhere_are_refused(library: Library, name: str) -> None:
    """An id becomes part of a URL and of people's file names: paths, escapes and look-alikes stay out, and
    nothing is stored for them."""
    for field in ("recording_id", "collection"):
        with pytest.raises(InvalidField):
            upload(library, b"bytes", **{field: name})
    assert list(library.store.stored()) == []
    assert library.page() == ([], None)


def test_languages_are_kept_in_canonical_form(library: Library) -> None:
    """Filters compare tags whole, so one language must have one spelling."""
    assert upload(library, b"1", lang="FA-ir").lang == "fa-IR"
    assert upload(library, b"2", lang=None).lang is None
    with pytest.raises(InvalidLanguage):
        upload(library, b"3", lang="not a language")
    assert len(list(library.store.stored())) == 2


@pytest.mark.parametrize(
    "metadata", [{"a": float("nan")}, {"a": [float("inf")]}, {"a": {1, 2}}, {"a": b"bytes"}, {"a": object()}]
)
def test_metadata_that_json_cannot_hold_is_refused(library: Library, metadata: dict[str, object]) -> None:
    """One row with a NaN in it would break the metadata filter for all others."""
    with pytest.raises(InvalidField, match="metadata"):
        upload(library, b"bytes", metadata=metadata)
    add(library, "one", random_vectors(1, 1), metadata={"a": 1})
    wanted = Filter(metadata=(Condition.of("a", "eq", 1),))
    assert ids(search(library, random_vectors(1, 1)[0], filter=wanted)) == ["one"]


# --- restarts


def test_a_restart_finds_the_same_with_a_snapshot_without_and_with_a_bad_one(
    open_library: Opener, data_dir: Path
) -> None:
    """The index on disk is there for speed alone: present, absent, old or damaged, the answers are equal."""
    contents = {f"{number}": random_vectors(number, 3) for number in range(8)}
    library = open_library()
    for name, rows in contents.items():
        add(library, name, rows)
    queries = random_vectors(99, 5)
    expected = [best_by_hand(contents, query, 10) for query in queries]

    def answers() -> list[list[str]]:
        found = open_library().search(queries, [Question(10)] * 5)
        return [ids(hits) for hits in found]

    assert answers() == expected, "without a snapshot"
    library.refresh()
    library.close()
    (snapshot,) = (data_dir / "index").glob("vectors-*")
    assert answers() == expected, "with a snapshot"
    whole = snapshot.read_bytes()
    snapshot.write_bytes(whole[:-7] + b"damaged")
    assert answers() == expected, "with a damaged one"
    snapshot.write_bytes(whole)
    with contextlib.closing(open_library()) as writer:
        writer.delete("3")
        add(writer, "new", contents.pop("3"))
        contents["new"] = random_vectors(3, 3)
    expected = [best_by_hand(contents, query, 10) for query in queries]
    assert answers() == expected, "with an old one"


def test_a_snapshot_spares_reading_everything_again(open_library: Opener) -> None:
    """Starting with a hundred thousand recordings must not take minutes: the replica starts where it was."""
    with contextlib.closing(open_library()) as library:
        add(library, "one", random_vectors(1, 2))
        library.refresh()
    again = open_library()
    loaded = VectorIndex.load(again._index_dir, DIM, MODEL)
    assert loaded.point == again.catalog.last_change()
    assert loaded.seq == 1


def test_a_catalogue_put_back_to_an_earlier_state_is_believed(open_library: Opener, data_dir: Path) -> None:
    """After a restore from a backup the snapshot may be of a future that never was; its recordings and those
    that were deleted since the backup must not be confused with it."""
    library = open_library()
    contents = {f"{number}": random_vectors(number, 2) for number in range(4)}
    for name, rows in contents.items():
        add(library, name, rows)
    library.catalog.close()
    backup = data_dir / "backup.sqlite3"
    shutil.copy(data_dir / "catalog.sqlite3", backup)

    library = open_library()
    library.delete("1")
    add(library, "of-the-lost-future", random_vectors(99, 2))
    assert "1" not in ids(search(library, contents["1"][0]))
    library.close()

    shutil.copy(backup, data_dir / "catalog.sqlite3")
    library = open_library()
    assert ids(search(library, contents["1"][0])) == best_by_hand(contents, contents["1"][0], 10)
    contents["new"] = random_vectors(100, 1)
    add(library, "new", contents["new"])
    assert ids(search(library, contents["new"][0])) == best_by_hand(contents, contents["new"][0], 10)


def test_a_restored_catalogue_with_as_many_changes_is_told_from_the_lost_one(
    open_library: Opener, data_dir: Path
) -> None:
    """Keys are used again after a restore; a snapshot of the lost history, just as long, would answer
    with the vectors of recordings that are no more."""
    library = open_library()
    add(library, "common", random_vectors(1, 1))
    library.catalog.close()
    shutil.copy(data_dir / "catalog.sqlite3", data_dir / "backup.sqlite3")
    library = open_library()
    lost = random_vectors(2, 1)
    add(library, "lost", lost)
    library.refresh()
    library.close()

    shutil.copy(data_dir / "backup.sqlite3", data_dir / "catalog.sqlite3")
    writer, library = open_library(), open_library()
    add(writer, "new", random_vectors(3, 1))
    hits = search(library, lost[0])
    assert "lost" not in ids(hits)
    assert max(hit.score for hit in hits) < 0.999


def test_another_model_is_refused_while_there_are_vectors(open_library: Opener, data_dir: Path) -> None:
    """Searching one model's vectors with another's questions gives nonsense that looks like an answer."""
    upload(open_library(), b"not embedded yet", "waiting")
    Library(data_dir, model="another", name="other", dim=DIM).close()
    library = open_library()
    complete(library.catalog, library.catalog.get("waiting"), random_vectors(1, 1))
    with pytest.raises(DataMismatch, match="another model"):
        Library(data_dir, model="another", name="other", dim=DIM)
    library.delete("waiting")
    Library(data_dir, model="another", name="other", dim=DIM).close()


def test_tidying_removes_orphans_only(library: Library) -> None:
    """After crashes the disk holds bytes that belong to nobody. All else stays."""
    vectors = random_vectors(1, 1)
    kept, waiting = add(library, "kept", vectors), upload(library, b"waiting", "waiting")
    with library.store.receive() as lost:
        lost.write(b"placed by a process that died before it could register")
        lost.seal()
        library.store.place(lost)
    with library.store.receive() as arriving:
        arriving.write(b"still ")
        library.tidy()
        arriving.write(b"arriving")
        arriving.seal()
        library.register(arriving, recording_id="late")
    assert set(library.store.stored()) == {kept.sha256, waiting.sha256, library.catalog.get("late").sha256}
    assert ids(search(library, vectors[0])) == ["kept"]


# --- all of it together


def test_a_long_life_with_two_processes_against_a_dictionary(
    open_library: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adding, deleting, adding again under the same id, restarting with and without a snapshot, in any order
    and from two sides: every search finds what a dictionary of the same contents says."""
    monkeypatch.setattr(library_module, "CHANGES_AT_ONCE", 3)
    chance = random.Random(0)
    sides = [open_library(), open_library()]
    contents: dict[str, Embeddings] = {}
    for step in range(120):
        which = chance.randrange(2)
        action = chance.choice(["add", "add", "add", "delete", "delete", "restart", "save"])
        name = f"{chance.randrange(12)}"
        if action == "add" and name not in contents:
            contents[name] = random_vectors(chance.randrange(6), 1 + step % 4)
            add(sides[which], name, contents[name])
        elif action == "delete" and name in contents:
            sides[which].delete(name)
            del contents[name]
        elif action == "restart":
            sides[which] = open_library()
        elif action == "save":
            sides[which].save_index()
        query = random_vectors(chance.randrange(6), 1)[0]
        limit = chance.randint(1, 12)
        assert ids(search(sides[chance.randrange(2)], query, limit)) == best_by_hand(contents, query, limit)
    assert contents
