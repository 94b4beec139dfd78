"""Training a fusion: from a manifest of recordings with transcripts to a model folder that serves.

The encoders are frozen, so their features are computed once and kept on disk; an epoch is then only
the small fusion network. The loss is the paper's contrastive one (CLASP, section 3.3): a segment
against the texts of the whole training set, and a text against the segments of its batch.
"""

import hashlib
import json
import logging
import math
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from clasp_core import sandbox
from clasp_core.encoders.e5 import E5_SMALL, E5Encoder
from clasp_core.errors import InvalidAudio, InvalidField
from clasp_core.language import match_key, normalize_text
from clasp_core.manifest import ManifestItem, read_manifest
from clasp_core.mini import PRETRAINED, Features, FusionHead, MiniFusion, SpeechBackbone, save_fusion
from clasp_core.models import resolve_device
from clasp_core.segmenting import SegmentConfig, split
from clasp_core.types import SAMPLING_RATE, Waveform

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """What `clasp train` reads from a TOML file; relative paths start at that file's folder.

    Environment variables in `manifest` are expanded. `speeds` are the readings of each recording:
    1.0 as spoken, others resampled to that tempo and pitch.
    """

    manifest: Path
    output: Path
    cache: Path
    split: str = "train"
    speeds: tuple[float, ...] = (1.0,)
    epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 5e-4
    weight_decay: float = 0.05
    warmup_steps: int = 100
    temperature: float = 0.05
    dropout: float = 0.2
    token_dropout: float = 0.1
    picture_dropout: float = 0.5
    """Share of examples that must do without their spectrogram branch."""
    pairs: int = 0
    """Sentences made of two items of one language; `pair_share` of the number of items is drawn per epoch."""
    pair_share: float = 0.5
    members: int = 3
    """Heads trained apart, each with its own start and order; the model is their mean."""
    width: int = 384
    layers: int = 2
    average_last: int = 5
    seed: int = 0
    device: str = "auto"
    threads: int = 0
    models_dir: Path | None = None
    weights: dict[str, float] = field(default_factory=dict)
    """How often an item is drawn per epoch, by source; 1 where a source is not named."""


def read_config(path: Path) -> TrainingConfig:
    """Raises InvalidField for an unknown or missing name."""
    import os

    values = tomllib.loads(path.read_text())
    unknown = set(values) - set(TrainingConfig.__dataclass_fields__)
    if unknown or not {"manifest", "output", "cache"} <= set(values):
        raise InvalidField(f"{path}: unknown {sorted(unknown)}; manifest, output and cache are needed.")
    for name in ("manifest", "output", "cache", "models_dir"):
        if name in values:
            values[name] = path.parent / os.path.expandvars(values[name])
    if "speeds" in values:
        values["speeds"] = tuple(values["speeds"])
    return TrainingConfig(**values)


@dataclass(frozen=True)
class FeatureSet:
    """Encoder features of one reading of a manifest, ragged rows laid end to end, float16.

    Item i has speech[speech_ends[i - 1] : speech_ends[i]] (tokens, 1024) and the pictures likewise.
    """

    ids: NDArray[np.str_]
    speech: NDArray[np.float16]
    speech_ends: NDArray[np.int64]
    pictures: NDArray[np.float16]
    picture_ends: NDArray[np.int64]

    @cached_property
    def place(self) -> dict[str, int]:
        """Where each item is."""
        return {str(item): place for place, item in enumerate(self.ids)}

    def item(self, item: str) -> Features:
        """One item's features, as a batch of one."""
        place = self.place[item]
        speech = self._row(self.speech, self.speech_ends, place)
        pictures = self._row(self.pictures, self.picture_ends, place)
        return Features(*_padded([speech]), *_padded([pictures]))

    @staticmethod
    def _row(values: NDArray[np.float16], ends: NDArray[np.int64], place: int) -> Tensor:
        start = ends[place - 1] if place else 0
        return torch.from_numpy(values[start : ends[place]].astype(np.float32))


def _padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True), torch.tensor(
        [len(row) for row in rows]
    )


def extract(
    items: Sequence[ManifestItem], speed: float, backbone: SpeechBackbone, cache: Path, *, shard: int = 500
) -> FeatureSet:
    """Features of every item at one speed; shards already in `cache` are not computed again.

    A clip is one training example whatever its length: only the silence around its speech is cut off.
    Items that cannot be decoded are left out with a warning.
    """
    cache.mkdir(parents=True, exist_ok=True)
    shards = []
    for start in range(0, len(items), shard):
        chosen = items[start : start + shard]
        pretrained = [weights.sources[0].sha256 for weights in PRETRAINED.values()]
        identity = json.dumps([speed, pretrained, [(item.id, str(item.audio)) for item in chosen]])
        path = cache / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.npz"
        if not path.exists():
            _save_shard(path, list(_features(chosen, speed, backbone)))
            _log.info("features: %d of %d at speed %s", start + len(chosen), len(items), speed)
        with np.load(path) as stored:
            shards.append({name: stored[name] for name in stored.files})
    return FeatureSet(
        np.concatenate([s["ids"] for s in shards]),
        np.concatenate([s["speech"] for s in shards]),
        np.cumsum(np.concatenate([s["speech_lengths"] for s in shards])),
        np.concatenate([s["pictures"] for s in shards]),
        np.cumsum(np.concatenate([s["picture_lengths"] for s in shards])),
    )


def _features(
    items: Sequence[ManifestItem], speed: float, backbone: SpeechBackbone
) -> Iterator[tuple[str, Features]]:
    whole = SegmentConfig(whole_s=29.0 / min(speed, 1.0))
    for item in items:
        try:
            segments = list(split(sandbox.decode(item.audio, max_duration_s=29.0 * min(speed, 1.0)), whole))
        except InvalidAudio as error:
            _log.warning("left out %s: %s", item.id, error)
            continue
        for segment in segments[:1]:
            features = backbone([_at_speed(segment.waveform, speed)])
            yield item.id, features


def _at_speed(waveform: Waveform, speed: float) -> Waveform:
    if speed == 1.0:
        return waveform
    import soxr

    resampled: Waveform = soxr.resample(waveform, SAMPLING_RATE, SAMPLING_RATE / speed)
    return resampled


def _save_shard(path: Path, rows: Sequence[tuple[str, Features]]) -> None:
    temporary = path.with_suffix(".tmp.npz")
    np.savez(
        temporary,
        ids=np.array([item for item, _ in rows]),
        speech=np.concatenate([row.speech[0].half().numpy() for _, row in rows]),
        speech_lengths=np.array([int(row.speech_lengths[0]) for _, row in rows]),
        pictures=np.concatenate([row.pictures[0].half().numpy() for _, row in rows]),
        picture_lengths=np.array([int(row.picture_lengths[0]) for _, row in rows]),
    )
    temporary.replace(path)


def embed_texts(texts: Sequence[str], models_dir: Path | None, cache: Path) -> Tensor:
    """E5 vectors (n, 384) of normalised texts, in batches of like length; computed once."""
    identity = json.dumps([E5_SMALL.sources[0].sha256, *texts])
    path = cache / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.npy"
    if path.exists():
        return torch.from_numpy(np.load(path))
    encoder = E5Encoder.load(E5_SMALL.locate(models_dir))
    vectors = torch.empty(len(texts), 384)
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    for start in range(0, len(order), 64):
        places = order[start : start + 64]
        vectors[places] = encoder([texts[place] for place in places])
    cache.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.npy")
    np.save(temporary, vectors.numpy())
    temporary.replace(path)
    return vectors


def train(config: TrainingConfig) -> Path:
    """Train and write `model.json`, `fusion.safetensors` and `training.json` to `config.output`."""
    if config.threads:
        torch.set_num_threads(config.threads)
    items = [item for item in read_manifest(config.manifest) if item.split == config.split]
    backbone = SpeechBackbone(config.models_dir)
    readings = [extract(items, speed, backbone, config.cache) for speed in config.speeds]
    del backbone
    fusion, history = fit(config, items, readings)
    config.output.mkdir(parents=True, exist_ok=True)
    save_fusion(fusion, config.output / "fusion.safetensors")
    (config.output / "model.json").write_text(
        json.dumps({"format": "clasp-model/1", "architecture": "mini", "dim": 384}, indent=1) + "\n"
    )
    # the places on this machine say nothing about the model
    settings = {name: value for name, value in asdict(config).items() if not isinstance(value, Path)}
    record = {"config": settings, "items": len(items), "history": history}
    (config.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    return config.output


def fit(
    config: TrainingConfig, items: Sequence[ManifestItem], readings: Sequence[FeatureSet]
) -> tuple[MiniFusion, list[dict[str, float]]]:
    """The trained fusion, and the loss of each member's epochs."""
    random = np.random.default_rng(config.seed)
    device = resolve_device(config.device)
    sentences = _sentences(config, items, readings, random)
    raw = embed_texts([sentence.text for sentence in sentences], config.models_dir, config.cache)
    mean = raw[: len(items)].mean(0)
    targets = F.normalize(raw - mean, dim=1).to(device)
    numbers: dict[str, int] = {}
    text_number = torch.tensor(
        [numbers.setdefault(match_key(sentence.text), len(numbers)) for sentence in sentences], device=device
    )
    torch.manual_seed(config.seed)
    fusion = MiniFusion(config.members, config.width, config.layers, dropout=config.dropout).to(device)
    fusion.text_mean.copy_(mean)
    batches = _Batches(config, sentences, readings, random)
    history = []
    for member, head in enumerate(fusion.heads):
        assert isinstance(head, FusionHead)
        for losses in _fit_head(config, head, batches, targets, text_number):
            history.append({"member": member, **losses})
            _log.info("member %(member)d, epoch %(epoch)d: loss %(loss).3f, %(seconds).0f s", history[-1])
    return fusion.eval(), history


def _fit_head(
    config: TrainingConfig, head: FusionHead, batches: "_Batches", targets: Tensor, text_number: Tensor
) -> Iterator[dict[str, float]]:
    """Train one head in place, yielding each epoch's loss; its weights end as the last epochs' mean."""
    device = targets.device
    optimizer = torch.optim.AdamW(head.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    steps = config.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _cosine(step, config.warmup_steps, steps)
    )
    averaged: list[dict[str, Tensor]] = []
    for epoch in range(config.epochs):
        started = time.monotonic()
        head.train()
        losses = []
        for chosen, features in batches:
            places = torch.tensor(chosen, device=device)
            with_picture = torch.rand(len(chosen), 1) >= config.picture_dropout
            vectors = head(_drop_tokens(features, config.token_dropout).to(device), with_picture.to(device))
            loss = _contrastive(vectors, places, targets, text_number, config.temperature)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        if epoch >= config.epochs - config.average_last:
            averaged.append({name: value.detach().clone() for name, value in head.state_dict().items()})
        yield {"epoch": epoch, "loss": float(np.mean(losses)), "seconds": time.monotonic() - started}
    head.load_state_dict({name: torch.stack([s[name] for s in averaged]).mean(0) for name in averaged[0]})


@dataclass(frozen=True, slots=True)
class _Sentence:
    """A training target: a normalised text, and the items that say it, one after the other."""

    text: str
    items: tuple[str, ...]
    weight: float
    tokens: int


def _sentences(
    config: TrainingConfig,
    items: Sequence[ManifestItem],
    readings: Sequence[FeatureSet],
    random: np.random.Generator,
) -> list[_Sentence]:
    """Every item that all readings have, and then `config.pairs` random pairs of one language.

    A pair is two recordings played one after the other, with the two texts as its text: new sentences
    out of known words, which keep the fusion from learning recordings by heart.
    """
    tokens = {
        str(item): int(count)
        for item, count in zip(readings[0].ids, np.diff(readings[0].speech_ends, prepend=0), strict=True)
    }
    usable = [item for item in items if all(item.id in reading.place for reading in readings)]
    singles = [
        _Sentence(
            normalize_text(item.text, item.lang),
            (item.id,),
            config.weights.get(item.source or "", 1.0),
            tokens[item.id],
        )
        for item in usable
    ]
    by_language: dict[str | None, list[_Sentence]] = {}
    for item, sentence in zip(usable, singles, strict=True):
        by_language.setdefault(item.lang, []).append(sentence)
    groups = list(by_language.values())
    shares = np.array([len(group) for group in groups]) / len(singles)
    pairs: list[_Sentence] = []
    while len(pairs) < config.pairs:
        group = groups[int(random.choice(len(groups), p=shares))]
        first, second = (group[place] for place in random.integers(len(group), size=2))
        if first.tokens + second.tokens <= _PAIR_TOKENS:
            pairs.append(
                _Sentence(
                    f"{first.text} {second.text}",
                    first.items + second.items,
                    config.pair_share * len(singles) / config.pairs,
                    first.tokens + second.tokens,
                )
            )
    return singles + pairs


_PAIR_TOKENS = 60
"""12 s: about the longest segment that is served."""


class _Batches:
    """Batches of (places of sentences, features), drawn anew at each iteration.

    Sentences of like length share a batch: less padding, and harder negatives.
    """

    def __init__(
        self,
        config: TrainingConfig,
        sentences: Sequence[_Sentence],
        readings: Sequence[FeatureSet],
        random: np.random.Generator,
    ) -> None:
        self._sentences = sentences
        self._readings = readings
        self._random = random
        self._batch_size = config.batch_size
        self._weights = np.array([sentence.weight for sentence in sentences])

    def __len__(self) -> int:
        return math.ceil(float(self._weights.sum()) / self._batch_size)

    def __iter__(self) -> Iterator[tuple[list[int], Features]]:
        """Every sentence about as often as its weight says, each time in a reading chosen at random."""
        times = np.floor(self._weights + self._random.random(len(self._weights))).astype(int)
        drawn = self._random.permutation(np.repeat(np.arange(len(times)), times))
        group = 16 * self._batch_size
        batches = []
        for start in range(0, len(drawn), group):
            alike = sorted(drawn[start : start + group].tolist(), key=lambda n: self._sentences[n].tokens)
            batches += [alike[at : at + self._batch_size] for at in range(0, len(alike), self._batch_size)]
        for number in self._random.permutation(len(batches)):
            if len(batches[number]) >= self._batch_size // 4:
                yield batches[number], self._features(batches[number])

    def _features(self, chosen: Sequence[int]) -> Features:
        speech, pictures = [], []
        for number in chosen:
            reading = self._readings[int(self._random.integers(len(self._readings)))]
            parts = [reading.item(item) for item in self._sentences[number].items]
            speech.append(torch.cat([part.speech[0] for part in parts]))
            pictures.append(torch.cat([part.pictures[0] for part in parts]))
        return Features(*_padded(speech), *_padded(pictures))


def _contrastive(
    vectors: Tensor, places: Tensor, targets: Tensor, text_number: Tensor, temperature: float
) -> Tensor:
    """Symmetric contrastive loss; a repeated text is never a negative of itself."""
    own = text_number[places]
    to_texts = vectors @ targets.T / temperature
    repeats = (own[:, None] == text_number[None]) & (
        torch.arange(len(targets), device=places.device) != places[:, None]
    )
    speech_to_text = F.cross_entropy(to_texts.masked_fill(repeats, float("-inf")), places)
    within = targets[places] @ vectors.T / temperature
    twins = (own[:, None] == own[None]) & ~torch.eye(len(own), dtype=torch.bool, device=own.device)
    text_to_speech = F.cross_entropy(
        within.masked_fill(twins, float("-inf")), torch.arange(len(own), device=own.device)
    )
    return (speech_to_text + text_to_speech) / 2


def _drop_tokens(features: Features, share: float) -> Features:
    """Zero a random span of each clip's speech tokens: the fusion must not lean on single words."""
    speech = features.speech.clone()
    for row, length in enumerate(features.speech_lengths.tolist()):
        width = int(torch.rand(()) * 2 * share * length)
        start = int(torch.rand(()) * max(1, length - width))
        speech[row, start : start + width] = 0
    return features._replace(speech=speech)


def _cosine(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))
