"""Converting checkpoints: every tensor of an honest one, and nothing at all of a malicious one."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from clasp_core import checkpoints
from clasp_core.checkpoints import convert
from clasp_core.errors import InvalidCheckpoint, UnsafeCheckpoint
from tests.service import environment

MAKER = Path(__file__).with_name("checkpoint_files.py")

IMPORTS = {
    "system": "posix.system",
    "system-stream": "posix.system",
    "eval": "builtins.eval",
    "hub": "torch.hub.load",
    "subclass": "__main__.Subclass",
    "elsewhere": "elsewhere.HubertLabseConcat",
    "setstate": "__main__.WithState",
    "other-layer": "torch.nn.modules.conv.Conv1d",
    "protocol4": "__main__.HubertLabseConcat",
    "torchscript": "TorchScript",
    "persistent-module": "posix.system",
    "stack-global": "posix.system",
    "long-name": "x.yyy",
}
DAMAGED = {
    "wrapped": "'epoch' is of type int",
    "nothing": "no tensors",
    "nan": "'x'",
    "expanded": "more tensors",
    "many-names": "more tensors",
    "longer-storage": "",
    "huge": "",
    "persistent-id": "",
    "reduced-layer": "",
    "compressed": "compressed",
    "cycle": "deeply",
    "recursion": "",
    "tar": "not a torch checkpoint",
    "bare-pickle": "not a torch checkpoint",
    "text": "not a torch checkpoint",
    "empty": "not a torch checkpoint",
    "truncated": "",
    "truncated-stream": "",
    "longer-stream": "does not hold the tensors",
}


def make(what: str, folder: Path) -> None:
    subprocess.run(
        [sys.executable, "-W", "ignore", MAKER, what, folder],
        check=True,
        env=environment() | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints as people publish them, each with `.expected`, what must come of it."""
    folder = tmp_path_factory.mktemp("honest")
    make("honest", folder)
    return folder


@pytest.fixture(scope="module")
def malicious(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints that must be refused, and `honest`, from which those made by hand differ in one thing."""
    folder = tmp_path_factory.mktemp("malicious")
    make("malicious", folder)
    assert not (folder / "trace").exists()
    return folder


def converted_as_expected(source: Path, target: Path) -> dict[str, torch.Tensor]:
    conversion = convert(source, target)
    expected = load_file(source.with_name(source.name + ".expected"))
    tensors = load_file(target)
    assert conversion.tensors == len(tensors)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    with safe_open(target, framework="pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "made_by": "clasp-checkpoint/1",
            "class": conversion.holds,
            "source_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        }
    return tensors


@pytest.mark.parametrize(
    ("name", "holds", "entries", "parameters"),
    [
        ("concat.pt", "HubertLabseConcat", 43, 6_344_608),
        ("gating.pt", "HubertLabseGating", 46, 9_237_888),
    ],
)
def test_a_published_module_is_converted_whole(
    honest: Path, tmp_path: Path, name: str, holds: str, entries: int, parameters: int
) -> None:
    """The authors' own files are of this form and no other; one lost tensor is another model."""
    tensors = converted_as_expected(honest / name, tmp_path / "out.safetensors")
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert len(tensors) == entries
    assert sum(t.numel() for n, t in tensors.items() if not n.endswith(statistics)) == parameters
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        assert file.metadata()["class"] == holds


@pytest.mark.parametrize("name", ["small.pt", "odd-attributes.pt"])
def test_only_what_a_state_dict_names_is_taken_of_a_module(honest: Path, tmp_path: Path, name: str) -> None:
    """Pickled modules lack attributes or have odd ones, by the torch and the notebook that made them."""
    converted_as_expected(honest / name, tmp_path / "out.safetensors")


@pytest.mark.parametrize("name", ["state_dict.bin", "stream.bin"])
def test_a_state_dict_is_converted_whole(honest: Path, tmp_path: Path, name: str) -> None:
    """Tied, transposed, empty and scalar tensors of every dtype, in all that torch.save ever wrote."""
    converted_as_expected(honest / name, tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        assert file.metadata()["class"] == "state_dict"


def test_the_same_checkpoint_gives_the_same_bytes(honest: Path, tmp_path: Path) -> None:
    """Weights are pinned by their sha256; a conversion that differs each time could not be."""
    source = tmp_path / "small.pt"
    shutil.copy(honest / "small.pt", source)
    first, again = convert(source), convert(source, tmp_path / "again")
    assert first.path == tmp_path / "small.safetensors"
    assert first.path.read_bytes() == again.path.read_bytes()
    assert first.path.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def refused(source: Path, error: type[InvalidCheckpoint], words: str) -> None:
    """That a file is refused by this error and no other, in one line, and nothing is left or done."""
    target = source.parent / "out" / "made.safetensors"
    target.parent.mkdir(exist_ok=True)
    with pytest.raises(InvalidCheckpoint) as refusal:
        convert(source, target)
    assert type(refusal.value) is error, refusal.value.detail
    assert str(source) in refusal.value.detail
    assert words in refusal.value.detail
    assert len(refusal.value.detail) < len(str(source)) + 400
    assert refusal.value.detail.isprintable()
    assert list(target.parent.iterdir()) == []
    assert not (source.parent / "trace").exists()


def test_what_the_refused_files_are_made_from_is_accepted(malicious: Path, tmp_path: Path) -> None:
    """Else the refusals below could be for another reason than the one meant."""
    assert convert(malicious / "honest", tmp_path / "out").tensors == 1


@pytest.mark.parametrize("name", IMPORTS)
def test_a_foreign_import_is_refused_by_name_and_not_run(malicious: Path, name: str) -> None:
    """A pickle runs what it imports: whoever fetches weights must not thereby start a stranger's program."""
    refused(malicious / name, UnsafeCheckpoint, IMPORTS[name])


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_and_foreign_forms_are_refused(malicious: Path, name: str) -> None:
    """A half-read checkpoint would search by noise, without a word."""
    refused(malicious / name, InvalidCheckpoint, DAMAGED[name])


def test_a_flipped_byte_is_damage(honest: Path, tmp_path: Path) -> None:
    """Torch itself does not compare checksums, and a flipped bit in a weight is seen by nobody."""
    content = bytearray((honest / "small.pt").read_bytes())
    weight = load_file(honest / "small.pt.expected")["audio_seq.0.weight"].numpy().tobytes()
    content[content.index(weight) + 5] ^= 1
    (tmp_path / "flipped").write_bytes(content)
    refused(tmp_path / "flipped", InvalidCheckpoint, "checksum")


def test_a_checkpoint_is_not_converted_onto_itself(honest: Path, tmp_path: Path) -> None:
    """The original would be gone, and with it what its hash proves."""
    source = tmp_path / "model.safetensors"
    shutil.copy(honest / "small.pt", source)
    with pytest.raises(InvalidCheckpoint, match="onto itself"):
        convert(source)
    assert source.read_bytes() == (honest / "small.pt").read_bytes()


EVIL = """
import os, socket, subprocess, sys, time
from clasp_core import checkpoints
def evil(file, sink, size, sha256):
{body}
checkpoints._convert, checkpoints._warm_up = evil, lambda: None
checkpoints._main()
"""


def taken_over(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Have the reading process do this in place of reading, as if a file had taken it over."""
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    monkeypatch.setattr(checkpoints, "_CHILD", ("-c", EVIL.format(body=lines)))


def test_a_reader_that_is_taken_over_can_touch_nothing(
    honest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should a file find a hole in torch, it must find neither network nor files nor secrets behind it."""
    monkeypatch.setenv("CLASP_SECRET", "hunter2")
    source = tmp_path / "source.pt"
    shutil.copy(honest / "small.pt", source)
    taken_over(
        monkeypatch,
        f"""
tries = dict(
    read=lambda: open("/etc/hostname"),
    create=lambda: open({str(tmp_path / "new")!r}, "w"),
    alter=lambda: os.write(3, b"spoilt"),
    connect=lambda: socket.socket(),
    list=lambda: os.listdir("/"),
    pipe=os.pipe,
    fork=lambda: os.fork() or os._exit(0),
    run=lambda: os.execv("/bin/true", ["true"]) if os.fork() == 0 else None,
    secret=lambda: os.environ["CLASP_SECRET"],
    memory=lambda: bytearray(2 << 30),
)
done = []
for name, attempt in tries.items():
    try:
        attempt()
        done.append(name)
    except (OSError, LookupError, MemoryError):
        pass
raise checkpoints._Refused("did: " + " ".join(done))
""",
    )
    with pytest.raises(InvalidCheckpoint) as answer:
        convert(source)
    assert answer.value.detail == f"{source} did: "
    assert source.read_bytes() == (honest / "small.pt").read_bytes()


@pytest.mark.parametrize(
    "body",
    [
        "os._exit(0)",
        "sink.write((2).to_bytes(8, 'little') + b'{}')",
        "pass",
        "os.write(5, b'[' * 100_000); os._exit(0)",
        'os.write(5, b\'{"refused": "not_ready", "detail": 1}\'); os._exit(0)',
    ],
)
def test_a_reader_that_is_taken_over_is_not_believed(
    honest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    """What stands in the models folder is loaded without question later."""
    taken_over(monkeypatch, body)
    with pytest.raises(InvalidCheckpoint):
        convert(honest / "small.pt", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_hangs_is_ended(honest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fetch in a script must end some day."""
    taken_over(monkeypatch, "time.sleep(600)")
    with pytest.raises(InvalidCheckpoint, match="too long"):
        convert(honest / "small.pt", tmp_path / "out", deadline_s=1)
    assert list(tmp_path.iterdir()) == []
