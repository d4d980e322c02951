"""The sampler against a plain implementation of LLaDA's published algorithm: same weights, same prompts, one run.

    python -m benchmarks.sampler --preset cpu --json benchmarks/results/sampler_cpu.json
    python -m benchmarks.sampler --against --repeats 3 --json benchmarks/results/sampler-against-float32.json

`--against`: the exact sampler and the caches, each against its published counterpart in processor time, in fp32 and
bf16, alone and in batches, beside what the products alone take that ours makes. Without it each line is one way to
unmask; ratios are to the first, of processor time on a CPU and of the clock on a GPU. Repeats go round all lines, so
that what else the machine does falls on all of them. Memory is what a line needs on top of the weights.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import LEAST, fastest, machine, table, write_json
from benchmarks.published import plain, plain_cached
from dllm_rl.models.policy import make_policy
from dllm_rl.models.tiny import char_tokenizer
from dllm_rl.samplers.cache import DualCache, PrefixCache
from dllm_rl.samplers.rules import RandomOrder, Threshold
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.types.rollouts import Prompts


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocabulary: int
    batch: int
    prompt: int
    new: int
    block: int
    steps: int
    dtype: torch.dtype = torch.float32
    shortest: int | None = None  # prompts' lengths are drawn between it and `prompt`; None: all have that one


PRESETS = {
    "tiny": Shape(2, 64, 4, 128, 2048, 4, 16, 32, 16, 8),
    "cpu": Shape(4, 512, 8, 1536, 126464, 8, 64, 128, 32, 16),
    "ragged": Shape(4, 512, 8, 1536, 16384, 8, 260, 128, 32, 16, shortest=40),
    "tiny-ragged": Shape(2, 64, 4, 128, 2048, 4, 160, 32, 16, 8, shortest=4),
    "llada-8b": Shape(32, 4096, 32, 12288, 126464, 8, 64, 128, 32, 64, torch.bfloat16),
}
# Of `--against`: a CPU without instructions for bf16 takes eight times as long for its products, so that there is less.
AGAINST = [
    *(replace(PRESETS["cpu"], vocabulary=vocabulary, batch=b) for vocabulary in (16_384, 126_464) for b in (1, 8)),
    *(
        replace(PRESETS["cpu"], dtype=torch.bfloat16, vocabulary=vocabulary, batch=b, new=64, steps=8)
        for vocabulary, b in ((16_384, 1), (126_464, 1), (16_384, 8))
    ),
]


@torch.no_grad()
def random_policy(shape: Shape, device: torch.device, characters: str = "ab"):
    """An un-causaled Llama of that shape, normal weights drawn on the device."""
    tokenizer = char_tokenizer(characters)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        mask_token_id=tokenizer.mask_token_id,
        is_causal=False,
        architectures=["LlamaForCausalLM"],
        dtype=shape.dtype,
    )
    with torch.device(device):
        torch.set_default_dtype(shape.dtype)
        module = LlamaForCausalLM._from_config(config, dtype=shape.dtype)
        torch.set_default_dtype(torch.float32)
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in module.named_parameters():
        if weight.dim() == 2:
            std = 1.0 if "embed" in name else (4.0 if "lm_head" in name else 1.0) / weight.shape[1] ** 0.5
            weight.normal_(0, std, generator=generator)
    return make_policy(module, tokenizer)


def random_prompts(policy, shape: Shape) -> Prompts:
    generator = torch.Generator().manual_seed(1)
    sizes = [shape.prompt] * shape.batch
    if shape.shortest is not None:
        sizes = torch.randint(shape.shortest, shape.prompt + 1, (shape.batch,), generator=generator).tolist()
    ids = [torch.randint(3, shape.vocabulary, (size,), generator=generator).tolist() for size in sizes]
    return Prompts.from_ids(ids, pad_id=policy.pad_id)


class Memory:
    """Bytes in use at the peak since `start`, less what was in use then."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets its high-water mark
            self.base = self._status("VmRSS")

    def peak(self) -> int:
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else self._status("VmHWM")
        return peak - self.base

    def _status(self, field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def measure(run, policy, shape: Shape, device: torch.device) -> dict:
    """Seconds of the clock and of the processor, peak memory, forwards, token positions through the body and rows
    through the head."""
    body, head, forward, output = [], [], policy.module.base_model.forward, policy.module.get_output_embeddings()
    policy.module.base_model.forward = lambda *a, **k: body.append(k["input_ids"].numel()) or forward(*a, **k)
    hook = output.register_forward_pre_hook(lambda _, args: head.append(args[0].numel() // args[0].shape[-1]))
    memory = Memory(device)
    try:
        memory.start()
        began, worked = time.perf_counter(), time.process_time()
        out = run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - worked
        peak = memory.peak()
    finally:
        policy.module.base_model.forward = forward
        hook.remove()
    weights = sum(
        p.numel()
        for n, p in policy.module.named_parameters()
        if p.dim() == 2 and "embed" not in n and "lm_head" not in n
    )
    tokens = out if isinstance(out, torch.Tensor) else out.tokens
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": peak,
        "forwards": len(body),
        "body_positions": sum(body),
        "head_rows": sum(head),
        "flops": 2 * (weights * sum(body) + shape.hidden * shape.vocabulary * sum(head)),
        "tokens": tokens.cpu(),
    }


def best_of(found: list[dict], clock: str) -> dict:
    """The repeat that took least, and the memory of the first: later ones reuse what it allocated."""
    return min(found, key=lambda row: row[clock]) | {"peak_bytes": found[0]["peak_bytes"]}


def matmul_flops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations per second of a square product: the roofline that matmuls are held against."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        clock = time.perf_counter if device.type == "cuda" else time.process_time
        began = clock()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, max(clock() - began, LEAST))
    return 2 * size**3 / best


def benchmark(preset: str, device: torch.device, repeats: int) -> dict:
    shape = PRESETS[preset]
    policy = random_policy(shape, device)
    prompts = random_prompts(policy, shape)
    sampler = Unmask(max_new_tokens=shape.new, diffusion_steps=shape.steps, block_size=shape.block)

    def ours(**changes: Any) -> Callable:
        return partial(sampler.replace(**changes), policy, prompts, torch.Generator())

    lines = {
        "plain: the published algorithm": partial(plain, policy, prompts, shape),
        "plain, softmax in fp64": partial(plain, policy, prompts, shape, double=True),
        "plain, head on open positions only": partial(plain, policy, prompts, shape, masked_only=True),
        "exact sampler": ours(),
        "exact sampler, temperature 1": ours(temperature=1.0),
        "exact sampler, random order, temperature 1": ours(temperature=1.0, rank=RandomOrder()),
        "threshold 0.9": ours(commit=Threshold(tau=0.9)),
        "prefix cache (approximate)": ours(cache=PrefixCache()),
        "dual cache (approximate)": ours(cache=DualCache()),
        "plain prefix cache: Fast-dLLM's, as published": partial(plain_cached, policy, prompts, shape, dual=False),
        "plain dual cache: Fast-dLLM's, as published": partial(plain_cached, policy, prompts, shape, dual=True),
    }
    if shape.shortest is not None:
        del lines["plain prefix cache: Fast-dLLM's, as published"], lines["plain dual cache: Fast-dLLM's, as published"]
    if preset in ("cpu", "ragged"):  # with random weights nothing passes a threshold: a step a position, and no news
        del lines["threshold 0.9"]
    roof = matmul_flops(device, shape.dtype, 4096 if device.type == "cuda" else 1024)
    Unmask(max_new_tokens=2, diffusion_steps=1)(policy, prompts, torch.Generator())  # warm up
    clock, found = "seconds" if device.type == "cuda" else "cpu_seconds", {name: [] for name in lines}
    for _ in range(repeats):
        for name, run in lines.items():
            found[name].append(measure(run, policy, shape, device))
    rows = {name: best_of(each, clock) for name, each in found.items()}
    base = rows["plain: the published algorithm"]
    for row in rows.values():
        row["speedup"] = base[clock] / row[clock]
        row["tokens_per_second"] = shape.batch * shape.new / row[clock]
        row["memory_ratio"] = row["peak_bytes"] / base["peak_bytes"] if base["peak_bytes"] else None
        row["share_of_matmul_roofline"] = row.pop("flops") / row[clock] / roof
    first = base["tokens"]
    for row in rows.values():
        row["same_tokens"] = (row.pop("tokens") == first).double().mean().item()
    return {
        "preset": preset,
        "shape": {k: str(v) for k, v in vars(shape).items()},
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} thread(s)",
        "machine": platform.machine(),
        "torch": torch.__version__,
        "weights_bytes": sum(p.numel() * p.element_size() for p in policy.module.parameters()),
        "matmul_flops_per_second": roof,
        "repeats": repeats,
        "lines": rows,
    }


class Kept(TorchDispatchMode):
    """Keeps the operations of these names that run inside of it, in their order; calling it runs them alone. Views, and
    operations that write in place, are left out.

    Activations of like shape are one tensor, as kernels do not look at values; weights and indices are themselves.
    """

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        self.calls: list[tuple[Callable, list, dict]] = []
        self.stand_ins: dict[tuple, torch.Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (func.is_view or func._schema.is_mutable) and any(name in func.__name__ for name in self.names):
            self.calls.append((func, [self._stand_in(arg) for arg in args], kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _stand_in(self, x: Any) -> Any:
        if isinstance(x, list):
            return [self._stand_in(each) for each in x]
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        weight = x._base.requires_grad if x._is_view() else x.requires_grad
        owner = x.untyped_storage().data_ptr() if weight else None
        return self.stand_ins.setdefault((owner, x.shape, x.stride(), x.dtype), x)

    @torch.no_grad()
    def __call__(self) -> None:
        for func, args, kwargs in self.calls:
            func(*args, **kwargs)


PRODUCTS = ("mm", "scaled_dot_product")


@contextmanager
def forwards_kept(policy: Any) -> Iterator[Kept]:
    """All operations of the policy's backbone and head, and nothing of what is done with their output."""
    kept, encode, head = Kept(""), policy.encode, policy.head

    def within(run: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            with kept:
                return run(*args, **kwargs)

        return call

    policy.encode, policy.head = within(encode), within(head)
    try:
        yield kept
    finally:
        del policy.encode, policy.head


def against(shapes: list[Shape], repeats: int) -> list[dict]:
    """A row for each shape and way: processor seconds of the published algorithm, of ours, and of our products and our
    forwards alone, the least of `repeats` rounds by turns; the share of tokens that both write. Caches are timed in
    fp32."""
    rows = []
    for shape in shapes:
        policy = random_policy(shape, torch.device("cpu"))
        prompts = random_prompts(policy, shape)
        settings = {"max_new_tokens": shape.new, "diffusion_steps": shape.steps, "block_size": shape.block}
        for way, theirs, cache in (
            ("exact", plain, None),
            ("prefix cache", partial(plain_cached, dual=False), PrefixCache()),
            ("dual cache", partial(plain_cached, dual=True), DualCache()),
        )[: 3 if shape.dtype == torch.float32 else 1]:
            ours = partial(Unmask(cache=cache, **settings), policy, prompts, torch.Generator())
            with torch.no_grad(), Kept(*PRODUCTS) as products:
                found = ours().tokens
            with forwards_kept(policy) as forwards:
                ours()
            same: list[float] = []

            def published(
                run: Any = theirs, given: tuple = (policy, prompts, shape), to: list = same, own: Any = found
            ):
                to.append((run(*given) == own).double().mean().item())

            best = fastest({"theirs": published, "ours": ours, "products": products, "forwards": forwards}, repeats)
            row = {"way": way, "dtype": str(shape.dtype)[6:], "vocabulary": shape.vocabulary, "batch": shape.batch}
            row |= {f"{name}, s": round(seconds, 3) for name, seconds in best.items()}
            for name, arm in {"ratio": "ours", "bound": "products", "bound by forwards": "forwards"}.items():
                row[name] = round(best["theirs"] / best[arm], 2)
            rows.append(row | {"same tokens": round(same[0], 3)})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--smoke", action="store_true", help="the tiny preset, once: seconds on a CPU")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--against", action="store_true", help="ours and theirs, row by row, on the CPU")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of --against")
    arguments = parser.parse_args()
    if arguments.against:
        torch.set_num_threads(1)
        chosen = [shape for shape in AGAINST if str(shape.dtype)[6:] == arguments.dtype]
        shapes = [replace(PRESETS["tiny"], batch=2)] if arguments.smoke else chosen
        rows = against(shapes, 1 if arguments.smoke else arguments.repeats)
        print(table(rows))
        facts = {k: str(v) for k, v in vars(shapes[0]).items() if k not in ("vocabulary", "batch")}
        found = {"machine": machine("cpu"), "repeats": arguments.repeats, "shape": facts, "rows": rows}
        write_json(arguments.json, found)
        return
    preset = "tiny" if arguments.smoke else arguments.preset
    result = benchmark(preset, torch.device(arguments.device), 1 if arguments.smoke else arguments.repeats)
    print(f"{result['device']}, preset {preset}, weights {result['weights_bytes'] / 2**20:.0f} MiB")
    print(
        f"{'':44} {'seconds':>8} {'cpu s':>8} {'speedup':>8} {'tok/s':>8} "
        f"{'peak MiB':>9} {'forwards':>8} {'roofline':>8} {'same':>6}"
    )
    for name, row in result["lines"].items():
        print(
            f"{name:44} {row['seconds']:8.2f} {row['cpu_seconds']:8.2f} {row['speedup']:8.2f} "
            f"{row['tokens_per_second']:8.1f} {row['peak_bytes'] / 2**20:9.0f} {row['forwards']:8} "
            f"{row['share_of_matmul_roofline']:8.1%} {row['same_tokens']:6.1%}"
        )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
