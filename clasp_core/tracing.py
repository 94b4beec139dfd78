"""Where the time of a request or a recording goes, as spans for whoever listens; nothing while nobody does.

The core knows no tracing library; `app.tracing` brings one. Attributes say how much, and which recording,
never what was asked or said.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeAlias

from clasp_core.types import Seconds

Attributes: TypeAlias = Mapping[str, str | int | float]


class Listener(Protocol):
    """What spans are told to."""

    def span(self, name: str, attributes: Attributes) -> AbstractContextManager[object]: ...
    def record(self, name: str, began: Seconds, ended: Seconds, attributes: Attributes) -> None: ...


_listener: Listener | None = None
_NOTHING = nullcontext()


def listen(listener: Listener) -> None:
    """Tell this process's spans to it from now on."""
    global _listener
    _listener = listener


def span(name: str, **attributes: str | int | float) -> AbstractContextManager[object]:
    """The block as a span, inside of the one around it in this context."""
    return _NOTHING if _listener is None else _listener.span(name, attributes)


def record(name: str, began: Seconds, ended: Seconds, **attributes: str | int | float) -> None:
    """A span of what is over already, on whatever thread; times are `time.perf_counter`'s."""
    if _listener is not None:
        _listener.record(name, began, ended, attributes)
