# make lint         style (ruff) and the imports between rooms (import-linter)
# make test         lint and the whole test suite
# make demo         trains on digits with the host's neurons and with ours
# make bench        measures the networks of the README
# make accept       the acceptance of a GPU in small, on a CPU, to see that it runs
# make docs         builds the documentation in out/docs; a warning is an error
# make test-matrix  runs the suite with each set of releases in tests/matrix, one after another:
#                   about 6 GB per set; make test-matrix-oldest runs one of them
# make clean        removes the environments and out/
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

MATRIX := $(basename $(notdir $(wildcard tests/matrix/*.txt)))

.PHONY: test lint demo bench accept docs clean test-matrix $(MATRIX:%=test-matrix-%)

# Two processes of one thread each: on two cores, more threads would only wait for each other.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

# adapters/ stands beside the package and is installed inside it, so import-linter reads a tree of
# links that has it there.
lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf out/imports && mkdir -p out/imports/snn_revplugin
	ln -sf $(CURDIR)/snn_revplugin/* $(CURDIR)/adapters out/imports/snn_revplugin/
	cd out/imports && $(CURDIR)/$(BIN)/lint-imports $(CURDIR)/pyproject.toml

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

accept: $(INSTALLED)
	$(BIN)/snn-revplugin accept --device cpu --quick

docs: $(INSTALLED)
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs out/docs

# The environment is rebuilt only after pyproject.toml has changed.
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[all,dev,docs]'
	touch $@

clean:
	rm -rf $(VENV) .venv-matrix out
