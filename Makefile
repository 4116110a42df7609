# Two commands do everything on a fresh machine: `make demo` and `make test`. `make help` lists the rest.

VENV ?= .venv
CORE_VENV ?= .venv-core
PYTHONS ?= python3.11 python3.12 python3.13 python3
FRAMEWORKS := torch tensorflow keras jax flax transformers

# One thread per test worker: workers that each start a thread per core only wait for one another.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
PYTEST := -m pytest -q -n auto --maxprocesses 8 --dist worksteal

.PHONY: help demo test test-all gpu matrix lint core-test docs format release-check clean
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed-torch ## Install what text generation needs and let the embedded model write
	$(VENV)/bin/opt-lm generate "ROMEO:" --max-new-tokens 120 --seed 1

test: $(VENV)/.installed-test ## Install everything and run the tests, but for repetitions that are slow
	$(TEST_ENV) $(VENV)/bin/python $(PYTEST) $(ARGS)

test-all: $(VENV)/.installed-test ## The tests with their slow repetitions (four times as long)
	$(TEST_ENV) $(VENV)/bin/python $(PYTEST) -m "" $(ARGS)

gpu: $(VENV)/.installed-test ## Measure and test on this machine's GPU; a second run does what is left (ARGS="--only ...")
	$(VENV)/bin/python -m benchmarks.gpu $(ARGS)

matrix: $(CORE_VENV)/.made ## Tests on every Python, oldest and newest libraries, extras alone (ARGS="3.12 flax")
	PYTHONS="$(PYTHONS)" $(CORE_VENV)/bin/python -m tests.support.matrix $(ARGS)

core-test: $(CORE_VENV)/.installed-test-core ## Run the core's tests where no framework is installed
	@$(CORE_VENV)/bin/python -c "import importlib.util as u, sys; \
	  found = [name for name in sys.argv[1:] if u.find_spec(name)]; \
	  sys.exit(f'$(CORE_VENV) must hold no framework, found: {found}' if found else 0)" $(FRAMEWORKS)
	$(TEST_ENV) $(CORE_VENV)/bin/python $(PYTEST) tests/core $(ARGS)

lint: $(VENV)/.installed-test $(VENV)/.installed-lint ## Check style, spelling and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/codespell
	$(VENV)/bin/pyright --threads 2

docs: $(VENV)/.installed-test $(VENV)/.installed-docs ## Build the site into build/site, any warning an error
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

format: $(VENV)/.installed-lint ## Rewrite the sources the way `make lint` wants them
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

release-check: .venv-release/.installed-release ## Build what a release is, check it, and run it in an empty environment
	.ci/release-check .venv-release/bin/python

clean: ## Remove environments, caches and build outputs
	rm -rf $(VENV) $(CORE_VENV) .venv-release build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

%/.made:
	@for python in $(PYTHON) $(PYTHONS); do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    echo "making $* with $$($$python --version)"; \
	    $$python -m venv $* && touch $@; exit; \
	  fi; \
	done; \
	echo "error: Python 3.11 or newer is needed and none of these is: $(strip $(PYTHON) $(PYTHONS));" \
	  "name one with: make PYTHON=/path/to/python" >&2; exit 1

# A stamp means "this extra is installed as pyproject.toml asks": a second make installs nothing.
define install_rule
$(1)/.installed-%: $(1)/.made pyproject.toml
	@echo "installing opt-lm[$$*] into $(1)"
	@$(1)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$$*]"
	@touch $$@
endef
$(eval $(call install_rule,$(VENV)))
$(eval $(call install_rule,$(CORE_VENV)))
$(eval $(call install_rule,.venv-release))

.PRECIOUS: %/.made $(VENV)/.installed-% $(CORE_VENV)/.installed-% .venv-release/.installed-%
