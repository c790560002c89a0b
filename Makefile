PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup check test test-faults test-demo demo docs bench

setup: $(STAMP)

# pip, not uv: uv cannot see a CPU-only build of the pinned torch.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/test_configs.py

# Files in the order of their names: by default the smallest comes last, and one starts a whole cluster. Three at a time
# on two cores, because those that start Ray or servers mostly wait.
test: setup
	$(BIN)/python -m pytest -m "not demo and not faults" -n 3 --dist loadfile --no-loadscope-reorder

test-faults: setup
	@mkdir -p out && rm -f out/faults.jsonl
	CALLOSUM_FAULTS=$(CURDIR)/out/faults.jsonl $(BIN)/python -m pytest -m "faults or injected" --timeout 5400; \
	result=$$?; $(BIN)/python -m tests.fault_report out/faults.jsonl docs/faults.md docs/operations.md; exit $$result

test-demo: setup
	$(BIN)/python -m pytest -m demo --timeout 5400

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

docs: setup
	$(BIN)/python -m tests.api_pages out/api

bench: setup
	@for file in benchmarks/[a-z]*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done
