# Everything runs inside .venv, which `make` creates with plain venv and pip.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test cuda-tools check soak pictures clean

CHROMIUM ?= chromium

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[cpu,test,check]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/gradstore demo demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

# What the tests of the GPU code need where there is no GPU, 360 MB to download; without it they skip and say so.
cuda-tools: $(STAMP)
	pins=$$($(BIN)/python -c "import torch; print('' if torch.version.cuda else '-c constraints-cuda.txt')"); \
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $$pins -e ".[test-cuda]"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

soak: $(STAMP)
	$(BIN)/python -m pytest -m soak --timeout=0 -p no:xdist

# The picture in the README: the page that the demo ends with.
pictures: demo
	$(CHROMIUM) --headless --no-sandbox --disable-gpu --hide-scrollbars --user-data-dir=$$(mktemp -d) \
		--window-size=1200,2000 --screenshot=docs/demo.png file://$(CURDIR)/demo/report.html

clean:
	rm -rf $(VENV) build dist *.egg-info
