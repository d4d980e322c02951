"""The language of README and docs: none of the words that readers stumble over, and short sentences."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LONGEST = 25  # words per sentence
WORDS = (
    r"stands?|beside|anew|told apart|shared out|evened out|lies whole|held whole|laws?|laboratory|mend(?:s|ed)?"
    r"|in hand|but for|so many|of one's own"
)
BAD = re.compile(rf"\b(?:{WORDS})\b", re.IGNORECASE)


def prose(text: str) -> str:
    """The text without code and headings; a link is its text, a piece of code one word."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^(?: {4}.*|#.*)$", "", text, flags=re.MULTILINE)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"`[^`]*`", "code", text)


def sentences(text: str) -> list[str]:
    """The sentences of paragraphs and list items, without tables."""
    lines = [line for line in prose(text).splitlines() if not line.startswith("|")]
    parts = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", "\n".join(lines))
    return [one for part in parts for one in re.split(r"(?<=[.!?])[*)]*\s+", " ".join(part.split())) if one]


def found(text: str) -> list[str]:
    words = [match[0] for match in BAD.finditer(prose(text))]
    return words + [one for one in sentences(text) if len(re.findall(r"[\w|<>=+]+\S*", one)) > LONGEST]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_plain_english(page):
    assert not found(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "planted",
    [
        "Adapters stand beside it.",
        "The row is drawn\nanew.",
        "| a | told apart |",
        "- " + "word " * (LONGEST + 1) + "end.",
        "One. " + "word " * LONGEST + "`a b c` end.",
    ],
)
def test_a_planted_word_or_sentence_is_found(planted):
    assert found(f"# Page\n\nA short sentence. [A link](stands.md) and `law` are fine.\n\n{planted}\n")


def test_code_and_tables_may_be_long():
    long = "word " * (LONGEST + 1)
    assert not found(f"A sentence.\n\n    {long} law\n\n```python\n{long} law\n```\n\n| {long} |\n")
