"""A rollout engine of your own that computes logits; the library's sampler decodes.

python -m recipes.examples.own_engine       checks it with `check_engine`
"""

from dllm_rl import Prompts, Unmask, tiny_masked_lm
from dllm_rl.models.base import copied
from dllm_rl.models.rollout_engine import RolloutEngine, with_forward
from dllm_rl.testing import check_engine


class Mine(RolloutEngine):
    def load(self, learner):
        engine = copied(learner)  # your program

        def forward(tokens, attention_mask, positions):  # (B, T) each -> fp32 logits (B, T, V)
            return engine.head(engine.encode(tokens, attention_mask, positions))

        rollout_policy = with_forward(learner, forward)
        rollout_policy.engine = engine
        return rollout_policy

    def sync(self, learner, policy):
        policy.engine.module.load_state_dict(learner.module.state_dict())
        policy.weights_version = learner.weights_version
        return {}


policy = tiny_masked_lm(characters="1234.=", head_std=0.1)
prompts = Prompts.from_ids([[3, 4, 5], [6, 5]], pad_id=policy.pad_id, num_generations=4)
sampler = Unmask(max_new_tokens=6, diffusion_steps=3, temperature=0.7)

if __name__ == "__main__":
    check_engine(Mine(), policy, prompts, sampler)
