"""The API's description: pinned, complete, and true of the errors."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.golden.make import GOLDEN
from tests.service import RunningService

METHODS = {"get", "put", "post", "delete", "patch"}
CONTRACT = {
    "/audio": {"get", "post"},
    "/audio/delete": {"post"},
    "/audio/{id}": {"get", "patch", "delete"},
    "/audio/{id}/content": {"get"},
    "/audio/{id}/waveform": {"get"},
    "/search": {"get", "post"},
    "/search/audio": {"post"},
    "/collections": {"get"},
    "/session": {"get", "post", "delete"},
    "/healthz": {"get"},
    "/readyz": {"get"},
    "/metrics": {"get"},
}


@pytest.fixture(scope="module")
def described(service: RunningService) -> dict[str, Any]:
    """What the running service says of itself."""
    return service.client.get("/openapi.json").raise_for_status().json()


def test_the_description_is_the_pinned_one(described: dict[str, Any]) -> None:
    """Client code is generated from it: a change must be seen and meant. `make golden` pins it anew."""
    assert described == json.loads((GOLDEN / "openapi.json").read_text())


def test_every_path_of_the_contract_is_there(described: dict[str, Any]) -> None:
    """And no undocumented one beside them."""
    assert {path: set(item) & METHODS for path, item in described["paths"].items()} == CONTRACT


def test_every_operation_documents_its_errors(described: dict[str, Any]) -> None:
    """Generated clients turn documented errors into typed ones, and FastAPI's own 422 is never sent."""
    for path, item in described["paths"].items():
        for method in set(item) & METHODS:
            responses = item[method]["responses"]
            assert "application/problem+json" in responses["default"]["content"], (method, path)
            assert "422" not in responses
            assert item[method]["summary"]


def test_references_lead_somewhere(described: dict[str, Any]) -> None:
    """A dangling reference makes generators fail on the whole file."""

    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from ([value["$ref"]] if isinstance(value.get("$ref"), str) else [])
            for member in value.values():
                yield from references(member)
        elif isinstance(value, list):
            for member in value:
                yield from references(member)

    for reference in references(described):
        place = described
        for step in reference.removeprefix("#/").split("/"):
            place = place[step]


def test_uploads_are_described_both_ways(described: dict[str, Any]) -> None:
    """The form and the raw body cannot be seen in our code's signatures, so they are said by hand."""
    content = described["paths"]["/audio"]["post"]["requestBody"]["content"]
    assert content["multipart/form-data"]["schema"]["properties"].keys() == {
        "file",
        "id",
        "lang",
        "collection",
        "metadata",
    }
    assert "audio/*" in content


def test_the_page_for_people_is_served(service: RunningService) -> None:
    """`/docs` is where most people try an API first."""
    assert service.client.get("/docs").status_code == 200
