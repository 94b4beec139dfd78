"""The paper's model beside the way of its notebooks; `python -m tests.bench.paper`: what each stage costs.

    python -m tests.bench.paper [--device cuda] [--clips N] [--small]

The encoders have their published sizes and random weights: HuBERT-large, EfficientNet-B7, LaBSE's BERT-base
and the fusion, about 3.4 GB on disk in a temporary folder. Clips are the bundled samples cut to 5 s, the
paper's mean.

As a part of `make bench`: from files to vectors, against the notebooks' way with the same weights, on a GPU
where there is one, and with few clips on the CPU. By itself: clips a second and seconds by stage, memory, and
the cosine of half precision with float32, into bench-results/paper.json and paper.md. `--small` has small
networks, to try the benchmark itself.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import soundfile
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from clasp_core import fusion
from clasp_core.encoders import SpeechEncoder
from clasp_core.encoders.efficientnet_b7 import EfficientNetB7
from clasp_core.encoders.hubert import SelfSupervisedSpeechEncoder
from clasp_core.encoders.vision_imports import require_transformers
from clasp_core.hub import PUBLISHED
from clasp_core.ingest import Ingester, recording_segments
from clasp_core.library import Library
from clasp_core.models import PaperModel, open_model
from clasp_core.paper import PaperBackbone, load_fusion
from clasp_core.spectrogram import PICTURE_RATE
from clasp_core.systems import System
from clasp_core.types import SAMPLING_RATE, Segment
from tests.bench.measuring import OUT, ROOT, ROUNDS, Result, Row, in_turn
from tests.paper_checkpoints import save_efficientnet, save_hubert, save_sentence_bert

CLIP_S = 5.0
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
        rows = stages(models_dir, torch.device(wanted.device), wanted.clips)
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


def cut_clips(count: int) -> list[Segment]:
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


# --- from files to vectors, beside the notebooks' way


def measure(full: bool) -> Iterator[Result]:
    del full
    with tempfile.TemporaryDirectory() as folder:
        models_dir = Path(folder)
        make_checkpoints(models_dir, small=False)
        yield from compared(models_dir, torch.device("cpu"), clips=2)
        if torch.cuda.is_available():
            yield from compared(models_dir, torch.device("cuda"), clips=64)
        else:
            print("no GPU: the rows of `paper` on one are left out", file=sys.stderr)


def compared(models_dir: Path, device: torch.device, clips: int, rounds: int = ROUNDS) -> Iterator[Result]:
    """Clips a second, from files on disk to vectors in the catalogue, or in memory where it is the notebooks'
    way, which keeps no catalogue."""
    model = open_model("paper", models_dir=models_dir, device=device.type)
    assert isinstance(model, PaperModel)
    encoder = model.speech_encoder()
    sound = cut_clips(clips)
    place = models_dir / f"clips-{device.type}"
    place.mkdir()
    files = [place / f"{number}.wav" for number in range(clips)]
    for number, (file, clip) in enumerate(zip(files, sound, strict=True)):
        # a sample's worth of difference: the same bytes again would be the same recording
        samples = clip.pictured.copy()  # type: ignore[union-attr]
        samples[:4] += 0.001 * (number + 1)
        soundfile.write(file, samples, PICTURE_RATE)
    notebook = NotebookWay(model.located(), model.system, device)
    ours = _Ingesting(models_dir / f"library-{device.type}", model, encoder, files)
    groups = [sound[start : start + TOGETHER] for start in range(0, clips, TOGETHER)]

    def bare() -> None:
        for some in groups:
            encoder.encode([s.waveform for s in some], [s.pictured for s in some])  # type: ignore[misc]

    with closing(ours):
        values = in_turn(
            {
                "ours": lambda: ours(),
                "theirs": lambda: timed(lambda: [notebook(file) for file in files], device),
                "bare": lambda: timed(bare, device),
            },
            rounds,
        )
    speeds = {name: [clips / value for value in line] for name, line in values.items()}
    yield Row(
        part="paper",
        what=f"clips of {CLIP_S:g} s, from files to vectors, on {name_of(device.type)}",
        unit="clips a second",
        better="higher",
        ours=speeds["ours"],
        against="the notebooks' way, one clip at a time",
        theirs=speeds["theirs"],
        target=20 if device.type == "cuda" else None,
        limit="bare encoder calls",
        limits=speeds["bare"],
        note="" if device.type == "cuda" else "the target is for a GPU",
    )
    for row in stages(models_dir, device, clips, rounds):
        if row.get("share"):
            yield Row(
                part="paper",
                what=f"stage: {row['stage']}, on {name_of(device.type)}",
                unit="ms a clip",
                better="lower",
                ours=row["all"],
                note=row["share"],
            )


class NotebookWay:
    """A clip to a vector as the authors' notebooks do it (clasp-inference.ipynb, cells 9, 12 and 28, and
    extract-pretrained-embeddings.ipynb, cell 279), every clip by itself, all in float32.

    librosa reads and resamples the file twice; matplotlib draws the picture, which is written as PNG, read
    back and shown to torchvision's EfficientNet as it is; HuBERT is transformers'. Both embeddings are
    brought to unit length before the fusion, as the final model needs (the notebook says so, and leaves
    it out).
    """

    def __init__(self, parts: Mapping[str, Path], system: System, device: torch.device) -> None:
        require_transformers()
        from torchvision.models import efficientnet_b7
        from transformers import HubertModel, Wav2Vec2FeatureExtractor

        self._device = device
        self._prepare = Wav2Vec2FeatureExtractor.from_pretrained(parts["speech"])
        self._hubert = HubertModel.from_pretrained(parts["speech"]).to(device).eval()
        self._efficientnet = efficientnet_b7()
        self._efficientnet.load_state_dict(load_file(parts["spectrogram"]))
        self._efficientnet.to(device).eval()
        self._fusion = load_fusion(system, parts["fusion"]).to(device)

    @torch.no_grad()
    def __call__(self, file: Path) -> torch.Tensor:
        import librosa

        from tests.spectrogram_oracle import reference_picture

        samples, rate = soundfile.read(file)
        samples = librosa.resample(samples / abs(samples).max(), orig_sr=rate, target_sr=SAMPLING_RATE)
        prepared = self._prepare(samples, sampling_rate=SAMPLING_RATE, return_tensors="pt")
        speech = self._hubert(prepared.input_values.float().to(self._device)).last_hidden_state.mean(dim=1)
        picture = reference_picture(librosa.load(file)[0])
        pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float().to(self._device)
        seen = self._efficientnet(pixels)
        vector = self._fusion(F.normalize(speech, dim=1), F.normalize(seen, dim=1))
        return F.normalize(vector, dim=1).cpu()


class _Ingesting:
    """The same files through a library: decoded twice in a confined process, cut, embedded, committed."""

    def __init__(
        self, folder: Path, model: PaperModel, encoder: SpeechEncoder, files: Sequence[Path]
    ) -> None:
        self._library = Library(folder, model=model.fingerprint, dim=model.dim)
        self._ingester = Ingester(self._library, encoder, max_duration_s=600)
        self._files = files
        self._rounds = count()

    def __call__(self) -> float:
        """Seconds of a round, arrival included."""
        collection = f"round-{next(self._rounds)}"
        began = time.perf_counter()
        for file in self._files:
            with self._library.store.receive() as upload:
                upload.write(file.read_bytes())
                upload.seal()
                self._library.register(upload, collection=collection)
        assert self._ingester.step(on=True) == len(self._files)
        took = time.perf_counter() - began
        assert self._library.catalog.counts().keys() == {"ready"}
        return took

    def close(self) -> None:
        self._library.close()


# --- by stage


def stages(
    models_dir: Path, device: torch.device, number: int, repeats: int = ROUNDS
) -> list[dict[str, Any]]:
    cuda = device.type == "cuda"
    model = open_model("paper", models_dir=models_dir, device=device.type)
    assert isinstance(model, PaperModel)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    backbone = PaperBackbone(model.system, model.located(), device)
    network = load_fusion(model.system, model.located()["fusion"]).to(device)
    segments = cut_clips(number)
    groups = [segments[start : start + TOGETHER] for start in range(0, number, TOGETHER)]
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

    calls: dict[str, Callable[[], None]] = {
        "picture": pictures,
        "HuBERT": speech,
        "EfficientNet-B7": spectrogram,
        "fusion": fused,
    }
    rows = []
    for stage, call in calls.items():
        call()
        rows.append(_row(stage, [timed(call, device) / number * 1000 for _ in range(repeats)]))
    total = sum(row["ms"] for row in rows)
    for row in rows:
        row["share"] = f"{row['ms'] / total:.0%}"
    encoder = model.speech_encoder()

    def whole() -> None:
        for some in groups:
            encoder.encode([s.waveform for s in some], [s.pictured for s in some])  # type: ignore[misc]

    whole()
    rows.append(
        _row("all of it", [timed(whole, device) / number * 1000 for _ in range(repeats)]) | {"share": "100%"}
    )
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


def _row(stage: str, times: list[float]) -> dict[str, Any]:
    return {
        "stage": stage,
        "ms": statistics.median(times),
        "least": min(times),
        "most": max(times),
        "all": times,
    }


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has done with it, too."""
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def name_of(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"


if __name__ == "__main__":
    main()
