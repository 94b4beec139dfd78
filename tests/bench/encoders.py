"""The networks of `mini` on a CPU: as they serve, and by other engines and in other precisions.

On segments of the bundled samples, short and long, one at a time, on one thread. Each engine's row tells the
least cosine of its output with that of torch in float32. ONNX Runtime's rows need the extra `bench`,
CTranslate2's the extra `transcription`.
"""

import copy
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import numpy as np
import openvino
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from clasp_core.encoders.compiled import Compiled
from clasp_core.encoders.e5 import E5_SMALL, E5Encoder
from clasp_core.encoders.whisper import MELS, WHISPER_BASE_HALVES, LogMel, Mel, WhisperEncoder
from clasp_core.ingest import recording_segments
from clasp_core.mini import MiniSpeechEncoder, SpeechBackbone, load_fusion
from clasp_core.models import MiniModel, open_model
from tests.bench.measuring import ROOT, ROUNDS, Result, Row, absent, in_turn, seconds

PART = "encoders"
_Values: TypeAlias = NDArray[np.float32]
_Engine: TypeAlias = Callable[[Tensor], Any]
BATCH = 32


def measure(full: bool) -> Iterator[Result]:
    torch.set_num_threads(1)
    waveforms = segments()
    spoken_s = sum(map(len, waveforms)) / 16_000
    mini = open_model("mini")
    assert isinstance(mini, MiniModel)
    served = mini.speech_encoder()
    backbone = SpeechBackbone(None)
    fusion = load_fusion(mini.fusion, None, backbone.decoder.twin())

    @torch.inference_mode()
    def plain() -> list[_Values]:
        return [fusion(backbone([waveform])).vectors.numpy()[0] for waveform in waveforms]

    cosine = float(np.min(np.sum(np.stack(plain()) * served.encode(waveforms), axis=1)))
    yield from rows(
        "all of a segment",
        "s an hour of speech",
        {"": lambda: served.encode(waveforms), "torch, float32": plain},
        {"torch, float32": f"least cosine {cosine:.4f}"},
        3600 / spoken_s,
    )
    yield from shares(mini, waveforms, 3600 / spoken_s)
    yield from whisper(waveforms, 3600 / spoken_s)
    yield from questions(mini)


def segments(count: int = 5) -> list[_Values]:
    """So many of the bundled samples, from the shortest to the longest."""
    found = [
        segment.waveform
        for path in sorted((ROOT / "app" / "samples" / "audio").glob("*.opus"))
        for segment in recording_segments(None, path, max_duration_s=600)
    ]
    found.sort(key=len)
    return [found[place] for place in np.linspace(0, len(found) - 1, count, dtype=int)]


def rows(
    what: str, unit: str, contenders: dict[str, Callable[[], object]], notes: dict[str, str], scale: float
) -> Iterator[Row]:
    """One for each contender but ours, which is the one without a name."""
    found = in_turn({name: lambda call=call: scale * seconds(call) for name, call in contenders.items()})
    for name, theirs in found.items():
        if name:
            yield Row(
                part=PART,
                what=what,
                unit=unit,
                better="lower",
                ours=found[""],
                against=name,
                theirs=theirs,
                note=notes.get(name, ""),
            )


NETWORKS = {
    "Whisper's encoder": "backbone.whisper",
    "Whisper's decoder, for the languages": "backbone.decoder",
    "Whisper's decoder, for the words": "fusion.decoder",
    "words to meanings": "fusion/",
    "E5's layers": "fusion.reader",
}
"""By what the names of their nodes hold."""
REST = "EfficientNet, and the rest"
"""Its nodes are merged with the normalisations behind them, and have no names of their own."""


def shares(mini: MiniModel, waveforms: Sequence[_Values], scale: float) -> Iterator[Row]:
    """What of a compiled network's time is whose, as its own counters tell."""
    compile_model = openvino.Core.compile_model

    def counting(self: openvino.Core, model: Any, device: str, config: dict[str, Any]) -> Any:
        return compile_model(self, model, device, config | {"PERF_COUNT": True})

    with mock.patch.object(openvino.Core, "compile_model", counting):
        encoder = mini.speech_encoder()
    assert isinstance(encoder, MiniSpeechEncoder)
    encoder.encode(waveforms)
    spent: dict[str, list[float]] = {name: [] for name in (*NETWORKS, REST)}
    for _ in range(ROUNDS):
        now = dict.fromkeys(spent, 0.0)
        for waveform in waveforms:
            encoder.encode([waveform])
            for node in encoder._alone._requests[0].profiling_info:  # type: ignore[union-attr]
                names = [name for name, part in NETWORKS.items() if part in node.node_name]
                now[names[0] if names else REST] += scale * node.real_time.total_seconds()
        for name, value in now.items():
            spent[name].append(value)
    every = [sum(values) for values in zip(*spent.values(), strict=True)]
    for name, values in spent.items():
        yield Row(
            part=PART,
            what=f"of a segment: {name}",
            unit="s an hour of speech",
            better="lower",
            ours=values,
            limit="all networks",
            limits=every,
        )


class _Encoder(nn.Module):
    """Whisper's encoder of one clip, as every engine here can take it."""

    def __init__(self, encoder: WhisperEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, mel: Tensor) -> Tensor:
        frames: Tensor = self.encoder(Mel(mel, torch.ones(1, dtype=torch.long) * mel.shape[2])).values
        return frames


def whisper(waveforms: Sequence[_Values], scale: float) -> Iterator[Row]:
    log_mel = LogMel()
    mels = [log_mel([waveform]).values for waveform in waveforms]
    network = _Encoder(WhisperEncoder.load(WHISPER_BASE_HALVES[1].locate(None))).eval()
    compiled = Compiled(network, (mels[0],), ([-1, MELS, -1],))
    half = copy.deepcopy(network).bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eight = torch.ao.quantization.quantize_dynamic(copy.deepcopy(network), {nn.Linear}, torch.qint8)
    engines: dict[str, _Engine] = {
        "": lambda mel: compiled(mel.numpy()),
        "torch, float32": network,
        "torch, bfloat16": lambda mel: half(mel.bfloat16()).float(),
        "torch, 8-bit dynamic": eight,
    }
    engines |= ctranslate2()
    with tempfile.TemporaryDirectory() as folder:
        engines |= onnx_runtime(network, mels[0], Path(folder))
        notes = {}
        with torch.inference_mode():
            for name, engine in engines.items():
                pairs = [(torch.as_tensor(np.asarray(engine(mel))), network(mel)) for mel in mels]
                cosines = [float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0)) for a, b in pairs]
                notes[name] = f"least cosine {min(cosines):.4f}"
        ours = notes.pop("")
        notes = {name: f"ours {ours[6:]}, theirs {note[6:]}" for name, note in notes.items()}

        def all_of(engine: _Engine) -> Callable[[], object]:
            @torch.inference_mode()
            def call() -> object:
                return [engine(mel) for mel in mels]

            return call

        what, unit = "Whisper's encoder", "s an hour of speech"
        yield from rows(what, unit, {name: all_of(engine) for name, engine in engines.items()}, notes, scale)


def ctranslate2() -> dict[str, _Engine]:
    try:
        from ctranslate2 import StorageView
        from ctranslate2.models import Whisper

        from clasp_core.transcription import whisper_folder
    except ImportError:
        absent("ctranslate2")
        return {}
    threads = torch.get_num_threads()
    network = Whisper(str(whisper_folder(None)), compute_type="int8", intra_threads=threads)
    return {"CTranslate2, 8-bit": lambda mel: network.encode(StorageView.from_array(mel.numpy()))}


def onnx_runtime(network: nn.Module, example: Tensor, folder: Path) -> dict[str, _Engine]:
    try:
        import onnx
        import onnxruntime
        from onnxruntime.quantization import quantize_dynamic
    except ImportError:
        absent("onnxruntime")
        return {}
    del onnx
    plain, eight = folder / "encoder.onnx", folder / "encoder-8-bit.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (example,),
            str(plain),
            input_names=["mel"],
            dynamic_axes={"mel": {2: "frames"}},
            dynamo=False,
        )
    quantize_dynamic(plain, eight)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()

    def engine(path: Path) -> _Engine:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda mel: session.run(None, {"mel": mel.numpy()})[0]

    return {"ONNX Runtime, float32": engine(plain), "ONNX Runtime, 8-bit dynamic": engine(eight)}


def questions(mini: MiniModel) -> Iterator[Row]:
    """A question alone, and many of one length together."""
    lines = (ROOT / "app" / "samples" / "questions.jsonl").read_text().splitlines()
    asked = [json.loads(line)["q"] for line in lines]
    plain, served = E5Encoder.load(E5_SMALL.locate(None)), mini.text_encoder()
    close = (E5Encoder.to_serve(E5_SMALL.locate(None), torch.device("cpu"))(asked) * plain(asked)).sum(1)
    note = f"least cosine {float(close.min()):.5f}"
    for what, together in (("a question alone", 1), (f"a question among {BATCH}", BATCH)):
        many = (asked * BATCH)[: max(together, len(asked))]
        groups = [many[start : start + together] for start in range(0, len(many), together)]
        yield from rows(
            what,
            "ms",
            {
                "": lambda groups=groups: [served.encode(group) for group in groups],  # type: ignore[misc]
                "torch, float32": lambda groups=groups: [plain(group) for group in groups],  # type: ignore[misc]
            },
            {"torch, float32": note},
            1000 / len(many),
        )
