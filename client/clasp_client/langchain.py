"""What was said in recordings, as LangChain's documents: `pip install 'clasp-search-client[langchain]'`."""

from collections.abc import Mapping, Sequence
from typing import Any

try:
    from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever
except ImportError as error:
    raise ImportError("This needs pip install 'clasp-search-client[langchain]'") from error

from pydantic import Field

from clasp_client.answers import SearchAnswer
from clasp_client.client import AsyncClient, Client
from clasp_client.documents import TEXT_MEMBERS, metadata_of, name_of, text_of
from clasp_client.operations import MinScore


class ClaspRetriever(BaseRetriever):
    """Finds segments of recordings; each is a document, best first.

    Its text is what was heard there, if the service's model writes that down (`hybrid` does), else the first
    of `text_members` that the recording's metadata has, else its id and times. Its metadata say where it is
    (`id`, `collection`, `start_s`, `end_s`), how well it matches (`score`, `confidence`), an address that
    plays it (`source`), and the recording's own `metadata`.
    """

    client: Client = Field(exclude=True, repr=False)
    async_client: AsyncClient | None = Field(default=None, exclude=True, repr=False)
    """For `ainvoke`; without it, that asks `client` on a thread."""
    k: int = 10
    """How many documents at most."""
    lang: str | None = None
    """BCP 47 tag of the questions: a hint."""
    collection: str | None = None
    min_score: MinScore | None = None
    filter: Mapping[str, Any] | None = None
    text_members: Sequence[str] = TEXT_MEMBERS

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        return self._documents(self.client.search(query, **self._options()))

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun
    ) -> list[Document]:
        if self.async_client is None:
            return await super()._aget_relevant_documents(query, run_manager=run_manager)
        return self._documents(await self.async_client.search(query, **self._options()))

    def _options(self) -> dict[str, Any]:
        return {
            "lang": self.lang,
            "limit": self.k,
            "collection": self.collection,
            "min_score": self.min_score,
            "filter": self.filter,
            "group_by": "segment",
        }

    def _documents(self, answer: SearchAnswer) -> list[Document]:
        return [
            Document(
                id=name_of(hit, segment),
                page_content=text_of(hit, segment, self.text_members),
                metadata=metadata_of(hit, segment, self.client.url("")),
            )
            for hit in answer.hits
            for segment in hit.segments
        ]
