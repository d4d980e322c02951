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
    cell.textContent = known ? (token.text.replace(/\n/g, "\u21b5\n") || "\u2205") : "\u2592";
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
