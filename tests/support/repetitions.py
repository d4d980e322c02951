"""Repetitions that only `pytest -m slow` runs, which CI does as well."""

from collections.abc import Collection, Iterable
from itertools import product
from typing import Any

import pytest


def few(values: Iterable[Any], first: Collection[Any]) -> list[Any]:
    """The values to parametrise a test with: those in `first` as they are, the others marked as slow."""
    return [value if value in first else slow(value) for value in values]


def crossed(rows: Iterable[Any], columns: Iterable[Any], *, row: Any, column: Any) -> list[Any]:
    """All pairs: those with this `row` or this `column` as they are, so that each value is met; the others are slow."""
    return [pair if pair[0] == row or pair[1] == column else slow(*pair) for pair in product(rows, columns)]


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)
