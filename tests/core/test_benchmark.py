"""MTEB's own evaluator, run on our models, comes to our own figures."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from app.samples import SAMPLES
from clasp_core.errors import EmptyQuery, SilentAudio
from clasp_core.evaluation import embed_manifest
from clasp_core.metrics import known_item_ranks
from clasp_core.models import open_model
from tests.audio_files import encode

IDS = ("zh-chess", "zh-luggage", "pt-fishing", "es-bread", "hi-exam", "en-bees")
Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def lines() -> Lines:
    """The manifest lines of a few short samples."""
    read = [json.loads(line) for line in (SAMPLES / "manifest.jsonl").read_text().splitlines()]
    return [line for line in read if line["id"] in IDS]


@pytest.fixture(scope="module")
def encoder() -> Any:
    """`mini` as MTEB sees it. MTEB takes seconds to import: not while tests are collected."""
    pytest.importorskip("mteb", reason="the extra `mteb` is not installed")
    from clasp_core.benchmark import MtebEncoder

    return MtebEncoder(open_model("mini"))


def text_to_speech(lines: Lines) -> Any:
    """A task over these lines, in the form of MTEB's own tasks of speech."""
    from datasets import Audio, Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    ids = [line["id"] for line in lines]
    clips = [{"bytes": (SAMPLES / line["audio"]).read_bytes(), "path": None} for line in lines]
    queries = {"id": ids, "text": [line.get("query", line["text"]) for line in lines]}

    class SamplesT2A(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="SamplesT2A",
            description="A few bundled samples.",
            type="Any2AnyRetrieval",
            category="t2a",
            modalities=["text", "audio"],
            dataset={"path": "local", "revision": "1"},
            eval_langs=["mul-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
            corpus = Dataset.from_dict({"id": ids, "audio": clips}).cast_column("audio", Audio())
            self.dataset = {
                "default": {
                    "test": {
                        "queries": Dataset.from_dict(queries),
                        "corpus": corpus,
                        "relevant_docs": {name: {name: 1} for name in ids},
                        "top_ranked": None,
                    }
                }
            }
            self.data_loaded = True

    return SamplesT2A()


def test_mteb_s_figures_are_ours(tmp_path: Path, encoder: Any, lines: Lines) -> None:
    """Figures that stand beside other models' on a leaderboard must be those of what we serve.

    One query is another item's words, so that not every rank is 1 and equal figures say something.
    """
    asked = [lines[0] | {"query": lines[1]["text"]}, *lines[1:]]
    manifest = tmp_path / "few.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in asked))
    embedded = embed_manifest(open_model("mini"), manifest, audio_root=SAMPLES)
    ranks = known_item_ranks(embedded.scores(), np.eye(len(asked), dtype=bool))
    assert ranks.max() > 1

    figures = text_to_speech(asked).evaluate(encoder, "test", encode_kwargs={})["default"]
    expected = {
        "hit_rate_at_1": np.mean(ranks <= 1),
        "hit_rate_at_5": np.mean(ranks <= 5),
        "mrr_at_10": np.mean(1 / ranks),
        "ndcg_at_10": np.mean(1 / np.log2(1 + ranks)),
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert encoder.mteb_model_meta.revision == open_model("mini").fingerprint


def test_decoded_and_undecoded_recordings_are_one(encoder: Any, lines: Lines) -> None:
    """Tasks bring recordings as files or as samples, whichever way `datasets` was told to read them."""
    content = (SAMPLES / lines[0]["audio"]).read_bytes()
    samples, rate = soundfile.read(io.BytesIO(content), dtype="float32")
    both = [{"bytes": content, "path": None}, {"array": samples, "sampling_rate": rate}]
    vectors = encode_with(encoder, {"audio": both})
    assert vectors.shape == (2, encoder.mteb_model_meta.embed_dim)
    assert encoder.similarity(vectors[:1], vectors[1:])[0, 0] == pytest.approx(1, abs=1e-3)


def test_an_item_without_a_vector_stops_the_benchmark(encoder: Any) -> None:
    """A made-up vector in its place would be counted as an answer."""
    with pytest.raises(EmptyQuery):
        encode_with(encoder, {"text": ["bees", "\u200b"]})
    silence = encode(np.zeros((16_000, 1), np.float32), 16_000)
    with pytest.raises(SilentAudio):
        encode_with(encoder, {"audio": [{"bytes": silence, "path": None}]})
    with pytest.raises(ValueError, match="either"):
        encode_with(encoder, {"audio": [], "text": []})


def encode_with(encoder: Any, batch: dict[str, Any]) -> Any:
    metadata = text_to_speech([]).metadata
    return encoder.encode([batch], task_metadata=metadata, hf_split="test", hf_subset="default")
