"""The study of rules that decide how many positions a step writes: what a gradient misses, and the table in docs."""

import torch

from recipes.studies import commits
from recipes.studies.enumeration import ToyPolicy


def test_only_the_sets_law_sees_the_whole_change():
    missed = {}
    for rule in ("threshold", "soft_threshold 0.5", "soft_threshold 0.5, tokens alone"):
        missed[rule] = 0.0
        for seed in (0, 1000, 2000):
            generator = torch.Generator().manual_seed(seed)
            toy = ToyPolicy(length=3, words=3, sharpness=3.0, generator=generator)
            change, integral = commits.along_a_line(toy, rule, generator, points=8)
            missed[rule] += abs(change - integral) / 3
    assert missed["soft_threshold 0.5"] < 0.05
    assert missed["threshold"] > 0.2 and missed["soft_threshold 0.5, tokens alone"] > 0.06, missed


def test_every_way_to_write_three_positions_is_there_once():
    toy = ToyPolicy(length=3, words=3, sharpness=1.0, generator=torch.Generator().manual_seed(0))
    rollout = commits.in_every_set(toy, 0.5)
    ways = {tuple(way) for way in rollout.unmask_step.tolist()}
    assert len(ways) == 13 and len(rollout.tokens) == 13 * 27  # the ordered Bell number of 3
