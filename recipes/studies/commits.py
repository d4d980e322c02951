"""What does a policy gradient miss where a rule decides how many positions a step writes? Exactly, by enumeration.

Three words at three positions: all 27 outcomes in each of the 13 ways to write them in one, two or three steps. The
reward is a random number for each outcome plus half a point for each step saved. All weights move along a random line
by 0.6 of their spread, as in gradients.py: the change of the expected reward is exact, and the integral of the policy
gradient along the line should be the same number. "threshold" is `SoftThreshold` at temperature 0.01, where hardly a
set is left to chance, and its gradient is that of the tokens alone, as `Trajectory()` has it for `Threshold`.

    python -m recipes.studies.commits                 write commits.json; about a minute of one core
    python -m recipes.studies.commits --report        the table of commits.json
"""

import argparse
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from dllm_rl.files import read_json, write_json
from dllm_rl.likelihoods import estimators as lik
from dllm_rl.samplers.rules import MaxProb
from dllm_rl.types import Order, Rollout
from recipes.studies.enumeration import ToyPolicy, contributions
from recipes.studies.paired import markdown

STORED = Path(__file__).with_suffix(".json")
TAU = 0.5
# The temperature of the rule, and `order` of the gradient.
RULES = {
    "threshold": (0.01, False),
    **{f"soft_threshold {heat}": (heat, True) for heat in (0.1, 0.5, 1.0)},
    **{f"soft_threshold {heat}, tokens alone": (heat, False) for heat in (0.1, 0.5, 1.0)},
}
SHARPNESS = {"early": 1.0, "late": 3.0}
LENGTH = WORDS = 3


def in_every_set(toy: ToyPolicy, temperature: float) -> Rollout:
    """All outcomes, each written in every way: the steps of the positions, of which none is left out."""
    base = toy.rollout(1)
    ways = [way for way in product(range(LENGTH), repeat=LENGTH) if set(way) == set(range(max(way) + 1))]
    step = torch.tensor(ways).repeat_interleave(len(base.tokens), 0)
    blank = torch.zeros(step.shape)
    order = Order(blank.long(), logprobs=blank, soft_threshold_params=(TAU, temperature), rank_function=MaxProb())
    return replace(base.rows(torch.arange(len(base.tokens)).repeat(len(ways))), unmask_step=step, order=order)


def along_a_line(toy: ToyPolicy, rule: str, generator: torch.Generator, *, points: int) -> tuple[float, float]:
    """The change of the expected reward, and what the integral of the policy gradient makes of it."""
    temperature, order = RULES[rule]
    rollout = in_every_set(toy, temperature)
    steps = rollout.unmask_step.amax(-1) + 1
    right = torch.randn(WORDS**LENGTH, generator=generator, dtype=torch.float64)
    rewards = right.repeat(len(steps) // len(right)) + 0.5 * (LENGTH - steps)
    starts, ends = toy.weights, toy.moved(0.6, generator).weights
    laws = {each: lik.Trajectory(include_order=each) for each in (True, False)}
    views = {each: law.draw_views(rollout, generator) for each, law in laws.items()}
    moving = toy.moved(0.0, generator)
    change = integral = 0.0
    for place in [0.0, 1.0, *((i + 0.5) / points for i in range(points))]:
        moving.weights = [(a + place * (b - a)).requires_grad_() for a, b in zip(starts, ends, strict=True)]
        logps = {each: contributions(moving, rollout, views[each], laws[each]).sum(-1) for each in {True, order}}
        chances = logps[True].detach().exp()
        assert abs(float(chances.sum()) - 1) < 1e-9, "every way, once"
        if place in (0.0, 1.0):
            change += (2 * place - 1) * float(chances @ rewards)
            continue
        gradients = torch.autograd.grad((chances * rewards * logps[order]).sum(), moving.weights)
        slope = sum((g * (b - a)).sum() for g, a, b in zip(gradients, starts, ends, strict=True))
        integral += float(slope) / points
    return change, integral


def measured(networks: int, points: int) -> list[dict[str, str]]:
    """By rule: the mean |change|, what the integral misses of it, and in how many networks its sign is wrong."""
    rows = []
    for rule in RULES:
        row = {"rule": rule}
        for kind, sharpness in SHARPNESS.items():
            pairs = []
            for network in range(networks):
                generator = torch.Generator().manual_seed(1000 * network)
                toy = ToyPolicy(length=LENGTH, words=WORDS, sharpness=sharpness, generator=generator)
                pairs.append(along_a_line(toy, rule, generator, points=points))
            size = sum(abs(change) for change, _ in pairs) / networks
            missed = sum(abs(change - integral) for change, integral in pairs) / networks
            wrong = sum(change * integral < 0 for change, integral in pairs)
            row[kind] = f"{size:.3f}/{missed:.3f}/{wrong}"
        rows.append(row)
    return rows


def page_tables() -> dict[str, str]:
    return {"rules": markdown(read_json(STORED))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=12)
    parser.add_argument("--points", type=int, default=40, help="of the line, at which the gradient is taken")
    parser.add_argument("--report", action="store_true", help=f"run nothing: the table of {STORED.name}")
    options = parser.parse_args()
    if not options.report:
        write_json(STORED, measured(options.networks, options.points))
    print(markdown(read_json(STORED)))


if __name__ == "__main__":
    main()
