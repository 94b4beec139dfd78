"""The spectrogram picture that the paper's second branch looks at, drawn without the plotting library.

CLASP feeds its image network a plot: `librosa.display.specshow(db, x_axis="time", y_axis="log")`, saved with
a tight bounding box, frame and tick labels included (arXiv 2412.13071; clasp-inference.ipynb, cell 12). What
the network learned, it learned from that picture, so every pixel counts. Owns the picture alone: decoding and
resampling come before it, the network after it. docs/spectrogram.md tells how close it comes.

Drawing such a plot is a table look-up. The mesh is not antialiased, so each pixel shows one cell of the STFT,
and which one follows from the number of frames, as the frame and the tick labels do. Only the decibels need
arithmetic.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

PICTURE_RATE = 22_050
"""Hz of the waveforms drawn here: librosa's default, not the speech encoders' 16 kHz."""

HEIGHT, WIDTH = 450, 610

_FFT, _HOP = 2048, 512
_BINS = _FFT // 2 + 1
_MIN_POWER = 1e-10  # amplitude_to_db's amin of 1e-5, squared
_TOP_DB = np.float32(80)

# Lengths in the figure, in pixels of 1/100 inch.
_FIGURE_WIDTH = 640
_MARGIN = 1.08 * 10 / 72 / 6.4  # tight_layout's: of the width, 15 pixels that the tight crop takes off again
_LABEL_GAP = 7 / 72 * 100  # between tick labels and axes
_LINE_HEIGHT, _LINE_ASCENT = 14, 11  # of any text: that of "lp"
_BOTTOM = _LINE_HEIGHT + _LABEL_GAP

# Of the pixels' rows and columns: the black lines of the frame. The right one's column depends on the labels.
_TOP_ROW, _BOTTOM_ROW, _LEFT_COLUMN = 0, 426, 45
_MESH_ROWS = slice(_TOP_ROW + 1, _BOTTOM_ROW)
_MESH_COLUMNS = slice(_LEFT_COLUMN + 1, WIDTH)

# How much of 255 a line covers across, 0.8 points thick: one pixel and 1/18 of each neighbour. Ticks end in
# the middle of a pixel; the frame's lines 1/18 beyond one.
_FAINT = 14
_BESIDE, _TICK_END, _FRAME_END = (_FAINT, 255, _FAINT), (7, 128, 7), (1, _FAINT, 1)

# Places of the colour maps in the data file.
_COOLWARM, _MAGMA = 0, 1

# The codes of pixels: a level of colour, as it is, under one line's faint edge, or under two; or a grey.
_ONCE_FAINT, _TWICE_FAINT, _GREY = 256, 512, 768

_FRAMES_AT_ONCE = 2048
"""Pictures of waveforms with at most so many frames in all are drawn in one go; about 50 s."""

_BLOCK = 64
"""Frames transformed at once: 1 MB each for them and their spectra, which a processor's cache holds."""


def render(waveform: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The picture of one waveform (n,) at 22,050 Hz: uint8 (450, 610, 3), blue first, on the CPU.

    In memory the three colours lie one after the other, as networks want them.

    The reference crops to what it drew, `reference_width` columns; here it is always 610, and the columns at
    the right that the reference would have cropped off show what it would have drawn there.

    Loudness matters: the colours span the waveform's own range of decibels, but their signs pick the colour
    map.

    Raises ValueError for a waveform that is empty, not one-dimensional, not finite, or so loud that its power
    overflows.
    """
    drawn: NDArray[np.uint8] = _on_cpu()([waveform])[0].permute(1, 2, 0).numpy()
    return drawn


def reference_width(samples: int) -> int:
    """How many columns the reference's picture of so many samples at 22,050 Hz has: 608 to 610, of hours 606.

    It follows from the length alone: how far the last tick's label reaches over the axes' end. Raises
    ValueError for less than one sample.
    """
    if samples < 1:
        raise ValueError(f"a waveform has at least one sample, not {samples}")
    return _time_axis(1 + samples // _HOP).reference_width


class SpectrogramPictures(nn.Module):
    """Draws the same pictures in batches by torch, on whichever device the module is.

    Waveforms, each (n,) float32 at 22,050 Hz, to uint8 (batch, 3, 450, 610), blue first: 0 to 255 as the
    reference feeds them to its network. Each picture is independent of its batch. Memory beside the pictures
    is bounded whatever the waveforms' lengths. Raises as `render`. Not differentiable. The device has to know
    float64, as CPUs and CUDA do.
    """

    _window_bits: Tensor
    _bins: Tensor
    _bin_of_row: Tensor
    _palettes: Tensor

    def __init__(self) -> None:
        super().__init__()
        bins, bin_of_row = np.unique(_bins_of_rows(), return_inverse=True)
        for name, values in {
            # As integers, which `half()` and `to(dtype)` leave alone.
            "_window_bits": (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_FFT) / _FFT)).view(np.int64),
            "_bins": bins,
            "_bin_of_row": bin_of_row.astype(np.int32)[:, None],
            "_palettes": _palettes(),
        }.items():
            self.register_buffer(name, torch.from_numpy(values), persistent=False)
        self._blanks: dict[tuple[int, bool, torch.device], Tensor] = {}

    @torch.no_grad()
    def forward(self, waveforms: Sequence[NDArray[np.float32]]) -> Tensor:
        checked = [_checked(waveform) for waveform in waveforms]
        pictures = self._palettes.new_empty((len(checked), 3, HEIGHT, WIDTH))
        start = 0
        while start < len(checked):
            stop, frames = start + 1, _frames(checked[start])
            while stop < len(checked) and frames + _frames(checked[stop]) <= _FRAMES_AT_ONCE:
                frames += _frames(checked[stop])
                stop += 1
            self._draw(checked[start:stop], pictures[start:stop])
            start = stop
        return pictures

    def _draw(self, waveforms: Sequence[NDArray[np.float32]], pictures: Tensor) -> None:
        device = pictures.device
        axes = [_time_axis(_frames(waveform)) for waveform in waveforms]
        cells, highest, lowest, map_of = self._measure(waveforms, axes)

        # Colours span what there is, at most 80 dB of it. Without a span, in silence, everything is level 0.
        bottom = np.maximum(lowest, highest - _TOP_DB)
        span = highest.astype(np.float64) - bottom
        frames_of = [len(axis.frames) for axis in axes]
        of_frames = np.repeat(np.stack((bottom, np.where(span > 0, span, 1))), frames_of, axis=1)
        bottoms, spans = torch.from_numpy(of_frames).to(device)[..., None]
        # In the reference's precisions: the difference is rounded to float32, the division done in float64.
        above = (_decibels(cells) - bottoms.float()).clamp_(min=0)
        levels = ((above.double() / spans).float() * 256).clamp_(max=255).to(torch.uint8)

        for picture, axis, own, colour_map in zip(
            pictures, axes, levels.split(frames_of), map_of, strict=True
        ):
            codes = self._blank(axis).clone()
            codes[_BOTTOM_ROW:] = torch.from_numpy(_time_labels(axis)).to(device)
            if len(own):
                first_of_column = torch.from_numpy(axis.frame_of_column * own.shape[1]).to(device)
                shown = own.view(-1).index_select(0, (self._bin_of_row + first_of_column).view(-1))
                codes[_MESH_ROWS, _MESH_COLUMNS.start : axis.right_column] += shown.view(
                    -1, len(first_of_column)
                )
            flat = codes.view(-1)
            for channel, palette in zip(picture, self._palettes[colour_map], strict=True):
                torch.index_select(palette, 0, flat, out=channel.view(-1))

    def _blank(self, axis: "_TimeAxis") -> Tensor:
        """The codes of a picture (450, 610) without time labels, every cell at level 0. Few ever differ."""
        key = axis.right_column, len(axis.frames) > 0, self._palettes.device
        if key not in self._blanks:
            self._blanks[key] = torch.from_numpy(_blank(*key[:2])).to(key[2])
        return self._blanks[key]

    def _measure(
        self, waveforms: Sequence[NDArray[np.float32]], axes: Sequence["_TimeAxis"]
    ) -> tuple[Tensor, NDArray[np.float32], NDArray[np.float32], NDArray[np.int32]]:
        """The power of the cells shown (frames, bins); each waveform's highest and lowest dB and colour map.

        Blocks of frames run over all waveforms, laid end to end with librosa's zeros around each; the three
        frames across each border belong to none.
        """
        device = self._palettes.device
        lengths = [_frames(waveform) for waveform in waveforms]
        starts = [0, *np.cumsum(np.array(lengths) + 3).tolist()]
        sound = np.zeros(starts[-1] * _HOP, np.float32)
        for start, waveform in zip(starts, waveforms, strict=False):
            sound[start * _HOP + _FFT // 2 :][: len(waveform)] = waveform
        frames = torch.from_numpy(sound).to(device).unfold(0, _FFT, _HOP)
        shown = np.concatenate([start + axis.frames for start, axis in zip(starts, axes, strict=False)])

        cells: list[Tensor] = []
        facts: list[Tensor] = []
        for start in range(0, len(frames), _BLOCK):
            power = self._power(frames[start : start + _BLOCK])
            here = shown[slice(*np.searchsorted(shown, (start, start + _BLOCK)))] - start
            cells.append(power.index_select(0, torch.from_numpy(here).to(device)).index_select(1, self._bins))
            facts.append(torch.stack((power.amax(1), power.amin(1), (power < 1).sum(1), (power <= 1).sum(1))))
        of_frames = torch.cat(facts, dim=1).cpu()

        of_waveforms = [of_frames[:, start : start + n] for start, n in zip(starts, lengths, strict=False)]
        extremes = torch.stack([torch.stack((of[0].amax(), of[1].amin())) for of in of_waveforms], dim=1)
        if not torch.isfinite(extremes).all():
            raise ValueError("the waveform's power overflows; scale it to [-1, 1]")
        highest, lowest = _decibels(extremes).numpy()
        map_of = np.empty(len(waveforms), np.int32)
        for n, (of, start, length) in enumerate(zip(of_waveforms, starts, lengths, strict=False)):
            own = frames[start : start + length]
            below, up_to = of[2:].double().sum(1).long().tolist()
            # librosa's choice: the map of two hues if the 2nd and the 98th percentile differ in sign.
            map_of[n] = (
                _COOLWARM
                if (
                    highest[n] < _TOP_DB
                    and self._percentile(own, 2, below, strict=True) < 0
                    and self._percentile(own, 98, up_to, strict=False) > 0
                )
                else _MAGMA
            )
        return torch.cat(cells), highest, lowest, map_of

    def _power(self, frames: Tensor) -> Tensor:
        # In float64 and rounded afterwards, as librosa does it.
        spectra = torch.fft.rfft(frames * self._window_bits.view(torch.float64))
        parts = torch.view_as_real(spectra).float().square_()
        return parts[..., 0] + parts[..., 1]

    def _percentile(self, frames: Tensor, percent: int, below: int, *, strict: bool) -> float:
        """A number with the sign of a percentile of the frames' decibels.

        `below` of them are negative, or if not `strict`, at most 0. That nearly always tells; else 0 lies
        between the two values that the percentile interpolates, and they have to be found.
        """
        place = percent / 100 * (len(frames) * _BINS - 1)
        if below <= math.floor(place):
            return 1
        if below >= math.floor(place) + 2:
            return -1
        lower, upper = 0.0, math.inf
        for start in range(0, len(frames), _BLOCK):
            power = self._power(frames[start : start + _BLOCK])
            is_below = power < 1 if strict else power <= 1
            lower = max(lower, float(power.where(is_below, 0).amax()))
            upper = min(upper, float(power.where(~is_below, math.inf).amin()))
        lower_db, upper_db = (10 * math.log10(max(_MIN_POWER, power)) for power in (lower, upper))
        return lower_db + (upper_db - lower_db) * (place - math.floor(place))


@cache
def _on_cpu() -> SpectrogramPictures:
    return SpectrogramPictures()


def _checked(waveform: NDArray[np.float32]) -> NDArray[np.float32]:
    samples = np.asarray(waveform, np.float32)
    if samples.ndim != 1 or not samples.size:
        raise ValueError(f"a waveform has the shape (n,) with n > 0, not {samples.shape}")
    if not np.isfinite(samples).all():
        raise ValueError("the waveform holds NaN or infinity")
    return samples


def _frames(waveform: NDArray[np.float32]) -> int:
    return 1 + len(waveform) // _HOP


def _decibels(power: Tensor) -> Tensor:
    return power.clamp(min=_MIN_POWER).log10_().mul_(10)


# --- Where things are ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _TimeAxis:
    """What the number of STFT frames decides.

    frames: those shown anywhere, ascending. frame_of_column: the place in `frames` of what each column of the
    mesh shows. right_column: where the axes end. reference_width: where the reference crops. ticks: their
    columns. labels: texts, and where they start.
    """

    frames: NDArray[np.int64]
    frame_of_column: NDArray[np.int32]
    right_column: int
    reference_width: int
    ticks: tuple[int, ...]
    labels: tuple[tuple[str, float], ...]


@lru_cache(maxsize=256)
def _time_axis(n_frames: int) -> _TimeAxis:
    # A cell reaches half a hop to both sides of its frame's time; a single frame's cell has no width, and
    # matplotlib widens its axis.
    times = np.arange(n_frames) * _HOP / PICTURE_RATE
    if n_frames == 1:
        edges = np.zeros(2)
        low, high = -0.055, 0.055
    else:
        half = np.diff(times) * 0.5
        edges = np.concatenate((times[:1] - half[:1], times[:-1] + half, times[-1:] + half[-1:]))
        low, high = float(edges[0]), float(edges[-1])
    ticks = _time_ticks(low, high)
    texts = [_time_text(tick, high - low) for tick in ticks]
    scale = 1 / (high - low)

    def placed(left: float, right: float) -> tuple[float, float]:
        return (right - left) * scale, (right - left) * (-low * scale) + left

    def rightmost(slope: float, offset: float) -> float:
        ends = [slope * t + offset + _text_width(text) / 2 for t, text in zip(ticks, texts, strict=True)]
        return max(slope * high + offset, *ends)

    # tight_layout makes room at the right for as much as hangs over where the axes are at first. All in
    # matplotlib's order of operations, because some edges fall on the middle of a pixel exactly.
    first_left, first_right = 0.125 * _FIGURE_WIDTH, 0.9 * _FIGURE_WIDTH
    over_left = 0.125 - (first_left - _LABEL_GAP - _widest_label()) * (1 / _FIGURE_WIDTH)
    over_right = max(first_right, rightmost(*placed(first_left, first_right))) * (1 / _FIGURE_WIDTH) - 0.9
    left = (over_left + _MARGIN) * _FIGURE_WIDTH
    right = (1 - (max(over_right, 0) + _MARGIN)) * _FIGURE_WIDTH
    end = max(right, rightmost(*placed(left, right)))
    right -= 15
    slope, offset = placed(_widest_label() + _LABEL_GAP, right)
    positions = [slope * tick + offset for tick in ticks]

    right_column = math.floor(right + 0.5)
    columns = np.arange(_MESH_COLUMNS.start, right_column if n_frames > 1 else _MESH_COLUMNS.start)
    snapped = np.floor(slope * edges + offset + 0.5)
    shown = np.searchsorted(snapped, columns, side="right") - 1
    frames, frame_of_column = np.unique(shown, return_inverse=True)
    return _TimeAxis(
        frames,
        frame_of_column.astype(np.int32),
        right_column,
        int((end / 100 - 0.15) * 100),
        tuple(math.floor(x + 0.5) for x in positions),
        tuple((text, x - _text_width(text) / 2) for text, x in zip(texts, positions, strict=True)),
    )


def _time_ticks(low: float, high: float) -> list[float]:
    """The ticks of matplotlib's MaxNLocator(nbins=10, steps=[1, 1.5, 5, 6, 10]) within the limits, in s."""
    stairs = np.array([1, 1.5, 5, 6, 10])
    steps = np.concatenate((0.1 * stairs[:-1], stairs, [10 * stairs[1]])) * 10 ** (
        math.log10((high - low) / 10) // 1
    )
    wide_enough = np.nonzero(steps >= (high - low) / 10)[0]
    ticks = np.empty(0)
    for step in steps[: wide_enough[0] + 1][::-1]:
        base = (low // step) * step
        first, rest = divmod(low - base, step)
        first += abs(rest / step - 1) < 1e-10
        last, rest = divmod(high - base, step)
        last += abs(rest / step) >= 1e-10
        ticks = np.arange(first, last + 1) * step + base
        if ((ticks <= high) & (ticks >= low)).sum() >= 2:
            break
    slack = (high - low) * 1e-10
    return [float(tick) for tick in ticks if low - slack <= tick <= high + slack]


def _time_text(tick: float, span_s: float) -> str:
    """librosa's TimeFormatter. Two digits: 10.5 s reads 10, as in the paper's pictures."""
    if span_s > 3600:
        return f"{int(tick / 3600)}:{int(tick / 60 % 60):02d}:{int(tick % 60):02d}"
    if span_s > 60:
        return f"{int(tick / 60)}:{int(tick % 60):02d}"
    return f"{tick:.2g}" if span_s >= 1 else f"{tick:.3f}"


_FREQUENCY_TICKS = (0, *(2**octave for octave in range(6, 14)))


@cache
def _widest_label() -> float:
    """Of the frequencies: the axes begin to its right."""
    return max(_text_width(str(tick)) for tick in _FREQUENCY_TICKS)


def _depths(frequencies: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far below the picture's top frequencies in Hz are, in pixels."""
    half_bin = PICTURE_RATE / _FFT / 2
    low, high = _stretched(np.array([-half_bin, PICTURE_RATE / 2 + half_bin]))
    pixels_per_unit = (HEIGHT - _BOTTOM) / (high - low)
    depths: NDArray[np.float64] = HEIGHT - _BOTTOM - pixels_per_unit * (_stretched(frequencies) - low)
    return depths


def _stretched(frequencies: NDArray[np.float64]) -> NDArray[np.float64]:
    """matplotlib's symmetric logarithm as specshow sets it: linear up to the note C2, 65.4 Hz, an octave's
    width; logarithmic beyond."""
    c2 = 440 * 2.0 ** ((36 - 69) / 12)
    octaves = np.log(np.maximum(np.abs(frequencies), c2) / c2) / np.log(2)
    return np.where(np.abs(frequencies) <= c2, frequencies, np.sign(frequencies) * c2 * (1 + octaves))


def _bins_of_rows() -> NDArray[np.int64]:
    """Which of the STFT's bins each row of the mesh shows; a bin's cell reaches half a bin up and down."""
    edges: NDArray[np.float64] = (np.arange(_BINS + 1, dtype=np.float64) - 0.5) * (PICTURE_RATE / _FFT)
    snapped = np.floor(_depths(edges) + 0.5)
    rows = np.arange(_MESH_ROWS.start, _MESH_ROWS.stop)
    return _BINS - np.searchsorted(snapped[::-1], rows, side="right")


# --- What is drawn ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Print:
    """Tick labels' letters and the colour maps, as tests/make_spectrogram_data.py tells."""

    letters: str
    coverage: NDArray[np.uint8]
    left: NDArray[np.int8]
    bearing: NDArray[np.int16]
    advance: NDArray[np.int16]
    colours: NDArray[np.uint8]


@cache
def _print() -> _Print:
    with np.load(Path(__file__).parent / "data" / "spectrogram.npz", allow_pickle=False) as data:
        return _Print(
            letters=str(data["letters"]), **{name: data[name] for name in data if name != "letters"}
        )


def _palettes() -> NDArray[np.uint8]:
    """What each code looks like under each colour map: (maps, 3, codes), blue first."""
    colours = _print().colours
    once = _inked(colours, _FAINT)
    greys = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (2, 256, 3))
    codes = np.concatenate((colours, once, _inked(once, _FAINT), greys), axis=1)
    return np.ascontiguousarray(codes.transpose(0, 2, 1))


def _blank(right_column: int, has_mesh: bool) -> NDArray[np.int32]:
    grey = _frequency_labels().copy()
    _draw_frame(grey, 0, right_column)
    codes = grey.astype(np.int32) + _GREY
    if has_mesh:
        mesh = codes[_MESH_ROWS, _MESH_COLUMNS.start : right_column]
        mesh[:] = 0
        mesh[[0, -1]] += _ONCE_FAINT
        mesh[:, [0, -1]] += _ONCE_FAINT
    return codes


def _time_labels(axis: _TimeAxis) -> NDArray[np.int32]:
    """The codes of the rows from the frame's bottom line on."""
    ink = np.zeros((HEIGHT - _BOTTOM_ROW, WIDTH + 100), np.uint8)  # wide enough for labels that are cut off
    for column in axis.ticks:
        ink[: len(_TICK), column - 1 : column + 2] = _TICK
    baseline = round(HEIGHT - _BOTTOM + _LABEL_GAP + _LINE_ASCENT) - _BOTTOM_ROW
    for text, x in axis.labels:
        letters, bearing = _letters(text)
        height, width = letters.shape
        column = round(x + bearing)
        ink[baseline + 1 - height : baseline + 1, column : column + width] |= letters
    grey = np.minimum(_INKED_WHITE[ink[:, :WIDTH]], _frequency_labels()[_BOTTOM_ROW:])
    _draw_frame(grey, _BOTTOM_ROW, axis.right_column)
    return grey.astype(np.int32) + _GREY


def _draw_frame(grey: NDArray[np.uint8], first_row: int, right_column: int) -> None:
    """The axes' four lines, in a picture whose upper rows are missing."""
    for column in (_LEFT_COLUMN, right_column):
        _draw_line(grey, _TOP_ROW - 1 - first_row, _BOTTOM_ROW + 2 - first_row, column, _FRAME_END)
    for row in (_BOTTOM_ROW, _TOP_ROW):
        _draw_line(grey.T, _LEFT_COLUMN - 1, right_column + 2, row - first_row, _FRAME_END)


@cache
def _frequency_labels() -> NDArray[np.uint8]:
    grey = np.full((HEIGHT, WIDTH), 255, np.uint8)
    for tick, depth in zip(_FREQUENCY_TICKS, _depths(np.array(_FREQUENCY_TICKS, float)), strict=True):
        _draw_line(grey.T, _LEFT_COLUMN - 5, _LEFT_COLUMN + 1, math.floor(depth + 0.5), _TICK_END)
        x = _widest_label() - _text_width(str(tick))
        letters, bearing = _letters(str(tick))
        row = round(depth + _LINE_ASCENT / 2) + 1 - len(letters)
        _cover(grey, letters, row, round(x + bearing))
    return grey


def _draw_line(
    grey: NDArray[np.uint8], start: int, stop: int, column: int, ends: tuple[int, int, int]
) -> None:
    """A vertical line, of which the first and the last row hold the ends. Transposed, a horizontal one."""
    coverage = np.full((stop - start, 3), _BESIDE, np.uint8)
    coverage[[0, -1]] = ends
    _cover(grey, coverage, start, column - 1)


@lru_cache(maxsize=1024)
def _letters(text: str) -> tuple[NDArray[np.uint8], float]:
    """The ink of a line of text, and how far right of the pen it begins: letter by letter, as FreeType does.

    Its last row but one stands on the baseline.
    """
    shapes = _print()
    glyphs = [shapes.letters.index(letter) for letter in text]
    bearing = shapes.bearing[glyphs[0]] / 64
    height, width = shapes.coverage.shape[2:]
    ink = np.zeros((height, width * len(text)), np.uint8)
    pen = 0
    for glyph in glyphs:
        phase = pen % 64 // 8
        column = int(pen // 64 + shapes.left[glyph, phase] - bearing)
        ink[:, column : column + width] |= shapes.coverage[glyph, phase]
        pen += int(shapes.advance[glyph])
    return ink, bearing


def _text_width(text: str) -> float:
    shapes = _print()
    return float(sum(shapes.advance[shapes.letters.index(letter)] for letter in text)) / 64


def _cover(grey: NDArray[np.uint8], coverage: NDArray[np.uint8], row: int, column: int) -> None:
    """Put black ink on a part of the picture; what lies outside is lost."""
    height, width = coverage.shape
    inside = grey[max(row, 0) : row + height, max(column, 0) : column + width]
    coverage = coverage[max(-row, 0) :, max(-column, 0) :][: inside.shape[0], : inside.shape[1]]
    inside[:] = _inked(inside, coverage)


def _inked(value: NDArray[np.uint8], coverage: NDArray[np.uint8] | int) -> NDArray[np.uint8]:
    """Anti-Grain Geometry's blend of black into an opaque pixel, with its rounding."""
    ink = np.asarray(coverage, np.int32)
    blended = value.astype(np.int32) * 255 * (256 - ink) // (255 * 256 + ink)
    return np.where(ink == 255, 0, blended).astype(np.uint8)


_INKED_WHITE = _inked(np.full(256, 255, np.uint8), np.arange(256, dtype=np.uint8))
_TICK = np.array([_TICK_END, _BESIDE, _BESIDE, _BESIDE, _BESIDE, _TICK_END], np.uint8)
