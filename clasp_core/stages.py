"""The four stages of the paper's Table 2 (arXiv 2412.13071, section 4) in one run, and its claims judged.

    1  which inputs: spectrogram, speech, both            text to speech, 10 candidates
    2  which encoders, joined by which fusion             text to speech, 10 candidates
    3  which loss, against searching in transcripts       speech to text, all candidates
    4  questions in other languages                       text to speech, all candidates

Any manifest is trained and tested on, by whatever encoders are on this machine. What is compared is trained
alike, on the same recordings, and measured on the same; differences are judged by the paired bootstrap over
the questions. It is not about chance in training: each system is trained once.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from clasp_core import systems
from clasp_core.durability import write_whole
from clasp_core.errors import InvalidManifest, ModelUnavailable
from clasp_core.evaluation import query_text
from clasp_core.language import canonical_tag, normalize_text, primary_language
from clasp_core.manifest import ManifestItem, read_manifest, write_manifest
from clasp_core.metrics import Measured, paper_measure
from clasp_core.models import PaperModel, open_model, resolve_device
from clasp_core.systems import System
from clasp_core.training.config import DataConfig, digest, parse, read_table, require
from clasp_core.training.features import clip_key, clips
from clasp_core.training.losses import LossConfig
from clasp_core.training.paper import PaperConfig, PaperModelConfig, TrainedSystem, identity, train
from clasp_core.training.trainer import OptimizerConfig, Progress, ScheduleConfig, TrainingConfig, silent
from clasp_core.transcription import Transcriber, open_transcriber
from clasp_core.types import Embeddings, Seconds, Segment

STAGES = (1, 2, 3, 4)
FUSIONS = ("gating", "concat")
CANDIDATES, FEW_THRESHOLD = 10, 0.4
"""Of stages 1 and 2: with these the notebooks give the table's figures (PG 146-148)."""
THRESHOLD = 0.5
"""Of stages 3 and 4."""
VALIDATION_SHARE = 0.1
"""Of the training items, drawn by item as in the paper, where the manifest has no split "validation"."""
_TIMED = 16
_SAVE_EVERY = 16

PAPER: Mapping[str, Mapping[str, float]] = {
    name: dict(zip(("hits@1", "mrr", "macro_f1", "mean_rank"), figures, strict=False))
    for name, figures in {
        "Spectrogram": (0.399, 0.610, 0.574),
        "Self-supervised speech": (0.904, 0.947, 0.747),
        "Combined": (0.935, 0.965, 0.792),
        "XLM-R + Wav2Vec2, gating": (0.850, 0.912, 0.594),
        "XLM-R + Wav2Vec2, concat": (0.866, 0.922, 0.801),
        "LaBSE + Wav2Vec2, gating": (0.949, 0.972, 0.700),
        "LaBSE + Wav2Vec2, concat": (0.966, 0.982, 0.858),
        "XLM-R + HuBERT, gating": (0.993, 0.996, 0.835),
        "XLM-R + HuBERT, concat": (0.996, 0.997, 0.950),
        "LaBSE + HuBERT, gating": (0.998, 0.999, 0.893),
        "LaBSE + HuBERT, concat": (0.999, 0.999, 0.956),
        "LASP": (0.878, 0.909, 0.534, 9.092),
        "Wav2Vec2 ASR": (0.927, 0.939, 0.678, 38.300),
        "CLASP": (0.940, 0.955, 0.710, 7.710),
        "HuBERT ASR": (0.953, 0.963, 0.679, 17.840),
        "Persian": (0.794, 0.848, 0.670, 26.960),
        "German": (0.812, 0.863, 0.671, 21.637),
        "French": (0.849, 0.892, 0.718, 16.100),
        "Chinese": (0.822, 0.871, 0.743, 27.125),
    }.items()
}
"""Table 2 as printed; it has no mean rank in stages 1 and 2."""

_SPEECH = {"hubert-large": "HuBERT", "wav2vec2-base": "Wav2Vec2"}
_TEXT = {"labse": "LaBSE", "xlm-r": "XLM-R"}
_LANGUAGES = {"fr": "French", "zh": "Chinese", "de": "German", "fa": "Persian"}
"""Best first by hits@1, as the table has them."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How every system is trained: the sections of `clasp train` that are not about data or model.

    [loss] is of the contrastive loss, but for `delta`. Without a file: early stopping on the validation loss
    with the paper's patience (TE 16), and a learning rate for a reduced set: 5e-6 over its 91,000 recordings
    would leave one of 1,500 where it began.
    """

    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(epochs=100, batch_size=32, watch="loss", patience=10)
    )


def read_recipe(path: Path) -> Recipe:
    """A recipe from a TOML file. Raises InvalidField as `training.read_config` does."""
    return parse(Recipe, read_table(path), path.parent)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run, on what.

    The first speech, spectrogram and text encoder make the systems of stages 1, 3 and 4, concatenated.
    """

    manifest: Path
    output: Path
    """Folder of the report, the trained systems and, in `cache`, all that was computed on the way."""
    train: str = "train"
    test: str = "test"
    """Splits of the manifest."""
    lang: str | None = None
    """Only recordings in this language."""
    train_items: int | None = None
    test_items: int | None = None
    """So many of each split, drawn by the seed; a larger number keeps those of a smaller one."""
    queries: tuple[Path, ...] = ()
    """Manifests of recordings with `query` and `query_lang`, for stage 4."""
    stages: tuple[int, ...] = STAGES
    speech: tuple[str, ...] = ()
    spectrogram: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    """Names of encoders; none for all that are on this machine."""
    transcribers: tuple[str, ...] = ("whisper-base",)
    """As `open_transcriber` takes them."""
    recipe: Recipe = field(default_factory=Recipe)
    seed: int = 0

    def __post_init__(self) -> None:
        require(set(self.stages) <= set(STAGES), f"the stages are {', '.join(map(str, STAGES))}")
        require(bool(self.stages), "no stage is asked for")
        require(4 not in self.stages or bool(self.queries), "stage 4 needs a manifest of queries")
        require(self.train != self.test, "training and test recordings must be of different splits")


# --- verdicts

Verdict: TypeAlias = Literal["held", "did not hold", "not decided"]


def verdict(low: float, high: float) -> Verdict:
    """Of "greater than 0", by an interval."""
    if low > 0:
        return "held"
    return "did not hold" if high < 0 else "not decided"


@dataclass(frozen=True, slots=True)
class Contrast:
    """Where one side does better than another, or at least comes near: a claim, measured."""

    stage: int
    claim: str
    figure: str
    """Of `metrics.MEANS`; `mean_rank` is better where it is lower."""
    better: Measured
    worse: Measured
    share: float = 1.0
    """How much of what `worse` finds is to be reached: below 1 where the claim is "about as good". For
    figures that are means over queries, as all are but macro_f1 and golden_accuracy."""
    paired: bool = True
    in_paper: float | None = None
    """How much better the paper found it."""

    def judged(self, seed: int = 0) -> dict[str, Any]:
        """`advantage` over that share, and its `ci95`: positive where `better` is."""
        sign = -1.0 if self.figure == "mean_rank" else 1.0
        goal = replace(self.worse, per_query=self.worse.per_query * self.share)
        found = self.better.difference_from(goal, paired=self.paired, seed=seed)[self.figure]
        low, high = sorted(sign * end + 0.0 for end in found["ci95"])  # no -0.0
        return {
            "stage": self.stage,
            "claim": self.claim,
            "figure": self.figure,
            "advantage": sign * found["difference"] + 0.0,
            "ci95": [low, high],
            "share": self.share,
            "paper": self.in_paper,
            "verdict": verdict(low, high),
        }


def mean_over(systems: Sequence[Measured]) -> Measured:
    """What several systems did with the same queries, on average."""
    rows = np.mean([system.per_query for system in systems], axis=0)
    return replace(systems[0], per_query=rows)


# --- the run


@dataclass(frozen=True, slots=True)
class _Row:
    stage: int
    name: str
    measured: Measured
    paper: str | None = None


def run(
    plan: Plan,
    *,
    models_dir: Path | None = None,
    device: Literal["auto", "cpu", "cuda"] = "cpu",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train and measure what the stages need; the report, which is also `stages.json` and `stages.md`.

    Run again, it computes nothing that it has: features, transcripts, trained systems and timings are kept
    under what they were made from. A recording that one system cannot use is left out for all.

    Raises InvalidManifest where too few recordings are left, InvalidField for a plan that cannot be, and
    ModelUnavailable where no encoder of a kind is on this machine.
    """
    lab = _Lab(plan, models_dir, device, progress)
    rows: list[_Row] = []
    contrasts: list[Contrast] = []
    for stage, work in ((1, _modalities), (2, _encoders), (3, _losses), (4, _languages)):
        if stage in plan.stages:
            measured, claimed = work(lab)
            rows += measured
            contrasts += claimed
    claims = [contrast.judged(plan.seed) for contrast in contrasts]
    costs = lab.costs() if 3 in plan.stages else None
    if costs is not None:
        claims = sorted(claims + _cost_claims(costs, plan.seed), key=lambda claim: claim["stage"])
    report = {
        "manifest": str(plan.manifest),
        "system": lab.system("concat", "clasp").as_json(),
        "items": {name: len(items) for name, items in lab.items.items()},
        "rows": [
            {
                "stage": row.stage,
                "name": row.name,
                "figures": row.measured.figures(seed=plan.seed),
                "paper": None if row.paper is None else {"name": row.paper, **PAPER[row.paper]},
            }
            for row in rows
        ],
        "claims": claims,
        "costs": costs,
        "left_out": lab.left_out,
    }
    write_whole(plan.output / "stages.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_whole(plan.output / "stages.md", markdown(report))
    return report


class _Lab:
    """The data, and every system trained on it, each made when it is first asked for."""

    def __init__(
        self,
        plan: Plan,
        models_dir: Path | None,
        device: Literal["auto", "cpu", "cuda"],
        progress: Progress,
    ) -> None:
        self.plan = plan
        self._models_dir = models_dir
        self._device: Literal["auto", "cpu", "cuda"] = device
        self._progress = progress
        self.speech = plan.speech or self._found("speech", systems.SPEECH_ENCODERS)
        self.spectrogram = plan.spectrogram or self._found("spectrogram", systems.SPECTROGRAM_ENCODERS)
        self.text = plan.text or self._found("text", systems.TEXT_ENCODERS)
        self._transcribers: dict[str, Transcriber] = {}
        if 3 in plan.stages:  # now: what cannot be opened should not be found out after hours
            at = resolve_device(device).type
            for name in plan.transcribers:
                self._transcribers[name] = open_transcriber(name, models_dir=models_dir, device=at)
        self._cache = plan.output / "cache"
        self._systems: dict[System, TrainedSystem] = {}
        self.left_out: list[dict[str, str]] = []
        self.items = _split(plan)
        plan.output.mkdir(parents=True, exist_ok=True)
        self._manifest = plan.output / "train.jsonl"
        learnt = [replace(item, split=name) for name in ("train", "validation") for item in self.items[name]]
        write_manifest(self._manifest, learnt)
        self._identity = [[clip_key(item), item.text, item.lang, item.split] for item in learnt]
        # All systems of the run, so that each is tested on what every one of them can hear.
        self._drop_unheard(self._needed())

    def system(
        self, fusion: str, loss: Literal["clasp", "lasp"], speech: str | None = None, text: str | None = None
    ) -> System:
        return System(
            None if fusion == "spectrogram" else speech or self.speech[0],
            None if fusion == "speech" else self.spectrogram[0],
            fusion,
            text or self.text[0],
            loss,
        )

    def _needed(self) -> list[System]:
        needed: list[System] = []
        if 1 in self.plan.stages:
            needed += [self.system(fusion, "lasp") for fusion in ("spectrogram", "speech", "concat")]
        if 2 in self.plan.stages:
            needed += [
                self.system(fusion, "lasp", speech, text)
                for text in self.text
                for speech in self.speech
                for fusion in FUSIONS
            ]
        if {3, 4} & set(self.plan.stages):
            needed.append(self.system("concat", "clasp"))
        if 3 in self.plan.stages:
            needed.append(self.system("concat", "lasp"))
        return list(dict.fromkeys(needed))

    def _found(self, role: str, names: Sequence[str]) -> tuple[str, ...]:
        found = []
        for name in names:
            alone = System(None, None).as_json() | {role: name}
            parts = PaperModel(name, systems.read(alone), None, self._models_dir, self._device).parts()
            if all(part.path is not None for part in parts if part.role == role):
                found.append(name)
        if not found:
            raise ModelUnavailable(
                f"No {role} encoder is on this machine: pip install clasp-search, or `clasp models fetch`."
            )
        return tuple(found)

    def trained(self, system: System) -> TrainedSystem:
        """The system, trained now unless its folder is there.

        The folder's name holds a digest of all that it was made from, and `model.json` is written last.
        """
        if system not in self._systems:
            config = self._config(system)
            if not (config.output / "model.json").is_file():
                name = config.output.name

                def progress(stage: str, done: int, total: int, note: str) -> None:
                    self._progress(name if stage == "training" else stage, done, total, note)

                train(config, models_dir=self._models_dir, progress=progress)
            self._systems[system] = TrainedSystem(
                config, models_dir=self._models_dir, progress=self._progress
            )
        return self._systems[system]

    def _config(self, system: System) -> PaperConfig:
        recipe = self.plan.recipe
        # what only the contrastive loss knows does not make another LASP
        loss = LossConfig("lasp", delta=recipe.loss.delta)
        if system.loss == "clasp":
            loss = replace(recipe.loss, name="clasp")
        config = PaperConfig(
            DataConfig(self._manifest, self._cache, validation="validation"),
            self.plan.output,
            PaperModelConfig(
                speech=system.speech, spectrogram=system.spectrogram, fusion=system.fusion, text=system.text
            ),
            loss,
            recipe.optimizer,
            recipe.schedule,
            training=replace(recipe.training, seed=self.plan.seed, device=self._device),
        )
        made_from = digest(identity(config, models_dir=self._models_dir), self._identity)[:8]
        parts = "-".join([system.fusion, *system.pretrained.values(), system.loss])
        return replace(config, output=self.plan.output / "models" / f"{parts}-{made_from}")

    def _drop_unheard(self, needed: Sequence[System]) -> None:
        items = self.items["test"]
        for system in needed:
            heard, _ = self.trained(system).hear(items)
            self.leave_out(items, heard, "cannot be heard")
            items = heard
        if len(items) < 2:
            raise InvalidManifest(f"{self.plan.manifest}: fewer than two test recordings can be used.")
        self.items["test"] = items

    def leave_out(self, items: Sequence[ManifestItem], kept: Sequence[ManifestItem], reason: str) -> None:
        there = {item.id for item in kept}
        self.left_out += [{"id": item.id, "reason": reason} for item in items if item.id not in there]

    def scores(self, system: System) -> NDArray[np.float32]:
        """(texts, recordings) of the test items."""
        trained = self.trained(system)
        _, speech = trained.hear(self.items["test"])
        return self.texts(system) @ speech.T

    def texts(self, system: System) -> Embeddings:
        """(items, dim): the test items' transcripts."""
        return self.trained(system).read([_text(item) for item in self.items["test"]])

    def among_few(self, system: System) -> Measured:
        """Stages 1 and 2: each text among ten recordings, the same for every system."""
        scores = self.scores(system)
        few = min(CANDIDATES, len(scores))
        return paper_measure(scores, candidates=few, threshold=FEW_THRESHOLD, seed=self.plan.seed)

    def transcripts(self, name: str) -> list[str]:
        """What a transcriber hears in the test recordings, normalised; "" where it hears nothing."""
        transcriber = self._transcribers[name]
        path = self._cache / "transcripts" / f"{digest(transcriber.identity)}.json"
        known: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        items = self.items["test"]
        keys = [f"{clip_key(item)}/{item.lang}" for item in items]
        missing = [place for place, key in enumerate(keys) if key not in known]
        for number, number_of in enumerate(missing, start=1):
            (segment,) = clips([items[number_of]], 1.0)
            assert isinstance(segment, Segment), "the systems have heard it"
            (written,) = transcriber.transcribe([segment.waveform], [items[number_of].lang])
            known[keys[number_of]] = normalize_text(written.text, written.lang)
            if number % _SAVE_EVERY == 0 or number == len(missing):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, json.dumps(known, ensure_ascii=False))
            self._progress(f"transcripts by {Path(name).name}", number, len(missing), "")
        return [known[key] for key in keys]

    def costs(self) -> dict[str, Any]:
        """Seconds that CLASP and each transcriber take for some test recordings, one at a time, decoding
        aside, and the bytes of their weights, text encoder included."""
        folder = self._config(self.system("concat", "clasp")).output
        model = open_model(str(folder), models_dir=self._models_dir, device=self._device)
        items = self.items["test"][:_TIMED]
        identities = [transcriber.identity for transcriber in self._transcribers.values()]
        made_from = digest(model.fingerprint, identities, [clip_key(item) for item in items])
        path = self._cache / "costs" / f"{made_from}.json"
        if path.is_file():
            costs: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return costs
        sizes = {part.role: part.size_bytes or 0 for part in model.parts()}
        texts = sum(sizes.get(role, 0) for role in ("text", "tokenizer"))
        weights = {"CLASP": sum(sizes.values())}
        weights |= {name: texts + one.weights_bytes for name, one in self._transcribers.items()}
        speech, text = model.speech_encoder(), model.text_encoder()

        def embed(segment: Segment, lang: str | None) -> None:
            pictured = None if segment.pictured is None else [segment.pictured]
            speech.encode([segment.waveform], pictured)

        def search_in_words(transcriber: Transcriber) -> Callable[[Segment, str | None], None]:
            def embed(segment: Segment, lang: str | None) -> None:
                (written,) = transcriber.transcribe([segment.waveform], [lang])
                text.encode([normalize_text(written.text, written.lang)])

            return embed

        ways = {"CLASP": embed} | {name: search_in_words(one) for name, one in self._transcribers.items()}
        seconds: dict[str, list[Seconds]] = {name: [] for name in ways}
        for number, item in enumerate([items[0], *items]):  # the first of all warms up
            (segment,) = clips([item], 1.0, speech.picture_rate)
            assert isinstance(segment, Segment)
            for name, way in ways.items():
                started = time.perf_counter()
                way(segment, item.lang)
                if number:
                    seconds[name].append(round(time.perf_counter() - started, 6))
            self._progress("costs", number, len(items), "")
        costs = {"weights_bytes": weights, "text_bytes": texts, "seconds": seconds}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(costs))
        return costs


def _split(plan: Plan) -> dict[str, list[ManifestItem]]:
    """Items to train, to validate and to test with."""
    lang = canonical_tag(plan.lang)
    items = [item for item in read_manifest(plan.manifest) if lang is None or item.lang == lang]
    of = {
        name: sorted((item for item in items if item.split == name), key=lambda item: _order(plan, item))
        for name in (plan.train, plan.test, "validation")
    }
    train = of[plan.train][: plan.train_items]
    share = max(2, round(VALIDATION_SHARE * len(train)))
    validation = of["validation"][:share]
    if not validation:
        train, validation = train[:-share], train[-share:]
    test = of[plan.test][: plan.test_items]
    for name, found, least in (("train", train, 2), ("validation", validation, 1), ("test", test, 2)):
        if len(found) < least:
            raise InvalidManifest(
                f"{plan.manifest}: the splits {plan.train!r} and {plan.test!r} leave {len(found)} recordings"
                f" for {name}; it needs {least} at least."
            )
    return {"train": train, "validation": validation, "test": test}


def _order(plan: Plan, item: ManifestItem) -> str:
    return digest(plan.seed, item.id)


def _text(item: ManifestItem) -> str:
    return normalize_text(item.text, item.lang)


# --- stages

_Found: TypeAlias = tuple[list[_Row], list[Contrast]]


def _gain(better: str | None, worse: str | None, figure: str = "hits@1") -> float | None:
    if better is None or worse is None:
        return None
    difference = PAPER[better][figure] - PAPER[worse][figure]
    return round(-difference if figure == "mean_rank" else difference, 3)


def _share(one: str, other: str) -> float:
    """How near the paper found one to the other: what "about as good" asks for."""
    return round(PAPER[one]["hits@1"] / PAPER[other]["hits@1"], 3)


def _modalities(lab: _Lab) -> _Found:
    names = {"spectrogram": "Spectrogram", "speech": "Self-supervised speech", "concat": "Combined"}
    measured = {fusion: lab.among_few(lab.system(fusion, "lasp")) for fusion in names}
    shown = {"spectrogram": lab.spectrogram[0], "speech": lab.speech[0]}
    shown["concat"] = f"{lab.speech[0]} + {lab.spectrogram[0]}"
    rows = [_Row(1, shown[fusion], measured[fusion], name) for fusion, name in names.items()]
    pairs = {
        "both inputs find more than speech alone": ("concat", "speech"),
        "both inputs find more than the spectrogram alone": ("concat", "spectrogram"),
        "speech finds more than the spectrogram": ("speech", "spectrogram"),
    }
    return rows, [
        Contrast(
            1,
            claim,
            "hits@1",
            measured[better],
            measured[worse],
            in_paper=_gain(names[better], names[worse]),
        )
        for claim, (better, worse) in pairs.items()
    ]


def _encoders(lab: _Lab) -> _Found:
    speech_role, text_role = _roles(lab.speech, _SPEECH), _roles(lab.text, _TEXT)
    measured: dict[tuple[str, str, str], Measured] = {}
    rows = []
    for text in lab.text:
        for speech in lab.speech:
            for fusion in FUSIONS:
                found = lab.among_few(lab.system(fusion, "lasp", speech, text))
                measured[text, speech, fusion] = found
                named = f"{text_role.get(text)} + {speech_role.get(speech)}, {fusion}"
                paper = named if named in PAPER else None
                rows.append(_Row(2, f"{text} + {speech}, {fusion}", found, paper))

    def mean(at: int, name: str) -> Measured:
        return mean_over([one for key, one in measured.items() if key[at] == name])

    def paper_gain(at: int, name: str) -> float | None:
        sides: dict[bool, list[float]] = {True: [], False: []}
        for row, key in zip(rows, measured, strict=True):
            if row.paper is not None:
                sides[key[at] == name].append(PAPER[row.paper]["hits@1"])
        if not (sides[True] and sides[False]):
            return None
        return round(float(np.mean(sides[True]) - np.mean(sides[False])), 3)

    contrasts = [
        Contrast(
            2,
            "concatenation finds more than gating (mean over encoders)",
            figure,
            mean(2, "concat"),
            mean(2, "gating"),
            in_paper=paper_gain(2, "concat") if figure == "hits@1" else None,
        )
        for figure in ("hits@1", "macro_f1")
    ]
    for at, kind, names, role in (
        (1, "speech", lab.speech, speech_role),
        (0, "text", lab.text, text_role),
    ):
        for other in names[1:]:
            stand_for = (
                f" (in {role[names[0]]}'s place, in {role[other]}'s)"
                if {names[0], other} <= set(role)
                else ""
            )
            contrasts.append(
                Contrast(
                    2,
                    f"{kind} encoder {names[0]} finds more than {other}{stand_for}",
                    "hits@1",
                    mean(at, names[0]),
                    mean(at, other),
                    in_paper=paper_gain(at, names[0]) if stand_for else None,
                )
            )
    return rows, contrasts


def _roles(names: Sequence[str], paper: Mapping[str, str]) -> dict[str, str]:
    """Which of the paper's two encoders each stands for: itself, or where none of them is among these, the
    first for the one that the paper found better, and the second for the other."""
    if set(names) & set(paper):
        return {name: paper[name] for name in names if name in paper}
    return dict(zip(names, paper.values(), strict=False))


def _losses(lab: _Lab) -> _Found:
    rules: dict[str, Any] = {"threshold": THRESHOLD, "skip_tied_duplicates": True}
    trained = {"LASP": lab.system("concat", "lasp"), "CLASP": lab.system("concat", "clasp")}
    measured = {name: paper_measure(lab.scores(system).T, **rules) for name, system in trained.items()}
    rows = [_Row(3, name, found, name) for name, found in measured.items()]
    clasp, texts = lab.trained(trained["CLASP"]), lab.texts(trained["CLASP"])
    contrasts = [
        Contrast(
            3,
            "CLASP's loss finds more than LASP's",
            figure,
            measured["CLASP"],
            measured["LASP"],
            in_paper=_gain("CLASP", "LASP", figure),
        )
        for figure in ("hits@1", "mrr", "mean_rank", "macro_f1")
    ]
    near = _share("CLASP", "HuBERT ASR")
    for turn, name in enumerate(lab.plan.transcribers):
        found = paper_measure(clasp.read(lab.transcripts(name)) @ texts.T, **rules)
        paper = ("HuBERT ASR", "Wav2Vec2 ASR")[turn] if turn < 2 else None
        shown = f"transcripts by {Path(name).name}"
        rows.append(_Row(3, shown, found, paper))
        for claim, figure, share in (
            (f"CLASP finds at least {near:.3f} of what {shown} find", "hits@1", near),
            (f"CLASP finds more than {shown}", "hits@1", 1.0),
            (f"CLASP's mean rank is better than that of {shown}", "mean_rank", 1.0),
            (f"CLASP's macro-F1 is better than that of {shown}", "macro_f1", 1.0),
        ):
            in_paper = _gain("CLASP", paper, figure) if share == 1.0 else None
            contrasts.append(
                Contrast(3, claim, figure, measured["CLASP"], found, share=share, in_paper=in_paper)
            )
    return rows, contrasts


def _languages(lab: _Lab) -> _Found:
    clasp = lab.trained(lab.system("concat", "clasp"))
    rows, contrasts = [], []
    near = _share("Persian", "CLASP")
    for manifest in lab.plan.queries:
        groups: dict[tuple[str, str], list[ManifestItem]] = {}
        asked = [item for item in read_manifest(manifest) if item.query and item.query_lang]
        recordings = {item.audio: item for item in reversed(asked)}  # one may be asked for in many languages
        heard, vectors = clasp.hear(list(recordings.values()))
        vector_of = {item.audio: vector for item, vector in zip(heard, vectors, strict=True)}
        audible = [item for item in asked if item.audio in vector_of]
        lab.leave_out(asked, audible, "cannot be heard")
        for item in audible:
            groups.setdefault((item.source or manifest.stem, str(item.query_lang)), []).append(item)
        if not groups:
            raise InvalidManifest(f"{manifest} has no recording with a query in another language.")
        measured: dict[tuple[str, str], Measured] = {}
        pools: dict[tuple[str, str], list[Path]] = {}
        spoken: dict[tuple[Path, ...], Measured] = {}
        for key, items in groups.items():
            if len(items) < 2:
                raise InvalidManifest(f"{manifest}: {key[1]!r} has one recording alone to be asked for.")
            speech = np.stack([vector_of[item.audio] for item in items])
            pools[key] = [item.audio for item in items]

            def ask(texts: Iterable[str], speech: Embeddings = speech) -> Measured:
                return paper_measure(clasp.read(list(texts)) @ speech.T, threshold=THRESHOLD)

            source, lang = key
            measured[key] = ask(map(query_text, items))
            rows.append(
                _Row(4, f"{source}: {lang}", measured[key], _LANGUAGES.get(primary_language(lang) or ""))
            )
            pool = tuple(pools[key])
            if pool not in spoken:
                spoken[pool] = ask(map(_text, items))
                rows.append(_Row(4, f"{source}: the words as spoken, for {lang}", spoken[pool]))
            contrasts.append(
                Contrast(
                    4,
                    f"{source}: {lang} finds at least {near:.3f} of what the words as spoken find",
                    "hits@1",
                    measured[key],
                    spoken[pool],
                    share=near,
                )
            )
        contrasts += _orders(measured, pools)
    return rows, contrasts


def _orders(
    measured: Mapping[tuple[str, str], Measured], pools: Mapping[tuple[str, str], list[Path]]
) -> list[Contrast]:
    """The paper's languages, each against the next: as a pair where the recordings are the same."""
    contrasts = []
    for source in dict.fromkeys(source for source, _ in measured):
        there = [
            (language, key)
            for language in _LANGUAGES
            for key in measured
            if key[0] == source and primary_language(key[1]) == language
        ]
        for (first, better), (second, worse) in pairwise(there):
            if first == second:
                continue
            names = _LANGUAGES[first], _LANGUAGES[second]
            contrasts.append(
                Contrast(
                    4,
                    f"{source}: {better[1]} finds more than {worse[1]}",
                    "hits@1",
                    measured[better],
                    measured[worse],
                    paired=pools[better] == pools[worse],
                    in_paper=_gain(*names),
                )
            )
    return contrasts


def _cost_claims(costs: Mapping[str, Any], seed: int) -> list[dict[str, Any]]:
    """Smaller and faster than transcription, as shares of what transcription takes."""
    found = []
    weights, seconds = costs["weights_bytes"], costs["seconds"]
    mine = np.array(seconds["CLASP"])
    for name in [name for name in seconds if name != "CLASP"]:
        theirs = np.array(seconds[name])
        drawn = np.random.default_rng(seed).integers(len(mine), size=(1000, len(mine)))
        saved = 1 - mine[drawn].mean(1) / theirs[drawn].mean(1)
        smaller = 1 - weights["CLASP"] / weights[name]
        for claim, figure, share, interval, paper in (
            ("faster", "seconds", 1 - mine.mean() / theirs.mean(), np.percentile(saved, (2.5, 97.5)), 0.1),
            ("smaller", "weights_bytes", smaller, (smaller, smaller), 0.52),
        ):
            low, high = map(float, interval)
            found.append(
                {
                    "stage": 3,
                    "claim": f"CLASP is {claim} than transcripts by {Path(name).name} (share saved)",
                    "figure": figure,
                    "advantage": float(share),
                    "ci95": [low, high],
                    "share": 1.0,
                    "paper": paper,
                    "verdict": verdict(low, high),
                }
            )
    return found


# --- the tables


def tables(report: Mapping[str, Any]) -> tuple[list[list[str]], list[list[str]]]:
    """Table 2 and the claims, as cells of text; the first line of each is its heading."""
    figures = ("hits@1", "mrr", "mean_rank", "macro_f1")
    heading = ["stage", "system", "hits@1", "95 %", *figures[1:], "n", "pool"]
    results = [[*heading, *(f"paper's {name}" for name in figures)]]
    for row in report["rows"]:
        found, paper = row["figures"], row["paper"] or {}
        low, high = found["ci95"]["hits@1"]
        cells = [f"{found[name]:.3f}" for name in figures]
        cells.insert(1, f"{low:.3f} to {high:.3f}")
        cells += [str(found["n"]), str(found["pool"])]
        cells += [f"{paper[name]:.3f}" if name in paper else "" for name in figures]
        results.append([str(row["stage"]), row["name"], *cells])
    claims = [["stage", "claim", "by", "advantage", "95 %", "paper's", "verdict"]]
    for claim in report["claims"]:
        low, high = claim["ci95"]
        paper = "" if claim["paper"] is None else f"{claim['paper']:+.3f}"
        claims.append(
            [
                str(claim["stage"]),
                claim["claim"],
                claim["figure"],
                f"{claim['advantage']:+.3f}",
                f"{low:+.3f} to {high:+.3f}",
                paper,
                claim["verdict"],
            ]
        )
    return results, claims


def markdown(report: Mapping[str, Any]) -> str:
    """Both tables in Markdown."""
    parts = []
    for heading, *lines in tables(report):
        rule = ["---"] * len(heading)
        parts.append("".join(f"| {' | '.join(cells)} |\n" for cells in (heading, rule, *lines)))
    return "\n".join(parts)
