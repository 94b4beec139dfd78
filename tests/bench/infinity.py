"""infinity-emb, a server of text encoders, given ours: what one would take to embed questions over HTTP.

`write_encoder` writes multilingual-e5-small, as the embedded model has it, in the hub's layout: for torch,
and for ONNX Runtime. `Infinity` serves that folder on a port of this machine, in the environment that
`make infinity` makes for it (tests/bench/infinity.txt).
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Literal

import httpx
import numpy as np
from numpy.typing import NDArray
from safetensors.torch import save_file

from clasp_core.encoders.e5 import DIM, E5_SMALL, HEADS, LAYERS, MAX_TOKENS, _floats, _read_e5s1
from tests.service import eventually

PYTHON = Path(sys.prefix) / "infinity" / "bin" / "python"
START_WITHIN_S = 180
NAME = "e5"
_LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
"""BERT's names of what the data package calls so."""

# ONNX Runtime asks no variable: it gets as many threads as OMP_NUM_THREADS gives to torch.
_SERVE = """
import os
import onnxruntime
make = onnxruntime.InferenceSession.__init__
def bounded(self, model, sess_options=None, *rest, **more):
    options = sess_options or onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
    make(self, model, options, *rest, **more)
onnxruntime.InferenceSession.__init__ = bounded
from infinity_emb.cli import cli
cli()
"""
_EXPORT = """
import sys
import torch
from transformers import BertModel
folder, file = sys.argv[1:]
network = BertModel.from_pretrained(folder, add_pooling_layer=False, attn_implementation="eager").eval()
network.config.return_dict = False
some = torch.ones(2, 8, dtype=torch.long)
axes = {0: "batch", 1: "tokens"}
names = ["input_ids", "attention_mask"]
torch.onnx.export(network, (some, some), file, input_names=names, output_names=["last_hidden_state"],
                  dynamic_axes={name: axes for name in (*names, "last_hidden_state")}, opset_version=17,
                  dynamo=False)
"""

Engine = Literal["torch", "optimum"]
"""`optimum` is ONNX Runtime."""


def is_installed() -> bool:
    return (PYTHON.parent.parent / "installed").exists()


def write_encoder(folder: Path) -> None:
    """The hub's layout, with what sentence-transformers adds and, below `onnx`, the same for ONNX Runtime.

    The tokenizer lacks XLM-R's normalisation of characters, which ours does before it: give it texts that
    `E5Encoder.prepared` made.
    """
    contents = _read_e5s1(E5_SMALL.locate(None))
    kept = contents.tensors
    tensors = {
        "embeddings.word_embeddings.weight": _floats(kept["emb.word"]).view(-1, DIM),
        "embeddings.position_embeddings.weight": _floats(kept["emb.pos"]).view(-1, DIM),
        "embeddings.token_type_embeddings.weight": _floats(kept["emb.type"]).view(-1, DIM),
        "embeddings.LayerNorm.weight": _floats(kept["emb.ln.w"]),
        "embeddings.LayerNorm.bias": _floats(kept["emb.ln.b"]),
    }
    for layer in range(LAYERS):
        for ours, theirs in _LAYER.items():
            bias = _floats(kept[f"l{layer}.{ours}.b"])
            weight = _floats(kept[f"l{layer}.{ours}.w"])
            if len(weight) > len(bias):
                weight = weight.view(len(bias), -1)
            name = f"encoder.layer.{layer}.{theirs}"
            tensors |= {f"{name}.weight": weight, f"{name}.bias": bias}
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    contents.tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "1_Pooling").mkdir()
    files = {
        "config.json": {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "hidden_size": DIM,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "intermediate_size": 4 * DIM,
            "hidden_act": "gelu",
            "layer_norm_eps": contents.eps,
            "max_position_embeddings": MAX_TOKENS,
            "type_vocab_size": len(tensors["embeddings.token_type_embeddings.weight"]),
            "vocab_size": len(tensors["embeddings.word_embeddings.weight"]),
            "pad_token_id": 1,
            "torch_dtype": "float32",
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": MAX_TOKENS,
            "model_input_names": ["input_ids", "attention_mask"],
            **{f"{name}_token": "<s>" for name in ("bos", "cls")},
            **{f"{name}_token": "</s>" for name in ("eos", "sep")},
            "pad_token": "<pad>",
            "unk_token": "<unk>",
        },
        "modules.json": [
            {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for place, (path, kind) in enumerate(
                [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
            )
        ],
        "sentence_bert_config.json": {"max_seq_length": MAX_TOKENS, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": DIM, "pooling_mode_mean_tokens": True},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "onnx").mkdir()
    command = [PYTHON, "-c", _EXPORT, folder, folder / "onnx" / "model.onnx"]
    subprocess.run(command, check=True, capture_output=True, env=_environment(folder, 1))


class Infinity:
    """infinity-emb on a free port until the block ends."""

    def __init__(self, folder: Path, engine: Engine, threads: int) -> None:
        """`folder` is what `write_encoder` wrote.

        Its best settings on a CPU: float32, as int8 would be another encoder; BetterTransformer, its default;
        for ONNX Runtime all optimisations, its default; batches as large as ours; answers in base64, which
        cost less than numbers as text; no usage reports, and no log line for each request.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        settings = {
            "model-id": folder,
            "served-model-name": NAME,
            "engine": engine,
            "device": "cpu",
            "dtype": "float32",
            "batch-size": 32,
            "pooling-method": "mean",
            "host": "127.0.0.1",
            "port": self.port,
            "log-level": "error",
        }
        options = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)
        self._log = folder / f"{engine}.log"
        self._command = [PYTHON, "-c", _SERVE, "v2", *options]
        self._environment = _environment(folder, threads)

    def __enter__(self) -> "Infinity":
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, env=self._environment)
        try:
            eventually(self._is_ready, within_s=START_WITHIN_S)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, self._log.read_text(errors="replace")
        try:
            return self._client.get("/health").is_success
        except httpx.TransportError:
            return False

    @staticmethod
    def request(text: str) -> bytes:
        """One prepared text as an HTTP request."""
        body = json.dumps({"model": NAME, "input": text, "encoding_format": "base64"}).encode()
        head = "POST /embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    def vectors(self, texts: list[str]) -> NDArray[np.float32]:
        asked = {"model": NAME, "input": texts}
        answer = self._client.post("/embeddings", json=asked)
        return np.array([one["embedding"] for one in answer.raise_for_status().json()["data"]], np.float32)


def _environment(folder: Path, threads: int) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder.parent / "hub"),  # where the optimised network is put
        "DO_NOT_TRACK": "1",
        "INFINITY_ANONYMOUS_USAGE_STATS": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
