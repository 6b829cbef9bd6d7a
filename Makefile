# Everything runs inside .venv, which `make` creates with plain venv and pip.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test check soak pictures clean

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
