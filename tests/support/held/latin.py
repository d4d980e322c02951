"""The study of Latin squares."""

from held import STUDIES
from recipes.studies import latin
from recipes.studies.latin_limit import limit

PAGE = f"{STUDIES}/latin.md"


def the_limit():
    exact = float(limit([problem.fields["puzzle"] for problem in latin.puzzles()]))
    yield PAGE, f"solves {exact:.3f} of the 400 test puzzles"
