# The few commands of this house; CI calls the same ones. Each runs in the active environment.

.PHONY: install test check format sanitize fuzz demo clean

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

sanitize:  ## the fused step in C++ under address, undefined-behaviour and thread sanitizers
	python tests/sanitize.py

fuzz:  ## the fused step over 2,000 drawn networks and options, against the float64 oracle
	FASTMETA_FUZZ=2000 pytest -q --timeout=0 tests/executors/test_fuzz.py

demo:
	python -m fastmeta demo

clean:
	rm -rf build dist *.egg-info fastmeta/_build.json fastmeta/_C*.so
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find fastmeta tests -name __pycache__ -type d -prune -exec rm -rf {} +
