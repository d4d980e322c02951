# ruff: noqa: E501 (markup)
"""A self-contained HTML page that replays how completions were written."""

import json

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>dllm_rl: how it was written</title>
<style>
:root { color-scheme: light dark; --ink: #1c1e21; --dim: #8a8f98; --page: #fbfbfa; --card: #fff; --line: #e3e4e6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e9eb; --dim: #7d828b; --page: #16181b; --card: #1e2125; --line: #33373d; }
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
</style>
</head>
<body>
<main>
<h1>How it was written</h1>
<p class="facts" id="facts"></p>
<div class="bar">
  <button id="play" type="button">Play</button>
  <input id="step" type="range" min="0" aria-label="step">
  <output id="where" for="step"></output>
  <label>colour <select id="colour"><option value="step">commit step</option><option value="confidence">confidence</option></select></label>
</div>
<div class="legend"><span id="low"></span><span class="ramp" id="ramp"></span><span id="high"></span><span>· outlined: written in this step</span></div>
<div id="rows"></div>
</main>
<script type="application/json" id="data">@DATA@</script>
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
get("facts").textContent = data.facts;
const last = Math.max(0, ...data.rows.flatMap(r => r.tokens.map(t => t.step + 1)));
const slider = get("step");
slider.max = last;
slider.value = last;
const cells = [];
for (const row of data.rows) {
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
  get("rows").append(card);
}
function draw() {
  const now = Number(slider.value), by = get("colour").value;
  get("where").textContent = "step " + now + " of " + last;
  get("low").textContent = by === "step" ? "first step" : "probability 0";
  get("high").textContent = by === "step" ? "last step" : "1";
  for (const [cell, token] of cells) {
    const known = token.step >= 0 && token.step < now;
    cell.textContent = known ? (token.text.replace(/\\n/g, "\\u21b5\\n") || "\\u2205") : "\\u2592";
    cell.className = "cell" + (known ? (token.step === now - 1 ? " fresh" : "") : " masked");
    cell.style.background = known ? colour(by === "step" ? token.step / Math.max(1, last - 1) : token.probability) : "";
    cell.title = known ? "token " + token.id + ", step " + (token.step + 1) + ", probability " + token.probability.toFixed(3) : "masked";
  }
}
slider.addEventListener("input", draw);
get("colour").addEventListener("change", draw);
let timer = null;
get("play").addEventListener("click", () => {
  const stop = () => { clearInterval(timer); timer = null; get("play").textContent = "Play"; };
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
draw();
</script>
</body>
</html>
"""


def page(record: dict) -> str:
    """The page for a story (see `sample.to_record`). Texts reach it as data, never as markup: `<` cannot end the script block."""
    data = json.dumps(record).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return _PAGE.replace("@DATA@", data)
