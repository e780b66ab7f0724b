# Each target works alone on a fresh clone: it makes .venv, installs, and does its job.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
AUDIT_STAMP := .venv/.audit-installed
DOCS_STAMP := .venv/.docs-installed

.PHONY: run test soak compat audit lint screenshots docs docs-serve clean

run: $(STAMP)
	at=$$(date +%Y%m%d-%H%M%S) && \
	$(BIN)/fastpeft train --run iwlora_mnli --name iwlora_mnli-$$at && \
	$(BIN)/fastpeft train --run lora_mnli --name lora_mnli-$$at && \
	$(BIN)/fastpeft evaluate iwlora_mnli-$$at lora_mnli-$$at

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/pytest -n logical --dist loadfile

soak: $(STAMP)
	FASTPEFT_TEST_SEED=$${FASTPEFT_TEST_SEED:-random} $(BIN)/pytest -m soak --timeout 7200 -s

compat: $(STAMP)
	$(BIN)/python .ci/compat.py $(if $(TORCH),--torch $(TORCH))

# A +cpu or +cu130 behind a version is in no database. --strict: what could not be asked about is a failure.
audit: $(AUDIT_STAMP)
	$(BIN)/pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' > .venv/installed.txt
	$(BIN)/python .ci/floors.py > .venv/floors.txt
	$(BIN)/pip-audit --strict --vulnerability-service osv --no-deps --disable-pip --requirement .venv/installed.txt
	$(BIN)/pip-audit --strict --vulnerability-service osv --no-deps --disable-pip --requirement .venv/floors.txt

lint: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

screenshots: $(STAMP)
	$(BIN)/python docs/screenshots.py

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: docs
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory site 8000

$(AUDIT_STAMP): $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[audit]'
	touch $(AUDIT_STAMP)

$(DOCS_STAMP): $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $(DOCS_STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $(STAMP)

clean:
	rm -rf .venv build site *.egg-info .pytest_cache .ruff_cache .hypothesis
