"""The page for people at `/` with its files below `/page/`, and `/docs`, the API's description to read.

All of it may be had without a key, since it says nothing of recordings; nothing of it comes from elsewhere.
"""

import html
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response

from app.errors import HttpError
from app.preconditions import unless_known
from app.routes import IfNoneMatch
from clasp_core.access import SCOPES

PAGE = Path(__file__).parent / "page"
SAMPLES = Path(__file__).parent / "samples"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " img-src 'self' data: blob:; media-src 'self' blob:; connect-src 'self'; font-src 'self';"
    " manifest-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "microphone=(self)",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, but asked for again: another version of us has another page
}
MEDIA_TYPES = {
    # not the machine's own table, which may lack some: browsers run no module of another type
    ".css": "text/css",
    ".flac": "audio/flac",
    ".html": "text/html",
    ".js": "text/javascript",
    ".json": "application/json",
    ".jsonl": "application/x-ndjson",
    ".md": "text/markdown",
    ".mp3": "audio/mpeg",
    ".ogg": "audio/ogg",
    ".opus": "audio/ogg",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
    ".wav": "audio/wav",
    ".webmanifest": "application/manifest+json",
    ".webp": "image/webp",
    ".woff2": "font/woff2",
}

pages = APIRouter(include_in_schema=False)


def _files() -> dict[str, Path]:
    """What there is below `/page/`, so that no client's path is ever one of the disk's."""
    found = {}
    for folder, below in ((PAGE, ""), (SAMPLES, "samples/")):
        for path in folder.rglob("*"):
            if path.suffix in MEDIA_TYPES and path.is_file():
                found[below + path.relative_to(folder).as_posix()] = path
    return found


_FILES = _files()


@pages.get("/")
@pages.head("/")
def page(if_none_match: IfNoneMatch = None) -> Response:
    return _file("index.html", if_none_match)


@pages.get("/page/{name:path}")
@pages.head("/page/{name:path}")
def page_file(name: str, if_none_match: IfNoneMatch = None) -> Response:
    if name not in _FILES:
        raise HttpError("not_found", "There is nothing at this address.")
    return _file(name, if_none_match)


@pages.get("/docs")
@pages.head("/docs")
def docs(request: Request, if_none_match: IfNoneMatch = None) -> Response:
    return _answer(_described(request.app.openapi()).encode(), ".html", if_none_match)


def _file(name: str, if_none_match: list[str] | None) -> Response:
    path = _FILES[name]
    return _answer(path.read_bytes(), path.suffix, if_none_match)


def _answer(content: bytes, suffix: str, if_none_match: list[str] | None) -> Response:
    return unless_known(content, MEDIA_TYPES[suffix], HEADERS, if_none_match or [])


def _described(api: dict[str, Any]) -> str:
    """The description as a page without any script: Swagger's comes from a foreign host."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(api['info']['title'])}: the API</title>",
        '<link rel="stylesheet" href="/page/docs.css"></head><body><main>',
        f"<h1>{_text(api['info']['title'])} {_text(api['info']['version'])}</h1>",
        *(f"<p>{_text(paragraph)}</p>" for paragraph in api["info"]["description"].split("\n\n")),
        '<p>For programs: <a href="/openapi.json">openapi.json</a>.</p>',
    ]
    for path, operations in api["paths"].items():
        for method, operation in operations.items():
            parts.append(_operation(f"{method.upper()} {path}", operation))
    return "\n".join([*parts, "</main></body></html>\n"])


def _operation(call: str, operation: dict[str, Any]) -> str:
    needed = {scope for way in operation.get("security", []) for scopes in way.values() for scope in scopes}
    scope = "".join(f" Scope: <code>{name}</code>." for name in SCOPES if name in needed)
    bodies = operation.get("requestBody", {}).get("content", {})
    body = ", ".join(f"<code>{_text(kind)}</code>" for kind in bodies)
    parts = [
        f"<section><h2><code>{_text(call)}</code></h2>",
        f"<p>{_text(operation['summary'])}.{scope}{f' Body: {body}.' if body else ''}</p>",
    ]
    if parameters := operation.get("parameters"):
        parts.append("<dl>")
        for one in parameters:
            told = one.get("description") or one.get("schema", {}).get("description") or ""
            also = ", needed" if one.get("required") else ""
            parts.append(f"<dt><code>{_text(one['name'])}</code> ({one['in']}{also})</dt>")
            parts.append(f"<dd>{_text(told)}</dd>")
        parts.append("</dl>")
    answers = ", ".join(
        f"{status} {_text(one['description'])}" for status, one in operation["responses"].items()
    )
    return "\n".join([*parts, f"<p>Answers: {answers}</p></section>"])


def _text(text: str) -> str:
    """With its code set off."""
    pieces = html.escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if at % 2 else piece for at, piece in enumerate(pieces))
