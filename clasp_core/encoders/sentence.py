"""Sentence encoders of the paper: texts to one vector each.

LaBSE (Feng et al. 2022) in the final model and `paraphrase-xlm-r-multilingual-v1` (Reimers & Gurevych
2020) in the early ones, frozen. Paper (arXiv 2412.13071), section 3, "text encoder"; the notebooks call
`SentenceTransformer.encode` (notebook `extract-pretrained-embeddings`, cell 346, for XLM-R). What that
does is written down in the folder: modules.json names a chain, here a BERT or XLM-R, pooling, dense
layers and normalisation, each configured in a folder of its own. This reads that layout with
`transformers` alone; a chain of other parts is left to `sentence-transformers`, where it is installed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clasp_core.encoders.batching import batches
from clasp_core.encoders.folders import read_json, read_json_list, read_network, read_tensors
from clasp_core.encoders.vision_imports import extra_missing, require_transformers
from clasp_core.errors import ModelUnavailable

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer
    from transformers import BertModel, XLMRobertaModel

    Network: TypeAlias = BertModel | XLMRobertaModel

BATCH_TOKENS = 8192
"""Padded tokens that go through the network at once."""

_HEADS = r"(^|\.)pooler\.|^cls\.|^lm_head\."
"""What a published checkpoint may carry beside the encoder. LaBSE's dense layer is not BERT's pooler."""

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "Tanh": nn.Tanh,
    "Identity": nn.Identity,
    "GELU": nn.GELU,
    "ReLU": nn.ReLU,
}
"""By the last part of the name in a dense layer's config.json: nothing is imported because a file says so."""

_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The older spelling of `pooling_mode`: a flag for each."""


class SentenceEncoder(nn.Module):
    """Texts to vectors (n, dim). A text's vector does not depend on its batch (to 1e-4).

    They are what the folder's chain makes of them: of unit length for LaBSE, which ends in a normalisation,
    not for `paraphrase-xlm-r-multilingual-v1`, which does not.
    """

    def __init__(self, chain: "_Chain | _SentenceTransformers") -> None:
        super().__init__()
        self.chain = chain
        self.dim = chain.dim

    @torch.inference_mode()
    def forward(self, texts: Sequence[str]) -> Tensor:
        """Any texts to float32 rows (n, dim) on the module's device; what is too long is cut at its end."""
        vectors: Tensor = self.chain(texts)
        return vectors

    @classmethod
    def load(cls, folder: Path, *, batch_tokens: int = BATCH_TOKENS) -> "SentenceEncoder":
        """The encoder from a sentence-transformers folder with weights in safetensors, in eval mode.

        Raises ModelUnavailable where a file, a weight or the `paper` extra is missing, for weights that have
        no place in the chain, and for a chain that needs sentence-transformers where that is missing.
        """
        try:
            return cls(_Chain.load(folder, batch_tokens))
        except _NotImplementedHere as error:
            return cls(_SentenceTransformers.load(folder, str(error)))


class _NotImplementedHere(Exception):
    """What about a folder's chain is beyond `_Chain`."""


class _Chain(nn.Module):
    """A BERT or an XLM-R, its first token or the mean of all, then dense layers and normalisations."""

    def __init__(
        self,
        tokenizer: "Tokenizer",
        network: "Network",
        *,
        pooling: str,
        stages: Sequence[nn.Module],
        dim: int,
        batch_tokens: int,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.network = network
        self.stages = nn.Sequential(*stages)
        self.dim = dim
        self._pooling = pooling
        self._batch_tokens = batch_tokens

    def forward(self, texts: Sequence[str]) -> Tensor:
        tokens = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        vectors = torch.empty(len(tokens), self.dim, device=self.network.device)
        for places in batches([len(ids) for ids in tokens], self._batch_tokens):
            vectors[places] = self.stages(self._pooled([tokens[place] for place in places]))
        return vectors

    def _pooled(self, tokens: list[list[int]]) -> Tensor:
        device = self.network.device
        lengths = torch.tensor([len(ids) for ids in tokens], device=device)
        ids = torch.full((len(tokens), int(lengths.max())), self.network.config.pad_token_id or 0)
        for row, own in zip(ids, tokens, strict=True):
            row[: len(own)] = torch.tensor(own)
        valid = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        states = self.network(ids.to(device), attention_mask=valid.long()).last_hidden_state
        if self._pooling == "cls":
            return cast(Tensor, states[:, 0])
        return cast(Tensor, (states * valid[..., None]).sum(1) / lengths[:, None])

    @classmethod
    def load(cls, folder: Path, batch_tokens: int) -> "_Chain":
        """Raises _NotImplementedHere for what only sentence-transformers does."""
        parts = [_part(item) for item in read_json_list(folder / "modules.json")]
        kinds = [kind for kind, _ in parts]
        if kinds[:2] != ["Transformer", "Pooling"] or set(kinds[2:]) - {"Dense", "Normalize"}:
            raise _NotImplementedHere(f"the chain {' - '.join(kinds)}")
        _check_prompts(folder)
        tokenizer, network = _transformer(folder / parts[0][1])
        dim = network.config.hidden_size
        pooling = _pooling(folder / parts[1][1], dim)
        stages: list[nn.Module] = []
        for kind, path in parts[2:]:
            stage = _dense(folder / path, dim) if kind == "Dense" else _normalize(folder / path)
            stages.append(stage)
            dim = stage.out_features if isinstance(stage, _Dense) else dim
        chain = cls(tokenizer, network, pooling=pooling, stages=stages, dim=dim, batch_tokens=batch_tokens)
        return chain.eval().requires_grad_(False)


class _Dense(nn.Module):
    """A linear layer and its activation."""

    def __init__(self, linear: nn.Linear, activation: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.activation = activation
        self.out_features = linear.out_features

    def forward(self, vectors: Tensor) -> Tensor:
        transformed: Tensor = self.activation(self.linear(vectors))
        return transformed


class _Normalize(nn.Module):
    """To unit length."""

    def forward(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=1)


class _SentenceTransformers(nn.Module):
    """A chain that sentence-transformers runs."""

    def __init__(self, model: "SentenceTransformer", dim: int) -> None:
        super().__init__()
        self.model = model
        self.dim = dim

    def forward(self, texts: Sequence[str]) -> Tensor:
        if not texts:
            return torch.empty(0, self.dim, device=self.model.device)
        vectors: Tensor = self.model.encode(list(texts), convert_to_tensor=True, show_progress_bar=False)
        return vectors.float()

    @classmethod
    def load(cls, folder: Path, reason: str) -> "_SentenceTransformers":
        try:
            from sentence_transformers import SentenceTransformer
        except ModuleNotFoundError as error:
            missing = extra_missing("sentence-transformers", error)
            raise ModelUnavailable(f"{folder} is beyond the built-in reader ({reason}). {missing}") from error
        pickles = [path for path in folder.rglob("*.bin") if not any(path.parent.glob("*.safetensors"))]
        if pickles:
            raise ModelUnavailable(f"{pickles[0]} is a pickle; convert it to safetensors.")
        try:
            model = SentenceTransformer(
                str(folder),
                device="cpu",
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True, "dtype": torch.float32},
            )
            dim = model.get_embedding_dimension()
        except Exception as error:  # whatever the parts of an unknown chain raise
            raise ModelUnavailable(f"{folder} cannot be loaded by sentence-transformers: {error}") from error
        if dim is None:
            raise ModelUnavailable(f"{folder} does not say how long its vectors are.")
        return cls(model.eval().requires_grad_(False), dim)


def _part(item: dict[str, Any]) -> tuple[str, str]:
    """Kind and folder of an item of modules.json. Classes moved between versions; their names stayed."""
    package, _, kind = str(item.get("type")).rpartition(".")
    path = str(item.get("path", ""))
    if package.split(".")[0] != "sentence_transformers":
        raise ModelUnavailable(f"modules.json names {item.get('type')}: code from elsewhere is not run.")
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise ModelUnavailable(f"modules.json points out of its folder, to {path}.")
    return kind, path


def _check_prompts(folder: Path) -> None:
    path = folder / "config_sentence_transformers.json"
    config = read_json(path) if path.is_file() else {}
    if (config.get("prompts") or {}).get(config.get("default_prompt_name")):
        raise _NotImplementedHere("a prompt before each text")


def _transformer(folder: Path) -> "tuple[Tokenizer, Network]":
    require_transformers()
    from tokenizers import normalizers
    from transformers import AutoTokenizer, BertModel, XLMRobertaModel

    kinds: dict[str, type[Network]] = {"bert": BertModel, "xlm-roberta": XLMRobertaModel}
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type not in kinds:
        raise _NotImplementedHere(f"a transformer of type {model_type}")
    options = _options(folder)
    network = read_network(kinds[model_type], folder, spare=_HEADS, add_pooling_layer=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers or tokenizers raise about bad files
        raise ModelUnavailable(f"{folder} holds no tokenizer that can be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise _NotImplementedHere("a tokenizer without tokenizer.json")
    positions = network.config.max_position_embeddings
    if model_type == "xlm-roberta":  # counts positions from the one after padding's
        positions -= (network.config.pad_token_id or 0) + 1
    max_tokens = min(options.get("max_seq_length") or tokenizer.model_max_length, positions)
    # The backend alone: the wrapper sets truncation anew in each call, which two threads cannot do at once
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.enable_truncation(max_tokens, direction=tokenizer.truncation_side)
    if options.get("do_lower_case"):
        own = [backend.normalizer] if backend.normalizer else []
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
    return backend, network


def _options(folder: Path) -> dict[str, Any]:
    """sentence_bert_config.json, of either generation."""
    path = folder / "sentence_bert_config.json"
    options = read_json(path) if path.is_file() else {}
    text_only = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
    expected = {
        "transformer_task": ("feature-extraction",),
        "modality_config": (text_only,),
        "module_output_name": ("token_embeddings",),
    }
    for name, value in options.items():
        if name in ("max_seq_length", "do_lower_case") or not value:
            continue
        if value not in expected.get(name, ()):
            raise _NotImplementedHere(f"{name} = {value}")
    return options


def _pooling(folder: Path, dim: int) -> str:
    config = read_json(folder / "config.json")
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for flag, mode in _POOLINGS.items() if config.get(flag)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if modes not in (["cls"], ["mean"]):
        raise _NotImplementedHere(f"pooling by {' and '.join(map(str, modes))}")
    expected = config.get("embedding_dimension", config.get("word_embedding_dimension", dim))
    if expected != dim:
        raise ModelUnavailable(f"{folder} pools vectors of {expected} numbers; the transformer gives {dim}.")
    return str(modes[0])


def _dense(folder: Path, dim: int) -> _Dense:
    config = read_json(folder / "config.json")
    _check_names(config)
    if config.get("use_residual"):
        raise _NotImplementedHere("a dense layer with a residual connection")
    path, _, name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")
    if not path.startswith("torch.nn"):  # sentence-transformers would put tanh there, and a line in the log
        raise ModelUnavailable(f"{folder} names {path}.{name}: code from elsewhere is not run.")
    if name not in _ACTIVATIONS:
        raise _NotImplementedHere(f"the activation {config['activation_function']}")
    linear = nn.Linear(config["in_features"], config["out_features"], bias=config.get("bias", True))
    if linear.in_features != dim:
        raise ModelUnavailable(f"{folder} wants {linear.in_features} numbers; {dim} come.")
    weights = read_tensors(folder / "model.safetensors")
    try:
        linear.load_state_dict({key.removeprefix("linear."): value for key, value in weights.items()})
    except RuntimeError as error:
        raise ModelUnavailable(f"{folder} holds no dense layer that can be loaded: {error}") from error
    return _Dense(linear, _ACTIVATIONS[name]())


def _normalize(folder: Path) -> _Normalize:
    if (folder / "config.json").is_file():
        _check_names(read_json(folder / "config.json"))
    return _Normalize()


def _check_names(config: dict[str, Any]) -> None:
    """Newer parts may be wired to read and write elsewhere than in the sentence's vector."""
    for name in ("module_input_name", "module_output_name"):
        if config.get(name, "sentence_embedding") not in ("sentence_embedding", None):
            raise _NotImplementedHere(f"{name} = {config[name]}")
