"""Training `mini`: its fusion, against the texts of the whole training set.

What is `mini`'s own is which features there are, how rows become a batch, and the network; the rest is
sentences, pairs of sentences, and the trainer's.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from clasp_core.encoders.e5 import E5_SMALL, E5Encoder
from clasp_core.encoders.whisper import WHISPER_BASE_TOKENIZER
from clasp_core.encoders.whisper_decoder import STRIDE, WORDS
from clasp_core.language import match_key, normalize_text
from clasp_core.manifest import ManifestItem
from clasp_core.mini import (
    DIM,
    PRETRAINED,
    Features,
    MiniFusion,
    Read,
    SpeechBackbone,
    build_fusion,
    padded,
    save_fusion,
)
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
from clasp_core.types import Seconds

_FRAMES_PER_S = 50
_PAIR_S: Seconds = 12.0
"""About the longest segment that is served."""
_TEXTS_TOGETHER = 64


@dataclass(frozen=True, slots=True)
class MiniModelConfig:
    """[model] with `architecture = "mini"`."""

    architecture: str = "mini"
    rank: int = 16
    """Of the adapters in Whisper's decoder and in the reading layers."""
    window_dropout: float = 0.1
    """Mean share of a clip's windows, in one stretch, that are not heard."""
    picture_dropout: float = 0.5
    """Share of examples that must do without their spectrogram."""
    pairs: int = 0
    """Sentences made of two items of one language; `pair_share` of the number of items is drawn per epoch."""
    pair_share: float = 0.3
    words_weight: float = 0.2
    """Of the loss of the words heard: each of a clip's tokens against those of the whole batch."""
    adapter_rate: float = 1.6
    """The adapters' learning rate, as a multiple of the others'."""

    def __post_init__(self) -> None:
        require(self.rank > 0, "model.rank must be above 0")
        for name in ("window_dropout", "picture_dropout", "pair_share"):
            require(0 <= getattr(self, name) <= 1, f"model.{name} must be within 0 and 1")
        for name in ("words_weight", "adapter_rate"):
            require(getattr(self, name) >= 0, f"model.{name} may not be negative")


@dataclass(frozen=True, slots=True)
class MiniConfig:
    """What `clasp train` reads for `mini`."""

    data: DataConfig
    output: Path
    model: MiniModelConfig = field(default_factory=MiniModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        self.data.require_watchable(self.training.watch)


@dataclass(frozen=True, slots=True)
class Sentence:
    """A training target: a normalised text, and the clips (by key) that say it, one after the other."""

    text: str
    words: tuple[int, ...]
    """Whisper's tokens of the text as it is written, each once."""
    clips: tuple[str, ...]
    weight: float
    frames: int


def train(config: MiniConfig, *, models_dir: Path | None = None, progress: Progress = silent) -> Path:
    """Train and write `model.json`, `fusion.safetensors` and `training.json` to `config.output`."""
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    items, held_out = ({clip_key(item): item for item in items} for items in examples_of(config.data))
    readings = _extracted(config, items, held_out, models_dir, progress)
    usable = {key: item for key, item in items.items() if all(key in reading for reading in readings)}
    checked = {key: item for key, item in held_out.items() if key in readings[0]}
    require(bool(usable), "not one recording of the manifest can be learnt from")
    require(bool(checked) or not config.data.validates, "not one recording can be used for validation")
    tokenizer = Tokenizer.from_file(str(WHISPER_BASE_TOKENIZER.locate(models_dir)))
    sentences = _sentences(config, usable, readings[0], tokenizer)
    checking = _singles(config, checked, readings[0], tokenizer)
    texts = [sentence.text for sentence in (*sentences, *checking)]
    raw = _embedded(texts, models_dir, config.data.cache, progress)
    mean = raw[: len(usable)].mean(0)
    numbers: dict[str, int] = {}
    same = torch.tensor([numbers.setdefault(match_key(text), len(numbers)) for text in texts])
    parts = [len(sentences), len(checking)]
    goals = zip(torch.split(F.normalize(raw - mean, dim=1), parts), torch.split(same, parts), strict=True)
    learning, checked_by = (
        Lesson(said, Objective(config.loss, *goal))
        for said, goal in zip((sentences, checking), goals, strict=True)
    )
    model = config.model
    e5 = E5Encoder.load(E5_SMALL.locate(models_dir))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        fusion = build_fusion(
            models_dir,
            *pieces_of_words(tokenizer, e5),
            rank=model.rank,
        )
    fusion.text_mean.copy_(mean)
    learnt = [
        [[key, item.text, item.lang, item.source] for key, item in part.items()] for part in (usable, checked)
    ]
    with run_folder(config.data.cache, described(config), _fingerprints(), learnt) as states:
        history = fit(
            MiniTask(config, fusion, readings, learning, checked_by),
            LoopConfig(config.training, config.optimizer, config.schedule),
            states / "state.safetensors",
            curves=config.training.tensorboard and config.training.tensorboard / config.output.name,
            progress=progress,
        )
        write_model(
            config.output,
            {"architecture": "mini", "dim": DIM},
            {"fusion.safetensors": lambda path: save_fusion(fusion, path)},
            config=config,
            items=len(usable),
            history=history,
        )
    return config.output


class Lesson(NamedTuple):
    """Sentences, and the loss of vectors that are to be theirs."""

    sentences: Sequence[Sentence]
    objective: Objective


class MiniTask:
    """The fusion, learning to give each sentence's features the sentence's text vector."""

    def __init__(
        self,
        config: MiniConfig,
        fusion: MiniFusion,
        readings: Sequence[FeatureCache],
        learning: Lesson,
        checking: Lesson,
    ) -> None:
        """`checking` may have no sentences: then nothing is validated."""
        self.module = nn.ModuleDict({"fusion": fusion, "objective": learning.objective})
        self._config = config
        self._fusion = fusion
        self._readings = readings
        self._learning = learning
        self._checking = checking
        checking.objective.log_scale = learning.objective.log_scale
        self._weights = np.array([sentence.weight for sentence in learning.sentences])

    def groups(self) -> Sequence[ParameterGroup]:
        """Adapters begin as nothing: decay would only draw them back there."""
        adapters: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self._fusion.named_parameters():
            if parameter.requires_grad:
                (adapters if ".parametrizations." in name else others).append(parameter)
        groups = [
            ParameterGroup(adapters, self._config.model.adapter_rate, decays=False),
            ParameterGroup(others),
        ]
        if self._config.loss.learned:
            groups.append(ParameterGroup([self._learning.objective.log_scale], decays=False))
        return groups

    def batches(self, epoch: int) -> Sequence[list[tuple[int, int]]]:
        """Places of sentences, each with one of its readings, about as often as the sentences' weights say.

        Sentences of like length share a batch: less padding, and harder negatives.
        """
        random = np.random.default_rng([self._config.training.seed, epoch])
        sentences, size = self._learning.sentences, self._config.training.batch_size
        drawn = draw(self._weights, random)
        batches = []
        for start in range(0, len(drawn), 16 * size):
            alike = sorted(drawn[start : start + 16 * size], key=lambda n: sentences[n].frames)
            batches += [alike[at : at + size] for at in range(0, len(alike), size)]
        batches = [batches[n] for n in random.permutation(len(batches)) if len(batches[n]) >= size // 4]
        return [
            list(zip(batch, random.integers(len(self._readings), size=len(batch)).tolist(), strict=True))
            for batch in batches
        ]

    def loss(self, batch: Sequence[tuple[int, int]]) -> Tensor:
        model = self._config.model
        device = self._fusion.text_mean.device
        sentences, objective = self._learning
        features = _together(
            [self._features(sentences[place], reading, moved=True) for place, reading in batch]
        )
        read = self._fusion(
            features.to(device),
            with_picture=(torch.rand(len(batch)) >= model.picture_dropout).float().to(device),
            audible=_audible(features, model.window_dropout).to(device),
        )
        places = torch.tensor([place for place, _ in batch], device=device)
        loss: Tensor = objective(read.vectors, places)
        words = [sentences[place].words for place, _ in batch]
        return loss + model.words_weight * _words_loss(read, words, self._fusion.decoder.words)

    def validate(self) -> Mapping[str, float]:
        """Over the held-out clips as spoken: the loss, a batch at a time, and text-to-speech figures."""
        sentences, objective = self._checking
        if not sentences:
            return {}
        device = self._fusion.text_mean.device

        def vectors(places: range) -> Tensor:
            features = _together([self._features(sentences[place], 0) for place in places])
            made: Tensor = self._fusion(features.to(device)).vectors
            return made

        return figures(objective, vectors, self._config.training.batch_size)

    def _features(self, said: Sentence, reading: int, *, moved: bool = False) -> dict[str, Tensor]:
        """A sentence's rows: its clips' one after the other, in the first one's language; `moved` by up to a
        window's stride, so that windows do not always begin where the clip does."""
        rows = [self._readings[reading].row(key) for key in said.clips]
        shift = int(torch.randint(STRIDE, ())) if moved else 0
        frames = torch.cat([row["frames"] for row in rows])
        return {
            "frames": F.pad(frames, (0, 0, shift, 0)),
            "pictures": torch.cat([row["pictures"] for row in rows]),
            "languages": rows[0]["languages"],
        }


def _words_loss(read: Read, words: Sequence[Sequence[int]], tokens: Tensor) -> Tensor:
    """Each of a clip's tokens, wherever it is heard, against all tokens of the batch.

    It keeps the windows' states what Whisper's decoder has them be: words, of whatever language.
    """
    known = sorted({word for some in words for word in some})
    place = {word: number for number, word in enumerate(known)}
    said = torch.zeros(len(words), len(known), device=tokens.device)
    for row, some in zip(said, words, strict=True):
        row[[place[word] for word in some]] = 1
    scores = (read.windows @ tokens[known].to(read.windows.dtype).T).float()
    anywhere = scores.masked_fill(~read.valid[..., None], float("-inf")).logsumexp(1)
    share = said / said.sum(1, keepdim=True).clamp(min=1)
    return -(anywhere.log_softmax(1) * share).sum(1).mean()


def pieces_of_words(tokenizer: Tokenizer, e5: E5Encoder) -> tuple[Tensor, Tensor]:
    """The text encoder's pieces of each of Whisper's tokens, end to end, and where each token's end.

    A token inside a word gives the pieces it has inside one; parts of characters, and blanks, give none.
    """
    pieces: list[int] = []
    ends: list[int] = []
    for token in range(WORDS):
        text = tokenizer.decode([token])
        if "\N{REPLACEMENT CHARACTER}" not in text and (bare := text.strip()):
            encoding = e5.tokenizer.encode(e5.prepared(bare))
            own = list(zip(encoding.ids, encoding.tokens, strict=True))[1:-1]
            if not text.startswith(" ") and len(own) > 1 and own[0][1] == "\N{LOWER ONE EIGHTH BLOCK}":
                own = own[1:]
            pieces += [piece for piece, _ in own]
        ends.append(len(pieces))
    return torch.tensor(pieces, dtype=torch.int32), torch.tensor(ends, dtype=torch.int32)


# --- what is the network's own


def _extracted(
    config: MiniConfig,
    items: Mapping[str, ManifestItem],
    held_out: Mapping[str, ManifestItem],
    models_dir: Path | None,
    progress: Progress,
) -> list[FeatureCache]:
    """The features of all items in each reading, and of those held out in the first."""
    loaded: list[SpeechBackbone] = []

    def compute(speed: float, wanted: Sequence[ManifestItem], places: list[int]) -> Iterable[Row | str]:
        if not loaded:
            loaded.append(SpeechBackbone(models_dir))
        for segment in clips([wanted[place] for place in places], speed):
            if isinstance(segment, str):
                yield segment
            else:
                made = loaded[0]([segment.waveform])
                yield {
                    "frames": made.frames[0],
                    "pictures": made.pictures[0],
                    "languages": made.languages,
                }

    readings = []
    for number, speed in enumerate(config.data.speeds):
        cache = FeatureCache(
            config.data.cache, "mini", _fingerprints(), speed, precision=config.data.precision
        )
        wanted = {**items, **(held_out if number == 0 else {})}
        cache.fill(
            list(wanted),
            partial(compute, speed, list(wanted.values())),
            stage=f"features at speed {speed:g}",
            progress=progress,
        )
        readings.append(cache)
    return readings


def _fingerprints() -> list[str]:
    """Of the frozen parts."""
    return [weights.sources[0].sha256 for weights in PRETRAINED.values()]


def _together(rows: Sequence[Mapping[str, Tensor]]) -> Features:
    frames, pictures = (padded([row[name] for row in rows]) for name in ("frames", "pictures"))
    return Features(*frames, *pictures, torch.cat([row["languages"] for row in rows]))


def _audible(features: Features, share: float) -> Tensor:
    """All windows but a random stretch of each clip's: the fusion must not lean on single words."""
    count = -(-features.frames.shape[1] // STRIDE)
    audible = torch.ones(len(features.frames), count, dtype=torch.bool)
    for row, frames in zip(audible, features.frame_lengths.tolist(), strict=True):
        windows = -(-frames // STRIDE)
        width = int(torch.rand(()) * 2 * share * windows)
        start = int(torch.rand(()) * max(1, windows - width))
        row[start : start + width] = False
    return audible


# --- sentences


def _sentences(
    config: MiniConfig, usable: Mapping[str, ManifestItem], reading: FeatureCache, tokenizer: Tokenizer
) -> list[Sentence]:
    """Every usable clip, and then `pairs` random pairs of one language.

    A pair is two recordings played one after the other, with the two texts as its text: new sentences
    out of known words, which keep the fusion from learning recordings by heart.
    """
    random = np.random.default_rng(config.training.seed)
    singles = _singles(config, usable, reading, tokenizer)
    by_language: dict[str | None, list[Sentence]] = {}
    for item, sentence in zip(usable.values(), singles, strict=True):
        by_language.setdefault(item.lang, []).append(sentence)
    groups = list(by_language.values())
    shares = np.array([len(group) for group in groups]) / len(singles)
    wanted = config.model.pairs
    pairs: list[Sentence] = []
    for _ in range(100 * wanted):  # there may be few, or none, that are short enough
        if len(pairs) == wanted:
            break
        group = groups[int(random.choice(len(groups), p=shares))]
        first, second = (group[place] for place in random.integers(len(group), size=2))
        if first.frames + second.frames <= _PAIR_S * _FRAMES_PER_S:
            weight = config.model.pair_share * len(singles) / wanted
            text = f"{first.text} {second.text}"
            words = tuple(sorted({*first.words, *second.words}))
            frames = first.frames + second.frames
            pairs.append(Sentence(text, words, first.clips + second.clips, weight, frames))
    return singles + pairs


def _singles(
    config: MiniConfig, usable: Mapping[str, ManifestItem], reading: FeatureCache, tokenizer: Tokenizer
) -> list[Sentence]:
    return [
        Sentence(
            normalize_text(item.text, item.lang),
            _words(item.text, tokenizer),
            (key,),
            config.data.weights.get(item.source or "", 1.0),
            reading.length(key, "frames"),
        )
        for key, item in usable.items()
    ]


def _words(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Whisper's tokens of a sentence, each once; it writes a sentence's first word as one within, too."""
    return tuple(sorted(set(tokenizer.encode(f" {text}", add_special_tokens=False).ids)))


def _embedded(texts: Sequence[str], models_dir: Path | None, folder: Path, progress: Progress) -> Tensor:
    """E5 vectors (n, 384) of normalised texts."""
    cache = FeatureCache(folder, "text", E5_SMALL.sources[0].sha256, precision="float32")
    encoder: E5Encoder | None = None
    ordered = sorted(set(texts), key=lambda text: (len(text), text))  # less padding

    def compute(places: list[int]) -> Iterable[Row | str]:
        nonlocal encoder
        encoder = encoder or E5Encoder.load(E5_SMALL.locate(models_dir))
        return [{"vector": vector[None]} for vector in encoder([ordered[place] for place in places])]

    cache.fill(ordered, compute, together=_TEXTS_TOGETHER, stage="texts", progress=progress)
    return torch.cat([cache.row(text)["vector"] for text in texts])
