"""A stretch of a recording to hear: cut by our own decoder, played by what the machine has."""

import shutil
import subprocess
import tempfile
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from app.cli.common import fail
from clasp_core.library import Library
from clasp_core.sandbox import decode
from clasp_core.types import Seconds, SegmentHit, Waveform

PLAYERS = {
    "ffplay": ("-nodisp", "-autoexit", "-loglevel", "error"),
    "mpv": ("--no-video", "--really-quiet"),
    "paplay": (),
    "pw-play": (),
    "aplay": ("-q",),
    "afplay": (),
}
"""Programs that play a WAV file, the first that is there, with what keeps them quiet."""
AROUND_S: Seconds = 1.0
"""Heard before and after the segment."""
_RATE = 44_100


def player() -> list[str]:
    """The command that plays a file. Ends the program with one line where there is none."""
    found = next(filter(shutil.which, PLAYERS), None)
    if found is None:
        fail(f"nothing here plays sound: install one of {', '.join(PLAYERS)} (ffplay comes with ffmpeg)")
    return [found, *PLAYERS[found]]


def play(library: Library, sha256: str, segment: SegmentHit, *, max_duration_s: Seconds) -> None:
    """The segment and a second on each side, in the foreground. Raises InvalidAudio, DataDamaged, and
    OSError where the bytes are gone."""
    command = player()
    begin, end = max(0.0, segment.start_s - AROUND_S), segment.end_s + AROUND_S
    with tempfile.NamedTemporaryFile(prefix="clasp-", suffix=".wav") as file:
        with library.store.verified(sha256) as path, wave.open(file, "wb") as out:
            out.setnchannels(1)
            out.setsampwidth(2)
            out.setframerate(_RATE)
            for waveform in _between(path, begin, end, max_duration_s):
                out.writeframes((np.clip(waveform, -1, 1) * 32767).astype("<i2").tobytes())
        file.flush()
        played = subprocess.run(  # noqa: S603 - a player found on the path, and our own file
            [*command, file.name], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False
        )
    if played.returncode:
        fail(f"{Path(command[0]).name} could not play it (exit status {played.returncode})")


def _between(path: Path, begin: Seconds, end: Seconds, max_duration_s: Seconds) -> Iterator[Waveform]:
    at = 0
    with decode(path, max_duration_s=max_duration_s, sampling_rate=_RATE) as blocks:
        for block in blocks:
            first, last = (round(seconds * _RATE) - at for seconds in (begin, end))
            if last <= 0:
                return
            yield block[max(0, first) : last]
            at += len(block)
