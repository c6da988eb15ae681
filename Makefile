# The few commands of this house; CI calls the same ones. Each runs in the active environment.

.PHONY: operations install test check format sanitize aarch64 kernels fuzz demo peers clean

install:  ## editable, with what the tests, the checks and the demo need
	python -m pip install -c constraints.txt -e ".[test,demo]"

test:
	pytest -q

check:  ## lint, layout and types
	ruff check
	ruff format --check
	pyright

format:
	ruff check --fix
	ruff format

sanitize:  ## the steps in C++ under address, undefined-behaviour and thread sanitizers
	python tests/sanitize.py

aarch64:  ## the steps in C++, cross-compiled and run in qemu's emulator; skipped where either is missing
	CXX=aarch64-linux-gnu-g++ python tests/aarch64.py

kernels:  ## the Triton kernels compiled ahead for three generations of GPUs: nothing is spilt
	python tests/compile_kernels.py

SEED ?= $(shell date +%s)

operations:  ## csrc/operations.h anew, from the table of fastmeta/network/expressions
	python -m fastmeta.network.expressions.generate > csrc/operations.h

fuzz:  ## against the float64 oracle: 2,000 drawn networks and options a step, 20,000 programs of changes
	FASTMETA_FUZZ=2000 pytest -q --timeout=0 --dist=load \
		tests/executors/test_fuzz.py tests/executors/test_layered_fuzz.py \
		tests/executors/test_layered_rules_fuzz.py tests/executors/test_generic_fuzz.py \
		tests/executors/test_expressions.py tests/network/expressions
	FASTMETA_FUZZ=20000 FASTMETA_FUZZ_SEED=$(SEED) pytest -q --timeout=0 --dist=load \
		tests/plan/test_validity_fuzz.py

demo:
	python -m fastmeta demo

# torchmeta without its dependencies, which want a torch of 2021; learn2learn from its Cython
# sources, because the C that it publishes does not compile on Python 3.11.
peers:  ## the libraries that bench.compare measures against
	python -m pip install -c constraints.txt -e ".[bench]"
	python -m pip install --no-deps torchmeta==1.8.0
	python -m pip install -c constraints.txt setuptools wheel cython==3.0.12
	rm -rf build/peers && mkdir -p build/peers
	cd build/peers && python -m pip download --no-deps --no-build-isolation --no-binary :all: \
		learn2learn==0.2.0 && tar xzf learn2learn-0.2.0.tar.gz && cd learn2learn-0.2.0 && \
		python -m cython -3 learn2learn/data/*.pyx && \
		python -m pip install --no-deps --no-build-isolation .

clean:
	rm -rf build dist *.egg-info fastmeta/_build.json fastmeta/_C*.so fastmeta/_cuda*.so
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find fastmeta tests -name __pycache__ -type d -prune -exec rm -rf {} +
