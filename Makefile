# `make demo` and `make test` need only Python 3.11, pip and make; they set up .venv themselves.
PYTHON ?= python3.11
BIN := .venv/bin
PEERS := .venv-peers/bin
OUT ?= demo-out
# The demo's and the tests' tensors are small: a second thread brings little, and on a busy machine
# waiting threads slow everything down many times over.
export OMP_NUM_THREADS ?= 1
# A process a core; a file's tests stay together, so that what they share is made once.
WORKERS ?= -n auto --dist loadfile

.PHONY: demo test test-all lint notebooks experiments bench bench-overhead bench-memory bench-growth clean

demo: .venv/installed
	$(BIN)/stability-probe demo --out $(OUT) --overwrite

test: lint
	$(BIN)/pytest $(WORKERS)

test-all: lint
	$(BIN)/pytest $(WORKERS) -m "slow or not slow"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# In place, with what they print and draw; commit the result.
notebooks: .venv/installed
	$(BIN)/python notebooks/execute.py

# Everything that is committed below experiments/; what has changed is listed. Trainings that are in
# experiments-out/ are not made again, nor is what was measured of each: remove it to begin from
# nothing.
experiments: .venv/installed
	$(BIN)/python -m experiments $(CLAIMS)
	rm -rf experiments-out/concentration
	$(BIN)/python experiments/concentration/run.py --out experiments-out/concentration
	cp experiments-out/concentration/concentration.png docs/figures/
	git --no-pager diff --stat -- experiments README.md docs/figures

bench: .venv/installed
	$(MAKE) bench-overhead
	$(MAKE) bench-memory
	$(MAKE) bench-growth
	$(BIN)/python benchmarks/sigma_max.py
	$(BIN)/python benchmarks/sample_gradients.py
	$(BIN)/python benchmarks/tightness.py

# For one part, BENCH holds options: make bench-overhead BENCH="--pairs 20".
bench-overhead: .venv-peers/installed
	$(PEERS)/python -m benchmarks.overhead $(BENCH)
	$(PEERS)/python -m benchmarks.sensitivity

bench-memory: .venv-peers/installed
	$(PEERS)/python -m benchmarks.memory $(BENCH)

bench-growth: .venv-peers/installed
	$(PEERS)/python -m benchmarks.growth $(BENCH)

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# What the probe is compared with stays out of the other environment. Where it cannot be installed,
# its rows say so.
.venv-peers/installed: pyproject.toml constraints.txt benchmarks/peers.txt
	$(PYTHON) -m venv .venv-peers
	$(PEERS)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PEERS)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	-$(PEERS)/pip install --quiet --disable-pip-version-check -c constraints.txt -r benchmarks/peers.txt
	touch $@

clean:
	rm -rf .venv .venv-peers bench-out experiments-out $(OUT) build *.egg-info
