"""What a data set holds, in the figures of the paper's Table 1, and its card."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from clasp_core.manifest import ManifestItem

_TOKEN = re.compile(
    r"[\u0e00-\u0e7f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"  # written without spaces: a letter
    r"|\w+(?:['\u2019\u200c.,-]\w+)*"  # one word: don't, 3.5, well-known, می‌روم
    r"|[^\w\s]"
)

_LISTED = 100  # values of a field on a card: categories and voices, but not a thousand speakers


def tokens(text: str) -> list[str]:
    """Words, numbers and punctuation marks, as the Brown corpus counts them; case is kept.

    Thai, Khmer, Chinese and Japanese, which do not part words, count letters.
    """
    return _TOKEN.findall(text)


def describe(items: Iterable[ManifestItem]) -> dict[str, Any]:
    """`sentences`, `unique_texts`, `hours` (None where a `duration_s` is missing), `unique_tokens`,
    `mean_tokens`, `max_tokens`, `speakers`, and `by`: for each field that any item has, its values with
    `sentences` and `hours`, the most frequent first.
    """
    items = list(items)
    counted = [tokens(item.text) for item in items]
    groups = {field: _grouped(items, field) for field in ("split", "lang", "category", "speaker", "source")}
    return {
        "sentences": len(items),
        "unique_texts": len({item.text for item in items}),
        "hours": _hours(items),
        "unique_tokens": len({token for sentence in counted for token in sentence}),
        "mean_tokens": round(sum(map(len, counted)) / max(len(items), 1), 2),
        "max_tokens": max(map(len, counted), default=0),
        "speakers": len({item.speaker for item in items} - {None}),
        "by": {field: values for field, values in groups.items() if values},
    }


def _grouped(items: Sequence[ManifestItem], field: str) -> dict[str, dict[str, Any]]:
    values: dict[str, list[ManifestItem]] = {}
    for item in items:
        value = item.extra.get(field) if field == "category" else getattr(item, field)
        if value is not None:
            values.setdefault(str(value), []).append(item)
    biggest = sorted(values, key=lambda value: (-len(values[value]), value))
    return {value: {"sentences": len(values[value]), "hours": _hours(values[value])} for value in biggest}


def _hours(items: Sequence[ManifestItem]) -> float | None:
    durations = [item.extra.get("duration_s") for item in items]
    if not all(isinstance(duration, (int, float)) for duration in durations):
        return None
    return round(sum(map(float, durations)) / 3600, 4)  # type: ignore[arg-type]


def card(
    title: str, figures: Mapping[str, Any], facts: Mapping[str, str], reservations: Sequence[str]
) -> str:
    """A data set's README.md: Table 1's row, how it was made (`facts`), its parts, and what to mind."""
    hours = "unknown" if figures["hours"] is None else f"{figures['hours']:.2f}"
    lines = [
        f"# {title}",
        "",
        "| sentences | hours | unique tokens | mean tokens | longest | speakers |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| {figures['sentences']:,} | {hours} | {figures['unique_tokens']:,} | {figures['mean_tokens']:.2f}"
        f" | {figures['max_tokens']} | {figures['speakers']} |",
        "",
        "Tokens are words, numbers and punctuation marks, case kept.",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
    ]
    for field, values in figures["by"].items():
        lines += ["", f"## By {field}", "", f"| {field} | sentences | hours |", "| --- | --- | --- |"]
        for value, part in list(values.items())[:_LISTED]:
            long = "unknown" if part["hours"] is None else f"{part['hours']:.2f}"
            lines.append(f"| {value} | {part['sentences']:,} | {long} |")
        if len(values) > _LISTED:
            lines.append(f"| and {len(values) - _LISTED:,} more | | |")
    if reservations:
        lines += ["", "## To mind", "", *(f"- {reservation}" for reservation in reservations)]
    return "\n".join(lines) + "\n"


def most_common(reasons: Iterable[str]) -> dict[str, int]:
    """How often each reason was given, the most frequent first."""
    return dict(Counter(reasons).most_common())
