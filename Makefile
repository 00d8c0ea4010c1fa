# make demo       a small Mistral learns to think: 6 minutes on two cores, no GPU
# make test       the tests of all but tasks and tools, with the core packages and pytest alone
# make test-all   every test, with the libraries that are compared with and a browser (.ci/run)

PYTHON ?= python3
RUN = .venv/bin/python
PIP = $(RUN) -m pip install --quiet --disable-pip-version-check

demo: .venv/demo
	PATH="$(CURDIR)/.venv/bin:$$PATH" sh runs/demo.sh

test: .venv/test
	$(RUN) -m pytest -m "not slow"

test-all: .venv/test-all
	$(RUN) -m pytest

.venv/core: requirements.txt
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	touch $@

.venv/%: requirements-%.txt .venv/core
	$(PIP) -r $<
	touch $@

clean:
	rm -rf .venv out data

.PHONY: demo test test-all clean
