"""Speech Brown of one's own: what is read, by whom, into which split; and that a build can be interrupted.

Builds need a synthesiser; they use espeak-ng and flite, and skip where those are not installed.
"""

import fcntl
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from clasp_core.datasets.figures import describe, tokens
from clasp_core.datasets.synthesis import Recording, Sentence, build, choose, read_texts, split_of, spoken
from clasp_core.errors import DataMismatch, InvalidField, InvalidManifest
from clasp_core.manifest import ManifestItem, read_manifest

CATEGORIES = ("news", "fiction", "learned")
WORDS = (
    "the",
    "jury",
    "praised",
    "a",
    "city",
    "while",
    "nobody",
    "asked",
    "why",
    "rain",
    "fell",
    "on",
    "quiet",
)


def corpus(sentences=240, documents=60):
    """Sentences of 3 to 47 tokens, each another, `learned` having half as many as the others."""
    random = np.random.default_rng(5)
    made = []
    for number in range(sentences):
        length = int(random.integers(2, 44))
        said = " ".join([f"number {number}", *random.choice(WORDS, length - 1), "now."][: length + 1])
        category = CATEGORIES[(0, 0, 1, 1, 2)[number % 5]]
        made.append(Sentence(f"s-{number:04d}", said, f"doc-{number % documents}", category, "en"))
    return made


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ('He said "no evidence" (of any kind) was found.', "He said no evidence, of any kind, was found."),
        ("`` It isn't '' -- he knew -- the dogs' fault !", "It isn't, he knew, the dogs fault!"),
        ("«سلام»، گفت (و رفت).", "سلام، گفت, و رفت."),
        (
            "A well-known 3-1 win in 1961–62, worth $4.5 million",
            "A well-known 3-1 win in 1961–62, worth $4.5 million",
        ),
        ("[[h@l'oU]] <break/> {x}", "h@l'oU, break/, x"),
        ('"..."', ""),
        ("( )", ""),
    ],
)
def test_marks_are_neither_spelt_out_nor_obeyed(written, said):
    """Engines read brackets as phonemes or markup, and say "quote"; numbers are for each voice to read."""
    assert spoken(written) == said


def test_every_beginning_of_the_choice_is_balanced():
    """Whoever asks for 30 of 50,000 sentences gets all categories and lengths, not the first article."""
    texts = corpus()
    order, left_out = choose(texts, Recording(voices=("flite:slt",)))
    assert not left_out
    assert sorted(s.id for s in order) == sorted(s.id for s in texts)
    for count in (18, 30, 60):
        assert set(Counter(s.category for s in order[:count]).values()) == {count // 3}
        assert len({len(tokens(s.text)) // 8 for s in order[:count]}) >= 5
    assert Counter(s.category for s in order)["learned"] == 48, "and what there is of it is all there"
    assert [s.id for s in choose(texts[::-1], Recording(("flite:slt",), seed=1))[0]] != [s.id for s in order]


def test_what_cannot_be_read_is_left_out_and_counted():
    """A text twice would be two right answers, perhaps on both sides of the split; the paper's set has 54."""
    texts = [
        Sentence("a", "It was still open.", "d"),
        Sentence("b", "it was STILL open", "e"),
        Sentence("c", "Where **yf is the slope.", "d"),
        Sentence("d", '"."', "d"),
        Sentence("e", "Yes.", "d"),
        Sentence("f", "word " * 48, "d"),
    ]
    order, left_out = choose(texts, Recording(voices=("flite:slt",)))
    assert [s.id for s in order] == ["a"]
    assert left_out == {
        "cannot be read aloud": 2,
        "text met before": 1,
        "shorter than 3 tokens": 1,
        "longer than 47 tokens": 1,
    }


def test_splits_go_by_document_and_never_change():
    """Sentences of one article share names and words: on both sides of a split they would be a leak. What
    was once test data must stay so when texts are added."""
    documents = [f"doc-{n}" for n in range(5000)]
    counts = Counter(split_of(document, 0) for document in documents)
    assert counts["train"] / 5000 == pytest.approx(0.8, abs=0.02)
    assert counts["validation"] / 5000 == pytest.approx(0.1, abs=0.015)
    assert [split_of(f"brown-c{x}01", 0) for x in "abcdefghj"] == [
        "train", "train", "validation", "train", "train", "train", "train", "train", "train",
    ]  # fmt: skip
    assert counts != Counter(split_of(document, 1) for document in documents)


def test_texts_are_read_in_every_form(tmp_path):
    """Lines, paragraphs, Brown's ids, and parallel texts of which one language is taken."""
    lines = tmp_path / "lines.txt"
    lines.write_text("One.\nTwo.\n", encoding="utf-8")
    assert [(s.id, s.document) for s in read_texts(lines)] == [("lines-000001",) * 2, ("lines-000002",) * 2]
    lines.write_text("One.\nTwo.\n\nThree.\n", encoding="utf-8")
    assert [s.document for s in read_texts(lines, "en")] == ["lines-0", "lines-0", "lines-1"]

    brown = [
        {"id": f"brown-ca{n:02d}-0001", "text": "x y", "category": "news", "lang": "en"} for n in range(10)
    ]
    path = tmp_path / "brown.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, brown)).encode()))
    assert read_texts(path)[3] == Sentence("brown-ca03-0001", "x y", "brown-ca03", "news", "en")

    path = tmp_path / "parallel.jsonl"
    path.write_text(
        '{"id": "1", "doc": "d", "text": {"en": "Hi", "fa": "سلام"}}\n{"id": "2", "text": {"en": "Ho"}}'
    )
    assert read_texts(path, "fa") == [Sentence("1", "سلام", "d", None, "fa")]
    with pytest.raises(InvalidManifest, match="a language must be named"):
        read_texts(path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"\n \n", "no sentence"),
        ("a.txt", b"\xff\xfe", "as text"),
        ("a.jsonl", b'{"text": "x"}\n["x"]', "line 2"),
        ("a.jsonl", b'{"id": "1", "text": "x"}\n{"id": "1", "text": "y"}', "'1' twice"),
        ("a.jsonl", b'{"id": 7, "text": "x"}', "strings"),
        ("a.jsonl", b'{"id": "a\\u0000b", "text": "x"}', "NUL"),
        ("a.jsonl", b'{"id": "1", "text": "lone \\ud800"}', "line 1"),
        ("a.jsonl.gz", b"not gzip", "as text"),
        ("a.pdf", b"x", "neither"),
    ],
)
def test_texts_that_cannot_be_read_are_named(tmp_path, name, content, says):
    """A line number beats a traceback in a file of 57,340 lines."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidManifest, match=says):
        read_texts(tmp_path / name)


def test_figures_count_what_the_paper_counts():
    """Table 1's columns; a set that is compared by them must count punctuation and case alike."""
    assert tokens("Don't pay $3.5 for well-known tea, he said.") == [
        "Don't", "pay", "$", "3.5", "for", "well-known", "tea", ",", "he", "said", ".",
    ]  # fmt: skip
    assert tokens("می‌روم خانه") == ["می‌روم", "خانه"]
    assert len(tokens("火车晚点了。")) == 6
    items = [
        ManifestItem("a", Path("a"), "A b.", split="train", extra={"duration_s": 1800, "category": "news"}),
        ManifestItem("b", Path("b"), "a b b b.", split="test", speaker="s", extra={"duration_s": 900}),
    ]
    figures = describe(items)
    assert (figures["sentences"], figures["hours"], figures["speakers"]) == (2, 0.75, 1)
    assert (figures["unique_tokens"], figures["mean_tokens"], figures["max_tokens"]) == (4, 4.0, 5)
    assert figures["by"]["category"] == {"news": {"sentences": 1, "hours": 0.5}}
    assert describe([ManifestItem("a", Path("a"), "x")])["hours"] is None, "unknown is not zero"


# --- builds

VOICES = ("espeak-ng:en-us", "espeak-ng:en-gb+f3:speed=200", "flite:kal16")
RECIPES = ("none", "noise:babble:10", "telephone")
needs_programs = pytest.mark.skipif(
    not (shutil.which("espeak-ng") and shutil.which("flite")),
    reason="espeak-ng and flite are not both installed",
)

_BUILD = """
import sys
from pathlib import Path
from clasp_core.datasets.synthesis import Recording, build
from tests.core.test_synthesis import RECIPES, VOICES, corpus
if __name__ == "__main__":
    def telling(made, total):
        for key in made:
            print(key, flush=True)
            yield key
    recording = Recording(VOICES, RECIPES, "flac")
    build(corpus(), Path(sys.argv[1]), recording, sentences=27, jobs=2, progress=telling)
"""


@pytest.fixture(scope="module")
def small_set(tmp_path_factory):
    """The folder of 27 sentences by three voices, built in a process that was killed once on the way."""
    folder = tmp_path_factory.mktemp("speech-brown") / "set"
    program = folder.parent / "program.py"
    program.write_text(_BUILD)
    command = [sys.executable, str(program), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    done = [first.stdout.readline().strip() for _ in range(6)]
    first.send_signal(signal.SIGKILL)
    rest, _ = first.communicate()
    done += rest.split()
    assert first.returncode == -signal.SIGKILL
    assert not (folder / "manifest.jsonl").exists()
    there = {path: path.stat().st_mtime_ns for path in (folder / "audio").rglob("[!.]*.flac")}
    second = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return folder, done, there, second.stdout.split()


@needs_programs
def test_a_killed_build_goes_on_where_it_stopped(small_set):
    """Tens of hours of synthesis get interrupted; what is done must neither be made again nor be lost."""
    folder, first, there, second = small_set
    assert 6 <= len(first) < 27
    assert not set(first) & set(second), "nothing is made twice"
    assert len(first) + len(second) == 27
    assert len(there) >= len(first)
    journalled = [path for path in there if path.stem in first]
    assert all(path.stat().st_mtime_ns == there[path] for path in journalled)
    assert len(read_manifest(folder / "manifest.jsonl")) == 27
    assert not list(folder.rglob("*.tmp")), "half a clip must never be taken for one"


@needs_programs
def test_a_set_holds_what_its_manifest_says(small_set):
    """Every clip is 16 kHz mono of the stated length; voices, effects and splits are where they belong."""
    folder, *_ = small_set
    items = read_manifest(folder / "manifest.jsonl")
    texts = {sentence.id: sentence for sentence in corpus()}
    order, _ = choose(corpus(), Recording(VOICES))
    assert [item.id for item in items] == [sentence.id for sentence in order[:27]]
    voices = defaultdict(Counter)
    for item in items:
        samples, rate = sf.read(item.audio)
        assert rate == 16_000
        assert samples.ndim == 1
        assert 0.05 < np.abs(samples).max() < 1.0
        assert len(samples) / rate == pytest.approx(item.extra["duration_s"], abs=0.001)
        sentence = texts[item.id]
        assert (item.text, item.lang) == (sentence.text, "en")
        assert item.split == split_of(sentence.document, 0)
        assert item.extra["document"] == sentence.document
        voices[item.extra["category"]][item.speaker] += 1
    assert set(voices) == set(CATEGORIES)
    assert all(set(count.values()) == {3} for count in voices.values()), voices
    effects = Counter(item.extra.get("augmentation", "none") for item in items)
    assert effects.keys() == {"none", "noise:babble:10", "telephone"}
    assert min(effects.values()) >= 4
    figures = describe(items)
    card = (folder / "README.md").read_text()
    assert f"| 27 | {figures['hours']:.2f} | {figures['unique_tokens']} |" in card
    for voice in VOICES:
        assert f"voice `{voice}`" in card


@needs_programs
def test_the_same_set_is_made_anywhere(small_set, tmp_path):
    """Another folder, another number of processes, no interruption: the same sound, sample by sample. And a
    set may grow: its first sentences are those of the smaller one."""
    folder, *_ = small_set
    recording = Recording(VOICES, RECIPES, "flac")
    built = build(corpus(), tmp_path / "again", recording, sentences=9)
    assert built.made == 9
    whole = {item.id: item for item in read_manifest(folder / "manifest.jsonl")}
    for item in read_manifest(built.manifest):
        np.testing.assert_array_equal(sf.read(item.audio)[0], sf.read(whole[item.id].audio)[0])
        assert item.extra == whole[item.id].extra
    clip = read_manifest(built.manifest)[0].audio
    clip.write_bytes(clip.read_bytes()[:-100])  # a disk that was full
    grown = build(corpus(), tmp_path / "again", recording, hours=0.018)
    assert grown.figures["hours"] >= 0.018
    items = read_manifest(grown.manifest)
    assert grown.figures["hours"] - items[-1].extra["duration_s"] / 3600 < 0.018, "and not one sentence more"
    assert grown.made >= len(items) - 9 + 1, "the damaged clip was made again"
    assert sf.info(clip).duration == pytest.approx(items[0].extra["duration_s"], abs=0.001)


@needs_programs
def test_a_folder_is_never_mixed(small_set, tmp_path):
    """Half a set of one seed and half of another is a set of neither; and nobody's own files are touched."""
    folder, *_ = small_set
    with pytest.raises(DataMismatch, match="differs in: recipes, seed"):
        build(corpus(), folder, Recording(VOICES, ("none",), "flac", seed=1))
    with pytest.raises(DataMismatch, match="differs in: texts"):
        build(corpus(100), folder, Recording(VOICES, RECIPES, "flac"))
    with (folder / "build.json").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DataMismatch, match="Another process"):
            build(corpus(), folder, Recording(VOICES, RECIPES, "flac"), sentences=27)
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(DataMismatch, match="not empty"):
        build(corpus(), tmp_path, Recording(VOICES))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@needs_programs
def test_what_cannot_be_built_is_refused_before_anything_is_made(tmp_path):
    """Voices must speak the texts' languages; mistakes on the command line must not cost an hour."""
    folder = tmp_path / "set"
    for recording, says in (
        (Recording(("flite:slt",), ("echo",)), "echo"),
        (Recording(("flite:slt",), form="mp3"), "opus, flac, wav"),
        (Recording(("espeak-ng:fa",)), "None of the voices speaks en"),
    ):
        with pytest.raises(InvalidField, match=says):
            build(corpus(), folder, recording)
    assert not folder.exists()
    mixed = [
        *corpus(10),
        Sentence("fa", "سلام به همه دنیا", "d", "news", "fa"),
        Sentence("zh", "火车晚点了。", "e", lang="zh"),
    ]
    built = build(mixed, folder, Recording(("espeak-ng:en-us", "espeak-ng:fa", "espeak-ng:cmn"), form="wav"))
    voice_of = {item.id: item.speaker for item in read_manifest(built.manifest)}
    assert voice_of.pop("fa") == "espeak-ng:fa"
    assert voice_of.pop("zh") == "espeak-ng:cmn"
    assert set(voice_of.values()) == {"espeak-ng:en-us"}


@needs_programs
def test_what_a_voice_cannot_read_is_told_and_tried_again(tmp_path):
    """One sentence must not end a build of hours, nor vanish from it; the next run may find it mended."""
    texts = [Sentence("a", "The rain fell now.", "d"), Sentence("b", "火车 晚点 了", "e")]
    for made in (1, 0):
        built = build(texts, tmp_path / "set", Recording(("flite:slt",), form="wav"))
        assert built.made == made
        assert built.failed.keys() == {"b"}
        assert "says nothing" in built.failed["b"]
        assert [item.id for item in read_manifest(built.manifest)] == ["a"]
    assert (
        "1 sentences that the voices could not read are missing" in (tmp_path / "set/README.md").read_text()
    )
