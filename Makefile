# Two commands on a fresh clone: `make demo` and `make test`. Both set up .venv first, by themselves.
PYTHON ?= python3
TORCH_VERSION ?= 2.13.0
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: demo test env lint bench clean

demo: env
	@echo "== demo: examples/quickstart.py"
	$(BIN)/python examples/quickstart.py

test: env
	@echo "== tests, $(WORKERS) at a time"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

env: $(STAMP)

$(STAMP): pyproject.toml tools/setup_env.sh
	PYTHON="$(PYTHON)" TORCH_VERSION="$(TORCH_VERSION)" bash tools/setup_env.sh $(VENV)
	@touch $@

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	bash tools/typecheck.sh $(BIN)/mypy

bench: env
	$(BIN)/python benchmarks/attention_cpu.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis out
