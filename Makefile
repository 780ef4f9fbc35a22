# `make train` and `make test` are all the set-up there is; both need Python >= 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: train test clean
.DELETE_ON_ERROR:

train: $(VENV)/runtime
	$(RUN) rladapter_ppo.py $(ARGS)

test: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(RUN) -m pytest -q -n 2 --dist loadfile

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: Python >= 3.11 is needed; name one with: make train PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/runtime: requirements.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/dev: requirements-dev.txt requirements.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	touch $@ $(VENV)/runtime

clean:
	rm -rf $(VENV)
