"""What must not drift: makes the pinned files anew, `make golden`. A diff in them is a reviewed decision.

`python -m tests.golden.make openapi` makes only that one.

encoders.json: five numbers of each encoder's output on a bundled sample.
openapi.json: the API's description.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

GOLDEN = Path(__file__).parent
SAMPLE = GOLDEN.parent.parent / "app" / "samples" / "audio" / "en-bees.opus"
SENTENCES = [
    "In winter the bees stay inside the hive and live on the honey they made in summer.",
    "زنبورها در زمستان داخل کندو می‌مانند.",
    "蜜蜂",
]


def sample() -> NDArray[np.float32]:
    """A bundled recording, mono, 16 kHz."""
    samples, rate = soundfile.read(SAMPLE, dtype="float32")
    resampled: NDArray[np.float32] = soxr.resample(samples, rate, 16000)
    return resampled


def encoder_values() -> dict[str, list[float]]:
    """Five numbers of each encoder's output, spread over it."""
    import torch

    from clasp_core.encoders.e5 import E5_SMALL, E5Encoder
    from clasp_core.encoders.efficientnet import EFFICIENTNET_LITE0, EfficientNetLite0
    from clasp_core.encoders.whisper import WHISPER_BASE, LogMel, WhisperEncoder
    from clasp_core.models import open_model

    torch.manual_seed(0)
    mel = LogMel()([sample()])
    picture = torch.linspace(-1, 1, 3 * 80 * 96).view(1, 3, 80, 96)
    model = open_model("mini")
    with torch.inference_mode():
        outputs: dict[str, Any] = {
            "log_mel": mel.values,
            "whisper": WhisperEncoder.load(WHISPER_BASE.locate(None))(mel).values,
            "efficientnet": EfficientNetLite0.load(EFFICIENTNET_LITE0.locate(None)).classify(picture),
            "e5": E5Encoder.load(E5_SMALL.locate(None))(SENTENCES),
            "mini_text": model.text_encoder().encode(SENTENCES),
            "mini_speech": plain_speech([sample()]),
        }
    return {name: _five(np.asarray(output)) for name, output in outputs.items()}


def plain_speech(waveforms: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """`mini`'s vectors by torch in float32: what those of compiled networks must be close to."""
    import torch

    from clasp_core.mini import SpeechBackbone, load_fusion
    from clasp_core.models import MiniModel, open_model

    mini = open_model("mini")
    assert isinstance(mini, MiniModel)
    backbone = SpeechBackbone(None)
    fusion = load_fusion(mini.fusion, None, backbone.decoder.twin())
    with torch.inference_mode():
        vectors: NDArray[np.float32] = fusion(backbone(waveforms)).vectors.numpy()
    return vectors


def _five(values: NDArray[np.float32]) -> list[float]:
    flat = values.ravel()
    return [round(float(flat[place]), 5) for place in np.linspace(0, flat.size - 1, 7, dtype=int)[1:-1]]


def openapi() -> dict[str, Any]:
    """The live API description."""
    from app.main import create_app
    from app.settings import Settings

    with tempfile.TemporaryDirectory() as data_dir:
        return create_app(Settings(data_dir=Path(data_dir))).openapi()


def main() -> None:
    makers = {"encoders": encoder_values, "openapi": openapi}
    for name in sys.argv[1:] or makers:
        text = json.dumps(makers[name](), indent=1, ensure_ascii=False, sort_keys=name == "openapi")
        (GOLDEN / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
