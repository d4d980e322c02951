"""The examples of README and docs, for tests that execute them as they are printed."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
PAGES = [README, *sorted((README.parent / "docs").rglob("*.md"))]


def example(heading: str) -> str:
    """The first Python block under a heading of README, or of a page of docs."""
    section = next((found for page in PAGES if (found := page.read_text().partition(f"## {heading}\n")[2])), "")
    assert section, f"neither README nor docs has a section {heading!r}"
    return re.search(r"```python\n(.*?)```", section, flags=re.DOTALL)[1]
