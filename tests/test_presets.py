"""Which preset a model takes, what a caller's arguments replace, and d1's numbers as published."""

import shutil

import pytest

from dllm_rl import GSPO, Confidence, Lora, OneStep, PPOClip, Unmask, grpo_recipe, tiny_masked_lm
from dllm_rl.algorithms.optimizers import AdamW
from dllm_rl.config import from_command_line
from dllm_rl.models.checkpoint.loading import CONFIGS
from dllm_rl.recipe import Recipe
from dllm_rl.records import describe
from dllm_rl.samplers.cache import BlockCache
from recipes import sft_tiny, sudoku_unique
from recipes.llada_8b import recipe_of

ROWS = [{"prompt": f"{i}+1="} for i in range(20)]
LLADA = "GSAI-ML/LLaDA-8B-Instruct"


def nothing(completions, **_):
    return [0.0] * len(completions)


@pytest.mark.repeated
@pytest.mark.parametrize(
    ("model", "name", "sampler"),
    [
        (LLADA, "large", {"block_size": 32, "diffusion_steps": 128}),
        ("Dream-org/Dream-v0-Instruct-7B", "large", {"block_size": 32, "diffusion_steps": 128}),
        ("inclusionAI/LLaDA2.0-mini", "large-blocks", {"cache": BlockCache(), "diffusion_steps": 128}),
        ("Qwen/Qwen3-8B", "large-causal", {}),
    ],
)
def test_a_large_model_takes_its_preset_by_its_config(tmp_path, capsys, model, name, sampler):
    shutil.copy(CONFIGS / f"{model.replace('/', '--')}.json", tmp_path / "config.json")  # a folder has no name
    for source in (model, str(tmp_path)):
        recipe = grpo_recipe(source, ROWS, nothing)
        said = capsys.readouterr().out
        assert said.startswith(f"preset {name}: learning_rate=1e-05, ") and said.count("\n") == 1
        assert (recipe.learning_rate, recipe.dtype, recipe.max_grad_norm) == (1e-5, "bfloat16", 0.2)
        assert recipe.lora is not None and recipe.lora == Lora(r=128, alpha=64.0)
        assert (recipe.train_batch_size, recipe.num_generations, recipe.micro_batch_size) == (8, 6, 6)
        assert {key: getattr(recipe.sampler, key) for key in sampler} == sampler
        assert recipe.sampler.temperature == 1.0


def test_what_is_given_replaces_a_presets(capsys):
    given = {"learning_rate": 2e-5, "lora": Lora(), "temperature": 0.7, "max_new_tokens": 96}
    recipe = grpo_recipe(LLADA, ROWS, nothing, num_generations=4, sampler_options={"block_size": 16}, **given)
    assert (recipe.learning_rate, recipe.lora, recipe.dtype) == (2e-5, Lora(), "bfloat16")
    assert (recipe.num_generations, recipe.micro_batch_size) == (4, 4)  # a forward has whole groups
    sampler = recipe.sampler
    assert (sampler.block_size, sampler.diffusion_steps, sampler.temperature) == (16, 48, 0.7)
    assert "learning_rate" not in capsys.readouterr().out
    recipe = grpo_recipe(LLADA, ROWS, nothing, per_device_train_batch_size=16)  # TRL's groups of eight
    assert (recipe.micro_batch_size, recipe.num_generations, recipe.train_batch_size) == (16, 8, 2)
    assert grpo_recipe(LLADA, ROWS, nothing, preset="none").learning_rate == Recipe.learning_rate


@pytest.mark.parametrize(
    ("length", "block_size", "steps"),
    [(256, 32, 128), (300, 32, 150), (33, 32, 17), (1000, 48, 500), (41, 2, 21), (5, 1, 5), (1, 32, 1)],
)
@pytest.mark.repeated
def test_a_presets_steps_are_one_per_two_tokens_for_any_length(length, block_size, steps):
    options = {"block_size": block_size}
    recipe = grpo_recipe(LLADA, ROWS, nothing, max_new_tokens=length, sampler_options=options)
    assert recipe.sampler.diffusion_steps == steps
    for name in ("inclusionAI/LLaDA2.0-mini", LLADA):
        assert grpo_recipe(name, ROWS, nothing, max_new_tokens=length).sampler.diffusion_steps == -(-length // 2)


@pytest.mark.repeated(every=3)
@pytest.mark.parametrize(
    ("given", "sizes"),  # prompts, completions per prompt, completions per forward
    [
        ({"num_generations": 8}, (8, 8, 8)),
        ({"num_generations": 4}, (8, 4, 4)),
        ({"train_batch_size": 4}, (4, 6, 6)),
        ({"micro_batch_size": 3}, (8, 6, 3)),
        ({"num_generations": 16, "micro_batch_size": 4}, (8, 16, 4)),
        ({"rollout_batch_size": 12}, (8, 6, 6)),
        ({"per_device_train_batch_size": 12, "num_generations": 6}, (2, 6, 12)),
    ],
)
def test_a_batch_setting_leaves_the_presets_other_batch_settings(given, sizes):
    recipe = grpo_recipe(LLADA, ROWS, nothing, **given)
    assert (recipe.train_batch_size, recipe.num_generations, recipe.micro_batch_size) == sizes


def test_a_small_model_keeps_the_defaults(capsys):
    recipe = grpo_recipe(tiny_masked_lm(characters="0123456789+="), ROWS, nothing)
    assert (recipe.learning_rate, recipe.lora, recipe.num_generations) == (5e-4, None, 8)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="preset='d2' is not one of large, large-blocks, large-causal, d1"):
        grpo_recipe(tiny_masked_lm(characters="0123456789+="), ROWS, nothing, preset="d2")


@pytest.mark.parametrize(
    ("task", "updates", "temperature"), [("sudoku", 8, 0.3), ("countdown", 8, 0.9), ("gsm8k", 12, 0.9)]
)
def test_d1_as_published(capsys, task, updates, temperature):
    """arXiv 2504.12216: learning rate, AdamW, groups, length, steps, blocks, updates, KL term, clip, adapters."""
    recipe = recipe_of(task)
    capsys.readouterr()
    d1 = from_command_line(recipe, ["--preset", "d1", "--num_steps", "7"])
    assert capsys.readouterr().out.startswith("preset d1: learning_rate=3e-06, ")
    assert (d1.learning_rate, d1.optim) == (3e-6, AdamW(beta1=0.9, beta2=0.99, weight_decay=0.1))
    assert (d1.max_grad_norm, d1.num_generations, d1.num_iterations, d1.beta) == (0.2, 6, updates, 0.04)
    assert d1.lora is not None and d1.lora == Lora(r=128, alpha=64.0, dropout=0.05)
    assert describe(d1.likelihood) == describe(OneStep(prompt_mask=0.15))
    assert describe(d1.loss) == describe(PPOClip(epsilon=0.5))  # one clip, no dual one
    assert "scale_rewards='none'" in describe(d1.advantages)
    sampler = {"max_new_tokens": 256, "diffusion_steps": 128, "block_size": 32, "rank": Confidence()}
    assert d1.sampler == Unmask(**sampler, temperature=temperature)
    assert d1.eval_sampler == Unmask(**sampler, temperature=0.0)
    assert d1.num_steps == 7 and d1.task == recipe.task


@pytest.mark.parametrize(
    ("given", "loss"),
    [
        ({"delta": 1.6}, PPOClip(epsilon=0.5, delta=1.6)),
        ({"epsilon_high": 0.6}, PPOClip(epsilon=0.5, epsilon_high=0.6)),
        ({"delta": 1.6, "loss": GSPO()}, None),
        ({"delta": 1.6, "loss": PPOClip(epsilon=0.3)}, PPOClip(epsilon=0.3, delta=1.6)),
    ],
)
def test_one_field_beside_a_preset_keeps_the_presets_others(given, loss):
    if loss is None:
        with pytest.raises(ValueError, match=r"delta=1\.6 is not a setting of loss=GSPO"):
            grpo_recipe(LLADA, ROWS, nothing, preset="d1", **given)
    else:
        assert grpo_recipe(LLADA, ROWS, nothing, preset="d1", **given).loss == loss


def test_a_rate_that_the_preset_keeps_constant_has_no_warm_up():
    with pytest.raises(ValueError, match=r"warmup_steps=5 is not a setting of lr_schedule=ConstantRate"):
        grpo_recipe(LLADA, ROWS, nothing, preset="d1", num_iterations=1, warmup_steps=5)


def test_options_stand_above_a_preset_and_sft_has_none(capsys):
    options = ["--learning_rate", "1e-5", "--preset=d1", "--sampler.temperature", "1.0", "--base_quantization", "none"]
    recipe = from_command_line(recipe_of(), options)
    assert (recipe.learning_rate, recipe.base_quantization, recipe.beta) == (1e-5, None, 0.04)
    assert recipe.sampler.temperature == 1.0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        from_command_line(sudoku_unique.recipe, ["--preset", "d1"])
    assert capsys.readouterr().err.startswith("error: warmup.steps=200 trains all weights, and base_quantization=")
    for resolved in (["--warmup.steps", "0"], ["--base_quantization", "none"]):
        recipe = from_command_line(sudoku_unique.recipe, [*resolved, "--preset", "d1"])
        assert recipe.replace() == recipe and recipe.beta == 0.04
    with pytest.raises(SystemExit):
        from_command_line(sft_tiny.recipe, ["--preset", "d1"])
    assert capsys.readouterr().err.startswith("error: --preset d1: presets are for RL")
