# Each target sets up what it needs in .venv; only python3, make and a package registry are assumed.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
SHARED := $(or $(RECODAI_SHARED),../shared)
BACKBONE := $(wildcard $(SHARED)/weights/mobilenet_v2_features.safetensors)
export JUPYTER_PLATFORM_DIRS := 1

# The newest training run, for the bundle.
CHECKPOINT ?= $(shell ls -t runs/*/best.safetensors 2>/dev/null | head -1)
FIGURES ?= 200

.PHONY: demo test bench bundle rehearse export clean

demo: .venv/.installed
	rm -rf demo
	$(BIN)/recodai-forgery demo --out demo $(if $(BACKBONE),--weights $(BACKBONE))

test: .venv/.installed
	$(BIN)/ruff check
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2
	$(BIN)/python -m pytest

bench: .venv/.installed
	$(BIN)/python tests/bench.py

# The Kaggle dataset and the folders of its two notebooks, from the last commit: make bundle OWNER=your-name-on-kaggle
bundle: .venv/.installed
	@test -n "$(OWNER)" || { echo "name the owner: make bundle OWNER=your-name-on-kaggle"; exit 2; }
	$(BIN)/recodai-forgery bundle --owner $(OWNER) --out runs/bundle $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT))

# The submit notebook as Kaggle runs it, with exactly the packages of kaggle/image.txt.
rehearse: .venv-image/.installed
	.venv-image/bin/recodai-forgery bundle --owner somebody --out runs/rehearsal $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT))
	.venv-image/bin/recodai-forgery rehearse runs/rehearsal --figures $(FIGURES)

# What an editor of notebooks runs: package and README anew from nbs/.
export: .venv/.installed
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python nbs/render_readme.py

# pip does not reinstall what is there, so changed constraints get a fresh environment. OpenCV 4 is put beside it, for a test under either version.
.venv/.installed: constraints.txt pyproject.toml settings.ini kaggle/image.txt
	rm -rf .venv
	$(PYTHON) -m venv .venv
	if command -v uv >/dev/null; then uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]'; \
	else $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'; fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/opencv4 "$$(grep ^opencv kaggle/image.txt)"
	touch $@

.venv-image/.installed: kaggle/image.txt pyproject.toml settings.ini
	rm -rf .venv-image
	$(PYTHON) -m venv .venv-image
	grep -v -e '^#' -e ^python= kaggle/image.txt > .venv-image/requirements.txt
	if command -v uv >/dev/null; then uv pip install --quiet --python .venv-image/bin/python -r .venv-image/requirements.txt -e '.[bundle]'; \
	else .venv-image/bin/python -m pip install --quiet --disable-pip-version-check -r .venv-image/requirements.txt -e '.[bundle]'; fi
	touch $@

clean:
	rm -rf .venv .venv-image build dist demo runs *.egg-info
