# Each target works alone on a fresh clone: it makes .venv, installs, and does its job.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: run test soak lint screenshots clean

run: $(STAMP)
	$(BIN)/fastpeft train --run iwlora_mnli

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest -n logical --dist loadfile

soak: $(STAMP)
	FASTPEFT_TEST_SEED=$${FASTPEFT_TEST_SEED:-random} $(BIN)/pytest -m soak --timeout 7200 -s

lint: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

screenshots: $(STAMP)
	$(BIN)/python docs/screenshots.py

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $(STAMP)

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
