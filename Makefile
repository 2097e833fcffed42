# What a newcomer runs: `make demo` and `make test`. Needs Python 3.11 to 3.13; `make test` also Node 20 or newer.

VENV := .venv
BIN := $(VENV)/bin
export PYTHON
# OpenMP's threads wait by spinning, which makes everything slow on a machine with other work; see server/nst_server/executor.py.
export GOMP_SPINCOUNT ?= 1000
PROJECT_FILES := pyproject.toml proto/generate.py $(wildcard proto/nst/v1/*.proto)

.PHONY: demo test check unit postgresql portable node format bench baseline studies clean

demo: $(VENV)/demo.stamp
	@$(BIN)/python samples/demo.py

test: check unit

check: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	cd proto && ../$(BIN)/buf lint
	cd proto && ../$(BIN)/buf breaking --against ../tests/contract/baseline.binpb
	$(MAKE) node

node: client/node/node_modules/.stamp samples/portable/web/node_modules/.stamp
	cd client/node && npm run --silent lint
	cd samples/portable/web && npm run --silent lint

unit: $(VENV)/dev.stamp client/node/node_modules/.stamp postgresql portable
	$(BIN)/python -m pytest

# The tests start a PostgreSQL of their own, with Debian's programs; elsewhere with those on the PATH.
postgresql:
	@command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || { \
		test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends postgresql; } || \
		{ echo "make: PostgreSQL is missing; install it: apt-get update && apt-get install -y postgresql" >&2; exit 1; }

# The programs of samples/portable are built and run by the tests.
portable: samples/portable/web/node_modules/.stamp
	@missing=; command -v g++ >/dev/null || missing="$$missing g++"; \
	command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || missing="$$missing chromium"; \
	test -z "$$missing" || { \
		test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; } || \
		{ echo "make: missing:$$missing; install: apt-get update && apt-get install -y$$missing" >&2; exit 1; }

format: $(VENV)/dev.stamp samples/portable/web/node_modules/.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	cd client/node && npm run --silent format
	cd samples/portable/web && npm run --silent format

# docs/performance.md: out/bench/speed.json, its tables and plots; then all that is not about speed alone.
# SPEED="--sizes 128 --parts iteration" measures less.
bench: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks.speed --out out/bench $(SPEED)
	$(BIN)/python -m benchmarks.report out/bench/speed.json
	$(BIN)/python benchmarks/run.py

# The pictures, plots and numbers of docs/studies; STUDIES="--size 128" looks faster.
studies: $(VENV)/dev.stamp
	$(BIN)/python -m studies $(STUDIES)

# Accept the contract as it is now: what `buf breaking` compares with from here on.
baseline: $(VENV)/dev.stamp
	cd proto && ../$(BIN)/buf build --exclude-source-info -o ../tests/contract/baseline.binpb

clean:
	rm -rf $(VENV) out client/node/node_modules client/node/dist samples/portable/web/node_modules

$(VENV)/bin/python:
	@python=$$(sh .ci/find-python) && echo "making $(VENV) with $$("$$python" --version)" && "$$python" -m venv $(VENV)

$(VENV)/demo.stamp: $(PROJECT_FILES) | $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -e '.[server,demo]'
	@touch $@

$(VENV)/dev.stamp: $(PROJECT_FILES) | $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -e '.[dev]'
	@touch $(VENV)/demo.stamp $@

%/node_modules/.stamp: %/package-lock.json
	@command -v npm >/dev/null || { echo "make: npm is missing; install Node 20 or newer: apt-get update && apt-get install nodejs npm" >&2; exit 1; }
	cd $* && npm ci --silent
	@touch $@
