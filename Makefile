# Needs Python 3.11+ and make, nothing else. Everything is installed into .venv here.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_PROGRESS_BARS := 1

.PHONY: demo test test-slow lint bench results clean

demo: .stamps/demo        ## learn five tasks of handwritten digits three ways and write a report
	$(BIN)/lamina demo

test test-slow: export OMP_NUM_THREADS := 1
test: lint                ## lint, types, and every test that is not marked slow
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: .stamps/dev    ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

lint: .stamps/dev         ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .stamps/bench      ## speed and memory against PEFT and the bare frozen backbone
	$(BIN)/python benchmarks/speed.py

results: .stamps/bench    ## the tables of docs/results (needs ../shared; hours; goes on where it stopped)
	$(BIN)/python benchmarks/results.py

.stamps/%: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[$*]'
	@mkdir -p .stamps && touch $@

clean:                    ## remove everything these commands made
	rm -rf $(VENV) .stamps runs demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
