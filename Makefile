# Each target does the set-up it needs: `make test` on a fresh clone is all there is to know.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SOURCES := $(wildcard setup.py csrc/*/*.cpp csrc/*/*/*.h bindings/*)

# Packages a machine without a network may lack, as wheels; `make gpu` installs what lies here.
WHEELS := $(wildcard .whl/*.whl)

.PHONY: build test demo bench gpu check clean

# Packages are fetched while the C++ is compiled.
build:
	@$(MAKE) --no-print-directory -j2 $(VENV)/installed $(VENV)/built

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/tools: | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt "setuptools>=77" "pybind11>=2.12" ruff
	touch $@

# mergekit, which tests compare results with, comes without what it requires: most of that (datasets, pandas, pyarrow) it
# merges without, and the test extra has the rest.
$(VENV)/installed: $(VENV)/tools pyproject.toml constraints.txt
	FREEMERGE_WITHOUT_CPP=1 $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation --no-compile -e ".[test]"
	$(BIN)/python -m pip install -q --no-deps mergekit==0.1.5
	touch $@

$(VENV)/built: $(VENV)/tools $(SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

# The files of tests are shared out among the cores.
test: build
	$(BIN)/python -P -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

demo: build
	$(BIN)/python examples/digits.py

bench: build
	$(BIN)/python benchmarks/compare.py
	$(BIN)/python benchmarks/experts.py
	$(BIN)/python -P -m pytest benchmarks --benchmark-only --benchmark-json=benchmarks/results/ops.json

# On a machine with a GPU: nothing is fetched, $(PYTHON) has torch, triton, cupy and pybind11 already. The tests compile
# hundreds of kernels, so they are shared by several processes where pytest-xdist is there.
gpu:
	$(PYTHON) -m pip install -q --no-index --no-deps --no-build-isolation $(WHEELS) -e .
	$(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m freemerge info
	$(PYTHON) -P -m pytest -q -W default $$($(PYTHON) -c "import xdist; print('-n 8')" 2>/dev/null) tests/gpu
	$(PYTHON) benchmarks/gpu.py

check: build
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(MAKE) test

clean:
	rm -rf build dist *.egg-info $(VENV) demo bench-data
	rm -f kernels/_cpu*.so
