# What one runs by hand; the virtual environment is made as README says.
PYTHON = .venv/bin/python

test:
	$(PYTHON) -m pytest

slow:
	$(PYTHON) -m pytest -m slow

# The rooms that compare numbers, where every matrix product rounds by its number of rows, as processors differ.
other_cpu:
	$(PYTHON) -m pytest --other-cpu tests/algorithms tests/diagnostics tests/likelihoods tests/models tests/promises \
		tests/quantization tests/samplers tests/training

# With uv: the suite on the lowest versions that pyproject.toml names, and on the newest there are.
lowest-direct highest:
	uv venv -q --clear build/$@
	uv pip install -q --python build/$@ --resolution $@ -e ".[test]"
	build/$@/bin/python -m pytest

lint:
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(PYTHON) -m mypy

docs:
	$(PYTHON) -m mkdocs build --strict -f docs/site/mkdocs.yml

main:
	.venv/bin/accelerate launch --config_file recipes/accelerate/cpu.yaml --num_cpu_threads_per_process 2 recipes/sudoku_tiny.py

.PHONY: test slow other_cpu lowest-direct highest lint docs main
