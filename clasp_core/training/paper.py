"""Training the paper's systems: a fusion on top of frozen encoders, or of one whose upper layers learn too.

Paper section 3 and notebook Training-Evaluation, cells 12-20: pooled vectors of speech and picture, both
brought to unit length, fused towards the text encoder's vector. Everything in front of what is trained is
computed once and kept (`features`).
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from clasp_core import fusion
from clasp_core.encoders.adaptation import Adaptation, LayeredEncoder, adapt
from clasp_core.encoders.adaptation import save as save_adapted
from clasp_core.encoders.folders import read_tensors
from clasp_core.encoders.whisper import Frames
from clasp_core.language import match_key, normalize_text
from clasp_core.manifest import ManifestItem
from clasp_core.models import PaperModel, content_hash, resolve_device
from clasp_core.paper import (
    TEXT_MEAN,
    Branches,
    PaperBackbone,
    load_fusion,
    load_speech_encoder,
    load_text_encoder,
)
from clasp_core.spectrogram import PICTURE_RATE
from clasp_core.systems import SYSTEMS, Inputs, System, read
from clasp_core.training.config import DataConfig, described, examples_of, require
from clasp_core.training.features import FeatureCache, Row, clip_key, clips
from clasp_core.training.losses import LossConfig, Objective, figures
from clasp_core.training.output import run_folder, write_model
from clasp_core.training.trainer import (
    LoopConfig,
    OptimizerConfig,
    ParameterGroup,
    Progress,
    ScheduleConfig,
    TrainingConfig,
    draw,
    fit,
    silent,
)
from clasp_core.types import Embeddings, Segment

_log = logging.getLogger(__name__)

_TEXTS_TOGETHER = 64
_LEARNT, _CHECKED = "training", "validation"


@dataclass(frozen=True, slots=True)
class PaperModelConfig:
    """[model] with `architecture = "paper"`: a system by name, its fields one by one, or both."""

    architecture: str = "paper"
    system: str | None = None
    """A name of `clasp models list`; by default small encoders, concatenated."""
    speech: str | None = None
    spectrogram: str | None = None
    fusion: str | None = None
    text: str | None = None
    inputs: Inputs | None = None
    centre_texts: bool | None = None
    """Whether the mean of the training texts is taken off text vectors; by default for small encoders."""

    def __post_init__(self) -> None:
        require(
            self.system is None or self.system in SYSTEMS,
            f"model.system is {self.system!r}; known are {', '.join(SYSTEMS)}",
        )

    def chosen(self, loss: str) -> System:
        """The system that is meant. Raises ModelUnavailable for a part that is not known."""
        system = System("whisper-base", "efficientnet-lite0", text="e5-small")
        if self.system is not None:
            system = replace(SYSTEMS[self.system], weights=None)
        named = {name: getattr(self, name) for name in ("speech", "spectrogram", "fusion", "text", "inputs")}
        given = {name: value for name, value in named.items() if value is not None} | {"loss": loss}
        system = read(system.as_json() | given)
        network = fusion.create(system.fusion, 1, 1, 8)  # for its branches: what it lacks is not needed
        return replace(
            system,
            speech=None if network.speech_branch is None else system.speech,
            spectrogram=None if network.picture_branch is None else system.spectrogram,
        )

    def centres(self, system: System) -> bool:
        if self.centre_texts is None:
            return system.text in ("e5-small", "use-multilingual")
        return self.centre_texts


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """[encoder]: what of the speech encoder is trained; nothing, unless said."""

    train_layers: int = 0
    """Its so many upper layers, whole."""
    lora_rank: int = 0
    """Or low-rank adapters on the linear layers of its upper `lora_layers`."""
    lora_layers: int = 4
    lora_alpha: float = 16.0
    rate: float = 0.1
    """Its learning rate, as a multiple of the fusion's."""

    def __post_init__(self) -> None:
        require(min(self.train_layers, self.lora_rank) >= 0, "no number in encoder may be negative")
        require(self.lora_layers > 0, "encoder.lora_layers must be above 0")
        require(
            not (self.train_layers and self.lora_rank),
            "encoder.train_layers and encoder.lora_rank exclude each other",
        )

    @property
    def adaptation(self) -> Adaptation | None:
        if self.lora_rank:
            return Adaptation(self.lora_layers, self.lora_rank, self.lora_alpha)
        return Adaptation(self.train_layers) if self.train_layers else None


@dataclass(frozen=True, slots=True)
class PaperConfig:
    """What `clasp train` reads for a system of the paper's kind."""

    data: DataConfig
    output: Path
    model: PaperModelConfig = field(default_factory=PaperModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        system = self.model.chosen(self.loss.name)
        require(
            self.encoder.adaptation is None or system.speech is not None,
            f"the fusion {system.fusion!r} has no speech encoder that [encoder] could train",
        )
        self.data.require_watchable(self.training.watch)


@dataclass(frozen=True, slots=True)
class Examples:
    """A split: its clips by key, with their texts' vectors.

    targets (n, dim): unit vectors, without the mean where that is taken off. numbers (n,): equal ones for
    texts that say the same. weights (n,): how often each is drawn per epoch.
    """

    keys: list[str]
    targets: Tensor
    numbers: Tensor
    weights: NDArray[np.float64]


Branch: TypeAlias = Callable[[Sequence[str], Sequence[int]], Tensor]
"""Clips by key, each in one of its readings (by number), to the rows (n, width) of a fusion's branch."""


@dataclass(frozen=True, slots=True)
class Tail:
    """The part of a speech encoder that learns: what is above the layer `cut`."""

    encoder: LayeredEncoder
    part: nn.ModuleDict
    cut: int


def train(config: PaperConfig, *, models_dir: Path | None = None, progress: Progress = silent) -> Path:
    """Train and write `model.json`, `fusion.safetensors` and `training.json` to `config.output`, and where
    the speech encoder learnt too, what it learnt to `encoder.safetensors`.
    """
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    work = _Work(config, models_dir, progress)
    system, parts = work.system, work.parts

    items, checked = examples_of(config.data)
    split = {_LEARNT: items} | ({_CHECKED: checked} if checked else {})
    keys = {item.id: clip_key(item) for members in split.values() for item in members}

    encoder: LayeredEncoder | None = None
    if (adapted := config.encoder.adaptation) is not None:
        encoder = load_speech_encoder(system, parts)
        require(
            adapted.layers <= encoder.depth,
            f"[encoder] would train {adapted.layers} layers of {encoder.depth}",
        )
    caches = work.features(split, keys, encoder)
    usable = {
        name: [item for item in members if all(keys[item.id] in cache for cache in caches.needed(name))]
        for name, members in split.items()
    }
    for name, members in usable.items():
        require(bool(members), f"not one recording can be used for {name}")
    raw = work.texts(_text(item) for members in usable.values() for item in members)
    learnt = usable[_LEARNT]
    mean = torch.zeros(system.dim)
    if config.model.centres(system):
        mean = torch.stack([raw[_text(item)] for item in learnt]).mean(0)
    examples = {name: _examples(members, keys, raw, mean, config) for name, members in usable.items()}
    tail: Tail | None = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        if encoder is not None and adapted is not None:
            tail = Tail(encoder, adapt(encoder, adapted), encoder.depth - adapted.layers)
        widths = (caches.width("speech"), caches.width("spectrogram"))
        network = fusion.create(system.fusion, *widths, system.dim)
    task = PaperTask(config, system, network, examples, caches, tail)

    identity = {
        name: [[keys[item.id], item.text, item.lang, item.source] for item in members]
        for name, members in usable.items()
    }
    with run_folder(config.data.cache, described(config), work.hashes, identity) as states:
        curves = config.training.tensorboard and config.training.tensorboard / config.output.name
        history = fit(
            task,
            LoopConfig(config.training, config.optimizer, config.schedule),
            states / "state.safetensors",
            curves=curves,
            progress=progress,
        )
        files: dict[str, Callable[[Path], None]] = {
            "fusion.safetensors": lambda path: _save_fusion(network, mean, config.model.centres(system), path)
        }
        if tail is not None and adapted is not None:
            files["encoder.safetensors"] = partial(save_adapted, tail.part, adapted)
        write_model(
            config.output,
            {"architecture": "paper", "system": system.as_json()},
            files,
            config=config,
            items=len(learnt),
            history=history,
        )
    return config.output


class TrainedSystem:
    """What `train` wrote to `config.output`, at work on cached features: no encoder meets a clip or a text
    twice. Clips are those of training, whole recordings of up to 29 s, not segments as served.

    For systems whose encoders were all frozen. Raises ModelUnavailable where a part is missing.
    """

    def __init__(
        self, config: PaperConfig, *, models_dir: Path | None = None, progress: Progress = silent
    ) -> None:
        assert config.encoder.adaptation is None, "features are cached below what was trained"
        self._config = config
        self._work = _Work(config, models_dir, progress)
        fusion_file = config.output / "fusion.safetensors"
        self._fusion = load_fusion(self._work.system, fusion_file)
        self._mean = read_tensors(fusion_file).get(TEXT_MEAN, torch.zeros(()))

    @torch.inference_mode()
    def hear(self, items: Sequence[ManifestItem]) -> tuple[list[ManifestItem], Embeddings]:
        """The items whose recordings can be heard, and their unit vectors (n, dim)."""
        keys = {item.id: clip_key(item) for item in items}
        caches = self._work.features({_LEARNT: items}, keys, None)
        heard = [item for item in items if all(keys[item.id] in cache for cache in caches.needed(_LEARNT))]
        if not heard:
            return [], np.empty((0, self._work.system.dim), np.float32)
        rows = [keys[item.id] for item in heard]
        branches = (caches.branch(role) for role in ("speech", "spectrogram"))
        made = Branches(*(None if branch is None else branch(rows, [0] * len(rows)) for branch in branches))
        prepared = made.prepared(self._work.system.inputs)
        vectors: Embeddings = F.normalize(self._fusion(prepared.speech, prepared.picture), dim=1).numpy()
        return heard, vectors

    def read(self, texts: Sequence[str]) -> Embeddings:
        """Normalised texts to unit vectors (n, dim)."""
        rows = self._work.texts(texts)
        vectors: Embeddings = F.normalize(
            torch.stack([rows[text] for text in texts]) - self._mean, dim=1
        ).numpy()
        return vectors


def identity(config: PaperConfig, *, models_dir: Path | None = None) -> list[object]:
    """All of a configuration that decides what `train` makes of some data, ready for JSON.

    Raises ModelUnavailable where a pretrained part is missing.
    """
    work = _Work(config, models_dir)
    return [described(config), work.system.as_json(), work.hashes]


def _save_fusion(network: fusion.Fusion, mean: Tensor, centred: bool, path: Path) -> None:
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    save_file(state | ({TEXT_MEAN: mean} if centred else {}), path, {"format": "pt"})


def _text(item: ManifestItem) -> str:
    return normalize_text(item.text, item.lang)


def _examples(
    items: Sequence[ManifestItem],
    keys: Mapping[str, str],
    raw: Mapping[str, Tensor],
    mean: Tensor,
    config: PaperConfig,
) -> Examples:
    numbers: dict[str, int] = {}
    return Examples(
        [keys[item.id] for item in items],
        F.normalize(torch.stack([raw[_text(item)] for item in items]) - mean, dim=1),
        torch.tensor([numbers.setdefault(match_key(_text(item)), len(numbers)) for item in items]),
        np.array([config.data.weights.get(item.source or "", 1.0) for item in items]),
    )


class PaperTask:
    """A fusion, and perhaps its speech encoder's tail, learning to give clips their texts' vectors."""

    def __init__(
        self,
        config: PaperConfig,
        system: System,
        network: fusion.Fusion,
        examples: Mapping[str, Examples],
        caches: "_Caches",
        tail: Tail | None,
    ) -> None:
        self._config = config
        self._inputs = system.inputs
        self._learnt = examples[_LEARNT]
        self._learning = Objective(config.loss, self._learnt.targets, self._learnt.numbers)
        self._tail = tail
        self.module = nn.ModuleDict({"fusion": network, "objective": self._learning})
        if tail is not None:
            self.module["encoder"] = tail.part
        self._checked = examples.get(_CHECKED)
        if self._checked is not None:
            self._checking = Objective(config.loss, self._checked.targets, self._checked.numbers)
            self._checking.log_scale = self._learning.log_scale
        self._branches = (caches.branch("speech", tail), caches.branch("spectrogram"))

    def groups(self) -> Sequence[ParameterGroup]:
        found = [ParameterGroup(list(self.module["fusion"].parameters()))]
        if self._tail is not None:
            trained = [p for p in self._tail.part.parameters() if p.requires_grad]
            found.append(ParameterGroup(trained, rate=self._config.encoder.rate))
        if self._config.loss.learned:
            found.append(ParameterGroup([self._learning.log_scale], decays=False))
        return found

    def batches(self, epoch: int) -> Sequence[list[tuple[int, int]]]:
        """Places of examples, each with one of its readings. None is of one example: batch norm needs two."""
        random = np.random.default_rng([self._config.training.seed, epoch])
        weights, size = self._learnt.weights, self._config.training.batch_size
        drawn = draw(weights, random)
        readings = random.integers(len(self._config.data.speeds), size=len(drawn)).tolist()
        pairs = list(zip(drawn, readings, strict=True))
        batches = [pairs[start : start + size] for start in range(0, len(pairs), size)]
        if len(batches) > 1 and len(batches[-1]) == 1:
            batches[-2:] = [batches[-2] + batches[-1]]
        return batches

    def loss(self, batch: Sequence[tuple[int, int]]) -> Tensor:
        places, readings = zip(*batch, strict=True)
        vectors = self._vectors([self._learnt.keys[place] for place in places], readings)
        loss: Tensor = self._learning(vectors, torch.tensor(places, device=vectors.device))
        return loss

    def validate(self) -> Mapping[str, float]:
        """Over the validation split as spoken: the loss, a batch at a time, and text-to-speech figures."""
        if self._checked is None:
            return {}
        keys = self._checked.keys

        def vectors(places: range) -> Tensor:
            return self._vectors([keys[place] for place in places], [0] * len(places))

        return figures(self._checking, vectors, self._config.training.batch_size)

    def _vectors(self, keys: Sequence[str], readings: Sequence[int]) -> Tensor:
        device = next(self.module.parameters()).device
        speech, picture = (
            None if branch is None else branch(keys, readings).to(device) for branch in self._branches
        )
        made = Branches(speech, picture).prepared(self._inputs)
        vectors: Tensor = self.module["fusion"](made.speech, made.picture)
        return vectors


# --- what is computed once


class _Caches:
    """The features of every reading, by role; the validation split has the first reading only."""

    def __init__(self, by_role: Mapping[str, Sequence[FeatureCache]], split: Mapping[str, list[str]]) -> None:
        self._by_role = by_role
        self._split = split

    def needed(self, split: str) -> Iterable[FeatureCache]:
        for caches in self._by_role.values():
            yield from caches if split == _LEARNT else caches[:1]

    def width(self, role: str) -> int:
        """Of that role's rows; 1 where there are none."""
        caches = self._by_role.get(role)
        if not caches:
            return 1
        key = next(key for key in self._split[_LEARNT] if key in caches[0])
        return caches[0].row(key)["rows"].shape[1]

    def branch(self, role: str, tail: Tail | None = None) -> Branch | None:
        caches = self._by_role.get(role)
        if not caches:
            return None
        if tail is not None:
            return _through(tail, caches)
        keys = [key for members in self._split.values() for key in members]
        return _pooled(caches, keys)


def _pooled(caches: Sequence[FeatureCache], keys: Sequence[str]) -> Branch:
    """From memory: a vector for each clip and reading is little."""
    known = [{key: cache.row(key)["rows"] for key in keys if key in cache} for cache in caches]

    def branch(keys: Sequence[str], readings: Sequence[int]) -> Tensor:
        return torch.cat([known[reading][key] for key, reading in zip(keys, readings, strict=True)])

    return branch


def _through(tail: Tail, caches: Sequence[FeatureCache]) -> Branch:
    """From disk, and through the layers that are trained."""

    def branch(keys: Sequence[str], readings: Sequence[int]) -> Tensor:
        rows = [caches[reading].row(key)["rows"] for key, reading in zip(keys, readings, strict=True)]
        device = next(tail.part.parameters()).device
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        return tail.encoder.above(Frames(padded, lengths), tail.cut)

    return branch


class _Work:
    """What frozen encoders have to do before training can begin."""

    def __init__(
        self, config: PaperConfig, models_dir: Path | None = None, progress: Progress = silent
    ) -> None:
        """Raises ModelUnavailable where a part is missing."""
        self._config = config
        self.system = system = config.model.chosen(config.loss.name)
        needed = PaperModel(config.output.name, system, None, models_dir, config.training.device)
        tokenizer = ["tokenizer"] if system.text == "use-multilingual" else []
        self.parts = needed.located(*system.pretrained, *tokenizer)
        self.hashes = {role: content_hash(path) for role, path in self.parts.items()}
        self.device = resolve_device(config.training.device)
        self._progress = progress

    def features(
        self,
        split: Mapping[str, Sequence[ManifestItem]],
        keys: Mapping[str, str],
        encoder: LayeredEncoder | None,
    ) -> _Caches:
        """Each role's features of every clip in each reading; with an encoder that is to be trained, what
        enters the first of its trained layers."""
        by_role: dict[str, list[FeatureCache]] = {}
        for role in ("speech", "spectrogram"):
            if (name := self.system.pretrained.get(role)) is None:
                continue
            adapted = self._config.encoder.adaptation if role == "speech" else None
            cut = None if encoder is None or adapted is None else encoder.depth - adapted.layers
            encode = self._encoder(role, encoder if cut is not None else None, cut or 0)
            by_role[role] = []
            for number, speed in enumerate(self._config.data.speeds):
                items = [*split[_LEARNT], *(split.get(_CHECKED, ()) if number == 0 else ())]
                cache = FeatureCache(
                    self._config.data.cache,
                    *(name, self.hashes[role], speed, cut),
                    precision=self._config.data.precision,
                )
                cache.fill(
                    [keys[item.id] for item in items],
                    partial(_encoded, items, speed, role, encode),
                    together=16 if self.device.type == "cuda" and cut is None else 1,
                    stage=f"{name} at speed {speed:g}",
                    progress=self._progress,
                )
                by_role[role].append(cache)
        return _Caches(
            by_role, {name: [keys[item.id] for item in members] for name, members in split.items()}
        )

    def _encoder(
        self, role: str, encoder: LayeredEncoder | None, cut: int
    ) -> Callable[[Sequence[Segment]], list[Tensor]]:
        """Segments to rows; the network is loaded when it is first needed."""
        if encoder is not None:
            assert isinstance(encoder, nn.Module)
            encoder.to(self.device)
            return lambda segments: [encoder.below(segment.waveform, cut) for segment in segments]
        alone = replace(self.system, **{"spectrogram" if role == "speech" else "speech": None})  # type: ignore[arg-type]
        loaded: list[PaperBackbone] = []

        def encode(segments: Sequence[Segment]) -> list[Tensor]:
            if not loaded:
                loaded.append(PaperBackbone(alone, self.parts, self.device))
            pictured = [segment.pictured for segment in segments if segment.pictured is not None]
            made = loaded[0]([segment.waveform for segment in segments], pictured or None)
            rows = made.speech if role == "speech" else made.picture
            assert rows is not None
            return [row[None] for row in rows]

        return encode

    def texts(self, texts: Iterable[str]) -> dict[str, Tensor]:
        """The vector (dim,) of each of these normalised texts, as the encoder gives it."""
        hashes = [self.hashes[role] for role in ("text", "tokenizer") if role in self.hashes]
        cache = FeatureCache(self._config.data.cache, self.system.text, hashes, precision="float32")
        ordered = sorted(set(texts), key=lambda text: (len(text), text))  # less padding
        loaded: list[Callable[[Sequence[str]], Tensor]] = []

        @torch.inference_mode()
        def compute(places: list[int]) -> Iterable[Row | str]:
            if not loaded:
                loaded.append(load_text_encoder(self.system, self.parts, self.device))
            return [{"rows": row[None]} for row in loaded[0]([ordered[place] for place in places])]

        cache.fill(
            ordered, compute, together=_TEXTS_TOGETHER, stage=self.system.text, progress=self._progress
        )
        return {text: cache.row(text)["rows"][0] for text in ordered}


def _encoded(
    items: Sequence[ManifestItem],
    speed: float,
    role: str,
    encode: Callable[[Sequence[Segment]], list[Tensor]],
    places: list[int],
) -> list[Row | str]:
    found = clips([items[place] for place in places], speed, None if role == "speech" else PICTURE_RATE)
    segments = [segment for segment in found if isinstance(segment, Segment)]
    rows = iter(_rows(segments, encode))
    return [segment if isinstance(segment, str) else next(rows) for segment in found]


def _rows(
    segments: Sequence[Segment], encode: Callable[[Sequence[Segment]], list[Tensor]]
) -> list[Row | str]:
    """Encoders refuse what they have no vector for, such as silence, by ValueError: that clip is left out."""
    if not segments:
        return []
    try:
        return [{"rows": row} for row in encode(segments)]
    except ValueError as error:
        if len(segments) == 1:
            return [str(error)]
        return [row for segment in segments for row in _rows([segment], encode)]
