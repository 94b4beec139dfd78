"""Importers: every published layout becomes a manifest, and nothing is dropped without a word."""

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from clasp_core.datasets.importers import check, import_dataset
from clasp_core.errors import InvalidField, InvalidLanguage, InvalidManifest
from clasp_core.manifest import ManifestItem, read_manifest, write_manifest
from tests.audio_files import encode, speech

SOUND = encode(speech(0.3), 16_000)


def put(folder, *names):
    """Sound files of these names; the importers go by names alone."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(SOUND)


def reasons(imported):
    return Counter(entry.reason for entry in imported.left_out)


CV_COLUMNS = (
    "client_id path sentence_id sentence up_votes down_votes age gender accents variant locale segment"
)


def cv_table(path, *rows, columns=CV_COLUMNS):
    lines = ["\t".join(columns.split()), *("\t".join(row) for row in rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def cv_row(name, sentence, client="c" * 128, gender="female_feminine"):
    return [client, name, "s1", sentence, "2", "0", "twenties", gender, "", "", "fa", ""]


@pytest.fixture
def common_voice(tmp_path):
    """A release with one language: one clip in each table, validated holding train's again."""
    folder = tmp_path / "cv-corpus" / "fa"
    put(folder, *(f"clips/common_voice_fa_{n}.mp3" for n in range(5)))
    cv_table(folder / "train.tsv", cv_row("common_voice_fa_0.mp3", "سلام دنیا"))
    cv_table(folder / "dev.tsv", cv_row("common_voice_fa_1.mp3", "دو", client="d" * 128))
    cv_table(folder / "test.tsv", cv_row("common_voice_fa_2.mp3", '"He said ""yes""."'))
    cv_table(
        folder / "validated.tsv",
        cv_row("common_voice_fa_0.mp3", "سلام دنیا"),
        cv_row("common_voice_fa_3.mp3", 'A \u2028 line separator, and a stray " mark.'),
    )
    return folder


def test_common_voice_gives_the_official_splits(common_voice):
    """validated.tsv repeats them: to read all tables would put test recordings among the training ones."""
    imported = import_dataset("common-voice", common_voice)
    assert [(item.id, item.split, item.text) for item in imported.items] == [
        ("common_voice_fa_0", "train", "سلام دنیا"),
        ("common_voice_fa_1", "dev", "دو"),
        ("common_voice_fa_2", "test", 'He said "yes".'),
    ]
    first = imported.items[0]
    assert first.audio == common_voice / "clips/common_voice_fa_0.mp3"
    assert (first.lang, first.source) == ("fa", "common-voice")
    assert first.extra == {"gender": "female_feminine", "age": "twenties", "up_votes": 2, "down_votes": 0}
    assert not imported.left_out


def test_speakers_of_common_voice_stay_unknown(common_voice, tmp_path):
    """Its terms forbid identifying them; the id that could must not reach any file we write. Who is one
    person must still be seen, or speakers would leak from training into tests."""
    imported = import_dataset("common-voice", common_voice)
    assert [item.speaker for item in imported.items] == [
        hashlib.sha256(client.encode()).hexdigest()[:16] for client in ("c" * 128, "d" * 128, "c" * 128)
    ]
    write_manifest(tmp_path / "m.jsonl", imported.items)
    assert "c" * 17 not in (tmp_path / "m.jsonl").read_text()


def test_common_voice_splits_can_be_chosen_and_repeats_are_told(common_voice):
    """Who asks for everything gets each clip once, and hears how many came again."""
    both = import_dataset("common-voice", common_voice, splits=["train", "validated"])
    assert [item.id for item in both.items] == ["common_voice_fa_0", "common_voice_fa_3"]
    assert both.items[1].text == 'A \u2028 line separator, and a stray " mark.'
    assert [(entry.where, entry.reason) for entry in both.left_out] == [
        ("validated.tsv, line 2", "id met before")
    ]


def test_common_voice_of_all_ages_and_several_languages(tmp_path):
    """Early releases left out `.mp3` and called the accent otherwise; people convert clips to wav."""
    put(tmp_path, "en/clips/old.mp3", "de/clips/neu.wav")
    cv_table(
        tmp_path / "en/validated.tsv", ["x", "old", "Old.", "us"], columns="client_id path sentence accent"
    )
    cv_table(
        tmp_path / "de/validated.tsv",
        ["y", "neu.mp3", "Neu.", "de"],
        columns="client_id path sentence locale",
    )
    imported = import_dataset("common-voice", tmp_path, lang="en")
    found = {item.id: (item.audio.name, item.lang, item.split, dict(item.extra)) for item in imported.items}
    assert found == {
        "old": ("old.mp3", "en", "validated", {"accent": "us"}),
        "neu": ("neu.wav", "de", "validated", {}),
    }


def test_what_cannot_be_used_is_counted_and_named(common_voice):
    """A data set that shrinks in silence makes figures that nobody can explain."""
    with (common_voice / "train.tsv").open("a", encoding="utf-8") as table:
        for row in (
            cv_row("absent.mp3", "No file."),
            cv_row("common_voice_fa_4.mp3", "  "),
            cv_row("common_voice_fa_0.mp3", "Again."),
            cv_row("../../../etc/passwd", "Elsewhere."),
            cv_row("/etc/passwd", "Elsewhere."),
            ["too", "short"],
        ):
            table.write("\t".join(row) + "\n")
    imported = import_dataset("common-voice", common_voice, splits=["train"])
    assert [item.id for item in imported.items] == ["common_voice_fa_0"]
    assert reasons(imported) == {
        "no sound file": 1,
        "no text": 1,
        "id met before": 1,
        "sound file outside the folder": 2,
        "no path or sentence": 1,
    }
    assert imported.left_out[0].where == "train.tsv, line 3"


@pytest.mark.parametrize("unpacked", ["audio/dev", "audio/dev/dev", "dev", "audio"])
def test_fleurs_wherever_its_archives_were_unpacked(tmp_path, unpacked):
    """Its tables have no header, and name files without saying in which folder they will lie."""
    folder = tmp_path / "data" / "cmn_hans_cn"
    put(folder, f"{unpacked}/100.wav", f"{unpacked}/101.wav")
    rows = [
        "7\t100.wav\t“你好” 世界\t你好世界\t你 好 | 世 界\t48000\tFEMALE",
        "7\t101.wav\t“你好” 世界\t你好世界\t你 好 | 世 界\t64000\tMALE",
        "8\t102.wav\tabsent\tabsent\ta\t16000\tMALE",
        "9\tbroken",
    ]
    (folder / "dev.tsv").write_text("\n".join(rows), encoding="utf-8")
    imported = import_dataset("fleurs", tmp_path, splits=["dev"])
    first, second = imported.items
    assert (first.id, first.lang, first.split) == ("fleurs-cmn_hans_cn-100", "cmn-Hans-CN", "dev")
    assert first.text == "“你好” 世界"
    assert first.extra == {"sentence": "7", "gender": "female", "duration_s": 3.0}
    assert second.extra["sentence"] == first.extra["sentence"], "who reads the same has the same sentence"
    assert reasons(imported) == {"no sound file": 1, "not seven columns": 1}


@pytest.mark.parametrize("key", ["file_path", "audio_file_path"])
@pytest.mark.parametrize(
    "place", ["dataset_part{}/audios", "dataset/part{}", "dataset_part{}/dataset/part{}/audios"]
)
@pytest.mark.parametrize("by_part", [False, True])
def test_speech_brown_as_its_card_says_and_as_it_is(tmp_path, key, place, by_part):
    """The card and the published file disagree on the field's name, and the archives unpack to other
    folders than the paths say. A name that occurs in two parts must not give the other's sound."""
    put(tmp_path, *(f"{place.format(part, part)}/audio_{n}.wav" for part in (1, 10) for n in (0, 1)))
    entries = [
        {
            "id": 10 * part + n,
            key: f"dataset/part{part}/audios/audio_{n}.wav",
            "category": "news",
            "text": f"{part}{n}",
        }
        for part in (1, 10)
        for n in (0, 1)
    ]
    parted = {f"part{part}": [e for e in entries if f"part{part}/" in e[key]] for part in (1, 10)}
    (tmp_path / "global_metadata.json").write_text(json.dumps(parted if by_part else entries))
    imported = import_dataset("speech-brown", tmp_path)
    assert not imported.left_out
    for item, entry in zip(imported.items, entries, strict=True):
        assert item.id == f"speech-brown-{entry['id']}"
        assert item.extra == {"category": "news"}
        assert item.audio.is_file()
        part, number = item.text[:-1], item.text[-1]
        assert item.audio.name == f"audio_{number}.wav"
        assert f"part{part}/" in item.audio.as_posix()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "metadata.csv",
            'file_name,text,speaker,mood\na.wav,"Yes, ""this"".",ann,glad\nclips/b.flac,Zwei,bob,\n',
        ),
        ("metadata.tsv", 'file\tsentence\tspeaker\tmood\na.wav\tYes, "this".\tann\tglad\nb\tZwei\tbob\t\n'),
        ("metadata.csv", 'a|Yes, "this".|Yes, this.\nb|Zwei\n'),
        (
            "metadata.jsonl",
            '{"audio": "a.wav", "text": "Yes, \\"this\\".", "n": 3}\n\n{"id": "b", "text": "Zwei"}\n',
        ),
    ],
)
def test_folders_with_a_table(tmp_path, name, content):
    """The ways in which people keep a few hundred recordings, LJSpeech's and the hub's among them."""
    put(tmp_path, "wavs/a.wav", "clips/b.flac")
    (tmp_path / name).write_text(content, encoding="utf-8")
    imported = import_dataset("folder", tmp_path, lang="de-de")
    assert not imported.left_out, imported.left_out
    assert [item.text for item in imported.items] == ['Yes, "this".', "Zwei"]
    assert [item.audio.name for item in imported.items] == ["a.wav", "b.flac"]
    assert {item.lang for item in imported.items} == {"de-DE"}
    if "mood" in content:
        assert [(item.speaker, dict(item.extra)) for item in imported.items] == [
            ("ann", {"mood": "glad"}),
            ("bob", {}),
        ]
    write_manifest(tmp_path / "out.jsonl", imported.items)
    assert read_manifest(tmp_path / "out.jsonl") == imported.items


def test_folders_of_sound_with_texts_beside(tmp_path):
    """The least anybody can have: what is said stands in a file of the same name."""
    put(tmp_path, "a.wav", "deep/b.OGG", "silent.mp3")
    (tmp_path / "a.txt").write_text("\ufeffHello\r\nthere\n", encoding="utf-8")
    (tmp_path / "deep/b.txt").write_text("World")
    imported = import_dataset("folder", tmp_path)
    assert [(item.id, item.text) for item in imported.items] == [("a", "Hello there"), ("deep/b", "World")]
    assert [(entry.where, entry.reason) for entry in imported.left_out] == [("silent.mp3", "no text")]


def test_checking_measures_what_can_be_decoded(tmp_path):
    """A header may lie; `--check` counts samples, in the sandbox, and says which files are broken."""
    put(tmp_path, "good.wav", "broken.wav")
    (tmp_path / "broken.wav").write_bytes(b"not sound at all")
    for name in ("good", "broken"):
        (tmp_path / f"{name}.txt").write_text(name)
    checked = check(import_dataset("folder", tmp_path))
    assert [(item.id, item.extra["duration_s"]) for item in checked.items] == [("good", 0.3)]
    assert [(entry.where, entry.reason) for entry in checked.left_out] == [("broken", "undecodable_audio")]


@pytest.mark.parametrize("kind", ["common-voice", "fleurs", "speech-brown", "folder"])
def test_a_folder_of_something_else_is_refused_in_words(tmp_path, kind):
    """The commonest mistake is the wrong folder; an empty manifest would hide it."""
    with pytest.raises(InvalidManifest, match=r"is no|can be used") as caught:
        import_dataset(kind, tmp_path)
    assert str(tmp_path) in caught.value.detail


def test_wrong_words_are_refused(tmp_path, common_voice):
    """Kinds and languages come from a command line."""
    with pytest.raises(InvalidField, match="common-voice, fleurs"):
        import_dataset("librispeech", tmp_path)
    with pytest.raises(InvalidLanguage):
        import_dataset("common-voice", common_voice, lang="persian!")
    put(tmp_path / "two", "a.wav")
    for name in ("a.csv", "b.csv"):
        (tmp_path / "two" / name).write_text("id|x\n")
    with pytest.raises(InvalidManifest, match="several tables"):
        import_dataset("folder", tmp_path / "two")


@pytest.mark.speech_dev
def test_real_recordings_are_imported(speech_dev, tmp_path):
    """People's own names, punctuation and scripts pass through a Common Voice table unharmed."""
    items = read_manifest(speech_dev / "manifest.jsonl")[::400]
    folder = tmp_path / "xx"
    (folder / "clips").mkdir(parents=True)
    for item in items:
        shutil.copy(item.audio, folder / "clips" / Path(item.audio).name)
    rows = [["client", item.audio.with_suffix(".mp3").name, item.text, item.lang] for item in items]
    cv_table(folder / "validated.tsv", *rows, columns="client_id path sentence locale")
    imported = check(import_dataset("common-voice", folder))
    assert [item.text for item in imported.items] == [item.text for item in items]
    for got, real in zip(imported.items, items, strict=True):
        assert got.lang == real.lang
        assert got.extra["duration_s"] == pytest.approx(real.extra["duration_s"], abs=0.05)


def test_a_manifest_is_imported_as_it_is(tmp_path):
    """A manifest is a table, too: to import one is to move it, or to check its sound."""
    put(tmp_path, "clips/a.wav")
    item = ManifestItem(
        "a", tmp_path / "clips/a.wav", "Hallo", lang="de", speaker="s", source="cv", split="eval",
        query="hello", query_lang="en", extra={"duration_s": 0.3, "votes": 2},
    )  # fmt: skip
    write_manifest(tmp_path / "manifest.jsonl", [item])
    assert import_dataset("folder", tmp_path).items == [item]
