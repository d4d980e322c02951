"""A run whose model is nobody's but its author's: trained, stopped, resumed, with adapters and a KL term."""

from dataclasses import replace

import pytest
import torch
from emulated import int8_emulated
from own_module import own_policy, pretrained_policy, shifted_llama
from run_outputs import metrics_of, weights_of
from sft_toys import tiny_sft
from tiny_recipe import tiny_recipe

from dllm_rl import NoCorrection, tiny_masked_lm
from dllm_rl.models.load import load_weights
from dllm_rl.models.lora_settings import Lora
from dllm_rl.training.fine_tune import fine_tune
from dllm_rl.training.trainer import train

pytestmark = pytest.mark.usefixtures("no_rehearsal")


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def recipe_of(directory, **changes):
    return tiny_recipe(
        directory,
        **{"model": own_policy, "num_steps": 4, "save_steps": 2, "rollout_quantization": int8_emulated} | changes,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"beta": 0.1},
        {"lora": Lora(r=2), "sft_warmup_steps": 2, "beta": 0.1},
        {"beta": 0.1, "model": pretrained_policy},
        {"lora": Lora(r=2), "model": pretrained_policy},
        {"lora": Lora(r=2), "sft_warmup_steps": 2, "beta": 0.1, "model": pretrained_policy},
        {"beta": 0.1, "model": shifted_llama},
        {"beta": 0.1, "model": shifted_llama()},
        {"lora": Lora(r=2), "sft_warmup_steps": 2, "beta": 0.1, "model": shifted_llama},
    ],
    ids=[
        "all weights",
        "adapters after a warm-up",
        "all weights of a class with a config",
        "adapters on it",
        "adapters on it after a warm-up",
        "all weights of a transformers class with another spec than its family's",
        "a policy of it",
        "adapters on it after a warm-up, with another spec",
    ],
)
@pytest.mark.slow
def test_a_resumed_run_is_the_same(tmp_path, changes):
    whole = train(recipe_of(tmp_path / "whole", **changes))
    train(recipe_of(tmp_path / "parts", **changes, num_steps=2, lr_schedule_steps=4))
    parts = train(recipe_of(tmp_path / "parts", **changes, lr_schedule_steps=4, resume_from_checkpoint="latest"))
    assert same(weights_of(whole), weights_of(parts))
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "parts")
    assert whole["eval_after"] == parts["eval_after"]


def test_the_weights_that_it_leaves_are_the_modules_own_and_a_policy_that_is_given_stays_as_it_is(tmp_path):
    """The same weights as a function's: the same run; and a second run starts where the first one did."""
    policy, changes = own_policy(seed=5), {"seed": 5, "num_steps": 1}
    before = {name: tensor.clone() for name, tensor in policy.module.state_dict().items()}
    made = train(recipe_of(tmp_path / "function", **changes))
    first, second = (train(recipe_of(tmp_path / name, model=policy, **changes)) for name in ("first", "second"))
    assert same(before, policy.module.state_dict())
    assert same(weights_of(first), weights_of(second)) and same(weights_of(first), weights_of(made))
    load_weights(policy, made["checkpoint"])
    after = policy.module.state_dict()
    assert same(weights_of(made), after) and not same(before, after)


@pytest.mark.slow
def test_a_policy_that_is_given_can_be_resumed(tmp_path):
    policy = tiny_masked_lm(characters="1234.=", hidden_size=16, num_layers=1, intermediate_size=16)
    recipe = recipe_of(tmp_path / "parts", model=policy, corrector=NoCorrection())
    train(replace(recipe, num_steps=2, lr_schedule_steps=4))
    parts = train(replace(recipe, lr_schedule_steps=4, resume_from_checkpoint="latest"))
    whole = train(replace(recipe, output_dir=str(tmp_path / "whole")))
    assert same(weights_of(whole), weights_of(parts))


@pytest.mark.parametrize(
    "model",
    [own_policy, pretrained_policy, shifted_llama, shifted_llama()],
    ids=["plain", "with a config", "with another spec", "policy with another spec"],
)
@pytest.mark.repeated(first_only=True)
def test_sft_of_it_resumes_and_tells_how_rl_starts_from_its_weights(tmp_path, capsys, model):
    whole = fine_tune(tiny_sft(tmp_path / "whole", model=model, num_steps=2))
    fine_tune(tiny_sft(tmp_path / "parts", model=model, num_steps=1, lr_schedule_steps=2))
    recipe = tiny_sft(tmp_path / "parts", model=model, num_steps=2, lr_schedule_steps=2)
    parts = fine_tune(replace(recipe, resume_from_checkpoint="latest"))
    assert same(weights_of(whole), weights_of(parts))
    said = "".join(capsys.readouterr().out.split())
    assert f"RLfromit:load_policy('{''.join(parts['checkpoint'].split())}',into=policy)inthefunction" in said


def without_weights(seed=0, dry_run=False):
    """A module of one's own, of shapes alone where only the plan is asked for."""
    with torch.device("meta" if dry_run else "cpu"):
        return own_policy(seed=seed)


def test_a_dry_run_takes_a_module_of_shapes_alone_and_plans_the_same(tmp_path, capsys):
    told = []
    for model in (without_weights, own_policy):
        train(replace(recipe_of(tmp_path / model.__name__), model=model, dry_run=True, gradient_checkpointing=True))
        told.append(capsys.readouterr().out.partition("\n")[2])
    assert told[0] == told[1] and "peak" in told[0]
