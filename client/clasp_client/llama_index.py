"""What was said in recordings, as LlamaIndex's nodes: `pip install 'clasp-search-client[llama-index]'`."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

try:
    from llama_index.core.base.base_retriever import BaseRetriever
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
except ImportError as error:
    raise ImportError("This needs pip install 'clasp-search-client[llama-index]'") from error


from clasp_client.answers import SearchAnswer
from clasp_client.client import AsyncClient, Client
from clasp_client.documents import TEXT_MEMBERS, metadata_of, name_of, text_of
from clasp_client.operations import MinScore


class ClaspRetriever(BaseRetriever):
    """Finds segments of recordings; each is a node with its cosine, best first. Texts and metadata are those
    of `clasp_client.langchain.ClaspRetriever`'s documents."""

    def __init__(
        self,
        client: Client,
        *,
        async_client: AsyncClient | None = None,
        similarity_top_k: int = 10,
        lang: str | None = None,
        collection: str | None = None,
        min_score: MinScore | None = None,
        filter: Mapping[str, Any] | None = None,
        text_members: Sequence[str] = TEXT_MEMBERS,
    ) -> None:
        """`aretrieve` asks `async_client` or, without one, `client` on a thread."""
        super().__init__()
        self._client = client
        self._async_client = async_client
        self._text_members = text_members
        self._options: dict[str, Any] = {
            "lang": lang,
            "limit": similarity_top_k,
            "collection": collection,
            "min_score": min_score,
            "filter": filter,
            "group_by": "segment",
        }

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self._nodes(self._client.search(query_bundle.query_str, **self._options))

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        if self._async_client is None:
            return await asyncio.to_thread(self._retrieve, query_bundle)
        return self._nodes(await self._async_client.search(query_bundle.query_str, **self._options))

    def _nodes(self, answer: SearchAnswer) -> list[NodeWithScore]:
        return [
            NodeWithScore(
                node=TextNode(
                    id_=name_of(hit, segment),
                    text=text_of(hit, segment, self._text_members),
                    metadata=metadata_of(hit, segment, self._client.url("")),
                ),
                score=segment.score,
            )
            for hit in answer.hits
            for segment in hit.segments
        ]
