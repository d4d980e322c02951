"""Quantized linear layers against plain ones at a preset's shapes, and the aligned forward and backward against plain.

forward   the rollout's product, without gradient.
update    forward and backward with gradients of input, weight and bias: aligned to the scheme, or plain.

python -m benchmarks.linear [--device cuda] [--preset small] [--dtype bfloat16] [--schemes NAME ...] [--smoke]
                            [--json FILE]
"""

import argparse

import torch
from torch import nn

from benchmarks.measure import machine, seconds_and_peak, speed_up, table, write_json
from benchmarks.presets import PRESETS
from benchmarks.sync import ANYWHERE
from dllm_rl.quantization import schemes as quantize
from dllm_rl.quantization.aligned import StraightThrough
from dllm_rl.quantization.linear import stored_bytes
from dllm_rl.quantization.rollout_policy import quantize_weight
from dllm_rl.quantization.schemes import EmulatedLinear, FakeQuantize, check_scheme


def shapes(preset: str) -> list[tuple[int, int]]:
    """(columns, rows) of the weights: attention, up, down."""
    shape = PRESETS[preset]
    d, wide = shape.hidden_size, shape.intermediate_size
    return [(d, d), (d, wide), (wide, d)]


def arm(scheme: str, columns: int, rows: int, tokens: int, device: str, dtype: str, repeats: int) -> dict:
    """Milliseconds of forward and update, and MiB of the weight, for one scheme and shape."""
    plain = nn.Linear(columns, rows, device=device, dtype=getattr(torch, dtype))
    x = torch.randn(tokens, columns, device=device, dtype=plain.weight.dtype, requires_grad=True)
    layer = plain
    if scheme != "none":
        config = check_scheme(getattr(quantize, scheme)(), torch.device(device), plain.weight.dtype)
        if isinstance(config, FakeQuantize):
            layer = EmulatedLinear(plain.weight.detach(), plain.bias, config)
        else:
            layer = nn.Linear(columns, rows, device="meta")
            layer.weight = nn.Parameter(quantize_weight(plain.weight.detach(), config)[0], requires_grad=False)
            layer.bias = plain.bias

    calls = min(50, max(1, 10**9 // (tokens * columns * rows)))  # enough work for the clock

    @torch.no_grad()
    def forward() -> None:
        for _ in range(calls):
            layer(x)

    def update() -> None:
        for _ in range(calls):
            y = plain(x) if scheme == "none" else StraightThrough.apply(layer, plain.weight, plain.bias, x)
            y.backward(torch.ones_like(y))

    forward()
    update()
    return {
        "scheme": scheme,
        "shape": f"{tokens} x {columns} -> {rows}",
        "calls": calls,
        "forward": seconds_and_peak(forward, device, repeats=repeats),
        "update": seconds_and_peak(update, device, repeats=repeats),
        "weight_mib": round(stored_bytes(layer.weight) / 2**20, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--preset", default="small", choices=PRESETS)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--schemes", nargs="*", default=ANYWHERE, help="names in dllm_rl.quantization.schemes")
    parser.add_argument("--tokens", type=int, default=512, help="rows of the input")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    if given.smoke:
        given.preset, given.tokens, given.repeats, given.schemes = "smoke", 32, 2, ["Int8Dynamic", "FakeQuantize"]
    common = {"device": given.device, "dtype": given.dtype, "repeats": given.repeats}
    clock, rows = "seconds" if torch.device(given.device).type == "cuda" else "cpu_seconds", []
    for columns, out in shapes(given.preset):
        work = {"columns": columns, "rows": out, "tokens": given.tokens, **common}
        plain = arm("none", **work)
        for found in [plain, *(arm(scheme, **work) for scheme in given.schemes)]:
            row = {key: found[key] for key in ("scheme", "shape", "weight_mib")}
            for part in ("forward", "update"):
                row[f"{part}_ms"] = round(1e3 * found[part][clock] / found["calls"], 3)
                row[f"{part}_speed_up"] = speed_up(plain[part], found[part], given.device)
            rows.append(row)
    print(table(rows))
    about = {"benchmark": "linear", "preset": given.preset, **common, **machine(given.device)}
    write_json(given.json, {**about, "rows": rows})


if __name__ == "__main__":
    main()
