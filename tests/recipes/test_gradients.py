"""The study of gradients: what the integral of a policy gradient makes of a change of the expected reward."""

import torch

from recipes.studies.enumeration import ToyPolicy
from recipes.studies.gradients import along_a_line


def test_only_a_noisy_order_with_its_part_of_the_gradient_sees_the_whole_change():
    missed = {}
    for rank in ("max_prob", "plackett_luce 0.3", "plackett_luce 0.3, tokens alone"):
        generator = torch.Generator().manual_seed(2000)
        toy = ToyPolicy(length=3, words=3, sharpness=3.0, generator=generator)
        change, integral = along_a_line(toy, rank, generator, points=8)
        missed[rank] = abs(change - integral)
    assert missed["plackett_luce 0.3"] < 0.02
    assert missed["max_prob"] > 0.1 and missed["plackett_luce 0.3, tokens alone"] > 0.1, missed
