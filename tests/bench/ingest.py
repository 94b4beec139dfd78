"""Ingestion by `mini` on a CPU, from the upload until it is found: beside bare calls, and transcription.

All get the same recordings, and as many threads as a service takes by default: half of the cores. Those of
the decoders and of the service around the workers come on top, as they do in service.
"""

import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields
from itertools import count
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from app.samples import SAMPLES
from clasp_core.encoders import SpeechEncoder
from clasp_core.encoders.compiled import Compiled
from clasp_core.errors import ModelUnavailable
from clasp_core.ingest import TOGETHER, Ingester, Timings, recording_segments
from clasp_core.language import normalize_text
from clasp_core.library import Library
from clasp_core.mini import SpeechBackbone, load_fusion
from clasp_core.models import MiniModel, Model, open_model
from clasp_core.transcription import WhisperTranscriber
from clasp_core.types import SAMPLING_RATE, Seconds, Waveform
from tests.bench.measuring import Curve, Result, Row, in_turn, seconds
from tests.service import RunningService

RATE = SAMPLING_RATE
THREADS = max(1, (os.cpu_count() or 1) // 2)
MAX_DURATION_S = 6 * 3600.0
SHORT = 8
"""Messages of some seconds; `full` takes all of the samples."""
CUTS_S = ((20, 60), (60, 110), (110, 170))
"""Of the one long sample: recordings of their own."""
TOGETHER_CURVE = (1, 2, 4, 8, 16, 32)
LENGTHS_CURVE: tuple[Seconds, ...] = (1, 2, 4, 8, 15)
EMBEDDING = "embedding by mini"


def measure(full: bool) -> Iterator[Result]:
    torch.set_num_threads(THREADS)
    model = open_model("mini")
    assert isinstance(model, MiniModel)
    encoder = model.speech_encoder()
    contents = recordings(full)
    segments = [
        segment.waveform
        for content in contents
        for segment in recording_segments(
            encoder.picture_rate, io.BytesIO(content), max_duration_s=MAX_DURATION_S
        )
    ]
    hours = sum(soundfile.info(io.BytesIO(content)).duration for content in contents) / 3600
    with (
        tempfile.TemporaryDirectory() as folder,
        RunningService(Path(folder), workers=1, threads=0) as service,
    ):
        service.start()
        through_service = _ThroughService(service, contents)
        alone = _Alone(Path(folder) / "alone", model, encoder, contents)
        contenders: dict[str, Callable[[], Seconds]] = {
            "bare": lambda: seconds(lambda: embed(encoder, segments)),
            "alone": alone,
            "service": through_service,
        }
        contenders |= transcribing(model, segments)
        with closing(alone):
            values = in_turn(contenders)
        service.stop()
    per_hour = {name: [value / hours for value in line] for name, line in values.items()}
    yield from _whole(per_hour)
    yield from _against_transcripts(per_hour, arithmetic(model, segments) / hours)
    yield from alone.rows(hours)
    yield _by_number(encoder)
    yield _by_length(encoder)


def _whole(per_hour: Mapping[str, list[float]]) -> Iterator[Row]:
    for name, what in ("service", "from upload to ready"), ("alone", "by clasp_core.ingest"):
        yield Row(
            part="ingest",
            what=what,
            unit="s an hour of sound",
            better="lower",
            ours=per_hour[name],
            against="the bare encoder calls, in batches",
            theirs=per_hour["bare"],
            target=1.15,
        )
        yield Row(
            part="ingest",
            what=f"{what}: sound",
            unit="hours an hour",
            better="higher",
            ours=[3600 / value for value in per_hour[name]],
            limit="bare encoder calls",
            limits=[3600 / value for value in per_hour["bare"]],
        )


def _against_transcripts(per_hour: Mapping[str, list[float]], least: Seconds) -> Iterator[Row]:
    rivals = [name for name in per_hour if name.startswith("whisper-base")]
    if not rivals:
        print("no transcription: install the extra `transcription`", file=sys.stderr)
    for against in rivals or [""]:
        yield Row(
            part="ingest",
            what=EMBEDDING,
            unit="s an hour of sound",
            better="lower",
            ours=per_hour["bare"],
            against=against,
            theirs=per_hour.get(against, []),
            target=0.25 if against else None,
            limit="arithmetic",
            limits=[least],
        )


# --- what is ingested


def speech() -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """All samples one after the other, with a second of silence between them."""
    parts = []
    for path in _samples():
        samples, rate = soundfile.read(path, dtype="float32")
        parts += [soxr.resample(samples, rate, RATE).astype(np.float32), np.zeros(RATE, np.float32)]
    return np.concatenate(parts)


def _samples() -> list[Path]:
    return sorted((SAMPLES / "audio").glob("*.opus"))


def recordings(full: bool) -> list[bytes]:
    """Opus files of usual lengths: messages, and a longer stretch."""
    if full:
        return [path.read_bytes() for path in _samples()]
    paths = {path: soundfile.info(path) for path in _samples()}
    long = max(paths, key=lambda path: paths[path].duration)
    contents = [path.read_bytes() for path in paths if path != long][:SHORT]
    samples, rate = soundfile.read(long, dtype="float32")
    for start, end in CUTS_S:
        file = io.BytesIO()
        soundfile.write(file, samples[start * rate : end * rate], rate, format="OGG", subtype="OPUS")
        contents.append(file.getvalue())
    return contents


# --- contenders: each call is a round, and gives its seconds


def embed(encoder: SpeechEncoder, waveforms: Sequence[Waveform]) -> None:
    """As many at once as an ingester embeds, in the order of the recordings."""
    for start in range(0, len(waveforms), TOGETHER):
        encoder.encode(waveforms[start : start + TOGETHER])


class _ThroughService:
    """Uploads over HTTP, one after the other, and the wait until all are ready. One worker, idle before; each
    round has a collection of its own."""

    def __init__(self, service: RunningService, contents: Sequence[bytes]) -> None:
        self._service = service
        self._contents = contents
        self._rounds = count()

    def __call__(self) -> Seconds:
        collection = f"round-{next(self._rounds)}"
        began = time.perf_counter()
        for content in self._contents:
            self._service.upload(content, collection=collection).raise_for_status()
        left = len(self._contents)
        while left:
            time.sleep(0.02)
            parameters = {"collection": collection, "status": "ready", "limit": 1000}
            found = self._service.client.get("/audio", params=parameters).raise_for_status().json()
            left = len(self._contents) - len(found["items"])
        return time.perf_counter() - began


@dataclass
class _Spent:
    """A round's seconds by stage."""

    decode: Seconds = 0.0
    segment: Seconds = 0.0
    embed: Seconds = 0.0
    commit: Seconds = 0.0

    def add(self, timings: Timings) -> None:
        for stage in fields(self):
            setattr(self, stage.name, getattr(self, stage.name) + getattr(timings, stage.name))


@dataclass
class _Alone:
    """A library without a service: leased, verified, decoded confined, cut, embedded, committed."""

    folder: Path
    model: Model
    encoder: SpeechEncoder
    contents: Sequence[bytes]
    spent: list[_Spent] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self._library = Library(self.folder, model=self.model.fingerprint, dim=self.model.dim)

    def __call__(self) -> Seconds:
        for content in self.contents:
            with self._library.store.receive() as upload:
                upload.write(content)
                upload.seal()
                self._library.register(upload, collection=f"round-{len(self.spent)}")
        spent = _Spent()
        ingester = Ingester(self._library, self.encoder, max_duration_s=MAX_DURATION_S, observe=spent.add)
        began = time.perf_counter()
        done = ingester.step(on=True)
        took = time.perf_counter() - began
        assert done == len(self.contents)
        self.spent.append(spent)
        return took

    def close(self) -> None:
        self._library.close()

    def rows(self, hours: float) -> Iterator[Row]:
        for stage in fields(_Spent):
            yield Row(
                part="ingest",
                what=f"stage: {stage.name}",
                unit="s an hour of sound",
                better="lower",
                ours=[getattr(spent, stage.name) / hours for spent in self.spent[1:]],  # the first warmed up
                limit="embed",
                limits=[spent.embed / hours for spent in self.spent[1:]],
                note="decode and segment run beside embed",
            )


def transcribing(model: Model, segments: Sequence[Waveform]) -> dict[str, Callable[[], Seconds]]:
    """whisper-base and then the text encoder on what it wrote, of the same segments.

    At its best: 8 bits, which CTranslate2 computes fastest on a CPU; all segments at once, of which those of
    like length go together; followed by no more silence than Whisper needs to find its end, which takes a
    fraction of filling them up to 30 s (docs/decisions.md). Nobody says which language is spoken, as nobody
    tells `mini`. Five beams are heard better, one is the fastest.
    """
    text = model.text_encoder()

    def way(beams: int) -> Callable[[], Seconds]:
        transcriber = WhisperTranscriber(beam_size=beams, threads=THREADS)

        def written() -> None:
            transcripts = transcriber.transcribe(segments)
            text.encode([normalize_text(heard.text, heard.lang) for heard in transcripts])

        return lambda: seconds(written)

    try:
        return {f"whisper-base int8, beam {beams}, then the text encoder": way(beams) for beams in (5, 1)}
    except ModelUnavailable as error:
        print(error.detail, file=sys.stderr)
        return {}


# --- limits, and curves


def arithmetic(model: MiniModel, segments: Sequence[Waveform]) -> Seconds:
    """What the encoders' multiplications and additions alone would take, at the speed of one large matrix
    product that is compiled as they are. They are counted in the torch networks."""
    backbone = SpeechBackbone(None)
    fusion = load_fusion(model.fusion, None, backbone.decoder.twin())
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        for segment in segments:
            fusion(backbone([segment]))
    size = 1024
    rows = torch.randn(size, size)
    product = Compiled(nn.Linear(size, size, bias=False).requires_grad_(False), (rows,), ([-1, size],))
    best = min(seconds(lambda: product(rows.numpy())) for _ in range(20))
    return counter.get_total_flops() * best / (2 * size**3)


def _by_number(encoder: SpeechEncoder) -> Curve:
    clip = speech()[: 5 * RATE]
    return Curve(
        part="ingest",
        name="embedding-by-number",
        title="Segments of 5 s embedded together",
        x="segments at once",
        y="s of sound embedded in a second",
        series={"mini": [(n, _speed(encoder, [clip] * n)) for n in TOGETHER_CURVE]},
        note="Flat: on a CPU each goes through the networks alone, unpadded.",
    )


def _by_length(encoder: SpeechEncoder) -> Curve:
    sound = speech()
    return Curve(
        part="ingest",
        name="embedding-by-length",
        title=f"Segments of a length, {TOGETHER} at once",
        x="length of a segment, s",
        y="s of sound embedded in a second",
        series={"mini": [(s, _speed(encoder, [sound[: round(s * RATE)]] * TOGETHER)) for s in LENGTHS_CURVE]},
        note="What a call costs by itself weighs on short segments; attention, by the square, on long ones.",
    )


def _speed(encoder: SpeechEncoder, waveforms: list[Waveform]) -> float:
    best = min(seconds(lambda: encoder.encode(waveforms)) for _ in range(3))
    return sum(map(len, waveforms)) / RATE / best
