"""Language tags and the written form of text: one spelling for what looks or sounds the same.

Questions, transcripts and training targets all pass `normalize_text` before anything embeds or
compares them. Tokenising for one encoder (XLM-R's own character map, say) stays with that encoder.
"""

import re
import unicodedata
from functools import lru_cache

import langcodes
from persiantools import characters

from clasp_core.errors import InvalidLanguage

MAX_TAG_LENGTH = 100
"""Characters. RFC 5646 section 4.4 lets an implementation set a limit of 35 or more."""

_WELL_FORMED = re.compile(
    r"""
    (?: [a-z]{2,3} (?P<extended> (?: - [a-z]{3} ){0,3} )   # language, extended language
        (?P<script> - [a-z]{4} )?
        (?P<region> - (?: [a-z]{2} | [0-9]{3} ) )?
        (?P<variants> (?: - (?: [a-z0-9]{5,8} | [0-9][a-z0-9]{3} ) )* )
        (?P<extensions> (?: - [a-wyz0-9] (?: - [a-z0-9]{2,8} )+ )* )
        (?: - x (?: - [a-z0-9]{1,8} )+ )?                  # private use
      | x (?: - [a-z0-9]{1,8} )+
      | en-gb-oed | i-(?: ami | bnn | default | enochian | hak | klingon | lux | mingo | navajo | pwn | tao
        | tay | tsu ) | sgn-be-fr | sgn-be-nl | sgn-ch-de  # irregular tags kept from RFC 3066
    )
    """,
    re.ASCII | re.IGNORECASE | re.VERBOSE,
)
"""RFC 5646 section 2.1, less the primary subtags of four to eight letters: none was ever registered, and
to take `farsi` or `english` for an unknown language would silently undo what their senders meant."""


def canonical_tag(tag: str | None) -> str | None:
    """A BCP 47 language tag in canonical form ("fa-ir" -> "fa-IR", "iw" -> "he"); None stays None.

    Any well-formed tag is accepted, registered or not. Raises InvalidLanguage for any other string,
    POSIX locales such as "fa_IR" among them.
    """
    return None if tag is None else _canonical(tag)


@lru_cache(maxsize=1024)
def _canonical(tag: str) -> str:
    shown = ascii(tag if len(tag) <= 40 else f"{tag[:40]}...")
    advice = f"{shown} is not a language tag (BCP 47). Use one such as fa, en-GB or zh-Hans"
    match = None if len(tag) > MAX_TAG_LENGTH else _WELL_FORMED.fullmatch(tag)
    if match is None:
        joined = ", with '-' between its parts" if "_" in tag else ""
        raise InvalidLanguage(f"{advice}{joined}.")
    # Section 2.2.9 counts repeats as ill-formed, which a regular expression cannot see.
    variants = (match["variants"] or "").lower().split("-")[1:]
    singletons = re.findall(r"-([a-z0-9])(?=-)", (match["extensions"] or "").lower())
    if len(set(variants)) < len(variants) or len(set(singletons)) < len(singletons):
        raise InvalidLanguage(f"{advice}: it repeats a part.")
    # langcodes takes a region's digits after an extended language for another one, but not after a script
    between = "-Zzzz" if match["extended"] and not match["script"] and match["region"] else ""
    place = match.start("region") if between else 0
    try:
        return langcodes.standardize_tag(tag[:place] + between + tag[place:]).replace(between, "", 1)
    except ValueError as error:
        raise InvalidLanguage(f"{advice}.") from error


_PERSIAN_LETTERS = frozenset({"fa", "ur", "ku", "ckb"})
"""Languages that write ی and ک, whose keyboards and old encodings give the Arabic ي, ى and ك. Not
Pashto, Sindhi or Uyghur, where these letters differ in meaning, nor Arabic, where they are at home."""

_HARAKAT_OPTIONAL = _PERSIAN_LETTERS | {"ar", "aeb", "apc", "arq", "ary", "arz", "ps", "sd"}
"""Languages that are read without vowel signs. Not Kashmiri, say, which spells with them."""

_HARAKAT = re.compile("[\u064b-\u0652\u0656-\u065f\u0670]")
"""Vowel signs; U+0653..0655 (madda, hamza) are parts of letters."""

_EZAFE_HEH = re.compile("(?:\u06c0|\u0647\u0654)\u0654*")

_RIGHT_JOINING = (
    "\u0622-\u0625\u0627\u0629\u062f-\u0632\u0648\u0671-\u0673\u0675-\u0677\u0688-\u0699\u06c0\u06c3-\u06cb"
    "\u06cd\u06cf\u06d2\u06d3\u06d5\u06ee\u06ef"
)
_ARABIC_LETTER = "[\u0620-\u063f\u0641-\u064a\u066e\u066f\u0671-\u06d3\u06d5\u06ee\u06ef\u06fa-\u06fc\u06ff]"
_DUAL_JOINING = f"(?![{_RIGHT_JOINING}\u0621\u0674]){_ARABIC_LETTER}"
"""Letters that would join the next one (Unicode's ArabicShaping.txt), in the main Arabic block."""

_JOINERS = re.compile(
    rf"(?<={_DUAL_JOINING})\u200d*(?P<zwnj>\u200c)[\u200c\u200d]*(?={_ARABIC_LETTER})"
    r"|(?<=\u0dca)(?P<zwj>\u200d)(?=[\u0d9a-\u0dc6])"
    r"|[\u200c\u200d]"
)


def normalize_text(text: str, lang: str | None) -> str:
    """The one written form of a text; empty where nothing is left. Doing it twice changes nothing.

    Always: Unicode NFC; runs of white space as one space, none at the ends; no control, bidirectional
    or other invisible characters (but see below), no lone surrogates, no tatweel; every decimal digit
    as ASCII, since speech does not tell ۴۵ or ४५ from 45 and the encoders know ASCII best.

    By language: without vowel signs where readers do without (Arabic, Persian, Urdu, ...); Arabic yeh
    and kaf as ی and ک in Persian, Urdu and Kurdish; in Persian, no hamza on a final heh (خانهٔ, خانۀ),
    an ezafe that most writers leave out.

    The zero-width non-joiner stays between two Arabic-script letters that would join without it:
    there it is spelling (می‌روم). XLM-R's tokenizer reads it as a space, as it does the common spelling
    می روم. Anywhere else it is invisible, and would split a word that looks whole. The joiner stays in
    Sinhala conjuncts, which are spelt with it; elsewhere it chooses a glyph.

    `lang` is a BCP 47 tag; raises InvalidLanguage as `canonical_tag` does.
    """
    language = primary_language(lang)
    # A removed character may bring two together that compose, or that a joiner stood between.
    while (normal := _normalized_once(text, language)) != text:
        text = normal
    return text


def _normalized_once(text: str, language: str | None) -> str:
    text = "".join(map(_character, unicodedata.normalize("NFC", text)))
    text = _JOINERS.sub(lambda match: match["zwnj"] or match["zwj"] or "", text)
    if language in _HARAKAT_OPTIONAL:
        text = _HARAKAT.sub("", text)
    if language in _PERSIAN_LETTERS:
        text = characters.ar_to_fa(text)
    if language == "fa":
        text = _EZAFE_HEH.sub("\u0647", text)
    return " ".join(text.split())


@lru_cache(maxsize=4096)
def _character(character: str) -> str:
    """What one character becomes in any language."""
    if character in "\u200c\u200d" or character.isspace():
        return character
    if character == "\u200b":  # marks where words end in Thai, Khmer and pasted web pages
        return " "
    category = unicodedata.category(character)
    if category in {"Cc", "Cf", "Cs"} or character == "\u0640":
        return ""
    return str(unicodedata.decimal(character)) if category == "Nd" else character


@lru_cache(maxsize=1024)
def primary_language(tag: str | None) -> str | None:
    """The primary language, with Iranian Persian and Dari (pes, prs) as fa and so on."""
    canonical = canonical_tag(tag)
    return None if canonical is None else langcodes.Language.get(canonical).prefer_macrolanguage().language


_NEEDLESS_SPACE = re.compile(r"(?<![0-9]) | (?![0-9])")


def match_key(text: str) -> str:
    """Two transcripts with the same key say the same: equal but for case, punctuation and spacing.

    Expects a text from `normalize_text` in its own language. Spaces go too, since where they stand
    is habit in Persian, Thai or Chinese; only between digits do they tell "1 23" from "12 3". A text
    of nothing but punctuation is its own key.
    """
    text = normalize_text(text, None)
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    words = "".join(" " if _is_unsaid(char) else char for char in folded)
    return _NEEDLESS_SPACE.sub("", " ".join(words.split())) or folded


def _is_unsaid(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] in "PZ" or category == "Cf"
