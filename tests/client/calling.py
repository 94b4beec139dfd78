"""One way to call both clients, so that each test holds for both."""

import asyncio
import ssl
from collections.abc import Callable
from typing import Any, TypeAlias

from clasp_client import AsyncClient, Client

TRUST = ssl.create_default_context()
"""Of all of them, as it takes longer to make than a request."""
Call: TypeAlias = Callable[..., Any]
"""`call(url, "search", "bees")` and so on; `options` are the client's."""


def call_sync(url: str, method: str, *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    with Client(url, **{"verify": TRUST} | (options or {})) as clasp:
        given = getattr(clasp, method)(*args, **kwargs)
        return list(given) if method in ("list", "upload_many") else given


def call_async(
    url: str, method: str, *args: Any, options: dict[str, Any] | None = None, **kwargs: Any
) -> Any:
    async def called() -> Any:
        async with AsyncClient(url, **{"verify": TRUST} | (options or {})) as clasp:
            given = getattr(clasp, method)(*args, **kwargs)
            if method in ("list", "upload_many"):
                return [item async for item in given]
            return await given

    return asyncio.run(called())


CALLS = [call_sync, call_async]
CALL_IDS = ["sync", "async"]
