# The two commands of the README are `make demo` and `make test`; both set up .venv by themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-all lint bench clean

demo: $(STAMP)
	@$(BIN)/edgekit demo -o out

test: lint
	@$(BIN)/pytest -q -n 2 --dist loadgroup
	@echo
	@echo "All tests passed. Next: 'make demo' shows the whole job, 'make test-all' adds the slow suites."

test-all: lint
	@$(BIN)/pytest -q -m ""
	@echo
	@echo "All tests passed, the slow ones too. Next: 'make bench' measures against plain onnxruntime."

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@PYTHONPATH=src $(BIN)/lint-imports

bench: $(STAMP)
	@$(BIN)/python -m benchmarks.digits_accuracy
	@$(BIN)/python -m benchmarks.onnx_cpu
	@$(BIN)/edgekit kernels build
	@$(BIN)/python -m benchmarks.custom_ops_cpu
	@$(BIN)/python -m benchmarks.dynamicvis_cpu --models build/dynamicvis_cpu
	@$(BIN)/python -m benchmarks.lighthgnn_cpu
	@$(BIN)/python -m benchmarks.lighthgnn_accuracy
	@$(BIN)/python -m benchmarks.dhsa_cpu
	@$(BIN)/python -m benchmarks.dhsa_quality
	@$(BIN)/python -m benchmarks.coreml_accuracy

$(STAMP): pyproject.toml constraints.txt
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "Installing edgekit and what it needs into $(VENV) (a few minutes the first time) .."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

clean:
	@rm -rf $(VENV) out dist build .hypothesis .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
