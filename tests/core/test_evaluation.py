"""Evaluation: the report that model cards quote is put together right."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from app.samples import SAMPLES
from clasp_core import metrics
from clasp_core.errors import InvalidManifest
from clasp_core.evaluation import by_clean_rules, evaluate_manifest, groups_of, pooled
from clasp_core.ingest import embed_recording
from clasp_core.manifest import ManifestItem
from clasp_core.models import Heard, open_model
from clasp_core.types import Waveform
from tests.core.doubles import LetterTextEncoder, SpellingSpeechEncoder

IDS = ("en-bees", "en-volcano", "fr-lift", "zh-chess")
LONG = "en-village-news"
"""The one sample of many segments; of which a third will do."""


def manifest(
    folder: Path, changes: dict[str, dict[str, object]] | None = None, ids: tuple[str, ...] = IDS
) -> Path:
    """A few samples, with some lines changed."""
    lines = [json.loads(line) for line in (SAMPLES / "manifest.jsonl").read_text().splitlines()]
    chosen = [line | (changes or {}).get(line["id"], {}) for line in lines if line["id"] in ids]
    path = folder / "manifest.jsonl"
    path.write_text("\n".join(map(json.dumps, chosen)))
    return path


def test_the_report_is_what_its_parts_say(tmp_path: Path) -> None:
    """Pools, directions and best segments, against the same thing done slowly one pair at a time."""
    model = open_model("mini")
    whole, rate = soundfile.read(SAMPLES / "audio" / f"{LONG}.opus")
    soundfile.write(tmp_path / "long.wav", whole[: len(whole) // 5], rate)
    path = manifest(tmp_path, {LONG: {"audio": str(tmp_path / "long.wav")}}, ids=(*IDS, LONG))
    report = evaluate_manifest(model, path, audio_root=SAMPLES, by=["lang", "speaker", "length"], macro_min=2)
    speech, text = model.speech_encoder(), model.text_encoder()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    recordings = [embed_recording(speech, SAMPLES / line["audio"], max_duration_s=600) for line in lines]
    assert max(map(len, recordings)) > 3
    queries = [text.encode([line["text"]])[0] for line in lines]
    scores = np.array(
        [
            [max(float(segment.vector @ query) for segment in segments) for segments in recordings]
            for query in queries
        ]
    )
    expected = metrics.figures(scores.astype(np.float32), np.eye(len(lines), dtype=bool))
    for name in ("n", "pool", "hits@1", "hits@5", "mrr", "mean_rank"):
        assert report["overall"]["text_to_speech"][name] == pytest.approx(expected[name])
    assert set(report["groups"]["lang"]) == {"en", "fr", "zh-CN"}
    assert report["groups"]["lang"]["en"]["text_to_speech"]["pool"] == 3
    assert list(report["groups"]["length"]) == ["4-8", "15+"]
    assert report["groups"]["length"]["4-8"]["text_to_speech"]["pool"] == 4
    assert report["macro"]["lang"]["groups"] == ["en"]
    assert report["macro"]["length"]["groups"] == ["4-8"]
    for direction in ("text_to_speech", "speech_to_text"):
        mean = report["macro"]["lang"][direction]
        assert (mean["groups"], mean["n"]) == (1, 3)
        assert mean["mrr"] == report["groups"]["lang"]["en"][direction]["mrr"]
    assert report["groups"]["lang"]["fr"]["speech_to_text"]["hits@1"] == 1.0
    assert report["model"] == "mini"
    assert report["fingerprint"] == model.fingerprint
    assert report["protocol"] == "clean"
    assert set(report["seconds"]) >= {"speech", "text", "audio"}


def test_groups_by_length_and_means_over_large_groups() -> None:
    """Where a model is weak on short clips, or on one language, the mean over all clips hides it."""
    items = [
        ManifestItem(str(place), Path("a.wav"), f"text {place}", lang=lang)
        for place, lang in enumerate(["de", "de", "fr", "fr", "fr", "zh"])
    ]
    durations = [0.5, 2.0, 7.99, 8.0, 15.0, 400.0]
    by_length = groups_of(items, durations, "length")
    assert {value: places.tolist() for value, places in by_length.items()} == {
        "0-2": [0],
        "2-4": [1],
        "4-8": [2],
        "8-15": [3],
        "15+": [4, 5],
    }
    named = [replace(item, extra={"length": "short"}) for item in items]
    assert list(groups_of(named, durations, "length")) == ["short"]
    scores = np.eye(6, dtype=np.float32)
    scores[2, 3] = 2  # one miss in fr, and in de none
    report = pooled(by_clean_rules, scores, items, durations, ["lang", "length"], macro_min=2)
    macro = report["macro"]["lang"]
    assert (macro["least"], macro["groups"]) == (2, ["de", "fr"])
    assert macro["text_to_speech"]["hits@1"] == pytest.approx((1 + 2 / 3) / 2)
    assert macro["text_to_speech"]["ci95"]["hits@1"][0] < macro["text_to_speech"]["hits@1"]
    assert pooled(by_clean_rules, scores, items, durations, ["lang"], macro_min=4)["macro"] == {
        "lang": {"least": 4, "groups": []}
    }


def test_a_query_of_its_own_is_what_is_searched_with(tmp_path: Path) -> None:
    """Cross-lingual figures ask in another language; the transcript then only says who is right."""
    plain = evaluate_manifest(open_model("mini"), manifest(tmp_path), audio_root=SAMPLES)
    path = manifest(tmp_path, {"en-bees": {"query": "Le musée ferme à six heures.", "query_lang": "fr"}})
    asked = evaluate_manifest(open_model("mini"), path, audio_root=SAMPLES)
    assert asked["overall"]["text_to_speech"]["mrr"] < plain["overall"]["text_to_speech"]["mrr"]


def test_items_that_cannot_be_decoded_are_named_and_left_out(tmp_path: Path) -> None:
    """A broken file in ten thousand must neither stop the evaluation nor count as a miss unseen."""
    path = manifest(tmp_path, {"fr-lift": {"audio": "README.md"}, "zh-chess": {"audio": "nowhere.wav"}})
    report = evaluate_manifest(open_model("mini"), path, audio_root=SAMPLES)
    assert {item["id"] for item in report["skipped"]} == {"fr-lift", "zh-chess"}
    assert report["overall"]["text_to_speech"]["n"] == 2


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    """An empty report would read as a perfect one."""
    with pytest.raises(InvalidManifest, match="no item"):
        evaluate_manifest(open_model("mini"), manifest(tmp_path), audio_root=SAMPLES, split="eval")


def test_the_papers_protocol_is_named_in_the_report(tmp_path: Path) -> None:
    """Figures by other rules must never be mistaken for these; stages 1 and 2 rank among a few candidates."""
    model, path = open_model("mini"), manifest(tmp_path)
    report = evaluate_manifest(model, path, audio_root=SAMPLES, protocol="paper")
    assert report["protocol"] == "paper"
    whole = report["overall"]["text_to_speech"]
    assert (whole["pool"], whole["threshold"]) == (4, 0.5)
    assert 0 <= whole["macro_f1"] <= 1
    few = evaluate_manifest(
        model, path, audio_root=SAMPLES, protocol="paper", candidates=3, threshold=0.4, by=["lang"]
    )
    for direction in ("text_to_speech", "speech_to_text"):
        figures = few["overall"][direction]
        assert (figures["n"], figures["pool"], figures["threshold"]) == (4, 3, 0.4)
    assert few["groups"]["lang"]["en"]["text_to_speech"]["pool"] == 2


class Told(SpellingSpeechEncoder):
    """Remembers which languages it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.langs: list[str | None] = []

    def hear(self, waveforms: Sequence[Waveform], langs: Sequence[str | None]) -> Heard:
        self.langs += langs
        return super().hear(waveforms, langs)


def test_a_model_that_transcribes_is_told_languages_as_by_an_upload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures with and without are those of users who say what is spoken, and of those who do not."""
    model, told = open_model("mini"), Told()
    monkeypatch.setattr(model, "speech_encoder", lambda: told)
    monkeypatch.setattr(model, "text_encoder", LetterTextEncoder)
    path = manifest(tmp_path, {"en-bees": {"lang": "EN-gb"}, "zh-chess": {"lang": None}})
    evaluate_manifest(model, path, audio_root=SAMPLES)
    assert set(told.langs) == {"en-GB", "en", "fr", None}
    told.langs.clear()
    evaluate_manifest(model, path, audio_root=SAMPLES, hints=False)
    assert set(told.langs) == {None}
