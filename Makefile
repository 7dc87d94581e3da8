# The commands of the README: set-up, tests, demo.
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)

.PHONY: setup test quick test-extended lint fix demo lock

setup: $(STAMP)

$(STAMP): requirements/lock.txt requirements/detectron2.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "mae_bench needs Python 3.11 or 3.12 on the PATH, and found neither. Install one, or name it: make setup PYTHON=/path/to/python3.12"; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check --quiet --no-deps --require-hashes -r requirements/lock.txt
	$(PY) -m pip install --disable-pip-version-check --quiet --no-deps --upgrade --target "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
		--python-version 3.10 --only-binary=:all: --require-hashes -r requirements/detectron2.txt
	$(PY) -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
	touch $@

# Style, types and all tests but the extended ones: about 8 minutes on two cores.
test: setup
	.ci/test

# Less than a minute, while working: style and the most informative tests.
quick: setup
	.ci/quick

# Browsers, long trainings: what is too long, or needs more tools, than `make test`.
test-extended: setup
	.ci/test-extended

# Style, spelling and types alone; `fix` repairs what can be repaired.
lint: setup
	.ci/lint

fix: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

demo: setup
	$(VENV)/bin/mae-bench demo

# Resolves requirements/*.in anew for both Python versions; needs `uv` on the PATH. Seconds, and names no host.
lock:
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
		--overrides requirements/overrides.txt requirements/all.in --output-file requirements/lock.txt
