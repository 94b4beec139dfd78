"""Reading manifests: what is accepted, and that a refusal names the line."""

import json
from pathlib import Path

import pytest

from clasp_core.errors import InvalidManifest
from clasp_core.manifest import ManifestItem, read_manifest, write_manifest

GOOD = {"id": "a", "audio": "clips/a.wav", "text": "سلام دنیا"}


@pytest.fixture
def write(tmp_path):
    """Writes lines (objects, or raw bytes) as a manifest and gives its path."""

    def written(*lines):
        path = tmp_path / "manifest.jsonl"
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        path.write_bytes(b"\n".join(raw))
        return path

    return written


def test_the_least_and_the_most_an_item_can_hold(write, tmp_path):
    """Every field of the contract arrives under its name, and the others in `extra`, for `--by`."""
    full = {
        "id": "b", "audio": "b.flac", "text": "Hallo", "lang": "de-de", "speaker": "s1", "source": "cv",
        "split": "eval", "query": "hello", "query_lang": "EN", "gender": "female", "duration_s": 2.5,
    }  # fmt: skip
    least, most = read_manifest(write(GOOD, full))
    assert least == ManifestItem("a", tmp_path / "clips/a.wav", "سلام دنیا")
    assert most == ManifestItem(
        id="b", audio=tmp_path / "b.flac", text="Hallo", lang="de-DE", speaker="s1", source="cv",
        split="eval", query="hello", query_lang="en", extra={"gender": "female", "duration_s": 2.5},
    )  # fmt: skip
    assert len({least, most}) == 2


def test_audio_is_taken_from_the_root_the_folder_or_itself(write, tmp_path):
    """A manifest moves together with its audio, or points at a data set elsewhere; both must be found."""
    path = write(GOOD, {**GOOD, "id": "b", "audio": "/data/b.wav"})
    assert [item.audio for item in read_manifest(path)] == [tmp_path / "clips/a.wav", Path("/data/b.wav")]
    assert read_manifest(path, Path("/speech"))[0].audio == Path("/speech/clips/a.wav")


def test_marks_and_line_ends_of_other_systems_are_tolerated(write):
    """Editors on Windows write a byte order mark and CRLF; blank lines come from joining files. A line
    separator inside a string (U+2028) ends no line."""
    path = write(
        b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r",
        b"",
        b"  \r",
        '{"id": "b", "audio": "b.wav", "text": "one\u2028two"}'.encode(),
        b"",
    )
    assert [item.id for item in read_manifest(path)] == ["a", "b"]


def test_null_means_absent(write):
    """Exporters write null for what they lack; it must not become a group called None."""
    (item,) = read_manifest(write({**GOOD, "lang": None, "speaker": None, "query": None}))
    assert (item.lang, item.speaker, item.query) == (None, None, None)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"id": "b", ', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'["b", "b.wav", "text"]', "not a JSON object"),
        (b"null", "not a JSON object"),
        ('{"id": "b", "audio": "b.wav", "text": "caf\u00e9"}'.encode("latin-1"), "not UTF-8"),
        ({"audio": "b.wav", "text": "x"}, "'id' is missing"),
        ({"id": "b", "text": "x"}, "'audio' is missing"),
        ({"id": "b", "audio": "b.wav"}, "'text' is missing"),
        ({"id": "b", "audio": "b.wav", "text": None}, "'text' is missing"),
        ({"id": 7, "audio": "b.wav", "text": "x"}, "'id' must be a string, not 7"),
        ({"id": "b", "audio": ["b.wav"], "text": "x"}, "'audio' must be a string"),
        ({"id": "b", "audio": "b.wav", "text": "x", "speaker": 3}, "'speaker' must be a string"),
        ({"id": "b", "audio": "b.wav", "text": "  "}, "'text' is empty"),
        ({"id": "b", "audio": "b\0.wav", "text": "x"}, "NUL"),
        ({"id": "b", "audio": "b.wav", "text": "x", "lang": "not a tag"}, "not a language tag"),
        ({"id": "b", "audio": "b.wav", "text": "x", "query_lang": "fa_IR"}, "not a language tag"),
        ({**GOOD, "audio": "b.wav"}, "the id 'a' was used on line 1"),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong(write, line, complaint):
    """Manifests have thousands of lines; "invalid manifest" alone would send the user searching."""
    path = write(GOOD, b"", line)
    with pytest.raises(InvalidManifest) as caught:
        read_manifest(path)
    assert f"{path}, line 3: " in caught.value.detail
    assert complaint in caught.value.detail


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_manifest_is_refused(write, content):
    """Nothing to evaluate is a mistake to report, not a report full of nothing."""
    with pytest.raises(InvalidManifest, match="is empty"):
        read_manifest(write(content))


def test_a_manifest_that_cannot_be_opened_is_refused(tmp_path):
    """A wrong path ends in one clear sentence, not in a traceback."""
    with pytest.raises(InvalidManifest, match="cannot be read: No such file"):
        read_manifest(tmp_path / "absent.jsonl")
    with pytest.raises(InvalidManifest, match="cannot be read"):
        read_manifest(tmp_path)


def test_what_is_written_is_read_back_the_same(tmp_path):
    """Importers, synthesis and training exchange manifests: nothing may be lost or reordered on the way."""
    items = [
        ManifestItem("b/1", tmp_path / "clips/b 1.flac", "يک\u2028دو «سه»", lang="fa", split="train"),
        ManifestItem(
            "a", tmp_path / "a.wav", "line\nbreak", lang="zh-Hans", speaker="s", source="cv", split="test",
            query="q", query_lang="en", extra={"duration_s": 1.5, "tags": ["x", None], "n": 3},
        ),
    ]  # fmt: skip
    path = tmp_path / "manifest.jsonl"
    write_manifest(path, items)
    assert read_manifest(path) == items
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert read_manifest(moved / "manifest.jsonl")[0].audio == moved / "clips/b 1.flac"


def test_audio_elsewhere_is_found_from_the_manifest(tmp_path):
    """A manifest may lie beside the data set it describes, which is not ours to write into."""
    clip = tmp_path / "corpus" / "clips" / "a.wav"
    clip.parent.mkdir(parents=True)
    clip.touch()
    path = tmp_path / "work" / "manifest.jsonl"
    path.parent.mkdir()
    write_manifest(path, [ManifestItem("a", clip, "x")])
    assert read_manifest(path)[0].audio.samefile(clip)
    assert b'"../corpus/clips/a.wav"' in path.read_bytes()


@pytest.mark.parametrize(
    ("items", "says"),
    [
        ([], "nothing to write"),
        ([ManifestItem("a", Path("a.wav"), "x"), ManifestItem("a", Path("b.wav"), "y")], "'a' is used twice"),
        ([ManifestItem("a", Path("a.wav"), " ")], "'text' is empty"),
        ([ManifestItem("a", Path("a.wav"), "x", lang="fa_IR")], "not a language tag"),
        ([ManifestItem("a", Path("a.wav"), "x", extra={"speaker": "s"})], "speaker among its other fields"),
        ([ManifestItem("a", Path("a.wav"), "x", extra={"duration_s": float("nan")})], "as JSON"),
        ([ManifestItem("a", Path("a.wav"), "x", extra={"path": Path("x")})], "as JSON"),
        ([ManifestItem("a", Path("a.wav"), "lone \ud800")], "as JSON"),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path, items, says):
    """A bad item must come to light where it was made, and leave the manifest that was there as it was."""
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(b"as before")
    with pytest.raises(InvalidManifest, match=says):
        write_manifest(path, items)
    assert path.read_bytes() == b"as before"
    assert list(tmp_path.iterdir()) == [path]
