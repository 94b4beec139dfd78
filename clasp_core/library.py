"""A library of recordings: keep them, find them, forget them.

The one object the service, the command line and a notebook work with. It holds together what must
agree: the catalogue (the truth), the audio store (the bytes) and the vector index (a replica).
Embedding the recordings is `clasp_core.ingest`, which may run in another process.
"""

import base64
import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias
from uuid import uuid4

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from clasp_core.catalog import Catalog, EmbeddedSegment, NewRecording, Once, Place, Recording, StoredModel
from clasp_core.errors import DataDamaged, DataMismatch, InvalidField, RecordingNotReady, StoreUnavailable
from clasp_core.faults import fault
from clasp_core.filters import EVERYTHING, Filter
from clasp_core.index import SNAPSHOT_FILE, Among, Grouping, Index, Match, Snapshot, VectorIndex
from clasp_core.ivf import Wanted
from clasp_core.language import canonical_tag
from clasp_core.limits import FREELY, Admission
from clasp_core.scaling import BY_SIZE, Scaling, made_aside
from clasp_core.store import AudioStore, Displaced, FolderStore, Upload
from clasp_core.types import Embeddings, Seconds, SegmentHit
from clasp_core.vectors import StoreMaker

_log = logging.getLogger(__name__)

CATALOG_FILE = "catalog.sqlite3"
AUDIO_FOLDER = "audio"
CHANGES_AT_ONCE = 500
DELETED_AT_ONCE = 200
"""Few enough for others, who wait to write meanwhile, not to notice."""
SWEPT_AT_ONCE = 10_000
PREPARED_AT_MOST = 5
MAX_HITS = 1000
MAPPED_CHANGES = 1000
"""Fewer vectors, and fewer than a twentieth, are not worth a new snapshot where it is mapped."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A recording found: its best cosine with the query, and its matching segments, best first. Or, where
    segments were asked for, one of them."""

    rank: int
    recording: Recording
    score: float
    segments: tuple[SegmentHit, ...]
    among: int
    """How many segments were searched: the best of many wrong ones scores higher than that of few."""


@dataclass(frozen=True, slots=True)
class Question:
    """What to look for: `limit` recordings (or segments) among those that pass the filter, scoring at least
    `min_score`."""

    limit: int = 10
    filter: Filter = EVERYTHING
    min_score: float | None = None
    group_by: Grouping = "recording"
    besides: Recording | None = None
    """One that is no hit: that which is searched by."""

    @property
    def depth(self) -> int:
        """How many hits hold so many besides that one's."""
        if self.besides is None:
            return self.limit
        return self.limit + (1 if self.group_by == "recording" else self.besides.segments or 0)


SharedIndex: TypeAlias = Callable[[Catalog, str, int], Index]
"""From the catalogue, the model's fingerprint and its dimension to an index that lies elsewhere."""


class Library:
    """Thread-safe; any number of processes may open the same data directory."""

    def __init__(
        self,
        data_dir: Path,
        *,
        model: str,
        dim: int,
        name: str = "",
        database_url: str | None = None,
        new_store: StoreMaker | None = None,
        scaling: Scaling = BY_SIZE,
        shared_index: SharedIndex | None = None,
        reindex: bool = False,
        min_free_bytes: int = 0,
        store: AudioStore | None = None,
    ) -> None:
        """Open or create. `model` is the fingerprint of the model all vectors searched here are by;
        `scaling` says where the index keeps them, and `new_store` where it does while it is flat, unless a
        `shared_index` has them; `min_free_bytes` are left on the disk by what arrives. `store` is where the
        recordings' bytes are, by default a folder of the data directory.

        `name` is what `open_model` knows it as. A library without vectors takes any model; where there
        are vectors of another, raises DataMismatch, unless it is opened to `reindex` (and not to search)
        it: see `clasp_core.reindex`. DataMismatch also where a newer version of this program wrote it.
        """
        self.catalog = open_catalog(data_dir, database_url, store)
        self.model = model
        self.store: AudioStore = store or FolderStore(data_dir / AUDIO_FOLDER, min_free_bytes)
        self._unswept: set[str] = set()
        self._untidied = False
        self._index_dir = data_dir / "index"
        self._dim = dim
        self._scaling = scaling if new_store is None else replace(scaling, flat=new_store)
        self._read = partial(self.catalog.vectors, model=model)
        self._shared_index = shared_index
        self._index: Index | None = None
        self._refreshing = threading.Lock()
        self._saved = (0, "")
        self.observe_refresh: Callable[[Seconds], None] = lambda seconds: None
        """Told how long the index took to come up to date, each time that there was something to do."""
        self.stored_model = StoredModel(model, name, dim)
        if not reindex and (active := self.catalog.adopt(self.stored_model)).fingerprint != model:
            self.catalog.close()
            ways_out = _ways_out(active, self.stored_model)
            raise DataMismatch(f"{data_dir} holds vectors of another model. {ways_out}")

    def close(self) -> None:
        try:
            self.save_index()
        finally:
            self.catalog.close()

    # --- recordings

    def register(
        self,
        upload: Upload,
        *,
        recording_id: str | None = None,
        collection: str = "default",
        lang: str | None = None,
        media_type: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        within: Set[str] | None = None,
        once: str | None = None,
        admission: Admission = FREELY,
    ) -> tuple[Recording, bool]:
        """Keep a sealed upload. When this returns it survives any crash, and waits to be embedded.

        Returns (recording, created); the same bytes again in a collection give the first recording.
        `within` are the collections that the caller may see, the recording's among them; None means all.
        `once` names the request: sent again it does nothing, and gives what it gave (`catalog.register`).
        `admission` says on what terms a new one is taken. Raises IdConflict (where one that can be seen has
        the id), InvalidField, InvalidLanguage, IdempotencyMismatch, QuotaExceeded, QueueFull, DiskFull or
        StoreUnavailable; nothing is kept then.
        """
        new = NewRecording(
            id=check_name("id", recording_id) if recording_id is not None else str(uuid4()),
            collection=check_name("collection", collection),
            sha256=upload.sha256,
            size_bytes=upload.size_bytes,
            media_type=media_type,
            lang=canonical_tag(lang),
            metadata=_plain_json(metadata or {}),
        )
        registered: tuple[Recording, bool] | None = None
        placed = False

        def place() -> None:
            nonlocal placed
            self.store.place(upload)
            placed = True

        try:
            for _ in range(PREPARED_AT_MOST):
                self.store.prepare(upload)
                with suppress(Displaced):  # the same bytes, as somebody else's, were swept between
                    registered = self.catalog.register(
                        new,
                        place,
                        within=within,
                        once=None if once is None else Once(once, _digest(new, recording_id)),
                        admission=admission,
                    )
                    break
        finally:
            if upload.named and not (registered and placed):  # no room for the row, say, or no need of it
                self._sweep([upload.sha256])
        if registered is None:
            raise StoreUnavailable("The same recording is deleted again and again; send it later.")
        fault("library.registered")
        return registered

    def amend(
        self,
        recording_id: str,
        change: Callable[[Recording], tuple[str | None, Mapping[str, Any]]],
        *,
        within: Set[str] | None = None,
    ) -> Recording:
        """Give a recording another `lang` and `metadata`, in one transaction: `change` makes them of what
        it is.

        Filters go by them at once. The vectors stay, also where another `lang` would have made others (a
        model that writes down what it hears is told it). Raises as `catalog.get` does, and InvalidField or
        InvalidLanguage.
        """

        def checked(recording: Recording) -> tuple[str | None, Mapping[str, Any]]:
            lang, metadata = change(recording)
            return canonical_tag(lang), _plain_json(metadata)

        return self.catalog.amend(recording_id, checked, within=within)

    def delete(
        self,
        recording_id: str,
        *,
        within: Set[str] | None = None,
        check: Callable[[Recording], None] | None = None,
    ) -> None:
        """Forget a recording: when this returns it is no hit here, and its bytes are gone unless another
        collection has the same. `check` may raise to keep it. Raises as `catalog.get` does.

        Where the store cannot be reached, the bytes go when it can: by `sweep_again`, or the next `tidy`.
        """
        deleted = self.catalog.delete(recording_id, within=within, check=check)
        self._forget([deleted.sha256])

    def delete_matching(self, wanted: Filter, *, status: str | None = None, limit: int) -> int:
        """Forget up to `limit` recordings that pass a filter and have that status, oldest first; how many
        it were.

        Each by itself as `delete` does. What is cut short has deleted some of them whole, and can be
        repeated.
        """
        key = deleted = 0
        while deleted < limit:
            at_once = min(DELETED_AT_ONCE, limit - deleted)
            key, sha256s = self.catalog.delete_some(wanted, status=status, after=key, limit=at_once)
            if not sha256s:
                break
            deleted += len(sha256s)
            self._forget(sha256s)
        return deleted

    def _forget(self, sha256s: Sequence[str]) -> None:
        fault("library.forgotten")
        self._sweep(sha256s)
        if self._index is not None and not self._index.is_shared:
            self.refresh()
        fault("library.deleted")

    def _sweep(self, sha256s: Sequence[str]) -> None:
        """Remove the bytes that no recording has; where the store is not to be had, they are remembered."""
        try:
            self.catalog.sweep(sha256s, self.store.remove)
        except StoreUnavailable:
            _log.warning("bytes of no recording stay until the audio store can be reached")
            self._unswept.update(sha256s)

    def sweep_again(self) -> None:
        """Do what was left undone because the store could not be reached, if there is any."""
        if self._untidied:
            self._tidy_store()
        elif self._unswept:
            left, self._unswept = self._unswept, set()
            self._sweep(list(left))

    def page(
        self,
        *,
        wanted: Filter = EVERYTHING,
        status: str | None = None,
        cursor: str | None = None,
        limit: int = 100,
    ) -> tuple[list[Recording], str | None]:
        """Recordings that are `wanted`, newest first, and the cursor of the next page (None after the last).

        Pages neither skip nor repeat a recording while others are added or deleted.
        """
        before = None if cursor is None else _decode_cursor(cursor)
        found = self.catalog.page(wanted=wanted, status=status, before=before, limit=limit + 1)
        more = len(found) > limit
        return found[:limit], _encode_cursor(found[limit - 1]) if more else None

    def tidy(self) -> None:
        """Remove what nobody needs: abandoned arrivals, bytes of no recording, vectors of retired models.

        Raises DataDamaged where the catalogue contradicts itself: no bytes go on the word of such a one.
        """
        self.catalog.database.check()
        self.forget_retired()
        self.catalog.forget_done()
        self._tidy_store()

    def _tidy_store(self) -> None:
        try:
            self.store.discard_abandoned()
            fault("library.tidied")
            stored = self.store.stored()
            while some := list(islice(stored, SWEPT_AT_ONCE)):
                self.catalog.sweep(some, self.store.remove)
            self._untidied = False
        except StoreUnavailable:
            _log.warning("the audio store is tidied when it can be reached")
            self._untidied = True

    # --- search

    def search(self, queries: Embeddings, questions: Sequence[Question]) -> list[list[Hit]]:
        """For each unit query vector (n, dim) the best recordings, by the cosine of their best segment, or
        the best segments.

        Sees everything that was ready, and nothing that was deleted, when it was called. Ties are
        broken by id, those of segments of one recording by their times.
        """
        index = self.refresh()
        found: list[list[Match]] = [[] for _ in questions]
        alike: dict[tuple[Filter, Grouping], list[int]] = {}
        for place, question in enumerate(questions):
            alike.setdefault((question.filter, question.group_by), []).append(place)
        for (wanted, group_by), places in alike.items():
            limits = [questions[place].depth for place in places]
            matches = index.search(
                queries[places], limits, among=self._among(index, wanted), group_by=group_by
            )
            for place, some in zip(places, matches, strict=True):
                found[place] = some
        return self._hits(found, questions)

    def direction(
        self, recording_id: str, *, at_s: Seconds | None = None, within: Set[str] | None = None
    ) -> tuple[Recording, NDArray[np.float32]]:
        """A recording and the unit vector (dim,) to search by for what is like it: that of its segment at
        `at_s` (or of the nearest to that), else the mean of all.

        Raises as `catalog.get` does, and RecordingNotReady where this model has no vectors of it.
        """
        recording = self.catalog.get(recording_id, within=within)
        segments = self.catalog.embedded(recording.key, model=self.model)
        if recording.status != "ready" or not segments:
            raise RecordingNotReady(
                f"The recording {recording_id!r} cannot be searched by: it is {recording.status}"
                + (", but by another model." if recording.status == "ready" else ".")
            )
        if at_s is None:
            return recording, mean_vector(segments)
        return recording, min(segments, key=lambda one: max(one.start_s - at_s, at_s - one.end_s)).vector

    def _among(self, index: Index, wanted: Filter) -> Among | None:
        if wanted == EVERYTHING:
            return None
        collections = wanted.only_collections() if index.is_shared else None
        return self.catalog.matching(wanted) if collections is None else collections

    def _hits(self, found: Sequence[list[Match]], questions: Sequence[Question]) -> list[list[Hit]]:
        """What is shown of the matches of each question. The catalogue is asked for all of them together: a
        statement costs more than the rows that it gives."""
        recordings = self.catalog.by_key(list({match.recording for matches in found for match in matches}))
        shown = [
            _shown(matches, question, recordings) for matches, question in zip(found, questions, strict=True)
        ]
        named = {
            (match.recording, ordinal)
            for matches in shown
            for match in matches
            for ordinal, _ in match.segments
        }
        spans = self.catalog.spans(list(named), model=self.model)
        return [
            [
                Hit(
                    rank=rank,
                    recording=recordings[match.recording],
                    score=match.score,
                    segments=tuple(
                        SegmentHit(span.start_s, span.end_s, score, span.transcript)
                        for ordinal, score in match.segments
                        if (span := spans.get((match.recording, ordinal))) is not None
                    ),
                    among=match.among,
                )
                for rank, match in enumerate(matches, 1)
            ]
            for matches in shown
        ]

    def refresh(self) -> Index:
        """The index, brought up to everything the catalogue has committed. Raises IndexUnavailable where it
        is shared and does not answer."""
        with self._refreshing:
            began = time.perf_counter()
            if self._index is None:
                self._index = self._open_index()
                self._saved = self._index.point
                fault("library.loaded")
            if self._index.follow(self.catalog, CHANGES_AT_ONCE):
                self.observe_refresh(time.perf_counter() - began)
            return self._index

    def _open_index(self) -> Index:
        if self._shared_index is not None:
            return self._shared_index(self.catalog, self.model, self._dim)
        return self._loaded()

    def _loaded(self) -> VectorIndex:
        loaders = self._scaling.loaders
        return VectorIndex.load(
            self._index_dir, self._dim, self.model, loaders["flat"], others=loaders, read=self._read
        )

    def rescale(self, given_up: Wanted = lambda: False) -> None:
        """Have the index of the kind that its size wants (`Scaling`), and its recall measured. One that is
        shared keeps its kind.

        Another index is made while the one there is answers and follows, and takes its place at once when it
        has everything. Takes minutes where there is something to do; for one thread. Raises GivenUp soon
        after that is so, and nothing has changed then.
        """
        index, scaling = self.refresh(), self._scaling
        began = time.perf_counter()
        if not self.is_current():
            return
        if not isinstance(index, VectorIndex):
            before = index.recall
            if scaling.wants_measuring(index):
                index.calibrate(scaling.floor, given_up)
            if index.recall == before:
                return
        elif (snapshot := self._newer_snapshot(index)) is not None:
            another = self._loaded()
            if another.file == snapshot.file:
                self._exchange(index, another, given_up)
                self._saved = (snapshot.seq, snapshot.token)
        elif scaling.wants_another(index):
            another = made_aside(index, scaling, self._read, self._follow, given_up)
            self._exchange(index, another, given_up)
            self._saved = (0, "")  # the snapshot is of the other kind
        elif scaling.wants_measuring(index):
            index.calibrate(scaling.floor, given_up)
        else:
            return
        kind, recall, lists = self.index_kind()
        _log.info(
            "the index is %s now: %d vectors, recall %.3f in %d lists, %.1f s",
            *(kind, self.indexed(), recall, lists, time.perf_counter() - began),
        )

    def _follow(self, index: VectorIndex, given_up: Wanted = lambda: False) -> None:
        index.follow(self.catalog, CHANGES_AT_ONCE, given_up)

    def _exchange(self, index: VectorIndex, another: VectorIndex, given_up: Wanted) -> None:
        """Put another in the place of the index, if that is still there."""
        self._follow(another, given_up)
        with self._refreshing:
            if self._index is index:
                self._follow(another, given_up)
                self._index = another

    def _newer_snapshot(self, index: VectorIndex) -> Snapshot | None:
        """What another process, or this one, has saved since, where snapshots are mapped: most of what this
        index has in memory lies there, for all of them."""
        if not self._scaling.mapped:
            return None
        try:
            snapshot = Snapshot.read(self._index_dir)
        except (OSError, ValueError, TypeError, RuntimeError):
            return None
        wanted = snapshot.kind == self._scaling.wanted(len(index), index.kind)
        if snapshot.file == index.file or not wanted or not snapshot.is_of(self._dim, self.model):
            return None
        return snapshot if self.catalog.holds((snapshot.seq, snapshot.token)) else None

    def indexed(self) -> int:
        """Vectors in the index as it is, which another thread may be bringing up to date."""
        return 0 if self._index is None else len(self._index)

    def saved_at(self) -> float | None:
        """When the index's snapshot was made, in seconds since 1970; None where there is none."""
        try:
            return (self._index_dir / SNAPSHOT_FILE).stat().st_mtime
        except OSError:
            return None

    def unsaved_changes(self) -> int:
        """Changes of the catalogue in the index that its snapshot lacks."""
        if self._index is None or self._index.is_shared:
            return 0
        return max(0, self._index.point[0] - self._saved[0])

    def is_current(self) -> bool:
        """Whether the library still has the model it was opened with; false after a switch to another.

        Searches then go on answering by the old vectors, from which deleted recordings disappear as ever,
        but to which nothing is added.
        """
        active = self.catalog.active()
        return active is not None and active.fingerprint == self.model

    def forget_retired(self) -> None:
        """Drop the vectors of models that nobody uses any more, also where the index keeps them. Raises
        IndexUnavailable where it does not answer."""
        self.catalog.forget_retired()
        if self._index is not None:
            self._index.forget_others(self.catalog.known_models() | {self.model})

    def index_kind(self) -> tuple[str, float, int]:
        """The kind of the index; its measured recall at ten, 1 where everything is looked at; in how many
        lists it looks."""
        index = self._index
        if index is None:
            return "flat", 1.0, 1
        recall = index.recall
        return (index.kind, 1.0, 1) if recall is None else (index.kind, recall.share, recall.probes)

    def save_index(self) -> None:
        """Write a snapshot, if anything changed since the last, so that the next start is quick.

        Not so once the library has another model: the place is that one's. Where snapshots are mapped, not
        for a few changes either: each is a file that all who map it have to read anew.
        """
        index = self._index
        if not isinstance(index, VectorIndex) or index.point == self._saved or not self.is_current():
            return
        few = index.changed is not None and index.changed < max(MAPPED_CHANGES, len(index) // 20)
        if self._newer_snapshot(index) is None and not (few and index.file is not None):
            point = index.point
            index.save(self._index_dir)
            self._saved = point


def _shown(matches: Sequence[Match], question: Question, recordings: Mapping[int, Recording]) -> list[Match]:
    """Those that answer the question, best first: of recordings that are still there."""
    kept = [
        match
        for match in matches
        if match.recording in recordings
        and (question.besides is None or match.recording != question.besides.key)
        and (question.min_score is None or match.score >= question.min_score)
    ]
    kept.sort(
        key=lambda match: (
            -match.score,
            recordings[match.recording].id,
            match.recording,
            match.segments[0][0],  # in a recording, segments are numbered as they follow each other
        )
    )
    return kept[: question.limit]


def mean_vector(segments: Sequence[EmbeddedSegment]) -> NDArray[np.float32]:
    """One unit vector (dim,) for a whole recording: its segments' mean, weighted by their lengths."""
    weights = np.array([segment.end_s - segment.start_s for segment in segments], np.float32)
    mean = weights @ np.stack([segment.vector for segment in segments])
    vector: NDArray[np.float32] = mean / np.linalg.norm(mean)
    return vector


def open_catalog(data_dir: Path, database_url: str | None = None, store: AudioStore | None = None) -> Catalog:
    """The catalogue of the library in a data directory, which is created, with its bytes in a folder there or
    in a `store`. Raises as Catalog does, and DataDamaged where there are recordings without a catalogue: a
    new one would have them swept away. StoreUnavailable where a store cannot be asked that has to be."""
    data_dir.mkdir(parents=True, exist_ok=True)
    url = sa.make_url(database_url or f"sqlite:///{data_dir / CATALOG_FILE}")
    if url.get_backend_name() != "sqlite" or _has_bytes(Path(url.database or "")):
        with suppress(DataDamaged):  # it may have no tables yet; what else it has is found once more
            return Catalog(url, create=False)
    folder = data_dir / AUDIO_FOLDER
    if store is None and folder.is_dir():
        store = FolderStore(folder)
    orphaned = store is not None and any(store.stored())
    if orphaned and url.get_backend_name() == "sqlite" and not _has_bytes(Path(url.database or "")):
        raise DataDamaged(
            f"{data_dir} holds recordings, but its catalogue {url.database} is missing or empty. Restore"
            " the library from a backup (clasp restore) to another CLASP_DATA_DIR, or run a restore again"
            f" that was cut short here. To begin anew, remove {folder}."
            if isinstance(store, FolderStore)
            else f"The audio store holds recordings, but their catalogue {url.database} is missing or empty."
            " Restore the library from a backup (clasp restore) to another CLASP_AUDIO_STORE, or run a"
            " restore again that was cut short here; or set the CLASP_DATABASE_URL or CLASP_DATA_DIR that"
            " they belong to."
        )
    return Catalog(url, create=not orphaned)


def _has_bytes(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _ways_out(active: StoredModel, wanted: StoredModel) -> str:
    """What to do where a library has one model and was opened with another."""
    anew = f"`clasp reindex --model {wanted.name}`" if wanted.name else "`clasp reindex`"
    facts = f"They are by {active.titled()}; the model set here is {wanted.titled()}."
    if active.name == wanted.name or not active.name:  # of another version, so no name helps
        return f"{facts} Run {anew} to embed the recordings anew, or go back to that version of it."
    return f"{facts} Set CLASP_MODEL={active.name}, or run {anew} to embed the recordings anew."


def check_name(field: str, value: str) -> str:
    """An id or a collection name: 1 to 128 of A-Z a-z 0-9 . _ : - and no dot first. Raises InvalidField."""
    allowed = value.isascii() and all(character.isalnum() or character in "._:-" for character in value)
    if not (0 < len(value) <= 128 and allowed and not value.startswith(".")):
        raise InvalidField(
            f"{field} must be 1 to 128 letters, digits or . _ : - (ASCII), not beginning with a dot."
        )
    return value


def _digest(new: NewRecording, recording_id: str | None) -> str:
    """Of what an upload says, so that the same again can be known."""
    said = [recording_id, new.collection, new.sha256, new.lang, new.metadata]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _plain_json(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """Metadata that every database can hold: a NaN, which Python would write, makes the row unreadable in
    SQL; U+0000 and half a surrogate pair, which Python reads, are no text in PostgreSQL."""
    try:
        written = json.dumps(dict(metadata), allow_nan=False, ensure_ascii=False)
        written.encode()
    except UnicodeEncodeError:
        raise InvalidField("metadata holds half of a surrogate pair, which is no character.") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidField(f"metadata is not a JSON object: {error}.") from error
    if "\\u0000" in written.replace("\\\\", ""):
        raise InvalidField("metadata holds the character U+0000, which not every database can keep.")
    return metadata


def _encode_cursor(last: Recording) -> str:
    """By what the page itself says of its last recording. The key would tell how many others there are."""
    place = [last.created_at.isoformat(), last.id, last.collection]
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode().rstrip("=")


def _decode_cursor(cursor: str) -> Place:
    try:
        match json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))):
            case [str(created_at), str(recording_id), str(collection)]:
                when = datetime.fromisoformat(created_at)
                # what is no name is no place either, and some of it no database takes
                names = (check_name("id", recording_id), check_name("collection", collection))
                if when.tzinfo is None:
                    return Place(when, *names)
    except (InvalidField, ValueError, RecursionError):
        pass
    raise InvalidField("cursor is not one that this service gave out.")
