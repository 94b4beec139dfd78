"""What a training leaves: a model folder that is served as it is, and the way of a run to it."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clasp_core.durability import locked, place, sync_folder, write_whole
from clasp_core.errors import ProcessingFailed
from clasp_core.training.config import described, digest

OWN_FILES = ("fusion.safetensors", "encoder.safetensors", "mixture.json")


@contextmanager
def run_folder(cache: Path, *identity: object) -> Iterator[Path]:
    """Where the states of one run are until it has ended well: a killed one finds them again.

    identity: all that decides the result, as JSON can hold it. Another configuration is another run.
    Raises ProcessingFailed where another process is at the same run.
    """
    folder = cache / "runs" / digest(*identity)
    folder.mkdir(parents=True, exist_ok=True)
    taken = ProcessingFailed(f"Another process is at this very training, in {folder}.")
    with locked(folder, taken):
        yield folder
        shutil.rmtree(folder, ignore_errors=True)


def write_model(
    output: Path,
    description: Mapping[str, Any],
    files: Mapping[str, Callable[[Path], None]],
    *,
    config: object,
    items: int,
    history: Sequence[Mapping[str, object]],
) -> Path:
    """Write a model folder: `files` by name, training.json, and model.json last, so that a folder which
    can be opened is whole. Files that an earlier model there had and this one has not are removed.
    """
    output.mkdir(parents=True, exist_ok=True)
    for name in ("model.json", *OWN_FILES):
        if name not in files:
            (output / name).unlink(missing_ok=True)
    sync_folder(output)
    for name, write in files.items():
        temporary = output / f".{name}.tmp"
        write(temporary)
        temporary.chmod(0o644)  # safetensors writes for its owner alone; who serves may be another user
        place(temporary, output / name)
    record = {"config": described(config), "items": items, "history": history}
    for name, content in (
        ("training.json", record),
        ("model.json", {"format": "clasp-model/1", **description}),
    ):
        write_whole(output / name, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return output
