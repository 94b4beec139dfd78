"""`python -m tests.fuzz_api`: Schemathesis against a running service, by the service's own description.

    python -m tests.fuzz_api --cases 20000 --seed 1

A service with keys and the stand-in model is asked by four of them in turn: read and write, admin, one for a
single collection, one that may only read. Each round is a run of Schemathesis with a seed of its own, through
its phases (boundary values, random requests, and chains of calls: upload, record, content, deletion), with
those of its checks that hold here (tests/schemathesis.toml) and ours (tests/fuzz_hooks.py).

A line for each round as it ends, and a JSON summary; failures in Schemathesis' own words, with a command that
repeats each. Exit status 1 where anything failed, a worker died, or the log tells of a bug.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.audio_files import encode, speech
from tests.service import ROOT, RunningService, clasp

KEYS: dict[str, dict[str, list[str]]] = {
    "writer": {"scopes": ["read", "write"], "collections": []},
    "operator": {"scopes": ["admin"], "collections": []},
    "tenant": {"scopes": ["read", "write"], "collections": ["tenant"]},
    "reader": {"scopes": ["read"], "collections": []},
}
PHASES = "coverage,fuzzing,stateful"


class Fuzzed:
    """A service with keys and a few recordings, and what was found out about it."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.folder = folder
        self.keys = {name: _create_key(folder, name) for name in KEYS}
        self.service = RunningService(folder, program="tests.stand_in", **settings)
        self.cases = 0
        self.failures: Counter[str] = Counter()

    def start(self) -> None:
        self.service.client.headers["X-API-Key"] = self.keys["operator"]
        self.service.start()
        for seed, collection in enumerate(["default", "default", "tenant", "other"]):
            form = {"id": f"seed-{seed}", "collection": collection, "metadata": '{"n": 1}'}
            self.service.ready(encode(speech(1.0, seed=seed), 16_000), **form)

    def round(self, by: str, seed: int, *, examples: int, phases: str = PHASES) -> int:
        """One run of Schemathesis with the key `by`; how many requests it made up."""
        report = self.folder / "report.json"
        report.unlink(missing_ok=True)
        address = f"http://127.0.0.1:{self.service.port}/openapi.json"
        options = [f"--max-examples={examples}", f"--seed={seed}", f"--phases={phases}", "--no-color"]
        options += ["--generation-database=none", f"--report-json-path={report}"]
        config = ["--config-file", str(ROOT / "tests" / "schemathesis.toml")]
        key = ["-H", f"Authorization: Bearer {self.keys[by]}"]
        done = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", *config, "run", address, *key, *options],
            env=os.environ
            | {
                "SCHEMATHESIS_HOOKS": "tests.fuzz_hooks",
                "CLASP_FUZZ_KEY": json.dumps(KEYS[by]),
                "PYTHONPATH": str(ROOT),
            },
            cwd=self.folder,
            capture_output=True,
            text=True,
            errors="replace",
        )
        told = json.loads(report.read_text()) if report.exists() else {}
        count: int = told.get("test_cases", {}).get("generated", 0)
        self.cases += count
        for failure in told.get("failures", []):
            self.failures[failure["title"]] += failure["count"]
        if done.returncode != 0:
            print(f"=== {by}, seed {seed}\n{done.stdout}{done.stderr}", flush=True)
            if not told.get("failures"):
                self.failures["the run itself"] += 1
        return count

    def answers(self) -> dict[str, int]:
        """How many of each status the service gave, by its own count."""
        found: Counter[str] = Counter()
        for line in self.service.client.get("/metrics").raise_for_status().text.splitlines():
            if line.startswith("clasp_http_requests_total{"):
                found[line.partition('status="')[2].partition('"')[0]] += int(float(line.rpartition(" ")[2]))
        return dict(sorted(found.items()))

    def summary(self) -> dict[str, Any]:
        """The service is stopped for it."""
        answers, deaths = self.answers(), self.service.metric("clasp_worker_restarts_total")
        status = self.service.stop()
        log = self.service.log()
        bugs = log.count("unexpected error") + log.count("Traceback")
        good = not self.failures and not deaths and not bugs and status == 0
        return {
            "cases": self.cases,
            "answers": answers,
            "failures": dict(self.failures),
            "worker_deaths": int(deaths),
            "bugs_in_the_log": bugs,
            "passed": good,
        }


def _create_key(folder: Path, name: str) -> str:
    more = [part for collection in KEYS[name]["collections"] for part in ("--collection", collection)]
    made = clasp(
        "keys", "create", name, "--scope", ",".join(KEYS[name]["scopes"]), *more, "--json", cwd=folder
    )
    assert made.returncode == 0, made.stderr
    key: str = json.loads(made.stdout)["key"]
    return key


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--examples", type=int, default=60, help="random requests for each call in a round")
    parser.add_argument("--url-hosts", default="", help="CLASP_URL_HOSTS, such as nowhere.invalid")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        fuzzed = Fuzzed(Path(folder), url_hosts=options.url_hosts)
        with fuzzed.service:
            fuzzed.start()
            turn = 0
            while fuzzed.cases < options.cases:
                by, seed = list(KEYS)[turn % len(KEYS)], options.seed * 1000 + turn
                turn += 1
                if not fuzzed.round(by, seed, examples=options.examples):
                    break
                print(
                    f"{time.monotonic() - began:6.0f} s  {fuzzed.cases} cases, round {turn} by {by}, "
                    f"failures {dict(fuzzed.failures)}",
                    file=sys.stderr,
                    flush=True,
                )
            summary = fuzzed.summary() | {"rounds": turn, "seconds": round(time.monotonic() - began)}
    print(json.dumps(summary, indent=1))
    return 0 if summary["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
