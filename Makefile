# All commands of the project; `make help` lists them. Each target first installs what it needs, so it also works in
# a fresh clone.

SHELL := /bin/sh
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/.ready
SHIPPED := afterimage_client api_service ops scripts shared worker_service
PROMPT ?= a red apple with a bite
SHEET_OPTION = $(if $(SHEET),--sheet $(filter-out 1,$(SHEET)))

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## install the packages of requirements.lock into .venv; other targets do it too

# The lock pins every file by its hash. The project itself is installed as editable, without the registry.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name it with PYTHON=..."; exit 1; }
	@test -x $(PY) || { echo "Creating .venv; the first install takes several minutes (about 6 GB, most of it torch)."; $(PYTHON) -m venv .venv; }
	@$(PY) ops/install_packages.py requirements.lock
	@$(PY) -m pip install --disable-pip-version-check --no-deps --no-build-isolation --quiet -e .
	@touch $@

demo: $(READY) ## start a stack, index the starter corpus, generate images into out/  (PROMPT="...", or SHEET=1 or SHEET=FILE of prompts, DEMO=--help)
	@$(PY) -m ops.local run -- sh -c '$(PY) -m scripts.demo "$$PROMPT" --url "$$AFTERIMAGE_URL" $(SHEET_OPTION) $(DEMO)'
demo: export PROMPT := $(PROMPT)

up: $(READY) ## start the local stack in the background and print its addresses
	@$(PY) -m ops.local up

down: $(READY) ## stop the local stack; its data stays in var/
	@$(PY) -m ops.local down

test: $(READY) ## run the test suite on real servers, without the extended tests  (T=tests/unit for a part, with them)
	$(PY) -m pytest $(or $(T),-m "not extended")

test-all: $(READY) ## run the tests that `make test` leaves out, and property tests with many more examples
	$(PY) -m pytest -m "extended or hypothesis" --hypothesis-profile=full

eval: $(READY) ## measure whether retrieval helps; figures, a chart and sheets into out/eval/  (EVAL=--quick, EVAL=--help)
	$(PY) -m scripts.evaluate $(EVAL)

bench: $(READY) ## measure caching, connection pooling and typing, each with its conditions
	@$(PY) -m ops.local run --generate 0 -- sh -c '$(PY) -m scripts.index_images starter/corpus.tar.gz --url "$$AFTERIMAGE_URL" \
		&& $(PY) -m benchmarks.search_cache && $(PY) -m benchmarks.connection_pool && $(PY) -m benchmarks.typing_coverage'

chaos: $(READY) ## faults at random moments under load, every promise checked, into out/chaos/  (CHAOS="--seed 7", CHAOS=--help)
	@$(PY) -u -m tests.chaos $(CHAOS)

soak: $(READY) ## thousands of jobs and requests, and whether any process keeps more than it should, into out/soak/  (SOAK=--help)
	@$(PY) -m tests.soak $(SOAK)

fuzz: $(READY) ## the whole OpenAPI document by Schemathesis, and hostile bulks, against a stack, into out/fuzz/  (FUZZ="--seed 7", FUZZ=--help)
	@$(PY) -m tests.fuzz $(FUZZ)

screenshots: $(READY) ## write a picture of every view of a running Studio into out/studio/; needs Chromium  (URL=http://...)
	$(PY) -m tests.browser.screenshots "$(or $(URL),$(shell sed -n 's/^AFTERIMAGE_URL=//p' var/stack.env 2>/dev/null))" out/studio

lint: $(READY) ## check style, types, import rules, and security findings of medium severity
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports
	.venv/bin/bandit --quiet --recursive --severity-level medium --confidence-level medium $(SHIPPED)

# In its own environment, so that its dependencies do not change the versions of the product.
audit: ## list locked packages with known vulnerabilities; needs the network, never fails
	@test -x build/audit/bin/pip-audit || { $(PYTHON) -m venv build/audit && build/audit/bin/pip install --quiet pip-audit==2.10.1; }
	-build/audit/bin/pip-audit --requirement requirements.lock --require-hashes --disable-pip --desc off

train-starter: $(READY) ## train the starter models from scratch into starter/models/ (many hours; resumes from var/training)
	$(PY) -m starter.train all

docs: $(READY) ## write docs/settings.md and docs/metrics.md from the code
	$(PY) -m scripts.document_settings
	$(PY) -m scripts.document_metrics

# In its own environment, because nothing else needs Babel: at run time Python's gettext reads the translations.
PYBABEL = build/texts/bin/pybabel
TEXTS := api_service/studio/locale
texts: ## collect Studio's texts in their catalogue, and update and compile the translations  (LANGUAGE=de adds one)
	@test -x $(PYBABEL) || { $(PYTHON) -m venv build/texts && build/texts/bin/pip install --quiet babel==2.19.0 jinja2==3.1.6; }
	$(PYBABEL) --quiet extract --mapping-file $(TEXTS)/babel.cfg --keyword mark --omit-header --add-location file --sort-output --output-file $(TEXTS)/studio.pot api_service/studio
	$(if $(LANGUAGE),$(PYBABEL) --quiet init --domain studio --input-file $(TEXTS)/studio.pot --output-dir $(TEXTS) --locale $(LANGUAGE))
	@for file in $(TEXTS)/*/LC_MESSAGES/studio.po; do test -e "$$file" || continue; language=$$(basename $$(dirname $$(dirname $$file))); \
		$(PYBABEL) --quiet update --domain studio --input-file $(TEXTS)/studio.pot --output-dir $(TEXTS) --locale $$language && \
		$(PYBABEL) --quiet compile --domain studio --directory $(TEXTS) --locale $$language; done

# requirements.lock has all packages for development. The lock of each container image is a subset of it.
COMPILE = build/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-annotate --custom-compile-command "make lock" pyproject.toml -
SUBSET = $(COMPILE) --constraint requirements.lock --output-file

lock: ## resolve pyproject.toml again into requirements.lock and the locks of the container images
	@test -x build/lock/bin/uv || { $(PYTHON) -m venv build/lock && build/lock/bin/pip install --quiet uv==0.13.9; }
	echo 'setuptools>=80' | $(COMPILE) --upgrade $(addprefix --extra ,server api worker gguf traces local scripts dev) --output-file requirements.lock
	echo 'setuptools>=80' | $(SUBSET) ops/docker/api.lock --extra api --extra traces
	echo 'setuptools>=80' | $(SUBSET) ops/docker/worker.lock --extra worker --extra traces --extra scripts --extra backup
	printf 'setuptools>=80\nflower\n' | $(SUBSET) ops/docker/flower.lock --extra server

clean: ## stop the stack, remove .venv and all caches; var/ and out/ are kept
	@if test -x $(PY); then $(PY) -m ops.local down; fi
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .schemathesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help setup demo up down test test-all eval bench chaos soak fuzz screenshots lint audit train-starter docs texts lock clean
