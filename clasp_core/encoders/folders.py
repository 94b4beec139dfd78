"""Folders in the model hub's layout, read from disk: JSON and safetensors.

Nothing here reaches the network, unpickles, or runs code that a folder brings along. A network is
loaded whole or not at all: a weight that the file lacks would stay random and still give vectors.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from clasp_core.errors import ModelUnavailable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Network = TypeVar("Network", bound=PreTrainedModel)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelUnavailable where there is none."""
    content = _content(path)
    if not isinstance(content, dict):
        raise ModelUnavailable(f"{path} does not hold a JSON object.")
    return content


def read_json_list(path: Path) -> list[dict[str, Any]]:
    """A JSON list of objects from a file. Raises ModelUnavailable where there is none."""
    content = _content(path)
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise ModelUnavailable(f"{path} does not hold a JSON list of objects.")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name. Raises ModelUnavailable where there is none."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelUnavailable(f"{path} cannot be read as safetensors: {error}.") from error


def read_network(
    kind: "type[Network]", folder: Path, *, spare: str = r"$^", dispensable: str = r"$^", **arguments: bool
) -> "Network":
    """The network of that class with the folder's weights: float32, on the CPU, in eval mode.

    The file may hold weights whose names match `spare` and that the class has no place for (a head of
    the task it was trained on), and may lack those that match `dispensable`. Raises ModelUnavailable for
    any other difference, for other shapes, and where there is no readable safetensors file.
    """
    try:
        with _quiet():
            loaded: object = kind.from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation="sdpa",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **arguments,
            )
    except Exception as error:  # whatever transformers, safetensors or torch raise about bad files
        raise ModelUnavailable(f"{folder} holds no {kind.__name__} that can be loaded: {error}") from error
    network, report = cast("tuple[Network, dict[str, set[str]]]", loaded)
    differences = {
        "lacks": [name for name in report["missing_keys"] if not re.search(dispensable, name)],
        "has no place for": [name for name in report["unexpected_keys"] if not re.search(spare, name)],
        "has other shapes for": [str(item) for item in report["mismatched_keys"]],
    }
    for what, names in differences.items():
        if names:
            raise ModelUnavailable(
                f"The weights in {folder} are not those of a {kind.__name__} of its config.json:"
                f" it {what} {_few(names)}."
            )
    network.eval().requires_grad_(False)
    leave_file(network)
    return network


def leave_file(network: nn.Module) -> None:
    """Copy weights that are still views of their mapped file.

    A file overwritten in place would change the vectors of a running service, one cut short would end it
    with a bus error.
    """
    network._apply(torch.clone)  # type: ignore[no-untyped-call]


def _content(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelUnavailable(f"{path} cannot be read as JSON: {error}.") from error


def _few(names: list[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from drawing progress bars and tables into a service's log: we report ourselves."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
