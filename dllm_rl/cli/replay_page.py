# ruff: noqa: E501 (markup)
"""Self-contained HTML pages, and the part of one that replays how completions were written."""

import html
import json
import re
from typing import Any

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>@TITLE@</title>
<style>
:root { color-scheme: light dark; --ink: #1c1e21; --dim: #686e78; --page: #fbfbfa; --card: #fff; --line: #e3e4e6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e9eb; --dim: #9aa0a9; --page: #16181b; --card: #1e2125; --line: #33373d; }
}
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.15rem; margin: 0; }
p.facts { color: var(--dim); margin: .2rem 0 1rem; }
.bar { position: sticky; top: 0; display: flex; flex-wrap: wrap; gap: .8rem; align-items: center; padding: .7rem 0;
  background: var(--page); border-bottom: 1px solid var(--line); }
.bar input { flex: 1 1 14rem; accent-color: #3b6fd4; }
.bar output { min-width: 8.5rem; font-variant-numeric: tabular-nums; }
.row { margin: 1rem 0; padding: .8rem 1rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
.text { font: 15px/2 ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { color: var(--dim); }
.cell { border-radius: .2rem; padding: .1rem .12rem; margin: 0 1px; color: #14161a; }
.masked { color: var(--dim); opacity: .55; background: none; }
.open { opacity: 1; }
.fresh { outline: 2px solid #e8590c; }
.legend { display: flex; align-items: center; gap: .5rem; color: var(--dim); font-size: .85rem; margin-top: .6rem; }
.ramp { width: 9rem; height: .7rem; border-radius: .2rem; }
button, select { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: .3rem; padding: .15rem .6rem; }
:focus-visible { outline: 2px solid #3b6fd4; outline-offset: 2px; }
@media print { .bar, .legend { display: none; } }
@STYLE@</style>
</head>
<body>
<main>
@BODY@
</main>
@SCRIPTS@
</body>
</html>
"""

_VIEWER = """<p class="facts" id="facts"></p>
<div class="bar">
  <label id="which">show <select id="group"></select></label>
  <button id="play" type="button">Play</button>
  <input id="step" type="range" min="0" aria-label="step">
  <output id="where" for="step"></output>
  <label>colour <select id="colour"><option value="step">commit step</option><option value="confidence">confidence</option></select></label>
</div>
<div class="legend"><span id="low"></span><span class="ramp" id="ramp"></span><span id="high"></span><span>· outlined: written in this step</span></div>
<div id="rows"></div>
<noscript>The completions are shown by a script, which this browser does not run.</noscript>
"""

_SCRIPTS = """<script type="application/json" id="data">@DATA@</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const get = id => document.getElementById(id);
// Lightness rises along the ramp, so that it can be read without hues.
const ramp = [[122, 146, 214], [96, 186, 196], [142, 212, 140], [250, 226, 110]];
function colour(x) {
  const at = Math.min(Math.max(x, 0), 1) * (ramp.length - 1), i = Math.min(Math.floor(at), ramp.length - 2), f = at - i;
  return "rgb(" + ramp[i].map((c, k) => Math.round(c + (ramp[i + 1][k] - c) * f)).join(",") + ")";
}
get("ramp").style.background = "linear-gradient(90deg," + [0, 1 / 3, 2 / 3, 1].map(colour).join(",") + ")";
const slider = get("step");
let last = 0, cells = [], timer = null;
for (const [i, group] of data.groups.entries()) get("group").add(new Option(group.title, i));
get("which").hidden = data.groups.length < 2;
function open() {
  const group = data.groups[Number(get("group").value)];
  stop();
  get("facts").textContent = group.facts;
  last = Math.max(0, ...group.rows.flatMap(r => r.tokens.map(t => t.step + 1)));
  slider.max = last;
  slider.value = last;
  cells = [];
  get("rows").replaceChildren(...group.rows.map(card));
  draw();
}
function card(row) {
  const card = document.createElement("div"), text = document.createElement("div"), prompt = document.createElement("span");
  card.className = "row";
  text.className = "text";
  prompt.className = "prompt";
  prompt.textContent = row.prompt;
  text.append(prompt);
  for (const token of row.tokens) {
    const cell = document.createElement("span");
    text.append(cell);
    cells.push([cell, token]);
  }
  card.append(text);
  if (row.facts) {
    const facts = document.createElement("p");
    facts.className = "facts";
    facts.textContent = row.facts;
    card.append(facts);
  }
  return card;
}
function stop() { clearInterval(timer); timer = null; get("play").textContent = "Play"; }
function draw() {
  const now = Number(slider.value), by = get("colour").value;
  get("where").textContent = "step " + now + " of " + last;
  get("low").textContent = by === "step" ? "first step" : "probability 0";
  get("high").textContent = by === "step" ? "last step" : "1";
  for (const [cell, token] of cells) {
    const known = token.step >= 0 && token.step < now;
    cell.textContent = known ? (token.text.replace(/\\n/g, "\\u21b5\\n") || "\\u2205") : "\\u2592";
    cell.className = "cell" + (known ? (token.step === now - 1 ? " fresh" : "") : " masked");
    cell.style.background = known ? colour(by === "step" ? token.step / Math.max(1, last - 1) : token.probability ?? 0) : "";
    cell.title = known ? "token " + token.id + ", step " + (token.step + 1) + ", probability " + (token.probability?.toFixed(3) ?? "not a number") : "masked";
  }
}
slider.addEventListener("input", draw);
get("colour").addEventListener("change", draw);
get("group").addEventListener("change", open);
get("play").addEventListener("click", () => {
  if (timer) return stop();
  if (Number(slider.value) >= last) slider.value = 0;
  get("play").textContent = "Stop";
  draw();
  timer = setInterval(() => {
    slider.value = Number(slider.value) + 1;
    draw();
    if (Number(slider.value) >= last) stop();
  }, Math.max(60, Math.min(400, 8000 / Math.max(1, last))));
});
open();
</script>"""


def page(record: dict[str, Any]) -> str:
    """The page for a story (see `sample.to_record`)."""
    group = {"title": "", "facts": record["facts"], "rows": record["rows"]}
    return document("dllm_rl: how it was written", "<h1>How it was written</h1>\n" + viewer(), groups=[group])


def viewer() -> str:
    """The part of a document's body that replays its groups."""
    return _VIEWER


def document(title: str, body: str, *, groups: list[dict[str, Any]], style: str = "") -> str:
    """A page that needs no other file. Its body is markup; it holds `viewer()` where there are groups.

    groups  {"title", "facts", "rows": [{"prompt", "tokens", "facts"?}]}, shown one at a time. Texts reach the page as
            data, never as markup: `<` cannot end the script block.
    """
    data = (
        json.dumps({"groups": groups}, allow_nan=False)
        .replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("&", "\\u0026")
    )
    parts = {"TITLE": html.escape(title), "STYLE": style, "BODY": body, "SCRIPTS": ""}
    if groups:
        parts["SCRIPTS"] = _SCRIPTS.replace("@DATA@", data)
    # All at once, so that a mark that a text spells stays text.
    return re.sub("@(TITLE|STYLE|BODY|SCRIPTS)@", lambda mark: parts[mark[1]], _PAGE)
