"""SmolLM2-135M, an autoregressive model, becomes a masked-diffusion one: supervised, on sums of two digits.

    pip install gguf && python recipes/smollm2_diffusion_sft.py
    python recipes/smollm2_diffusion.py

The pretrained model gets full attention, a mask token and its head shifted, as Dream has it; adapters of rank 16 learn
the rest. Weights: recipes/weights.py (Apache-2.0). Results: recipes/results.md.
"""

from dataclasses import replace

from dllm_rl import SFT, Lora, Policy, main
from dllm_rl.groups import Evaluation, Log, Saves
from dllm_rl.models.convert import diffusion_from_causal
from dllm_rl.tasks import Problem
from recipes import weights
from recipes.smollm2_arithmetic import Sums
from recipes.solved import solved


class PlainSums(Sums):
    """The sums of smollm2_arithmetic.py without a chat: `12 + 34 =` is the prompt."""

    def __getitem__(self, index: int) -> Problem:
        problem = super().__getitem__(index)
        return replace(problem, prompt=problem.prompt[-1]["content"])


def smollm2_diffusion() -> Policy:
    """The converted model, downloaded at the first call."""
    return diffusion_from_causal(weights.smollm2())


recipe = SFT(
    name="smollm2-diffusion-sft",
    model=smollm2_diffusion,
    dataset=solved(PlainSums(held_out=False, size=1200)),
    eval_dataset=solved(PlainSums(held_out=True, size=64)),
    max_length=16,
    completion_length=4,
    lora=Lora(),
    train_batch_size=32,
    learning_rate=1e-3,
    num_steps=120,
    evaluation=Evaluation(steps=30),
    saves=Saves(steps=120),
    log=Log(steps=10),
)

if __name__ == "__main__":
    main(recipe)
