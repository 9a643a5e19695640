# Everything runs in a virtual environment of its own, made on first use.
PYTHON ?= python3
# A plain "torch" takes the newest release; this one is what CI runs.
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin

# OpenMP threads that spin while they wait cost many times the work where the cores are shared.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint docs wheel clean

demo: $(VENV)/.installed
	$(BIN)/python -m examples.moving_shapes.demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --dist loadgroup

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Builds the site into build/site; a link that leads nowhere is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# Builds the wheel, installs it into a clean environment, and imports it from elsewhere and from the checkout.
wheel: $(VENV)/.installed
	rm -rf dist build/wheel-venv
	$(BIN)/python -m build --wheel --outdir dist .
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/pip install --quiet "$(TORCH)"
	build/wheel-venv/bin/pip install --quiet dist/*.whl
	cd / && $(CURDIR)/build/wheel-venv/bin/python -c "import lite_attention as la; print(la.__file__, la.liteattn_backend)"
	build/wheel-venv/bin/python -c "import lite_attention as la; print(la.__file__, la.liteattn_backend)"

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet -e ".[test]"
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/pip install --quiet -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
