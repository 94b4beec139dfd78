"""`python -m tests.fuzz_parsers TARGET`: fuzzing what reads strangers' bytes, led by coverage.

    pip install 'clasp-search[fuzz]'
    python -m tests.fuzz_parsers form --seconds 600

Targets are those of tests/fuzz_targets.py. Atheris (libFuzzer) looks for inputs that reach new lines of our
Python and of what parses for us; `decode` goes by seed only, since the decoders are C in other processes. An
input that fails is written to crash-* and repeated by `python -m tests.fuzz_parsers TARGET FILE`.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import atheris

INSTRUMENTED = ["app", "clasp_core", "python_multipart", "langcodes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("file", nargs="?", help="only this input")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.fuzz_targets import SEEDS, TARGETS
    with tempfile.TemporaryDirectory() as corpus:
        for number, content in enumerate(SEEDS[options.target]):
            (Path(corpus) / str(number)).write_bytes(content)
        flags = [
            f"-max_total_time={options.seconds}",
            f"-seed={options.seed}",
            "-timeout=120",
            "-print_final_stats=1",
        ]
        atheris.Setup([sys.argv[0], *flags, options.file or corpus], TARGETS[options.target])
        atheris.Fuzz()


if __name__ == "__main__":
    main()
