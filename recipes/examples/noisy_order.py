"""An order of your own with a probability: a score with Gumbel noise (docs/extend-sampler.md).

python -m recipes.examples.noisy_order
"""

from dllm_rl import Unmask, tiny_masked_lm
from dllm_rl.samplers.rules import FunctionRank, PlackettLuce
from dllm_rl.testing import weighted_shares


def log_odds(logits, normalizer):
    first, second = logits.topk(2, dim=-1).values.unbind(-1)
    return first - second


policy = tiny_masked_lm(characters="ab=", head_std=0.3)
(equals,) = policy.tokenizer.encode("=", add_special_tokens=False)
others = (policy.pad_id, equals, *policy.spec.eos_ids)  # only a and b are left: 16 completions
sampler = Unmask(max_new_tokens=4, diffusion_steps=4, temperature=1.0, suppress=others)
noisy = PlackettLuce(temperature=0.3, base_rank=FunctionRank(function=log_odds, order="deterministic"))
drawn = weighted_shares(policy, sampler.replace(rank=noisy), [equals])
plain = weighted_shares(policy, sampler.replace(rank=log_odds), [equals])
print(drawn)
print(plain)
