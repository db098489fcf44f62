# The two commands of a newcomer: `make demo` and `make test`. `make help` lists the rest.
SHELL := /bin/bash
BUILD := build
CMAKE := .venv/bin/cmake
JOBS  ?= $(shell nproc)
DATA  ?=
export DATA

.PHONY: help setup build demo test test-all fuzz sanitize bench-cpu gpu format lint clean
help:            ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*## /\t/' | expand -t 14

setup:           ## install what is missing (Debian packages, .venv)
	@tools/setup.sh

build: setup     ## build everything into build/
	@mkdir -p $(BUILD)
	@$(CMAKE) -S . -B $(BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/.venv/bin/ninja >$(BUILD)/configure.log 2>&1 \
	  || { cat $(BUILD)/configure.log; exit 1; }
	@$(CMAKE) --build $(BUILD) -j $(JOBS)

demo: build      ## train softmax, matched softmax and Parallax on real text (DATA=path...)
	@if [ -e "$$DATA" ]; then tools/demo.sh "$$DATA"; else tools/demo.sh $(DATA); fi

test: build      ## build and run the tests
	@.venv/bin/ctest --test-dir $(BUILD) --output-on-failure -j $(JOBS) -LE long

test-all: build  ## the long tests too
	@.venv/bin/ctest --test-dir $(BUILD) --output-on-failure -j $(JOBS)

bench-cpu: build ## attention on this CPU against LibTorch: tables, about two minutes (ARGS="--json F")
	@$(CMAKE) --build $(BUILD) --target bench_cpu -j $(JOBS)
	@$(BUILD)/bench_cpu $(ARGS)

fuzz:            ## feed the parsers a million strange inputs each (RUNS=n; needs clang)
	@tools/fuzz.sh $(RUNS)

sanitize: setup  ## kernels, parsers and trainer under address+undefined, threads under thread
	@tools/sanitize.sh

gpu:             ## check and time the CUDA kernels on this machine's GPU (PYTHON=a python with torch)
	@tools/gpu.sh $(BUILD)

format:          ## format the sources in place
	@git ls-files '*.h' '*.cc' '*.cu' '*.cuh' | xargs clang-format-14 -i

lint:            ## fail on unformatted sources
	@git ls-files '*.h' '*.cc' '*.cu' '*.cuh' | xargs clang-format-14 --dry-run -Werror

clean:           ## remove the build
	rm -rf $(BUILD)
