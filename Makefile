# make demo   set up .venv and generate text with the model that ships in the package
# make test   the same environment with the development tools, then the whole test suite
# make lint   ruff and mypy, as CI runs them
#
# Variables:
#   PYTHON       an interpreter of 3.11 or later (the first one found)
#   CONSTRAINTS  pip constraints; CONSTRAINTS=/dev/null on a machine with a GPU
#   PIP_ARGS     further arguments of pip install, such as another index
#   EXTRAS       extras of the package for make test (dev); dev,clients also has heavy clients
#   TEST_ARGS    arguments of pytest (two processes)

VENV := .venv
CONSTRAINTS ?= constraints.txt
PIP_ARGS ?=
EXTRAS ?= dev
TEST_ARGS ?= -n 2 --dist loadfile

CANDIDATES := python3 python3.11 python3.12 python3.13 python3.14 python
SUITABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in $(CANDIDATES); do \
	"$$python" -c '$(SUITABLE)' >/dev/null 2>&1 && { command -v "$$python"; break; }; done)

PIP_INSTALL = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	--constraint $(CONSTRAINTS) $(PIP_ARGS)

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(VENV)/bin/moetor generate --prompt "ROMEO:" --temperature 0.7 --seed 2 --max-tokens 100
	@echo "more: $(VENV)/bin/moetor --help"

test: $(VENV)/.installed-dev
	$(VENV)/bin/pytest $(TEST_ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV)

# The stamps make a second run quick; a change of what is installed makes them stale.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing Moetor and what it needs into $(VENV) (minutes the first time)"
	@$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing the development tools"
	@$(PIP_INSTALL) --editable '.[$(EXTRAS)]'
	@touch $@

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or later with venv was found; \
	install one (on Debian: apt install python3 python3-venv) or name it: make PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c '$(SUITABLE)' || { echo "error: $(PYTHON) is not a Python 3.11 or later \
	with venv; name another: make PYTHON=..." >&2; exit 1; }
	@echo "Creating $(VENV) with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv $(VENV)
