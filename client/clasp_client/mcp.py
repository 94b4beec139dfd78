"""A tool server for assistants (Model Context Protocol), over standard input and output:
`pip install 'clasp-search-client[mcp]'`, then `clasp-mcp`.

It only reads. The service is the one of `CLASP_URL`, asked with the key in `CLASP_API_KEY`.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

try:
    from mcp.server import MCPServer
    from mcp.server.mcpserver.exceptions import ToolError
    from mcp.types import ToolAnnotations
except ImportError as error:
    raise ImportError("This needs pip install 'clasp-search-client[mcp]'") from error

from pydantic import Field, TypeAdapter

from clasp_client.answers import Collection, Record
from clasp_client.client import AsyncClient
from clasp_client.documents import metadata_of, text_of
from clasp_client.errors import ClaspError
from clasp_client.version import VERSION

INSTRUCTIONS = """Recordings of speech, searched by meaning: ask in any language for what somebody said, in
words like those that they may have used. Answers are passages with the recording's id, the seconds at which
it is said, a cosine and an address that plays it. There may be no transcript: what a passage says is then to
be listened to, and a low score (or confidence) may mean that nobody said it."""
_RECORD = TypeAdapter(Record)
READ_ONLY = ToolAnnotations(read_only_hint=True, idempotent_hint=True, open_world_hint=False)


def create_server(clasp: AsyncClient) -> MCPServer[Any]:
    """The server with its three tools."""
    server: MCPServer[Any] = MCPServer(
        "clasp-search", version=VERSION, instructions=INSTRUCTIONS, log_level="WARNING"
    )

    @server.tool(annotations=READ_ONLY)
    async def search_recordings(
        question: Annotated[str, Field(description="What was said, or what it was about; in any language.")],
        lang: Annotated[
            str | None, Field(description="The question's language as a BCP 47 tag, such as fa or en-GB.")
        ] = None,
        collection: Annotated[str | None, Field(description="Look in this collection only.")] = None,
        limit: Annotated[int, Field(ge=1, le=50, description="How many passages at most.")] = 10,
        only_likely: Annotated[
            bool, Field(description="Leave out what is probably no answer, as far as that was measured.")
        ] = False,
    ) -> list[dict[str, Any]]:
        """Find passages of recordings in which something was said; best first."""
        with _told():
            answer = await clasp.search(
                question,
                lang=lang,
                collection=collection,
                limit=limit,
                min_score="auto" if only_likely else None,
                group_by="segment",
            )
        return [
            {"text": text_of(hit, segment), **metadata_of(hit, segment, clasp.url(""))}
            for hit in answer.hits
            for segment in hit.segments
        ]

    @server.tool(annotations=READ_ONLY)
    async def get_recording(
        id: Annotated[str, Field(description="As search_recordings answers it.")],
        collection: Annotated[
            str | None, Field(description="Needed where several collections have a recording with this id.")
        ] = None,
    ) -> dict[str, Any]:
        """What is known of a recording: its status, length in seconds, language and metadata."""
        with _told():
            record = await clasp.get(id, collection=collection)
        known: dict[str, Any] = _RECORD.dump_python(record, mode="json")
        return known

    @server.tool(annotations=READ_ONLY)
    async def list_collections() -> list[Collection]:
        """The collections that can be searched, with how much is in each."""
        with _told():
            return list(await clasp.collections())

    return server


@contextmanager
def _told() -> Iterator[None]:
    """The service's errors are for the assistant to read; they hold no key."""
    try:
        yield
    except ClaspError as error:
        raise ToolError(str(error)) from error


def main() -> None:
    """The script `clasp-mcp`."""
    parser = argparse.ArgumentParser(prog="clasp-mcp", description=__doc__)
    parser.add_argument("--url", help="the service's address; by default CLASP_URL, or http://127.0.0.1:8000")
    options = parser.parse_args()  # no option for the key, which everybody could see in the list of processes
    create_server(AsyncClient(options.url)).run("stdio")


if __name__ == "__main__":
    main()
