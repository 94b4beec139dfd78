"""The picture as the authors made it, by librosa and matplotlib: what clasp_core.spectrogram is held to.

The steps of clasp-inference.ipynb, cell 12, on a fresh figure each time (on a reused one the size depends on
the figures before). matplotlib 3.7 to 3.10 draw the same; 3.11 has other letters, hence another layout, which
the paper's network never saw.
"""

import io
import warnings

import librosa
import librosa.display
import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

if tuple(map(int, matplotlib.__version__.split(".")[:2])) > (3, 10):
    raise ImportError(f"matplotlib {matplotlib.__version__} draws other letters than the paper's; needs 3.10")
matplotlib.use("Agg")
from matplotlib import pyplot


def reference_picture(waveform: NDArray[np.float32]) -> NDArray[np.uint8]:
    """uint8 (450, about 610, 3), blue first, as cv2.imread gives what savefig wrote."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "n_fft=2048 is too large for input signal")
        spectrum = np.abs(librosa.stft(waveform))
        decibels = librosa.amplitude_to_db(spectrum)
    figure = pyplot.figure()
    try:
        librosa.display.specshow(decibels, x_axis="time", y_axis="log")
        pyplot.xlabel("")
        pyplot.ylabel("")
        pyplot.tight_layout()
        png = io.BytesIO()
        pyplot.savefig(png, bbox_inches="tight", pad_inches=0, format="png")
    finally:
        pyplot.close(figure)
    return np.asarray(Image.open(png).convert("RGB"))[..., ::-1]
