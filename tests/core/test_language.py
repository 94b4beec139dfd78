"""Language tags, and the one written form that questions, transcripts and training targets share."""

import time
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from clasp_core.errors import InvalidLanguage
from clasp_core.language import MAX_TAG_LENGTH, canonical_tag, match_key, normalize_text

LANGUAGES = st.sampled_from(
    [None, "fa", "pes", "fa-AF", "ar", "arz", "ur", "ps", "ckb", "en", "zh-Hans", "x-me"]
)

NASTY = (
    "ابتجحدرزوهیکيكىئؤأآةۀەەڕگپچژےںہھ\u0621\u0653\u0654\u0655\u064b\u064e\u0650\u0651\u0652\u0670ـ"
    "\u200c\u200d\u200b\u200e\u200f\u2066\u2069\ufeff\u00ad\u061c\u2060\x00\x1b\t\n\x85\u00a0\u3000\u2028\ud800"
    "0١۲३５𝟗²aAéßİﬁ\u0301\u0328\u0338=<>.,؟،!-'\u093c\u0915\u094d\u0d9a\u0dca\u0dbb\u1100\u1161\u11a8\u212b"
)
TEXTS = st.one_of(st.text(), st.text(alphabet=NASTY, max_size=12))

subtag = st.text("abcdefghijklmnopqrstuvwxyzABCXYZ0123456789", min_size=1, max_size=8)
letters = st.text("abcdefghijklmnopqrstuvwxyzABCXYZ", min_size=2, max_size=3)
WELL_FORMED = st.builds(
    lambda language, extended, script, region, private: "-".join(
        [language, *extended, *script, *region, *private]
    ),
    letters,
    st.lists(st.sampled_from(["yue", "ssp", "abc"]), max_size=2, unique=True),
    st.lists(st.text("abcdXYZ", min_size=4, max_size=4), max_size=1),
    st.lists(st.sampled_from(["ir", "US", "419", "zz"]), max_size=1),
    st.one_of(st.just([]), st.lists(subtag, min_size=1, max_size=3).map(lambda parts: ["x", *parts])),
)


@pytest.mark.parametrize(
    ("given_tag", "canonical"),
    [
        ("fa", "fa"),
        ("FA-ir", "fa-IR"),
        ("ZH-hant-tw", "zh-Hant-TW"),
        ("zh-cmn-Hans-CN", "zh-Hans-CN"),
        ("iw", "he"),
        ("eng", "en"),
        ("es-419", "es-419"),
        ("de-1996", "de-1996"),
        ("zh-yue-419", "yue-419"),
        ("es-ssp-419", "es-ssp-419"),
        ("deu-efk-Latn-199-056bebka", "de-efk-199-056bebka"),
        ("es-ssp-mx-x-Zzzz", "es-ssp-MX-x-zzzz"),
        ("es-ssp-Zzzz-419", "es-ssp-Zzzz-419"),
        ("en-GB-oed", "en-GB-oxendict"),
        ("i-klingon", "tlh"),
        ("fa-u-nu-latn", "fa-u-nu-latn"),
        ("x-dothraki", "x-dothraki"),
        ("xx", "xx"),
        ("qaa-Qaaa-QM", "qaa-Qaaa-QM"),
        ("und", "und"),
    ],
)
def test_well_formed_tags_become_canonical(given_tag, canonical):
    """One language has one name, whatever the client writes; an unregistered tag is accepted as it is, so
    that nobody waits for a registry (the contract's rule)."""
    assert canonical_tag(given_tag) == canonical


def test_no_tag_stays_no_tag():
    """`lang` is optional everywhere."""
    assert canonical_tag(None) is None


@pytest.mark.parametrize(
    "bad",
    [
        "", " ", "f", "fa_IR", "farsi", "english", "root", "fa-", "-fa", "fa--IR", " fa", "fa\n", "fa ", "12",
        "t1", "fa-IR-Arab", "x", "en-x", "en-a", "en-a-b-foo", "en-abcdefghi", "ar-٠٠١", "ｆａ", "fa\x00",
        "!!", "en-us-us", "de-1901-1901", "en-a-aa-a-bb", "\ud800",
        "en-" + "-".join(["abcde"] * 5000), "a" * 100_000,
    ],
)  # fmt: skip
def test_malformed_tags_are_refused(bad):
    """Each would be a typing mistake or an attack, and gets a sentence short enough to show, that any
    encoding can carry; never an odd exception of a library."""
    with pytest.raises(InvalidLanguage) as caught:
        canonical_tag(bad)
    assert "is not a language tag" in caught.value.detail
    assert caught.value.detail.isascii()
    assert len(caught.value.detail) < 300


def test_the_underscore_of_locales_gets_advice():
    """`fa_IR` is what programmers type first; the answer must say what to change."""
    with pytest.raises(InvalidLanguage, match="'-' between its parts"):
        canonical_tag("fa_IR")


def test_a_tag_may_be_as_long_as_the_limit():
    """The limit is where it is said to be, and not one earlier."""
    longest = "en-x" + "-abcdefgh" * 10 + "-abcde"
    assert len(longest) == MAX_TAG_LENGTH
    assert canonical_tag(longest) == longest
    with pytest.raises(InvalidLanguage):
        canonical_tag(longest + "f")


@given(WELL_FORMED)
def test_a_canonical_tag_is_its_own_canonical_form(tag):
    """Stored tags are compared whole; one that changed on its way through again would be lost."""
    canonical = canonical_tag(tag)
    assert canonical_tag(canonical) == canonical
    assert canonical_tag(tag.swapcase()) == canonical


@given(st.text(max_size=20) | st.text("faeni-_x01 ", max_size=12))
def test_any_string_is_a_tag_or_refused(text):
    """Whatever a client sends, the outcome is a tag or InvalidLanguage, which HTTP answers with 422."""
    try:
        canonical = canonical_tag(text)
    except InvalidLanguage:
        return
    assert canonical is not None
    assert canonical.isascii()
    assert " " not in canonical


@pytest.mark.parametrize(
    ("lang", "text", "normal"),
    [
        (None, "  a \t b\r\n\u2028c\u3000d\u00a0 ", "a b c d"),
        (None, "cafe\u0301", "café"),
        (None, "\u202bשלום\u202c \u2066x\u2069\u200f\u061c", "שלום x"),
        (None, "a\x00b\x1b[0m\ufeffc so\u00adft", "ab[0mc soft"),
        (None, "een\u200b\u200bdemonstratie", "een demonstratie"),
        (None, "half \ud83d of an emoji", "half of an emoji"),
        (None, "١٢٣ ۴۵۶ ७८९ １２", "123 456 789 12"),
        (None, "x² ½ Ⅳ", "x² ½ Ⅳ"),
        (None, "كتـــاب", "كتاب"),
        (None, "كِتاب علي", "كِتاب علي"),
        ("fa", "كتاب علي حتى", "کتاب علی حتی"),
        ("fa-IR", "كتاب", "کتاب"),
        ("pes", "كتاب", "کتاب"),
        ("prs", "كتاب", "کتاب"),
        ("fa", "کِتابِ مُعَلّم دقیقاً", "کتاب معلم دقیقا"),
        ("fa", "بِسيار", "بسیار"),
        ("fa", "خانهٔ پدری، خانۀ پدری", "خانه پدری، خانه پدری"),
        ("fa", "سؤال مسئله آب رأی", "سؤال مسئله آب رأی"),
        ("ar", "ذَهَبَ إِلى الكُلِّيَّةِ عليٌّ هٰذا", "ذهب إلى الكلية علي هذا"),
        ("ar", "كتاب على ي ٣", "كتاب على ي 3"),
        ("arz", "كِتاب", "كتاب"),
        ("ur", "كتاب كي رحمٰن", "کتاب کی رحمن"),
        ("ckb", "كوردي", "کوردی"),
        ("ps", "زَه ي ی ې", "زه ي ی ې"),
        ("ks", "كٔشِیُر", "كٔشِیُر"),
        ("en", "كتاب علي", "كتاب علي"),
    ],
)
def test_what_is_folded_in_which_language(lang, text, normal):
    """Spellings that readers take for the same become the same, and no language loses a letter it tells
    apart: Arabic keeps its yeh and kaf, Pashto its five yehs, Kashmiri its vowels."""
    assert normalize_text(text, lang) == normal


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("می\u200cروم", "می\u200cروم"),
        ("می\u200c\u200c\u200dروم", "می\u200cروم"),
        ("\u200cمی\u200c \u200cروم\u200c", "می روم"),
        ("کار\u200cخانه", "کارخانه"),  # reh does not join, so nobody sees the difference
        ("کتاب\u200c، ۱۲\u200c۳", "کتاب، 123"),
        ("na\u200cme", "name"),
        ("व्\u200dयंग्\u200dय", "व्यंग्य"),
        ("ශ්\u200dරී", "ශ්\u200dරී"),
        ("👨\u200d👩", "👨👩"),
    ],
)
def test_joiners_stay_only_where_they_are_spelling(text, normal):
    """An invisible character must not give a word that looks the same another vector; between joining
    Persian letters it is visible, and part of the word. So too, without being told the language."""
    assert normalize_text(text, None) == normal
    assert normalize_text(text, "fa") == normal


def test_keyboards_and_encodings_agree_on_persian():
    """The same question from an Arabic keyboard, a Persian one and a phone finds the same recordings."""
    asked = ["كتاب‌هاي سال ١٣٩٩", "کتاب‌های سال ۱۳۹۹", "\u202bکتاب\u200cهای  سال 1399\u202c"]
    assert {normalize_text(text, "fa") for text in asked} == {"کتاب‌های سال 1399"}


@given(TEXTS, LANGUAGES)
@example("ا\u200c\u0653\u200cم", None)
@example("ي\u200c\u0654", "fa")
@example("\u06d5\u00ad\u0654", "fa")
@example("A\u00ad\u030a", None)
def test_normalising_twice_changes_nothing(text, lang):
    """The service normalises what clients may have normalised already; both must embed the same."""
    once = normalize_text(text, lang)
    assert normalize_text(once, lang) == once


@given(TEXTS, LANGUAGES)
def test_the_normal_form_is_clean(text, lang):
    """What goes to tokenizers and logs: NFC, encodable, single spaces, ASCII digits, nothing invisible
    but joiners."""
    normal = normalize_text(text, lang)
    assert unicodedata.is_normalized("NFC", normal)
    assert normal.encode().decode() == normal
    assert normal == " ".join(normal.split())
    for character in normal:
        category = unicodedata.category(character)
        assert category not in {"Cc", "Cf", "Cs", "Zl", "Zp"} or character in "\u200c\u200d"
        assert category != "Nd" or character.isascii()


@given(TEXTS, LANGUAGES)
def test_composed_and_decomposed_text_are_one(text, lang):
    """macOS decomposes file names and Windows does not; a transcript must not depend on its author's."""
    assert normalize_text(unicodedata.normalize("NFD", text), lang) == normalize_text(text, lang)


def test_a_hostile_text_costs_no_more_than_its_length():
    """Normalising repeats until nothing changes; a question made to need many rounds must not find any."""
    for piece in ("\u0647\u0654", "\u0654", "\u200c\u0653", "ا\u200c", "\u200d\u200c", "\u06d5\u00ad\u0654"):
        text = "\u0647" + piece * 100_000
        started = time.perf_counter()
        normalize_text(text, "fa")
        assert time.perf_counter() - started < 5


def test_normalising_refuses_a_malformed_language():
    """A hint that cannot be understood is the caller's mistake, not a reason to guess."""
    with pytest.raises(InvalidLanguage):
        normalize_text("x", "fa_IR")


@pytest.mark.parametrize("text", ["", " \n", "\u200b\u200e\ufeff", "\x00", "\u200c", "ـــ"])
def test_nothing_normalises_to_nothing(text):
    """Callers tell an empty question by the empty string."""
    assert normalize_text(text, "fa") == ""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Who is there?", "who is there"),
        ("STRASSE", "Straße"),
        ("Don't stop", "don’t  stop!"),
        ("می‌روم", "می روم."),
        ("你好，世界", "你好 世界。"),
        ("ﬁne", "FINE"),
        ("e-mail", "email"),
    ],
)
def test_the_key_ignores_case_punctuation_and_spacing(one, other):
    """Recordings of one sentence, written down by different hands, answer each other's questions."""
    assert match_key(normalize_text(one, None)) == match_key(normalize_text(other, None))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1 23", "12 3"),
        ("3.5", "35"),
        ("$5", "5"),
        ("resume", "résumé"),
        ("?", "!"),
        ("", "?"),
        ("می‌روم", "می‌رود"),
    ],
)
def test_the_key_tells_different_sentences_apart(one, other):
    """A key that merged too much would count wrong answers as right."""
    assert match_key(one) != match_key(other)


@given(TEXTS)
def test_the_key_is_stable_and_never_empty_for_a_text(text):
    """An empty key would make all texts without letters right answers to each other."""
    normal = normalize_text(text, None)
    key = match_key(text)
    assert key == match_key(normal)
    assert bool(key) == bool(normal)
