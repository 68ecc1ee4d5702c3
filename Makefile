# Everything a clean clone needs is made here: `make demo` and `make test` create .venv themselves. The second run uses
# no network.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
LIB := src/shoal/libshoal.so
RUN_STAMP := $(VENV)/.shoal-run
SERVE_STAMP := $(VENV)/.shoal-serve
DEV_STAMP := $(VENV)/.shoal-dev
DIST_STAMP := $(VENV)/.shoal-dist
PAGE_STAMP := $(VENV)/.shoal-page
ORACLE := .venv-oracle
ORACLE_STAMP := $(ORACLE)/.shoal-oracle
CLIENTS := .venv-clients
CLIENTS_STAMP := $(CLIENTS)/.shoal-clients
WEBUI := .venv-webui
WEBUI_STAMP := $(WEBUI)/.shoal-webui
C_SOURCES := $(wildcard csrc/*.c csrc/*.h csrc/*.inc)
# As many processes of tests as CPUs. Each takes whole files, so that what a file prepares is prepared once.
PROCESSES := -n logical --maxprocesses 8
PARALLEL := $(PROCESSES) --dist loadfile --no-loadscope-reorder
PYTEST := python -m pytest -q --durations=10
# The same as in pyproject.toml (tests/repo/test_shape.py).
USUAL := not oracle and not arm and not dist and not lab and not clients and not webui and not page
# A phone's numpy comes from its package manager; pip could only compile it there.
VENV_FLAGS := $(if $(findstring com.termux,$(PREFIX)),--system-site-packages)

.PHONY: help demo demo-page test check format bench dist lib abi oracle api sanitize check-arm check-dist check-clients check-webui check-page check-lab check-protocol fuzz clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:
	@echo "make demo       a model, cut in three, answers a question across three processes"
	@echo "make demo-page  a chat over these processes in a browser, and what they do"
	@echo "make test       all tests that need no more than a C compiler and PyPI"
	@echo "make check      ruff, mypy --strict, file sizes and import directions"
	@echo "make format     let ruff format the code"
	@echo "make bench      benchmarks of the kernels"
	@echo "make dist       an sdist, and wheels for x86-64, arm64 and Android, in dist/"
	@echo "make lib        compile csrc/ again if it changed"
	@echo "make abi        write engine/backends/_abi.py again from csrc/kernels.h"
	@echo "make api        write docs/api.md again from the docstrings"
	@echo "make oracle     compare with torch and transformers, and run with Ray (a big download, in an environment of its own)"
	@echo "make sanitize   tests of the kernels and the engine with the C code under ASan and UBSan"
	@echo "make check-arm  run, count and model the Arm kernels (installs qemu, compilers and llvm with apt)"
	@echo "make check-dist try what make dist makes (installs clang-19, lld-19 and qemu with apt)"
	@echo "make check-clients  programs that speak OpenAI's API ask shoal serve (a download of 1 GB, in an environment of its own)"
	@echo "make check-webui  Open WebUI asks shoal serve (8 GB, in an environment of its own)"
	@echo "make check-page  use the page in a real browser (installs chromium with apt)"
	@echo "make check-lab  devices that differ, in network namespaces with memory caps (as root; installs iproute2 with apt)"
	@echo "make check-protocol  all runs of the protocol in small worlds, with faults (docs/notes/2026-11-protocol-model.md)"
	@echo "make fuzz       ten million changed inputs for whatever reads bytes of strangers (docs/notes/2026-11-fuzzing.md)"
	@echo "make clean      remove what was built; .venv stays"

# Beside each other, processes of tests should not start a thread for every CPU.
test oracle sanitize check-arm check-dist: export OPENBLAS_NUM_THREADS := 1
test oracle sanitize check-arm check-dist: export OMP_NUM_THREADS := 1

demo: $(RUN_STAMP) lib
	@$(BIN)/shoal demo

demo-page: $(SERVE_STAMP) lib
	@$(BIN)/shoal demo --page

test: $(DEV_STAMP) lib
	$(BIN)/$(PYTEST) $(PARALLEL) -m "$(USUAL) and not alone"
	$(BIN)/$(PYTEST) -m "$(USUAL) and alone"

check: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/repo/test_shape.py

format: $(DEV_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(DEV_STAMP) lib
	$(BIN)/python -m pytest -q bench

dist: $(DIST_STAMP)
	$(BIN)/python packaging/make_dist.py

# A make of its own, because the install before it may just have compiled the library.
lib: $(RUN_STAMP)
	@$(MAKE) --no-print-directory --quiet $(LIB)

# An install survives a compiler that fails; this does not. The old library goes first, so that a failure leaves none.
$(LIB): $(C_SOURCES) setup.py pyproject.toml | $(VENV)/.shoal-venv
	rm -f $@
	$(BIN)/python setup.py --quiet build_ext --inplace
	@test -f $@ || { echo "make: csrc/ did not compile; the compiler's words stand above" >&2; exit 1; }

abi: $(DEV_STAMP)
	$(BIN)/python scripts/make_abi.py

api: $(DEV_STAMP)
	$(BIN)/python scripts/make_api.py

oracle: $(ORACLE_STAMP) lib
	$(ORACLE)/bin/$(PYTEST) $(PARALLEL) -m oracle

sanitize: $(DEV_STAMP) lib
	$(BIN)/python -m tests.sanitize

check-arm: $(DEV_STAMP) lib
	scripts/apt-need qemu-user-static qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross clang-19 lld-19 llvm-19
	$(BIN)/$(PYTEST) $(PARALLEL) -m arm

check-dist: $(DIST_STAMP)
	scripts/apt-need clang-19 lld-19 qemu-user-static
	@$(MAKE) --no-print-directory dist
	$(BIN)/$(PYTEST) $(PROCESSES) --dist worksteal -m dist

check-clients: $(DEV_STAMP) $(CLIENTS_STAMP) lib
	scripts/apt-need curl
	$(BIN)/python -m pytest -q -m clients tests/clients

check-webui: $(DEV_STAMP) $(WEBUI_STAMP) lib
	$(BIN)/python -m pytest -q -m webui tests/clients

check-page: $(PAGE_STAMP) lib
	scripts/apt-need chromium
	$(BIN)/$(PYTEST) -m page tests/page

check-lab: $(DEV_STAMP) lib
	scripts/apt-need iproute2
	$(BIN)/python -m pytest -q -m lab tests/lab
	$(BIN)/python -m bench.chaos --seed 1 --trials 60 --longest 3 --moves 2 --jobs 2

check-protocol: $(DEV_STAMP) lib
	$(BIN)/python -m tests.explorer

fuzz: $(DEV_STAMP) lib
	$(BIN)/python -m tests.fuzz --count 10000000

clean:
	rm -rf build dist $(LIB) src/shoal.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks

# setuptools is installed first, and isolation is off, so that the library is compiled by the same setuptools each time.
$(VENV)/.shoal-venv:
	@sh scripts/preflight.sh $(PYTHON)
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(PIP) "setuptools>=77"
	@touch $@

$(RUN_STAMP): pyproject.toml | $(VENV)/.shoal-venv
	$(PIP) --no-build-isolation --editable ".[run,convert,plan]"
	@touch $@

$(SERVE_STAMP): pyproject.toml | $(VENV)/.shoal-venv
	$(PIP) --no-build-isolation --editable ".[run,convert,plan,serve]"
	@touch $@ $(RUN_STAMP)

$(DEV_STAMP): pyproject.toml | $(VENV)/.shoal-venv
	$(PIP) --no-build-isolation --editable ".[all,dev]"
	@touch $@ $(SERVE_STAMP) $(RUN_STAMP)

$(DIST_STAMP): pyproject.toml | $(VENV)/.shoal-venv
	$(PIP) --no-build-isolation --editable ".[all,dev,dist]"
	@touch $@ $(DEV_STAMP) $(SERVE_STAMP) $(RUN_STAMP)

$(PAGE_STAMP): pyproject.toml | $(VENV)/.shoal-venv
	$(PIP) --no-build-isolation --editable ".[all,dev,page]"
	@touch $@ $(DEV_STAMP) $(SERVE_STAMP) $(RUN_STAMP)

$(ORACLE_STAMP): pyproject.toml
	@sh scripts/preflight.sh $(PYTHON)
	$(PYTHON) -m venv $(ORACLE)
	$(ORACLE)/bin/python -m pip --disable-pip-version-check install --quiet "setuptools>=77"
	$(ORACLE)/bin/python -m pip --disable-pip-version-check install --quiet torch==2.13.0
	$(ORACLE)/bin/python -m pip --disable-pip-version-check install --quiet accelerate gguf transformers "ray[data]"
	$(ORACLE)/bin/python -m pip --disable-pip-version-check install --quiet --no-build-isolation --editable ".[all,dev]"
	@touch $@

$(WEBUI_STAMP): Makefile
	$(PYTHON) -m venv $(WEBUI)
	$(WEBUI)/bin/python -m pip --disable-pip-version-check install --quiet open-webui
	@touch $@

$(CLIENTS_STAMP): Makefile
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip --disable-pip-version-check install --quiet langchain-openai litellm llm "lm-eval[api]" openai transformers
	@touch $@
