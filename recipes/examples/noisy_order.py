"""An order of your own with a probability: a score with Gumbel noise (docs/samplers.md).

python -m recipes.examples.noisy_order
"""

from functools import partial

from dllm_rl import Rank, tiny_masked_lm, unmask
from dllm_rl.samplers.rules import plackett_luce
from dllm_rl.testing import weighted_shares


def log_odds(logits, normalizer):
    first, second = logits.topk(2, dim=-1).values.unbind(-1)
    return first - second


policy = tiny_masked_lm(characters="ab=", head_std=0.3)
(equals,) = policy.tokenizer.encode("=", add_special_tokens=False)
others = (policy.pad_id, equals, *policy.spec.eos_ids)  # only a and b are left: 16 completions
sampler = partial(unmask, max_new_tokens=4, diffusion_steps=4, temperature=1.0, suppress=others)
noisy = partial(plackett_luce, temperature=0.3, base_rank=Rank(log_odds, "deterministic"))
drawn = weighted_shares(policy, partial(sampler, rank=noisy), [equals])
plain = weighted_shares(policy, partial(sampler, rank=log_odds), [equals])
print(drawn)
print(plain)
