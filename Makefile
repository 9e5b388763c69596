PYTHON ?= python3
BIN = .venv/bin

quickstart: .venv/installed
	$(BIN)/python quickstart.py

# on WORKERS cores, each file whole on one of them, in the order of tests/conftest.py
WORKERS = 2
SUITE = -m pytest -q -n $(WORKERS) --dist=loadfile --no-loadscope-reorder
test: .venv/installed-test
	$(BIN)/python $(SUITE)

# the same tests with the newest packages, in an environment of their own
test-newest: .venv-newest/installed
	.venv-newest/bin/python $(SUITE)

# under a minute: a look at every stage, in one process
QUICK = configurator model lora lion tokenizer prepare_data plan train eval_gsm8k spectrum
QUICK_SKIPS = merge_script or killed or sigterm or full_disk or as_a_user or long_runs or any_scalar or program_of_its_own
quick: .venv/installed-test
	$(BIN)/python -m pytest -q -m "not slow and not gpu" -k "not ($(QUICK_SKIPS))" $(QUICK:%=tests/test_%.py)

# the reading path: the system in 3,000 lines
READING_PATH = configurator.py model.py lora.py lion.py prepare_data.py train.py eval_gsm8k.py eval_humaneval.py spectrum.py
lines:
	@wc -l $(READING_PATH)

# seven lessons, in order; docs/lessons.md says for whom
LESSONS = $(sort $(wildcard lessons/[1-9]_*.py))
lessons: .venv/installed
	set -e; for lesson in $(LESSONS); do echo "== $$lesson"; $(BIN)/python $$lesson; done

# the same as notebooks, lessons/*.ipynb, which are not committed
notebooks: .venv/installed-notebooks
	$(BIN)/jupytext --to notebook $(LESSONS)

# what the machine can run: on a GPU all, on a CPU a small model
bench: .venv/installed-test
	if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	    then $(BIN)/python -m bench.throughput; fi
	$(BIN)/python -m bench.train
	$(BIN)/python -m bench.generate
	$(BIN)/python -m bench.kernels

# One call for a GPU lent for ten minutes, with the packages that its python3 has, or those of .venv. What matters most comes
# first, figures are written as they come, each part has a limit of its own (together 8 minutes), and one that fails costs no
# other. The kernels' tests run by themselves, so that each is named as it ends.
GPU_OUT = out/gpu
IN_PARALLEL = $(shell $(GPU_PYTHON) -c 'import xdist' 2> /dev/null && printf -- '-n 8')
GPU_PYTHON ?= $(or $(wildcard .venv/bin/python),$(PYTHON))
KERNELS = $(GPU_PYTHON) -m bench.kernels --device=cuda
TRAINING = $(GPU_PYTHON) -m bench.throughput --device=cuda
gpu:
	mkdir -p $(GPU_OUT)
	failed=; \
	timeout 60 $(KERNELS) --shapes=tiny --ranks=16 --stop_after=40 --out=$(GPU_OUT)/smoke.json || failed="$$failed smoke"; \
	timeout 110 $(KERNELS) --shapes=7b --stop_after=80 --out=$(GPU_OUT)/kernels.json || failed="$$failed kernels"; \
	timeout 180 $(TRAINING) --seq_lens=4096 --checkpointing=none --batches=16 --ranks=0,16,64,256 --stop_after=130 \
	    --out=$(GPU_OUT)/training.json || failed="$$failed training"; \
	timeout 55 $(GPU_PYTHON) -m bench.generate --device=cuda --sides=ours,peer --repeats=3 --out=$(GPU_OUT)/generation.json \
	    || failed="$$failed generation"; \
	timeout 60 $(GPU_PYTHON) -m pytest -v -rs $(IN_PARALLEL) tests/kernel_cases.py || failed="$$failed tests"; \
	timeout 15 $(GPU_PYTHON) -m paper.plot --benches=$(GPU_OUT)/training.json --out_dir=$(GPU_OUT) || failed="$$failed plot"; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	touch $@

.venv/installed-test: .venv/installed requirements-test.txt
	$(BIN)/pip install -q -r requirements-test.txt
	touch $@

.venv-newest/installed: requirements-newest.txt
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install -q -r requirements-newest.txt
	touch $@

.venv/installed-notebooks: .venv/installed requirements-notebooks.txt
	$(BIN)/pip install -q -r requirements-notebooks.txt
	touch $@

.PHONY: quickstart test test-newest quick lines lessons notebooks bench gpu
