# make book: environment, notebooks, book.  make test: every check.  make help: the rest.
SHELL := /bin/bash
PYTHON ?= python3
PORT ?= 8000
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The kernel gives the folder's lock back when a build dies; Snakemake's own would have to be removed by hand.
SNAKEMAKE = rm -f _build/failed/*.txt; flock --nonblock --close --conflict-exit-code 75 $(VENV) \
  $(BIN)/snakemake --snakefile workflow/Snakefile --nolock --quiet rules host progress --rerun-incomplete --cores all
FAILED = { status=$$?; test $$status != 75 || echo "gradclip: another build is running in this folder"; \
  cat _build/failed/*.txt 2>/dev/null; exit 1; }

# The notebooks' kernel, papermill and the tests all run the environment's own programs, whatever the caller's PATH says.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup book test lint links serve clean distclean
.DEFAULT_GOAL := help

help:
	@echo "make setup      make the environment in $(VENV)"
	@echo "make book       run the notebooks that need it and build the book to _build/html"
	@echo "make notebook_NN_name  run one notebook"
	@echo "make test       ruff, then unit, property, doc, notebook and book tests"
	@echo "make links      check that every link of the book still leads somewhere"
	@echo "make serve      show the built book on http://localhost:$(PORT)"
	@echo "make clean      remove what was built"
	@echo "make distclean  remove the environment too"

setup: $(READY)
ifneq ($(origin PYTHON), file)
	@test "$$($(PYTHON) -V)" = "$$($(BIN)/python -V)" \
	  || { echo "gradclip: $(VENV) has $$($(BIN)/python -V); make distclean first, to make it anew with $(PYTHON)"; exit 1; }
endif

$(READY): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "gradclip: Python 3.11, 3.12 or 3.13 is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1); try make setup PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || bash scripts/system_packages.sh
	@rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

book: $(READY)
	@$(SNAKEMAKE) || $(FAILED)
	@echo "The book is at file://$(CURDIR)/_build/html/index.html (make serve shows it on localhost)"

notebook_%: $(READY)
	@$(SNAKEMAKE) $@ || $(FAILED)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint book
	@command -v chromium >/dev/null || bash scripts/system_packages.sh
	@# One thread each: the workers fill the cores, and threads that wait for one another would take turns with them.
	@# What the book cites ran when it was built, with the same library and tests: what passed is not run again.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile --checked=_build/checks.json

links: book
	$(BIN)/jupyter-book build . -q --builder linkcheck --path-output _build/links

serve: $(READY)
	@test -f _build/html/index.html || { echo "gradclip: there is no book yet; run make book first"; exit 1; }
	@echo "http://localhost:$(PORT)  (Ctrl-C stops)"
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

clean:
	rm -rf _build .snakemake

distclean: clean
	rm -rf $(VENV)
