# Two commands: `make demo` and `make test`. Both make the virtual environment where there is none.
# `make test-slow` runs what takes longer (Ray, faults, clusters, real weights), as CI does.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FLOORS := $(abspath $(VENV)/floors)
EDGE := $(abspath $(VENV)/edge)
PACKAGES := -c "import sysconfig; print(sysconfig.get_path('purelib'))"

export HF_HUB_OFFLINE := 1
export RAY_USAGE_STATS_ENABLED := 0
# Tests run side by side: threads that wait for each other must not spin on a core that another test needs.
export OMP_WAIT_POLICY := passive
# Every process would compile all modules that it imports, which takes most of its start.
unexport PYTHONDONTWRITEBYTECODE

# Processes get whole files of tests (tests/conftest.py says in which order). One a core, but slow tests, which are many
# processes themselves, are at most two at a time. One thread each: the processes take all cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

.PHONY: demo environments edge test test-slow test-floors test-edge lint types check clean

environments: $(STAMP) $(FLOORS)/.installed

edge: $(EDGE)/.installed

demo: $(STAMP)
	$(BIN)/python -m demo

test: $(STAMP)
	$(PYTEST) -m "not slow" --maxprocesses 4

# Only files that say slow are read; tests/conftest.py makes sure that these are all.
test-slow: $(STAMP)
	$(PYTEST) -m slow --maxprocesses 2 $$(grep -rl slow tests --include='test_*.py')

# The oldest releases that pyproject.toml allows, ahead of those that are installed on the path.
test-floors: $(STAMP) $(FLOORS)/.installed
	PYTHONPATH=$(FLOORS):$(CURDIR) $(BIN)/python -m pytest --no-header tests/test_floors.py tests/golden/test_golden.py \
		tests/corpus/test_tables.py::test_tables_in_a_bucket tests/train/test_method.py tests/report/test_charts.py \
		tests/extract/test_job.py::test_a_job_on_ray_makes_the_store_that_one_process_makes \
		"tests/teachers/test_verify_cards.py::test_real_weights"

test-edge: $(EDGE)/.installed
	$(EDGE)/bin/python -m pytest tests/export/test_edge_files.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP)
	$(BIN)/mypy

check: lint types test test-slow test-floors test-edge

# Python compiles a module when it is first imported; pip would compile all of them, which takes as long as unpacking them.
$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --upgrade pip
	touch $@

$(STAMP): pyproject.toml | $(VENV)/.made
	$(BIN)/python -m pip install --quiet --no-compile torch torchvision
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev]'
	touch $@

$(FLOORS)/.installed: pyproject.toml | $(VENV)/.made
	$(BIN)/python -m pip install -qqq --no-compile --upgrade --target $(FLOORS) $$($(BIN)/python tests/floors.py)
	$(BIN)/python -m pip install -qqq --no-compile --upgrade --no-deps --target $(FLOORS) \
		$$($(BIN)/python tests/floors.py torch)
	touch $@

# ExecuTorch brings a package that makes every import of Transformers print warnings, and LiteRT needs an older
# typing_extensions, so the runtimes of phones have an environment of their own, on top of the first.
$(EDGE)/.installed: $(STAMP)
	$(PYTHON) -m venv $(EDGE)
	echo "import site; site.addsitedir('$$($(BIN)/python $(PACKAGES))')" > $$($(EDGE)/bin/python $(PACKAGES))/first.pth
	$(EDGE)/bin/python -m pip install --quiet --no-compile --editable '.[executorch,litert,coreml]'
	touch $@

clean:
	rm -rf demo-out
