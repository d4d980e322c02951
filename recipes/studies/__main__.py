"""Write the tables of all pages from the stored results: python -m recipes.studies --write

A page names a table between two comments, and what is between them is written:

    <!-- table: recipes.studies.quantized.orders, errors -->
    <!-- end of table -->

This is `page_tables()["errors"]` of that module, which computes it from the JSON beside it. Without --write nothing is
written: the pages that would change are named, and the exit status is 1 if there are any.
"""

import argparse
import re
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/*.md", "recipes/**/*.md", "benchmarks/README.md")
TABLE = re.compile(
    r"^(<!-- table: (?P<module>[\w.]+), (?P<name>.+?) -->\n).*?^(<!-- end of table -->)", re.DOTALL | re.MULTILINE
)


@cache
def tables_of(module: str) -> dict[str, str]:
    return import_module(module).page_tables()


def written(text: str) -> str:
    """The page with every table as the stored results give it."""

    def table(found: re.Match[str]) -> str:
        tables = tables_of(found["module"])
        if found["name"] not in tables:
            raise ValueError(f"{found['module']} has no table {found['name']!r}, but {', '.join(tables)}")
        return f"{found[1]}\n{tables[found['name']].strip()}\n\n{found[4]}"

    begin, end = (len(re.findall(f"^<!-- {what}", text, re.MULTILINE)) for what in ("table", "end of table -->"))
    named = len(TABLE.findall(text))
    if not begin == end == named:
        raise ValueError(f"{begin} tables begin and {end} end, of which {named} name a module and a table")
    return TABLE.sub(table, text)


def changed() -> dict[Path, str]:
    """By page that is not as written: its new text."""
    pages = [path for place in PAGES for path in sorted(ROOT.glob(place))]
    texts = {page: (page.read_text(), written(page.read_text())) for page in pages}
    return {page: new for page, (old, new) in texts.items() if new != old}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the pages, not only name those that would change")
    options = parser.parse_args()
    pages = changed()
    for page, text in pages.items():
        if options.write:
            page.write_text(text)
        print(f"{page.relative_to(ROOT)}: {'written' if options.write else 'not as the stored results give it'}")
    if pages and not options.write:
        sys.exit(1)


if __name__ == "__main__":
    main()
