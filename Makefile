# Two commands on a machine with Python 3.11+ and make: `make train` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt
# For 2 cores: tests often wait for the processes that they start.
WORKERS ?= 3
# The tests start many processes: without bytecode each would compile torch anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: train test test-slow format docs constraints clean

train: .venv/trains
	$(BIN)/trainkit model=toy_cnn optim=sgd lr=0.01

test: .venv/tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/pytest -n $(WORKERS) --dist worksteal -m "not slow"

test-slow: .venv/tests
	$(BIN)/pytest -n $(WORKERS) --dist worksteal -m slow

format: .venv/tests
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The documentation as a site, in site/.
docs: .venv/tests
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

.venv/trains: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "trainkit needs Python 3.11 or later: make PYTHON=python3.12 train")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip --disable-pip-version-check install --quiet uv
	$(INSTALL) --editable .
	@touch $@

.venv/tests: .venv/trains
	$(INSTALL) --group dev
	@touch $@

# Pins for every platform, without addresses of any package index. The extra `ray` is not pinned: it needs an older
# python-dateutil.
EXTRAS := $(addprefix --extra ,tensorboard wandb mlflow trackio torchmetrics joblib submitit table huggingface timm safetensors onnx search)
constraints: .venv/trains
	$(BIN)/uv pip compile --universal --no-header --no-annotate --upgrade --quiet --group dev $(EXTRAS) pyproject.toml -o constraints.txt

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache
