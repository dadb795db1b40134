# Two commands set everything up: `make lab` opens the lab in JupyterLab, `make test` runs all tests.
# PYTHON=/path/to/python3 chooses the interpreter the virtual environment is made from (3.11 or newer).

VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml hatch_build.py $(shell find extension labkernel/qemu/guest -type f \
	-not -path '*/node_modules/*' -not -path '*/lib/*' -not -path '*/.yarn/*' 2>/dev/null)

.PHONY: lab demo test lint bench bench-build bench-daemon bench-density docs setup-lab setup-test clean

# In the course's folder, where nbgrader looks for its settings. JupyterLab wants to be told that root is meant.
lab: setup-lab
	cd notebooks && exec ../$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_FLAGS)

demo: setup-lab
	$(BIN)/python scripts/demo.py --out notebooks/out

test: setup-test lint
	$(BIN)/python -m pytest $(TEST_FLAGS)

lint: setup-test
	$(BIN)/ruff format --check labkernel tests benchmarks scripts hatch_build.py
	$(BIN)/ruff check labkernel tests benchmarks scripts hatch_build.py
	$(BIN)/mypy

bench: setup-test
	scripts/setup packages bench
	$(BIN)/python benchmarks/run.py $(BENCH_FLAGS)

bench-density: setup-test
	scripts/setup packages bench
	$(BIN)/python benchmarks/density.py $(BENCH_FLAGS)

bench-daemon: setup-test
	scripts/setup packages bench
	$(BIN)/python benchmarks/daemon.py $(BENCH_FLAGS)

bench-build: setup-test
	scripts/setup packages bench
	$(BIN)/python benchmarks/build.py $(BENCH_FLAGS)

# The pages of docs/ and the course, executed, as a web site in docs/_build/html.
docs: setup-lab
	@scripts/setup venv $(VENV) grading,docs
	$(BIN)/python -m sphinx -W -b html docs docs/_build/html

setup-lab:
	@scripts/setup packages lab
	@$(MAKE) --no-print-directory $(VENV)/.ready-lab

setup-test:
	@scripts/setup packages lab test
	@$(MAKE) --no-print-directory $(VENV)/.ready-test

$(VENV)/.ready-lab: $(SOURCES)
	@scripts/setup venv $(VENV) grading
	@touch $@

$(VENV)/.ready-test: $(SOURCES)
	@scripts/setup venv $(VENV) grading,remote,dev
	@scripts/setup peers $(VENV)
	@touch $@ $(VENV)/.ready-lab

clean:
	rm -rf $(VENV) build dist notebooks/out labkernel/labextension extension/lib extension/node_modules
