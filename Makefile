# make demo: watch a small Mistral learn to think (minutes, two cores, no GPU)
# make test: prove that what it does is Quiet-STaR

PYTHON ?= python3
RUN = .venv/bin/python

demo: .venv/run
	PATH="$(CURDIR)/.venv/bin:$$PATH" sh runs/demo.sh

test: .venv/test
	$(RUN) -m pytest

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/test: requirements-test.txt .venv/run
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

clean:
	rm -rf .venv out data

.PHONY: demo test clean
