"""Builders of audio files for tests, as bytes: every format we accept, and files made to do harm."""

import io
import struct
from fractions import Fraction

import av
import numpy as np
import soundfile as sf
from numpy.typing import NDArray

Samples = NDArray[np.float32]
"""Shape (n,) or (n, channels), in [-1, 1]."""

SOUNDFILE_FORMATS = {
    "wav-u8": ("WAV", "PCM_U8"),
    "wav-16": ("WAV", "PCM_16"),
    "wav-24": ("WAV", "PCM_24"),
    "wav-32": ("WAV", "PCM_32"),
    "wav-float": ("WAV", "FLOAT"),
    "wav-double": ("WAV", "DOUBLE"),
    "wav-mulaw": ("WAV", "ULAW"),
    "wav-alaw": ("WAV", "ALAW"),
    "wav-ima-adpcm": ("WAV", "IMA_ADPCM"),
    "wav-ms-adpcm": ("WAV", "MS_ADPCM"),
    "aiff": ("AIFF", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "ogg-vorbis": ("OGG", "VORBIS"),
    "ogg-opus": ("OGG", "OPUS"),
}
FFMPEG_FORMATS = {
    "m4a": ("mp4", "aac"),
    "aac": ("adts", "aac"),
    "m4a-alac": ("mp4", "alac"),
    "webm": ("webm", "libopus"),
    "mkv-flac": ("matroska", "flac"),
    "wma": ("asf", "wmav2"),
}
FORMATS = (*SOUNDFILE_FORMATS, *FFMPEG_FORMATS)


def tone(seconds: float, rate: int = 16_000, channels: int = 1, frequency: float = 440.0) -> Samples:
    """A sine of peak 0.5, the same in every channel. Shape (n, channels)."""
    wave = 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)
    return np.repeat(wave[:, None], channels, axis=1).astype(np.float32)


def speech(seconds: float, rate: int = 16_000, seed: int = 2) -> Samples:
    """Babble that Silero takes for speech, shape (n,), peak 0.5: a gliding voice through formants that change
    with every syllable, four a second, each begun by a hiss."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    pitch = 130 + 30 * np.sin(2 * np.pi * 0.6 * time + rng.uniform(0, 6)) + 4 * np.sin(2 * np.pi * 5 * time)
    pulses = np.diff(np.floor(np.cumsum(pitch) / rate), prepend=0)
    voice = np.convolve(pulses, np.exp(-np.arange(200) / 16))[
        : len(time)
    ]  # -6 dB an octave, as from a throat
    voice += 0.02 * rng.normal(size=len(time))
    syllables = rng.integers(len(_VOWELS), size=int(seconds * 4) + 1)[(time * 4).astype(int)]
    phase = time * 4 % 1
    sound = np.zeros(len(time))
    ring = np.arange(round(0.03 * rate)) / rate
    for i, formants in enumerate(_VOWELS):
        vowel = voice * (syllables == i) * np.clip(3 * np.sin(np.pi * phase), 0, 1)
        for formant, level, width in zip(formants, (1.0, 0.6, 0.3), (70, 90, 130), strict=True):
            response = np.exp(-np.pi * width * ring) * np.sin(2 * np.pi * formant * ring)
            sound += level * np.convolve(vowel, response)[: len(time)]
    hiss = np.diff(rng.normal(size=len(time)), prepend=0) * (phase < 0.2)
    sound = sound / np.abs(sound).max() + 0.03 * hiss
    return (0.5 * sound / np.abs(sound).max()).astype(np.float32)


_VOWELS = ((730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410))


def encode(samples: Samples, rate: int, form: str = "wav-16") -> bytes:
    """The samples as a file of a form out of `FORMATS`; those of FFmpeg take one or two channels."""
    if form in FFMPEG_FORMATS:
        return _encode_by_ffmpeg(samples, rate, *FFMPEG_FORMATS[form])
    file = io.BytesIO()
    container, subtype = SOUNDFILE_FORMATS[form]
    sf.write(file, samples, rate, format=container, subtype=subtype)
    return file.getvalue()


def _encode_by_ffmpeg(
    samples: Samples, rate: int, container: str, codec: str, picture: bool = False
) -> bytes:
    samples = np.atleast_2d(samples.T)
    layout = {1: "mono", 2: "stereo"}[len(samples)]
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        video = None
        if picture:
            video = output.add_stream("mpeg4", rate=5, width=64, height=64, pix_fmt="yuv420p")
        if len(samples[0]):
            track = output.add_stream(codec, rate=rate, layout=layout)
            track.bit_rate = 64_000
            fifo = av.AudioFifo()
            resampler = av.AudioResampler(format=track.codec_context.format, layout=layout, rate=rate)
        if video:
            for i in range(10):
                picture_frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 * i, np.uint8), "rgb24")
                output.mux(video.encode(picture_frame))
            output.mux(video.encode(None))
        if len(samples[0]):
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), "fltp", layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
            for converted in resampler.resample(frame):
                fifo.write(converted)
            size = track.codec_context.frame_size or 1024
            while piece := fifo.read(size) or fifo.read(size, partial=True):
                output.mux(track.encode(piece))
            output.mux(track.encode(None))
    return file.getvalue()


def film(samples: Samples, rate: int) -> bytes:
    """An MP4 film of two seconds with moving pictures and this sound; none if there are no samples."""
    return _encode_by_ffmpeg(samples, rate, "mp4", "aac", picture=True)


def wav(
    data: bytes,
    *,
    rate: int = 16_000,
    channels: int = 1,
    bits: int = 16,
    floating: bool = False,
    claimed_size: int | None = None,
) -> bytes:
    """A WAV file with any header, true or not."""
    size = len(data) if claimed_size is None else claimed_size
    block = channels * bits // 8
    return (
        struct.pack("<4sI4s4sI", b"RIFF", min(size + 36, 0xFFFF_FFFF), b"WAVE", b"fmt ", 16)
        + struct.pack(
            "<HHIIHH",
            3 if floating else 1,
            channels,
            rate,
            rate * block & 0xFFFF_FFFF,
            block & 0xFFFF,
            bits,
        )
        + struct.pack("<4sI", b"data", size)
        + data
    )


def silent_opus(hours: float) -> bytes:
    """Hours of digital silence in Ogg Opus: about 450 kB an hour, 0.7 GB an hour when decoded at once."""
    packet = bytes([0b11111_0_11, 6]) + b"\xff\xfe" * 6  # six frames of 20 ms, each next to nothing
    per_page, packet_samples = 255, 6 * 960
    head = b"OpusHead" + struct.pack("<BBHIhB", 1, 1, 0, 48_000, 0, 0)
    tags = b"OpusTags" + struct.pack("<I4sI", 4, b"test", 0)
    pages = round(hours * 3600 * 48_000 / packet_samples / per_page)
    file = [_ogg_page([head], 0, 0, 2), _ogg_page([tags], 1, 0, 0)]
    for i in range(pages):
        granule = (i + 1) * per_page * packet_samples
        file.append(_ogg_page([packet] * per_page, i + 2, granule, 4 if i == pages - 1 else 0))
    return b"".join(file)


def _ogg_page(packets: list[bytes], sequence: int, granule: int, flags: int) -> bytes:
    header = struct.pack("<4sBBqIII", b"OggS", 0, flags, granule, 1, sequence, 0)
    page = header + bytes([len(packets), *map(len, packets)]) + b"".join(packets)
    crc = 0
    for byte in page:
        crc = (crc << 8 & 0xFFFF_FFFF) ^ _OGG_CRC[crc >> 24 ^ byte]
    return page[:22] + struct.pack("<I", crc) + page[26:]


def _ogg_crc_of(byte: int) -> int:
    crc = byte << 24
    for _ in range(8):
        crc = (crc << 1 ^ (0x04C1_1DB7 if crc & 0x8000_0000 else 0)) & 0xFFFF_FFFF
    return crc


_OGG_CRC = [_ogg_crc_of(byte) for byte in range(256)]


def playlists(target: str) -> dict[str, bytes]:
    """Files that ask a decoder to read `target`, a path or address."""
    return {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{target}\n#EXT-X-ENDLIST\n".encode(),
        "concat": f"ffconcat version 1.0\nfile '{target}'\n".encode(),
        "dash": (
            '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
            'profiles="urn:mpeg:dash:profile:isoff-on-demand:2011" mediaPresentationDuration="PT9S"><Period>'
            '<AdaptationSet mimeType="audio/mp4"><Representation id="1" bandwidth="1">'
            f"<BaseURL>{target}</BaseURL></Representation></AdaptationSet></Period></MPD>"
        ).encode(),
        "sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
    }


def hostile() -> dict[str, tuple[bytes, str]]:
    """Files that must be refused, each with the `code` of the error that must say so."""
    rng = np.random.default_rng(0)
    second = tone(1.0)[:, 0]
    spoilt = {value: second.copy() for value in (np.nan, np.inf, -np.inf)}
    for value, samples in spoilt.items():
        samples[8_000] = value
    vorbis = encode(tone(1.0), 16_000, "ogg-vorbis")
    return {
        "empty": (b"", "empty_audio"),
        "one byte": (b"R", "undecodable_audio"),
        "random bytes": (rng.bytes(100_000), "undecodable_audio"),
        "zeros": (bytes(100_000), "undecodable_audio"),
        "text": (b"Dear service, please transcribe.\n" * 500, "undecodable_audio"),
        "html": (b"<!doctype html><title>404</title>" + b"<p>Not found" * 500, "undecodable_audio"),
        "wav header only": (wav(b"", claimed_size=32_000), "empty_audio"),
        "wav of 0 samples": (wav(b""), "empty_audio"),
        "50 ms": (encode(tone(0.05), 16_000), "empty_audio"),
        "flac header only": (encode(tone(1.0), 16_000, "flac")[:42], "undecodable_audio"),
        "ogg header only": (vorbis[:200], "undecodable_audio"),
        "half an ogg header": (vorbis[: len(vorbis) // 3], "undecodable_audio"),
        "silent wav": (wav(bytes(64_000)), "silent_audio"),
        "silent opus": (silent_opus(0.01), "silent_audio"),
        "all but silent": (wav(rng.integers(-2, 3, 32_000, np.int16).tobytes()), "silent_audio"),
        "nan": (encode(spoilt[np.nan], 16_000, "wav-float"), "non_finite_audio"),
        "infinity": (encode(spoilt[np.inf], 16_000, "wav-float"), "non_finite_audio"),
        "minus infinity": (encode(spoilt[-np.inf], 44_100, "wav-float"), "non_finite_audio"),
        "integers as floats": (encode(second * 32_767, 16_000, "wav-float"), "undecodable_audio"),
        "1000 channels": (wav(bytes(2_000_000), channels=1000), "undecodable_audio"),
        "33 channels": (wav(rng.bytes(66_000), channels=33), "undecodable_audio"),
        "0 channels": (wav(rng.bytes(64_000), channels=0), "undecodable_audio"),
        "rate 0": (wav(rng.bytes(64_000), rate=0), "undecodable_audio"),
        "rate 999": (wav(rng.bytes(64_000), rate=999), "undecodable_audio"),
        "rate 4 GHz": (wav(rng.bytes(64_000), rate=4_000_000_000), "undecodable_audio"),
        "film without sound": (film(np.empty(0, np.float32), 16_000), "undecodable_audio"),
        "picture": (_picture(), "undecodable_audio"),
        "zip": (b"PK\x03\x04" + rng.bytes(50_000), "undecodable_audio"),
    }


def _picture() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="image2pipe") as output:
        stream = output.add_stream("png", rate=1, width=64, height=64, pix_fmt="rgb24")
        frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), "rgb24")
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()
