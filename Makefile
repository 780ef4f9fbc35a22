# `make train` and `make test` are all the set-up there is; both need Python >= 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: train test test-lowest test-newest clean
.DELETE_ON_ERROR:

train: $(VENV)/runtime
	$(RUN) rladapter_ppo.py $(ARGS)

test: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(RUN) -m pytest -q -n 2 --dist loadfile

# The same in an environment of its own, with the lowest versions that requirements.txt allows, and with the newest.
# Another Python: make test-newest PYTHON=python3.13
test-lowest:
	sed -E 's/ *#.*//; s/>=([0-9.]+).*/==\1/' requirements.txt > $(VENV)-lowest.txt
	PIP_CONSTRAINT=$(abspath $(VENV)-lowest.txt) $(MAKE) test VENV=$(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip check

test-newest:
	rm -rf $(VENV)-newest
	$(MAKE) test VENV=$(VENV)-newest
	$(VENV)-newest/bin/python -m pip check

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
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-lowest.txt $(VENV)-newest
