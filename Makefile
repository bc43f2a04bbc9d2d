# make test: lint and the whole suite.   make demo: train on digits, host's neurons and ours.   make bench: the works' figures.
# make docs: the documentation, into out/docs; a warning is an error.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: test lint demo bench docs clean

# Two processes of one thread each: on two cores, more threads would only wait for one another.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

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
	rm -rf $(VENV) out
