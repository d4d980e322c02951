"""A commit rule that draws written tokens beside new ones again (docs/extend-sampler.md).

python -m recipes.examples.rewriting_rule
"""

from functools import partial

import torch
import torch.nn.functional as F

from dllm_rl import Schedule, Unmask, tiny_masked_lm
from dllm_rl.samplers.rules import RandomOrder
from dllm_rl.testing import weighted_shares


def beside(scores, masked, steps_left, redrawable, uniforms, *, rate):  # (B, L) each, steps_left (B,) -> (B, L)
    now = Schedule()(scores.masked_fill(~masked, -torch.inf), masked, steps_left)  # scores are of written positions too
    near = F.pad(now[:, 1:], (0, 1)) | F.pad(now[:, :-1], (1, 0))
    return now | redrawable & near & (uniforms < rate)


policy = tiny_masked_lm(characters="ab=", head_std=0.3)
(equals,) = policy.tokenizer.encode("=", add_special_tokens=False)
others = (policy.pad_id, equals, *policy.spec.eos_ids)
sampler = Unmask(max_new_tokens=4, diffusion_steps=4, temperature=1.0, suppress=others)
shares = weighted_shares(policy, sampler.replace(rank=RandomOrder(), commit=partial(beside, rate=0.5)), [equals])
print(shares)
