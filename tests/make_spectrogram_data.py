"""Makes clasp_core/data/spectrogram.npz: what of the picture only matplotlib knows, letters and colours.

`python -m tests.make_spectrogram_data`, with the matplotlib that pyproject.toml bounds. The letters are those
of tick labels, DejaVu Sans at 10 points and 100 dots an inch, in each of the eight places between two pixels
where matplotlib's text layout may put one.

letters   the characters, in the order of the arrays' first axis
coverage  uint8 (letters, 8, 12, 11): how much of each pixel is ink; its last row but one ends on the baseline
left      int8 (letters, 8): first column of `coverage`, in pixels from the pen's whole pixel
bearing   int16 (letters,): left edge of the outline, in 1/64 pixel from the pen
advance   int16 (letters,): how far the pen moves, in 1/64 pixel
colours   uint8 (2, 256, 3): the maps coolwarm and magma, BGR
"""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import RendererAgg, get_hinting_flag
from matplotlib.font_manager import FontProperties
from numpy.typing import NDArray

DATA = Path(__file__).parent.parent / "clasp_core" / "data" / "spectrogram.npz"
LETTERS = "0123456789.:-"
PHASES = 8
HEIGHT, WIDTH = 12, 11


def main() -> None:
    DATA.parent.mkdir(exist_ok=True)
    np.savez_compressed(DATA, **made())
    print(f"{DATA}: {DATA.stat().st_size} bytes")


def made() -> dict[str, NDArray[Any]]:
    """The data file's arrays by name."""
    if not matplotlib.__version__.startswith("3.10."):
        raise SystemExit(
            f"matplotlib {matplotlib.__version__} draws other letters than the paper's; use 3.10"
        )
    font = RendererAgg(640, 480, 100)._prepare_font(FontProperties(size=10))
    flags = get_hinting_flag()

    coverage = np.zeros((len(LETTERS), PHASES, HEIGHT, WIDTH), np.uint8)
    left = np.zeros((len(LETTERS), PHASES), np.int8)
    bearing, advance = np.zeros((2, len(LETTERS)), np.int16)
    for n, letter in enumerate(LETTERS):
        font.set_text(letter, 0, flags=flags)
        advance[n] = font.get_width_height()[0]
        bearing[n] = font.get_bitmap_offset()[0]
        for spaces in range(PHASES):
            # A space is 35/8 pixels wide, so eight numbers of spaces give all eight phases. The 1 after
            # the letter, cut off again, makes all bitmaps equally high.
            font.set_text(" " * spaces, 0, flags=flags)
            pen = font.get_width_height()[0]
            font.set_text(" " * spaces + letter + "    1", 0, flags=flags)
            font.draw_glyphs_to_bitmap(antialiased=True)
            bitmap = np.asarray(font.get_image())
            bitmap = bitmap[:, : (pen + advance[n]) // 64 + 3]
            assert bitmap.shape[0] == HEIGHT
            inked = np.nonzero(bitmap.any(axis=0))[0]
            assert len(inked) <= WIDTH
            phase = pen % 64 // 8
            left[n, phase] = inked[0] - pen // 64
            coverage[n, phase, :, : len(inked)] = bitmap[:, inked[0] : inked[-1] + 1]

    colours = [
        matplotlib.colormaps[name](np.arange(256), bytes=False)[:, 2::-1] for name in ("coolwarm", "magma")
    ]
    return {
        "letters": np.array(LETTERS),
        "coverage": coverage,
        "left": left,
        "bearing": bearing,
        "advance": advance,
        "colours": np.floor(np.stack(colours) * 255 + 0.5).astype(np.uint8),
    }


if __name__ == "__main__":
    main()
