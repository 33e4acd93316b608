# moe_lab: the two commands are `make demo` and `make test`; each sets up what it needs on first use.
PYTHON ?= python3
VENV   ?= .venv
OUT    ?= runs/demo
BIN     = $(VENV)/bin
STAMP   = $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-lowest test-newest fast docs lint format types bench gpu fuzz clean

help:  ## list the targets
	@grep -hE '^[a-z-]+( [a-z-]+)*:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

setup: $(STAMP)  ## make the virtual environment in this clone

# A machine whose python already has a CUDA torch lends it to the environment; everywhere else the pinned torch is installed.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "moe_lab needs Python 3.11 or newer; try make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	@if $(PYTHON) -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; \
	then $(PYTHON) -m venv --system-site-packages $(VENV) && grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt; \
	else $(PYTHON) -m venv $(VENV) && cp constraints.txt $(VENV)/constraints.txt; fi
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1' -c $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt --build-constraint constraints.txt --group dev -e '.[hf,lexers,ray,slurm]'
	$(BIN)/python -m compileall -q moe_lab  # also where PYTHONDONTWRITEBYTECODE is set: half a second of every start
	@touch $@

demo: $(STAMP)  ## train a small grid on this machine's own Python sources and write runs/demo/report.html (under 3 minutes on two free cores)
	$(BIN)/moe-lab demo --out $(OUT)

test: $(STAMP)  ## run every test
	$(BIN)/python -m pytest -n auto

test-lowest test-newest: test-%: $(STAMP)  ## the tests of Hugging Face models on the lowest, the newest versions that are admitted
	$(BIN)/python tests/ends.py $* $(VENV)-$*
	$(VENV)-$*/bin/python -m pytest -n auto -m hf

fast: $(STAMP)  ## run the tests that are not marked slow
	$(BIN)/python -m pytest -n auto -m "not slow"

lint: $(STAMP)  ## ruff check and format check
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(STAMP)  ## let ruff format and sort
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

docs: $(STAMP)  ## build the pages of docs/ and the reference into site/, without a warning
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt --group docs
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

types: $(STAMP)  ## pyright
	$(BIN)/pyright

bench: $(STAMP)  ## run the benchmarks of experiments/benchmarks
	for file in experiments/benchmarks/*.py; do $(BIN)/python $$file || exit 1; done

gpu: $(STAMP)  ## everything that needs a GPU, in 8 minutes: experiments/gpu/<device>/*.parquet (docs/gpu.md)
	$(BIN)/python experiments/gpu.py

fuzz: $(STAMP)  ## ten minutes of mutated files against every reader
	$(BIN)/python experiments/fuzz.py --minutes 10

clean:  ## remove the environment and caches (never runs/)
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest .pytest_cache .ruff_cache .hypothesis
