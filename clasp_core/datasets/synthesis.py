"""Speech Brown and its kind: a data set of read sentences, made from text by synthetic voices.

The paper reads the Brown corpus with one synthetic voice (section 3; 55,173 sentences of at most 47
tokens, 15 categories). This makes such a set from any text, with any number of voices, and differs where
the paper's set flatters: sentences are split by document, and voices and augmentations do not follow
categories. Voices are `clasp_core.datasets.voices`', effects `clasp_core.datasets.augmentation`'s.

A folder under way holds `build.json`, what decides its clips; `audio/`, the clips that are whole; and
`journal.jsonl`, a line for each of them, written once the clip is in place. An interrupted build goes on
from the journal. `manifest.jsonl` and `README.md` come last.
"""

import contextlib
import gzip
import hashlib
import json
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import soundfile as sf
import soxr

from clasp_core import confinement
from clasp_core.datasets.augmentation import Recipe
from clasp_core.datasets.figures import card, describe, most_common, tokens
from clasp_core.datasets.voices import Voice, open_voice
from clasp_core.durability import locked, place, write_whole
from clasp_core.errors import DataMismatch, InvalidField, InvalidManifest, ProcessingFailed, SilentAudio
from clasp_core.language import canonical_tag, match_key, primary_language
from clasp_core.manifest import ManifestItem, write_manifest
from clasp_core.types import SAMPLING_RATE, Waveform

MAX_TOKENS = 47
"""Tokens of the paper's longest sentences."""

SPLITS = (("train", 0.8), ("validation", 0.1), ("test", 0.1))
"""Shares of the documents, as the paper's of the sentences."""

FORMS = {"opus": ("OGG", "OPUS"), "flac": ("FLAC", "PCM_16"), "wav": ("WAV", "PCM_16")}

Progress: TypeAlias = Callable[[Iterable[Any], int], Iterable[Any]]

_BABBLE = 8  # utterances that babble is drawn from
_PEAK = 0.99


@dataclass(frozen=True, slots=True)
class Sentence:
    """A text to be read. `document` is the book, article or file it stands in."""

    id: str
    text: str
    document: str
    category: str | None = None
    lang: str | None = None


@dataclass(frozen=True, slots=True)
class Recording:
    """How a set is read; together with the texts it decides every clip.

    voices: names for `open_voice`; sentences of a category take those that speak their language in turn,
        in an order drawn anew for each round, so that neither categories nor lengths have a voice of
        their own.
    recipes: names for `Recipe.parse`; each sentence draws one, all equally often. "none" is clean.
    form: a key of `FORMS`; clips are mono at 16 kHz.
    """

    voices: tuple[str, ...]
    recipes: tuple[str, ...] = ("none",)
    form: str = "opus"
    min_tokens: int = 3
    max_tokens: int = MAX_TOKENS
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Built:
    """What a build came to. `made` clips are of this run, the others were there."""

    manifest: Path
    figures: dict[str, Any]
    made: int
    left_out: dict[str, int] = field(default_factory=dict)
    """Sentences that were not chosen from, by reason."""
    failed: dict[str, str] = field(default_factory=dict)
    """By id, why a chosen sentence could not be read; another run tries again."""


# --- texts


def read_texts(path: Path, lang: str | None = None) -> list[Sentence]:
    """The sentences of a file: one a line in .txt, objects in .jsonl; both may be gzipped (.gz).

    In .txt, an empty line begins the next document; without one, each line is a document of its own. An
    object has `text` (or, parallel, an object of texts by language, of which `lang` is taken), and may
    have `id`, `category`, `lang` and `doc`. Without `doc`, ids of the form DOCUMENT-NUMBER name it
    (brown-ca01-0007), where that makes at least ten documents; else each sentence is its own.

    Raises InvalidManifest, naming the line, for what is not so, an id met before, and where there is no
    sentence; InvalidLanguage for a malformed tag.
    """
    lang = canonical_tag(lang)
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = content.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InvalidManifest(f"{path} cannot be read as text: {error}.") from error
    if suffixes[-1:] == [".jsonl"]:
        found = list(_of_objects(path, text, lang))
    elif suffixes[-1:] == [".txt"]:
        found = list(_of_lines(path.name.partition(".")[0], text, lang))
    else:
        raise InvalidManifest(f"{path} is neither .txt nor .jsonl (.gz).")
    seen: set[str] = set()
    for sentence in found:
        if sentence.id in seen:
            raise InvalidManifest(f"{path} has the id {sentence.id!r} twice.")
        seen.add(sentence.id)
    if not found:
        raise InvalidManifest(f"{path} holds no sentence.")
    return found


def _of_lines(name: str, text: str, lang: str | None) -> Iterator[Sentence]:
    lines = text.split("\n")
    parts = any(not line.strip() for line in "\n".join(lines).strip().split("\n"))
    document = 0
    for number, line in enumerate(lines, start=1):
        if line.strip():
            key = f"{name}-{number:06d}"
            yield Sentence(key, line.strip(), f"{name}-{document}" if parts else key, lang=lang)
        else:
            document += 1


def _of_objects(path: Path, text: str, lang: str | None) -> Iterator[Sentence]:
    objects = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            said = value["text"]
            if isinstance(said, dict):
                if lang is None:
                    raise ValueError(f"it has texts in {', '.join(said)}: a language must be named")
                if (said := said.get(lang)) is None:
                    continue
            fields = {"id": value.get("id", f"{path.name.partition('.')[0]}-{number:06d}"), "text": said}
            fields |= {name: value.get(name) for name in ("doc", "category", "lang") if value.get(name)}
            if not all(isinstance(entry, str) and entry.strip() for entry in fields.values()):
                raise ValueError("its fields must be strings that are not empty")
            if "\0" in "".join(fields.values()).encode().decode():  # lone surrogates cannot be encoded
                raise ValueError("a field holds a NUL character")
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise InvalidManifest(f"{path}, line {number}: no object with a text: {error}.") from error
        objects.append(fields)
    stems = {fields["id"]: re.sub(r"-\d+$", "", fields["id"]) for fields in objects}
    named = len(set(stems.values())) >= 10
    for fields in objects:
        own = stems[fields["id"]] if named else fields["id"]
        yield Sentence(
            fields["id"],
            fields["text"].strip(),
            fields.get("doc", own),
            fields.get("category"),
            lang if lang is not None else canonical_tag(fields.get("lang")),
        )


def spoken(text: str) -> str:
    """A sentence as a voice should get it: without the marks that it would spell out or take for orders.

    Quotation marks go; brackets and dashes between words become commas. Numbers, abbreviations and
    apostrophes stay, since every voice knows its own language's. Empty where nothing can be said.
    """
    text = re.sub(r"``|''|[\"“”„«»‹›]|(?<!\w)['‘’]|['‘’](?!\w)", " ", text)
    text = re.sub(r"[\[\](){}<>|\\^~*_#=]", " , ", text)  # [[ ]] and < > are orders to some engines
    text = re.sub(r"\s+-+\s+|--+|(?<!\d)[–—]|[–—](?!\d)", " , ", text)
    text = re.sub(r"\s+([,;:.!?،؛؟。，])", r"\1", " ".join(text.split()))
    text = re.sub(r",(?:\s*,)+", ",", text)
    text = re.sub(r",+\s*([;:.!?؟])", r"\1", text)
    text = text.strip(" ,")
    return text if any(character.isalnum() for character in text) else ""


def split_of(document: str, seed: int) -> str:
    """train, validation or test, by a hash of the document's name and the seed, whatever else there is."""
    drawn = int.from_bytes(_hash(seed, document)[:8], "big") / 2**64
    for name, share in SPLITS:
        if drawn < share:
            return name
        drawn -= share
    return SPLITS[-1][0]


def choose(texts: Sequence[Sentence], recording: Recording) -> tuple[list[Sentence], dict[str, int]]:
    """The sentences that can be read, in an order whose every beginning is balanced; and why others cannot.

    Categories take turns until they run out, and inside a category lengths do (eight tokens to a class).
    A text that was met before is left out, whatever its case and punctuation: two recordings of it would
    both be right answers, and might fall into two splits. So are formulas, which Brown prints as "**".
    """
    left_out, met, kept = [], set(), []
    for sentence in texts:
        key = match_key(sentence.text)
        length = len(tokens(sentence.text))
        if not spoken(sentence.text) or "**" in sentence.text:
            left_out.append("cannot be read aloud")
        elif length > recording.max_tokens:
            left_out.append(f"longer than {recording.max_tokens} tokens")
        elif length < recording.min_tokens:
            left_out.append(f"shorter than {recording.min_tokens} tokens")
        elif key in met:
            left_out.append("text met before")
        else:
            met.add(key)
            kept.append((sentence, length))
    random = np.random.default_rng([recording.seed, 1])
    classes: dict[str | None, dict[int, list[Sentence]]] = {}
    for index in random.permutation(len(kept)):
        sentence, length = kept[index]
        classes.setdefault(sentence.category, {}).setdefault(length // 8, []).append(sentence)
    by_category = []
    for turn, (_, by_length) in enumerate(sorted(classes.items(), key=lambda entry: entry[0] or "")):
        lengths = sorted(by_length)
        begin = turn % len(lengths)  # or every beginning would hold the short ones first
        by_category.append(list(_in_turn([by_length[n] for n in lengths[begin:] + lengths[:begin]])))
    return list(_in_turn(by_category)), most_common(left_out)


def _in_turn(queues: Sequence[Sequence[Sentence]]) -> Iterator[Sentence]:
    for turn in range(max(map(len, queues), default=0)):
        for queue in queues:
            if turn < len(queue):
                yield queue[turn]


# --- clips


@dataclass(frozen=True, slots=True)
class _Task:
    id: str
    text: str
    voice: str
    recipe: str
    seed: int
    path: Path


def _tasks(
    sentences: Sequence[Sentence],
    recording: Recording,
    voices: Mapping[str, Voice],
    folder: Path,
) -> Iterator[_Task]:
    turns: dict[tuple[str | None, str | None], list[str]] = {}
    rounds: dict[tuple[str | None, str | None], int] = {}
    for sentence in sentences:
        kind = (sentence.category, primary_language(sentence.lang))
        turn = turns.setdefault(kind, [])
        if not turn:
            able = [name for name in recording.voices if _speaks(voices[name].lang, sentence.lang)]
            if not able:
                raise InvalidField(f"None of the voices speaks {sentence.lang}, as {sentence.id!r} is in.")
            number = rounds[kind] = rounds.get(kind, 0) + 1
            order = {name: _hash(recording.seed, "voice", *kind, number, voices[name].name) for name in able}
            turn += sorted(able, key=order.__getitem__)
        drawn = int.from_bytes(_hash(recording.seed, "recipe", sentence.id)[:8], "big")
        recipe = recording.recipes[drawn % len(recording.recipes)]
        name = sentence.id if re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", sentence.id, re.ASCII) else ""
        hashed = _hash(sentence.id).hex()
        path = folder / "audio" / hashed[:2] / f"{name or hashed[:32]}.{recording.form}"
        yield _Task(sentence.id, spoken(sentence.text), turn.pop(), recipe, recording.seed, path)


def _speaks(voice: str | None, text: str | None) -> bool:
    return voice is None or text is None or primary_language(voice) == primary_language(text)


_voices: dict[str, Voice] = {}
_babble: list[Waveform] = []


def _be_worker(parent: int, babble: Path | None) -> None:
    """A process that reads aloud: gone with the one that started it, kill or crash."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which lets clips be finished
    confinement.die_with_parent()
    if os.getppid() != parent:
        os._exit(1)
    if babble is not None:
        _babble[:] = [sf.read(path, dtype="float32")[0] for path in sorted(babble.glob("*.wav"))]


def _make(task: _Task) -> dict[str, Any]:
    """Read a sentence into its file, whole or not at all. The journal's line of it."""
    random = _random(task.seed, "sound", task.id)
    try:
        samples = _read(task)
        recipe = Recipe.parse(task.recipe)
        others = None
        if recipe.needs_babble:
            drawn = random.choice(len(_babble), size=min(5, len(_babble)), replace=False)
            others = [_babble[index] for index in drawn]
        samples, augmentation = recipe.apply(samples, random, babble=others)
    except (ProcessingFailed, SilentAudio) as error:
        return {"id": task.id, "failed": error.detail}
    samples = samples * min(1.0, _PEAK / float(np.abs(samples).max()))
    task.path.parent.mkdir(parents=True, exist_ok=True)
    temporary = task.path.with_name(f".{task.path.name}.tmp")
    _write(temporary, samples, task.path.suffix[1:])
    place(temporary, task.path)
    return {
        "id": task.id,
        "speaker": _voices[task.voice].name,
        "lang": _voices[task.voice].lang,
        "duration_s": round(len(samples) / SAMPLING_RATE, 3),
        "augmentation": augmentation,
        "bytes": task.path.stat().st_size,
    }


def _read(task: _Task) -> Waveform:
    voice = _voices.get(task.voice) or _voices.setdefault(task.voice, open_voice(task.voice))
    samples, rate = voice.speak(task.text)
    if rate == SAMPLING_RATE:
        return samples
    resampled: Waveform = soxr.resample(samples, rate, SAMPLING_RATE, quality="HQ")
    return resampled


def _write(path: Path, samples: Waveform, form: str) -> None:
    container, subtype = FORMS[form]
    sf.write(path, samples, SAMPLING_RATE, format=container, subtype=subtype)


# --- the build


def build(
    texts: Sequence[Sentence],
    folder: Path,
    recording: Recording,
    *,
    sentences: int | None = None,
    hours: float | None = None,
    jobs: int = 1,
    title: str = "Speech Brown",
    facts: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Built:
    """Read the texts into a folder: clips, manifest and card. Safe to interrupt, and to run again.

    The set is the first `sentences` of `choose`, or as many of them as reach `hours` of speech, or all. A
    folder that was begun with the same texts and the same `recording` is taken up where it stopped, and
    may grow so; clips that are there are not made again. jobs: processes. facts: further lines for the
    card, licences among them.

    Raises InvalidField for a voice, recipe or form that cannot be, or a language that no voice speaks;
    VoiceUnavailable; DataMismatch where the folder holds a set of another making or something else, or
    another process builds in it; InvalidManifest where no sentence is left; ProcessingFailed where a
    process dies.
    """
    _check(recording, jobs)
    voices = {name: open_voice(name) for name in recording.voices}
    names = [voice.name for voice in voices.values()]
    if len(set(names)) < len(recording.voices):
        raise InvalidField(f"Each voice must be another; these are {', '.join(names)}.")
    licences = {voice.name: voice.licence for voice in voices.values()}
    chosen, left_out = choose(texts, recording)
    tasks = {task.id: task for task in _tasks(chosen, recording, voices, folder)}
    _claim(folder, texts, replace(recording, voices=tuple(names)))
    del voices  # some hold a model each
    wanted = chosen[:sentences]
    taken = DataMismatch(f"Another process is building in {folder}; wait for it to end.")
    with locked(folder / "build.json", taken):  # two would write one journal
        journal = _Journal(folder / "journal.jsonl", tasks)
        before = len(journal.done)
        missing = sum(sentence.id not in journal.done for sentence in wanted)
        babble = _babble_of(folder, chosen, tasks) if _needs_babble(recording) else None
        with contextlib.closing(_made(wanted, tasks, journal, hours, jobs, babble)) as clips:
            for _ in progress(clips, missing) if progress else clips:
                pass
        items, failed = _items(wanted, journal, tasks, recording, hours)
        if not items:
            reason = next(iter(failed.values()), "no sentence is left to read")
            raise InvalidManifest(f"There is nothing in {folder}: {reason}")
        write_manifest(folder / "manifest.jsonl", items)
        figures = describe(items)
        _write_card(folder, title, figures, recording, licences, facts or {}, left_out, failed)
    return Built(folder / "manifest.jsonl", figures, len(journal.done) - before, left_out, failed)


def _check(recording: Recording, jobs: int) -> None:
    if recording.form not in FORMS:
        raise InvalidField(f"Clips are written as {', '.join(FORMS)}, not {recording.form!r}.")
    if not recording.voices or not recording.recipes or jobs < 1:
        raise InvalidField("A build needs at least one voice, one recipe and one process.")
    for recipe in recording.recipes:
        Recipe.parse(recipe)


def _claim(folder: Path, texts: Sequence[Sentence], recording: Recording) -> None:
    """Make the folder ours, or see that it is."""
    digest = hashlib.sha256()
    for sentence in texts:
        digest.update(json.dumps(asdict(sentence)).encode())
    ours = json.loads(json.dumps({"texts": digest.hexdigest(), **asdict(recording)}))
    stated = folder / "build.json"
    if stated.is_file():
        theirs = json.loads(stated.read_text(encoding="utf-8"))
        if theirs != ours:
            other = ", ".join(sorted(name for name in ours if theirs.get(name) != ours[name]))
            raise DataMismatch(f"{folder} holds a set that differs in: {other}. Choose another folder.")
        return
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise DataMismatch(f"{folder} is not empty, and what is there is no set begun here. Choose another.")
    write_whole(stated, json.dumps(ours, indent=1, ensure_ascii=False) + "\n")


class _Journal:
    """The clips that are in place: by id, what the manifest says of each."""

    def __init__(self, path: Path, tasks: Mapping[str, _Task]) -> None:
        self._path = path
        self.done: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}
        for line in path.read_bytes().split(b"\n") if path.is_file() else ():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that was cut off
                entry = json.loads(line)
                clip = tasks[entry["id"]].path
                if clip.is_file() and clip.stat().st_size == entry["bytes"]:
                    self.done[entry["id"]] = entry
        self.rewrite()

    def add(self, entry: dict[str, Any]) -> None:
        if "failed" in entry:
            self.failed[entry["id"]] = entry["failed"]
            return
        self.done[entry["id"]] = entry
        with self._path.open("ab") as file:
            file.write(_json_line(entry))

    def rewrite(self) -> None:
        write_whole(self._path, b"".join(map(_json_line, self.done.values())))


def _json_line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode() + b"\n"


def _made(
    wanted: Sequence[Sentence],
    tasks: Mapping[str, _Task],
    journal: _Journal,
    hours: float | None,
    jobs: int,
    babble: Path | None,
) -> Generator[str, None, None]:
    """Make what is missing, in order but for what runs side by side; yields the ids as they are done."""
    missing = (sentence.id for sentence in wanted if sentence.id not in journal.done)
    enough = _Enough([sentence.id for sentence in wanted], journal, hours)
    if enough():
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy locks held by other threads
    with ProcessPoolExecutor(jobs, context, _be_worker, (os.getpid(), babble)) as pool:
        running: set[Future[dict[str, Any]]] = set()
        try:
            while True:
                while len(running) < 2 * jobs and not enough() and (key := next(missing, None)):
                    running.add(pool.submit(_make, tasks[key]))
                if not running:
                    return
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    try:
                        entry = future.result()
                    except BrokenProcessPool as error:
                        raise ProcessingFailed(
                            "A process that read aloud died; what it had finished is kept, so run it again."
                        ) from error
                    journal.add(entry)
                    yield entry["id"]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for future in running:  # finished while everything was ending
                if future.done() and not future.cancelled() and not future.exception():
                    journal.add(future.result())


class _Enough:
    """Whether the clips at the beginning of the order, gaps left out, reach the hours that were asked for."""

    def __init__(self, order: Sequence[str], journal: _Journal, hours: float | None) -> None:
        self._order, self._journal, self._hours = order, journal, hours
        self._at, self._seconds = 0, 0.0

    def __call__(self) -> bool:
        if self._hours is None:
            return self._at >= len(self._order)
        while self._seconds < self._hours * 3600 and self._at < len(self._order):
            key = self._order[self._at]
            if key in self._journal.done:
                self._seconds += self._journal.done[key]["duration_s"]
            elif key not in self._journal.failed:
                return False
            self._at += 1
        return self._seconds >= self._hours * 3600


def _items(
    wanted: Sequence[Sentence],
    journal: _Journal,
    tasks: Mapping[str, _Task],
    recording: Recording,
    hours: float | None,
) -> tuple[list[ManifestItem], dict[str, str]]:
    items, failed, seconds = [], {}, 0.0
    for sentence in wanted:
        if hours is not None and seconds >= hours * 3600:
            break
        if (entry := journal.done.get(sentence.id)) is None:
            failed[sentence.id] = journal.failed.get(sentence.id, "not read")
            continue
        seconds += entry["duration_s"]
        extra = {"document": sentence.document, "duration_s": entry["duration_s"]}
        extra |= {"category": sentence.category} if sentence.category else {}
        extra |= {"augmentation": entry["augmentation"]} if entry["augmentation"] != "none" else {}
        items.append(
            ManifestItem(
                id=sentence.id,
                audio=tasks[sentence.id].path,
                text=sentence.text,
                lang=sentence.lang or entry["lang"],
                speaker=entry["speaker"],
                source="synthetic",
                split=split_of(sentence.document, recording.seed),
                extra=extra,
            )
        )
    return items, failed


def _needs_babble(recording: Recording) -> bool:
    return any(Recipe.parse(recipe).needs_babble for recipe in recording.recipes)


def _babble_of(folder: Path, chosen: Sequence[Sentence], tasks: Mapping[str, _Task]) -> Path:
    """Utterances to murmur behind others: training sentences from the end of the order, cleanly read."""
    place_of = folder / "babble"
    place_of.mkdir(exist_ok=True)
    seed = next(iter(tasks.values())).seed
    speakers = [s for s in reversed(chosen) if split_of(s.document, seed) == "train"] or list(chosen)
    there = 0
    for number, sentence in enumerate(speakers):
        final = place_of / f"{number:04d}.wav"
        if not final.is_file():
            temporary = place_of / f".{number:04d}.tmp"
            try:
                _write(temporary, 0.9 * _read(tasks[sentence.id]), "wav")
            except ProcessingFailed:  # a voice that stumbles over this one; the next will do
                continue
            place(temporary, final)
        there += 1
        if there == _BABBLE:
            break
    return place_of


def _write_card(
    folder: Path,
    title: str,
    figures: Mapping[str, Any],
    recording: Recording,
    licences: Mapping[str, str],
    facts: Mapping[str, str],
    left_out: Mapping[str, int],
    failed: Mapping[str, str],
) -> None:
    shares = ", ".join(f"{name} {share:.0%}" for name, share in SPLITS)
    lines = {
        "speech": f"synthetic; mono, 16 kHz, {recording.form}",
        "split": f"by document ({shares} of the documents, by a hash of their names and the seed)",
        "seed": str(recording.seed),
        "augmentation, each as often": ", ".join(f"`{recipe}`" for recipe in recording.recipes),
        **{f"voice `{name}`": licence for name, licence in licences.items()},
        **facts,
    }
    reservations = [f"{count:,} sentences left out: {reason}" for reason, count in left_out.items()]
    if failed:
        reservations.append(f"{len(failed):,} sentences that the voices could not read are missing")
    reservations.append("Figures on synthetic speech flatter: judge models on recordings of people, too.")
    write_whole(folder / "README.md", card(title, figures, lines, reservations))


def _hash(*parts: object) -> bytes:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).digest()


def _random(*parts: object) -> np.random.Generator:
    """The generator of one decision: the same wherever and whenever it is taken."""
    return np.random.default_rng(np.frombuffer(_hash(*parts), np.uint32))
