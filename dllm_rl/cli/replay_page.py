"""HTML pages that need no other file, with a viewer that replays completions."""

import html
import json
import re
from importlib import resources
from typing import Any


def page(record: dict[str, Any]) -> str:
    """The page for one record (see `sample.to_record`)."""
    group = {"title": "", "facts": record["facts"], "rows": record["rows"]}
    return document("dllm_rl: how it was written", "<h1>How it was written</h1>\n" + viewer(), groups=[group])


def viewer() -> str:
    return template("viewer.html")


def template(name: str) -> str:
    return (resources.files("dllm_rl.cli") / name).read_text(encoding="utf-8")


def document(title: str, body: str, *, groups: list[dict[str, Any]], style: str = "") -> str:
    """A page from a title (text), a body (markup) and further CSS. With groups, the body contains `viewer()`."""
    # groups: {"title", "facts", "rows": [{"prompt", "tokens", "facts"?}]}, of which the viewer shows one at a time.
    data = json.dumps({"groups": groups}, allow_nan=False)  # a browser's JSON.parse has no NaN
    for character in "<>&":  # no `<` ends the script block
        data = data.replace(character, f"\\u{ord(character):04x}")
    scripts = f'<script type="application/json" id="data">{data}</script>\n<script>\n{template("viewer.js")}</script>'
    parts = {"TITLE": html.escape(title), "STYLE": style, "BODY": body, "SCRIPTS": scripts if groups else ""}
    # One substitution for all marks: a mark inside of a text stays text.
    return re.sub("@(TITLE|STYLE|BODY|SCRIPTS)@", lambda mark: parts[mark[1]], template("page.html"))
