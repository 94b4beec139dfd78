"""Looks for keys committed by mistake: `python -m tests.secrets_check [FOLDER]`, part of `make check`.

Reads the files of a folder that git tracks or would track, by the rules of detect-secrets for what keys of
well-known services look like, and one for ours. Asks no network. Its rules that guess, by entropy or by a
neighbouring word, are left out: this project is full of hashes, and a check that cries wolf is switched off.
Prints places, never what stands there. A line that must look like a key ends with the comment
`pragma: allowlist secret`.
"""

import re
import subprocess
import sys
from pathlib import Path

from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
from detect_secrets.core.scan import scan_file
from detect_secrets.plugins.base import RegexBasedDetector
from detect_secrets.settings import transient_settings

GUESSING = {"Base64HighEntropyString", "HexHighEntropyString", "KeywordDetector", "IPPublicDetector"}
NO_PASSWORDS = r"(?i)^(password|secret|pass|p%40ss|sesame-7|hush-hush|\{port\})$"
"""What stands for one in URLs of the documentation and of tests."""
NAME_OF_TEST = r"^def test_\w+\("
"""Long enough for a rule or another to take its middle for a token."""


class ClaspKeyDetector(RegexBasedDetector):
    """A key of `clasp keys create` (docs/security.md)."""

    secret_type = "clasp-search API key"
    denylist = (re.compile(r"clasp_[0-9a-f]{12}_[0-9a-f]{64}"),)


def found(folder: Path) -> list[str]:
    """`path:line: kind` of all that look like keys."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=folder,
        capture_output=True,
        check=True,
    )
    names = [name for name in listed.stdout.decode().split("\0") if name]
    plugins = [kind.__name__ for kind in get_mapping_from_secret_type_to_class().values()]
    get_mapping_from_secret_type_to_class.cache_clear()  # it remembers that ours was not among them
    settings = {
        "plugins_used": [
            *({"name": name} for name in plugins if name not in GUESSING),
            {"name": "ClaspKeyDetector", "path": f"file://{Path(__file__).resolve()}"},
        ],
        "filters_used": [
            {"path": "detect_secrets.filters.allowlist.is_line_allowlisted"},
            {"path": "detect_secrets.filters.regex.should_exclude_secret", "pattern": [NO_PASSWORDS]},
            {"path": "detect_secrets.filters.regex.should_exclude_line", "pattern": [NAME_OF_TEST]},
        ],
    }
    with transient_settings(settings):
        return [
            f"{name}:{secret.line_number}: {secret.type}"
            for name in names
            if (folder / name).is_file()
            for secret in scan_file(str(folder / name))
        ]


if __name__ == "__main__":
    places = found(Path(*sys.argv[1:]))
    print("\n".join(places) or "no keys")
    sys.exit(bool(places))
