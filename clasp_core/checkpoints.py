"""Torch checkpoints from strangers, turned into safetensors without running anything they contain.

A torch checkpoint is a pickle, and a pickle is a program. Two kinds are converted: state dicts (names to
tensors, as Hugging Face and torchvision publish them), and the whole modules that the CLASP authors pickled
out of a notebook, whose classes are named `__main__.HubertLabseConcat` and `__main__.HubertLabseGating`.
The service itself reads safetensors only.

Four walls, each enough for an honest mistake, all four for a malicious file:

1. every name the pickle imports must be in a short list, or it is refused before anything is unpickled;
2. `torch.load(weights_only=True)` unpickles, and the classes of the list are stubs of ours without methods;
3. that happens in a process of its own without network, rights, further descriptors or much memory;
4. the parent believes of the result only what a safetensors header can say, and that it comes from this file.
"""

import codecs
import contextlib
import io
import json
import os
import pickletools
import secrets
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from clasp_core import confinement
from clasp_core.durability import place
from clasp_core.encoders.weights import sha256_of
from clasp_core.errors import InvalidCheckpoint, UnsafeCheckpoint
from clasp_core.types import Seconds

if TYPE_CHECKING:
    import torch

MADE_BY = "clasp-checkpoint/1"
STATE_DICT = "state_dict"

_STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_OF_TENSORS = frozenset(
    {
        "collections.OrderedDict",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        *(f"torch.{kind}Storage" for kind in _STORAGES),
    }
)
_MODELS = frozenset({"__main__.HubertLabseConcat", "__main__.HubertLabseGating"})
# What the model page lists as imports of the published files (huggingface.co/llm-lab/CLASP/tree/main). Its
# excerpt that was seen breaks off before the gates' Sigmoid, which the notebook's class has.
_LAYERS = frozenset(
    f"torch.nn.modules.{name}"
    for name in (
        "linear.Linear",
        "batchnorm.BatchNorm1d",
        "activation.ReLU",
        "activation.LeakyReLU",
        "activation.Sigmoid",
        "activation.Tanh",
        "dropout.Dropout",
        "container.Sequential",
    )
)
_OF_MODULES = _OF_TENSORS | _MODELS | _LAYERS | {"builtins.set"}  # the set names non-persistent buffers

_ZIP = b"PK\x03\x04"
_STREAM = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # what torch.save began files with until torch 1.6
_SAFETENSORS_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_CHILD = ("-m", __name__)
_DEEPEST = 8
_AT_ONCE = 1 << 22
_SLACK_BYTES = 512 << 20
_LARGEST_NOTE = 64 * 1024


@dataclass(frozen=True, slots=True)
class Conversion:
    """What `convert` wrote."""

    path: Path
    holds: str
    """`HubertLabseConcat`, `HubertLabseGating` or `state_dict`."""
    tensors: int
    source_sha256: str


def readable(weights: Path) -> Path:
    """Where a checkpoint is read from: its safetensors are beside it, under the hub's name for them."""
    if weights.name == "pytorch_model.bin":
        return weights.with_name("model.safetensors")
    return weights.with_suffix(".safetensors")


def convert(source: Path, target: Path | None = None, *, deadline_s: Seconds | None = None) -> Conversion:
    """Write the tensors of a torch checkpoint to `target`, by default where `readable` says.

    Names, shapes and dtypes stay; tensors that share memory are written apart. The same source gives the same
    bytes. Target's metadata: `format`, `made_by`, `class` (see `Conversion.holds`), `source_sha256`. It is
    complete or absent; where one was, it is replaced.

    deadline_s: by default two minutes, and a second for each 10 MB.

    Raises UnsafeCheckpoint where the file imports anything but tensors and the published models' layers,
    InvalidCheckpoint where it is damaged, of another kind, or holds NaN or infinity.
    """
    target = readable(source) if target is None else target
    if target.absolute() == source.absolute():
        raise InvalidCheckpoint(f"{source} would be converted onto itself; name another target.")
    with source.open("rb") as file:
        if not file.read(len(_STREAM)).startswith((_ZIP, _STREAM)):
            raise InvalidCheckpoint(
                f"{source} is not a torch checkpoint: neither a zip archive nor a stream of torch.save."
            )
    sha256 = sha256_of(source)
    size = source.stat().st_size
    with temporary_for(target) as temporary:
        with source.open("rb") as file, temporary.open("xb") as sink:
            note = _confined(file, sink, size, sha256, 120 + size / 1e7 if deadline_s is None else deadline_s)
        if (refusal := _REFUSALS.get(str(note.get("refused")))) is not None:
            raise refusal(f"{source} {note.get('detail')}")
        conversion = _checked(temporary, target, sha256)
        place(temporary, target)
    return conversion


@contextlib.contextmanager
def temporary_for(target: Path) -> Iterator[Path]:
    """A name beside `target` that nobody else uses; what has not been placed when it closes is removed."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


_REFUSALS = {refusal.code: refusal for refusal in (InvalidCheckpoint, UnsafeCheckpoint)}


def _confined(file: BinaryIO, sink: BinaryIO, size: int, sha256: str, deadline_s: Seconds) -> dict[str, Any]:
    """The child's note: empty where it has written `sink`, else `refused`, a code, and `detail`."""
    with tempfile.TemporaryFile() as answer:
        arguments = [file.fileno(), sink.fileno(), answer.fileno()]
        child = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-P", *_CHILD, *map(str, [*arguments, size, sha256, int(deadline_s)])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # libraries complain there, in words the file chose
            env=confinement.bare_environment(),
            pass_fds=arguments,
        )
        try:
            child.wait(deadline_s)
        except subprocess.TimeoutExpired:
            return _broken("took too long to read; nothing was written.")
        finally:
            child.kill()
            child.wait()
        answer.seek(0)
        try:
            note = json.loads(answer.read(_LARGEST_NOTE))
        except (ValueError, RecursionError):
            note = None
        if not isinstance(note, dict):
            return _broken("broke the reader or its limits; it is damaged, or made to do harm.")
        return note


def _broken(detail: str) -> dict[str, Any]:
    return {"refused": InvalidCheckpoint.code, "detail": detail}


def _checked(written: Path, target: Path, sha256: str) -> Conversion:
    """What is in a file that a process may have written which had been taken over."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(written, framework="numpy") as tensors:
            metadata, names = dict(tensors.metadata() or {}), list(tensors.keys())
    except SafetensorError as error:
        raise InvalidCheckpoint(f"What was made of the checkpoint cannot be read: {error}.") from error
    holds = metadata.get("class", "")
    if metadata != _metadata(holds, sha256) or not names:
        raise InvalidCheckpoint("What was made of the checkpoint is not what was asked for.")
    return Conversion(target, holds, len(names), sha256)


def _metadata(holds: str, sha256: str) -> dict[str, str]:
    # "pt" is what transformers asks of a file before it reads its tensors
    return {"format": "pt", "made_by": MADE_BY, "class": holds, "source_sha256": sha256}


# --- in the child


class _Refused(Exception):
    def __init__(self, detail: str, code: str = InvalidCheckpoint.code) -> None:
        super().__init__(detail)
        self.note = {"refused": code, "detail": detail}


class _Inert:
    """Stands in for a class that a pickle names: keeps the state it is given, and can do nothing with it."""

    state: dict[str, Any]

    def __init__(self) -> None:
        """Refuses the arguments of a reduce call."""

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise TypeError
        self.state = state


_STUBS = {name: type(name.rpartition(".")[2], (_Inert,), {}) for name in sorted(_MODELS | _LAYERS)}


def _convert(file: BinaryIO, sink: BinaryIO, size: int, sha256: str) -> None:
    """Read a checkpoint of `size` bytes, and write safetensors. Raises _Refused; anything else is damage."""
    holds, tensors = _load(file, size)
    _require_plain(tensors, size)
    _write(tensors, _metadata(holds, sha256), sink)


def _load(file: BinaryIO, size: int) -> tuple[str, dict[str, "torch.Tensor"]]:
    import torch

    zipped = file.read(len(_ZIP)) == _ZIP
    file.seek(0)
    if zipped:
        _scan(io.BytesIO(_zipped_pickle(file)), _OF_MODULES)
        end = None
    else:
        for _ in range(5):  # a magic number, a version, the system's traits, the object, the storages' keys
            _scan(file, _OF_TENSORS)
        end = file.tell()
    file.seek(0)
    with torch.serialization.safe_globals([(stub, name) for name, stub in _STUBS.items()]):
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    if isinstance(loaded, _Inert):
        name = type(loaded).__name__
        if f"__main__.{name}" not in _MODELS:
            raise _Refused(f"holds a bare {name}, not one of the published models.")
        return name, dict(_named_tensors(loaded))
    if not isinstance(loaded, dict):
        raise _Refused(f"holds a {type(loaded).__name__}, neither a state dict nor a published model.")
    if end is not None:
        _require_complete(loaded, size - end)
    return STATE_DICT, loaded


def _zipped_pickle(file: BinaryIO) -> bytes:
    """The archive's pickle, as torch will read it. Raises _Refused for what torch.save does not write."""
    import torch

    with zipfile.ZipFile(file) as archive:
        names = {Path(info.filename).name for info in archive.infolist()}
        if "constants.pkl" in names:
            raise _Refused(
                "is a TorchScript archive, which is code; only tensors are converted.", UnsafeCheckpoint.code
            )
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise _Refused("is a compressed archive; torch.save writes none.")
        # torch itself does not compare the checksums.
        if (damaged := archive.testzip()) is not None:
            raise _Refused(f"is damaged: {damaged[:100]!r} does not have its checksum.")
    file.seek(0)
    pickled: bytes = torch._C.PyTorchFileReader(file).get_record("data.pkl")
    return pickled


def _scan(file: BinaryIO, allowed: frozenset[str]) -> None:
    """Read over one pickle without building anything. Raises _Refused for an import that is not allowed."""
    texts: list[str] = []
    for opcode, argument, _ in pickletools.genops(file):
        if isinstance(argument, str):
            texts.append(argument)
        if opcode.name in ("GLOBAL", "INST"):
            name = _todays_name(*str(argument).split(" ", 1))
        elif opcode.name == "STACK_GLOBAL":  # of protocol 4; torch.save writes protocol 2
            name = ".".join(texts[-2:])
        elif opcode.name in ("EXT1", "EXT2", "EXT4"):
            name = f"extension {argument}"
        else:
            continue
        if name not in allowed or opcode.name != "GLOBAL":
            raise _Refused(
                f"imports {name[:200]!r}, which is neither a tensor nor a layer of a published model;"
                " a pickle can run what it imports. Nothing of it was run.",
                UnsafeCheckpoint.code,
            )


def _todays_name(module: str, name: str) -> str:
    """The name under which Python 3 finds what protocol 2 names as Python 2 did; so does torch."""
    from torch._utils import IMPORT_MAPPING, NAME_MAPPING

    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


def _named_tensors(module: _Inert, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, "torch.Tensor"]]:
    """Parameters and buffers as a state dict names them. Other attributes may be missing or odd."""
    if depth > _DEEPEST:
        raise _Refused("nests its layers too deeply.")
    transient = module.state.get("_non_persistent_buffers_set", ())
    for kind in ("_parameters", "_buffers"):
        for name, tensor in module.state.get(kind, {}).items():
            if tensor is not None and name not in transient:  # None: a layer without bias
                yield f"{prefix}{name}", tensor
    for name, child in module.state.get("_modules", {}).items():
        if not isinstance(child, _Inert):
            raise _Refused(f"has a {type(child).__name__} where a layer belongs.")
        yield from _named_tensors(child, f"{prefix}{name}.", depth + 1)


def _require_plain(tensors: Mapping[str, "torch.Tensor"], size: int) -> None:
    """Raises _Refused unless these are named, dense tensors no larger than the file can hold."""
    import torch

    if not tensors:
        raise _Refused("holds no tensors.")
    written = 0
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == "__metadata__":
            raise _Refused(f"has an entry without a proper name, {str(name)[:100]!r}.")
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise _Refused(
                f"is no state dict: {name[:100]!r} is of type {type(tensor).__name__}."
                " If it holds a state dict among other things, save that alone."
            )
        written += tensor.numel() * tensor.element_size()
    # A tensor may have two names, or one element many places; without end it is made to fill the disk.
    if written > 4 * size:
        raise _Refused("claims more tensors than a file of its size can hold.")


def _require_complete(tensors: Mapping[Any, Any], size: int) -> None:
    """That the `size` bytes after a stream's pickles are these tensors' storages, all of them, no more."""
    storages = {
        storage._cdata: storage.nbytes()
        for storage in (tensor.untyped_storage() for tensor in tensors.values() if hasattr(tensor, "numel"))
    }
    if sum(8 + nbytes for nbytes in storages.values()) != size:
        raise _Refused("is damaged: it does not hold the tensors it names, or holds others besides.")


def _write(tensors: Mapping[str, "torch.Tensor"], metadata: Mapping[str, str], sink: BinaryIO) -> None:
    """Write safetensors piece by piece.

    The library's own writer wants all bytes in memory at once, and orders metadata differently each time.
    """
    import torch

    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # aligned
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[str(tensor.dtype).removeprefix("torch.")],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    sink.write(len(encoded).to_bytes(8, "little") + encoded)
    for name, tensor in ordered:
        for piece in torch.split(tensor.detach().reshape(-1), _AT_ONCE):
            if piece.is_floating_point() and not piece.isfinite().all():
                raise _Refused(f"holds NaN or infinity in {name[:100]!r}.")
            sink.write(piece.view(torch.uint8).numpy().data)
    sink.flush()


def _warm_up() -> None:
    """Convert scraps of each form, so that the modules that takes are imported while files can be opened."""
    import torch

    torch.set_num_threads(1)
    codecs.lookup("cp437")  # names in archives of older versions
    for new in (True, False):
        scrap = io.BytesIO()
        torch.save({"x": torch.zeros(2)}, scrap, _use_new_zipfile_serialization=new)
        size = scrap.tell()
        scrap.seek(0)
        _convert(scrap, io.BytesIO(), size, "")
    with contextlib.suppress(Exception):
        torch.load(io.BytesIO(b"neither"), weights_only=True)


def _main() -> None:
    source, sink, answer, size, cpu_s = (int(sys.argv[i]) for i in (1, 2, 3, 4, 6))
    sha256 = sys.argv[5]
    _warm_up()
    confinement.drop_rights()
    confinement.die_with_parent()
    os.nice(5)
    # Move all three out of the way of the target numbers first; then nothing else stays open.
    source, sink, answer = os.dup(source), os.dup(sink), os.dup(answer)
    source, sink, answer = os.dup2(source, 3), os.dup2(sink, 4), os.dup2(answer, 5)
    os.closerange(6, 4096)
    confinement.limit(
        descriptors=6,  # no seventh: neither files nor sockets can be opened
        memory_bytes=2 * size + _SLACK_BYTES,
        cpu_s=cpu_s,
        file_bytes=5 * size + (1 << 20),
    )
    note: dict[str, str] = {}
    try:
        with open(source, "rb") as file, open(sink, "wb") as written:  # noqa: PTH123 - descriptors
            _convert(file, written, size, sha256)
    except _Refused as refused:
        note = refused.note
    except MemoryError:
        note = _broken("takes more memory to read than a file of its size may.")
    except Exception as error:
        note = _broken(f"cannot be read; it is damaged or of another kind ({type(error).__name__}).")
    os.write(answer, json.dumps(note).encode())
    os._exit(0)


if __name__ == "__main__":
    _main()
