"""Whether a model's weights are what they should be, as far as the weights themselves can tell.

Names, shapes and finite values always; and, given a few recordings, whether the fusion's inputs were
prepared in training as they are prepared here, told by its own batch statistics.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from clasp_core import fusion
from clasp_core.errors import InvalidAudio, ModelUnavailable
from clasp_core.ingest import recording_segments
from clasp_core.mini import read_fusion
from clasp_core.models import MiniModel, PaperModel, open_model, resolve_device
from clasp_core.paper import Branches, PaperBackbone, fits, load_fusion
from clasp_core.systems import SYSTEMS, Inputs
from clasp_core.types import Seconds, Segment

MAX_CLIP_S: Seconds = 600.0
ENOUGH_SEGMENTS = 8
"""Fewer say little about the statistics of a training set."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found.

    batches: how many training batches the fusion's statistics were gathered over; 0 for one that was never
        trained, None for one that keeps none.
    configured: the convention of its inputs that it is served with.
    inputs: the one that fits; None without recordings or statistics.
    fits: for each branch and convention, how far its inputs are from the training's.
    """

    model: str
    layout: str
    entries: int
    parameters: int
    batches: int | None
    configured: Inputs
    inputs: Inputs | None
    fits: dict[str, dict[Inputs, fusion.Fit]]

    @property
    def right(self) -> bool:
        """Whether nothing speaks against serving it as it is configured."""
        return self.inputs in (None, self.configured)

    def as_json(self) -> dict[str, Any]:
        described = asdict(self) | {"right": self.right}
        described["fits"] = {
            branch: {inputs: fit._asdict() | {"distance": fit.distance} for inputs, fit in found.items()}
            for branch, found in self.fits.items()
        }
        return described


def verify(
    target: str, clips: Sequence[Path] = (), *, models_dir: Path | None = None, device: str = "cpu"
) -> Verification:
    """Check a model's fusion: `target` is a model's name or folder, or a converted `.safetensors` file.

    With clips, their encoder vectors are pushed through the first layer of each branch, brought to unit
    length and as they are, and compared with the running statistics of the BatchNorm behind it.

    Raises ModelUnavailable where names or shapes are not those of a known fusion, a value is not finite,
    or (with clips) an encoder is missing; InvalidAudio, also for too few clips.
    """
    model = _opened(target, models_dir, device)
    if isinstance(model, MiniModel):
        return _verified_mini(model)
    network = load_fusion(model.system, model.located("fusion")["fusion"])
    found: dict[str, dict[Inputs, fusion.Fit]] = {}
    if clips:
        found = fits(
            network,
            clip_branches(PaperBackbone(model.system, model.located(), resolve_device(device)), clips),
        )
    totals: dict[Inputs, float] = {
        inputs: sum(conventions[inputs].distance for conventions in found.values())
        for inputs in (next(iter(found.values())) if found else ())
    }
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm1d)]
    batches = min((int(norm.num_batches_tracked or 0) for norm in norms), default=0)
    ranked = sorted(totals, key=lambda inputs: totals[inputs]) if batches else []
    return Verification(
        model=model.name,
        layout=model.system.fusion,
        entries=len(network.state_dict()),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        batches=batches,
        configured=model.system.inputs,
        inputs=ranked[0] if ranked else None,
        fits=found,
    )


def _verified_mini(model: MiniModel) -> Verification:
    """Its pretrained parts are pinned by sha256; its fusion has no batch statistics to compare with."""
    for part in model.parts():
        if part.path is None:
            raise ModelUnavailable(f"The {part.role} part, {part.source}, is not on this machine.")
    _, tensors = read_fusion(model.fusion)
    return Verification(
        model=model.name,
        layout="mini",
        entries=len(tensors),
        parameters=sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point()),
        batches=None,
        configured="raw",
        inputs=None,
        fits={},
    )


def _opened(target: str, models_dir: Path | None, device: str) -> PaperModel | MiniModel:
    if target.endswith(".safetensors"):
        path = Path(target)
        if not path.is_file():
            raise ModelUnavailable(f"There is no file {path}.")
        return PaperModel(path.stem, SYSTEMS[_system_of(path)], path, models_dir, device)
    model = open_model(target, models_dir=models_dir, device=device)
    assert isinstance(model, PaperModel | MiniModel)
    return model


def _system_of(path: Path) -> str:
    """The published system whose fusion a file's weights fit."""
    reasons = []
    for name in ("paper", "paper-gating"):
        try:
            load_fusion(SYSTEMS[name], path)
        except ModelUnavailable as error:
            reasons.append(error.detail)
        else:
            return name
    raise ModelUnavailable(f"{path} is neither of the published fusions. {' '.join(reasons)}")


def clip_branches(backbone: PaperBackbone, clips: Sequence[Path]) -> Branches:
    """The encoders' vectors of all segments of some recordings. Raises InvalidAudio for too few."""
    segments: list[Segment] = []
    for clip in clips:
        segments += recording_segments(backbone.picture_rate, clip, max_duration_s=MAX_CLIP_S)
    if len(segments) < ENOUGH_SEGMENTS:
        raise InvalidAudio(
            f"{len(segments)} segments say too little; give at least {ENOUGH_SEGMENTS} short clips."
        )
    rows = [
        backbone([segment.waveform], None if segment.pictured is None else [segment.pictured])
        for segment in segments
    ]
    speech = [row.speech for row in rows if row.speech is not None]
    picture = [row.picture for row in rows if row.picture is not None]
    return Branches(
        torch.cat(speech).cpu() if speech else None, torch.cat(picture).cpu() if picture else None
    )
