# make pretrain        set up the environment, then pre-train with configs/default.yaml
# make test            set up the environment, then lint, type-check and test
# make compile-check   compile every kernel without a GPU, compare golden tables (some 4 minutes)
# make same            six short runs: compare losses and weights with the recorded ones, bit by bit
# make chaos           kill processes at every moment, compare the results (ARGS="--minutes 30", --table)
# make schedules       simulated schedules of ranks, clients and faults (ARGS="--schedules 100000", --seed 7)
# make faults          one long run that everything happens to (ARGS="--faults 62 --minutes 30 --processes 32")
# make test-slurm      two virtual SLURM nodes: a run that is requeued and loses a rank (needs root, slurm-wlm, munge)
# make card            all that a GPU is needed for, in 12 minutes (MINUTES=5, OUT=FILE.json, ARGS="--only waits")
# make audit           known vulnerabilities of the installed packages (.ci/run does this, too)
# make sbom            the installed packages as CycloneDX JSON, for a release (OUT=FILE.json)
# make setup           the environment alone        make clean    remove it and what tools left
#
# make pretrain CONFIG=my.yaml ARGS="run.windows=50 --resume"    another run file, overrides, resume

VENV ?= .venv
# `cuda` installs PyTorch's ordinary builds, `cpu` the pinned versions of constraints.txt.
DEVICE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
# An interpreter from 3.10 to 3.13. Empty takes the newest on the path.
PYTHON ?=
# More arguments for pip, such as an index.
PIP_FLAGS ?=
CONFIG ?= configs/default.yaml
ARGS ?=
MINUTES ?= 12

ifeq ($(DEVICE),cuda)
EXTRAS := server,data,glue,dev,gpu
PINS :=
RANKS ?= $(shell nvidia-smi -L | wc -l)
else
EXTRAS := server,data,glue,dev
PINS := --constraint constraints.txt
RANKS ?= 2
export DS_ACCELERATOR := cpu
# Ranks and clients share the cores: more threads only compete for them.
export OMP_NUM_THREADS ?= 1
endif
# The deepspeed launcher follows CUDA_VISIBLE_DEVICES only without --num_gpus.
NUM_GPUS := $(if $(CUDA_VISIBLE_DEVICES),,--num_gpus $(RANKS))

# The launcher always picks the same port, so two runs on a machine would collide.
FREE_PORT := 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'

BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed-$(DEVICE)
LOG := $(VENV)/install.log
# Another version of transformers, which tests let read what we write.
OLDER := $(VENV)/transformers-4
export PATH := $(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: pretrain test test-slurm compile-check same chaos schedules faults card audit sbom setup clean

pretrain: $(STAMP)
	@deepspeed --log_level critical --master_port $$(python -c $(FREE_PORT)) $(NUM_GPUS) launchers/pretrain.py --config $(CONFIG) $(ARGS)

test: export HF_HUB_OFFLINE := 1
test: $(STAMP) $(OLDER)/.installed
	@ruff check --quiet .
	@ruff format --quiet --check . || { echo "make: files above are not formatted; run: ruff format ."; exit 1; }
	@mypy --no-error-summary
	@pytest --numprocesses auto --quiet $(ARGS)

compile-check: $(STAMP)
	@python -m fedbert_kernels.compile_check $(ARGS)

same: $(STAMP)
	@python tests/integration/recorded_runs.py $(ARGS)

chaos: $(STAMP)
	@python tests/integration/chaos.py $(ARGS)

schedules: $(STAMP)
	@python tests/simulation/schedules.py $(ARGS)

faults: $(STAMP)
	@python tests/integration/faults.py $(ARGS)

test-slurm: $(STAMP)
	@python tests/integration/slurm_cluster.py $(ARGS)

card: $(STAMP)
	@python -m benchmarks.card --minutes $(MINUTES) --out $(or $(OUT),runs/card.json) $(ARGS)

audit: $(STAMP)
	@.ci/audit

sbom: $(STAMP)
	@[ -x $(VENV)/tools/bin/cyclonedx-py ] || { python -m venv $(VENV)/tools && \
		$(VENV)/tools/bin/pip install --quiet 'cyclonedx-bom==7.*' >$(LOG) 2>&1; } || \
		{ echo "make: pip failed: $$(grep '^ERROR' $(LOG) | tail -n 1) (all of it: $(LOG))"; exit 1; }
	@$(VENV)/tools/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible \
		--output-format JSON --output-file $(or $(OUT),sbom.json) && echo "sbom    $(or $(OUT),sbom.json)"

setup: $(STAMP)
	@:

$(VENV)/bin/python:
	@for python in $(or $(PYTHON),python3.13 python3.12 python3.11 python3.10 python3); do \
		"$$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || continue; \
		echo "environment  $$("$$python" -V), $(DEVICE) -> $(VENV)"; \
		"$$python" -m venv $(VENV) >/dev/null 2>&1 && exit 0; \
		rm -f $(VENV)/bin/python*; \
		echo "make: $$python cannot make a virtual environment; install python3-venv (or name another with PYTHON=)"; exit 1; \
	done; \
	echo "make: no Python from 3.10 to 3.13 $(if $(PYTHON),at $(PYTHON),on the path); install one or name it with PYTHON="; exit 1

$(STAMP): pyproject.toml constraints.txt | $(VENV)/bin/python
	@$(BIN)/python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "make: $(VENV) holds a Python outside 3.10 to 3.13; run: make clean"; exit 1; }
	@echo "packages     fedbert-ds[$(EXTRAS)], a few minutes the first time"
	@$(BIN)/python -m pip install --quiet $(PINS) $(PIP_FLAGS) --editable '.[$(EXTRAS)]' >$(LOG) 2>&1 || \
		{ echo "make: pip failed: $$(grep '^ERROR' $(LOG) | tail -n 1) (all of it: $(LOG))"; exit 1; }
	@rm -f $(VENV)/.installed-*
	@touch $@

# Not of the environment: where there is no index, its tests are skipped and say so.
$(OLDER)/.installed: tests/integration/transformers-4.txt | $(STAMP)
	@rm -rf $(OLDER)
	@$(BIN)/python -m pip install --quiet --no-deps $(PIP_FLAGS) --target $(OLDER) --requirement $< >$(OLDER).log 2>&1 && \
		touch $@ || { rm -rf $(OLDER); echo "make: transformers 4 is not tried: $$(grep '^ERROR' $(OLDER).log | tail -n 1)"; }

clean:
	@! [ -f $(VENV)/pyvenv.cfg ] || rm -rf $(VENV)
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
