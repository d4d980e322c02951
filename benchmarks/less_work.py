"""What less work for the same completions is worth: each way against itself with the saving taken back.

    python -m benchmarks.less_work --parts savings --json benchmarks/results/less-work-cpu.json
    python -m benchmarks.less_work --parts prompts --json benchmarks/results/shared-prompts-cpu.json

Processor seconds of a rollout (preset `less`: LLaDA's layout, 4 blocks of 512, random weights), one thread, best of
`--repeats`, the two arms by turns in one process. The tokens of both are compared too.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import machine, table, write_json
from benchmarks.sampler import Shape, random_policy
from dllm_rl.models.base import FORWARD_COST, block_causal_mask, block_ranks, encode_block_causal, position_ids
from dllm_rl.models.policy import ModulePolicy
from dllm_rl.quantization.rollout_policy import quantized_copy
from dllm_rl.quantization.schemes import Float8WeightOnly
from dllm_rl.samplers import rules, unmask
from dllm_rl.samplers.cache import BlockCache, CachedForward, DualCache, PrefixCache
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.types.rollouts import Prompts

LESS = Shape(4, 512, 8, 1536, 16384, batch=8, prompt=64, new=64, block=32, steps=8)
SMOKE = Shape(1, 32, 2, 64, 512, batch=4, prompt=64, new=16, block=8, steps=4)
LENGTHS = {
    "prompts of 40 to 260": [40, 260, 100, 180, 60, 220, 140, 75],
    "one of 900 beside 7 of 60": [900] + [60] * 7,
}


class Waiting(CachedForward):
    """As it was: all rows that began a block run until the slowest has ended."""

    def advance(
        self, tokens: Tensor, rows: Tensor, columns: tuple[int, int], *, run: Tensor, copies: Tensor | None
    ) -> tuple[Tensor, int]:
        if columns != self.columns:
            self.begun = rows
        if copies is not None:
            return super().advance(tokens, rows, columns, run=run, copies=copies)
        found, first = super().advance(tokens, self.begun, columns, run=self.begun, copies=None)
        return found[torch.isin(self.begun, rows)], first


@contextmanager
def whole_batches() -> Iterator[None]:
    """As it was: rows of all lengths in one batch."""
    before, FORWARD_COST["cpu"] = FORWARD_COST["cpu"], 10**9
    try:
        yield
    finally:
        FORWARD_COST["cpu"] = before


@contextmanager
def waiting_rows() -> Iterator[None]:
    unmask.CachedForward = Waiting
    try:
        yield
    finally:
        unmask.CachedForward = CachedForward


def compared(what: str, before: Callable[[], Any], now: Callable[[], Any], repeats: int) -> dict[str, Any]:
    best, found = [float("inf")] * 2, [None] * 2
    for _ in range(repeats):
        for arm, run in enumerate((before, now)):
            began = time.process_time()
            found[arm] = run()
            best[arm] = min(best[arm], time.process_time() - began)
    same = alike(*found)
    row = {"what": what, "before, s": round(best[0], 3), "now, s": round(best[1], 3)}
    row |= {"ratio": round(best[0] / best[1], 2), "same result": same}
    print(row, flush=True)
    return row


def alike(one: Any, other: Any) -> bool:
    """Lists and tokens of rollouts are equal; states are, to rounding."""
    if isinstance(one, Tensor):
        return torch.allclose(one, other, rtol=1e-4, atol=1e-4)
    return one == other if isinstance(one, list) else torch.equal(one.tokens, other.tokens)


def with_it(context: Callable[[], Any], run: Callable[[], Any]) -> Any:
    with context():
        return run()


def some(scores: Tensor, masked: Tensor, steps_left: Tensor) -> Tensor:
    """With random weights no probability passes a threshold: a position passes by its uniform number, one in three."""
    return masked & ((scores > 2 / 3) | (scores == scores.amax(-1, keepdim=True)))


def block_causal(policy: ModulePolicy, size: int) -> ModulePolicy:
    """The same weights, blocks of `size` seeing themselves and those before; no token ends a completion."""
    changed = replace(policy.spec, attention="block_causal", block_size=size, eos_ids=())
    changed = replace(changed, encode=partial(encode_block_causal, spec=changed))
    return ModulePolicy(policy.module, changed, policy.tokenizer)


def scored(policy: ModulePolicy, tokens: Tensor, prompt: int, group: int, backward: bool) -> Tensor:
    """States of the completions, of `tokens` (B, T) behind prompts of whole blocks, from one prompt's keys and values a
    group, which scoring does not do; group=1: from one forward of all, as it does. backward: the embedding's gradient
    of the sum of their squares."""
    policy.module.zero_grad()
    places = position_ids(torch.ones_like(tokens, dtype=torch.bool))
    mask = block_causal_mask(torch.ones_like(tokens, dtype=torch.bool), *block_ranks(policy.spec, tokens, places))
    with torch.set_grad_enabled(backward):
        if group == 1:
            states = policy.encode(tokens, mask, places)[:, prompt:]
        else:
            cache = policy.spec.new_cache(policy.module)
            policy.encode(
                tokens[::group, :prompt], mask[::group, :, :prompt, :prompt], places[::group, :prompt], cache=cache
            )
            cache.set_tensors([x.repeat_interleave(group, dim=0) for x in cache.tensors()])
            states = policy.encode(tokens[:, prompt:], mask[:, :, prompt:], places[:, prompt:], cache=cache)
        if not backward:
            return states
        states.square().sum().backward()
    return policy.module.get_input_embeddings().weight.grad


def shared_prompts(shape: Shape, repeats: int) -> Iterator[dict[str, Any]]:
    """Completions of one prompt, of four times their length, under block-causal attention."""
    policy, generator = block_causal(random_policy(shape, torch.device("cpu")), shape.block), torch.Generator()
    prompt, group = 4 * shape.new, shape.batch
    ids = torch.randint(3, shape.vocabulary, (1, prompt), generator=generator.manual_seed(1)).tolist()
    arms = []
    for given, size in ((ids * group, 1), (ids, group)):
        prompts = Prompts.from_ids(given, pad_id=policy.pad_id, num_generations=size, seeds=range(group))
        settings = {
            "max_new_tokens": shape.new,
            "diffusion_steps": shape.steps,
            "temperature": 1.0,
            "cache": BlockCache(),
        }
        arms.append(partial(Unmask(**settings), policy, prompts, torch.Generator()))
    yield compared(f"prompt of {prompt} once for {group} completions, sampling", *arms, repeats)
    tokens = arms[0]().tokens
    for backward in (False, True):
        arms = [partial(scored, policy, tokens, prompt, size, backward) for size in (1, group)]
        what = "forward and backward" if backward else "forward"
        yield compared(f"prompt of {prompt} once for {group} completions, scoring's {what} (not taken)", *arms, repeats)


def savings(shape: Shape, repeats: int, smoke: bool) -> Iterator[dict[str, Any]]:
    policy = random_policy(shape, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    caches = {"no cache": None, "prefix cache": PrefixCache(), "dual cache": DualCache()}

    def sampled(lengths: list[int], policy: Any = policy, **options: Any) -> Callable[[], Any]:
        ids = [torch.randint(3, shape.vocabulary, (length,), generator=generator).tolist() for length in lengths]
        prompts = Prompts.from_ids(ids, pad_id=policy.pad_id, seeds=range(len(ids)))
        more = {"max_new_tokens": shape.new, "diffusion_steps": shape.steps, "block_size": shape.block}
        return partial(Unmask(**more | options), policy, prompts, torch.Generator())

    for name, lengths in LENGTHS.items():
        for cache in caches:
            run = sampled([length // 4 for length in lengths] if smoke else lengths, cache=caches[cache])
            yield compared(f"length buckets, {name}, {cache}", partial(with_it, whole_batches, run), run, repeats)
    for cache in ("prefix cache", "dual cache"):
        run = sampled([shape.prompt] * shape.batch, cache=caches[cache], rank=rules.RandomOrder(), commit=some)
        yield compared(f"finished rows leave, {cache}", partial(with_it, waiting_rows, run), run, repeats)
    in_products, once = (quantized_copy(policy, Float8WeightOnly(dequantized=d)) for d in (False, True))
    for batch in (1, shape.batch):
        lengths = [shape.prompt] * batch
        state = generator.get_state()
        before = sampled(lengths, in_products)
        generator.set_state(state)
        yield compared(f"FP8 weights dequantized once, batch {batch}", before, sampled(lengths, once), repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, once: seconds")
    parser.add_argument("--parts", default="savings,prompts", help="prompts: what a group's completions share")
    parser.add_argument("--json", help="where to write the numbers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shape = SMOKE if arguments.smoke else LESS
    repeats, found = 1 if arguments.smoke else arguments.repeats, []
    if "savings" in arguments.parts:
        found += savings(shape, repeats, arguments.smoke)
    if "prompts" in arguments.parts:
        found += shared_prompts(shape, repeats)
    print(table(found))
    write_json(
        arguments.json,
        {"machine": machine("cpu"), "shape": {k: str(v) for k, v in vars(shape).items()}} | {"rows": found},
    )


if __name__ == "__main__":
    main()
