# What one runs by hand; the virtual environment is made as README says.
PYTHON = .venv/bin/python

test:
	$(PYTHON) -m pytest

slow:
	$(PYTHON) -m pytest -m slow

lint:
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(PYTHON) -m mypy

docs:
	$(PYTHON) -m mkdocs build --strict -f docs/site/mkdocs.yml

main:
	ACCELERATE_USE_CPU=1 OMP_NUM_THREADS=2 $(PYTHON) recipes/sudoku_tiny.py

.PHONY: test slow lint docs main
