"""EfficientNet-B7 through timm: torchvision's weights give its logits, whatever torchvision is there."""

import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from clasp_core.encoders.efficientnet_b7 import BATCH_PICTURES, EfficientNetB7
from clasp_core.encoders.vision_imports import import_timm, require_transformers
from clasp_core.errors import ModelUnavailable
from tests.paper_checkpoints import rewrite, save_efficientnet, torchvision_efficientnet

ROOT = Path(__file__).parents[2]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def noise(count: int, height: int = 120, width: int = 161) -> Tensor:
    """Pictures (count, 3, height, width) of random bytes."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def b0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_efficientnet(tmp_path_factory.mktemp("pictures") / "b0.safetensors")


@pytest.fixture
def spoilt(b0: Path, tmp_path: Path) -> Path:
    """A file that a test may change."""
    path = tmp_path / "b0.safetensors"
    path.write_bytes(b0.read_bytes())
    return path


def compare(variant: str, path: Path, pictures: Tensor) -> EfficientNetB7:
    """Ours against torchvision's own network, on logits whose deviation is about 1."""
    theirs = torchvision_efficientnet(variant, 3, pictures.float())
    save_file(theirs.state_dict(), path)
    ours = EfficientNetB7.load(path)
    with torch.inference_mode():
        expected = theirs(pictures.float())
    assert 0.3 < expected.std() < 3, "too narrow or too wide for the tolerance to mean anything"
    torch.testing.assert_close(ours(pictures), expected, atol=1e-4, rtol=0)
    return ours


def test_b7_gives_torchvisions_logits(tmp_path: Path) -> None:
    """The paper's network at the size of its pictures. 66,347,960 parameters in 1200 entries."""
    ours = compare("b7", tmp_path / "b7.safetensors", noise(1, 450, 610))
    assert ours.variant == "b7"
    assert ours.dim == 1000
    assert len(load_file(tmp_path / "b7.safetensors")) == len(ours.state_dict()) == 1200
    assert sum(parameter.numel() for parameter in ours.parameters()) == 66_347_960


@pytest.mark.parametrize("variant", ["b0", "b1", "b2", "b3", "b5"])
def test_smaller_sizes_are_recognised(tmp_path: Path, variant: str) -> None:
    """Same widths and other depths, same depths and other widths, and both values of BatchNorm's eps."""
    assert compare(variant, tmp_path / "x.safetensors", noise(2)).variant == variant


def test_a_picture_does_not_feel_its_batch(b0: Path) -> None:
    """More pictures than go through at once, one by one and together; bytes and floats alike."""
    encoder = EfficientNetB7.load(b0)
    pictures = noise(BATCH_PICTURES + 2, 64, 64)
    together = encoder(pictures)
    assert together.shape == (BATCH_PICTURES + 2, 1000)
    alone = torch.cat([encoder(picture[None].float()) for picture in pictures])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert encoder(pictures[:0]).shape == (0, 1000)


def test_pictures_are_taken_as_they_are(b0: Path) -> None:
    """The authors gave BGR, 0..255: swapping channels or scaling must be nobody's silent help."""
    encoder = EfficientNetB7.load(b0)
    pictures = noise(1) // torch.tensor([1, 2, 8]).view(3, 1, 1)
    logits = encoder(pictures)
    for other in (pictures.flip(1), pictures / 255, F.interpolate(pictures.float(), size=(224, 224))):
        assert not torch.allclose(encoder(other), logits, atol=0.1)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 64, 64, 3), (1, 1, 64, 64)])
def test_other_shapes_are_refused(b0: Path, shape: tuple[int, ...]) -> None:
    """A picture with its channels last would run, if it were three rows high."""
    with pytest.raises(ValueError, match="height, width"):
        EfficientNetB7.load(b0)(torch.zeros(shape))


def test_a_picture_of_nan_is_an_error(b0: Path) -> None:
    """Never a vector of NaN."""
    with pytest.raises(FloatingPointError):
        EfficientNetB7.load(b0)(torch.full((1, 3, 64, 64), torch.nan))


CHANGES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "without a count of batches": lambda state: {
        name: tensor for name, tensor in state.items() if name != "features.3.0.block.0.1.num_batches_tracked"
    },
    "without the last bias": lambda state: {k: v for k, v in state.items() if k != "classifier.1.bias"},
    "without a squeeze": lambda state: {
        k: v for k, v in state.items() if k != "features.2.0.block.2.fc1.bias"
    },
    "with one more": lambda state: state | {"features.9.0.weight": torch.zeros(3)},
    "with one more in a block": lambda state: state | {"features.3.0.block.4.0.weight": torch.zeros(3)},
    "with a weight under both names": lambda state: state | {"conv_stem.weight": torch.ones(32, 3, 3, 3)},
    "with 10 classes": lambda state: (
        state
        | {"classifier.1.weight": state["classifier.1.weight"][:10], "classifier.1.bias": torch.zeros(10)}
    ),
    "with a block less": lambda state: {k: v for k, v in state.items() if not k.startswith("features.6.3.")},
    "of another network": lambda state: {"conv1.weight": torch.zeros(3)},
    "empty": lambda state: {},
}


@pytest.mark.parametrize("what", CHANGES)
def test_every_entry_has_its_place(spoilt: Path, what: str) -> None:
    """A name map that forgets a layer leaves it random; one that is too kind takes another network."""
    rewrite(spoilt, CHANGES[what])
    with pytest.raises(ModelUnavailable, match=r"b0\.safetensors"):
        EfficientNetB7.load(spoilt)


def test_only_safetensors_are_read(spoilt: Path) -> None:
    """The published .pth is a pickle, and half a file is none."""
    content = spoilt.read_bytes()
    torch.save({"features.0.0.weight": torch.zeros(3)}, spoilt)
    with pytest.raises(ModelUnavailable, match="safetensors"):
        EfficientNetB7.load(spoilt)
    spoilt.write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelUnavailable, match="safetensors"):
        EfficientNetB7.load(spoilt)
    with pytest.raises(ModelUnavailable, match="nowhere"):
        EfficientNetB7.load(spoilt.with_name("nowhere.safetensors"))


def test_the_file_may_be_replaced_while_the_encoder_runs(spoilt: Path) -> None:
    """Weights that stay mapped change with the file, and end the process when it is cut short."""
    encoder = EfficientNetB7.load(spoilt)
    assert encoder(noise(1)).isfinite().all()
    assert str(spoilt) not in Path("/proc/self/maps").read_text()


def test_half_precision_and_layout(b0: Path, spoilt: Path) -> None:
    """What makes it fast on CUDA changes nothing to speak of; a file of half precision computes in full."""
    pictures = noise(2)
    logits = EfficientNetB7.load(b0)(pictures)
    channels_last = EfficientNetB7.load(b0, channels_last=True)(pictures)
    torch.testing.assert_close(channels_last, logits, atol=1e-4, rtol=0)
    half = EfficientNetB7.load(b0, torch.bfloat16, channels_last=True)(pictures)
    assert half.dtype == torch.float32
    assert F.cosine_similarity(half, logits).min() >= 0.999
    rewrite(spoilt, lambda state: {k: v.half() if v.is_floating_point() else v for k, v in state.items()})
    stored_in_half = EfficientNetB7.load(spoilt)
    assert {parameter.dtype for parameter in stored_in_half.parameters()} == {torch.float32}
    assert F.cosine_similarity(stored_in_half(pictures), logits).min() >= 0.999


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cuda_says_the_same(b0: Path, dtype: torch.dtype) -> None:
    """Vectors made on one machine are compared with those made on another."""
    encoder = EfficientNetB7.load(b0, dtype, channels_last=True).to("cuda")
    logits = encoder(noise(2))
    assert logits.device.type == "cuda"
    assert F.cosine_similarity(logits.cpu(), EfficientNetB7.load(b0)(noise(2))).min() >= 0.999


USE = """
import sys
from clasp_core.encoders import vision_imports
timm = vision_imports.import_timm()
vision_imports.require_transformers()
from transformers import HubertModel
import torch
assert timm.create_model("efficientnet_b0").eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
assert [finder for finder in sys.meta_path if type(finder).__module__ == vision_imports.__name__] == []
"""
DECLARED = """
import torch
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def run(script: str, *, without: str | None = None, tmp_path: Path) -> None:
    """The script in a process of its own, which sees the installed packages but for one."""
    installed = Path(sysconfig.get_paths()["purelib"])
    packages = tmp_path / "packages"
    packages.mkdir()
    for path in installed.iterdir():
        if without is None or not path.name.lower().startswith(without):
            (packages / path.name).symlink_to(path)
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-S", "-c", script],
        env={"PYTHONPATH": f"{ROOT}:{packages}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr


def test_imports_with_the_torchvision_that_is_installed(tmp_path: Path) -> None:
    """Whatever that is built for: it is whole afterwards, and mended only if it was broken."""
    before = """
import sys
try:
    import torchvision
    works = True
except RuntimeError:
    works = False
"""
    after = """
import torchvision, torchvision.models
assert torchvision.models.efficientnet_b0
assert bool(vision_imports._declared) is not works
"""
    run(before + USE + after, tmp_path=tmp_path)


def test_imports_with_a_torchvision_that_works(tmp_path: Path) -> None:
    """Nothing is declared a second time where torchvision's library did it, as on any machine with CUDA."""
    after = """
assert sys.modules["torchvision"] is torchvision
assert vision_imports._declared == []
"""
    run(DECLARED + "import torchvision\n" + USE + after, tmp_path=tmp_path)


def test_imports_without_torchvision(tmp_path: Path) -> None:
    """timm alone would fail. What stood in is gone: others must find torchvision missing, as it is."""
    after = """
import importlib.util
assert [name for name in sys.modules if name.startswith("torchvision")] == []
assert importlib.util.find_spec("torchvision") is None
"""
    run(USE + after, without="torchvision", tmp_path=tmp_path)


@pytest.mark.parametrize(
    ("package", "require"), [("timm", import_timm), ("transformers", require_transformers)]
)
def test_missing_packages_name_the_extra(
    package: str, require: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first thing a user without the extra sees."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModelUnavailable, match=rf"{package}.*pip install 'clasp-search\[paper\]'"):
        require()
