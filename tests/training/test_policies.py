"""The policies of a run: whose weights each has, and which settings cannot be compiled."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from sft_toys import tiny_sft
from tiny_recipe import SIZES, tiny_recipe

from dllm_rl import load_policy, make_policy, manifest, tiny_masked_lm
from dllm_rl.algorithms.prompt_sources import RewardHistory
from dllm_rl.checkpoints.state import TrainingState
from dllm_rl.groups import Teacher
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.tiny import tiny_llama
from dllm_rl.quantization.schemes import Float8Dynamic
from dllm_rl.samplers.cache import PrefixCache
from dllm_rl.samplers.revise import Remask
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.step.context import StepContext
from dllm_rl.training.fine_tune import fine_tune
from dllm_rl.training.late_rollouts.schedule import InProcessPool
from dllm_rl.training.policies import (
    RolloutCopy,
    build_policy,
    check_low_bit,
    reference_policy,
    resumed_policy,
    save_reference,
    teacher_policy,
)
from dllm_rl.training.trainer import train

CPU = torch.device("cpu")


def weights(policy):
    return torch.cat([p.detach().flatten() for p in policy.module.parameters()])


def test_a_function_that_takes_a_seed_gets_the_runs_and_a_policy_is_copied(tmp_path):
    recipe = tiny_recipe(tmp_path, seed=5)
    assert torch.equal(weights(build_policy(recipe, CPU)), weights(tiny_masked_lm(**SIZES, seed=5)))
    assert not torch.equal(weights(build_policy(recipe, CPU)), weights(tiny_masked_lm(**SIZES, seed=6)))
    given = tiny_masked_lm(**SIZES)
    made = build_policy(replace(recipe, model=given), CPU)
    with torch.no_grad():
        next(made.module.parameters()).add_(1.0)
    assert torch.equal(weights(given), weights(tiny_masked_lm(**SIZES)))


@pytest.mark.parametrize("fresh", [True, False])
def test_the_reference_keeps_the_weights_that_rl_started_from(tmp_path, fresh):
    """Of a fresh run a copy; on a resume what the run's folder has, whatever the learner is now."""
    recipe = tiny_recipe(tmp_path, beta=0.1)
    accelerator = Accelerator(cpu=True)
    policy = build_policy(recipe, CPU)
    start = weights(policy)
    assert save_reference(tmp_path, policy, accelerator) == manifest.read(tmp_path / "reference")["sha256"]
    with torch.no_grad():
        if not fresh:
            next(policy.module.parameters()).add_(1.0)
        reference = reference_policy(recipe, policy, accelerator, fresh=fresh)
        next(policy.module.parameters()).add_(1.0)
    assert torch.equal(weights(reference), start)
    assert not any(p.requires_grad for p in reference.module.parameters())
    assert reference_policy(replace(recipe, beta=0.0), policy, accelerator, fresh=fresh) is None


def test_without_a_scheme_the_learner_rolls_out(tmp_path):
    recipe = tiny_recipe(tmp_path, rollout_quantization=None)
    policy = build_policy(recipe, CPU)
    assert RolloutCopy(recipe=recipe).load(policy) is policy


@pytest.mark.parametrize(("bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_rollouts_copy_is_in_the_dtype_of_the_runs_products(tmp_path, bf16, dtype):
    recipe = tiny_recipe(tmp_path, bf16=bf16)
    copy = RolloutCopy(recipe=recipe).load(build_policy(recipe, CPU))
    assert {p.dtype for p in copy.module.parameters()} == {dtype}


def test_a_resumed_learner_keeps_the_dtype_that_it_was_saved_in(tmp_path):
    """Not the recipe's, which is of a model from a path."""
    recipe = tiny_recipe(tmp_path)
    policy = build_policy(recipe, CPU)
    policy.module.bfloat16()
    accelerator = Accelerator(cpu=True)
    save_reference(tmp_path, policy, accelerator)
    state = TrainingState.first(recipe.settings(), policy)
    resumed = resumed_policy(recipe, tmp_path / "reference", state, accelerator)
    assert recipe.dtype == "float32" and torch.equal(weights(resumed), weights(policy))
    assert {p.dtype for p in resumed.module.parameters()} == {torch.bfloat16}


def test_of_the_model_that_a_recipe_names_every_byte_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "HEAD", 64)
    recipe = tiny_recipe(tmp_path)
    save_reference(tmp_path, build_policy(recipe, CPU), Accelerator(cpu=True))
    file = tmp_path / "reference" / "model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-3] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: its SHA-256 differs"):
        build_policy(replace(recipe, model=str(file.parent)), CPU)


def in_bf16():
    policy = tiny_masked_lm(**SIZES)
    policy.module.bfloat16()
    return policy


NF4 = {"base_quantization": "nf4", "lora": Lora(r=2)}


@pytest.mark.repeated(every=4)
@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    "model", [tiny_masked_lm(**SIZES), partial(tiny_masked_lm, **SIZES)], ids=["policy", "function"]
)
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (NF4, "base_quantization='nf4' quantizes a checkpoint while it is loaded, .*: leave base_quantization out"),
        (NF4 | {"base_quantization": "int8"}, "base_quantization='int8' quantizes"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16' .* are in float32: cast .*torch.bfloat16.*, or leave dtype out"),
        ({"dtype": "float16", "lora": Lora(r=2)}, "dtype='float16' .* are in float32"),
    ],
)
def test_what_acts_while_a_checkpoint_is_loaded_is_refused_of_a_given_model(tmp_path, changes, model, dry_run, said):
    with pytest.raises(ValueError, match=said):
        train(tiny_recipe(tmp_path / "rl", model=model, dry_run=dry_run, **changes))
    with pytest.raises(ValueError, match=said):
        fine_tune(tiny_sft(tmp_path / "sft", model=model, **changes))
    assert not [*tmp_path.glob("*/metrics.jsonl")], "before a file is written"


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_given_base_in_few_bits_is_not_copied_to_the_host(tmp_path, quantization):
    """Its codes without their scales would be sampled from and saved. A teacher's are neither."""
    pytest.importorskip("bitsandbytes")
    tiny_masked_lm(**SIZES).save_pretrained(tmp_path / "base")
    function = partial(load_policy, tmp_path / "base", quantization=quantization)
    refused = {
        "saves.in_background=True cannot be combined with a base in bitsandbytes' 4 or 8 bits, .*; use saves.in_b": {
            "async_save": True
        },
        r"late=Late\(.*\) cannot be combined with a base in .*; use late=None": {"rollout_workers": 1},
        "warmup.steps=2 trains all weights, and a base in .* freezes them": {"sft_warmup_steps": 2},
    }
    for said, changes in refused.items():
        for model in (function, function()):
            with pytest.raises(ValueError, match=said):
                train(tiny_recipe(tmp_path / "run", model=model, lora=Lora(r=2), **changes), InProcessPool())
    assert not (tmp_path / "run" / "metrics.jsonl").exists(), "before a file is written"
    settings = {"model": function, "lora": Lora(r=2), "lr_schedule_steps": 2}
    train(tiny_recipe(tmp_path / "run", num_steps=1, **settings))
    with pytest.raises(ValueError, match=r"saves\.in_background=True cannot be combined with a base"):
        train(tiny_recipe(tmp_path / "run", async_save=True, resume_from_checkpoint="latest", **settings))
    taught = tiny_recipe(tmp_path / "taught", teacher=Teacher(model=function), async_save=True)
    check_low_bit(taught, build_policy(taught, CPU))
    assert teacher_policy(taught, build_policy(taught, CPU), Accelerator(cpu=True)) is not None


def resized(kind=tiny_masked_lm, **settings):
    policy = kind(**SIZES, **settings)
    with torch.random.fork_rng(devices=[]):
        policy.module.resize_token_embeddings(policy.vocab_size + 2, mean_resizing=False)
    return policy


def test_a_policy_that_was_made_before_its_vocabulary_was_resized_is_refused(tmp_path):
    said = (
        r"model has \d+ tokens since its embeddings were resized, and its policy \d+: give make_policy\(policy.module"
    )
    for model in (resized(), resized, partial(resized, tiny_llama, causal=False)):
        with pytest.raises(ValueError, match=said):
            build_policy(tiny_recipe(tmp_path, model=model), CPU)
    policy = resized()
    made = make_policy(policy.module, policy.tokenizer)
    assert build_policy(tiny_recipe(tmp_path, model=made), CPU).vocab_size == policy.vocab_size + 2


def test_the_dtype_that_a_given_model_has_or_that_is_its_teachers_is_taken(tmp_path):
    for dtype in ("float32", "auto", "bfloat16"):  # float32 is the default
        policy = build_policy(tiny_recipe(tmp_path, model=in_bf16, dtype=dtype), CPU)
        assert {p.dtype for p in policy.module.parameters()} == {torch.bfloat16}
    folder = tmp_path / "teacher"
    tiny_masked_lm(**SIZES).save_pretrained(folder)
    recipe = tiny_recipe(tmp_path, teacher=Teacher(model=str(folder)), dtype="bfloat16")
    policy = build_policy(recipe, CPU)
    teacher = teacher_policy(recipe, policy, Accelerator(cpu=True))
    assert {p.dtype for p in policy.module.parameters()} == {torch.float32}
    assert teacher is not None and {p.dtype for p in teacher.module.parameters()} == {torch.bfloat16}
    given = tiny_recipe(tmp_path, model=str(folder), teacher=Teacher(model=tiny_masked_lm(**SIZES)), dtype="bfloat16")
    teacher = teacher_policy(given, build_policy(given, CPU), Accelerator(cpu=True))
    assert teacher is not None and {p.dtype for p in teacher.module.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"zero_mismatch": True, "rollout_quantization": None}, "forbids: leave one of them out"),
        ({"sampler": Unmask(max_new_tokens=4, compile_step=True)}, "full steps: leave one of them out"),
    ],
)
def test_what_cannot_be_compiled_is_refused(tmp_path, changes, said):
    given = {"rollout_quantization": Float8Dynamic(), **changes}
    with pytest.raises(ValueError, match=f"torch_compile=True .*{said}, or set torch_compile=False$"):
        tiny_recipe(tmp_path, torch_compile=True, **given)
    tiny_recipe(tmp_path, torch_compile=False, **given)


@pytest.mark.parametrize(
    ("given", "changes", "said"),
    [
        ({}, {"zero_mismatch": True, "rollout_quantization": None}, "forbids: leave one of them out"),
        ({"cache": PrefixCache()}, {}, "use DualCache()"),
        ({"commit": Remask(eta=0.1)}, {}, "commit=Remask, which rewrites"),
    ],
)
def test_steps_that_cannot_be_compiled_are_refused(tmp_path, given, changes, said):
    with pytest.raises(ValueError, match=rf"compile_step=True .*{re.escape(said)}.*, or set compile_step=False$"):
        tiny_recipe(tmp_path, sampler=Unmask(max_new_tokens=4, compile_step=True, **given), **changes)


def test_the_learner_of_a_run_drops_nothing_whatever_mode_a_user_or_a_callback_sets(tmp_path):
    policy = tiny_masked_lm(**SIZES, hidden_dropout_prob=0.3)
    policy.module.train()
    recipe = tiny_recipe(tmp_path, model=policy)
    learner = build_policy(recipe, CPU)
    assert policy.module.training and not learner.module.training
    context = StepContext(
        settings=recipe, accelerator=Accelerator(cpu=True), policy=learner, rollout_policy=learner,
        history=RewardHistory(1),
    )  # fmt: skip
    learner.module.train()
    tokens = torch.tensor([[3, 4, 5]])
    with context.arithmetic(learner=True):
        one, other = (learner.logits(tokens, tokens > 0) for _ in range(2))
    assert one.requires_grad and torch.equal(one, other)
