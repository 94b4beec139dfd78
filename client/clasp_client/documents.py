"""What a found segment is to programs that read text: for the adapters."""

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

from clasp_client.answers import Hit, Segment

TEXT_MEMBERS = ("transcript", "text", "title", "name", "description")
"""Members of a recording's metadata that say what it is about, best first."""


def text_of(hit: Hit, segment: Segment, members: Sequence[str] = TEXT_MEMBERS) -> str:
    """What is said there, if the model wrote it down; else what the metadata says of the recording; else
    which part of which recording it is."""
    about = next((hit.metadata[name] for name in members if isinstance(hit.metadata.get(name), str)), None)
    return segment.transcript or about or f"{hit.id}, {segment.start_s:.1f} s to {segment.end_s:.1f} s"


def metadata_of(hit: Hit, segment: Segment, base_url: str) -> dict[str, Any]:
    """Where it is, how well it matches, and an address that plays it from there (a media fragment, in
    seconds)."""
    address = f"{base_url}{hit.links.content}?{urlencode({'collection': hit.collection})}"
    return {
        "id": hit.id,
        "collection": hit.collection,
        "start_s": segment.start_s,
        "end_s": segment.end_s,
        "score": segment.score,
        "confidence": hit.confidence,
        "lang": hit.lang,
        "source": f"{address}#t={segment.start_s:.2f},{segment.end_s:.2f}",
        "metadata": dict(hit.metadata),
    }


def name_of(hit: Hit, segment: Segment) -> str:
    """The same for the same segment, whatever was asked."""
    return f"{hit.collection}/{hit.id}#t={segment.start_s:.2f},{segment.end_s:.2f}"
