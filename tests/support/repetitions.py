"""Repetitions that only `pytest -m slow` runs, which CI does as well."""

from collections.abc import Collection, Iterable
from itertools import product
from typing import Any

import pytest


def few(values: Iterable[Any], first: Collection[Any], second: Collection[Any] | None = None) -> list[Any]:
    """The values to parametrize a test with: those in `first` run in the default suite, the others are slow.

    Args:
        values: All values.
        first: Those of the default suite.
        second: Those that are slow; the rest then is nightly. By default all but `first` are slow.
    """
    return [
        value if value in first else slow(value) if second is None or value in second else nightly(value)
        for value in values
    ]


def crossed(rows: Iterable[Any], columns: Iterable[Any], *, row: Any, column: Any) -> list[Any]:
    """All pairs: those with this `row` or this `column` as they are, so that each value is met; the others are slow."""
    return [pair if pair[0] == row or pair[1] == column else slow(*pair) for pair in product(rows, columns)]


def pairwise(*values: Iterable[Any], kept: Collection[tuple[Any, ...]]) -> list[Any]:
    """All combinations of the values: those in `kept`, in which each value that matters is met, run in the default
    suite, and the others are slow."""
    return [each if each in kept else slow(*each) for each in product(*values)]


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def nightly(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.nightly)
