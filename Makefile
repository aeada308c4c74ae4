# `make` alone lists the targets. Only Python 3.11+, git and make are needed.
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export DVC_NO_ANALYTICS := 1

.DEFAULT_GOAL := help
.PHONY: help setup repro tensorboard test test-full clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

setup: $(VENV)/.installed  ## Make .venv and install what constraints.txt pins

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

repro: setup  ## Run the pipeline that params.yaml describes
	dvc repro

tensorboard: setup  ## Show all runs, also while they train, each as DATE-TIME-EXPERIMENT
	tensorboard --logdir runs

# A process of tests for each core, up to four, with one thread each; a file's tests stay in one process, slow files first.
PYTEST := OMP_NUM_THREADS=1 python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: setup  ## Check the style and run the tests
	ruff check .
	$(PYTEST)

test-full: setup  ## Everything, the long tests too
	ruff check .
	$(PYTEST) -m ""

clean:  ## Remove .venv and the trackers' runs; data, saved states and the DVC cache stay
	rm -rf $(VENV) runs
