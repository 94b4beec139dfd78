"""Small random checkpoints in the layouts that the paper's models are published in.

Real networks of the published kinds with few and narrow layers, deterministic by seed, wide awake
(different input gives clearly different vectors) and without any understanding. Files, names of weights
and configuration are the hub's: what loads these loads the published ones.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from clasp_core.encoders.vision_imports import require_transformers

CONVOLUTIONS = {
    "conv_kernel": (10, 3, 3, 3, 3, 2, 2),
    "conv_stride": (5, 2, 2, 2, 2, 2, 2),
}
"""Those of HuBERT and wav2vec 2.0: 320 samples to a frame, 400 for the first."""

SENTENCES = [
    "The home team won the final by three goals to one.",
    "In winter the bees stay inside the hive and live on the honey they made in summer.",
    "Après trois jours de pluie, la rivière a débordé.",
    "Der Zug hat wegen eines umgestürzten Baumes vierzig Minuten Verspätung.",
    "Η γάτα κοιμάται πάνω στο τραπέζι.",
    "Собака убежала в парк, помогите её найти!",
    "زنبورها در زمستان داخل کندو می‌مانند.",
    "هل يمكنني تغيير موعدي مع الطبيب؟",
    "הרכבת מאחרת היום.",
    "गाँव में कल शाम से बिजली नहीं है।",
    "รถไฟมาสายเพราะหิมะตก",
    "爷爷每天早上去公园打太极拳。",
    "電車が遅れています。",
    "기차가 늦었어요.",
    "Ёлка, naïve café, İstanbul, Straße, ½ ﬁ ①",
    "🙂 ok",
]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's random numbers from that seed, and the generator as it was afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def save_hubert(folder: Path, *, hidden: int = 32, layers: int = 2, seed: int = 0, **config: Any) -> Path:
    """`facebook/hubert-large-ls960-ft` in small: HubertForCTC, layer norm everywhere.

    The positional convolution's weights are named `weight_g` and `weight_v`, as in the published file.
    """
    require_transformers()
    from transformers import HubertConfig, HubertForCTC

    large = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
    settings = HubertConfig(**_speech(hidden, layers) | large | config)
    return _save_speech(HubertForCTC, settings, folder, seed=seed, return_attention_mask=True)


def save_wav2vec2(folder: Path, *, hidden: int = 32, layers: int = 2, seed: int = 0, **config: Any) -> Path:
    """`facebook/wav2vec2-base-960h` in small: Wav2Vec2ForCTC, whose first convolution has a GroupNorm."""
    require_transformers()
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    base = {"feat_extract_norm": "group", "conv_bias": False, "do_stable_layer_norm": False}
    settings = Wav2Vec2Config(**_speech(hidden, layers) | base | config)
    return _save_speech(Wav2Vec2ForCTC, settings, folder, seed=seed, return_attention_mask=False)


def _speech(hidden: int, layers: int) -> dict[str, Any]:
    return CONVOLUTIONS | {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 2 * hidden,
        "conv_dim": (16,) * 7,
        "num_conv_pos_embeddings": 32,
        "num_conv_pos_embedding_groups": 4,
        "initializer_range": 0.3,
        "vocab_size": 32,
    }


def _save_speech(
    kind: type[Any], config: Any, folder: Path, *, seed: int, return_attention_mask: bool
) -> Path:
    from transformers import Wav2Vec2FeatureExtractor

    folder.mkdir(parents=True, exist_ok=True)
    with seeded(seed):
        network = kind(config)
        convolution = network.base_model.encoder.pos_conv_embed.conv
        with torch.no_grad():  # as training leaves it: not the norm of its own direction
            gain = convolution.parametrizations.weight.original0
            gain *= torch.empty_like(gain).uniform_(0.5, 2.0)
    network.config.architectures = [kind.__name__]
    network.config.save_pretrained(folder)
    _add(
        folder / "config.json",
        feat_extract_dropout=0.0,
        hidden_dropout_prob=0.1,
        gradient_checkpointing=False,
    )
    save_file(old_names(network.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    preparation = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=return_attention_mask)
    preparation.save_pretrained(folder)
    return folder


_OLD_NAMES = {
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}


def old_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict as torch before 2.1 named weight-normalised kernels; `new_names` takes it back."""
    return {_renamed(name, _OLD_NAMES): tensor.contiguous() for name, tensor in state.items()}


def new_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {old: new for new, old in _OLD_NAMES.items()}
    return {_renamed(name, names): tensor for name, tensor in state.items()}


def _renamed(name: str, names: dict[str, str]) -> str:
    for before, after in names.items():
        name = name.replace(before, after)
    return name


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """A safetensors file with other content, for tests of what is refused."""
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def save_sentence_bert(
    folder: Path,
    *,
    dim: int = 32,
    layers: int = 2,
    max_seq_length: int = 256,
    activation: str = "torch.nn.modules.activation.Tanh",
    pooling: str = "cls",
    seed: int = 0,
) -> Path:
    """`sentence-transformers/LaBSE` in small: BERT, first token, dense layer with tanh, unit length."""
    require_transformers()
    from transformers import BertConfig, BertModel, BertTokenizer

    words = _words()
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_characters(), *words]
    pieces += [f"##{character}" for character in _characters()]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    tokenizer = BertTokenizer(
        {piece: number for number, piece in enumerate(pieces)}, do_lower_case=False, model_max_length=512
    )
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * dim,
        initializer_range=0.3,
    )
    with seeded(seed):
        network = BertModel(config)
        linear = nn.Linear(dim, dim)
    network.save_pretrained(folder)
    _add(folder / "config.json", directionality="bidi", pooler_type="first_token_transform")
    rewrite(folder / "model.safetensors", _with_position_ids)
    _write(folder / "2_Dense" / "config.json", _dense_config(dim, activation))
    weights = {f"linear.{name}": tensor for name, tensor in linear.state_dict().items()}
    save_file(weights, folder / "2_Dense" / "model.safetensors", metadata={"format": "pt"})
    _write_chain(folder, pooling, dim, max_seq_length, "Dense", "Normalize")
    return folder


def _dense_config(dim: int, activation: str) -> dict[str, Any]:
    return {"in_features": dim, "out_features": dim, "bias": True, "activation_function": activation}


def save_xlmr(
    folder: Path, *, dim: int = 32, layers: int = 2, max_seq_length: int = 128, seed: int = 0
) -> Path:
    """`sentence-transformers/paraphrase-xlm-r-multilingual-v1` in small: XLM-R, mean of the tokens."""
    require_transformers()
    from transformers import XLMRobertaConfig, XLMRobertaModel, XLMRobertaTokenizer

    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -7.0 - len(word) / 10) for word in _words() if len(word) > 1]
    pieces += [(character, -9.0) for character in _characters() if character != "▁"]
    pieces.append(("<mask>", 0.0))
    tokenizer = XLMRobertaTokenizer(pieces, model_max_length=512)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    config = XLMRobertaConfig(
        vocab_size=len(pieces),
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * dim,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        initializer_range=0.3,
    )
    with seeded(seed):
        network = XLMRobertaModel(config)
    network.save_pretrained(folder)
    _add(folder / "config.json", output_past=True, gradient_checkpointing=False)
    rewrite(folder / "model.safetensors", _with_position_ids)
    _write_chain(folder, "mean", dim, max_seq_length)
    return folder


def _with_position_ids(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Files of that time carry the numbers of the positions, which today's classes do not store."""
    positions = len(state["embeddings.position_embeddings.weight"])
    return state | {"embeddings.position_ids": torch.arange(positions)[None]}


def _write_chain(folder: Path, pooling: str, dim: int, max_seq_length: int, *more: str) -> None:
    """The JSON files of a sentence-transformers folder, as version 2 spelt them."""
    parts = ("Transformer", "Pooling", *more)
    modules = [
        {
            "idx": place,
            "name": str(place),
            "path": f"{place}_{kind}" if place else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for place, kind in enumerate(parts)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    _write(folder / "sentence_bert_config.json", {"max_seq_length": max_seq_length, "do_lower_case": False})
    _write(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": dim,
            "pooling_mode_cls_token": pooling == "cls",
            "pooling_mode_mean_tokens": pooling == "mean",
            "pooling_mode_max_tokens": pooling == "max",
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
    )
    for place, kind in enumerate(parts[2:], 2):
        (folder / f"{place}_{kind}").mkdir(exist_ok=True)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _add(path: Path, **members: object) -> None:
    """Members that published files have and today's classes do not write any more."""
    _write(path, json.loads(path.read_text()) | members)


def _words() -> list[str]:
    """The words of `SENTENCES`, each once."""
    return list(dict.fromkeys(word for sentence in SENTENCES for word in sentence.split()))


def _characters() -> list[str]:
    """The letters and signs of the alphabets of `SENTENCES`, and its ideographs."""
    blocks = ((0x21, 0x250), (0x370, 0x530), (0x5D0, 0x5EB), (0x600, 0x700), (0x900, 0x980), (0xE00, 0xE5C))
    letters = [chr(code) for start, end in (*blocks, (0x3041, 0x3100)) for code in range(start, end)]
    letters += [character for sentence in SENTENCES for character in sentence]
    return list(dict.fromkeys(letter for letter in letters if letter.isprintable() and not letter.isspace()))


def save_efficientnet(path: Path, variant: str = "b0", seed: int = 0) -> Path:
    """torchvision's EfficientNet of that size, as safetensors under torchvision's names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(torchvision_efficientnet(variant, seed).state_dict(), path)
    return path


def torchvision_efficientnet(
    variant: str = "b0", seed: int = 0, pictures: torch.Tensor | None = None
) -> nn.Module:
    """The network in torchvision's own code, with BatchNorm statistics that fit it, as training leaves them.

    Without those a random network of this depth gives the same logits for any picture. The variances reach
    down to where an `eps` of 1e-3 instead of 1e-5 is seen; logits on `pictures`, or on noise where none are
    given, have a deviation of about 1.
    """
    require_transformers()  # torchvision then imports, whatever it was built for
    import torchvision

    with seeded(seed), torch.no_grad():
        network: nn.Module = getattr(torchvision.models, f"efficientnet_{variant}")().eval()
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                layer.weight *= torch.empty(len(layer.weight), 1, 1, 1).uniform_(-2, 0).exp()
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(0.5, 1.0)
                layer.bias.normal_(0, 0.3)
                layer.momentum = None  # the statistics of what passes, not a part of them
                layer.train()
        for block in network.modules():
            if hasattr(block, "use_res_connect"):
                block.block[-1][1].weight *= 0.3  # or 55 blocks in a row amplify without end
        noise = torch.randint(0, 256, (2, 3, 128, 160)).float()
        network(noise)
        for layer in network.eval().modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_var.clamp_(min=0.003)
        network.classifier[1].weight /= network(noise if pictures is None else pictures).std()
    return network.eval()
