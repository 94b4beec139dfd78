"""Files into the library, embedded here and now (`clasp index`), and the folders they appear in.

Works beside a running service: all lease from the same catalogue, so whoever is free takes the next.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from app.settings import Settings
from clasp_core.catalog import Recording
from clasp_core.encoders.weights import sha256_of
from clasp_core.errors import ProcessingFailed, RecordingNotFound
from clasp_core.ingest import Ingester, Timings
from clasp_core.library import Library
from clasp_core.models import Model
from clasp_core.types import Seconds

_CHUNK_BYTES = 1 << 20
_AHEAD = 64
"""Files registered before the first of them is embedded."""
LOOK_EVERY_S: Seconds = 0.5
SETTLED_AFTER_S: Seconds = 3.0
"""A file in a watched folder that kept its size and time for so long is taken to be whole."""

Fate: TypeAlias = Literal["indexed", "known", "failed"]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a file is not searchable; `code` as in docs/errors.md, or `file` where it could not be read."""

    path: Path
    reason: str
    code: str


@dataclass(slots=True)
class Outcome:
    """What became of the files so far, and what is being done."""

    files: int = 0
    size_bytes: int = 0
    done_bytes: int = 0
    indexed: int = 0
    known: int = 0
    failed: list[Failure] = field(default_factory=list)
    sound_s: Seconds = 0.0
    """Sound that was embedded here."""
    current: str = ""
    stopped: bool = False

    @property
    def done(self) -> int:
        return self.indexed + self.known + len(self.failed)

    def as_json(self) -> dict[str, Any]:
        failed = [{"path": as_text(failure.path), "reason": failure.reason} for failure in self.failed]
        return {"indexed": self.indexed, "known": self.known, "failed": failed}


class FileIndexer:
    """Registers and embeds files. From one thread; `stop` may be called from any, or a signal handler."""

    def __init__(
        self,
        library: Library,
        model: Model,
        settings: Settings,
        *,
        lang: str | None = None,
        collection: str = "default",
        observe: Callable[[Outcome], None] = lambda outcome: None,
        settled: Callable[[Path, Fate, str], None] = lambda path, fate, reason: None,
    ) -> None:
        """`observe` is told of every step; `settled` of each file, with the reason where it failed."""
        self.outcome = Outcome()
        self._library = library
        self._model = model
        self._settings = settings
        self._lang = lang
        self._collection = collection
        self._observe = observe
        self._settled = settled
        self._stopping = threading.Event()
        self._ingester: Ingester | None = None
        self._waiting: list[tuple[Path, int, Recording]] = []
        self._looked: Seconds = 0.0
        self._sizes: set[int] = set()

    def stop(self) -> None:
        """Give back what is being embedded, then return from `index` or `watch`. What is done stays."""
        self.outcome.stopped = True
        self._stopping.set()
        if self._ingester is not None:
            self._ingester.stop()

    def index(self, files: Sequence[Path]) -> None:
        """Register and embed every file. One that cannot be used is reported, and the others go on."""
        sizes = [_size_of(path) for path in files]
        self.outcome.files += len(files)
        self.outcome.size_bytes += sum(sizes)
        self._sizes = self._library.catalog.sizes(self._collection)
        for start in range(0, len(files), _AHEAD):
            for path, size in zip(files[start : start + _AHEAD], sizes[start : start + _AHEAD], strict=True):
                if self._stopping.is_set():
                    return
                self.outcome.current = path.name
                self._observe(self.outcome)
                self._enter(path, size)
            while self._waiting and not self._stopping.is_set():
                self._ingester = self._ingester or self._new_ingester()
                worked = self._ingester.step(on=True)
                self._look()
                if not worked and self._waiting:
                    self._stopping.wait(0.1)  # another worker has what is left

    def watch(self, folders: Sequence[Path]) -> None:
        """Index what is in the folders, then whatever appears or changes in them, until stopped.

        A file is indexed once it has kept its size and time for SETTLED_AFTER_S. What is removed from a
        folder stays in the library; a file that was changed is another recording.
        """
        from watchfiles import Change
        from watchfiles import watch as changes_in

        growing: dict[Path, tuple[tuple[int, int], Seconds]] = {}
        looked = False
        for changes in changes_in(
            *folders,
            watch_filter=None,
            stop_event=self._stopping,
            yield_on_timeout=True,
            rust_timeout=round(1000 * LOOK_EVERY_S),
            raise_interrupt=False,
        ):
            # the first time, when changes are listened for already: so that none falls in between
            appeared: Iterable[Path] = () if looked else files_of(folders)
            changed = [_as_named(name, folders) for change, name in changes if change != Change.deleted]
            for path in (*appeared, *(path for path in changed if _is_meant(path, folders))):
                if (version := _version(path)) is not None:
                    growing[path] = (version, time.monotonic())
                    if not looked and time.time() - path.stat().st_mtime > SETTLED_AFTER_S:
                        growing[path] = (version, -SETTLED_AFTER_S)
            looked = True
            if whole := list(_whole(growing)):
                self.index(whole)

    def _new_ingester(self) -> Ingester:
        """Only now: where all files are known already, no model needs to be loaded."""
        return Ingester(
            self._library,
            self._model.speech_encoder(),
            max_duration_s=self._settings.max_duration_s,
            observe=self._embedded,
            alive=self._look_now_and_then,
        )

    def _embedded(self, timings: Timings) -> None:
        self.outcome.sound_s += timings.audio

    def _enter(self, path: Path, size: int) -> None:
        try:
            recording, created = self._register(path)
        except OSError as error:
            self._settle(path, size, "failed", error.strerror or str(error), "file")
            return
        if recording.status in ("pending", "processing"):
            self._waiting.append((path, size, recording))
        elif recording.status == "failed":
            self._settle(path, size, "failed", recording.error_detail or "", recording.error_code or "")
        else:
            self._settle(path, size, "indexed" if created else "known")

    def _register(self, path: Path) -> tuple[Recording, bool]:
        if (known := self._known(path)) is not None:
            return known, False
        with path.open("rb") as file, self._library.store.receive() as upload:
            while data := file.read(_CHUNK_BYTES):
                upload.write(data)
                if upload.size_bytes > self._settings.max_upload_bytes:
                    raise OSError(f"larger than the {self._settings.max_upload_bytes} bytes accepted here")
            if not upload.size_bytes:
                raise OSError("the file is empty")
            upload.seal()
            said = {"path": as_text(path)}
            return self._library.register(upload, collection=self._collection, lang=self._lang, metadata=said)

    def _known(self, path: Path) -> Recording | None:
        """The recording that these very bytes are, whole in the store and not to be tried again.

        By what is in the file, and not by its size and time, which a copy can have from another; but only
        where the catalogue has something of that size, so that new files are read once.
        """
        if _size_of(path) not in self._sizes:
            return None
        found = self._library.catalog.find(self._collection, sha256_of(path))
        if found is None or found.error_code == ProcessingFailed.code:
            return None
        with suppress(FileNotFoundError):
            if self._library.store.find(found.sha256).size_bytes == found.size_bytes:
                return found
        return None

    def _look_now_and_then(self) -> None:
        if time.monotonic() - self._looked > LOOK_EVERY_S:
            self._look()

    def _look(self) -> None:
        """See which recordings have come to their end, whoever brought them there."""
        self._looked = time.monotonic()
        waiting, self._waiting = self._waiting, []
        for path, size, recording in waiting:
            try:
                now = self._library.catalog.get(recording.id, within={recording.collection})
            except RecordingNotFound as error:
                self._settle(path, size, "failed", "it was deleted meanwhile", error.code)
                continue
            if now.status == "ready":
                self._settle(path, size, "indexed")
            elif now.status == "failed":
                self._settle(path, size, "failed", now.error_detail or "", now.error_code or "")
            else:
                self._waiting.append((path, size, recording))
        if self._waiting:
            self.outcome.current = self._waiting[0][0].name
        self._observe(self.outcome)

    def _settle(self, path: Path, size: int, fate: Fate, reason: str = "", code: str = "") -> None:
        outcome = self.outcome
        outcome.done_bytes += size
        if fate == "failed":
            outcome.failed.append(Failure(path, reason, code))
        elif fate == "known":
            outcome.known += 1
        else:
            outcome.indexed += 1
        self._settled(path, fate, reason)
        self._observe(outcome)


def files_of(paths: Iterable[Path]) -> Iterator[Path]:
    """The files among them, and all in the folders among them, but for hidden ones."""
    for path in paths:
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.is_file() and _is_meant(file, [path]))
        else:
            yield path


def _as_named(name: str, folders: Sequence[Path]) -> Path:
    """A file by the name that its folder was given by; what tells of changes makes absolute paths of them."""
    for folder in folders:
        for place in (folder.absolute(), folder.resolve()):
            if Path(name).is_relative_to(place):
                return folder / Path(name).relative_to(place)
    return Path(name)


def _is_meant(file: Path, folders: Sequence[Path]) -> bool:
    """Whether nothing below the folder it was found in is hidden."""
    for folder in folders:
        if file.is_relative_to(folder):
            return not any(part.startswith(".") for part in file.relative_to(folder).parts)
    return False


def _whole(growing: dict[Path, tuple[tuple[int, int], Seconds]]) -> Iterator[Path]:
    """Those that have not changed for a while, which are taken out; the others are looked at again."""
    now = time.monotonic()
    for path, (before, since) in list(growing.items()):
        version = _version(path)
        if version is None:
            del growing[path]
        elif version != before:
            growing[path] = (version, now)
        elif now - since >= SETTLED_AFTER_S:
            del growing[path]
            yield path


def _version(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return (stat.st_size, stat.st_mtime_ns) if path.is_file() else None


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def as_text(path: Path) -> str:
    """A file name as text that can be stored and sent, whatever bytes it is made of."""
    return os.fsencode(path).decode(errors="replace")
