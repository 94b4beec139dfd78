# Everything from a clean checkout; Python 3.11+ and make are all that is needed.
#   make demo    index the bundled recordings and ask about them in several languages
#   make serve   serve on 127.0.0.1:8000
#   make test    the test suite            make check   format, lint, types, import rules, containers, keys
#   make dist    wheels, source archives   make wheel-check   the wheel in an empty environment
#   make audit   known holes in the pinned versions (needs the internet)
#   make bench   side-by-side measurements make golden  regenerate what tests pin
#   make docs    the documentation, site/index.html
# Settings: PYTHON, VENV, and CLASP_TORCH_INDEX, the package index of torch's CPU build, for machines
# whose default index serves CUDA builds (none is installed on a machine whose index serves CPU builds).

PYTHON ?= python3
VENV ?= .venv
AUDIT_SERVICE ?= pypi
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo serve test test-slow test-scaled check dist wheel-check audit bench infinity golden docs train clean

help:
	@sed -n '2,7s/^# *//p' Makefile

$(VENV)/base: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(CLASP_TORCH_INDEX),--index-url $(CLASP_TORCH_INDEX),) torch
	$(PIP) --editable .
	touch $@

$(VENV)/dev: $(VENV)/base client/pyproject.toml
	$(PIP) --editable '.[dev]' --editable './client[langchain,llama-index,mcp]'
	touch $@

# Without a C++ compiler there is no hnswlib; its rows are left out then.
$(VENV)/bench: $(VENV)/dev
	$(PIP) --editable '.[bench]' || $(PIP) usearch threadpoolctl
	touch $@

demo: $(VENV)/base
	$(BIN)/clasp demo

serve: $(VENV)/base
	$(BIN)/clasp serve

test: $(VENV)/dev
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/dev
	$(BIN)/python -m pytest -m slow

# The tests over HTTP once more, with the catalogue in PostgreSQL and the vectors in Milvus.
test-scaled: $(VENV)/dev
	CLASP_TEST_DATABASE=postgresql CLASP_TEST_VECTOR_STORE=milvus \
		$(BIN)/python -m pytest tests/app --numprocesses 3 --dist loadfile --no-loadscope-reorder

check: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile
	$(BIN)/oxlint --deny-warnings app/page
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
	$(BIN)/python -m tests.deploy_check
	$(BIN)/python -m tests.secrets_check
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --offline --quiet --persona=auditor .github/workflows

# What a release publishes, in dist/: the service and its client.
dist: $(VENV)/dist/bin/twine
	rm -rf dist
	for source in . $(wildcard client); do \
		SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(VENV)/dist/bin/python -m build $$source --outdir dist || exit; \
	done
	$(VENV)/dist/bin/twine check --strict dist/*

wheel-check: $(VENV)/dist/bin/twine
	$(VENV)/dist/bin/python -m tests.wheel_check

$(VENV)/dist/bin/twine:
	$(PYTHON) -m venv $(VENV)/dist
	$(VENV)/dist/bin/python -m pip --disable-pip-version-check install --quiet 'build>=1.3,<2' 'twine>=6.1,<8'

# Known vulnerabilities of the pinned versions. Asks the Python Package Index or, with AUDIT_SERVICE=osv, osv.dev,
# which is why it is no part of `make check`; fails where it gets no answer about a package, too.
audit: $(VENV)/audit/bin/pip-audit
	$< --requirement constraints.txt --no-deps --disable-pip --strict \
		--vulnerability-service $(AUDIT_SERVICE) --progress-spinner off

$(VENV)/audit/bin/pip-audit:
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip --disable-pip-version-check install --quiet 'pip-audit>=2.10,<3'

bench: $(VENV)/bench
	-$(MAKE) infinity
	$(BIN)/python -m tests.bench
	$(BIN)/python -m tests.bench.capacity
	$(BIN)/python -m tests.picture_gate

# A rival that wants other versions of what we stand on. Where it cannot be installed, its rows are left out.
infinity: $(VENV)/infinity/installed

$(VENV)/infinity/installed: tests/bench/infinity.txt constraints.txt
	$(PYTHON) -m venv $(VENV)/infinity
	$(VENV)/infinity/bin/python -m pip --disable-pip-version-check install --quiet \
		$(if $(CLASP_TORCH_INDEX),--index-url $(CLASP_TORCH_INDEX),) $$(grep '^torch==' constraints.txt)
	$(VENV)/infinity/bin/python -m pip --disable-pip-version-check install --quiet --requirement $<
	touch $@

golden: $(VENV)/dev
	$(BIN)/python -m tests.golden.make

docs: $(VENV)/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

train: $(VENV)/dev
	$(BIN)/clasp train training/mini.toml

clean:
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
