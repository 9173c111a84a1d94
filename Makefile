# Each target sets up what it needs in .venv; only python3, make and a package registry are assumed.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
SHARED := $(or $(RECODAI_SHARED),../shared)
BACKBONE := $(wildcard $(SHARED)/weights/mobilenet_v2_features.safetensors)
export JUPYTER_PLATFORM_DIRS := 1

.PHONY: demo test bench readme export clean

demo: .venv/.installed
	rm -rf demo
	$(BIN)/recodai-forgery demo --out demo $(if $(BACKBONE),--weights $(BACKBONE))

test: .venv/.installed
	$(BIN)/ruff check
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2
	$(BIN)/python -m pytest

bench: .venv/.installed
	$(BIN)/python tests/bench.py

# What an editor of notebooks runs: package and README anew from nbs/.
export: .venv/.installed
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python nbs/render_readme.py

# pip does not reinstall what is there, so changed constraints get a fresh environment.
.venv/.installed: constraints.txt pyproject.toml settings.ini
	rm -rf .venv
	$(PYTHON) -m venv .venv
	if command -v uv >/dev/null; then uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]'; \
	else $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'; fi
	touch $@

clean:
	rm -rf .venv build dist demo runs *.egg-info
