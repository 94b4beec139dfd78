"""`python -m tests.crosslingual [--model M]`: how well recordings are found in a language they do not speak.

The pool is the English recordings of Common Voice's delta, split `eval`, of the folder that CLASP_SPEECH_DEV
names. 200 of them are asked for by their transcripts and by translations of those into five languages
(tests/data/crosslingual.jsonl). Writes bench-results/crosslingual.json and crosslingual.md; a measurement,
not a gate.
"""

import argparse
import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clasp_core import metrics
from clasp_core.evaluation import best_segment_scores, embed_manifest, embed_texts, transcript_key
from clasp_core.language import normalize_text
from clasp_core.manifest import ManifestItem, read_manifest, write_manifest
from clasp_core.models import open_model, use_threads

ROOT = Path(__file__).parent.parent
OUT = ROOT / "bench-results"
TRANSLATIONS = Path(__file__).parent / "data" / "crosslingual.jsonl"
LANGUAGES = ("de", "fr", "fa", "zh", "ar")
COUNT = 200
SEED = 0
LEAST_WORDS = 5
RESAMPLES = 1000
SHOWN = ("hits@1", "hits@5", "mrr")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="mini", help="a name that `clasp models list` knows, or a folder")
    parser.add_argument("--threads", type=int, default=1)
    wanted = parser.parse_args()
    folder = os.environ.get("CLASP_SPEECH_DEV")
    if not folder or not (Path(folder) / "manifest.jsonl").is_file():
        print("CLASP_SPEECH_DEV does not name a folder of real speech with a manifest.jsonl.")
        return
    use_threads(wanted.threads)
    report = measured(wanted.model, pool(Path(folder) / "manifest.jsonl"))
    table = tabled(report)
    OUT.mkdir(exist_ok=True)
    (OUT / "crosslingual.json").write_text(json.dumps(report, indent=1) + "\n")
    (OUT / "crosslingual.md").write_text(table + "\n")
    print(table)


def pool(manifest: Path) -> list[ManifestItem]:
    """The recordings that are searched, in the manifest's order."""
    return [
        item
        for item in read_manifest(manifest)
        if item.split == "eval" and item.lang == "en" and "korliu" in (item.source or "")
    ]


def chosen(items: Sequence[ManifestItem]) -> list[ManifestItem]:
    """The 200 of the pool that are translated, in its order: whole sentences, spread over the speakers.

    In order of a hash of the ids, each speaker's first sentence is taken, then each one's second, and so
    on until there are enough. No model has a say.
    """
    texts = Counter(map(transcript_key, items))
    sentences = [item for item in items if is_sentence(item.text) and texts[transcript_key(item)] == 1]
    turns: Counter[str | None] = Counter()
    places: dict[str, tuple[int, str]] = {}
    for item in sorted(sentences, key=draw):
        places[item.id] = (turns[item.speaker], draw(item))
        turns[item.speaker] += 1
    taken = set(sorted(places, key=places.__getitem__)[:COUNT])
    return [item for item in items if item.id in taken]


def draw(item: ManifestItem) -> str:
    return hashlib.sha256(f"{SEED} {item.id}".encode()).hexdigest()


def is_sentence(text: str) -> bool:
    """Five words or more from a capital to a full stop; a quotation that does not end was cut off."""
    inside = text.strip("\"'“”‘’ ")
    whole = inside[:1].isupper() and inside[-1:] in {".", "?", "!"} and text.count('"') % 2 == 0
    return whole and len(text.split()) >= LEAST_WORDS


def translations() -> list[dict[str, str]]:
    """The lines of the file: `id`, `text` and a translation of it for each of `LANGUAGES`."""
    return [json.loads(line) for line in TRANSLATIONS.read_text(encoding="utf-8").splitlines()]


def measured(name: str, items: Iterable[ManifestItem]) -> dict[str, Any]:
    """Figures by the clean protocol for each language, and how its hits@1 compare with English ones.

    The ratio's interval is of the paired bootstrap: the same queries are drawn in both languages.
    """
    model = open_model(name)
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "manifest.jsonl"
        write_manifest(manifest, items)
        embedded = embed_manifest(model, manifest)
    keys = embedded.keys()
    place_of = {item.id: place for place, item in enumerate(embedded.items)}
    lines = [line for line in translations() if line["id"] in place_of]
    segments = [np.stack([segment.vector for segment in recording]) for recording in embedded.recordings]
    relevant = keys[[place_of[line["id"]] for line in lines]][:, None] == keys[None, :]
    encoder = model.text_encoder()
    by_language = {}
    for lang, field in (("en", "text"), *zip(LANGUAGES, LANGUAGES, strict=True)):
        queries = embed_texts(encoder, [normalize_text(line[field], lang) for line in lines])
        by_language[lang] = metrics.measure(best_segment_scores(queries, segments), relevant)

    drawn = np.random.default_rng(SEED).integers(len(lines), size=(RESAMPLES, len(lines)))
    first = {lang: of_lang.per_query[:, 0] for lang, of_lang in by_language.items()}
    english = first["en"][drawn].mean(1)
    ratios: dict[str, Any] = {}
    if english.min() > 0:
        for lang in LANGUAGES:
            low, high = np.percentile(first[lang][drawn].mean(1) / english, (2.5, 97.5)).tolist()
            ratios[lang] = {"value": float(first[lang].mean() / first["en"].mean()), "ci95": [low, high]}
    return {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "languages": {lang: of_lang.figures(resamples=RESAMPLES) for lang, of_lang in by_language.items()},
        "ratio_to_english": ratios,
        "skipped": embedded.skipped,
    }


def tabled(report: dict[str, Any]) -> str:
    languages, ratios = report["languages"], report["ratio_to_english"]
    english = languages["en"]
    rows = [
        f"{report['model']} ({report['fingerprint']}): {english['n']} queries in each language, "
        f"{english['pool']} recordings in English; 95 % intervals in brackets",
        "",
        f"| queries | {' | '.join(SHOWN)} | hits@1 / English |",
        "| --- |" + " ---: |" * (len(SHOWN) + 1),
    ]
    for lang, figures in languages.items():
        cells = [with_interval(figures[name], figures["ci95"][name]) for name in SHOWN]
        ratio = with_interval(**ratios[lang]) if lang in ratios else ""
        rows.append(f"| {lang} | {' | '.join(cells)} | {ratio} |")
    if report["skipped"]:
        rows += ["", f"{len(report['skipped'])} recordings could not be embedded and take no part."]
    return "\n".join(rows)


def with_interval(value: float, ci95: Sequence[float]) -> str:
    return f"{value:.3f} [{ci95[0]:.3f}, {ci95[1]:.3f}]"


if __name__ == "__main__":
    main()
