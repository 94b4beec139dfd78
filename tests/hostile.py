"""`python -m tests.hostile`: hundreds of files that are made to do harm, through HTTP to a running service.

    python -m tests.hostile --files 500 --seed 0

The files are made here, each family in turn, from the seed: damaged ones of every format, lying headers,
bombs, boxes in boxes, containers in containers, what is no sound at all, odd names. It fails where

- one of them is neither `ready` nor `failed` (nor refused at once) with a code of docs/errors.md, within
  `WITHIN_S`, or is answered with a server error,
- a search that is asked meanwhile is not answered,
- all processes of the service together exceed `RESIDENT_MIB`, or a worker dies,
- honest recordings uploaded afterwards are not ready, or an abandoned arrival is left on disk.

Prints a JSON summary. The service has the stand-in model, and takes ten minutes of sound at most.
"""

import argparse
import gzip
import io
import itertools
import json
import struct
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import soundfile

from app.errors import STATUS_OF
from tests import audio_files
from tests.audio_files import FORMATS, SOUNDFILE_FORMATS, encode, speech, tone, wav
from tests.memory import MIB, PARTS, MemoryWatch
from tests.service import RunningService

RESIDENT_MIB = 1024
"""What all processes of the service may hold together, decoders included; docs/security.md says so."""
MAX_DURATION_S = 600.0
WITHIN_S = 60 + MAX_DURATION_S / 2
"""From an upload to its end: what the sandbox grants one decoder (`sandbox.decode`), though others may be
before it in the queue."""
CLIENTS = 8
NAMES = (
    "../../../etc/passwd",
    "..\\..\\boot.ini",
    "/dev/zero",
    "a\x00b.wav",
    "CON",
    "x" * 5000 + ".wav",
    "\u202efdp.wav",
    "'; DROP TABLE recordings; --.wav",
    'quote".wav',
    "$(reboot).wav",
    "\N{PILE OF POO}.wav",
    "http://127.0.0.1:1/x.wav",
    "",
)
TYPES = ("multipart", "audio/*", "audio/wav", "video/mp4", "application/octet-stream")

Random = np.random.Generator


@dataclass(frozen=True, slots=True)
class Hostile:
    """A file, what it is, and how it is sent: the name and the media type that it claims."""

    family: str
    content: bytes
    name: str
    media_type: str


def files(count: int, seed: int) -> Iterator[Hostile]:
    """That many, of all families in turn; the bombs, which cost seconds each, at most once each."""
    rng = np.random.default_rng(seed)
    once = [(bomb.__name__, bomb()) for bomb in BOMBS]
    turns = itertools.cycle(FAMILIES)
    for number in range(count):
        if number % 12 == 5 and once:
            family, content = once.pop()
        else:
            make = next(turns)
            family, content = make.__name__, make(rng)
        yield Hostile(
            family.strip("_"),
            content,
            NAMES[int(rng.integers(len(NAMES)))],
            TYPES[int(rng.choice(len(TYPES), p=[0.6, 0.1, 0.1, 0.1, 0.1]))],
        )


# --- what is in them


@cache
def _honest(form: str, seed: int = 0) -> bytes:
    return encode(speech(1.5, seed=seed), 48_000 if form in ("ogg-opus", "webm") else 16_000, form)


def _any_honest(rng: Random) -> bytes:
    return _honest(FORMATS[int(rng.integers(len(FORMATS)))], int(rng.integers(3)))


def _truncated(rng: Random) -> bytes:
    content = _any_honest(rng)
    return content[: int(rng.integers(1, len(content)))]


def _bits_flipped(rng: Random) -> bytes:
    content = bytearray(_any_honest(rng))
    for place in rng.integers(len(content), size=int(2 ** rng.integers(0, 10))):
        content[place] ^= 1 << int(rng.integers(8))
    return bytes(content)


def _head_flipped(rng: Random) -> bytes:
    """Where the lengths and counts are."""
    content = bytearray(_any_honest(rng))
    for place in rng.integers(min(200, len(content)), size=int(rng.integers(1, 12))):
        content[place] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))]))
    return bytes(content)


def _shuffled(rng: Random) -> bytes:
    """Pieces of two formats."""
    one, other = _any_honest(rng), _any_honest(rng)
    cuts = sorted(int(c) for c in rng.integers(len(one), size=2))
    return one[: cuts[0]] + other[: int(rng.integers(1, len(other)))] + one[cuts[1] :]


def _repeated(rng: Random) -> bytes:
    """A header that comes again and again."""
    content = _any_honest(rng)
    return content[: int(rng.integers(8, 300))] * int(rng.integers(2, 500))


def _pcm_header(rng: Random) -> bytes:
    """Any channels (255, too), rate, width and claimed size, 2**32 - 1 among them."""
    return wav(
        rng.bytes(int(rng.integers(0, 60_000))),
        channels=int(rng.choice([0, 1, 2, 3, 7, 31, 32, 33, 254, 255, 65_535])),
        rate=int(rng.choice([0, 1, 999, 1000, 7999, 16_000, 384_000, 768_001, 2**31, 2**32 - 1])),
        bits=int(rng.choice([0, 1, 8, 16, 24, 32, 64, 65_535])),
        floating=bool(rng.integers(2)),
        claimed_size=int(rng.choice([0, 1, 100, 2**31 - 1, 2**31, 2**32 - 1])),
    )


def _adpcm_header(rng: Random) -> bytes:
    """Compressed WAV whose block sizes are what overflowed in libsndfile (CVE-2022-33065, CVE-2026-37555)."""
    data = rng.bytes(int(rng.integers(1, 20_000)))
    tag = int(rng.choice([0x0002, 0x0011, 0x0020, 0x0031, 0x0040, 0x0045, 0x0055, 0xFFFE]))
    channels = int(rng.choice([1, 2, 3, 16, 255, 1024]))
    block = int(rng.choice([0, 1, 4, 36, 256, 1024, 32_768, 65_535]))
    samples = int(rng.choice([0, 1, 505, 1017, 65_535]))
    form = struct.pack("<HHIIHHHH", tag, channels, 16_000, 8_000, block, 4, 2, samples)
    fact = struct.pack("<4sII", b"fact", 4, int(rng.choice([0, 1, 2**31, 2**32 - 1])))
    body = b"WAVE" + struct.pack("<4sI", b"fmt ", len(form)) + form + fact
    body += struct.pack("<4sI", b"data", int(rng.choice([len(data), 2**32 - 1]))) + data
    return struct.pack("<4sI", b"RIFF", int(rng.choice([len(body), 2**32 - 1]))) + body


def _wav_chunks(rng: Random) -> bytes:
    """Chunks of any name and length around honest sound; RF64 with 2**63 bytes."""
    honest = _honest("wav-16")
    names = [b"LIST", b"fmt ", b"data", b"bext", b"cue ", b"smpl", b"\0\0\0\0", b"ds64", b"PEAK", b"inst"]
    body = honest[12:36]
    for _ in range(int(rng.integers(1, 40))):
        payload = rng.bytes(int(rng.integers(0, 200)))
        size = int(rng.choice([len(payload), 0, 2**32 - 1, int(rng.integers(2**32))]))
        body += struct.pack("<4sI", names[int(rng.integers(len(names)))], size) + payload
    if rng.integers(2):
        ds64 = struct.pack("<4sIQQQI", b"ds64", 28, 2**63, 2**63, 2**62, 0)
        return b"RF64" + struct.pack("<I", 2**32 - 1) + b"WAVE" + ds64 + body + honest[36:]
    return b"RIFF" + struct.pack("<I", 2**32 - 1) + b"WAVE" + body + honest[36:]


def _box(kind: bytes, content: bytes, size: int | None = None) -> bytes:
    return struct.pack(">I4s", len(content) + 8 if size is None else size, kind) + content


def _mp4_boxes(rng: Random) -> bytes:
    """Boxes in themselves hundreds deep, of size 0, of 2**64 bytes, and tables that claim 2**32 entries."""
    inner = _box(b"mdat", rng.bytes(500))
    for _ in range(int(rng.integers(1, 400))):
        kind = [b"moov", b"trak", b"mdia", b"minf", b"stbl", b"udta", b"meta", b"moof", b"traf"]
        size = rng.choice([-1, -1, -1, 0, 1, 8, 2**32 - 1])
        inner = _box(kind[int(rng.integers(len(kind)))], inner, None if size < 0 else int(size))
    entries = struct.pack(">II", 0, 2**32 - 1) + rng.bytes(64)
    tables = b"".join(_box(kind, entries) for kind in (b"stsz", b"stts", b"stsc", b"co64", b"ctts"))
    large = struct.pack(">I4sQ", 1, b"mdat", int(rng.choice([0, 8, 2**63, 2**64 - 1], p=None)) & (2**64 - 1))
    head = _box(b"ftyp", b"M4A \0\0\2\0isomiso2")
    return head + [inner, _box(b"moov", tables), large + inner, tables + inner][int(rng.integers(4))]


def _mp4_sample_tables(rng: Random) -> bytes:
    """An honest M4A whose tables were altered: sizes, offsets, durations."""
    content = bytearray(_honest("m4a"))
    for name in (b"stsz", b"stts", b"stsc", b"stco", b"mdhd", b"tkhd", b"mvhd", b"esds", b"mp4a"):
        at = content.find(name)
        if at >= 0 and rng.integers(2):
            place = at + 4 + int(rng.integers(0, 24))
            content[place : place + 4] = struct.pack(">I", int(rng.choice([0, 1, 2**31, 2**32 - 1])))
    return bytes(content)


def _ebml(rng: Random) -> bytes:
    """WebM whose elements have unknown or enormous lengths, or lie in each other."""
    content = bytearray(_honest("webm"))
    for _ in range(int(rng.integers(1, 6))):
        place = int(rng.integers(4, min(len(content), 600)))
        content[place : place + 8] = b"\x01" + rng.bytes(7) if rng.integers(2) else b"\x01" + b"\xff" * 7
    nest = b"\x18\x53\x80\x67\x01" + b"\xff" * 7
    return bytes(content[:60]) + nest * int(rng.integers(0, 200)) + bytes(content[60:])


def _ogg_pages(rng: Random) -> bytes:
    """Pages of other streams between, missing, doubled, or with a time of 2**63."""
    content = _honest(["ogg-opus", "ogg-vorbis"][int(rng.integers(2))])
    pages = [b"OggS" + page for page in content.split(b"OggS")[1:]]
    for _ in range(int(rng.integers(1, 6))):
        place = int(rng.integers(len(pages)))
        page = bytearray(pages[place])
        page[6:14] = struct.pack("<q", int(rng.choice([-(2**63), -1, 0, 2**62])))
        pages.insert(int(rng.integers(len(pages))), bytes(page))
        pages.pop(int(rng.integers(len(pages))))
    return b"".join(pages)


def _flac_header(rng: Random) -> bytes:
    """STREAMINFO that claims 2**36 samples, any block size, rate and channels; blocks of 2**24 bytes."""
    content = bytearray(_honest("flac"))
    content[8:26] = rng.bytes(18) if rng.integers(2) else b"\xff" * 18
    if rng.integers(2):
        content[4:8] = bytes([int(rng.integers(128)), 0xFF, 0xFF, 0xFF])
    return bytes(content)


def _nested(rng: Random) -> bytes:
    """One file as the sound of another, three deep."""
    content = _any_honest(rng)
    for _ in range(3):
        wrap: list[Callable[[bytes], bytes]] = [
            lambda inner: wav(inner),
            lambda inner: _box(b"ftyp", b"M4A \0\0\0\0") + _box(b"mdat", inner),
            lambda inner: b"ID3\x04\0\0" + bytes([0, 0, len(inner) >> 7 & 0x7F, len(inner) & 0x7F]) + inner,
            lambda inner: _honest("webm")[:100] + inner,
        ]
        content = wrap[int(rng.integers(len(wrap)))](content)
    return content


def _polyglot(rng: Random) -> bytes:
    """Two formats at once: something else in front of honest sound, or behind it."""
    content = _any_honest(rng)
    fronts = [
        b"%PDF-1.7\n",
        b"GIF89a",
        b"<!doctype html><script>alert(1)</script>",
        b"\x7fELF",
        b"#!/bin/sh\n",
    ]
    front = fronts[int(rng.integers(len(fronts)))] + rng.bytes(int(rng.integers(0, 3000)))
    return front + content if rng.integers(2) else content + front


def _archive(rng: Random) -> bytes:
    """Recordings in archives, and archives of gigabytes of zeros."""
    content = _any_honest(rng)
    if rng.integers(2):
        return gzip.compress(bytes(20 << 20) if rng.integers(2) else content, 9, mtime=0)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo("../../x.wav"), content)
        archive.writestr(zipfile.ZipInfo("zeros"), bytes(20 << 20), zipfile.ZIP_DEFLATED)
    return file.getvalue()


def _no_sound(rng: Random) -> bytes:
    """Text, HTML, JSON, playlists that name files and addresses, noise, nothing."""
    choices = [
        b"",
        b"R",
        rng.bytes(int(rng.integers(1, 50_000))),
        bytes(int(rng.integers(1, 50_000))),
        b"\xff" * int(rng.integers(1, 50_000)),
        b"Dear service, please transcribe.\n" * int(rng.integers(1, 2000)),
        b"<!doctype html><title>x</title>" + b"<p>" * int(rng.integers(1, 9000)),
        b'{"url": "http://169.254.169.254/"}',
        *audio_files.playlists("file:///etc/passwd").values(),
        *audio_files.playlists("http://127.0.0.1:1/").values(),
    ]
    return choices[int(rng.integers(len(choices)))]


def _refused(rng: Random) -> bytes:
    """Those that the decoders' own tests know: silence, NaN, too short, films, 1000 channels."""
    known = _known()
    return known[int(rng.integers(len(known)))]


@cache
def _known() -> list[bytes]:
    return [content for content, _ in audio_files.hostile().values()]


def _odd_but_honest(rng: Random) -> bytes:
    """What should work: any width, rate and number of channels that we accept."""
    form = list(SOUNDFILE_FORMATS)[int(rng.integers(len(SOUNDFILE_FORMATS)))]
    rate = int(rng.choice([8000, 16_000, 48_000]))
    channels = int(rng.choice([1, 2])) if "adpcm" in form or form in ("mp3", "ogg-opus") else 5
    return encode(tone(0.7, rate, channels, float(rng.integers(100, 3000))), rate, form)


FAMILIES: tuple[Callable[[Random], bytes], ...] = (
    _truncated,
    _bits_flipped,
    _head_flipped,
    _pcm_header,
    _adpcm_header,
    _mp4_boxes,
    _no_sound,
    _shuffled,
    _wav_chunks,
    _ogg_pages,
    _flac_header,
    _ebml,
    _mp4_sample_tables,
    _nested,
    _polyglot,
    _archive,
    _repeated,
    _refused,
    _odd_but_honest,
)


def nine_hours_of_opus() -> bytes:
    """Of silence, in 4 MB; 2 GB as 16 kHz floats."""
    return audio_files.silent_opus(9)


def seven_hours_of_flac() -> bytes:
    """Of silence at 8 kHz, in about 1 MB."""
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 8000, 1, "PCM_16", format="FLAC") as sound:
        hour = np.zeros(3600 * 8000, np.int16)
        for _ in range(7):
            sound.write(hour)
    return file.getvalue()


def many_channels_of_flac() -> bytes:
    """Eight channels at 655,350 Hz, fifty seconds of silence."""
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 655_350, 8, "PCM_16", format="FLAC") as sound:
        for _ in range(50):
            sound.write(np.zeros((655_350, 8), np.int16))
    return file.getvalue()


BOMBS = (many_channels_of_flac, seven_hours_of_flac, nine_hours_of_opus)


# --- what becomes of them


def attack(folder: Path, *, count: int, seed: int) -> dict[str, Any]:
    """The summary; `complaints` is empty where all is well."""
    complaints: list[str] = []
    ends: dict[str, Counter[str]] = {}
    at_once: Counter[str] = Counter()
    slowest = [0.0, "", 0.0, ""]
    searches: list[float] = []
    done = threading.Event()
    began = time.monotonic()
    settings: dict[str, Any] = {"max_duration_s": MAX_DURATION_S, "max_upload_bytes": 8_000_000}
    with RunningService(folder, program="tests.stand_in", log_level="warning", **settings) as service:
        service.start()

        def search() -> None:
            with httpx.Client(base_url=service.client.base_url, timeout=60) as client:
                while not done.wait(0.05):
                    asked = time.monotonic()
                    answer = client.get("/search", params={"q": "bees"})
                    searches.append(time.monotonic() - asked)
                    if answer.status_code != 200:
                        complaints.append(f"a search: {answer.status_code} {answer.text[:200]}")

        def send(numbered: tuple[int, Hostile]) -> None:
            number, hostile = numbered
            outcome, seconds = _outcome(service, hostile)
            ends.setdefault(hostile.family, Counter())[outcome] += 1
            slowest[:2] = max(slowest[:2], [round(seconds, 1), hostile.family])
            if outcome.partition(" ")[2] not in STATUS_OF and outcome != "ready":
                complaints.append(f"{hostile.family} {number}: {outcome}")
            if number % 5 == 0:
                asked, question = time.monotonic(), {"file": hostile.content}
                answer = service.client.post("/search/audio", files=question, timeout=WITHIN_S)
                slowest[2:] = max(slowest[2:], [round(time.monotonic() - asked, 1), hostile.family])
                at_once["answered" if answer.is_success else answer.json()["code"]] += 1
                if answer.status_code >= 500:
                    complaints.append(f"{hostile.family} {number} as a question: {answer.text[:200]}")

        with MemoryWatch(service, 0.05) as memory, ThreadPoolExecutor(CLIENTS + 1) as pool:
            asking = pool.submit(search)
            try:
                list(pool.map(send, enumerate(files(count, seed))))
            finally:
                done.set()
            asking.result()
            for number in range(3):
                service.ready(encode(speech(1.0, seed=100 + number), 16_000), id=f"honest-{number}")
        left = {path for path in service.stored() if path.startswith("incoming")}
        if left:
            complaints.append(f"abandoned arrivals: {sorted(left)}")
        if deaths := service.metric("clasp_worker_restarts_total"):
            complaints.append(f"{deaths:g} workers died")
        if memory.peak() > RESIDENT_MIB * MIB:
            complaints.append(f"{memory.peak() // MIB} MiB were resident, more than {RESIDENT_MIB}")
        if service.stop() != 0 or "unexpected error" in service.log():
            complaints.append("the log tells of an unexpected error")
    total = sum(ends.values(), Counter())
    return {
        "files": count,
        "seed": seed,
        "seconds": round(time.monotonic() - began),
        "outcomes": dict(total.most_common()),
        "outcomes_by_family": {family: dict(counted) for family, counted in sorted(ends.items())},
        "as_questions": dict(at_once.most_common()),
        "slowest_s": {"upload to end": slowest[:2], "as a question": slowest[2:]},
        "searches_meanwhile": len(searches),
        "searches_p95_s": round(sorted(searches)[len(searches) * 95 // 100], 3) if searches else None,
        "peak_resident_mib": {part: memory.peak(part) // MIB for part in PARTS}
        | {"together": memory.peak() // MIB},
        "complaints": complaints[:50],
    }


def _outcome(service: RunningService, hostile: Hostile) -> tuple[str, float]:
    """`ready`, `failed CODE`, `refused CODE`, or what nobody should see; and the seconds to there."""
    began = time.monotonic()
    form = {"lang": "en", "metadata": json.dumps({"family": hostile.family})}
    if hostile.media_type == "multipart":
        sent = (hostile.name, hostile.content)
        answer = service.client.post("/audio", files={"file": sent}, data=form)
    else:
        headers = {"Content-Type": hostile.media_type}
        answer = service.client.post("/audio", content=hostile.content, params=form, headers=headers)
    if answer.is_client_error:
        return f"refused {answer.json()['code']}", time.monotonic() - began
    if not answer.is_success:
        return f"answer {answer.status_code}", time.monotonic() - began
    record = service.settled(answer.json()["id"], within_s=WITHIN_S)
    seconds = time.monotonic() - began
    return ("ready" if record["status"] == "ready" else f"failed {record['error']['code']}"), seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        summary = attack(Path(folder), count=options.files, seed=options.seed)
    print(json.dumps(summary, indent=1))
    return 1 if summary["complaints"] else 0


if __name__ == "__main__":
    sys.exit(main())
