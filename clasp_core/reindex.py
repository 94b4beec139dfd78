"""Another model for a library, while it is in use: embed every recording anew, then switch at once.

    library = Library(folder, model=new.fingerprint, name=new.name, dim=new.dim, reindex=True)
    Reindexer(library, new.speech_encoder, max_duration_s=3600).run()

Until the switch all answers are by the old vectors. What was done stays done if this is killed; a later
run goes on from there, and several may run together.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import sqlalchemy as sa

from clasp_core import ingest
from clasp_core.catalog import (
    AT_ONCE,
    MODEL_LOCK,
    Catalog,
    EmbeddedSegment,
    Recording,
    StoredModel,
    activate,
    active_model,
    leased,
    note_change,
    put_model,
    retire_others,
    store_peaks,
    store_vectors,
)
from clasp_core.database import MODELS, RECORDINGS, REINDEXING, exists, lock
from clasp_core.errors import ProcessingFailed
from clasp_core.faults import fault
from clasp_core.ingest import Ingester
from clasp_core.leases import Leases
from clasp_core.library import Library
from clasp_core.models import SpeechEncoder
from clasp_core.peaks import Peaks
from clasp_core.segmenting import SegmentConfig
from clasp_core.types import Seconds

_ALONE = "reindexing"
TOLERABLE = 10
"""Recordings that a switch may lose by trouble of ours: so many, or a tenth of all if that is more."""
FOLLOW_WITHIN_S: Seconds = 10.0
"""How long arrivals wait after a switch, so that all services can follow before anything is ready that those
which have not yet would miss."""
PATIENCE = 3
"""Handfuls of recordings that may arrive and put off the switch, before arrivals have to wait for it."""
HOPEFUL = 20
"""Steps in vain after which it is the machine's or the model's trouble, and not the recordings'."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a re-index has come: of `total` ready recordings, the model has `embedded` some, and `left`
    are still to be tried."""

    embedded: int
    left: int
    total: int


class Reindexing:
    """The ready recordings as a queue of work for a model that is to become the active one, and the switch.

    While it goes on the active model's vectors answer, and recordings come and go. What is embedded
    stays embedded whoever is killed; any number of processes may share the work, in the manner of
    `Catalog`'s own leases, of which `Ingester` therefore need not know which it holds. The work of each
    recording that failed is kept, with its reason, until the switch makes the recording itself so.
    """

    def __init__(self, catalog: Catalog, model: StoredModel) -> None:
        self.model = model
        self.completed = 0
        """Recordings embedded through this object."""
        self.holding = False
        """Whether arrivals wait while this object leases: under steady uploads there is no other end."""
        self._database = catalog.database
        self._jobs = Leases(REINDEXING, REINDEXING.c.recording, REINDEXING.c.model == model.fingerprint)

    def lease(
        self,
        owner: str,
        *,
        limit: int,
        lease_s: Seconds,
        model: str | None = None,
        suspects: bool = True,
    ) -> list[Recording]:
        """As `Catalog.lease`: up to `limit` ready recordings that the model has no vectors of."""
        assert model in (None, self.model.fingerprint)
        with self._database.writing() as db:
            lock(db, MODEL_LOCK, shared=True)
            if self._is_active(db):
                return []
            self._announce(db)
            self._hold(db, lease_s)
            keys = self._jobs.lease(db, owner, limit, lease_s, suspects)
            if not keys and self._enqueue(db):
                fault("reindex.enqueued")
                keys = self._jobs.lease(db, owner, limit, lease_s, suspects)
            return leased(db, keys)

    def extend_leases(self, owner: str, lease_s: Seconds) -> None:
        with self._database.writing() as db:
            lock(db, MODEL_LOCK, shared=True)
            self._hold(db, lease_s)
            self._jobs.extend(db, owner, lease_s)

    def release(self, owner: str, *, died: bool = False) -> None:
        with self._database.writing() as db:
            lock(db, MODEL_LOCK, shared=True)
            self._jobs.release(db, owner, died)

    def complete(
        self,
        key: int,
        owner: str,
        *,
        duration_s: Seconds,
        model: str,
        segments: Sequence[EmbeddedSegment],
        peaks: Peaks | None = None,
    ) -> bool:
        """Store a recording's segments by this model; searches see them from the switch on. Its peaks are
        there at once."""
        assert model == self.model.fingerprint
        with self._database.writing() as db:
            lock(db, MODEL_LOCK, shared=True)
            recording = sa.select(RECORDINGS.c.key).where(RECORDINGS.c.key == key)
            db.execute(recording.with_for_update(read=True, key_share=True))  # before what hangs on it
            if not self._jobs.finish(
                db, key, owner, status="ready", duration_s=duration_s, segments=len(segments)
            ):
                return False
            store_vectors(db, key, model, segments)
            store_peaks(db, key, peaks)
            note_change(db, [key], model)
            fault("reindex.completed")
        self.completed += 1
        return True

    def fail(self, key: int, owner: str, *, code: str, detail: str) -> bool:
        """Record why this model cannot have the recording; it goes on being found until the switch."""
        with self._database.writing() as db:
            lock(db, MODEL_LOCK, shared=True)
            return self._jobs.finish(db, key, owner, status="failed", error_code=code, error_detail=detail)

    def progress(self) -> Progress:
        with self._database.reading() as db:
            total, jobs = self._counts(db)
        embedded = jobs.get("ready", 0)
        return Progress(embedded, total - embedded - jobs.get("failed", 0), total)

    def _counts(self, db: sa.Connection) -> tuple[int, dict[str, int]]:
        """Ready recordings; and jobs by status, of which no other recording has any."""
        ready = sa.select(sa.func.count()).where(RECORDINGS.c.status == "ready")
        jobs = sa.select(REINDEXING.c.status, sa.func.count()).where(self._jobs.scope)
        by_status = {status: count for status, count in db.execute(jobs.group_by(REINDEXING.c.status))}
        return int(db.execute(ready).scalar_one()), by_status

    def is_done(self) -> bool:
        """Whether the model is the active one already."""
        with self._database.reading() as db:
            return self._is_active(db)

    def switch(self) -> dict[str, str] | None:
        """Make the model the active one, unless a ready recording is yet to be tried by it: then None.

        In one transaction each recording becomes what this model made of it: `ready`, or `failed` with
        the reason; what the model before could not have, for reasons of ours, waits to be tried anew, and
        so does what is being embedded by it at this moment. Returns (id: reason) of those that failed.
        Raises ProcessingFailed where that would be all of them, or many, for reasons of ours (a broken
        installation, a disk that is not mounted): the next run tries those anew.
        """
        with self._database.writing() as db:
            lock(db, MODEL_LOCK)
            if self._is_active(db):
                retire_others(db, self.model)
                return {}
            if exists(db, (RECORDINGS.c.status == "ready") & ~self._tried):
                return None
            ours = self._jobs.scope & (REINDEXING.c.error_code == ProcessingFailed.code)
            lost = db.execute(sa.select(sa.func.count()).where(ours)).scalar_one()
            total, jobs = self._counts(db)
            if not lost or (lost <= max(TOLERABLE, total // 10) and jobs.get("ready")):
                return self._switch(db)
            db.execute(sa.delete(REINDEXING).where(ours))
        raise ProcessingFailed(
            f"{lost} of {total} recordings could not be embedded by {self.model.titled()}, for reasons that"
            " are not theirs; the log has them. The library stays with the model that it has. Run it again"
            " to try them anew."
        )

    def _switch(self, db: sa.Connection) -> dict[str, str]:
        ready, update = RECORDINGS.c.status == "ready", sa.update(RECORDINGS)
        job = (REINDEXING.c.recording == RECORDINGS.c.key) & self._jobs.scope
        ours = RECORDINGS.c.error_code == ProcessingFailed.code
        afresh = {"status": "pending", "attempts": 0, "error_code": None, "error_detail": None}
        db.execute(update.where((RECORDINGS.c.status == "failed") & ours).values(afresh))
        at_work = (RECORDINGS.c.status == "processing") & RECORDINGS.c.lease_owner.is_not(None)
        free = {"lease_owner": None, "lease_until": None}
        back = {"status": "pending", "attempts": RECORDINGS.c.attempts - 1} | free
        db.execute(update.where(at_work).values(back))

        query = sa.select(RECORDINGS.c.key, RECORDINGS.c.id, REINDEXING.c.error_detail)
        failures = db.execute(query.where(ready & job & (REINDEXING.c.status == "failed"))).all()
        taken = ("status", "duration_s", "segments", "error_code", "error_detail")
        made = {name: REINDEXING.c[name] for name in taken} | {"model": self.model.fingerprint}
        db.execute(update.where(ready & job).values(made))
        still_ready = sa.select(RECORDINGS.c.key).where(ready)
        of_others = REINDEXING.c.recording.not_in(still_ready)
        db.execute(sa.delete(REINDEXING).where(self._jobs.scope | of_others))
        activate(db, self.model)
        hold_until = time.time() + FOLLOW_WITHIN_S
        db.execute(sa.update(MODELS).where(self._row).values(hold_until=hold_until))
        retire_others(db, self.model)
        note_change(db, [row.key for row in failures])
        fault("reindex.switching")
        return {row.id: row.error_detail for row in failures}

    @property
    def _row(self) -> sa.ColumnElement[bool]:
        return MODELS.c.fingerprint == self.model.fingerprint

    @property
    def _tried(self) -> sa.ColumnElement[bool]:
        """That the model has vectors of a recording, or a reason why not."""
        job = (REINDEXING.c.recording == RECORDINGS.c.key) & self._jobs.scope
        return sa.exists().where(job & REINDEXING.c.status.in_(("ready", "failed")))

    def _is_active(self, db: sa.Connection) -> bool:
        active = active_model(db)
        return active is not None and active.fingerprint == self.model.fingerprint

    def _announce(self, db: sa.Connection) -> None:
        coming = self._row & (MODELS.c.state == "coming")
        if not exists(db, coming) and not (lock(db, _ALONE) and exists(db, coming)):
            put_model(db, self.model, "coming")

    def _hold(self, db: sa.Connection, hold_s: Seconds) -> None:
        if self.holding:
            coming = self._row & (MODELS.c.state == "coming")
            db.execute(sa.update(MODELS).where(coming).values(hold_until=time.time() + hold_s))

    def _enqueue(self, db: sa.Connection) -> bool:
        """Make jobs of ready recordings that have none; those that arrived since the last time, mostly."""
        lock(db, _ALONE)
        total, jobs = self._counts(db)
        if total == sum(jobs.values()):
            return False
        job = (REINDEXING.c.recording == RECORDINGS.c.key) & self._jobs.scope
        model, pending, none = sa.literal(self.model.fingerprint), sa.literal("pending"), sa.literal(0)
        query = sa.select(RECORDINGS.c.key, model, pending, none).where(RECORDINGS.c.status == "ready")
        query = query.where(~sa.exists().where(job)).order_by(RECORDINGS.c.key).limit(10 * AT_ONCE)
        columns = ["recording", "model", "status", "attempts"]
        return db.execute(sa.insert(REINDEXING).from_select(columns, query)).rowcount > 0


Result = Literal["switched", "nothing to do", "stopped"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to: how many recordings it embedded itself, and why others failed (reasons by id).

    "switched" also where another run that shared the work was the one to switch; it has the failures then.
    """

    result: Result
    embedded: int = 0
    failed: Mapping[str, str] = field(default_factory=dict)


class Reindexer:
    """Use from one thread; `stop` may be called from any."""

    def __init__(
        self,
        library: Library,
        speech_encoder: Callable[[], SpeechEncoder],
        *,
        max_duration_s: Seconds,
        segmenting: SegmentConfig | None = None,
    ) -> None:
        """`library` is one opened to `reindex`; the encoder is loaded only if there is something to embed."""
        self._library = library
        self._speech_encoder = speech_encoder
        self._max_duration_s = max_duration_s
        self._segmenting = segmenting
        self._stopping = threading.Event()
        self._ingester: Ingester | None = None

    def stop(self) -> None:
        """Give back what is being embedded, then return from `run`."""
        self._stopping.set()
        if self._ingester is not None:
            self._ingester.stop()

    def run(
        self, *, observe: Callable[[Progress], None] = lambda progress: None, poll_s: Seconds = 0.5
    ) -> Outcome:
        """Embed what lacks vectors of the library's new model, until none does; then switch to it.

        A recording that cannot be embedded is `failed` after the switch. Raises ProcessingFailed where
        none can any more, or too many could not, for reasons that are not theirs; the library then stays as
        it is, and a later run goes on from there.
        """
        self._library.catalog.forget_retired()  # where no service ever runs, nobody else would
        queue = Reindexing(self._library.catalog, self._library.stored_model)
        if queue.is_done():
            queue.switch()  # tidies up after runs to other models that were given up
            return Outcome("nothing to do")
        least, completed = queue.progress().left, 0
        vain_steps = small_steps = 0
        while not self._stopping.is_set():
            worked = self._step(queue)
            fault("reindex.done")
            progress = queue.progress()
            observe(progress)
            if worked:
                in_vain = queue.completed == completed and progress.left >= least
                vain_steps = vain_steps + 1 if in_vain else 0
                if vain_steps >= HOPEFUL:
                    raise ProcessingFailed("Nothing more can be embedded by this model; the log says why.")
                least, completed = min(least, progress.left), queue.completed
                small_steps += worked < ingest.TOGETHER and progress.left <= ingest.TOGETHER
                queue.holding = small_steps >= PATIENCE
            elif progress.left and not queue.is_done():
                # it is in the hands of another run: arrivals need not wait for that
                small_steps, queue.holding = 0, False
                self._stopping.wait(poll_s)
            elif (failed := queue.switch()) is not None:
                fault("reindex.switched")
                return Outcome("switched", queue.completed, failed)
        return Outcome("stopped", queue.completed)

    def _step(self, queue: Reindexing) -> int:
        if self._ingester is None:
            if not queue.progress().left:
                return 0
            self._ingester = Ingester(
                self._library,
                self._speech_encoder(),
                max_duration_s=self._max_duration_s,
                segmenting=self._segmenting,
                queue=queue,
            )
        return self._ingester.step()
