# SPDX-License-Identifier: Apache-2.0
#
# Thin wrappers over the CMake presets, which also install what is missing.
#   make demo                        trains the main example on two processes
#   make test [PYTHON=off]           builds and runs all tests; off skips those against Python's PyTorch (5 GB)
#   make bench [NAME=overhead]       one benchmark, or all, into build/bench/NAME.json
#   make lint                        clang-format and clang-tidy
#   make soak                        the long forms of the tests that repeat something
#   make check-torch VERSION=2.11.0  the LibTorch half against another LibTorch
#   make libtorch [CUDA=on]          LibTorch into third_party/
# FABRIC_LIBTORCH=/path/to/torch in the environment uses that LibTorch and installs none.

export FABRIC_LIBTORCH PYTHON
BIN = build/release/bin
VERSION = 2.11.0

.NOTPARALLEL: # the steps of a target come one after the other, whatever -j says
.PHONY: demo test bench lint soak check-torch libtorch python clean packages-%

demo: packages-demo libtorch
	cmake --workflow --preset demo
	$(BIN)/train_digits --accelerator cpu --strategy ddp --devices 2 --precision bf16-mixed

test: packages-test libtorch python
	cmake --workflow --preset test

bench: packages-bench libtorch
	cmake --preset release
	cmake --build --preset release --target $(if $(NAME),bench_$(NAME),bench)
	tools/bench $(BIN) $(NAME)

lint: packages-lint libtorch
	tools/lint

soak: packages-test libtorch
	cmake --preset release
	cmake --build --preset release
	ctest --preset soak

check-torch: packages-test
	tools/install-libtorch $(VERSION)
	FABRIC_LIBTORCH=$$(tools/install-libtorch $(VERSION) | sed -n 's/^LibTorch: //p')/torch cmake --preset release -B build/torch-$(VERSION)
	cmake --build build/torch-$(VERSION) --target torch_half
	ctest --test-dir build/torch-$(VERSION) --output-on-failure -j2 -L '^torch$$' --no-tests=error

libtorch:
ifeq ($(FABRIC_LIBTORCH),)
	tools/install-libtorch $(if $(filter on,$(CUDA)),--cuda)
endif

python:
ifneq ($(PYTHON),off)
	tools/install-python
endif

packages-%:
	tools/install-packages $*

clean:
	rm -rf build
