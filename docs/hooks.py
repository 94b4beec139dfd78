"""What mkdocs.yml cannot say: pages that are made from the program, and one rule for links.

Links are written as GitHub wants them: relative to the file they stand in, to a file that is there. In the
site, those to Markdown that is a page lead to the page, and any other file of the repository travels with the
site, so that nobody is sent to a host. A link to a folder, or to nothing, fails the build.
"""

import json
import logging
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mermaidx
import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.cli import get_docs_for_click

from app.cli import cli
from app.settings import Settings

ROOT = Path(__file__).parent.parent
ELSEWHERE = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "samples.md": "app/samples/README.md",
    "models/mini.md": "clasp_core/weights/mini/README.md",
    "models/hybrid.md": "clasp_core/weights/hybrid/README.md",
}
"""Pages whose source is outside of docs/."""
PAGE_OF = {source: uri for uri, source in ELSEWHERE.items()}
PAGE_OF |= {"README.md": "index.md", "client/README.md": "client.md"}  # the pages on the same
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)(?=[)#\s])")
log = logging.getLogger("mkdocs.plugins.hooks")


def on_config(config: MkDocsConfig) -> None:
    """Diagrams are drawn here, so that no page needs a script for them."""
    fence = {"name": "mermaid", "class": "diagram", "format": _diagram}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages from elsewhere, the reference, and all files that any page links to."""
    for uri, source in ELSEWHERE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
    for name, make in {"settings": settings, "http": http, "command-line": command_line}.items():
        files.append(File.generated(config, f"reference/{name}.md", content=make()))
    for page in files.documentation_pages():
        for target in LINK.findall(page.content_string):
            path, uri = _resolved(page.src_uri, target)
            if uri.startswith("files/") and (ROOT / path).is_file() and uri not in files.src_uris:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""

    def in_the_site(link: re.Match[str]) -> str:
        path, uri = _resolved(page.file.src_uri, link[1])
        if not (ROOT / path).is_file() and uri not in files.src_uris:
            log.warning(f"{page.file.src_uri}: there is no file {path}")
        return posixpath.relpath(uri, posixpath.dirname(page.file.src_uri))

    return LINK.sub(in_the_site, markdown)


def on_post_page(output: str, *, page: Page, config: MkDocsConfig) -> str:
    """The theme's search dialog has no name that a screen reader could say."""
    return output.replace('role="dialog"', 'role="dialog" aria-label="Search"')


def _resolved(page: str, target: str) -> tuple[str, str]:
    """The file that a link of a page means, from the repository's root, and where the site has it."""
    source = ELSEWHERE.get(page, f"docs/{page}")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    inside = path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}"
    return path, PAGE_OF.get(path, inside)


def _diagram(source: str, language: str, css_class: str, options: object, md: object, **more: object) -> str:
    return f'<div class="{css_class}">{mermaidx.render(source).svg()}</div>'


# --- the reference


def settings() -> str:
    """Every setting, from `app/settings.py`."""
    lines = [
        "---\nhide: [toc]\n---\n# Settings",
        "",
        "Environment variables, or lines of a `.env` file; `clasp serve --help` shows the same.",
        "",
        "| setting | values | default | |",
        "| --- | --- | --- | --- |",
    ]
    for name, schema in Settings.model_json_schema(by_alias=False)["properties"].items():
        default = json.dumps(schema.get("default"), ensure_ascii=False)
        default = "" if default in ("null", '""', "[]") else f"`{default.strip(chr(34))}`"
        about = _cell(schema["description"])
        lines.append(f"| `CLASP_{name.upper()}` | {_kind(schema)} | {default} | {about} |")
    return "\n".join(lines)


def command_line() -> str:
    """Every verb of `clasp`, from its own help."""
    command = typer.main.get_command(cli)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="clasp", title="Command line")
    return re.sub(r"(`[^`\n]*`|^\$ .*$)|([\[<](?=\w))", _escaped, text, flags=re.MULTILINE)


def _escaped(found: re.Match[str]) -> str:
    """Help is no Markdown, but for what stands in backticks."""
    return found[1] or "\\" + found[2]


def http() -> str:
    """The API, from its description, which tests hold to be the service's own."""
    api = json.loads((ROOT / "tests" / "golden" / "openapi.json").read_text(encoding="utf-8"))
    return "\n".join(_http_lines(api))


def _http_lines(api: dict[str, Any]) -> Iterator[str]:
    yield "# HTTP\n"
    yield api["info"]["description"] + "\n"
    yield "A running service shows the same at `/docs`, and as OpenAPI at `/openapi.json`.\n"
    for path, calls in api["paths"].items():
        for method, call in calls.items():
            yield f"## {method.upper()} {path}\n"
            scopes = {scope for way in call.get("security", ()) for names in way.values() for scope in names}
            needs = f" Scope: `{', '.join(sorted(scopes))}`." if scopes else ""
            yield f"{call.get('summary', '')}.{needs}\n\n{call.get('description', '')}\n"
            if parameters := call.get("parameters"):
                yield "| parameter | in | values | |\n| --- | --- | --- | --- |"
                for given in parameters:
                    needed = ", required" if given.get("required") else ""
                    about = _cell(given.get("description", ""))
                    kind = _allowed(given["schema"] if "schema" in given else _content(given)[0][1])
                    yield f"| `{given['name']}` | {given['in']}{needed} | {kind} | {about} |"
                yield ""
            for media_type, schema in _content(call.get("requestBody", {})):
                yield f"Body, `{media_type}`: {_kind(schema)}\n"
                yield from _members(schema)
            yield "| answer | | body |\n| --- | --- | --- |"
            for status, answer in call["responses"].items():
                bodies = ", ".join(_kind(schema) for _, schema in _content(answer))
                yield f"| {status} | {_cell(answer['description'])} | {bodies} |"
            yield ""
    yield "## Bodies\n"
    for name, schema in api["components"]["schemas"].items():
        yield f"### {name}\n\n{schema.get('description', '')}\n"
        yield from _members(schema)


def _content(described: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(kind, body.get("schema", {})) for kind, body in described.get("content", {}).items()]


def _members(schema: dict[str, Any]) -> Iterator[str]:
    if members := schema.get("properties"):
        yield "| member | values | |\n| --- | --- | --- |"
        for name, member in members.items():
            needed = "required. " if name in schema.get("required", ()) else ""
            yield f"| `{name}` | {_allowed(member)} | {needed}{_cell(member.get('description', ''))} |"
        yield ""


def _allowed(schema: dict[str, Any]) -> str:
    default = schema.get("default")
    return _kind(schema) + (
        f"; `{json.dumps(default)}` by default" if default not in (None, "", [], {}) else ""
    )


def _kind(schema: dict[str, Any]) -> str:
    """What a JSON schema allows, in a few words; for a table's cell."""
    if ref := schema.get("$ref"):
        name = ref.rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if values := schema.get("enum"):
        return ", ".join(f"`{value}`" for value in values)
    for several in ("anyOf", "oneOf"):
        if several in schema:
            kinds = [_kind(one) for one in schema[several] if one.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds))
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    words = [{"object": "object", "boolean": "true or false", None: "anything"}.get(schema.get("type"), "")]
    words[0] = words[0] or schema["type"]
    for name, sign in {
        "minimum": "at least",
        "exclusiveMinimum": "more than",
        "maximum": "at most",
        "exclusiveMaximum": "less than",
    }.items():
        if name in schema:
            words.append(f"{sign} {schema[name]:,}")
    if "maxLength" in schema:
        words.append(f"up to {schema['maxLength']:,} characters")
    return ", ".join(words)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
