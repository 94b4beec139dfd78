"""The paper's speech encoders: what the notebooks compute, whatever the batch, or an error that says why."""

import json
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from clasp_core.encoders.hubert import SelfSupervisedSpeechEncoder
from clasp_core.errors import ModelUnavailable
from clasp_core.types import Waveform
from tests.golden.make import sample
from tests.paper_checkpoints import new_names, rewrite, save_hubert, save_wav2vec2, seeded

SAVE = {"hubert": save_hubert, "wav2vec2": save_wav2vec2}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def clips() -> list[NDArray[np.float32]]:
    """Speech and noise at many lengths and levels, the shortest the shortest possible."""
    speech = sample()
    noise = np.random.default_rng(0).normal(0, 0.1, 48_000).astype(np.float32)
    return [
        speech[:64_000],
        noise[:400],
        0.001 * speech[8_000:40_000],
        noise[:719],
        noise + 0.25,
        speech[16_000:48_000],
        noise[:720],
    ]


@pytest.fixture(scope="module", params=["hubert", "wav2vec2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SAVE[request.param](tmp_path_factory.mktemp("speech") / request.param)


@pytest.fixture(scope="module")
def encoder(folder: Path) -> SelfSupervisedSpeechEncoder:
    return SelfSupervisedSpeechEncoder.load(folder)


@pytest.fixture
def hubert(tmp_path: Path) -> Path:
    """A checkpoint that a test may spoil."""
    return save_hubert(tmp_path / "hubert")


def notebook_vectors(folder: Path, waveforms: Sequence[Waveform]) -> Tensor:
    """The notebooks' steps, one clip at a time, on weights that torch alone has loaded, every one of them."""
    import transformers

    kind = {"hubert": transformers.HubertForCTC, "wav2vec2": transformers.Wav2Vec2ForCTC}[folder.name]
    network = kind(kind.config_class.from_pretrained(folder)).eval()
    network.load_state_dict(new_names(load_file(folder / "model.safetensors")), strict=True)
    processor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(folder)
    vectors = []
    for waveform in waveforms:
        samples = waveform / np.abs(waveform).max()
        values = processor(samples, sampling_rate=16_000, return_tensors="pt").input_values
        with torch.inference_mode():
            vectors.append(network.base_model(values).last_hidden_state.mean(1))
    return torch.cat(vectors)


@contextmanager
def watched(encoder: SelfSupervisedSpeechEncoder) -> Iterator[list[Tensor]]:
    """What goes into the network, batch after batch."""
    batches: list[Tensor] = []

    def note(_: Any, arguments: tuple[Tensor, ...]) -> None:
        batches.append(arguments[0].clone())

    handle = encoder.network.register_forward_pre_hook(note)
    try:
        yield batches
    finally:
        handle.remove()


def test_vectors_are_the_notebooks(folder: Path, encoder: SelfSupervisedSpeechEncoder) -> None:
    """A fusion network trained by the authors takes nothing else. Holds for a batch of mixed lengths."""
    vectors = encoder(clips())
    assert vectors.shape == (len(clips()), encoder.dim) == (7, 32)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors, notebook_vectors(folder, clips()), atol=1e-4, rtol=0)


def test_a_clip_does_not_feel_its_batch(encoder: SelfSupervisedSpeechEncoder) -> None:
    """A recording embeds the same whoever else is uploaded: padding reaches neither attention, nor a
    GroupNorm over time, nor the mean."""
    together = encoder(clips())
    alone = torch.cat([encoder([clip]) for clip in clips()])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    others = F.cosine_similarity(together[:, None], together[None], dim=2) - torch.eye(len(together))
    assert others.max() < 0.9999, "the clips must be told apart, or the comparison says nothing"


def test_samples_are_normalised_as_by_the_processor(
    folder: Path, encoder: SelfSupervisedSpeechEncoder
) -> None:
    """Zero mean and unit variance over a clip's own samples, with zeros for padding; peaks of 1 otherwise."""
    from transformers import Wav2Vec2FeatureExtractor

    processor = Wav2Vec2FeatureExtractor.from_pretrained(folder)
    for clip in clips():
        with watched(encoder) as batches:
            encoder([clip])
        theirs = processor(clip / np.abs(clip).max(), sampling_rate=16_000, return_tensors="pt").input_values
        torch.testing.assert_close(batches[0], theirs, atol=1e-5, rtol=0)
    with watched(encoder) as batches:
        encoder(clips())
    assert sum(len(batch) for batch in batches) == len(clips())
    lengths = sorted(len(clip) for clip in clips())
    beyond = sorted(int((row != 0).nonzero().max()) + 1 for batch in batches for row in batch)
    assert beyond == lengths


def test_without_do_normalize_only_the_peak_is_levelled(hubert: Path) -> None:
    """preprocessor_config.json decides; an encoder trained on raw levels must get them."""
    path = hubert / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_normalize": False}))
    encoder = SelfSupervisedSpeechEncoder.load(hubert)
    clip = clips()[0]
    with watched(encoder) as batches:
        quiet, loud = encoder([0.25 * clip]), encoder([8 * clip])
    torch.testing.assert_close(batches[0][0], torch.from_numpy(clip / np.abs(clip).max()))
    torch.testing.assert_close(quiet, loud)


def test_only_clips_of_equal_length_share_a_batch_where_norms_span_time(tmp_path: Path) -> None:
    """wav2vec2-base's GroupNorm would take padding into its statistics; HuBERT-large has none of that."""
    noise = np.random.default_rng(0).normal(size=8_000).astype(np.float32)
    mixed = [noise, noise[:6_000], -noise, noise[:6_000] ** 2, noise[:5_999]]
    for name, expected in (("wav2vec2", [(2, 8_000), (2, 6_000), (1, 5_999)]), ("hubert", [(5, 8_000)])):
        encoder = SelfSupervisedSpeechEncoder.load(SAVE[name](tmp_path / name))
        with watched(encoder) as batches:
            encoder(mixed)
        assert [tuple(batch.shape) for batch in batches] == expected


def test_batches_keep_to_their_budget(hubert: Path) -> None:
    """A 30 s clip must not be multiplied by its neighbours, nor a short one padded to many times itself."""
    encoder = SelfSupervisedSpeechEncoder.load(hubert, batch_s=2.0)
    noise = np.random.default_rng(0).normal(size=48_000).astype(np.float32)
    lengths = [8_000, 48_000, 400, 16_000, 7_000, 12_000, 500, 16_000]
    with watched(encoder) as batches:
        vectors = encoder([noise[:length] for length in lengths])
    shapes = [tuple(batch.shape) for batch in batches]
    assert shapes == [(1, 48_000), (2, 16_000), (2, 12_000), (1, 7_000), (2, 500)]
    alone = torch.cat([encoder([noise[:length]]) for length in lengths])
    torch.testing.assert_close(vectors, alone, atol=1e-4, rtol=0)


def test_nothing_in_gives_nothing_out(encoder: SelfSupervisedSpeechEncoder) -> None:
    """A caller that filtered all its clips away needs no special case."""
    assert encoder([]).shape == (0, encoder.dim)


@pytest.mark.parametrize(
    ("spoilt", "reason"),
    [
        (np.zeros(0, np.float32), "empty"),
        (np.ones(399, np.float32), "399 samples; the encoder needs 400"),
        (np.array([0.1] * 999 + [np.nan], np.float32), "NaN or infinity"),
        (np.array([0.1] * 999 + [-np.inf], np.float32), "NaN or infinity"),
        (np.zeros(16_000, np.float32), "silent"),
        (np.full(16_000, 0.5, np.float32), "silent"),
    ],
)
def test_what_cannot_be_encoded_is_named(
    encoder: SelfSupervisedSpeechEncoder, spoilt: Waveform, reason: str
) -> None:
    """The notebooks stored NaN or a random vector here, which a search then finds; the place is named."""
    with pytest.raises(ValueError, match=f"clip 1 .*{reason}"):
        encoder([clips()[0], spoilt])


def test_the_faintest_sound_is_still_a_sound(encoder: SelfSupervisedSpeechEncoder) -> None:
    """Levelling must not divide by what a float32 cannot hold."""
    faint = (clips()[0] * 1e-40).astype(np.float32)
    assert torch.isfinite(encoder([faint])).all()


def test_old_and_new_names_of_the_positional_kernel_are_the_same_weights(
    folder: Path, encoder: SelfSupervisedSpeechEncoder, tmp_path: Path
) -> None:
    """torch renamed weight_g and weight_v; loaders have left them random and warned only. Here the published
    names and today's give identical vectors, whatever random numbers stood there before."""
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for path in folder.iterdir():
        (renamed / path.name).write_bytes(path.read_bytes())
    stored = load_file(folder / "model.safetensors")
    assert sum(name.endswith(("conv.weight_g", "conv.weight_v")) for name in stored) == 2
    rewrite(renamed / "model.safetensors", new_names)
    assert not any(
        name.endswith(("weight_g", "weight_v")) for name in load_file(renamed / "model.safetensors")
    )
    for seed in (1, 2):
        for spelling in (folder, renamed):
            with seeded(seed):
                loaded = SelfSupervisedSpeechEncoder.load(spelling)
            for name, weight in encoder.state_dict().items():
                assert torch.equal(loaded.state_dict()[name], weight), name
            assert torch.equal(loaded(clips()), encoder(clips()))


def test_the_base_network_alone_loads_too(
    folder: Path, encoder: SelfSupervisedSpeechEncoder, tmp_path: Path
) -> None:
    """A checkpoint that was never fine-tuned has neither the head nor the prefix of the names."""
    prefix = f"{folder.name}."
    base = tmp_path / "base"
    base.mkdir()
    for path in folder.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    rewrite(
        base / "model.safetensors",
        lambda state: {
            name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)
        },
    )
    vectors = SelfSupervisedSpeechEncoder.load(base)(clips())
    assert torch.equal(vectors, encoder(clips()))


def test_every_weight_of_the_base_network_is_needed(hubert: Path) -> None:
    """Transformers fills a gap with random numbers and logs a line: such an encoder would look like one."""
    whole = load_file(hubert / "model.safetensors")
    vectors = SelfSupervisedSpeechEncoder.load(hubert)(clips())
    for name in ("hubert.masked_spec_embed", "lm_head.weight"):
        rewrite(
            hubert / "model.safetensors",
            lambda state, name=name: {k: v for k, v in whole.items() if k != name},
        )
        assert torch.equal(SelfSupervisedSpeechEncoder.load(hubert)(clips()), vectors), name
    for name in (
        "hubert.encoder.pos_conv_embed.conv.weight_g",
        "hubert.encoder.layers.1.final_layer_norm.bias",
        "hubert.feature_extractor.conv_layers.0.conv.weight",
    ):
        rewrite(
            hubert / "model.safetensors",
            lambda state, name=name: {k: v for k, v in whole.items() if k != name},
        )
        with pytest.raises(ModelUnavailable, match="lacks"):
            SelfSupervisedSpeechEncoder.load(hubert)


def test_a_weight_without_a_place_is_refused(hubert: Path) -> None:
    """More weights than the configuration has layers: it is another model, or half of one."""
    extra = torch.zeros(32)
    rewrite(
        hubert / "model.safetensors",
        lambda state: state | {"hubert.encoder.layers.2.final_layer_norm.bias": extra},
    )
    with pytest.raises(ModelUnavailable, match=r"no place for .*layers\.2"):
        SelfSupervisedSpeechEncoder.load(hubert)


def test_weights_of_another_shape_are_refused(hubert: Path) -> None:
    """The configuration of one size with the weights of another."""
    path = hubert / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 128}))
    with pytest.raises(ModelUnavailable):
        SelfSupervisedSpeechEncoder.load(hubert)


def test_the_file_may_be_replaced_while_the_encoder_runs(hubert: Path) -> None:
    """Weights that stay mapped change with the file, and end the process when it is cut short."""
    encoder = SelfSupervisedSpeechEncoder.load(hubert)
    assert encoder(clips()).isfinite().all()
    assert str(hubert) not in Path("/proc/self/maps").read_text()


class _Trap:
    """Unpickling this leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


def test_a_pickle_is_never_opened(hubert: Path, tmp_path: Path) -> None:
    """Unpickling runs what the file says. Also where it is the only file there is."""
    with (hubert / "pytorch_model.bin").open("wb") as file:
        pickle.dump(_Trap(tmp_path / "trace"), file)
    SelfSupervisedSpeechEncoder.load(hubert)
    (hubert / "model.safetensors").unlink()
    with pytest.raises(ModelUnavailable, match="safetensors"):
        SelfSupervisedSpeechEncoder.load(hubert)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_damaged_files_are_named(hubert: Path, name: str) -> None:
    """Half a download must stop the start, with the folder in the message."""
    content = (hubert / name).read_bytes()
    (hubert / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelUnavailable, match="hubert"):
        SelfSupervisedSpeechEncoder.load(hubert)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("config.json", {"model_type": "whisper"}, "type 'whisper'"),
        ("config.json", {"add_adapter": True}, "adapter"),
        ("preprocessor_config.json", {"sampling_rate": 8_000}, "8000 Hz"),
    ],
)
def test_other_models_are_refused(hubert: Path, name: str, change: dict[str, Any], reason: str) -> None:
    """What the encoder would misread must not load."""
    path = hubert / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelUnavailable, match=reason):
        SelfSupervisedSpeechEncoder.load(hubert)


def test_an_overflow_is_an_error_and_never_a_vector(hubert: Path) -> None:
    """float16 ends at 65,504; a vector of NaN would be stored, and found by nothing or everything."""
    name = "hubert.encoder.layers.0.feed_forward.output_dense.weight"
    rewrite(hubert / "model.safetensors", lambda state: state | {name: state[name] * 1e5})
    assert torch.isfinite(SelfSupervisedSpeechEncoder.load(hubert)(clips())).all()
    half = SelfSupervisedSpeechEncoder.load(hubert, torch.float16)
    with pytest.raises(FloatingPointError, match="wider dtype"):
        half(clips())


def test_bfloat16_says_the_same(folder: Path, encoder: SelfSupervisedSpeechEncoder) -> None:
    """Half the memory at the same answers; on CUDA also half the time."""
    vectors = SelfSupervisedSpeechEncoder.load(folder, torch.bfloat16)(clips())
    assert vectors.dtype == torch.float32
    assert F.cosine_similarity(vectors, encoder(clips())).min() >= 0.999


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cuda_says_the_same(folder: Path, encoder: SelfSupervisedSpeechEncoder, dtype: torch.dtype) -> None:
    """Vectors made on one machine are compared with those made on another."""
    vectors = SelfSupervisedSpeechEncoder.load(folder, dtype).to("cuda")(clips())
    assert vectors.device.type == "cuda"
    assert F.cosine_similarity(vectors.cpu(), encoder(clips())).min() >= 0.999
