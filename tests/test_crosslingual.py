"""The translated questions: that the file is what it says, before any figure is made with it."""

import unicodedata
from pathlib import Path

import pytest

from clasp_core.language import match_key, normalize_text
from tests.crosslingual import COUNT, LANGUAGES, chosen, pool, translations

SCRIPT_OF = {"text": "LATIN", "de": "LATIN", "fr": "LATIN", "fa": "ARABIC", "zh": "CJK", "ar": "ARABIC"}
ARABIC_ONLY = set("كيىة")
PERSIAN_ONLY = set("پچژگکی")


def letters(text: str) -> list[str]:
    return [character for character in text if unicodedata.category(character) in {"Lu", "Ll", "Lo"}]


def test_every_recording_is_asked_for_in_every_language() -> None:
    """A line without one language, or an id twice, would make the languages' figures about other items."""
    lines = translations()
    assert len(lines) == len({line["id"] for line in lines}) == COUNT
    assert all(tuple(line) == ("id", "text", *LANGUAGES) for line in lines)
    for field in ("text", *LANGUAGES):
        texts = [line[field] for line in lines]
        assert all(text == text.strip() and text for text in texts)
        assert len({match_key(normalize_text(text, None)) for text in texts}) == COUNT, field


@pytest.mark.parametrize("field", SCRIPT_OF)
def test_every_text_is_in_its_script(field: str) -> None:
    """A column shifted, or letters of another keyboard, would be a question nobody would ask."""
    for line in translations():
        foreign = [
            letter
            for letter in letters(line[field])
            if not unicodedata.name(letter).startswith(SCRIPT_OF[field])
        ]
        assert not foreign, (line["id"], foreign)
        assert unicodedata.is_normalized("NFC", line[field]), line["id"]
        assert len(letters(line[field])) >= 4, line["id"]


def test_persian_and_arabic_each_have_their_own_letters() -> None:
    """The service folds the two kinds of yeh and kaf in Persian; a question typed well needs no folding."""
    lines = translations()
    assert not [line["id"] for line in lines if ARABIC_ONLY & set(line["fa"])]
    assert not [line["id"] for line in lines if PERSIAN_ONLY & set(line["ar"])]
    with_half_spaces = sum("\u200c" in line["fa"] for line in lines)
    assert with_half_spaces > COUNT / 4, "Persian without half-spaces is not Persian as it is printed"


def test_nothing_is_left_untranslated() -> None:
    """English kept as it is would be found like English, and flatter every other language."""
    for line in translations():
        keys = {field: match_key(normalize_text(line[field], None)) for field in SCRIPT_OF}
        assert len(set(keys.values())) == len(SCRIPT_OF), line["id"]
        # Names stay as they are in Latin script; the words between them must not.
        english = {word for word in line["text"].split() if word.islower()}
        for field in ("de", "fr"):
            left = english.intersection(line[field].split())
            assert 2 * len(left) <= len(english), (line["id"], field, left)


@pytest.mark.speech_dev
def test_the_file_is_about_the_recordings_that_the_rule_chooses(speech_dev: Path) -> None:
    """Whoever doubts that the items were picked to be easy can pick them again."""
    expected = [(item.id, item.text) for item in chosen(pool(speech_dev / "manifest.jsonl"))]
    assert [(line["id"], line["text"]) for line in translations()] == expected
