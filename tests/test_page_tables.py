"""Every table of a result is written by `python -m recipes.studies --write` from what is stored."""

import re
from types import SimpleNamespace

import pytest

from recipes.studies import __main__ as pages

PAGE = "before\n<!-- table: made.up, {} -->\n{}<!-- end of table -->\nafter | and | more\n"


def test_writing_the_tables_again_changes_nothing():
    changed = [page.relative_to(pages.ROOT).as_posix() for page in pages.changed()]
    assert not changed, "write them: python -m recipes.studies --write"


def test_what_a_page_leaves_out_is_no_table_of_a_study():
    """Whoever adds a table to `page_tables` names its place in a page, too."""
    shown = {
        (found["module"], found["name"])
        for place in pages.PAGES
        for page in pages.ROOT.glob(place)
        for found in pages.TABLE.finditer(page.read_text())
    }
    made = {(module, name) for module, _ in shown for name in pages.tables_of(module)}
    assert made == shown
    studies = pages.ROOT.glob("recipes/studies/**/*.py")
    with_tables = {
        ".".join(path.relative_to(pages.ROOT).with_suffix("").parts)
        for path in studies
        if "def page_tables" in path.read_text()
    }
    assert with_tables <= {module for module, _ in shown}


@pytest.fixture
def made_up(monkeypatch):
    monkeypatch.setattr(pages, "import_module", lambda name: SimpleNamespace(page_tables=lambda: {"a": "| 1 |\n"}))
    pages.tables_of.cache_clear()
    yield
    pages.tables_of.cache_clear()


@pytest.mark.parametrize("old", ["", "\n| 0 |\n| 2 |\n\n"])
def test_a_table_is_written_between_its_comments(made_up, old):
    text = PAGE.format("a", old)
    assert pages.written(text) == PAGE.format("a", "\n| 1 |\n\n") == pages.written(pages.written(text))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (PAGE.format("b", ""), "made.up has no table 'b', but a"),
        (
            PAGE.format("a", "").replace("<!-- end of table -->\n", "") + PAGE.format("a", ""),
            "2 tables begin and 1 end",
        ),
        (PAGE.format("a", "").replace("made.up, a", "made.up"), "1 tables begin and 1 end, of which 0 name"),
    ],
)
def test_a_wrong_comment_is_refused(made_up, text, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        pages.written(text)
