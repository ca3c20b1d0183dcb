# Two commands do all the set-up: `make demo` and `make test`. Each makes its own environment in .venv if there is none.
# ARGS go to the command behind: make test ARGS='-m slow', make demo ARGS=--plan.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS :=

.PHONY: demo test lint clean

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/udas demo $(ARGS)

test: $(VENV)/installed
	$(BIN)/pytest $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs
