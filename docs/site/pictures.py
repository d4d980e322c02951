"""The drawings of the documents, as SVG on standard output.

python docs/site/pictures.py loop > docs/loop.svg
dllm-rl sample CHECKPOINT '421..12424.113.2=' --num_steps 8 --json > it.json
python docs/site/pictures.py sampler < it.json > docs/sampler.svg
"""

import json
import sys
from html import escape

BOX = (150, 46)  # pixels
LATE = 2  # pauses at the end of the animation, in steps
BOXES = {  # name: column, row, text, detail
    "task": (0, 0, "task", "prompts"),
    "sampler": (1, 0, "sampler", "quantized copy, FP8"),
    "rewards": (2, 0, "rewards", "advantages"),
    "scoring": (2, 1, "likelihood", "same masks, both sides"),
    "corrector": (1, 1, "corrector", "weights, keep mask"),
    "update": (0, 1, "loss, optimizer", "learner, full precision"),
}
ARROWS = [
    ("task", "sampler", ""),
    ("sampler", "rewards", "rollout"),
    ("rewards", "scoring", ""),
    ("scoring", "corrector", "ratios"),
    ("corrector", "update", ""),
    ("update", "sampler", "sync: quantize again"),
]


def svg(width: int, height: int, body: list[str], title: str) -> str:
    style = "text{font:13px sans-serif;fill:#333} .small{font-size:11px;fill:#666}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">'
    ground = f'<rect width="{width}" height="{height}" rx="8" fill="#fff"/>'  # also on a dark page
    return "\n".join([head, f"<title>{escape(title)}</title><style>{style}</style>", ground, *body, "</svg>"]) + "\n"


def loop() -> str:
    """One step of training: a box per part of a recipe."""
    wide, high = BOX
    middle = {}
    body = ['<marker id="end" markerWidth="9" markerHeight="9" refX="8" refY="4" orient="auto">'
            '<path d="M0 0L8 4L0 8z" fill="#3f51b5"/></marker>']  # fmt: skip
    for name, (column, row, text, detail) in BOXES.items():
        x = 20 + column * (wide + 70)
        y = 20 + row * (high + 60)
        middle[name] = (x + wide / 2, y + high / 2)
        body.append(f'<rect x="{x}" y="{y}" width="{wide}" height="{high}" rx="6" fill="#eef0fb" stroke="#3f51b5"/>')
        body.append(f'<text x="{x + wide / 2}" y="{y + 19}" text-anchor="middle">{text}</text>')
        body.append(f'<text class="small" x="{x + wide / 2}" y="{y + 36}" text-anchor="middle">{detail}</text>')
    for source, target, text in ARROWS:
        (x, y), (u, v) = middle[source], middle[target]
        across = abs(u - x) > 1
        down = abs(v - y) > 1
        side = (u > x) - (u < x) if across else 0
        x, u = x + side * wide / 2 * (not down), u - side * wide / 2 * (not down)
        y, v = y + (1 if v > y else -1) * high / 2 * down, v - (1 if v > y else -1) * high / 2 * down
        body.append(f'<line x1="{x}" y1="{y}" x2="{u}" y2="{v}" stroke="#3f51b5" marker-end="url(#end)"/>')
        if text:
            place = f'x="{(x + u) / 2 - 50 * down}" y="{(y + v) / 2 - 6 - 6 * down}"'
            body.append(f'<text class="small" {place} text-anchor="middle">{text}</text>')
    return svg(3 * wide + 180, 2 * high + 100, body, "One step of training")


def sampler(record: dict, *, columns: int = 4) -> str:
    """A completion as it is written: a cell per token, which appears in its step, darker where it was surer."""
    tokens = record["rows"][0]["tokens"]
    steps = record["forwards"]
    seconds = steps + LATE
    size = 44
    body = []
    for place, token in enumerate(tokens):
        x = 20 + place % columns * size
        y = 40 + place // columns * size
        start = (token["step"] + 1) / seconds
        body.append(f'<rect x="{x}" y="{y}" width="{size}" height="{size}" fill="#eef0fb" stroke="#3f51b5"/>')
        appear = (
            f'<animate attributeName="opacity" values="0;0;1;1" keyTimes="0;{start - 0.01:.3f};{start:.3f};1" '
            f'dur="{seconds}s" repeatCount="indefinite"/>'
        )
        text = escape(token["text"])
        body.append(f'<text x="{x + size / 2}" y="{y + 28}" text-anchor="middle" font-size="18">{text}{appear}</text>')
    for step in range(steps):
        begin, end = step / seconds, (step + 1) / seconds if step + 1 < steps else 1
        show = (
            f'<animate attributeName="opacity" calcMode="discrete" values="0;1;0" '
            f'keyTimes="0;{begin:.3f};{end:.3f}" dur="{seconds}s" repeatCount="indefinite"/>'
        )
        body.append(f'<text class="small" x="20" y="26" opacity="0">step {step + 1} of {steps}{show}</text>')
    side = columns * size + 40
    return svg(side, 60 + -(-len(tokens) // columns) * size, body, "Iterative unmasking of 4x4 Sudoku")


if __name__ == "__main__":
    sys.stdout.write(loop() if sys.argv[1] == "loop" else sampler(json.load(sys.stdin)))
