"""`clasp` with the stand-in model, which also fetches from 127.0.0.2 and knows the names of tests.

    AUTHORITY=ca.pem python -m tests.fetching_program serve --port 8000

All else that the service refuses it refuses here, by its own rules.
"""

import os
import runpy
import ssl
from functools import partial

from app import fetching, service
from tests.web_server import ADDRESS

NAMES = {
    "files.test": [ADDRESS],
    "a.below.test": [ADDRESS],
    "unlisted.test": [ADDRESS],
    "below.test": [ADDRESS],
    "notbelow.test": [ADDRESS],
    "inside.test": ["10.1.2.3"],
    "mixed.test": ["93.184.215.14", "169.254.169.254"],
    "nowhere.test": [],
}


async def resolve(name: str) -> list[str]:
    return NAMES[name] if name in NAMES else await fetching.resolve(name)


def is_allowed(address: str) -> bool:
    return address == ADDRESS or fetching.is_public(address)


if __name__ == "__main__":
    service.Fetcher = partial(  # type: ignore[assignment,misc]
        fetching.Fetcher,
        resolve=resolve,
        is_allowed=is_allowed,
        tls=ssl.create_default_context(cafile=os.environ["AUTHORITY"]),
    )
    runpy.run_module("tests.stand_in", run_name="__main__", alter_sys=True)
