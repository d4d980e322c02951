"""A sampler of your own: all tokens in one forward, each drawn without seeing the others.

python -m recipes.examples.sampler_at_once      checks it with `check_engine`
"""

import torch
import torch.nn.functional as F

from dllm_rl import Prompts, Rollout, option, tiny_masked_lm
from dllm_rl.models.base import copied
from dllm_rl.models.logprobs import process, sample
from dllm_rl.models.rollout_engine import FunctionEngine
from dllm_rl.rng import row_seeds
from dllm_rl.samplers.sampler import Sampler
from dllm_rl.testing import check_engine
from dllm_rl.types.rollouts import SamplingParams


class AtOnce(Sampler):
    temperature: float = option(default=1.0, at_least=0)

    @torch.no_grad()
    def __call__(self, policy, prompts, generator):
        max_new_tokens, temperature = self.max_new_tokens, self.temperature
        start, mask_id = prompts.tokens.shape[1], policy.spec.mask_id
        before = prompts.tokens.to(policy.device)  # (B, S), a row for each completion
        canvas = F.pad(before, (0, max_new_tokens), value=mask_id)  # (B, T)
        attention_mask = F.pad(prompts.attention_mask.to(policy.device), (0, max_new_tokens), value=True)
        params = SamplingParams(temperature=temperature, suppress=(mask_id,))  # the learner uses the same
        logits = process(policy.logits(canvas, attention_mask)[:, start:].flatten(0, 1), params)  # (B * new tokens, V)
        seeds = row_seeds(generator, len(before)) if prompts.seeds is None else prompts.seeds
        uniforms = [torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
        drawn = (
            logits.argmax(-1) if temperature == 0 else sample(logits, torch.cat(uniforms).double().to(logits.device))
        )
        logprobs = logits.log_softmax(-1).gather(-1, drawn[:, None]).view(len(before), max_new_tokens)
        completion_mask = F.pad(torch.ones_like(logprobs, dtype=torch.bool), (start, 0))
        return Rollout(
            tokens=torch.cat([before, drawn.view_as(logprobs)], 1),
            attention_mask=attention_mask,
            completion_mask=completion_mask,
            unmask_step=completion_mask.long() - 1,  # step 0 in the completion, -1 in the prompt
            logprobs=F.pad(logprobs, (start, 0)),
            group=prompts.group,
            weights_version=policy.weights_version,
            sampling_params=params,
            forwards=1,
        )


def sync(policy, rollout_policy):
    rollout_policy.module.load_state_dict(policy.module.state_dict())
    rollout_policy.weights_version = policy.weights_version
    return {}


policy = tiny_masked_lm(characters="1234.=", head_std=0.1)
prompts = Prompts.from_ids([[3, 4, 5], [6, 5]], pad_id=policy.pad_id, num_generations=4)
engine, sampler = FunctionEngine(load_fn=copied, sync_fn=sync), AtOnce(max_new_tokens=6, temperature=0.7)

if __name__ == "__main__":
    check_engine(engine, policy, prompts, sampler)
