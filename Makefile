# Every target runs in .venv, which `make` builds from the project's own files when it is missing.

PYTHON ?= python3
# The versions that are tested. A machine with a torch of its own: make VENV=/path/to/its/venv TORCH=torch
VENV ?= .venv
TORCH ?= torch==2.13.0
bin := $(VENV)/bin
pip := $(bin)/python -m pip --disable-pip-version-check

sources := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.inl csrc/*/*.cu csrc/*/*.cuh)

.PHONY: demo test frameworks emulate sanitize cuda-check gpu bench bench-quick lint format clean

demo: $(VENV)/installed  ## train with cross-entropy and with HEM, report and draw (ARGS=--quick: in seconds)
	$(bin)/hem-ext compare corruption imbalanced --losses ce,hem,hem+ --seeds 3 --output demo $(ARGS)

test: $(VENV)/installed  ## the whole suite (ARGS="-k words" for a part)
	$(bin)/python -m pytest --no-skips $(ARGS)

frameworks: $(VENV)-frameworks/installed  ## the documentation's examples for Lightning and transformers, with these installed
	$(VENV)-frameworks/bin/python -m pytest --no-skips tests/frameworks $(ARGS)

emulate: $(VENV)/installed  ## the CUDA kernels, run on the host, against the oracle
	$(bin)/python -m pytest --no-skips tests/emulation/test_emulation.py $(ARGS)

sanitize: $(VENV)/installed  ## ... and under ThreadSanitizer, AddressSanitizer and UBSan
	$(bin)/python -m pytest --no-skips tests/emulation/test_sanitizers.py $(ARGS)

cuda-check: $(VENV)/installed  ## compile the CUDA sources, limit registers and spills; needs nvcc, no GPU
	$(bin)/python tests/cuda_check.py

gpu: $(VENV)/installed  ## everything that needs a GPU: tests, compute-sanitizer, benchmark; under 8 minutes
	$(bin)/python bench/gpu.py $(ARGS)

bench: $(VENV)/installed  ## speed and memory against the peers; rows go to bench/results
	$(bin)/python -m pytest bench $(ARGS)

bench-quick: $(VENV)/installed  ## ... in under 3 minutes, rows to build/bench.jsonl
	$(bin)/python -m pytest bench --quick --results build/bench.jsonl $(ARGS)

lint: $(VENV)/installed
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy
	$(bin)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.inl' '*.cu' '*.cuh')

format: $(VENV)/installed
	$(bin)/ruff check --fix
	$(bin)/ruff format
	$(bin)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.inl' '*.cu' '*.cuh')

clean:
	rm -rf $(VENV) $(VENV)-frameworks build demo *.egg-info hem_ext/*.so

# The native library is built against the torch that is already there, not against a second one that pip's
# build isolation would fetch.
$(VENV)/installed: $(sources)
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	$(pip) install --quiet '$(TORCH)' numpy 'setuptools>=77' wheel 'pybind11>=2.13' ninja
	$(bin)/python -c 'import torch; print("torch==" + torch.__version__)' > $(VENV)/constraints.txt
	$(pip) install --quiet --no-build-isolation --constraint $(VENV)/constraints.txt --editable '.[dev]'
	$(bin)/python -m hem_ext.info
	touch $@

# Beside the first one, whose packages it sees: with transformers installed, torchmetrics imports them each time.
$(VENV)-frameworks/installed: $(VENV)/installed
	$(PYTHON) -m venv $(VENV)-frameworks
	$(bin)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$($(VENV)-frameworks/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth
	$(VENV)-frameworks/bin/python -m pip install --quiet --constraint $(VENV)/constraints.txt pytorch-lightning transformers
	touch $@
