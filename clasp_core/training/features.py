"""What frozen encoders make of the training data, computed once and kept on disk.

Encoders take far longer than an epoch of what is trained on top of them. Rows are found by a key of what
they were computed from, so more items, another split or another order cost only what is new.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clasp_core.durability import place
from clasp_core.errors import InvalidAudio
from clasp_core.ingest import recording_segments
from clasp_core.manifest import ManifestItem
from clasp_core.segmenting import SegmentConfig
from clasp_core.training.config import digest
from clasp_core.training.trainer import Progress, silent
from clasp_core.types import Seconds, Segment, Waveform

_log = logging.getLogger(__name__)

Row: TypeAlias = Mapping[str, Tensor]
"""Features of one input: named tensors (n, width), n as the input has it."""

MAX_CLIP_S: Seconds = 29.0
_SHARD_ITEMS = 256
_SHARD_BYTES = 64 << 20


class FeatureCache:
    """Rows of one encoder in one reading, in a folder of their own; float32 when read.

    `identity` is all that the rows depend on beside their inputs, as JSON can hold it.
    """

    def __init__(self, folder: Path, *identity: object, precision: str = "float16") -> None:
        self.folder = folder / digest(precision, *identity)
        self._dtype = {"float16": torch.float16, "float32": torch.float32}[precision]
        self._rows: dict[str, tuple[dict[str, Tensor], int]] = {}
        """Key to a shard and the place in it."""
        self.left_out: dict[str, str] = {}
        """Keys of inputs that gave no row, and why."""
        for shard in sorted(self.folder.glob("*.safetensors")):
            self._open(shard)

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def row(self, key: str) -> dict[str, Tensor]:
        """The features of one input, float32. KeyError where there are none."""
        shard, number = self._rows[key]
        return {
            name: values[slice(*_span(shard[f"{name}.ends"], number))].float()
            for name, values in shard.items()
            if not name.endswith(".ends")
        }

    def length(self, key: str, name: str) -> int:
        """How many rows an input has in the tensor of that name."""
        shard, number = self._rows[key]
        start, end = _span(shard[f"{name}.ends"], number)
        return end - start

    def fill(
        self,
        keys: Sequence[str],
        compute: Callable[[list[int]], Iterable[Row | str]],
        *,
        together: int = 1,
        stage: str = "features",
        progress: Progress = silent,
    ) -> None:
        """Compute what is missing of these keys, `together` at a time, in their order.

        `compute` takes places in `keys` and gives for each its row, or the reason why there is none. What
        is done is on disk every few hundred; a run that is killed and goes on computes the same batches.
        """
        known = self._rows.keys() | self.left_out.keys()
        first = {key: number for number, key in reversed(list(enumerate(keys))) if key not in known}
        missing = sorted(first.values())
        rows: dict[str, Row | str] = {}
        size = 0
        for start in range(0, len(missing), together):
            numbers = missing[start : start + together]
            for number, row in zip(numbers, compute(numbers), strict=True):
                rows[keys[number]] = row
                if isinstance(row, str):
                    _log.warning("left out: %s", row)
                else:
                    size += sum(values.numel() * self._dtype.itemsize for values in row.values())
            if len(rows) >= _SHARD_ITEMS or size >= _SHARD_BYTES:
                self._write(rows)
                rows, size = {}, 0
                _log.info("%s: %d of %d", stage, start + len(numbers), len(missing))
            progress(stage, start + len(numbers), len(missing), "")
        if rows:
            self._write(rows)

    def _write(self, rows: Mapping[str, Row | str]) -> None:
        there = {key: row for key, row in rows.items() if not isinstance(row, str)}
        tensors: dict[str, Tensor] = {}
        for name in next(iter(there.values()), {}):
            parts = [row[name].to("cpu", self._dtype) for row in there.values()]
            tensors[name] = torch.cat(parts)
            tensors[f"{name}.ends"] = torch.tensor([len(part) for part in parts]).cumsum(0)
        left_out = {key: row for key, row in rows.items() if isinstance(row, str)}
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{digest(*rows)}.safetensors"
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary, {"keys": json.dumps(list(there)), "left_out": json.dumps(left_out)})
        place(temporary, path)
        self._open(path)

    def _open(self, path: Path) -> None:
        """The tensors stay on disk: pages are read as rows are used. A damaged shard is computed again."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                shard = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            _log.warning("features in %s are damaged, and are computed again: %s", path, error)
            return
        for number, key in enumerate(json.loads(metadata["keys"])):
            self._rows[key] = (shard, number)
        self.left_out |= json.loads(metadata["left_out"])


def _span(ends: Tensor, number: int) -> tuple[int, int]:
    return int(ends[number - 1]) if number else 0, int(ends[number])


def clip_key(item: ManifestItem) -> str:
    """What a recording's features are kept under: another file in its place has another one."""
    try:
        stat = item.audio.stat()
    except OSError:
        return digest(item.id, str(item.audio))
    return digest(item.id, str(item.audio.resolve()), stat.st_size, stat.st_mtime_ns)


def clip(item: ManifestItem, speed: float, picture_rate: int | None) -> Segment:
    """A training example: a recording of up to 29 s at that speed, without the silence around its speech.

    Raises InvalidAudio where it cannot be decoded, or is longer.
    """
    whole = SegmentConfig(whole_s=MAX_CLIP_S / min(speed, 1.0))
    try:
        segments = recording_segments(
            picture_rate, item.audio, max_duration_s=MAX_CLIP_S * min(speed, 1.0), segmenting=whole
        )
        segment = next(segments, None)
    except OSError as error:
        raise InvalidAudio(f"{item.audio} cannot be read: {error.strerror}.") from error
    if segment is None:
        raise InvalidAudio("Nothing can be heard in this recording.")
    pictured = segment.pictured
    return replace(
        segment,
        waveform=_at_speed(segment.waveform, speed),
        pictured=None if pictured is None else _at_speed(pictured, speed),
    )


def _at_speed(waveform: Waveform, speed: float) -> Waveform:
    """Played faster or slower, as a tape is: tempo and pitch together."""
    if speed == 1.0:
        return waveform
    import soxr

    resampled: Waveform = soxr.resample(waveform, 1.0, 1.0 / speed)
    return resampled


def clips(
    items: Sequence[ManifestItem], speed: float, picture_rate: int | None = None
) -> list[Segment | str]:
    """The examples of some items, or why there is none."""
    found: list[Segment | str] = []
    for item in items:
        try:
            found.append(clip(item, speed, picture_rate))
        except InvalidAudio as error:
            found.append(f"{item.id}: {error.detail}")
    return found
