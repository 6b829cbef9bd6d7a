# Everything runs inside .venv, which `make` creates with plain venv and pip.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test cuda-tools check resolve processors test-avx2 test-plain test-uncompiled soak pictures clean

CHROMIUM ?= chromium
SHARE ?= 1

# Refuses a Python that cannot install gradstore.
RECENT := import sys; sys.version_info >= (3, 10) or sys.exit('gradstore needs Python 3.10 or newer; \
$(PYTHON) is %s. Name another: make test PYTHON=python3.12' % sys.version.split()[0])

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c "$(RECENT)"
	@echo "Installing gradstore, PyTorch and the tools of its tests in $(VENV), once. What is not here yet is downloaded:"
	@echo "about 0.4 GB with PyTorch's CPU build, 3 GB with its CUDA build. How to have the CPU build: README, Installing."
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[cpu,test,check]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/gradstore demo demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal

# What the tests of the GPU code need where there is no GPU, 360 MB to download; without it they skip and say so.
cuda-tools: $(STAMP)
	pins=$$($(BIN)/python -c "import torch; print('' if torch.version.cuda else '-c constraints-cuda.txt')"); \
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $$pins -e ".[test-cuda]"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Whether each Python >= 3.10 that is here could install gradstore; downloads little more than metadata.
resolve: $(STAMP)
	$(BIN)/python .ci/resolve.py

# The numerical tests as on an older processor, with the plainest code of every library, and without the compiled parts.
# SHARE=3 runs another third of them at each.
processors: test-avx2 test-plain test-uncompiled

test-avx2 test-plain test-uncompiled: test-%: $(STAMP)
	$(BIN)/python .ci/levels.py $* --share=$(SHARE) -n 2 -m numerical

# The long fault and property tests; every test as on other processors; and another Python, SOAK_PYTHON or the newest
# that is here, installed whole (up to 3 GB to download, which is said before) and tested.
soak: $(STAMP)
	$(BIN)/python -m pytest -m soak --timeout=0 -o faulthandler_timeout=0 -p no:xdist
	for level in avx2 plain uncompiled; do $(BIN)/python .ci/levels.py $$level -n 2 || exit 1; done
	$(BIN)/python .ci/whole.py "$(SOAK_PYTHON)"

# The picture in the README: the page that the demo ends with.
pictures: demo
	$(CHROMIUM) --headless --no-sandbox --disable-gpu --hide-scrollbars --user-data-dir="$$(mktemp -d)" \
		--window-size=1200,2000 --screenshot=docs/demo.png "file://$(CURDIR)/demo/report.html"

clean:
	rm -rf $(VENV) build dist *.egg-info
