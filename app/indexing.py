"""`clasp index`: files into the library, embedded here and now; and `clasp reindex`: another model for it.

Both work beside a running service: all lease from the same catalogue, so whoever is free takes the next.
"""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from app.settings import Settings
from clasp_core.catalog import Recording
from clasp_core.errors import RecordingNotFound
from clasp_core.ingest import Ingester
from clasp_core.library import Library
from clasp_core.models import Model
from clasp_core.reindex import Outcome as ReindexOutcome
from clasp_core.reindex import Progress as Done
from clasp_core.reindex import Reindexer

_CHUNK_BYTES = 1 << 20
_STDERR = Console(stderr=True)
_AHEAD = 64
"""Files registered before the first of them is embedded."""


@dataclass(slots=True)
class Outcome:
    """What became of the files."""

    indexed: int = 0
    known: int = 0
    failed: list[tuple[Path, str]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        failed = [{"path": _as_text(path), "reason": reason} for path, reason in self.failed]
        return {"indexed": self.indexed, "known": self.known, "failed": failed}


def index_files(
    library: Library,
    model: Model,
    files: Sequence[Path],
    *,
    settings: Settings,
    lang: str | None,
    collection: str,
    quiet: bool,
) -> Outcome:
    """Register and embed every file. A file that cannot be used is reported, and the others go on."""
    outcome = Outcome()
    ingester = Ingester(library, model.speech_encoder(), max_duration_s=settings.max_duration_s)
    columns = (TextColumn("indexing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_STDERR, disable=quiet or not _STDERR.is_terminal) as progress:
        task = progress.add_task("", total=len(files))
        for start in range(0, len(files), _AHEAD):
            waiting: list[tuple[Path, Recording]] = []
            for path in files[start : start + _AHEAD]:
                try:
                    recording, created = _register(library, path, settings, lang, collection)
                except OSError as error:
                    outcome.failed.append((path, error.strerror or str(error)))
                    progress.advance(task)
                    continue
                if recording.status in ("pending", "processing"):
                    waiting.append((path, recording))
                    continue
                progress.advance(task)
                if recording.status == "failed":
                    outcome.failed.append((path, recording.error_detail or ""))
                elif not created:
                    outcome.known += 1
            while waiting:
                worked = ingester.step()
                waiting = [pair for pair in waiting if not _settled(library, *pair, outcome)]
                progress.update(task, completed=min(len(files), start + _AHEAD) - len(waiting))
                if not worked:
                    time.sleep(0.1)  # another worker has what is left
    return outcome


def reindex_library(library: Library, model: Model, *, settings: Settings, quiet: bool) -> ReindexOutcome:
    """Embed everything by the model, then switch to it. SIGTERM and SIGINT stop it; a later run goes on."""
    reindexer = Reindexer(library, model.speech_encoder, max_duration_s=settings.max_duration_s)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: reindexer.stop())
    columns = (TextColumn("embedding anew"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_STDERR, disable=quiet or not _STDERR.is_terminal) as progress:
        task = progress.add_task("", total=None)

        def show(done: Done) -> None:
            progress.update(task, completed=done.total - done.left, total=done.total)

        return reindexer.run(observe=show)


def _register(
    library: Library, path: Path, settings: Settings, lang: str | None, collection: str
) -> tuple[Recording, bool]:
    with path.open("rb") as file, library.store.receive() as upload:
        while data := file.read(_CHUNK_BYTES):
            upload.write(data)
            if upload.size_bytes > settings.max_upload_bytes:
                raise OSError(f"larger than the {settings.max_upload_bytes} bytes accepted here")
        if not upload.size_bytes:
            raise OSError("the file is empty")
        upload.seal()
        return library.register(upload, collection=collection, lang=lang, metadata={"path": _as_text(path)})


def _as_text(path: Path) -> str:
    """A file name as text that can be stored and sent, whatever bytes it is made of."""
    return os.fsencode(path).decode(errors="replace")


def _settled(library: Library, path: Path, recording: Recording, outcome: Outcome) -> bool:
    """Whether a recording has come to its end, which is then counted."""
    try:
        now = library.catalog.get(recording.id, within={recording.collection})
    except RecordingNotFound:
        outcome.failed.append((path, "it was deleted meanwhile"))
        return True
    if now.status == "ready":
        outcome.indexed += 1
    elif now.status == "failed":
        outcome.failed.append((path, now.error_detail or ""))
    return now.status in ("ready", "failed")
