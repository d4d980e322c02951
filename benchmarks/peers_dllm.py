"""Rollouts by dllm's sampler and by ours: the same weights, prompts and temperature.

    python -m benchmarks.peers_dllm --dllm CHECKOUT --json benchmarks/results/peers-dllm-cpu.json

CHECKOUT is a clone of github.com/ZHZisZZ/dllm, of which dllm/core/samplers/mdlm.py and what it imports are loaded, and
nothing else. Before they are timed, both must write the same tokens at temperature 0. Processor seconds, one thread,
the arms in turns, the fastest of `--repeats`. Each row changes one thing of the first: the denoising steps, the batch,
the length (with as many tokens a step), or the vocabulary.
"""

import argparse
import sys
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import fastest, machine, peer_arguments, ratios_of, write_json
from benchmarks.peers import BASE, SMOKE, TEMPERATURE, OneModel

CHANGES: list[dict[str, int]] = [
    {},
    *({"steps": steps} for steps in (4, 8, 32)),
    {"batch": 16},
    {"prompt": 64, "new": 64, "steps": 32},
    {"vocabulary": 32768},
]


def dllm_sampler_class(checkout: str) -> type:
    """dllm's sampler. The packages above it are stood in for, because their own imports are of training."""
    folder = Path(checkout) / "dllm"
    if not (folder / "core" / "samplers" / "mdlm.py").is_file():
        raise SystemExit(f"error: --dllm {checkout} has no dllm/core/samplers/mdlm.py: is it a clone of dllm?")
    packages = {"dllm": folder, "dllm.core": folder / "core", "dllm.core.samplers": folder / "core" / "samplers"}
    for name, path in packages.items():
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(path)]
    try:
        return import_module("dllm.core.samplers.mdlm").MDLMSampler
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "dllm"]:
            del sys.modules[name]


class Samplers(OneModel):
    """Both samplers on one model."""

    def __init__(self, shape: Any, sampler_class: type) -> None:
        super().__init__(shape)
        self.sampler = sampler_class(model=self.model, tokenizer=self.policy.tokenizer)

    def their_rollout(self, temperature: float) -> Tensor:
        shape = self.shape
        lengths = {"steps": shape.steps, "max_new_tokens": shape.new, "block_size": shape.block}
        return self.sampler.sample(self.prompts.tokens.tolist(), **lengths, temperature=temperature)


def compared(shape: Any, sampler_class: type, repeats: int) -> dict[str, Any]:
    """A row of processor seconds and of ratios dllm / ours.

    Raises:
        ValueError: The samplers write other tokens at temperature 0.
    """
    both = Samplers(shape, sampler_class)
    if not torch.equal(both.their_rollout(0.0), both.our_rollout(0.0).tokens):
        raise ValueError("the rollouts differ at temperature 0")
    arms = {
        f"{whose}{suffix}": partial(rollout, temperature)
        for suffix, temperature in (("", TEMPERATURE), (", greedy", 0.0))
        for whose, rollout in (("dllm", both.their_rollout), ("ours", both.our_rollout))
    }
    best = fastest(arms, repeats)
    facts = {"vocabulary": shape.vocabulary, "tokens": shape.prompt + shape.new, "batch": shape.batch}
    ratios = {
        f"dllm / ours{suffix}": round(best[f"dllm{suffix}"] / best[f"ours{suffix}"], 2) for suffix in ("", ", greedy")
    }
    return facts | {"steps": shape.steps} | ratios | {f"{name}, s": round(each, 4) for name, each in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dllm", required=True, help="checkout of github.com/ZHZisZZ/dllm")
    arguments = peer_arguments(parser)
    torch.set_num_threads(1)
    sampler_class = dllm_sampler_class(arguments.dllm)
    repeats, rows = arguments.repeats, []
    for shape in SMOKE if arguments.smoke else [replace(BASE, **change) for change in CHANGES]:
        rows.append(compared(shape, sampler_class, repeats))
        print(rows[-1], flush=True)
    print(ratios_of(rows))
    write_json(arguments.json, {"machine": machine("cpu"), "repeats": repeats, "rows": rows})


if __name__ == "__main__":
    main()
