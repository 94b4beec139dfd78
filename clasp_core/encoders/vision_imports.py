"""Importing timm and transformers beside whatever torchvision there is.

Both import torchvision for parts that are not used here. Two states of it would stop them:

- It is built for CUDA and torch is not: its library cannot be loaded, and `import torchvision` fails on
  declaring how `nms`, which is not there, behaves (package indexes serve torchvision for CUDA only, while
  torch comes for the CPU as well). Declaring the two operators is all that is missing.
- It is not installed: transformers takes that, timm does not. For the time of its import, modules of
  empty classes stand in; `timm.models` looks at none of them again but for `isinstance`.

Where `import torchvision` works, nothing of this happens.
"""

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from threading import RLock
from types import ModuleType

import torch

from clasp_core.errors import ModelUnavailable

_lock = RLock()
_declared: list[torch.library.Library] = []
"""Operators are withdrawn when the library that declares them is collected."""


def require_transformers() -> None:
    """After this, `import transformers` and its models work. Raises ModelUnavailable where it is missing."""
    with _lock:
        _torchvision_works()
        try:
            importlib.import_module("transformers")
        except ModuleNotFoundError as error:
            raise extra_missing("paper", error) from error


def import_timm() -> ModuleType:
    """timm, imported. Raises ModelUnavailable where it is missing."""
    with _lock:
        try:
            if "timm" in sys.modules or _torchvision_works():
                return importlib.import_module("timm")
            with _stand_in():
                return importlib.import_module("timm")
        except ModuleNotFoundError as error:
            raise extra_missing("paper", error) from error


def extra_missing(extra: str, error: ModuleNotFoundError) -> ModelUnavailable:
    """What to tell a user who has not installed an optional extra."""
    return ModelUnavailable(
        f"This model needs the package {error.name}, which is not installed:"
        f" pip install 'clasp-search[{extra}]'."
    )


def _torchvision_works() -> bool:
    """Whether torchvision is there; mended, if that is what it takes."""
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        return False
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        _forget("torchvision")
        library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for operator in ("nms", "qnms"):
            signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            library.define(operator + signature)  # type: ignore[no-untyped-call]
        _declared.append(library)
        importlib.import_module("torchvision")
    return True


def _forget(package: str) -> None:
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]


class _Anything(type):
    """A class all of whose attributes exist: enumerations are read while timm is imported."""

    def __getattr__(cls, name: str) -> str:
        return name


class _EmptyModule(ModuleType):
    """A module in which every public name is an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        stand_in = _Anything(name, (), {"__module__": self.__name__})
        setattr(self, name, stand_in)
        return stand_in


class _StandIn(MetaPathFinder, Loader):
    """Finds an empty module for torchvision and everything below it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return (
            ModuleSpec(fullname, self, is_package=True) if fullname.split(".")[0] == "torchvision" else None
        )

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _EmptyModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def _stand_in() -> Iterator[None]:
    finder = _StandIn()
    sys.meta_path.append(finder)  # last: whatever is installed is found before
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _forget("torchvision")
