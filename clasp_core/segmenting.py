"""Cuts a recording into the spans that are embedded and found: stretches of speech between pauses.

Owns voice activity and the rules of cutting; takes any stream of samples, and leaves embedding to others.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TypeAlias

import numpy as np

from clasp_core.audio import SILENCE
from clasp_core.silero import FRAME_SAMPLES, TOGETHER, VoiceActivity
from clasp_core.types import SAMPLING_RATE, Seconds, Segment, Waveform

SpeechProbability: TypeAlias = Callable[[Waveform], float]
"""From one frame, shape (512,), to the probability in [0, 1] that it is speech; called once, in order, for
every frame of one recording, so it may carry state. The last frame is filled up with zeros."""
_Heard: TypeAlias = tuple[Waveform, float]
"""A frame, and how likely it is speech."""


@dataclass(frozen=True, slots=True)
class SegmentConfig:
    """The rules of cutting; all but the probabilities in seconds. ValueError if they contradict each other.

    Speech starts at a frame of probability `threshold` and goes on while frames stay above `low_threshold`.
    Padding counts towards `max_s` and `join_s`, not towards `min_s` and `keep_s`.
    """

    whole_s: Seconds = 10.0
    """Recordings up to this long are one segment."""
    pad_s: Seconds = 0.2
    """Margin kept on both sides of speech; the voice detector is late on soft consonants."""
    min_pause_s: Seconds = 0.5
    """A pause this long ends a run of speech; at least twice `pad_s`."""
    join_gap_s: Seconds = 1.0
    """Runs further apart are never joined."""
    join_s: Seconds = 4.0
    """Neighbouring runs are joined while the whole stays this short."""
    min_s: Seconds = 1.0
    """Runs with less speech are joined even beyond `join_s`, up to `max_s`."""
    keep_s: Seconds = 0.2
    """Runs that found no neighbour are dropped if they are shorter: clicks and coughs."""
    max_s: Seconds = 15.0
    """No segment is longer; longer runs are cut where speech is least likely."""
    threshold: float = 0.5
    low_threshold: float = 0.35

    def __post_init__(self) -> None:
        if not 0 <= 2 * self.pad_s <= self.min_pause_s:
            raise ValueError("min_pause_s must be at least twice pad_s, or segments would overlap")
        if not (0 < self.keep_s <= self.min_s <= self.max_s / 4 and self.join_s <= self.max_s):
            raise ValueError("keep_s <= min_s <= max_s / 4 and join_s <= max_s must hold")
        if not (self.whole_s >= 0 and self.max_s >= 1):
            raise ValueError("whole_s may not be negative, and max_s must be at least 1")
        if not 0 <= self.low_threshold <= self.threshold <= 1:
            raise ValueError("0 <= low_threshold <= threshold <= 1 must hold")


DEFAULT_CONFIG = SegmentConfig()


def split(
    blocks: Iterable[Waveform],
    config: SegmentConfig = DEFAULT_CONFIG,
    *,
    speech_probability: SpeechProbability | None = None,
) -> Iterator[Segment]:
    """Yield the segments of one recording: in order, without overlap, each at most `config.max_s` long
    (or `config.whole_s` for the only segment of a short recording), with exactly the samples of its span.

    blocks: the recording's samples in order, in pieces of any size, which has no influence on the result.
    speech_probability: replaces Silero's voice activity model, for one recording.

    Holds at most about five times `max_s` of samples. Where no speech is found, sound is not lost: a short
    recording is yielded whole, and a longer one in equal windows, of which those without any peak of -80 dBFS
    are left out. If speech starts only later than three times `max_s`, the sound before it is yielded in
    windows too, for by then memory demands a decision. Sound between and after speech is left out.
    """
    if speech_probability is None:
        heard = _listened(_frames(blocks))
    else:
        heard = ((frame, _heard(frame, speech_probability)) for frame in _frames(blocks))
    head: list[_Heard] = []
    length = 0
    for frame, probability in heard:
        head.append((frame, probability))
        length += len(frame)
        if length > config.whole_s * SAMPLING_RATE:
            break
    if length > config.whole_s * SAMPLING_RATE:
        yield from _Splitter(config).segments(chain(head, heard))
    elif head:
        yield from _short(head, config)


def with_pictured(
    segments: Iterable[Segment], blocks: Iterable[Waveform], sampling_rate: int
) -> Iterator[Segment]:
    """Give each segment, as `pictured`, the same span of a second decoding of its recording.

    blocks: the recording at `sampling_rate` Hz. Both streams are read forward together, so memory holds
    little more than one segment of the second. A span's end is cut off with the recording's: resampling
    to two rates may differ by a sample.
    """
    stream, kept, start = iter(blocks), np.empty(0, np.float32), 0
    for segment in segments:
        first = round(segment.start_s * sampling_rate)
        last = round(segment.end_s * sampling_rate)
        while start + len(kept) < last and (block := next(stream, None)) is not None:
            passed = min(max(0, first - start), len(kept))
            kept, start = np.concatenate((kept[passed:], block)), start + passed
        yield replace(segment, pictured=kept[max(0, first - start) : last - start].copy())


def _listened(frames: Iterator[Waveform]) -> Iterator[_Heard]:
    """Frames with what Silero takes them for."""
    probabilities = VoiceActivity()
    while some := list(islice(frames, TOGETHER)):
        samples = np.concatenate(some)
        samples = np.pad(samples, (0, TOGETHER * FRAME_SAMPLES - len(samples)))
        yield from zip(some, probabilities(samples).tolist(), strict=False)


def _heard(frame: Waveform, speech_probability: SpeechProbability) -> float:
    if len(frame) == FRAME_SAMPLES:
        return speech_probability(frame)
    return speech_probability(np.pad(frame, (0, FRAME_SAMPLES - len(frame))))


def _frames(blocks: Iterable[Waveform]) -> Iterator[Waveform]:
    """The same samples in frames of their own memory; the last may be shorter than the others."""
    rest = np.empty(0, np.float32)
    for block in blocks:
        samples = np.concatenate([rest, block]) if len(rest) else np.asarray(block, np.float32)
        whole = len(samples) - len(samples) % FRAME_SAMPLES
        for start in range(0, whole, FRAME_SAMPLES):
            yield samples[start : start + FRAME_SAMPLES].copy()
        rest = samples[whole:].copy()
    if len(rest):
        yield rest


def _short(head: list[_Heard], config: SegmentConfig) -> Iterator[Segment]:
    """A short recording: all of it, without what lies before and after speech."""
    samples = np.concatenate([frame for frame, _ in head])
    speech = [i for i, (_, probability) in enumerate(head) if probability >= config.threshold]
    start, end = 0, len(samples)
    if speech:
        last = speech[-1]
        while last + 1 < len(head) and head[last + 1][1] >= config.low_threshold:
            last += 1
        pad = round(config.pad_s * SAMPLING_RATE)
        start = max(0, speech[0] * FRAME_SAMPLES - pad)
        end = min(end, (last + 1) * FRAME_SAMPLES + pad)
    if _audible(samples):
        yield Segment(start / SAMPLING_RATE, end / SAMPLING_RATE, samples[start:end])


def _audible(samples: Waveform) -> bool:
    return float(np.abs(samples).max(initial=0)) >= SILENCE


@dataclass(slots=True)
class _Run:
    """Speech from sample `start` up to `end`, padding excluded. `cut`: speech goes on right at `end`."""

    start: int
    end: int
    cut: bool = False


class _Splitter:
    """The rules for a long recording, frame by frame.

    Speech is first gathered in the open run; a pause or the length limit closes it. The closed run waits
    for a neighbour to be joined with, and is yielded when none can come any more. All positions are samples
    from the start of the recording.
    """

    def __init__(self, config: SegmentConfig) -> None:
        def samples(seconds: Seconds) -> int:
            return round(seconds * SAMPLING_RATE)

        self._threshold, self._low_threshold = config.threshold, config.low_threshold
        self._pad, self._min_pause = samples(config.pad_s), samples(config.min_pause_s)
        self._join_gap, self._join = samples(config.join_gap_s), samples(config.join_s)
        self._min, self._keep, self._max = map(samples, (config.min_s, config.keep_s, config.max_s))

        self._tape: deque[_Heard] = deque()  # frames still needed, with their probabilities
        self._tape_start = 0
        self._now = 0  # the end of the tape
        self._open: _Run | None = None
        self._waiting: _Run | None = None
        self._taken = 0  # up to here everything is yielded or given up
        self._found = False  # speech, anywhere so far

    def segments(self, frames: Iterable[_Heard]) -> Iterator[Segment]:
        for frame, probability in frames:
            self._tape.append((frame, probability))
            self._now += len(frame)
            yield from self._listen(probability, self._now - len(frame))
            speech = self._found or self._open or self._waiting
            if not speech and self._now - self._taken >= 3 * self._max:
                yield from self._window(self._max)
            self._forget()
        yield from self._close()
        yield from self._release()
        if not self._found:
            length = self._now - self._taken
            count = -(-length // self._max)
            for i in range(count):
                yield from self._window(length * (i + 1) // count - length * i // count)

    def _listen(self, probability: float, start: int) -> Iterator[Segment]:
        """Go on by the frame that begins at `start`: open, prolong, cut or close a run."""
        if self._open is None:
            if probability >= self._threshold:
                self._open = _Run(start, self._now)
            elif self._waiting and start - self._waiting.end > self._join_gap:
                yield from self._release()
        elif probability >= self._low_threshold:
            self._open.end = self._now
            if self._now > self._limit(self._open):
                yield from self._cut()
        elif self._now - self._open.end >= self._min_pause:
            yield from self._close()

    def _start(self, run: _Run) -> int:
        return max(run.start - self._pad, self._taken)

    def _limit(self, run: _Run) -> int:
        """How far a segment that begins with this run may reach."""
        return self._start(run) + self._max

    def _cut(self) -> Iterator[Segment]:
        """End the open run, too long by one frame, where it is least like speech, and open the rest."""
        assert self._open is not None
        run = self._open
        # Not near the end, or the rest might be too short to be a segment of its own.
        first = (self._limit(run) - self._max // 2 - self._tape_start) // FRAME_SAMPLES + 1
        stop = (self._limit(run) - self._min - self._tape_start) // FRAME_SAMPLES
        # Averaged over five frames, so that the middle of the longest small pause wins.
        around = list(islice(self._tape, first - 2, stop + 2))
        smooth = np.full(5, 0.2)
        unlikely = np.convolve([probability for _, probability in around], smooth, "valid")
        energy = np.convolve([float(np.square(frame).mean()) for frame, _ in around], smooth, "valid")
        # Rounded: among frames that are all but surely speech, the quietest is the better place.
        best = int(np.lexsort((energy, unlikely.round(1)))[0])
        place = self._tape_start + (first + best) * FRAME_SAMPLES + FRAME_SAMPLES // 2
        rest = _Run(place, run.end)
        run.end, run.cut = place, True
        yield from self._close()
        yield from self._release()  # with what follows it would be too long
        self._open = rest

    def _close(self) -> Iterator[Segment]:
        """The open run becomes the waiting one, alone or joined with the one that waited."""
        run, self._open = self._open, None
        if run is None:
            return
        before = self._waiting
        if before and run.start - before.end <= self._join_gap:
            length = run.end + (0 if run.cut else self._pad) - self._start(before)
            short = min(before.end - before.start, run.end - run.start) < self._min
            if length <= (self._max if short else self._join):
                self._waiting = _Run(before.start, run.end, run.cut)
                return
        yield from self._release()
        self._waiting = run

    def _release(self) -> Iterator[Segment]:
        """Yield the waiting run, padded, unless it is too short to be speech."""
        run, self._waiting = self._waiting, None
        if run and run.end - run.start >= self._keep:
            start = self._start(run)
            end = run.end if run.cut else min(run.end + self._pad, self._now, start + self._max)
            self._found = True
            self._taken = end
            yield self._segment(start, end)

    def _window(self, length: int) -> Iterator[Segment]:
        """Yield the next stretch of a recording without speech, if there is anything to be heard."""
        start, self._taken = self._taken, self._taken + length
        segment = self._segment(start, self._taken)
        if _audible(segment.waveform):
            yield segment

    def _segment(self, start: int, end: int) -> Segment:
        first = (start - self._tape_start) // FRAME_SAMPLES
        last = -((self._tape_start - end) // FRAME_SAMPLES)
        samples = np.concatenate([frame for frame, _ in islice(self._tape, first, last)])
        offset = self._tape_start + first * FRAME_SAMPLES
        return Segment(start / SAMPLING_RATE, end / SAMPLING_RATE, samples[start - offset : end - offset])

    def _forget(self) -> None:
        """Drop the frames that no segment to come can contain."""
        oldest = self._waiting or self._open
        needed = self._taken
        if self._found:
            needed = max(needed, (oldest.start if oldest else self._now) - self._pad)
        while self._tape and self._tape_start + FRAME_SAMPLES <= needed:
            self._tape_start += len(self._tape.popleft()[0])
