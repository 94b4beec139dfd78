"""Where a process can be made to die, so that tests can show that nothing acknowledged is lost there.

    CLASP_FAULT=library.registered:2 clasp serve       # SIGKILL when that point is passed for the second time

Nothing happens, at the cost of one comparison, unless the process was started with `CLASP_FAULT`. It is no
setting: it is not read from `.env`, and stands in no list of settings.
"""

import itertools
import os
import signal
from collections.abc import Callable

POINTS = {
    # --- an upload; copies into and out of a backup pass these, too
    "store.receiving": "some bytes are written",
    "store.sealed": "all bytes are on disk, under no name that counts",
    "store.renamed": "the bytes have their name, which may not be on disk yet",
    "store.placed": "the name is on disk, and no row names it",
    "s3.sending": "some parts of a large upload are in the S3 store",
    "s3.sent": "all bytes have their final key there, and no lock is held",
    "s3.placed": "they were found there under the lock, and no row names them",
    "catalog.registered": "the row is written, and not committed",
    "library.registered": "committed, and nobody was told",
    # --- processing
    "ingest.leased": "a worker has recordings, and has done nothing for them",
    "s3.fetching": "some bytes of a recording are copied from the S3 store",
    "ingest.decoded": "the first segments are there",
    "ingest.embedded": "they have vectors",
    "ingest.committing": "all of a recording is embedded, and nothing of it written",
    "catalog.completed": "segments and the change are written, and not committed",
    "ingest.committed": "committed; the lease of the others still runs",
    # --- the index
    "library.loaded": "the snapshot is read, and nothing newer applied",
    "library.applied": "a handful of changes is applied",
    "index.written": "a snapshot is written under a temporary name",
    "index.placed": "it has its name, and the manifest names the one before",
    "index.described": "the manifest names it, and the one before is still there",
    "index.saved": "the one before is gone",
    # --- the index in Milvus
    "milvus.created": "there is a new, empty collection, and nothing names it",
    "milvus.named": "it is the one to use",
    "milvus.added": "the rows of a handful of changes are there, beside those they replace",
    "milvus.removed": "those are gone, and the point is still the one before",
    "milvus.noted": "the point says so, and it is still this process's turn",
    # --- a deletion
    "catalog.deleted": "the rows are gone, not committed",
    "library.forgotten": "committed, and the bytes are still there",
    "store.removed": "the bytes are gone",
    "s3.removed": "the same, in the S3 store",
    "library.deleted": "all is done, and nobody was told",
    # --- another model
    "reindex.enqueued": "the jobs are written, and not committed",
    "reindex.completed": "vectors of the coming model are written, and not committed",
    "reindex.done": "one handful is done",
    "reindex.switching": "all is the coming model's, not committed",
    "reindex.switched": "committed, and nobody was told",
    "catalog.retiring": "some vectors of a retired model are gone, and it is still named",
    # --- a backup
    "backup.copied": "the catalogue is copied, and no recording",
    "backup.kept": "one recording is copied",
    "backup.placed": "the catalogue has its name, and the manifest names the one before",
    "backup.described": "the manifest names the new state, and what only the old one had is still there",
    "backup.swept": "that is gone",
    # --- a restore
    "restore.copied": "one file is copied and verified",
    "restore.verified": "all are, and the library is still empty",
    "restore.moved": "the recordings are in their place, and the catalogue is not",
    "restore.linked": "so is the catalogue; what is left over is still there",
    # --- a start
    "catalog.migrated": "the schema is the new one, not committed",
    "library.tidied": "abandoned arrivals are gone, and bytes of no recording still there",
    # --- small files and snapshots
    "durability.synced": "a file is on disk under its temporary name",
    "durability.placed": "it has its own, which may not be on disk yet",
}
"""Every point there is, and what is true there."""


def fault(point: str) -> None:
    """Pass a point of `POINTS`."""
    if _armed is not None:
        _armed(point)


def _from_environment(given: str) -> Callable[[str], None] | None:
    """What `POINT` or `POINT:N` asks for: to die at the Nth passing, counted over all threads."""
    name, _, nth = given.partition(":")
    if not name:
        return None
    passings = itertools.count(1)
    fatal = int(nth) if nth.isdecimal() else 1

    def die(point: str) -> None:
        if point == name and next(passings) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    return die


_armed = _from_environment(os.environ.get("CLASP_FAULT", ""))
