"""Makes checkpoints, honest and malicious, for tests: `python checkpoint_files.py KIND FOLDER`.

Run as a program, since the published files are of modules whose classes lived in a notebook's `__main__`.
"""

import io
import os
import pickle
import sys
import tarfile
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

# --- the published classes, layer by layer


def branch(inputs, wide, narrow):
    return nn.Sequential(
        nn.Linear(inputs, wide),
        nn.BatchNorm1d(wide),
        nn.ReLU(),
        nn.Dropout(0.15),
        nn.Linear(wide, narrow),
        nn.BatchNorm1d(narrow),
        nn.LeakyReLU(),
        nn.Dropout(0.10),
        nn.Linear(narrow, wide),
    )


class HubertLabseConcat(nn.Module):
    def __init__(self, speech, image, wide, narrow, mixed, mixed_again):
        super().__init__()
        self.image_seq = branch(image, wide, narrow)
        self.audio_seq = branch(speech, wide, narrow)
        self.mix_seq = nn.Sequential(
            nn.Linear(2 * wide, mixed),
            nn.BatchNorm1d(mixed),
            nn.LeakyReLU(),
            nn.Linear(mixed, mixed_again),
            nn.LeakyReLU(),
            nn.Linear(mixed_again, wide),
        )


class HubertLabseGating(nn.Module):
    def __init__(self, speech, image, wide, narrow):
        super().__init__()
        self.image_seq = branch(image, wide, narrow)
        self.text_seq = branch(speech, wide, narrow)
        self.input_gate_text = nn.Sequential(nn.Linear(wide, wide), nn.Sigmoid())
        self.input_gate_image = nn.Sequential(nn.Linear(wide, wide), nn.Sigmoid())
        self.forget_gate_text = nn.Sequential(nn.Linear(wide, wide), nn.Sigmoid())
        self.forget_gate_image = nn.Sequential(nn.Linear(wide, wide), nn.Sigmoid())
        self.tanh_text = nn.Sequential(nn.Linear(wide, wide), nn.Tanh())
        self.tanh_image = nn.Sequential(nn.Linear(wide, wide), nn.Tanh())
        self.weight = nn.Sequential(nn.Linear(2 * wide, 2 * wide))


# --- what must be converted


def keep(path, saved, tensors, **how):
    """Save a checkpoint, and beside it what is in it."""
    torch.save(saved, path, **how)
    expected = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(expected, f"{path}.expected")


def make_small(folder):
    """Of the published form, in little."""
    torch.manual_seed(1)
    small = HubertLabseConcat(6, 5, 4, 3, 7, 5)
    keep(folder / "small.pt", small, small.state_dict())
    return small


def make_honest(folder):
    small = make_small(folder)
    concat = HubertLabseConcat(1024, 1000, 768, 576, 1024, 800)
    keep(folder / "concat.pt", concat, concat.state_dict())
    gating = HubertLabseGating(1024, 1000, 768, 576)
    keep(folder / "gating.pt", gating, gating.state_dict())
    keep(
        folder / "stream.bin",
        small.state_dict(),
        small.state_dict(),
        _use_new_zipfile_serialization=False,
    )
    tensors = small.state_dict()
    small.register_buffer("scratch", torch.ones(3), persistent=False)
    for attribute in ("training", "_backward_hooks", "_load_state_dict_pre_hooks"):
        small.__dict__.pop(attribute)
    keep(folder / "odd-attributes.pt", small, tensors)

    shared = torch.randn(5, 4)
    odd = OrderedDict(
        embedding=shared,
        tied=shared,
        row=shared[2],
        turned=torch.randn(3, 2).T,
        scalar=torch.tensor(3.5),
        half=torch.randn(3).half(),
        brain=torch.randn(3).bfloat16(),
        double=torch.randn(2).double(),
        count=torch.tensor(7),
        ids=torch.arange(3, dtype=torch.int32),
        mask=torch.tensor([True, False]),
        empty=torch.zeros(0, 4),
        parameter=nn.Parameter(torch.randn(2)),
        ü=torch.ones(1),
    )
    odd._metadata = OrderedDict({"": {"version": 1}})
    keep(folder / "state_dict.bin", odd, odd)


# --- what must be refused


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Subclass(HubertLabseConcat):
    pass


class WithState:
    def __setstate__(self, state):
        raise AssertionError


def make_malicious(folder):
    trace = str(folder / "trace")

    elsewhere = types.ModuleType("elsewhere")
    elsewhere.HubertLabseConcat = type("HubertLabseConcat", (nn.Module,), {"__module__": "elsewhere"})
    sys.modules["elsewhere"] = elsewhere

    def save(name, value, **how):
        torch.save(value, folder / name, **how)

    def with_attribute(value):
        model = HubertLabseConcat(6, 5, 4, 3, 7, 5)
        model.extra = value
        return model

    script = f"open({trace!r}, 'w')"
    save("system", {"x": torch.ones(1), "y": Call(os.system, f"touch {trace}")})
    save("system-stream", {"x": Call(os.system, f"touch {trace}")}, _use_new_zipfile_serialization=False)
    save("eval", with_attribute(Call(eval, script)))
    save("hub", {"x": Call(torch.hub.load, "someone/something", "model")})
    save("subclass", Subclass(6, 5, 4, 3, 7, 5))
    save("elsewhere", elsewhere.HubertLabseConcat())
    save("setstate", with_attribute(WithState()))
    save("other-layer", with_attribute(nn.Conv1d(1, 1, 1)))
    save("protocol4", with_attribute(Call(eval, script)), pickle_protocol=4)
    save("wrapped", {"epoch": 3, "model": {"x": torch.ones(1)}})
    save("nothing", {})
    save("nan", {"x": torch.tensor([1.0, float("nan")])})
    save("expanded", {"x": torch.ones(1).expand(1 << 40)})
    weight = torch.ones(1 << 14)
    save("many-names", {str(i): weight for i in range(1000)})
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), folder / "torchscript")

    def zipped(name, pickled, data=b"", compression=zipfile.ZIP_STORED):
        with zipfile.ZipFile(folder / name, "w", compression) as archive:
            for file, content in (("data.pkl", pickled), ("version", b"3"), ("data/0", data)):
                archive.writestr(f"x/{file}", content)

    def text(s):
        return b"X" + len(s).to_bytes(4, "little") + s.encode()

    def storage(count):
        return (
            b"("
            + text("storage")
            + b"ctorch\nFloatStorage\n"
            + text("0")
            + text("cpu")
            + b"J"
            + count.to_bytes(4, "little")
            + b"tQ"
        )

    def tensor(held, claimed):
        return (
            b"ctorch._utils\n_rebuild_tensor_v2\n("
            + storage(held)
            + b"K\0J"
            + claimed.to_bytes(4, "little")
            + b"\x85K\1\x85\x89ccollections\nOrderedDict\n)RtR"
        )

    def one(value):
        return b"\x80\2}" + text("x") + value + b"s."

    zipped("honest", one(tensor(4, 4)), bytes(16))
    zipped("longer-storage", one(tensor(4000, 4)), bytes(16))
    zipped("huge", one(tensor((1 << 31) - 1, (1 << 31) - 1)), bytes(16))
    zipped("persistent-id", one(text("os.system") + b"Q"))
    zipped("persistent-module", one(b"(" + text("module") + b"cposix\nsystem\ntQ"))
    zipped("reduced-layer", one(b"ctorch.nn.modules.linear\nLinear\n(J\xff\xff\xff\x7fJ\xff\xff\xff\x7ftR"))
    zipped("stack-global", one(text("posix") + text("system") + b"\x93(" + text(f"touch {trace}") + b"tR"))
    zipped("long-name", one(b"cx\n" + b"y" * 100000 + b"\n"))
    zipped("compressed", one(tensor(1 << 20, 1 << 20)), bytes(4 << 20), zipfile.ZIP_DEFLATED)
    cycle = (
        b"\x80\2c__main__\nHubertLabseConcat\n)\x81q\0}" + text("_modules") + b"}" + text("a") + b"h\0ssb."
    )
    zipped("cycle", cycle)
    zipped("recursion", one(b"(" * 100000 + b"t" * 100000))

    with tarfile.open(folder / "tar", "w") as tar:
        for name, content in (
            ("pickle", pickle.dumps(Call(os.system, f"touch {trace}"), 2)),
            ("storages", b""),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (folder / "bare-pickle").write_bytes(pickle.dumps(Call(os.system, f"touch {trace}"), 2))
    (folder / "text").write_text("import os; os.system('true')")
    (folder / "empty").write_bytes(b"")
    honest = (folder / "honest").read_bytes()
    (folder / "truncated").write_bytes(honest[:-40])
    stream = io.BytesIO()
    torch.save({"x": torch.ones(100), "y": torch.ones(7)}, stream, _use_new_zipfile_serialization=False)
    (folder / "truncated-stream").write_bytes(stream.getvalue()[:-30])
    (folder / "longer-stream").write_bytes(stream.getvalue() + bytes(30))


if __name__ == "__main__":
    make = {"small": make_small, "honest": make_honest, "malicious": make_malicious}[sys.argv[1]]
    make(Path(sys.argv[2]))
