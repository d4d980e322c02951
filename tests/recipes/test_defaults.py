"""One default for RL, which `grpo` and the recipes share; who differs is named here, with the reason."""

from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

from dllm_rl import Autoregress, Causal, MaxProb, Recipe, Trajectory, Unmask, tiny_masked_lm
from dllm_rl.frontend.grpo import grpo_recipe
from dllm_rl.models.tiny import tiny_llama
from dllm_rl.samplers.rules import Confidence

RECIPES = Path(__file__).parents[2] / "recipes"
DEFAULTS = {field.name: field.default for field in fields(Recipe)}
PARTS = ("corrector", "loss", "loss_reduction", "num_iterations", "advantages", "old_logprobs", "beta", "entropy_coeff")
APART = {
    "sudoku_tiny": {"entropy_coeff"},  # equal answers of a group teach nothing, and it keeps them apart for longer
    "latin_sudoku": {"entropy_coeff", "corrector"},  # the same; it shows a corrector at work
    "quantized_sudoku": {"corrector", "rank"},  # it shows what a corrector does in an order that it can correct
    # The entropy of the recipe that it varies; the others are what held against a lag (studies/late/README.md).
    "async_sudoku": {"entropy_coeff", "old_logprobs", "loss"},
    "antibody_cdr3": {"beta"},  # a KL term to the pretrained model
    "smollm2_arithmetic": {"beta", "corrector"},  # its mean ESS is 0.92
    "smollm2_diffusion": {
        "beta",
        "corrector",
        "rank",
    },  # its SFT masked at random; the corrector is the recipe's before it
}


def parts_apart(recipe):
    """Names of the parts in which a recipe is not the default."""
    apart = {name for name in PARTS if getattr(recipe, name) != DEFAULTS[name]}
    diffusion = not isinstance(recipe.sampler, Autoregress)
    if isinstance(recipe.sampler, Unmask) and recipe.sampler.rank != MaxProb():
        apart.add("rank")
    if recipe.likelihood != (Trajectory() if diffusion else Causal()):
        apart.add("likelihood")
    return apart


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.py")), ids=lambda path: path.stem)
def test_a_recipe_is_the_default_where_no_reason_is_given(path):
    recipe = getattr(import_module(f"recipes.{path.stem}"), "recipe", None)
    if isinstance(recipe, Recipe) and path.stem != "antibody_loops":
        assert parts_apart(recipe) == APART.get(path.stem, set())


def nothing(completions):
    return [0.0] * len(completions)


@pytest.mark.parametrize(("steps", "segments"), [(3, None), (4, 2), (8, 2), (16, 4), (64, 8)])
@pytest.mark.repeated
def test_grpo_is_the_default(steps, segments):
    rows = [{"prompt": character} for character in "abcdefghij" * 3]
    given = {"max_new_tokens": 64, "sampler_options": {"diffusion_steps": steps}}
    model = tiny_masked_lm(characters="abcdefghij")
    recipe = grpo_recipe(model, rows, nothing, **given)
    assert parts_apart(recipe) == ({"likelihood"} if segments else set())
    assert recipe.likelihood == Trajectory(num_segments=segments)
    assert recipe.eval_sampler.rank == MaxProb()
    given["sampler_options"]["rank"] = Confidence()
    assert grpo_recipe(model, rows, nothing, **given).sampler.rank == Confidence()
    recipe = grpo_recipe(tiny_llama(characters="abcdefghij", causal=True), rows, nothing, max_new_tokens=4)
    assert isinstance(recipe.sampler, Autoregress) and parts_apart(recipe) == set()
