"""Published data sets, as they lie on disk, read into manifest items.

    common-voice   Mozilla Common Voice: clips/ and train.tsv, dev.tsv, test.tsv, validated.tsv, other.tsv, in
                   the folder of a language or in several beside each other
    fleurs         FLEURS: a folder for each language (en_us) with train.tsv, dev.tsv, test.tsv and audio/
    speech-brown   llm-lab/SpeechBrown, the paper's: global_metadata.json (or another JSON of its kind) and
                   the unpacked parts
    folder         anything simple: a table (metadata.csv, .tsv, LJSpeech's `id|text`), a .jsonl, or sound
                   files each with a .txt of its name

What cannot be used (no sound file, no text, an id met before) is left out and reported, never silently.
Sound is looked for, not decoded; `check` decodes it.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, TypeAlias

from clasp_core import sandbox
from clasp_core.errors import InvalidAudio, InvalidField, InvalidManifest
from clasp_core.language import canonical_tag
from clasp_core.manifest import ManifestItem
from clasp_core.types import Seconds

SUFFIXES = (".wav", ".flac", ".mp3", ".opus", ".ogg", ".m4a", ".aac", ".webm", ".aiff", ".wma")

Progress: TypeAlias = Callable[[Iterable[ManifestItem], int], Iterable[ManifestItem]]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """An entry that did not become an item: where it stands, and why in a few words that recur."""

    where: str
    reason: str


@dataclass(slots=True)
class Imported:
    """The items in the data set's own order, and what was left out of them."""

    items: list[ManifestItem] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Entry:
    """What an importer found, before it is looked at: `audio` as named in the data set."""

    where: str
    id: str
    audio: Iterable[Path]  # where the file may be, the first that exists
    text: str
    lang: str | None = None
    speaker: str | None = None
    split: str | None = None
    source: str | None = None
    query: str | None = None
    query_lang: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


_Found: TypeAlias = Iterator[_Entry | LeftOut]


def import_dataset(
    kind: str, folder: Path, *, lang: str | None = None, splits: Sequence[str] = ()
) -> Imported:
    """The items of a data set of one of `KINDS`.

    lang: of the texts, where the data set does not say; a BCP 47 tag. splits: only these, by the data
    set's own names; by default train, dev and test, or what there is. Speakers of Common Voice are
    16 hexadecimal digits of the sha256 of their `client_id`: its terms forbid finding out who they are.

    Raises InvalidField for another kind; InvalidManifest, which says what was looked for, where the
    folder holds no such data set, a table of it cannot be read, or nothing in it can be used;
    InvalidLanguage.
    """
    if kind not in KINDS:
        raise InvalidField(f"Data sets of the kinds {', '.join(KINDS)} can be read, not {kind!r}.")
    if not folder.is_dir():
        raise InvalidManifest(f"{folder} is no folder.")
    lang = canonical_tag(lang)
    imported, seen = Imported(), set[str]()
    for entry in KINDS[kind](folder, tuple(splits)):
        if isinstance(entry, LeftOut):
            imported.left_out.append(entry)
            continue
        reason, audio = _fault(entry, folder, seen)
        if audio is None:
            imported.left_out.append(LeftOut(entry.where, reason))
            continue
        seen.add(entry.id)
        imported.items.append(
            ManifestItem(
                id=entry.id,
                audio=audio,
                text=entry.text.strip(),
                lang=canonical_tag(entry.lang) or lang,
                speaker=entry.speaker,
                source=entry.source or (kind if kind != "folder" else None),
                split=entry.split,
                query=entry.query,
                query_lang=canonical_tag(entry.query_lang),
                extra=MappingProxyType({name: value for name, value in entry.extra.items() if value != ""}),
            )
        )
    if not imported.items:
        first = imported.left_out[0] if imported.left_out else None
        what = f" The first entry, {first.where}: {first.reason}." if first else ""
        raise InvalidManifest(f"Nothing in {folder} can be used as {kind}.{what}")
    return imported


def _fault(entry: _Entry, folder: Path, seen: set[str]) -> tuple[str, Path | None]:
    """The sound file of an entry, or why it is left out."""
    if not entry.id.strip():
        return "no id", None
    if not entry.text.strip() or "\0" in entry.text:
        return "no text", None
    if entry.id in seen:
        return "id met before", None
    reason = "no sound file"
    for path in entry.audio:
        if not _is_inside(path, folder):
            reason = "sound file outside the folder"
        elif path.is_file():
            return "", path
    return reason, None


def _is_inside(path: Path, folder: Path) -> bool:
    """By names alone, so that clips may be a link to another disk, but no table points at /etc/passwd."""
    return path.is_relative_to(folder) and ".." not in path.relative_to(folder).parts


def check(
    imported: Imported, *, max_duration_s: Seconds = 3600.0, progress: Progress | None = None
) -> Imported:
    """The items whose sound can be decoded, each with its measured `duration_s` among the other fields.

    The others join `left_out`, with the code of what was wrong as their reason.
    """
    checked = Imported(left_out=list(imported.left_out))
    for item in progress(imported.items, len(imported.items)) if progress else imported.items:
        try:
            stream = sandbox.decode(item.audio, max_duration_s=max_duration_s)
            for _ in stream:
                pass
        except InvalidAudio as error:
            checked.left_out.append(LeftOut(item.id, error.code))
            continue
        extra = {**item.extra, "duration_s": round(stream.info.duration_s, 3)}
        checked.items.append(replace(item, extra=MappingProxyType(extra)))
    return checked


# --- Common Voice

_CV_SPLITS = ("train", "dev", "test", "validated", "other", "invalidated")


def _common_voice(folder: Path, splits: tuple[str, ...]) -> _Found:
    """The official train, dev and test do not overlap; validated holds them and more, other is unheard."""
    languages = [folder] if (folder / "clips").is_dir() else sorted(folder.glob("*/clips"))
    languages = [path.parent if path.name == "clips" else path for path in languages]
    tables: list[tuple[Path, str]] = []
    for path in languages:
        there = [name for name in _CV_SPLITS if (path / f"{name}.tsv").is_file()]
        official = [name for name in ("train", "dev", "test") if name in there]
        tables += [(path, name) for name in splits or official or there[:1] if name in there]
    if not tables:
        asked = " or ".join(f"{name}.tsv" for name in splits or ("train", "validated"))
        raise InvalidManifest(f"{folder} is no Common Voice: it has no clips/ with {asked} beside.")
    for path, split in tables:
        table = path / f"{split}.tsv"
        for number, row in _rows(table, "\t", quoted=False):
            where = f"{table.relative_to(folder)}, line {number}"
            if row is None or not {"path", "sentence"} <= row.keys():
                yield LeftOut(where, "no path or sentence")
                continue
            clip = row["path"]
            votes = {
                name: int(row[name]) for name in ("up_votes", "down_votes") if row.get(name, "").isdigit()
            }
            known = {name: row.get(name, "") for name in ("gender", "age", "variant")}
            known["accent"] = row.get("accents") or row.get("accent", "")
            yield _Entry(
                where,
                id=PurePosixPath(clip).stem,
                audio=_spellings(path / "clips", clip),
                text=_unquoted(row["sentence"]),
                lang=row.get("locale") or None,
                speaker=_speaker(row.get("client_id", "")),
                split=split,
                extra=known | votes,
            )


def _speaker(client_id: str) -> str | None:
    return hashlib.sha256(client_id.encode()).hexdigest()[:16] if client_id else None


def _unquoted(text: str) -> str:
    """Some releases wrote sentences with quotation marks as CSV does: "He said ""yes""."; others did not."""
    inner = text[1:-1]
    wrapped = len(text) > 1 and text[0] == text[-1] == '"' and '""' in inner
    return inner.replace('""', '"') if wrapped and '"' not in inner.replace('""', "") else text


# --- FLEURS

_FLEURS_CONFIG = re.compile(r"[a-z]{2,3}(_[a-z]{4})?_([a-z]{2}|[0-9]{3})")
_FLEURS_COLUMNS = ("id", "file", "raw", "text", "letters", "samples", "gender")


def _fleurs(folder: Path, splits: tuple[str, ...]) -> _Found:
    """The seven columns have no header; `id` is the sentence's, the same in all languages."""
    tables = sorted(path for path in folder.rglob("*.tsv") if path.stem in ("train", "dev", "test"))
    if not tables:
        raise InvalidManifest(
            f"{folder} is no FLEURS: it has no folder of a language with train.tsv or others."
        )
    for table in tables:
        split, place, config = table.stem, table.parent, table.parent.resolve().name
        if splits and split not in splits:
            continue
        for number, line in _lines(table):
            where = f"{table.relative_to(folder)}, line {number}"
            cells = line.split("\t")
            if len(cells) != len(_FLEURS_COLUMNS):
                yield LeftOut(where, "not seven columns")
                continue
            row = dict(zip(_FLEURS_COLUMNS, cells, strict=True))
            # The archive audio/train.tar.gz is unpacked beside itself, into a folder of its name, or above.
            places = (f"audio/{split}", f"audio/{split}/{split}", "audio", split, f"{split}/{split}")
            extra: dict[str, Any] = {"sentence": row["id"], "gender": row["gender"].lower()}
            if row["samples"].isdigit():
                extra["duration_s"] = round(int(row["samples"]) / 16_000, 3)
            yield _Entry(
                where,
                id=f"fleurs-{config}-{PurePosixPath(row['file']).stem}",
                audio=[place / folder_ / row["file"] for folder_ in places],
                text=row["raw"].strip() or row["text"],
                lang=config.replace("_", "-") if _FLEURS_CONFIG.fullmatch(config) else None,
                split=split,
                extra=extra,
            )


# --- Speech Brown


def _speech_brown(folder: Path, splits: tuple[str, ...]) -> _Found:
    """The card's `audio_file_path` is `file_path` in the published file, in which dataset/part1/ stands for
    what dataset_part1.zip unpacks to. The set has no splits."""
    if splits:
        raise InvalidField("Speech Brown as published has no splits.")
    names = ("global_metadata.json", "localized_metadata.json", "metadata.json", "*metadata*.json")
    table = next((path for name in names for path in sorted(folder.rglob(name))), None)
    if table is None:
        raise InvalidManifest(f"{folder} is no Speech Brown: it has no global_metadata.json.")
    try:
        entries = list(_samples(json.loads(table.read_text(encoding="utf-8-sig"))))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidManifest(f"{table} cannot be read: {error}.") from error
    by_name: dict[str, list[Path]] = {}
    for path in folder.rglob("*"):
        if path.suffix.lower() in SUFFIXES:
            by_name.setdefault(path.name, []).append(path)
    for number, entry in enumerate(entries, start=1):
        where = f"{table.relative_to(folder)}, entry {number}"
        named = entry.get("audio_file_path") or entry.get("file_path")
        if not isinstance(named, str) or not isinstance(entry.get("text"), str):
            yield LeftOut(where, "no file_path or text")
            continue
        said = PurePosixPath(named.replace("\\", "/"))
        alike = by_name.get(said.name, [])
        tail = [path for path in alike if _part(path) == _part(said)]
        found = tail if len(tail) == 1 else alike if len(alike) == 1 else []
        yield _Entry(
            where,
            id=f"speech-brown-{entry.get('id', said.stem)}",
            audio=[table.parent / said, *found],
            text=entry["text"],
            lang="en",
            speaker="tacotron2",
            extra={"category": entry["category"]} if isinstance(entry.get("category"), str) else {},
        )


def _samples(value: Any) -> Iterator[Mapping[str, Any]]:  # noqa: ANN401 - JSON
    """The objects that name a sound file, in lists, by id or by part, as deep as they lie."""
    if isinstance(value, dict) and {"audio_file_path", "file_path"} & value.keys():
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _samples(inner)


def _part(path: Path | PurePosixPath) -> str:
    """The number of the part that a path lies in: "1" of dataset/part1/a.wav and of dataset_part1/b/a.wav."""
    parts = [name.rpartition("part")[2] for name in path.parts[:-1] if "part" in name]
    return next((number for number in parts if number.isdigit()), "")


# --- folders

_AUDIO_COLUMNS = ("audio", "file_name", "file", "path", "filename", "wav", "audio_file", "id")
_TEXT_COLUMNS = ("text", "sentence", "transcript", "transcription", "raw_transcription")
_SPEAKER_COLUMNS = ("speaker", "speaker_id", "speaker_name")
_LANG_COLUMNS = ("lang", "locale", "language")
_OTHER_COLUMNS = ("split", "source", "query", "query_lang")
_COLUMNS = {*_AUDIO_COLUMNS, *_TEXT_COLUMNS, *_SPEAKER_COLUMNS, *_LANG_COLUMNS, *_OTHER_COLUMNS}


def _folder(folder: Path, splits: tuple[str, ...]) -> _Found:
    """A table names the sound files by path, or by name in the folder or in wavs/, clips/ or audio/."""
    tables = [*sorted(folder.glob("*.jsonl")), *sorted(folder.glob("*.[ct]sv"))]
    if len(tables) > 1:
        usual = [path for path in tables if path.stem == "metadata"]
        if len(usual) != 1:
            names = ", ".join(path.name for path in tables)
            raise InvalidManifest(f"{folder} has several tables ({names}); call the one to read metadata.")
        tables = usual
    rows = _of_table(tables[0]) if tables else _of_siblings(folder)
    for where, row in rows:
        if row is None:
            yield LeftOut(where, "not as many columns as the first line")
            continue
        audio, text = (
            next((row[name] for name in names if row.get(name)), "")
            for names in (_AUDIO_COLUMNS, _TEXT_COLUMNS)
        )
        split = row.get("split") or None
        if splits and split not in splits:
            continue
        spoken_in = next((row[name] for name in _LANG_COLUMNS if row.get(name)), None)
        named = PurePosixPath(audio.replace("\\", "/"))
        yield _Entry(
            where,
            id=row.get("id") or str(named.with_suffix("")),
            audio=_anywhere(folder, str(named)) if audio else (),
            text=text,
            lang=spoken_in,
            speaker=next((row[name] for name in _SPEAKER_COLUMNS if row.get(name)), None),
            split=split,
            source=row.get("source") or None,
            query=row.get("query") or None,
            query_lang=row.get("query_lang") or None,
            extra={name: value for name, value in row.items() if name and name not in _COLUMNS},
        )


def _of_table(table: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    if table.suffix == ".jsonl":
        for number, line in _lines(table):
            try:
                value = json.loads(line)
                row = {name: entry for name, entry in value.items() if isinstance(entry, (str, int, float))}
            except (ValueError, AttributeError, RecursionError) as error:
                raise InvalidManifest(f"{table}, line {number}: no JSON object: {error}.") from error
            ours = {name: str(entry) for name, entry in row.items() if name in _COLUMNS}
            yield f"{table.name}, line {number}", row | ours
        return
    first = next((line for _, line in _lines(table)), "")
    if "|" in first:  # LJSpeech and its descendants: no header, no quotation, id|text and perhaps more
        headed = first.split("|")[0].strip().lower() in _AUDIO_COLUMNS
        names = (
            [name.strip().lower() for name in first.split("|")]
            if headed
            else ["id", "text", "normalized_text"]
        )
        for number, line in _lines(table):
            if headed and number == 1:
                continue
            cells = line.split("|")
            fits = 2 <= len(cells) <= len(names)
            yield f"{table.name}, line {number}", dict(zip(names, cells, strict=False)) if fits else None
        return
    delimiter = "\t" if table.suffix == ".tsv" or "\t" in first else ","
    for number, cells_by_name in _rows(table, delimiter, quoted=table.suffix == ".csv"):
        yield f"{table.name}, line {number}", cells_by_name


def _of_siblings(folder: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES:
            name = path.relative_to(folder).as_posix()
            said = path.with_suffix(".txt")
            text = _text(said) if said.is_file() else ""
            yield name, {"path": name, "text": " ".join(text.split())}


# --- tables


def _anywhere(folder: Path, name: str) -> Iterator[Path]:
    for place in ("", "wavs", "clips", "audio"):
        yield from _spellings(folder / place, name)


def _spellings(folder: Path, name: str) -> Iterator[Path]:
    """Where a clip of this name may lie: tables leave the suffix out, and people convert the clips."""
    path = folder / name
    yield path
    bare = path.with_suffix("") if path.suffix.lower() in SUFFIXES else path
    if bare.name:
        yield from (bare.with_name(bare.name + suffix) for suffix in SUFFIXES)


def _rows(table: Path, delimiter: str, *, quoted: bool) -> Iterator[tuple[int, dict[str, str] | None]]:
    """A table's rows by the names in its first line, in lower case; None for a row of another length."""
    content = io.StringIO(_text(table), newline="")
    if quoted:
        reader = csv.reader(content, delimiter=delimiter)
    else:
        reader = csv.reader(content, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    try:
        names = [name.strip().lower() for name in next(reader, [])]
        for cells in reader:
            if cells:
                row = dict(zip(names, cells, strict=True)) if len(cells) == len(names) else None
                yield reader.line_num, row
    except csv.Error as error:
        raise InvalidManifest(f"{table}, line {reader.line_num}: {error}.") from error


def _lines(table: Path) -> Iterator[tuple[int, str]]:
    """Lines that hold something, numbered from 1. Only line feeds end them: texts hold U+2028 and others."""
    for number, line in enumerate(_text(table).split("\n"), start=1):
        if line.strip():
            yield number, line.removesuffix("\r")


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidManifest(f"{path} cannot be read as text: {error}.") from error


KINDS: Mapping[str, Callable[[Path, tuple[str, ...]], _Found]] = {
    "common-voice": _common_voice,
    "fleurs": _fleurs,
    "speech-brown": _speech_brown,
    "folder": _folder,
}
