"""Turns any audio file into blocks of mono samples at one rate, streamed in bounded memory.

Owns formats, down-mixing, resampling and every refusal of unusable sound. The decoders are C libraries and
run in this very process: hand bytes from strangers to `clasp_core.sandbox`, which wraps this module.
"""

import os
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NoReturn, Self, TypeAlias

import av
import numpy as np
import soundfile as sf
import soxr
from av.audio.frame import AudioFrame
from numpy.typing import NDArray

from clasp_core.errors import AudioTooLong, EmptyAudio, NonFiniteAudio, SilentAudio, UndecodableAudio
from clasp_core.types import SAMPLING_RATE, Seconds, Waveform

BLOCK_S = 10
"""Seconds in every block that `decode` yields but the last, which may be shorter."""

MAX_CHANNELS = 32
MIN_SOURCE_RATE, MAX_SOURCE_RATE = 1_000, 768_000
MIN_DURATION_S = 0.1
SILENCE = 1e-4
"""A peak below this, -80 dBFS, counts as silence."""

_MAX_AMPLITUDE = 100.0  # +40 dBFS: beyond any recording scaled to [-1, 1], below any scaled to integers
_READ_FRAMES = 65_536
_FORMATS = "WAV, FLAC, MP3, Ogg (Opus or Vorbis), M4A (AAC) or WebM"

# Only containers of sound and film. FFmpeg would otherwise also open playlists (hls, concat, dash), which
# name further files and addresses to read.
_FFMPEG_CONTAINERS = (
    "3gp,aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,eac3,flac,flv,loas,m4a,matroska,mj2,mov,mp3,mp4,"
    "mpeg,mpegts,ogg,qcp,tta,w64,wav,webm,wv,xwma"
)
_FFMPEG_DECODERS = (
    "aac,aac_latm,ac3,adpcm_g722,adpcm_ima_qt,adpcm_ima_wav,adpcm_ms,adpcm_yamaha,alac,amrnb,amrwb,ape,eac3,"
    "flac,g722,g726,g726le,gsm,gsm_ms,libopencore_amrnb,libopencore_amrwb,libopus,mp1,mp1float,mp2,mp2float,"
    "mp3,mp3float,nellymoser,opus,pcm_alaw,pcm_f32be,pcm_f32le,pcm_f64be,pcm_f64le,pcm_mulaw,pcm_s16be,"
    "pcm_s16le,pcm_s24be,pcm_s24le,pcm_s32be,pcm_s32le,pcm_s8,pcm_u8,qcelp,speex,tta,vorbis,wavpack,"
    "wmalossless,wmapro,wmav1,wmav2,wmavoice"
)

AudioFile: TypeAlias = BinaryIO | str | os.PathLike[str]
"""A path, or a seekable file open for reading bytes; its name and position do not matter."""

_Frames: TypeAlias = NDArray[np.float32]  # (n, channels) at the source's rate


@dataclass(frozen=True, slots=True)
class AudioInfo:
    """What was decoded. `duration_s` counts the samples found, whatever the header claimed.

    `sampling_rate` (Hz), `channels` and `codec` describe the source; `warnings` are sentences for the
    uploader about damage that was passed over.
    """

    duration_s: Seconds
    sampling_rate: int
    channels: int
    codec: str
    warnings: tuple[str, ...]


class AudioStream(Iterator[Waveform]):
    """The blocks of one recording, to be read once; `info` holds the facts when they have all been read.

    Close it, or leave its `with` block, to stop early. Not for use by two threads at once.
    """

    def __init__(self, blocks: Generator[Waveform, None, AudioInfo]) -> None:
        self._blocks = blocks
        self._info: AudioInfo | None = None

    def __next__(self) -> Waveform:
        try:
            return next(self._blocks)
        except StopIteration as end:
            self._info = self._info or end.value
            raise

    def close(self) -> None:
        self._blocks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    @property
    def info(self) -> AudioInfo:
        if self._info is None:
            raise RuntimeError("AudioStream.info is known only after the last block: this is a bug")
        return self._info


def decode(file: AudioFile, *, max_duration_s: Seconds, sampling_rate: int = SAMPLING_RATE) -> AudioStream:
    """Decode the first audio track of a file to mono float32 at `sampling_rate` Hz, in blocks of 10 s.

    The format is recognised by content. Channels are averaged. Samples are never scaled or clipped, so
    loud sources may exceed [-1, 1]; floats beyond 100 are integers in disguise and refused. A damaged or
    truncated file gives what can be decoded, and a warning in `info`. Nothing is read before the first
    block is asked for, and errors come from the iteration:

    OSError: the path cannot be read.
    UndecodableAudio: no known format, no sound in it, mostly damaged, or outlandish channels or rates.
    EmptyAudio: less than 0.1 s of samples. SilentAudio: the peak of the whole file is below -80 dBFS.
    NonFiniteAudio: NaN or infinity among the samples. AudioTooLong: more than `max_duration_s`.

    The last three may follow blocks already yielded, so act on a recording only once it has ended well.
    """
    return AudioStream(_decode(file, max_duration_s, sampling_rate))


@dataclass(slots=True)
class _Facts:
    """What the decoders learn about the source on the way."""

    sampling_rate: int = 0
    channels: int = 0
    codec: str = ""
    warnings: list[str] = field(default_factory=list)

    def describe(self, rate: int, channels: int, codec: str) -> None:
        """Record the format, refusing what no recording has; before any memory is taken for it."""
        if not 1 <= channels <= MAX_CHANNELS:
            raise UndecodableAudio(
                f"The file has {channels} channels, and at most {MAX_CHANNELS} can be read; "
                "mix it down to mono."
            )
        if not MIN_SOURCE_RATE <= rate <= MAX_SOURCE_RATE:
            raise UndecodableAudio(
                f"The file has a sampling rate of {rate} Hz, and only {MIN_SOURCE_RATE} to "
                f"{MAX_SOURCE_RATE} Hz can be read; resample it to 16000 Hz."
            )
        self.sampling_rate, self.channels, self.codec = rate, channels, codec


def _decode(
    file: AudioFile, max_duration_s: Seconds, sampling_rate: int
) -> Generator[Waveform, None, AudioInfo]:
    facts = _Facts()
    total, peak = 0, 0.0
    length = BLOCK_S * sampling_rate
    block, filled = np.empty(length, np.float32), 0
    with _opened(file) as source:
        source.seek(0)
        if not source.read(1):
            raise EmptyAudio("The file is empty; check that it was saved and sent completely.")
        for samples in _resampled(_mono(_frames(source, facts)), sampling_rate):
            total += len(samples)
            if total > max_duration_s * sampling_rate + 1:  # resampling may round up by a sample
                raise AudioTooLong(
                    f"The recording is longer than the limit of {max_duration_s:g} s; "
                    "split it into shorter files."
                )
            peak = max(peak, float(np.abs(samples).max(initial=0)))
            while len(samples):
                fits = samples[: length - filled]
                block[filled : filled + len(fits)] = fits
                filled += len(fits)
                samples = samples[len(fits) :]
                if filled == length:
                    yield block
                    block, filled = np.empty(length, np.float32), 0

    duration_s = total / sampling_rate
    if duration_s < MIN_DURATION_S:
        raise EmptyAudio(
            f"The file holds {duration_s:.3f} s of sound, and at least {MIN_DURATION_S} s is needed; "
            "check that the recording was saved completely."
        )
    if peak < SILENCE:
        raise SilentAudio(
            "Nothing can be heard in the file: it never rises above -80 dBFS; check the recording."
        )
    if filled:
        yield block[:filled]
    return AudioInfo(duration_s, facts.sampling_rate, facts.channels, facts.codec, tuple(facts.warnings))


def _resampled(sound: Iterator[tuple[int, Waveform]], sampling_rate: int) -> Iterator[Waveform]:
    """Bring mono samples to one rate. Chained and adaptive streams may change their rate on the way."""
    current, resampler = 0, None
    nothing = np.empty(0, np.float32)
    for rate, samples in sound:
        if rate != current:
            if resampler:
                yield resampler.resample_chunk(nothing, last=True)
            current, resampler = rate, None
            if rate != sampling_rate:
                resampler = soxr.ResampleStream(rate, sampling_rate, 1, dtype="float32", quality="HQ")
        yield resampler.resample_chunk(samples) if resampler else samples
    if resampler:
        yield resampler.resample_chunk(nothing, last=True)


def _mono(sound: Iterator[tuple[int, _Frames]]) -> Iterator[tuple[int, Waveform]]:
    """Average the channels, after refusing values that would poison the resampler."""
    for rate, frames in sound:
        loudest = float(np.abs(frames).max(initial=0))
        if not np.isfinite(loudest):
            raise NonFiniteAudio(
                "The samples contain NaN or infinity; export the recording again, for example as 16-bit WAV."
            )
        if loudest > _MAX_AMPLITUDE:
            raise UndecodableAudio(
                f"The samples reach {loudest:.4g}, but floating-point sound lies between -1 and 1; "
                "divide it by its full scale or save it as 16-bit WAV."
            )
        channels = frames.shape[1]
        yield rate, frames[:, 0] if channels == 1 else frames @ np.full(channels, 1 / channels, np.float32)


def _frames(source: "_Nameless", facts: _Facts) -> Iterator[tuple[int, _Frames]]:
    """All frames with their rate: by libsndfile, and by FFmpeg from where libsndfile gives up.

    libsndfile is the smaller target and the faster decoder; FFmpeg knows more formats, finds its way
    through damage at which libsndfile stops, and reads Vorbis that libsndfile takes for empty.
    """
    done = 0
    try:
        for rate, frames in _by_libsndfile(source, facts):
            done += len(frames)
            yield rate, frames
    except sf.SoundFileError:
        pass
    else:
        if done:
            return

    resume, lost = done, f"The file is damaged after {done / max(facts.sampling_rate, 1):.1f} s."
    try:
        for rate, frames in _by_ffmpeg(source, facts):
            new = frames[resume:]
            resume -= len(frames) - len(new)
            if len(new):
                yield rate, new
    except UndecodableAudio:
        if not done:
            raise
    if done:
        facts.warnings.append(lost)


def _by_libsndfile(source: "_Nameless", facts: _Facts) -> Iterator[tuple[int, _Frames]]:
    source.seek(0)
    with sf.SoundFile(source) as sound:
        rate = sound.samplerate
        facts.describe(rate, sound.channels, sound.subtype.lower())
        done = 0
        # Never SoundFile.blocks(): it trusts the header and repeats a stale buffer past the end.
        # At most 5 s a read, or low rates would swell on their way up.
        while len(frames := sound.read(min(_READ_FRAMES, 5 * rate), dtype="float32", always_2d=True)):
            done += len(frames)
            yield rate, frames
        if done and (done < 0.99 * sound.frames - 0.1 * rate or _cut_short(sound.extra_info)):
            facts.warnings.append("The file ends earlier than its header says; what there is was used.")


def _cut_short(log: str) -> bool:
    """Whether libsndfile's log tells of a WAV or AIFF whose data chunk is larger than the file holds."""
    found = re.search(r"^ ?(?:data|SSND) : (\d+) \(should be \d+\)", log, re.MULTILINE)
    # Recorders that cannot go back to fill in the size leave it near 2 or 4 GB: those files are whole.
    return found is not None and int(found[1]) < 0x7FFF_0000


def _by_ffmpeg(source: "_Nameless", facts: _Facts) -> Iterator[tuple[int, _Frames]]:
    source.seek(0)
    options = {"format_whitelist": _FFMPEG_CONTAINERS, "codec_whitelist": _FFMPEG_DECODERS}
    try:
        container = av.open(
            source, mode="r", options=options, metadata_errors="replace", io_open=_refuse_to_open
        )
    except (av.FFmpegError, ValueError) as exc:
        raise UndecodableAudio(f"The file is not sound in a format known here; send {_FORMATS}.") from exc
    with container:
        if not container.streams.audio:
            raise UndecodableAudio(f"The file has no audio track; send {_FORMATS} with sound in it.")
        track = container.streams.audio[0]
        codec = track.codec_context
        # PyAV opens its own decoder, to which the container's codec_whitelist does not reach.
        if codec is None or codec.name not in _FFMPEG_DECODERS.split(","):
            name = codec.name if codec else "unknown"
            raise UndecodableAudio(f"Sound coded as {name!r} cannot be read here; send {_FORMATS}.")
        good = bad = done = 0
        packets = container.demux(track)
        while True:
            try:
                packet = next(packets, None)
            except av.FFmpegError:  # the container itself is damaged from here on
                bad += 1
                break
            if packet is None:
                break
            try:
                decoded = packet.decode()
            except (av.FFmpegError, ValueError):
                bad += 1
                continue
            good += 1
            for frame in decoded:
                facts.describe(frame.sample_rate, frame.layout.nb_channels, codec.name)
                done += frame.samples
                yield frame.sample_rate, _float_frames(frame)
        if bad > good or (bad and not done):
            raise UndecodableAudio(
                f"The file is damaged: {bad} of {bad + good} parts cannot be decoded; send it again."
            )
        if bad:
            facts.warnings.append(f"{bad} damaged parts of the file, of {bad + good}, were skipped.")
        elif track.duration and track.time_base and done:
            missing_s = float(track.duration * track.time_base) - done / facts.sampling_rate
            if missing_s > 0.1 + 0.05 * done / facts.sampling_rate:
                facts.warnings.append("The file ends earlier than its header says; what there is was used.")


def _float_frames(frame: AudioFrame) -> _Frames:
    values = frame.to_ndarray()
    values = values.T if frame.format.is_planar else values.reshape(-1, frame.layout.nb_channels)
    samples = values.astype(np.float32)
    if values.dtype.kind != "f":
        if values.dtype == np.uint8:
            samples -= 128
        samples /= 2.0 ** (8 * values.itemsize - 1)
    return samples


def _refuse_to_open(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    """Answer to a file that asks FFmpeg to open another one."""
    raise PermissionError("audio files may not refer to other files")


class _Nameless:
    """A binary file without its name, which both decoders would otherwise take as a hint of the format."""

    def __init__(self, file: BinaryIO) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


@contextmanager
def _opened(file: AudioFile) -> Iterator[_Nameless]:
    if isinstance(file, (str, os.PathLike)):
        with Path(file).open("rb") as opened:
            yield _Nameless(opened)
    else:
        yield _Nameless(file)
