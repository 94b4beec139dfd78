"""LangChain, LlamaIndex and an MCP client, each the real one, find what is in the real service; and the
examples of the client's documentation, which use them all, run."""

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clasp_client import AsyncClient, Client
from tests.audio_files import encode, tone
from tests.conftest import SAMPLES, Sample
from tests.service import ROOT, RunningService

TITLE = "زنبورها در زمستان"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service in which one recording has a title and the other none."""
    with RunningService(tmp_path_factory.mktemp("adapters"), program="tests.stand_in") as service:
        service.start()
        url = str(service.client.base_url).rstrip("/")
        with Client(url) as clasp:
            for id, metadata in [("bees", {"title": TITLE, "year": 2026}), ("noise", None)]:
                content = encode(tone(1.5, frequency=300 + len(id)), 16_000)
                clasp.upload(content, id=id, lang="fa", metadata=metadata, collection="news", wait=30)
        yield url


@pytest.fixture
def clasp(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


def check(found: list[tuple[str, dict[str, Any]]], url: str) -> None:
    """Texts and metadata of both recordings, best first."""
    assert len(found) == 2
    about = {metadata["id"]: (text, metadata) for text, metadata in found}
    text, metadata = about["bees"]
    assert text == TITLE
    assert metadata["metadata"] == {"title": TITLE, "year": 2026}
    assert (metadata["start_s"], metadata["collection"], metadata["lang"]) == (0.0, "news", "fa")
    assert metadata["source"].startswith(f"{url}/audio/bees/content?collection=news#t=0.00,1.")
    assert about["noise"][0].startswith("noise, 0.0 s to 1.")
    assert found[0][1]["score"] >= found[1][1]["score"]


def test_langchain(clasp: Client, url: str) -> None:
    """A chain gets documents from a retriever by `invoke`, or by `ainvoke` where it is asynchronous."""
    from clasp_client.langchain import ClaspRetriever

    retriever = ClaspRetriever(client=clasp, collection="news", k=5)
    documents = retriever.invoke("bees in winter")
    check([(document.page_content, document.metadata) for document in documents], url)
    assert {document.id.split("#")[0] for document in documents if document.id} == {"news/bees", "news/noise"}

    async def asked() -> list[Any]:
        async with AsyncClient(url) as later:
            both = retriever.model_copy(update={"async_client": later})
            return [await asking.ainvoke("bees in winter") for asking in (retriever, both)]

    assert asyncio.run(asked()) == [documents, documents]
    chain = retriever | (lambda found: [document.metadata["id"] for document in found])
    narrow = ClaspRetriever(client=clasp, filter={"metadata": {"year": {"gte": 2026}}}, text_members=["id"])
    assert chain.invoke("bees")
    (only,) = narrow.invoke("bees")
    assert only.page_content.startswith("bees, 0.0 s")


def test_llama_index(clasp: Client, url: str) -> None:
    """A query engine gets nodes from a retriever by `retrieve`, or by `aretrieve` where it is
    asynchronous."""
    from clasp_client.llama_index import ClaspRetriever

    retriever = ClaspRetriever(clasp, collection="news", similarity_top_k=5)
    nodes = retriever.retrieve("bees in winter")
    check([(node.text, node.metadata) for node in nodes], url)
    assert [node.score for node in nodes] == [node.metadata["score"] for node in nodes]

    async def asked() -> list[Any]:
        async with AsyncClient(url) as later:
            both = ClaspRetriever(clasp, async_client=later, collection="news", similarity_top_k=5)
            return [await asking.aretrieve("bees in winter") for asking in (retriever, both)]

    assert asyncio.run(asked()) == [nodes, nodes]


def test_mcp(url: str) -> None:
    """An assistant starts `clasp-mcp`, sees three tools that only read, and finds, and hears what went
    wrong."""
    from mcp import Client as Assistant
    from mcp.client.stdio import StdioServerParameters

    environment = {"CLASP_URL": url, "PYTHONPATH": f"{ROOT / 'client'}", "PATH": os.environ["PATH"]}
    program = StdioServerParameters(command=sys.executable, args=["-m", "clasp_client.mcp"], env=environment)

    async def asked() -> None:
        async with Assistant(program) as assistant:
            assert "seconds" in (assistant.instructions or "")
            tools = {tool.name: tool for tool in (await assistant.list_tools()).tools}
            assert set(tools) == {"search_recordings", "get_recording", "list_collections"}
            assert all(tool.annotations and tool.annotations.read_only_hint for tool in tools.values())

            found = await assistant.call_tool("search_recordings", {"question": "bees", "lang": "en"})
            assert not found.is_error
            passages = (found.structured_content or {})["result"]
            check([(passage["text"], passage) for passage in passages], url)

            listed = await assistant.call_tool("list_collections", {})
            (news,) = (listed.structured_content or {})["result"]
            assert (news["name"], news["recordings"]) == ("news", 2)

            recording = await assistant.call_tool("get_recording", {"id": "bees"})
            assert (recording.structured_content or {})["metadata"]["title"] == TITLE
            missing = await assistant.call_tool("get_recording", {"id": "nobody"})
            assert missing.is_error
            assert "recording_not_found" in str(missing.content)

    asyncio.run(asked())


def test_a_missing_extra_is_named() -> None:
    """`No module named 'mcp'` is no help to who installed the client without extras."""
    for framework, module in [
        ("langchain_core", "langchain"),
        ("llama_index", "llama_index"),
        ("mcp", "mcp"),
    ]:
        code = f"import sys; sys.modules[{framework!r}] = None; import clasp_client.{module}"
        environment = os.environ | {"PYTHONPATH": str(ROOT / "client")}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert f"pip install 'clasp-search-client[{module.replace('_', '-')}]'" in done.stderr


def test_the_examples_of_the_documentation_run(
    url: str, samples: dict[str, Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """As they stand, one after the other, in a folder that holds what they speak of."""
    (tmp_path / "recordings").mkdir()
    (tmp_path / "bees.opus").write_bytes(samples["en-bees"].content)
    (tmp_path / "recordings" / "dog.opus").write_bytes(samples["en-lost-dog"].content)
    (tmp_path / "recordings" / "letter.txt").write_bytes(b"no recording")
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "samples").symlink_to(SAMPLES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLASP_URL", url)
    with Client(url) as clasp:
        clasp.delete("bees")  # the examples have another
    for page in ("docs/client.md", "client/README.md", "README.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        namespace: dict[str, Any] = {}
        for example in examples:
            if "clasp_core" not in example:
                exec(example.replace("http://127.0.0.1:8000", url), namespace)
        for made in namespace.values():
            if isinstance(made, Client):
                made.close()
    told = capsys.readouterr().out
    assert "ready 5.4" in told
    assert re.search("letter failed: .*undecodable_audio", told)
    assert "recording_not_found" in told
    assert (tmp_path / "again.opus").read_bytes() == samples["en-bees"].content
