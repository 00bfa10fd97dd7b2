# Every target sets itself up in $(VENV). They need Python >= 3.11 and make. Where there is a C++17 compiler (g++ or
# clang++), moeship's CPU kernels are compiled; where not, one line says what that costs, ONNX Runtime's kernels compute,
# and the tests that need a compiler are skipped. From Python 3.13 on a compiler is needed: nvidia-pytriton asks for
# numpy 1.26, which has no wheels there. A target's line after ## is what `make help` prints.
PYTHON ?= python3
VENV ?= .venv
PORT ?= 8080
BIN := $(VENV)/bin
QUICK := tests/test_architecture.py tests/test_docs.py tests/export tests/clients/test_wire.py \
  tests/clients/test_messages.py tests/clients/test_errors.py tests/triton_repo/contracts tests/triton_repo/runtime
# What an install is made of: where one of them changes, it is made again.
SOURCES := pyproject.toml setup.py $(wildcard $(addprefix trt_build/ort/kernels/,*.cpp *.h third_party/*.h))

.PHONY: help demo chat test check quick format clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16
	@echo "PYTHON=python3.12 names another Python, VENV=DIR another environment (default: .venv)."

demo: $(VENV)/.demo  ## four small experts become a served phixtral, in ten seconds
	@$(BIN)/python -m trt_build.ort.kernels
	$(BIN)/moeship demo

chat: $(VENV)/.chat  ## the same, and a page to chat with it at http://127.0.0.1:8080/ (PORT=8090: another) until Ctrl-C
	@$(BIN)/python -m trt_build.ort.kernels
	$(BIN)/moeship demo --openai-port $(PORT)

test: $(VENV)/.dev check  ## what CI runs: check, and every test (minutes)
	@$(BIN)/python -m trt_build.ort.kernels
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder

check: $(VENV)/.dev  ## lint, format and types (seconds)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

quick: $(VENV)/.dev check  ## check, and the tests that build no engine and start no server (two minutes)
	$(BIN)/python -m pytest -q --numprocesses=auto --dist=loadfile $(QUICK)

format: $(VENV)/.dev  ## mend what lint and format can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and what tools leave
	rm -rf $(VENV) build trt_build/ort/kernels/*.so *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moeship needs Python 3.11 or newer; name one with: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: EXTRAS = cpu,client,server
$(VENV)/.chat: EXTRAS = cpu,client,server,gateway
$(VENV)/.dev: EXTRAS = dev

# pip compiles to bytecode one file after the other: of 21,000 files that takes 40 seconds. compileall takes every core,
# and passes over the few files that are not for this Python.
$(VENV)/.demo $(VENV)/.chat $(VENV)/.dev: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[$(EXTRAS)]'
	@$(BIN)/python -W ignore -m compileall -qq -j 0 $$($(BIN)/python -c 'import site; print(*site.getsitepackages())') || true
	touch $@
