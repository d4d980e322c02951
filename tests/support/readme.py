"""The README's own examples, for tests that execute them as they are printed."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def example(heading: str) -> str:
    """The first Python block under a heading."""
    _, _, section = README.read_text().partition(f"## {heading}\n")
    assert section, f"README has no section {heading!r}"
    return re.search(r"```python\n(.*?)```", section, flags=re.DOTALL)[1]
