# make reproduce   run every chapter, regenerate reports/, print the verdicts
# make test        run the test suite
# make slurm-test  run three chapters as jobs of a real one-node Slurm, which is brought along
# make export | book | lab | lock | clean
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
PRESET ?= mini
CHAPTERS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
GIGABYTES := 5
.DEFAULT_GOAL := help
.PHONY: help reproduce test slurm-test benchmark export book lab lock clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

$(READY): requirements.lock pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "Python 3.11 or newer is needed; name one with: make PYTHON=/path/to/python3.11"; exit 1; }
	@[ "$$(df -Pk . | awk 'NR == 2 {print int($$4 / 1048576)}')" -ge $(GIGABYTES) ] \
		|| { echo "$(GIGABYTES) GB of free disk space are needed here for the packages"; exit 1; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version) (once; a few minutes)"
	@"$(PYTHON)" -m venv $(VENV) || { echo "$(PYTHON) cannot make a virtual environment; install its venv package"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock > $(VENV)/setup.log 2>&1 \
		&& $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e . >> $(VENV)/setup.log 2>&1 \
		|| { echo "The packages could not be installed (is there a network?); $(VENV)/setup.log says why"; exit 1; }
	@touch $@

reproduce: $(READY)
	@$(BIN)/compendium run $(CHAPTERS) --preset $(PRESET)

test: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal lib/tests

# A Slurm that is not installed is unpacked into a temporary folder; Debian's apt-get is enough, root is not needed.
slurm-test: $(READY)
	@OMP_NUM_THREADS=1 COMPENDIUM_SLURM_TEST=1 $(BIN)/python -m pytest -q lib/tests/runner/test_slurm.py

benchmark: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q lib/benchmarks

export: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev_export
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev_clean

book: $(READY)
	@$(BIN)/compendium book

lab: $(READY)
	@$(BIN)/jupyter lab nbs

lock: $(READY)
	@{ sed -n '/^#/p' requirements.lock; $(BIN)/pip freeze --exclude-editable | sed -E '/^(pip|setuptools)==/d; s/\+(cpu|cu[0-9]+)$$//'; } > requirements.tmp
	@mv requirements.tmp requirements.lock

clean:
	rm -rf $(VENV) .compendium .snakemake .pytest_cache .ruff_cache .hypothesis
