# Every target sets up what it needs in .venv and redoes nothing that is done.
#
#   make demo    train the small language model     make test          run the tests
#   make bench   run the benchmarks                 make test-kernels  kernels under sanitizers
#   make bench-cpu   experts against their peers    make lint          check style; make format mends
#   make cuda-check  compile the CUDA kernels (needs nvcc, neither torch nor a GPU)
#   make test-emulated   run the tests with the CUDA operators, by the host
#   make fuzz    fuzz every operator for a while    make test-sanitized   under sanitizers, too
#   make gpu-check   all that needs a GPU, with GPU_PYTHON; make bench-cuda   its benchmarks alone
#   make docs    build the pages of docs/ into build/docs
#   make test-matrix  the tests with several versions of torch
#   make check-headers   compile against the headers of another torch, syntax only
#
# PYTHON=python3.12   the interpreter of .venv (3.10 or newer)
# TORCH=torch==2.14.1 another torch than constraints.txt pins: a .venv with another changes to it
# MATRIX="2.15.0 2.14.1:python3.12"   what test-matrix runs with; each stays in build/matrix
# HEADERS=torch-....whl   a wheel of torch, or a folder, for check-headers
# ARGS="..."          passed on to the demo, pytest or the benchmarks
PYTHON ?= python3
TORCH ?= $(shell grep '^torch==' constraints.txt)
MATRIX ?= 2.11.0 2.13.0 2.14.1 2.15.0
ARGS ?=
VENV := .venv
MADE_FOR := $(shell cat $(VENV)/constraints.txt 2>/dev/null)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
FORMATTED := $(SOURCES) $(shell find tests benchmarks -name "*.cpp" -o -name "*.h" -o -name "*.cuh")
CPU_KERNELS := $(filter csrc/cpu/kernels/%.cpp csrc/cpu/memory/%.cpp,$(SOURCES))
CUDA_KERNELS := $(filter %.cu,$(SOURCES))

GPU_PYTHON ?= python3

.PHONY: help demo test test-kernels test-emulated test-sanitized fuzz cuda-check gpu-check bench \
  bench-cpu bench-cuda docs lint format clean setup test-matrix check-headers FORCE

help:
	@sed -n '2,19s/^# \{0,1\}//p' Makefile

setup: $(VENV)/.built

# Also if .venv was made for another torch.
$(VENV)/.torch: constraints.txt $(if $(filter-out $(TORCH),$(MADE_FOR)),FORCE)
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "moe_ext: Python 3.10 or newer is needed; name one with PYTHON=..."; exit 1; }
	@echo "== setting up $(VENV): $(TORCH)"
	@$(PYTHON) -m venv $(VENV) || { echo "moe_ext: no venv for $(PYTHON) (Debian: python3-venv)"; exit 1; }
	@echo '$(TORCH)' > $(VENV)/constraints.txt
	@$(PIP) -c $(VENV)/constraints.txt '$(TORCH)' numpy ninja 'setuptools>=77'
	@touch $@

# The extras come after torch and under its constraint, or pip would look for another torch.
$(VENV)/.built: $(VENV)/.torch pyproject.toml setup.py build_backend.py $(SOURCES)
	@command -v c++ >/dev/null || { echo "moe_ext: a C++ compiler is needed (Debian: g++)"; exit 1; }
	@echo "== building moe_ext (the first time takes about 3 minutes on 2 cores)"
	@$(PIP) -c $(VENV)/constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

# With the headers that HEADERS names, a wheel of torch or a folder, or else the newest at hand.
check-headers:
	@PYTHON=$(PYTHON) .ci/check-headers $(HEADERS)

# Starts over each time, but for ARGS=--resume.
demo: setup
	$(BIN)/python examples/train_lm.py --overwrite $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

test-matrix:
	@$(PYTHON) .ci/test_matrix.py --python $(PYTHON) --pytest="$(ARGS)" $(MATRIX)

# One program for each sanitizer, its units compiled side by side; threads for the thread sanitizer.
test-kernels: build/kernels-address,undefined build/kernels-thread build/cuda-kernels
	build/kernels-address,undefined
	build/kernels-thread 3
	build/cuda-kernels

build/kernels-%: $(CPU_KERNELS) $(filter csrc/cpu/%.h csrc/common/%,$(SOURCES)) \
    $(wildcard tests/kernels/*)
	@rm -rf $@-objects && mkdir -p $@-objects
	@echo "== building the kernels' test with -fsanitize=$* (about 2 minutes on 2 cores)"
	@printf '%s\n' $(CPU_KERNELS) tests/kernels/cpu_test.cpp | xargs -P "$$(nproc)" -I{} sh -c \
	  'c++ -std=c++17 -O1 -g -Wall -Icsrc -fsanitize=$* -fno-sanitize-recover=all -c {} \
	  -o $@-objects/$$(basename {}).o'
	@! nm -C $@-objects/avx*.o | grep -E ' [TWu] (moe_ext|std)' || \
	  { echo "the linker may run these on machines without AVX: they must have internal linkage"; exit 1; }
	@c++ -fsanitize=$* -pthread $@-objects/*.o -o $@

# The CUDA kernels run by the host.
build/cuda-kernels: $(filter csrc/cuda/kernels/% csrc/common/%,$(SOURCES)) \
    $(wildcard tests/kernels/*) $(shell find tests/emulation -type f)
	@rm -rf $@-objects && mkdir -p $@-objects
	@echo "== building the CUDA kernels for the host"
	@printf '%s\n' tests/emulation/kernels.cpp tests/kernels/cuda_test.cpp | \
	  xargs -P "$$(nproc)" -I{} sh -c \
	  'c++ -std=c++17 -O1 -g -Wall -Wno-unknown-pragmas -Itests/emulation/include -Icsrc \
	  -fsanitize=address,undefined -fno-sanitize-recover=all -c {} -o $@-objects/$$(basename {}).o'
	@c++ -fsanitize=address,undefined $@-objects/*.o -o $@

# The tests of operators and layers, with the CUDA operators in place of the CPU's.
EMULATED := permute unpermute topk_router aux_loss router_logits grouped_linear expert_ffn moe_ffn \
  capacity pairs properties uninitialised cuda bad_inputs layers
test-emulated: setup
	$(BIN)/python tests/emulation/emulate.py $(EMULATED:%=tests/test_%.py) -q $(ARGS)
	MOE_EXT_EMULATED_MAJOR=9 $(BIN)/python tests/emulation/emulate.py \
	  $(patsubst %,tests/test_%.py,grouped_linear expert_ffn moe_ffn cuda) -q $(ARGS)

# Hostile calls of every operator, then calls compared with loops in fp64: so many seconds each.
fuzz: setup
	PYTHONPATH=tests $(BIN)/python -m fuzz $(ARGS)

# The extension built with the address and the undefined behaviour sanitizer, beside links to the
# package, under a torch without them: a slice of the tests, then the fuzzer.
# - libasan has to be the first library of the process. Leaks are not looked for: Python leaks.
# - The sanitizers' options let mmap fail as without them (allocator_may_return_null), so that torch
#   raises for sizes beyond memory; operator new would end the process.
# - torch's OpenMP threads need nothing. The checks of types and of every pointer are left out: they
#   instrument torch's headers, which doubles the time of compiling; test-kernels has them.
# - Python's handlers must not take the signals that the sanitizers report (2: theirs alone).
SANITIZED := build/sanitized/moe_ext
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined \
  -fno-sanitize=vptr,null,alignment,object-size
SANITIZED_OBJECTS := $(patsubst csrc/%.cpp,build/sanitized/objects/%.o,\
  $(filter-out csrc/cuda/%,$(filter %.cpp,$(SOURCES))))
SANITIZED_TESTS := bad_inputs pairs permute unpermute topk_router router_logits aux_loss capacity \
  grouped_linear uninitialised
SIGNALS := handle_segv=2:handle_sigfpe=2:handle_abort=2
# Run in build/sanitized, whose package comes first on Python's path.
SANITIZED_PYTHON := cd build/sanitized && env PYTHONPATH=$(CURDIR)/tests \
  LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096:$(SIGNALS) \
  UBSAN_OPTIONS=print_stacktrace=1 $(abspath $(BIN))/python
test-sanitized: setup
	@echo "== building moe_ext with $(SANITIZE)"
	@$(MAKE) --no-print-directory -j "$${MAX_JOBS:-$$(nproc)}" $(SANITIZED)/_C.so
	@$(SANITIZED_PYTHON) -c 'import moe_ext; assert "sanitized" in moe_ext._C.__file__'
	$(SANITIZED_PYTHON) -m pytest $(SANITIZED_TESTS:%=$(CURDIR)/tests/test_%.py) -q -x \
	  -p no:faulthandler -p no:cacheprovider --timeout 900
	$(SANITIZED_PYTHON) -m fuzz --seconds 30 $(ARGS)

$(SANITIZED)/_C.so: $(SANITIZED_OBJECTS) build/sanitized/flags
	@mkdir -p $(SANITIZED)
	@ln -sf $(CURDIR)/moe_ext/*.py $(addprefix $(CURDIR)/moe_ext/,integrations monitor routers) $(SANITIZED)
	@c++ -shared $(SANITIZE) -fopenmp $(SANITIZED_OBJECTS) $$(tail -1 build/sanitized/flags) -o $@

# What torch wants of a compiler and of a linker, a line each.
build/sanitized/flags: $(VENV)/.torch
	@mkdir -p $(@D)
	@$(BIN)/python -c 'import sysconfig, torch.utils.cpp_extension as torch; \
	  print(*("-isystem " + path for path in [*torch.include_paths(), sysconfig.get_path("include")])); \
	  print(*("-L" + path for path in torch.library_paths()), *"-lc10 -ltorch_cpu -ltorch -ltorch_python".split())' > $@

build/sanitized/objects/%.o: csrc/%.cpp build/sanitized/flags
	@mkdir -p $(@D)
	@c++ -std=c++20 -O1 -g -fPIC -fopenmp -fvisibility=hidden -Icsrc $(SANITIZE) -MMD -MP \
	  -DTORCH_EXTENSION_NAME=_C -DTORCH_API_INCLUDE_EXTENSION_H $$(head -1 build/sanitized/flags) \
	  -c $< -o $@
-include $(SANITIZED_OBJECTS:.o=.d)

# PTX for every GPU from sm_80, code for Hopper; what ptxas says of registers and spills stays in
# build/cuda.
cuda-check:
	@command -v nvcc >/dev/null || { echo "moe_ext: nvcc is needed (CUDA Toolkit)"; exit 1; }
	@mkdir -p build/cuda
	@for source in $(CUDA_KERNELS); do \
	  name=build/cuda/$$(basename $$source .cu); \
	  nvcc -std=c++17 -O3 --expt-relaxed-constexpr -Icsrc -gencode arch=compute_80,code=compute_80 \
	    -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a -Xptxas -v \
	    -Werror all-warnings -c $$source -o $$name.o > $$name.log 2>&1 || { cat $$name.log; exit 1; }; \
	  echo "$$source: $$(grep -c 'Used [0-9]* registers' $$name.log) kernels, at most" \
	    "$$(sed -n 's/.*Used \([0-9]*\) registers.*/\1/p' $$name.log | sort -n | tail -1) registers," \
	    "$$(sed -n 's/.* \([0-9]*\) bytes spill stores.*/\1/p' $$name.log | sort -n | tail -1)" \
	    "bytes spilled"; \
	done

gpu-check:
	.ci/gpu-check $(GPU_PYTHON)

bench: setup
	$(BIN)/python -m pytest benchmarks --benchmark-columns=min,median,rounds \
	  --benchmark-group-by=func --benchmark-sort=name $(ARGS)

# Processes of their own, since some peers keep copies of all the weights they have seen. Everything
# is measured in the environment that users have; a few training rows again with an allocator that
# keeps freed memory, which marks them.
BENCH := $(BIN)/python -m pytest -s $(ARGS)
BENCH_CPU := $(BENCH) benchmarks/bench_moe_cpu.py
TUNED := GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736
bench-cpu: setup
	$(BENCH_CPU) -k "not train and (forward or small)"
	$(BENCH_CPU) -k "decode or memory"
	$(BENCH_CPU) -k "train and not memory"
	$(TUNED) $(BENCH_CPU) -k "test_train and (E128 or I3584) and not fp16"
	$(BENCH) benchmarks/bench_models_cpu.py

bench-cuda: setup
	$(BIN)/python benchmarks/bench_moe_cuda.py $(ARGS)

# A warning or a broken link is an error (but not with --quiet, which drops warnings before they
# count). The variable silences an announcement of the theme's.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

clean:
	rm -rf $(VENV) build dist *.egg-info moe_ext/_C*.so
