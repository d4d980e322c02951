"""Completions of a policy in one call."""

from functools import partial

import pytest
import torch
from refusals import refused
from tiny_recipe import tiny_recipe

from dllm_rl import Unmask, complete, load_policy
from dllm_rl.cli.main import main
from dllm_rl.decoding.prompts import encode
from dllm_rl.decoding.texts import decode, full_texts
from dllm_rl.models.tiny import tiny_diffusion_gemma, tiny_llama, tiny_masked_lm
from dllm_rl.rng import generator_for
from dllm_rl.samplers import Autoregress, Renoise
from dllm_rl.tasks import Problem, Sudoku
from dllm_rl.training.trainer import train

pytestmark = pytest.mark.usefixtures("no_rehearsal")

DIGITS = {"characters": "0123456789=_"}
SMALL = {"hidden_size": 32, "num_layers": 1, "head_std": 0.3}


@pytest.mark.parametrize(
    ("make", "sampler", "changes"),
    [
        (partial(tiny_masked_lm, **SMALL), Unmask(max_new_tokens=16), {"diffusion_steps": 4}),
        (partial(tiny_llama, causal=True), Autoregress(max_new_tokens=16, temperature=0.0), {"temperature": 0.5}),
        (tiny_diffusion_gemma, Renoise(max_new_tokens=4), {"answer": "drawn"}),
    ],
    ids=["diffusion", "causal", "random tokens"],
)
@pytest.mark.repeated(first_only=True)
def test_it_is_the_policys_sampler_with_the_given_settings(make, sampler, changes):
    policy = make(**DIGITS)
    if isinstance(sampler, Renoise):
        sampler = sampler.replace(max_new_tokens=policy.spec.block_size)
    for settings, seed in (({}, 0), (changes, 3)):
        prompts = encode(policy, [Problem("37="), Problem("12=3")], reads_order=False)
        with torch.no_grad():
            expected = decode(policy, sampler.replace(**settings)(policy, prompts, generator_for(seed)))
        assert policy.complete(["37=", "12=3"], seed=seed, **settings) == expected
    (batched,) = policy.complete(["37="], **changes)
    assert complete(policy, "37=", **changes) == policy.complete("37=", **changes) == batched


def test_blanks_are_filled_in():
    policy = tiny_masked_lm(**DIGITS)
    prompts = encode(policy, [Problem("1_3=_", blank="_")], reads_order=False)
    rollout = Unmask(max_new_tokens=0)(policy, prompts, generator_for(0))
    assert policy.complete("1_3=_", blank="_") == full_texts(policy, rollout)[0]


def test_a_runs_policy_completes_as_its_evaluations_do_however_it_is_opened(tmp_path, capsys):
    puzzles = {f"{name}_task": Sudoku(split="test", size=1) for name in ("validation", "eval")}
    puzzles["eval_sampler"] = Unmask(max_new_tokens=7, diffusion_steps=3, temperature=1.0, suppress=(0, 2))
    recipe = tiny_recipe(tmp_path, num_steps=1, train_batch_size=1, **puzzles)
    policy = train(recipe).policy
    text = recipe.eval_task[0].prompt
    assert policy.eval_sampler == recipe.eval_sampler
    asked = policy.complete(text, sampler=recipe.eval_sampler)
    assert policy.complete(text) == asked != policy.complete(text, sampler=Unmask(max_new_tokens=16, temperature=0.0))
    (checkpoint,) = (tmp_path / "checkpoints").glob("step-000001")
    capsys.readouterr()
    for model in (tmp_path, str(checkpoint)):
        assert complete(model, text) == load_policy(model).complete(text) == asked
        assert load_policy(model, into=recipe.model(seed=5)).complete(text) == asked
        assert main(["sample", str(model), text]) == 0 and capsys.readouterr().out == asked + "\n"
    several = complete(tmp_path, [text, text], temperature=1, num_generations=2, seed=4)
    assert len(several) == 4 and complete(tmp_path, text, temperature=1, num_generations=2, seed=4) == several[:2]


def test_a_sampler_that_only_a_script_can_make_is_named_and_the_default_taken():
    policy = tiny_masked_lm(**DIGITS)
    plain = policy.complete("1=")
    policy.eval_sampler = {"class_path": "Mine", "init_args": {}}
    with pytest.warns(UserWarning, match=r"eval_sampler=.*Mine.* is not part of the library, so the default is used"):
        assert policy.complete("1=") == plain


def test_a_given_policy_gets_the_weights_and_keeps_its_block_size(tmp_path):
    policy = tiny_masked_lm(**DIGITS)
    policy.save_pretrained(tmp_path)
    (tmp_path / "state.json").write_text("another program's")
    other = tiny_masked_lm(**DIGITS, seed=3)
    assert load_policy(tmp_path, into=other, dtype="bfloat16") is other
    assert {weight.dtype for weight in other.module.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="into is a policy that exists: leave out block_size and quantization"):
        load_policy(tmp_path, into=other, block_size=4)


test_what_is_no_prompt_or_no_setting_is_refused = refused(
    ([], {}, "no prompts: give at least one"),
    (["1", 2], {}, "prompts has 2, which is neither a text nor a chat"),
    ([[]], {}, "neither a text nor a chat"),
    ("1", {"max_tokens": 3}, "max_tokens=3 is not a setting of Unmask"),
    by=lambda prompts, options: tiny_masked_lm(**DIGITS).complete(prompts, **options),
)
