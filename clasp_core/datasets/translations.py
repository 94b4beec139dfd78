"""Questions in other languages about recordings: one side of a parallel text read aloud, the others asked.

The paper asks in machine translation (section 4, stage 4); parallel texts such as NTREX and Tatoeba have
people's. Reading aloud is `clasp_core.datasets.synthesis`'.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from clasp_core.datasets.synthesis import Sentence, read_texts
from clasp_core.errors import InvalidManifest
from clasp_core.manifest import ManifestItem

Translations: TypeAlias = Mapping[str, Mapping[str, str]]
"""By language, by the id of the sentence that is read aloud."""


def read_translations(path: Path, lang: str, langs: Sequence[str]) -> tuple[list[Sentence], Translations]:
    """The sentences of a parallel file in `lang` that have a translation into one of `langs`, and those.

    A sentence's `category` is which of them it has, so that each language gets its turn when sentences are
    chosen from. Raises InvalidManifest as `read_texts` does, and where a file is not parallel.
    """
    translations = {other: {one.id: one.text for one in read_texts(path, other)} for other in langs}
    texts = read_texts(path, lang)
    for other, translated in translations.items():
        if all(translated.get(one.id) == one.text for one in texts):
            raise InvalidManifest(f"{path} has no translations into {other}: its texts are of one language.")
    able = {one.id: [other for other in langs if one.id in translations[other]] for one in texts}
    return [replace(one, category="+".join(able[one.id])) for one in texts if able[one.id]], translations


def queries(items: Sequence[ManifestItem], translations: Translations, source: str) -> list[ManifestItem]:
    """Each recording as often as its text has translations, with `query` and `query_lang`, language by
    language; `source` says where the texts are from."""
    return [
        replace(item, id=f"{item.id}:{lang}", query=translated[item.id], query_lang=lang, source=source)
        for lang, translated in translations.items()
        for item in items
        if item.id in translated
    ]
