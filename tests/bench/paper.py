"""`python -m tests.bench.paper [--device cuda] [--clips N] [--small]`: what each stage of the model costs.

The encoders have their published sizes and random weights: HuBERT-large, EfficientNet-B7, LaBSE's BERT-base
and the fusion, about 3.4 GB on disk in a temporary folder. Clips are the bundled samples cut to 5 s, the
paper's mean. Writes bench-results/paper.json and paper.md: clips a second and seconds by stage, memory,
and the cosine of half precision with float32. `--small` has small networks, to try the benchmark itself.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from clasp_core import fusion
from clasp_core.encoders.efficientnet_b7 import EfficientNetB7
from clasp_core.encoders.hubert import SelfSupervisedSpeechEncoder
from clasp_core.hub import PUBLISHED
from clasp_core.ingest import recording_segments
from clasp_core.models import PaperModel, open_model
from clasp_core.paper import PaperBackbone, load_fusion
from clasp_core.spectrogram import PICTURE_RATE
from clasp_core.types import SAMPLING_RATE, Segment
from tests.bench.measuring import OUT, ROOT
from tests.paper_checkpoints import save_efficientnet, save_hubert, save_sentence_bert

CLIP_S = 5.0
REPEATS = 5
TOGETHER = 8

HUBERT_LARGE = {
    "hidden": 1024,
    "layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "conv_dim": (512,) * 7,
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "initializer_range": 0.02,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--small", action="store_true")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models_dir = Path(folder)
        make_checkpoints(models_dir, small=wanted.small)
        rows = measure(models_dir, torch.device(wanted.device), wanted.clips)
    described = {"device": name_of(wanted.device), "small": wanted.small, "clips": wanted.clips, "rows": rows}
    OUT.mkdir(exist_ok=True)
    (OUT / "paper.json").write_text(json.dumps(described, indent=1) + "\n")
    table = [
        f"{name_of(wanted.device)}, {wanted.clips} clips of {CLIP_S:g} s, {TOGETHER} at once",
        "",
        "| stage | ms a clip (median) | spread | share | clips/s |",
        "| --- | --- | --- | --- | --- |",
    ]
    table += [
        f"| {row['stage']} | {row['ms']:.2f} | {row['least']:.2f} to {row['most']:.2f}"
        f" | {row['share']} | {1000 / row['ms']:.1f} |"
        for row in rows
        if "ms" in row
    ]
    table += ["", *(f"{row['what']}: {row['value']:.6g}" for row in rows if "what" in row)]
    (OUT / "paper.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))


def make_checkpoints(models_dir: Path, *, small: bool) -> None:
    """The paper's folders, in the layout that `clasp models fetch` leaves."""
    save_hubert(PUBLISHED["hubert-large"].location(models_dir), **({} if small else HUBERT_LARGE))
    save_efficientnet(PUBLISHED["efficientnet-b7"].location(models_dir), variant="b0" if small else "b7")
    save_sentence_bert(PUBLISHED["labse"].location(models_dir), dim=768, layers=1 if small else 12)
    path = PUBLISHED["clasp-concat"].location(models_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    network = fusion.create("concat", 32 if small else 1024)
    network(torch.randn(8, 32 if small else 1024), torch.randn(8, 1000))
    save_file(network.state_dict(), path)


def clips(count: int) -> list[Segment]:
    """The bundled samples, cut to one length, over and over."""
    found: list[Segment] = []
    for path in sorted((ROOT / "app" / "samples" / "audio").glob("*.opus")):
        for segment in recording_segments(PICTURE_RATE, path, max_duration_s=600):
            if segment.end_s - segment.start_s >= CLIP_S:
                assert segment.pictured is not None
                found.append(
                    Segment(
                        0,
                        CLIP_S,
                        segment.waveform[: int(CLIP_S * SAMPLING_RATE)],
                        segment.pictured[: int(CLIP_S * PICTURE_RATE)],
                    )
                )
    return [found[place % len(found)] for place in range(count)]


def measure(models_dir: Path, device: torch.device, count: int) -> list[dict[str, Any]]:
    cuda = device.type == "cuda"
    model = open_model("paper", models_dir=models_dir, device=device.type)
    assert isinstance(model, PaperModel)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    backbone = PaperBackbone(model.system, model.located(), device)
    network = load_fusion(model.system, model.located()["fusion"]).to(device)
    segments = clips(count)
    groups = [segments[start : start + TOGETHER] for start in range(0, count, TOGETHER)]
    kept: dict[str, list[torch.Tensor]] = {"picture": [], "speech": [], "spectrogram": []}

    def pictures() -> None:
        kept["picture"] = [backbone.pictures([s.pictured for s in some]) for some in groups]  # type: ignore[misc]

    def speech() -> None:
        kept["speech"] = [backbone.speech([s.waveform for s in some]) for some in groups]

    def spectrogram() -> None:
        kept["spectrogram"] = [backbone.spectrogram(some) for some in kept["picture"]]

    @torch.inference_mode()
    def fused() -> None:
        for said, seen in zip(kept["speech"], kept["spectrogram"], strict=True):
            network(F.normalize(said, dim=1), F.normalize(seen, dim=1))

    stages: dict[str, Callable[[], None]] = {
        "picture": pictures,
        "HuBERT": speech,
        "EfficientNet-B7": spectrogram,
        "fusion": fused,
    }
    rows = []
    for stage, call in stages.items():
        call()
        times = [timed(call, cuda) / count * 1000 for _ in range(REPEATS)]
        rows.append({"stage": stage, "ms": statistics.median(times), "least": min(times), "most": max(times)})
    total = sum(row["ms"] for row in rows)
    for row in rows:
        row["share"] = f"{row['ms'] / total:.0%}"
    encoder = model.speech_encoder()

    def whole() -> None:
        for some in groups:
            encoder.encode([s.waveform for s in some], [s.pictured for s in some])  # type: ignore[misc]

    whole()
    times = [timed(whole, cuda) / count * 1000 for _ in range(REPEATS)]
    row = {"stage": "all of it", "ms": statistics.median(times), "least": min(times), "most": max(times)}
    rows.append(row | {"share": "100%"})
    if cuda:
        rows.append({"what": "GPU memory, MB at most", "value": torch.cuda.max_memory_allocated() / 1e6})
        rows += half_precision(model.located(), device, segments[:16], kept["picture"][0])
    return rows


def half_precision(
    parts: Mapping[str, Path], device: torch.device, segments: list[Segment], pictures: torch.Tensor
) -> list[dict[str, Any]]:
    """The least cosine of each encoder's vectors in 16 bits with those in 32."""
    waveforms = [segment.waveform for segment in segments]
    rows = []
    for name, load, inputs in (
        ("HuBERT", partial(SelfSupervisedSpeechEncoder.load, parts["speech"]), waveforms),
        ("EfficientNet", partial(EfficientNetB7.load, parts["spectrogram"]), pictures),
    ):
        exact = load().to(device)(inputs)
        for dtype in (torch.float16, torch.bfloat16):
            try:
                cosine = float(F.cosine_similarity(load(dtype).to(device)(inputs), exact).min())
            except FloatingPointError:
                cosine = math.nan  # it overflowed
            rows.append({"what": f"least cosine of {name} in {dtype} with float32", "value": cosine})
    return rows


def timed(call: Callable[[], None], cuda: bool) -> float:
    started = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def name_of(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"


if __name__ == "__main__":
    main()
