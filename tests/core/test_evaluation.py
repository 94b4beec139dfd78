"""Evaluation: the report that model cards quote is put together right."""

import json
from pathlib import Path

import numpy as np
import pytest

from clasp_core import metrics
from clasp_core.errors import InvalidManifest
from clasp_core.evaluation import evaluate_manifest
from clasp_core.ingest import embed_recording
from clasp_core.models import open_model

SAMPLES = Path(__file__).parent.parent.parent / "samples"
IDS = ("en-bees", "en-volcano", "fr-lift", "zh-chess")
LONG = "en-village-news"
"""The one sample of many segments."""


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
    path = manifest(tmp_path, ids=(*IDS, LONG))
    report = evaluate_manifest(model, path, audio_root=SAMPLES, by=["lang", "speaker"])
    speech, text = model.speech_encoder(), model.text_encoder()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    recordings = [embed_recording(speech, SAMPLES / line["audio"], max_duration_s=600) for line in lines]
    assert max(map(len, recordings)) > 5
    scores = np.array(
        [
            [
                max(float(segment.vector @ text.encode([query["text"]])[0]) for segment in segments)
                for segments in recordings
            ]
            for query in lines
        ]
    )
    expected = metrics.figures(scores.astype(np.float32), np.eye(len(lines), dtype=bool))
    for name in ("n", "pool", "hits@1", "hits@5", "mrr", "mean_rank"):
        assert report["overall"]["text_to_speech"][name] == pytest.approx(expected[name])
    assert set(report["groups"]["lang"]) == {"en", "fr", "zh-CN"}
    assert report["groups"]["lang"]["en"]["text_to_speech"]["pool"] == 3
    assert report["groups"]["lang"]["fr"]["speech_to_text"]["hits@1"] == 1.0
    assert report["model"] == "mini"
    assert report["fingerprint"] == model.fingerprint
    assert report["protocol"] == "clean"
    assert set(report["seconds"]) >= {"speech", "text", "audio"}


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
