# The command index. Each command does its own set-up: a virtual environment in .venv, torch, the build.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# One process per core and one thread each, asleep while they wait; tests that are about threads ask for them.
PARALLEL := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
# One worker more than there are cores: tests of several processes mostly wait.
WORKERS := $(shell $(PYTHON) -c "import os; print(os.cpu_count() + 1)")
# What `build` compiles CUDA code for: the cards that are here, and without any the one that the compile gate's quick test
# looks at, since nvcc takes minutes for each. `cuda-check` compiles for every architecture.
ifeq ($(shell command -v nvidia-smi),)
export DNL_CUDA_ARCH_LIST ?= 8.0
endif
# Without the checks of each pointer of each access, of which AddressSanitizer sees what does harm: with them, unrolled
# kernels take minutes to compile.
SANITIZE := -O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize=null,alignment,object-size \
	-fno-sanitize-recover=undefined

.PHONY: help demo test test-weather lint bench bench-smoke build sanitize install-check cuda-check mutation-check test-gpu bench-gpu gpu-day clean
help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(READY): pyproject.toml setup.py csrc/build_backend.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch torchvision
	$(BIN)/python -m pip install --quiet --editable '.[experiments,vision,test,lint]'
	touch $@

build: $(READY) ## compile what changed in csrc
	$(BIN)/python dnl_kernels/_builder.py

demo: build ## train the paper's depth sweep on digits (CPU, a few minutes)
	$(BIN)/dnl train --dataset digits --depths 2 4 8 16 --epochs 6 --repeats 2 --out out/demo --resume

test: build ## the whole test suite; Triton's kernels interpreted in a process of their own
	@suite=passed; interpreter=passed; \
	$(PARALLEL) $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder \
		-m "not sanitizers" || suite=FAILED; \
	$(PARALLEL) TRITON_INTERPRET=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) \
		python_tests/triton_backend/interpreter || interpreter=FAILED; \
	echo "make test: the suite $$suite, the Triton interpreter $$interpreter"; \
	[ $$suite$$interpreter = passedpassed ]

test-weather: build ## the numerical tests under other libraries, levels, threads and seeds (minutes; a table)
	$(BIN)/python python_tests/weather.py --afresh --markdown docs/testing/weather.md

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The tests that run kernels of csrc, in every dtype, without those that compile or differentiate numerically: they run
# the same kernels again. On the best instruction-set level of this machine; DNL_ISA_LEVELS chooses others.
sanitize: build ## operator tests on a library built with AddressSanitizer and UndefinedBehaviorSanitizer
	DNL_ISA_LEVELS="$${DNL_ISA_LEVELS:-$$($(BIN)/python -c 'from dnl_kernels._extension import _C; print(_C.isa())')}" \
	DNL_CUDA=0 DNL_CXXFLAGS="$(SANITIZE)" $(BIN)/python dnl_kernels/_builder.py build/sanitized
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 DNL_LIBRARY_DIR=build/sanitized $(PARALLEL) \
	$(BIN)/python -m pytest --numprocesses auto --capture=sys -m "not slow" \
	-k "not derivative and not gradcheck and not gradients_of_gradients and not double_backward and not compile" \
	python_tests/ops/test_dense_sum.py python_tests/ops/test_dense_conv2d.py python_tests/ops/test_dnl_block_cpu.py \
	python_tests/ops/test_nonlocal_attention.py python_tests/ops/test_dnl_layer_cpu.py \
	python_tests/ops/test_norm_activation.py python_tests/ops/test_transition.py python_tests/ops/test_dnl_bottleneck.py \
	python_tests/ops/test_dnl_bottleneck_training.py
	$(PARALLEL) $(BIN)/python -m pytest --numprocesses 2 --dist load -m sanitizers python_tests/cuda_backend

install-check: build ## every way of installing, in environments that lack something
	$(BIN)/python python_tests/install/check_install.py

cuda-check: $(READY) ## compile every GPU kernel without a GPU, count traffic, and hold both to their budgets
	$(BIN)/python -m dnl_kernels.testing.triton_gate --markdown docs/gpu/triton-compile.md
	TRITON_INTERPRET=1 $(BIN)/python -m dnl_kernels.testing.triton_traffic --markdown docs/gpu/triton-traffic.md
	$(BIN)/python -c "from dnl_kernels import _builder; raise SystemExit(not _builder.nvcc())" || \
	$(BIN)/python -m pip install --quiet --editable '.[cuda-check]'
	DNL_CUDA_ARCH_LIST="8.0;8.6;8.9;9.0;10.0;12.0+PTX" $(BIN)/python dnl_kernels/_builder.py
	$(BIN)/python -m dnl_kernels.testing.cuda_gate --markdown docs/gpu/cuda-compile.md
	DNL_EMULATOR_FLAVOUR=banks $(BIN)/python -m dnl_kernels.testing.cuda_traffic --markdown docs/gpu/cuda-traffic.md

mutation-check: build ## break the C++ and the Triton kernels on purpose and see their tests fail
	@cpu=passed; triton=passed; \
	$(BIN)/python python_tests/cpu_backend/mutations.py --markdown docs/testing/mutants.md || cpu=FAILED; \
	$(BIN)/python python_tests/triton_backend/mutations.py || triton=FAILED; \
	echo "make mutation-check: C++ $$cpu, Triton $$triton"; [ $$cpu$$triton = passedpassed ]

test-gpu: build ## the operators' tests on a CUDA device; says so and skips where there is none
	$(BIN)/python -m pytest python_tests/gpu -rs

gpu-day: ## all that a GPU can tell in minutes, into out/gpu-day: no set-up, no network, the python3 that holds torch
	$(PYTHON) -m bench.gpu_day $(GPU_DAY)

bench-gpu: build ## the benchmarks on a CUDA device; says so and skips where there is none
	DNL_BENCH_DEVICE=cuda $(BIN)/python -m pytest bench --benchmark-json=docs/benchmarks/gpu.json

bench: build ## the benchmarks on this machine (23 minutes on two cores), rendered into docs/benchmarks
	$(BIN)/python -m pytest bench --benchmark-json=docs/benchmarks/cpu.json
	$(BIN)/python -m bench.report docs/benchmarks/cpu.json

bench-smoke: build ## every benchmark once, on small sizes: that they work, and that what they time is right
	$(PARALLEL) DNL_BENCH_SMOKE=1 $(BIN)/python -m pytest bench --numprocesses $(WORKERS) --benchmark-disable

clean: ## remove everything that was made here
	rm -rf $(VENV) build dist out dnl_kernels/_C*.so dnl_kernels/_cuda.so *.egg-info
