"""SmolLM2-135M, an autoregressive model, becomes a masked-diffusion one: supervised, on solved 4x4 Sudoku puzzles.

    pip install gguf && python recipes/smollm2_sudoku_sft.py
    python recipes/smollm2_sudoku.py

The pretrained model gets full attention, a mask token and its head shifted, as Dream has it; adapters of rank 16 learn
the rest. Weights: recipes/weights.py (Apache-2.0). Results: recipes/README.md.
"""

from dataclasses import replace

from dllm_rl import SFT, Policy, diffusion_from_causal, lora_r16, main
from dllm_rl.tasks import Problem, Sudoku
from recipes import weights
from recipes.sft_tiny import solved


class Digits(Sudoku):
    """Puzzles with 0 for a blank: every digit is a token, where SmolLM2 has one for two dots or four."""

    def __getitem__(self, index: int) -> Problem:
        problem = super().__getitem__(index)
        return replace(problem, prompt=f"{problem.fields['puzzle']}=")


def smollm2_diffusion() -> Policy:
    """The converted model, downloaded at the first call."""
    return diffusion_from_causal(weights.smollm2())


recipe = SFT(
    name="smollm2-sudoku-sft",
    model=smollm2_diffusion,
    dataset=solved(Digits(split="train", size=4000)),
    eval_dataset=solved(Digits(split="validation", size=32)),
    max_length=64,
    completion_length=16,
    lora=lora_r16,
    train_batch_size=16,
    learning_rate=1e-3,
    num_steps=200,
    eval_steps=50,
    save_steps=100,
    logging_steps=10,
)

if __name__ == "__main__":
    main(recipe)
