"""What `tests.fuzz_api` teaches Schemathesis: recordings to send, and checks that only this API has.

Loaded by Schemathesis' own process (SCHEMATHESIS_HOOKS). CLASP_FUZZ_KEY is what the key may do: its scopes
and the collections that it is limited to, as JSON.
"""

import json
import os
import random
from collections.abc import Iterator
from typing import Any

import schemathesis
from hypothesis import strategies as st

from app.errors import STATUS_OF
from tests.core.doubles import wav_bytes

STATED = frozenset({502, 503, 504, 507})
"""The server errors that docs/errors.md tells clients to expect."""
FORM_ERRORS = frozenset({"invalid_input", "malformed_request", "unsupported_media_type"})
"""What says that a request is not of the form that the description gives."""
MAX_ADDRESS = 65_535
"""How long the part of an address may be that is sent. No schema can say it."""
KEY = json.loads(os.environ["CLASP_FUZZ_KEY"])

tones = st.integers(100, 4000).map(lambda hertz: wav_bytes(hertz, 0.2))
recordings = st.one_of(
    tones,
    tones,
    st.builds(lambda tone, size: tone[:size], tones, st.integers(1, 2000)),
    st.binary(min_size=1, max_size=200),
)
schemathesis.openapi.media_type("audio/*", recordings)


@schemathesis.hook
def before_load_schema(context: schemathesis.HookContext, description: dict[str, Any]) -> None:
    """This service has keys, so that to ask without one is no way to ask."""
    for path in description["paths"].values():
        for operation in path.values():
            if {} in operation.get("security", []):
                operation["security"].remove({})


PLAUSIBLE = {
    "id": ["a", "b", "c", "seed-0", "seed-2"],
    "collection": ["default", "tenant", "other", "new"],
    "lang": ["fa", "en-GB", "zh-Hans", "de"],
    "metadata": ['{"n": 1}', '{"n": 2, "who": "x"}', "{}"],
    "q": ["bees in winter", "قطار", "電車"],
    "like": ["seed-0", "seed-2", "a"],
    "url": ["https://nowhere.invalid/a.wav", "https://nowhere.invalid:1/", "https://localhost/a.wav"],
}


@schemathesis.hook
def filter_query(context: schemathesis.HookContext, query: Any) -> bool:
    """A parameter left empty, as an HTML form sends it, is one not given (of several, the last counts): it
    violates nothing."""
    return not any(
        item in ("", []) or (isinstance(item, list) and item[-1] == "") for item in (query or {}).values()
    )


@schemathesis.hook
def map_query(context: schemathesis.HookContext, query: Any) -> Any:
    if "{" in context.operation.path:
        return query  # chains of calls say themselves where what they made is
    return _plausible(query, random.Random(repr(query)))


@schemathesis.hook
def flatmap_body(context: schemathesis.HookContext, body: Any) -> st.SearchStrategy[Any]:
    """Forms carry a recording mostly: random bytes never get past the decoder."""
    body = _plausible(body, random.Random(repr(body)))
    if isinstance(body, dict) and "file" in body:
        return st.one_of(recordings.map(lambda file: body | {"file": file}), st.just(body))
    return st.just(body)


def _plausible(value: Any, choice: random.Random) -> Any:
    """Half of the short words that the description leaves open become such as somebody would send."""
    if isinstance(value, list):
        return [_plausible(item, choice) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        name: choice.choice(PLAUSIBLE[name])
        if name in PLAUSIBLE and isinstance(item, str) and len(item) <= 128 and choice.random() < 0.5
        else _plausible(item, choice)
        for name, item in value.items()
    }


@schemathesis.check
def only_stated_server_errors(
    context: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    """An unexpected error is a bug, whoever provoked it."""
    if response.status_code >= 500:
        assert response.status_code in STATED, f"{response.status_code} is not stated"
    if response.status_code in (429, 503):
        assert int(response.headers["retry-after"][0]) > 0


@schemathesis.check
def errors_are_problems(
    context: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    """One form for all layers, with a code that is in the table and means this status."""
    if response.status_code < 400 or case.method == "HEAD":
        return
    assert response.headers["content-type"] == ["application/problem+json"]
    problem = response.json()
    assert STATUS_OF[problem["code"]] == problem["status"] == response.status_code, problem
    assert response.headers.get("x-request-id", [""]) == [problem["request_id"]], problem
    assert problem["request_id"] or len(_address(response)) > MAX_ADDRESS, problem


def _address(response: schemathesis.Response) -> str:
    return str(response.request.path_url)


@schemathesis.check
def what_is_described_is_understood(
    context: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    """A request that the description allows may name what does not exist, but is of the right form."""
    if case.meta is None or not case.meta.generation.mode.is_positive or response.status_code < 400:
        return
    problem = response.json()
    if any(error["pointer"] == "/query" for error in problem.get("errors", [])):
        return  # about several parameters at once, of which a description can say nothing
    assert problem["code"] not in FORM_ERRORS or len(_address(response)) > MAX_ADDRESS, problem


@schemathesis.check
def keys_keep_to_their_scopes(
    context: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    """By the scopes that the description gives each call, so that no call is forgotten."""
    needed = {
        scope
        for way in case.operation.definition.raw.get("security", [])
        for scopes in way.values()
        for scope in scopes
    }
    if response.status_code < 400 and "admin" not in KEY["scopes"]:
        assert needed <= set(KEY["scopes"]), f"{needed} is needed, and the key has {KEY['scopes']}"


@schemathesis.check
def keys_keep_to_their_collections(
    context: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    """Nothing that a tenant is shown is another's."""
    if KEY["collections"] and response.headers.get("content-type") == ["application/json"]:
        assert set(_collections(response.json())) <= set(KEY["collections"])


def _collections(value: Any) -> Iterator[str]:
    """What stands under `collection` beside an `id`, at any depth."""
    if isinstance(value, list):
        for item in value:
            yield from _collections(item)
    elif isinstance(value, dict):
        if "id" in value and "collection" in value:
            yield value["collection"]
        for name, item in value.items():
            if name != "metadata":
                yield from _collections(item)
