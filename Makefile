# make test: lint and the whole suite.   make demo: train on digits, host's neurons and ours.   make bench: the works' figures.
# make docs: the documentation, into out/docs; a warning is an error.
# make test-matrix: the suite with each set of releases in tests/matrix, about 6 GB and 10 minutes a set, one after the other;
# make test-matrix-oldest: with one of them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

MATRIX := $(basename $(notdir $(wildcard tests/matrix/*.txt)))

.PHONY: test lint demo bench docs clean test-matrix $(MATRIX:%=test-matrix-%)

# Two processes of one thread each: on two cores, more threads would only wait for one another.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test-matrix: $(MATRIX:%=test-matrix-%)

$(MATRIX:%=test-matrix-%): test-matrix-%: .venv-matrix/%/installed
	OMP_NUM_THREADS=1 .venv-matrix/$*/bin/pytest -n 2 --dist worksteal

.venv-matrix/%/installed: tests/matrix/%.txt pyproject.toml
	$(PYTHON) -m venv --clear .venv-matrix/$*
	.venv-matrix/$*/bin/pip install --quiet --upgrade pip
	.venv-matrix/$*/bin/pip install --quiet --constraint $< --editable '.[all,dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/snn-revplugin demo

bench: $(INSTALLED)
	$(BIN)/python benchmarks/work.py

docs: $(INSTALLED)
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs out/docs

# The environment is made again only when what it has to hold has changed.
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[all,dev,docs]'
	touch $@

clean:
	rm -rf $(VENV) .venv-matrix out
