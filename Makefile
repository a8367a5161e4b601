# Two commands on a fresh clone: `make demo` and `make test`. Both set up .venv first, by themselves. `make help` lists all.
PYTHON ?= python3
TORCH_VERSION ?= 2.13.0
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
RECORD := tools/compiled_kernels.json

# Every worker and process of the tests would compile all sources anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-kernels test-wild test-composition gate quick-gate env lint docs bench bench-gpu clean

help:  ## this list (also what `make` alone does)
	@awk -F ':.*##' '/^[a-z-]+:.*##/ {printf "  make %-14s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: env  ## the whole way on a small model, then samples of a trained one
	@echo "== demo: examples/quickstart.py"
	$(BIN)/python examples/quickstart.py
	@echo "== demo: examples/experiment/sample.py, trained weights: a clip restored dense and SALAD side by side"
	$(BIN)/python examples/experiment/sample.py

test: env  ## all tests, two at a time, and the gate in part; PYTEST_ARGS="-k Wan" runs some of them
	@echo "== tests, $(WORKERS) at a time"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)
ifeq ($(strip $(PYTEST_ARGS)),)
	@$(MAKE) --no-print-directory -j2 quick-gate test-kernels
endif

# With a GPU the tests above have run the Triton kernels on it. Without one they are interpreted, in a process of their
# own: Triton decides when it is imported.
test-kernels: env  ## the Triton kernels, interpreted where there is no GPU
	@echo "== tests of the Triton kernels, interpreted"
	@if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; \
	then echo "there is a GPU: they have run on it"; \
	else TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/kernels/gpu; fi

# Models that other projects wrote, as their packages have them; installed into build/wild/site, the first time.
test-wild: env  ## hold video DiTs of other projects' packages against the invariants; needs a network once
	@$(BIN)/python -m tools.wild_install
	@echo "== models of other projects' packages, $(WORKERS) at a time"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/wild $(PYTEST_ARGS)

test-composition: env  ## try what else runs beside SALAD, and write docs/composition.md; needs a network once
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.composition

# tools/compiled_kernels.json has the fingerprints of all kernels that `make gate` compiled, and found without fault, with
# one version of Triton: of the code, of all that it calls, of its settings and arguments. Only what is not in it is
# compiled here, which is nothing unless somebody changed a kernel. With another Triton the record says nothing, and a
# part is compiled: it leaves out what differs from another kernel only in a constant that asks for no more of a GPU, or in one that
# a third kernel has. For Hopper: fp16 (compiled as bf16 is, with as many registers), head_dim 80 and 96 (d128 fills the
# same tiles of 128), fp32 of head_dim 64 (d128 is the harder one), d64 in blocks of 128 (d128 has them; d64 is compiled
# in blocks of 64), d128 in blocks of 64 but for Gluon's with a mask (Triton's tiles and registers are those of blocks of
# 128), and what has no mask, where the kernel with a mask or the softmax map takes as many registers or more; of Gluon's
# attention without pools both are compiled. Pools are compiled for d128 in blocks of 128 (without them d64 is, and blocks
# of 64). For Ampere and Blackwell all but bf16 of head_dim 128, and of it unaligned rows, the softmax map (Hopper has
# both) and all forms of `prepare` but one. `make gate` compiles all.
quick-gate: env  ## compile every kernel that ships and is not in the record, for three GPU generations
	@echo "== compiling the Triton kernels that ship, for sm_80, sm_90 and sm_100, but those that are as they were"
	$(BIN)/python -m salad_compile.kernels.inspect --compiled $(RECORD) --without float16 d80 d96 --filter \
		"sm_90 bfloat16 d128 128x64 mask" "sm_90 bfloat16 d128 128x64 softmax" "prepare sm_90 bfloat16 d128" \
		"block_sparse.gluon sm_90 bfloat16 d128 128x64" "pool_gradient sm_90 bfloat16 d128 128x64" \
		"block_sparse.gluon sm_90 bfloat16 d128 64x64 mask" "block_sparse sm_90 bfloat16 d64 64x64" "tail.pool_bias sm_90" \
		"sm_90 float32 d128 mask" "prepare sm_90 float32 d128" \
		"sm_80 bfloat16 d128 !unaligned !softmax !12 !24" "sm_100 bfloat16 d128 !unaligned !softmax !12 !24"

gate: env  ## compile every kernel that ships, for three GPU generations, and write the record
	@echo "== compiling every Triton kernel that ships for sm_80, sm_90 and sm_100"
	$(BIN)/python -m salad_compile.kernels.inspect --record $(RECORD)

env: $(STAMP)  ## make .venv, which every other target does by itself
$(STAMP): pyproject.toml tools/setup_env.sh
	PYTHON="$(PYTHON)" TORCH_VERSION="$(TORCH_VERSION)" bash tools/setup_env.sh $(VENV)
	@touch $@

lint: env  ## ruff, mypy, the import law, spelling, and the documentation
	@$(MAKE) --no-print-directory -j2 docs lint-types lint-rest

.PHONY: lint-types lint-rest
lint-types:  # both are parts of lint
	$(BIN)/mypy
	$(BIN)/mypy tests/typed_use.py

lint-rest:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/codespell

# the site, in build/site; a broken link, a missing page or an unknown name in the reference is an error (with --quiet not)
docs: env  ## the documentation, into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: env  ## time the CPU engine
	$(BIN)/python benchmarks/attention_cpu.py

# everything that docs/kernels.md, docs/speed.md and the README say of a GPU; about twelve minutes
bench-gpu: env  ## all measured numbers of a GPU, and the plots
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/transformer.py
	$(BIN)/python benchmarks/rivals.py
	$(BIN)/python benchmarks/tiles.py
	$(BIN)/python benchmarks/forward_variants.py
	$(BIN)/python benchmarks/plot.py
	$(BIN)/python tools/measured.py
	$(BIN)/python -m tools.what_to_pick
	$(BIN)/python -m tools.scaling

clean:  ## remove .venv and everything that was built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis out
