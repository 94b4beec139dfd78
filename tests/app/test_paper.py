"""The paper's model as a service: the real loading code on small checkpoints in the hub's own layout.

Everything but the sizes is the paper's: HuBERT with layer norm, torchvision's EfficientNet, LaBSE's chain
of BERT, dense layer and normalisation, and the published fusion's layout. What such weights find means
nothing; that the same recording gives the same vector, and every refusal, does.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from clasp_core import fusion
from clasp_core.checkpoints import readable
from clasp_core.errors import InvalidAudio, ModelUnavailable
from clasp_core.hub import PUBLISHED
from clasp_core.ingest import embed_recording
from clasp_core.library import mean_vector
from clasp_core.models import PaperModel, open_model
from clasp_core.paper import PaperBackbone
from clasp_core.systems import SYSTEMS
from clasp_core.verification import clip_branches, verify
from tests.conftest import SAMPLES, Sample
from tests.paper_checkpoints import (
    save_efficientnet,
    save_hubert,
    save_sentence_bert,
    save_wav2vec2,
    save_xlmr,
)
from tests.service import RunningService, clasp

WIDTH = 32
CLIPS = sorted((SAMPLES / "audio").glob("*.opus"), key=lambda path: path.stat().st_size)[:9]
"""The shortest ones: a segment each."""


def trained(layout: str, seed: int, prepared: bool = True) -> dict[str, torch.Tensor]:
    """A fusion that has lived: its batch statistics are of unit vectors, or of raw ones."""
    torch.manual_seed(seed)
    network = fusion.create(layout, WIDTH)
    for _ in range(50):
        speech, picture = torch.randn(16, WIDTH) * 3 + 1, torch.randn(16, 1000) * 8 + 2
        if prepared:
            speech, picture = (torch.nn.functional.normalize(x, dim=1) for x in (speech, picture))
        network(speech, picture)
    return network.state_dict()


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder as `clasp models fetch` leaves it, with small random weights."""
    folder = tmp_path_factory.mktemp("models")
    save_hubert(PUBLISHED["hubert-large"].location(folder), hidden=WIDTH)
    save_wav2vec2(PUBLISHED["wav2vec2-base"].location(folder), hidden=WIDTH)
    save_sentence_bert(PUBLISHED["labse"].location(folder), dim=768, layers=1)
    save_xlmr(PUBLISHED["xlm-r"].location(folder), dim=768, layers=1)
    save_efficientnet(PUBLISHED["efficientnet-b7"].location(folder), variant="b0", seed=3)
    for part, layout in (("clasp-concat", "concat"), ("clasp-gating", "gating")):
        path = PUBLISHED[part].location(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(trained(layout, seed=4), path)
    return folder


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[RunningService]:
    folder = tmp_path_factory.mktemp("paper")
    with RunningService(folder, model="paper", models_dir=models_dir) as running:
        yield running.start()
        assert running.stop() == 0


def test_the_service_runs_on_the_paper_s_model(
    service: RunningService, samples: dict[str, Sample], models_dir: Path
) -> None:
    """Upload, search by text and by sound, restart: the whole path on the paper's own kinds of encoder."""
    names = ["en-bees", "en-volcano", "fa-bread"] if "fa-bread" in samples else list(samples)[:3]
    for name in names:
        service.upload(samples[name].content, id=name, lang=samples[name].line["lang"]).raise_for_status()
    for name in names:
        assert service.settled(name, within_s=120)["status"] == "ready"

    # a recording as the question finds itself, with the very vector that was stored
    for name in names:
        best = service.found_by_sound(samples[name].content, limit=1)[0]
        assert best["id"] == name
        assert best["score"] == pytest.approx(1, abs=1e-4)

    # a text finds by the cosine that the library itself gives
    model = open_model("paper", models_dir=models_dir)
    (question,) = model.text_encoder().encode(["where do the bees live"])
    encoder = model.speech_encoder()
    expected = {
        name: float(
            question
            @ mean_vector(embed_recording(encoder, SAMPLES / samples[name].line["audio"], max_duration_s=60))
        )
        for name in names
    }
    hits = service.client.get("/search", params={"q": "where do the bees live"}).json()
    assert hits["model"] == {"name": "paper", "fingerprint": model.fingerprint}
    assert {hit["id"]: hit["score"] for hit in hits["hits"]} == pytest.approx(expected, abs=1e-3)

    service.kill()
    service.start()
    again = service.client.get("/search", params={"q": "where do the bees live"}).json()
    assert [hit["id"] for hit in again["hits"]] == [hit["id"] for hit in hits["hits"]]


def test_another_model_s_data_is_refused(service: RunningService, models_dir: Path) -> None:
    """Vectors of two models in one index give answers that look right and mean nothing."""
    settings = {"data_dir": service.settings["data_dir"], "models_dir": models_dir}
    for model in ("mini", "paper-gating"):
        done = clasp("search", "bees", cwd=service.data_dir, model=model, **settings)
        assert done.returncode == 1
        assert "another model" in done.stderr
        assert "reindex" in done.stderr


def test_the_second_encoding_of_a_batch_is_the_first(models_dir: Path) -> None:
    """A vector must not depend on what was uploaded beside it."""
    encoder = open_model("paper", models_dir=models_dir).speech_encoder()
    assert encoder.picture_rate == 22_050
    random = np.random.default_rng(0)
    lengths = (0.4, 3.1, 1.7)
    clips = [random.normal(size=int(s * 16_000)).astype(np.float32) * 0.1 for s in lengths]
    pictured = [random.normal(size=int(s * 22_050)).astype(np.float32) * 0.1 for s in lengths]
    together = encoder.encode(clips, pictured)
    alone = np.concatenate([encoder.encode([a], [b]) for a, b in zip(clips, pictured, strict=True)])
    np.testing.assert_allclose(together, alone, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    with pytest.raises(ValueError, match="22050"):
        encoder.encode(clips)
    assert encoder.encode([], []).shape == (0, 768)


@pytest.mark.parametrize("name", [name for name in SYSTEMS if SYSTEMS[name].weights is None])
def test_systems_without_published_weights_serve_from_a_folder(
    name: str, tmp_path: Path, models_dir: Path
) -> None:
    """Whoever trains one of them gets a model folder; its description says which encoders to load."""
    with pytest.raises(ModelUnavailable, match="train it"):
        _ = open_model(name, models_dir=models_dir).fingerprint
    system = SYSTEMS[name]
    save_file(trained(system.fusion, seed=5), tmp_path / "fusion.safetensors")
    description = {"format": "clasp-model/1", "architecture": "paper", "system": system.as_json()}
    (tmp_path / "model.json").write_text(json.dumps(description))
    model = open_model(str(tmp_path), models_dir=models_dir)
    segments = embed_recording(model.speech_encoder(), CLIPS[0], max_duration_s=60)
    texts = model.text_encoder().encode(["a question", "یک پرسش"])
    assert segments[0].vector.shape == texts[0].shape == (768,)
    assert model.speech_encoder().picture_rate == (None if system.spectrogram is None else 22_050)


def test_the_fingerprint_is_of_every_part(models_dir: Path, tmp_path: Path) -> None:
    """A replaced tokenizer or preprocessor changes the vectors as surely as other weights do."""
    copy = tmp_path / "models"
    shutil.copytree(models_dir, copy)
    before = open_model("paper", models_dir=copy).fingerprint
    assert before == open_model("paper", models_dir=models_dir).fingerprint
    fingerprints = {before, open_model("paper-gating", models_dir=copy).fingerprint}
    for part, file in (("hubert-large", "preprocessor_config.json"), ("labse", "sentence_bert_config.json")):
        path = PUBLISHED[part].location(copy) / file
        path.write_text(path.read_text() + "\n")
        fingerprints.add(open_model("paper", models_dir=copy).fingerprint)
    assert len(fingerprints) == 4


def test_published_pickles_convert_and_serve(models_dir: Path, tmp_path: Path) -> None:
    """The authors published whole pickled modules, and HuBERT and EfficientNet have no safetensors either.

    A folder filled with them by hand must come to the same vectors, by nothing but `clasp models convert`.
    """
    copy = tmp_path / "models"
    shutil.copytree(models_dir, copy)
    hubert = PUBLISHED["hubert-large"].location(copy) / "pytorch_model.bin"
    efficientnet = PUBLISHED["efficientnet-b7"].location(copy).with_suffix(".pth")
    fused = PUBLISHED["clasp-concat"].location(copy).with_suffix(".pt")
    torch.save(load_file(hubert.with_name("model.safetensors")), hubert)
    torch.save(load_file(efficientnet.with_suffix(".safetensors")), efficientnet)
    notebook = (
        "import sys, torch; from safetensors.torch import load_file\n"
        "exec(open(sys.argv[1]).read().split('# --- what must be converted')[0])\n"
        f"module = HubertLabseConcat({WIDTH}, 1000, 768, 576, 1024, 800)\n"
        "module.load_state_dict(load_file(sys.argv[2])); torch.save(module, sys.argv[3])\n"
    )
    classes = Path(__file__).parent.parent / "core" / "checkpoint_files.py"
    weights = PUBLISHED["clasp-concat"].location(copy)
    subprocess.run([sys.executable, "-c", notebook, classes, weights, fused], check=True)
    assert b"__main__" in fused.read_bytes()
    for pickle in (hubert, efficientnet, fused):
        readable(pickle).unlink()
    done = clasp("search", "bees", cwd=tmp_path, model="paper", models_dir=copy)
    assert "lacks its speech part" in done.stderr
    for pickle in (hubert, efficientnet, fused):
        converted = clasp("models", "convert", pickle, cwd=tmp_path)
        assert converted.returncode == 0, converted.stderr
    vectors = [
        embed_recording(open_model("paper", models_dir=folder).speech_encoder(), CLIPS[0], max_duration_s=60)[
            0
        ].vector
        for folder in (models_dir, copy)
    ]
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)


def test_a_missing_part_is_named(models_dir: Path, tmp_path: Path) -> None:
    """3.4 GB that are not there should cost one clear line, not a traceback."""
    done = clasp("search", "bees", cwd=tmp_path, model="paper")
    assert done.returncode == 1
    assert "CLASP_MODELS_DIR" in done.stderr
    copy = tmp_path / "models"
    shutil.copytree(models_dir, copy)
    shutil.rmtree(PUBLISHED["labse"].location(copy))
    done = clasp("search", "bees", cwd=tmp_path, model="paper", models_dir=copy)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "text part" in done.stderr
    assert "clasp models fetch" in done.stderr


# --- clasp models


def models_json(*arguments: object, cwd: Path, **settings: object) -> dict[str, Any]:
    done = clasp("models", *arguments, "--json", cwd=cwd, **settings)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_the_list_says_what_is_here(models_dir: Path, tmp_path: Path) -> None:
    """Which models there are, where from, under which licence, how large, and whether here."""
    listed = {
        entry["name"]: entry for entry in models_json("list", cwd=tmp_path, models_dir=models_dir)["models"]
    }
    assert set(listed) == {"mini", "hybrid", *SYSTEMS}
    assert listed["mini"]["available"]
    assert listed["paper"]["available"]
    assert not listed["paper-lasp"]["available"]
    assert not listed["paper-attention"]["available"]
    assert listed["paper"]["fingerprint"] == open_model("paper", models_dir=models_dir).fingerprint
    assert listed["paper-lasp"]["fingerprint"] is None
    sources = {part["role"]: part["source"] for part in listed["paper"]["parts"]}
    assert "facebook/hubert-large-ls960-ft" in sources["speech"]
    assert "efficientnet_b7_lukemelas-c5b4e57e.pth" in sources["spectrogram"]
    assert "sentence-transformers/LaBSE" in sources["text"]
    assert "llm-lab/CLASP" in sources["fusion"]
    assert all(part["licence"] for entry in listed.values() for part in entry["parts"])
    without = models_json("list", cwd=tmp_path)["models"]
    assert {entry["name"] for entry in without if entry["available"]} == {"mini", "hybrid"}
    done = clasp("models", "list", cwd=tmp_path)
    assert done.returncode == 0
    for word in ("hubert-large", "1262", "Apache-2.0", "huggingface.co/facebook/hubert-large-ls960-ft"):
        assert word in done.stdout


@pytest.mark.slow
def test_verify_tells_how_the_inputs_were_prepared(models_dir: Path, tmp_path: Path) -> None:
    """The published files alone can settle it: their batch statistics remember what they were trained on."""
    found = models_json("verify", "paper", cwd=tmp_path, models_dir=models_dir)
    assert (found["entries"], found["layout"], found["right"]) == (43, "concat", True)
    assert found["inputs"] is None
    assert models_json("verify", "mini", cwd=tmp_path)["right"]

    # fusions whose statistics were gathered from these very encoders, fed the one way or the other
    model = open_model("paper", models_dir=models_dir)
    assert isinstance(model, PaperModel)
    backbone = PaperBackbone(model.system, model.located(), torch.device("cpu"))
    branches = clip_branches(backbone, CLIPS)
    torch.manual_seed(0)
    for inputs in ("raw", "l2"):
        network = fusion.create("concat", WIDTH)
        fed = branches.prepared(inputs)
        for _ in range(80):
            network(fed.speech, fed.picture)
        path = tmp_path / f"{inputs}.safetensors"
        save_file(network.state_dict(), path)
        report = verify(str(path), CLIPS, models_dir=models_dir)
        assert report.inputs == inputs, report
        assert report.right == (inputs == "l2")
    audio = [option for clip in CLIPS for option in ("--audio", clip)]
    raw = tmp_path / "raw.safetensors"
    done = clasp("models", "verify", raw, *audio, cwd=tmp_path, models_dir=models_dir)
    assert done.returncode == 1
    assert "speech inputs raw" in done.stdout
    assert "the inputs were 'raw'" in done.stderr
    with pytest.raises(InvalidAudio, match="too little"):
        verify(str(raw), CLIPS[:2], models_dir=models_dir)


def test_verify_refuses_what_is_no_fusion(models_dir: Path, tmp_path: Path) -> None:
    """Damaged files should be found before three thousand recordings are embedded with them."""
    state = trained("concat", seed=6)
    state["mix_seq.5.bias"][3] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    save_file({"a": torch.zeros(3)}, tmp_path / "other.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    save_file(fusion.create("concat", WIDTH).state_dict(), tmp_path / "untrained.safetensors")
    for name, words in (("nan", "mix_seq.5.bias"), ("other", "neither"), ("missing", "no file")):
        with pytest.raises(ModelUnavailable, match=words):
            verify(str(tmp_path / f"{name}.safetensors"), models_dir=models_dir)
    done = clasp("models", "verify", tmp_path / "junk.safetensors", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "cannot be read as safetensors" in done.stderr
    done = clasp("models", "verify", tmp_path / "untrained.safetensors", "--json", cwd=tmp_path)
    assert (done.returncode, json.loads(done.stdout)["batches"]) == (0, 0)
    assert "never trained" in done.stderr
