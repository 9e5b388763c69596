PYTHON ?= python3
BIN = .venv/bin

quickstart: .venv/installed
	$(BIN)/python quickstart.py

test: .venv/installed-test
	$(BIN)/python -m pytest -q

bench: .venv/installed-test
	$(BIN)/python bench.py

gpu: .venv/installed-test
	$(BIN)/python -m pytest -q -m gpu
	$(BIN)/python bench.py --parts=kernels,full,lora --out=gpu.json

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	touch $@

.venv/installed-test: .venv/installed requirements-test.txt
	$(BIN)/pip install -q -r requirements-test.txt
	touch $@

.PHONY: quickstart test bench gpu
