"""Score texts that nothing sampled: the ELBO of answers, in nats.

Any estimator that does not replay the sampler does it (`ELBO`, `Coupled`, `OneStep`; not `Trajectory`).

python -m recipes.examples.score_texts
"""

import torch

from dllm_rl import ELBO, tiny_masked_lm
from dllm_rl.decoding.prompts import prompt_ids
from dllm_rl.decoding.tokens import as_rollout, text_ids

policy, estimator = tiny_masked_lm(characters="12345678="), ELBO(num_samples=128)
rollout = as_rollout(policy, [(prompt_ids(policy, "12="), text_ids(policy, "21"))])  # pairs of prompt and answer
views = estimator.draw_views(rollout, torch.Generator().manual_seed(0))
nats = estimator.logprobs(policy, rollout, views).sum(-1)  # one number per answer
print(nats)
