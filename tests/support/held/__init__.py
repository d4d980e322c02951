"""Every measured number of the documents, computed from the stored results. tests/test_numbers.py compares.

A function of these modules is a generator of pairs: a page, and text with numbers that this page must have. So a number
is held by one line, `yield PAGE, f"... {computed} ..."`. Line breaks of the page do not count.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.studies.paired import by_arm, interval

ROOT = Path(__file__).parents[3]
STUDIES, DOCS = "recipes/studies", "docs"


def stored(name: str) -> Any:
    """A JSON of results: a study's, "recipes/results" or "benchmarks/results/..."."""
    folder = ROOT if "/" in name else ROOT / STUDIES
    return json.loads((folder / f"{name}.json").read_text())


def runs_of(name: str) -> dict[tuple[str, int], Mapping[str, Any]]:
    return by_arm(stored(name))


def tables_of(page: str) -> list[list[dict[str, str]]]:
    """The tables of a page: each table's rows, by its head's cells."""
    tables, head = [], None
    for line in (ROOT / page).read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else None
        if cells and head is None:
            head = cells
            tables.append([])
        elif cells and not set(line) <= set("|- "):
            tables[-1].append(dict(zip(head, cells, strict=True)))
        head = head if cells else None
    return tables


def row(*cells: object) -> str:
    """A line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def span_of(*differences: Sequence[float]) -> str:
    """The lowest and the highest end of the intervals of paired differences, in words."""
    ends = []
    for each in differences:
        center, half = map(float, interval(each).split("±"))
        ends += [center - half, center + half]
    return f"between {min(ends):.2f} and {max(ends):+.2f}"
