# Everything a user or a machine types most often; `make help` lists it. All of it runs in .venv/, which `make setup` makes.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup train sweep test soak lint clean

# An active environment of the user's must not leak into this one.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
unexport VIRTUAL_ENV PYTHONHOME PYTHONPATH

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  ARGS='...' adds arguments to train, sweep, test and soak; DEEPSCALE_PYTHON=python3.12 chooses the Python of a new .venv/"

setup: ## make .venv/ ready: Debian packages where allowed, Python packages, FFCV where it builds
	@.ci/setup.sh

train: setup ## train 10,000 layers within 5 minutes (setup before it)
	deepspeed deepscale/train.py --depth 10000 --time-budget 5m $(ARGS)

sweep: setup ## compare a few settings of 110 layers, 5 to 10 minutes on two cores (setup before it)
	python tune/sweep.py tune/spaces/small.yaml $(ARGS)

# Two workers, on many cores too: most of a long test is waiting for ranks to start and to meet. A file's tests share what they set up.
test: setup ## run the tests (setup before it)
	pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

soak: setup ## kill training runs 100 times at random and look for what is lost (some 20 minutes)
	python tests/soak.py $(ARGS)

lint: setup ## ruff, mypy and shellcheck (setup before it)
	ruff check .
	ruff format --check .
	mypy
	@.ci/shellcheck.sh

clean: ## remove .venv/ and caches; data sets, runs and the tracking database stay
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find deepscale tests tune -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
