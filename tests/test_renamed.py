"""Names of earlier versions: refused with the name of today, and read where a run has stored them."""

import re
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_recipe import tiny_recipe

import dllm_rl
from dllm_rl.algorithms import correctors as c
from dllm_rl.algorithms import losses
from dllm_rl.checkpoints.resume import check_recipe
from dllm_rl.checkpoints.state import TrainingState
from dllm_rl.config import from_command_line
from dllm_rl.likelihoods.estimators import block_elbo, elbo, sandwich, trajectory
from dllm_rl.members import describe, same_setting
from dllm_rl.recipe import Recipe
from dllm_rl.renamed import RENAMED, renamed_settings, renamed_text
from dllm_rl.samplers.revise import commit_inputs
from dllm_rl.samplers.rules import margin, plackett_luce
from dllm_rl.training.grpo import grpo_recipe
from dllm_rl.training.late_rollouts.serialization import record_from_json
from dllm_rl.types import FilterSupport, Order, Rollout, SamplingParams


def test_the_table_names_what_there_is():
    settings = {f.name for f in fields(Recipe)}
    assert not settings & RENAMED.keys()
    changes = Path(dllm_rl.__file__).parents[1].joinpath("CHANGELOG.md").read_text()
    internal = re.compile(r"(adaptive|band|masked|truncated)_weights\.|rejection\.|trajectory_views\.")
    missing = [old for old, new in RENAMED.items() if f"`{old}` → `{new}`" not in changes and not internal.match(old)]
    assert missing == []
    for name in ("alarm", "block", "constant", "finite", "none", "sequence", "token", "aggregate", "warmup_target"):
        assert RENAMED[name] in {*settings, *dir(dllm_rl), *dir(c)}
        with pytest.raises(AttributeError, match=f"{name} is now {RENAMED[name]}"):
            getattr(dllm_rl, name)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--aggregate", "token"], "--aggregate: aggregate is now loss_reduction"),
        (["--warmup_steps", "3"], "warmup_steps is now sft_warmup_steps"),
        (["--loss_reduction", "token"], "token is now token_mean"),
        (["--likelihood", "block", "--likelihood.block_size", "4"], "block is now block_elbo"),
        (["--likelihood.order", "given"], "--likelihood.order: order is now include_order"),
        (["--corrector", "tis", "--corrector.aggregate", "geometric"], "--corrector.aggregate: aggregate is now pool"),
        (["--sampling_support", "own"], "sampling_support=own is now sampling_support=per_policy"),
    ],
)
def test_an_option_of_an_earlier_version_is_refused_with_its_name_of_today(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        from_command_line(tiny_recipe("x"), words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and error.count("\n") == 1


def test_keywords_and_inputs_of_an_earlier_version_are_refused():
    def surrogate(log_ratio, advantages, mask, old):
        return old

    def rule(scores, masked, steps_left, written):
        return written

    grpo = partial(grpo_recipe, None, [], [])
    for call, said in (
        (lambda: tiny_recipe("x", aggregate=losses.token_mean), "aggregate is now loss_reduction"),
        (lambda: grpo(fresh_masks=False), "fresh_masks is now resample_masks"),
        (lambda: grpo(warmup_steps=3), "warmup_steps is now sft_warmup_steps.*lr_scheduler_type"),
        (lambda: c.tis(aggregate="product"), "aggregate is now pool"),
        (lambda: losses.surrogate_inputs(surrogate), "old is now old_logprobs"),
        (lambda: commit_inputs(rule), "written is now remaskable"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


# What a run of an earlier version stored in state.json, where it differs from today's words.
STORED = {
    "likelihood": "trajectory(num_segments=None, block_size=None, order='law', num_sampled=None, "
    "self_conditioning='detached')",
    "corrector": "ais(cap=2.0, tau=0.05, combine=alarm, aggregate='product', level='token')",
    **{"sampling_support": "own", "aggregate": "token", "kept_graphs": 1, "mismatch_sample": 2, "fresh_masks": True},
    **{"teacher_steps": 1, "warmup_steps": 0, "warmup_batch_size": 64, "warmup_learning_rate": 0.002},
    **{"warmup_corruption": 0.0, "warmup_target": 0.2, "warmup_metric": "solve_rate", "warmup_eval_steps": 5},
}
COMPOSED = c.compose(c.mis(min_ratio=0.4, max_ratio=3.0, pool="geometric", level="sequence"), c.reject(threshold=0.1))


@pytest.mark.parametrize(
    ("changes", "stored"),
    [
        ({}, {}),
        (
            {
                "corrector": COMPOSED,
                "loss_reduction": losses.sequence_mean,
                "likelihood": trajectory(include_order=False),
            },
            {
                "corrector": "compose(mis(low=0.4, high=3.0, level='sequence', aggregate='geometric', outside='zero'), "
                "reject(level='sequence', statistic='k3', bound=0.1, aggregate='mean'))",
                "likelihood": STORED["likelihood"].replace("'law'", "'given'"),
                "aggregate": "sequence",
            },
        ),
        (
            {
                "likelihood": sandwich(base=block_elbo(block_size=4)),
                "loss_reduction": partial(losses.fixed_length_mean, length=12),
                "corrector": replace(c.tbpo(max_weight=3.0), loss=None),
            },
            {
                "likelihood": "sandwich(beta=1.5, mix=0.5, base=block(block_size=4, num_samples=2))",
                "aggregate": "constant(length=12)",
                "corrector": "Corrector(weight_fn=band_weights(c=3.0), surrogate=None, align_forward=False, "
                "aggregate=sequence, needs_entropy=False)",
            },
        ),
    ],
    ids=["plain", "composed", "constant"],
)
def test_a_run_of_an_earlier_version_resumes(changes, stored):
    recipe = tiny_recipe("x", **changes)
    known = {new: old for old, new in RENAMED.items()}
    before = {known.get(name, name): value for name, value in recipe.settings().items()} | STORED | stored
    assert before.keys() > STORED.keys()
    text = before["sampler"].replace("on_step=", "watch=")
    before |= {"sampler": text, "eval_sampler": before["eval_sampler"].replace("on_step=", "watch=")}
    for field in ("sampler", "eval_sampler"):  # as before these keywords existed
        before[field] = (
            before[field].replace(", confidence_radius=None", "").replace("approximate_early_exit=False, ", "")
        )
    assert "watch=" in text and "confidence_radius" not in before["sampler"]
    state = TrainingState(step=1, version=1, dtype="float32", recipe=renamed_settings(before))
    check_recipe(recipe, state)
    with pytest.raises(ValueError, match="loss_reduction"):
        check_recipe(replace(recipe, loss_reduction=partial(losses.fixed_length_mean, length=7)), state)


@pytest.mark.parametrize(
    ("before", "same"),
    [
        ("sandwich(beta=1.5, mix=0.5, base=elbo(num_samples=8, stratified=True, antithetic=False))", True),
        ("sandwich(base=elbo(num_samples=8))", True),
        ("sandwich(base=elbo(stratified=True))", False),  # its number of samples was a default, and 8 is none
        ("sandwich(beta=1.5, mix=0.5, base=elbo(num_samples=7, stratified=True, antithetic=False))", False),
        ("sandwich(base=elbo(num_samples=8, informed_masking=1.5))", False),
        ("sandwich(base=elbo(num_samples=8, gone=1))", False),
        ("eubo(base=elbo(num_samples=8))", False),
        ("sandwich", False),
    ],
)
def test_a_keyword_that_a_stored_text_does_not_name_had_its_default(before, same):
    assert same_setting(before, describe(sandwich(base=elbo(num_samples=8)))) == same
    assert not same_setting(before, describe(sandwich(base=elbo(num_samples=8, informed_masking=0.7))))


def test_a_stored_text_is_renamed_only_where_a_name_stands():
    rank = dllm_rl.describe(partial(plackett_luce, temperature=1.0, base_rank=margin))
    assert renamed_text(rank.replace("base_rank", "score")) == rank
    for text in (
        "mine:token(low=1)",
        "Sudoku(path='token', low=2, split='aggregate=none()')",
        "tis(cap=2.0",
        ")((",
        "",
    ):
        assert renamed_text(text) == text


def test_a_stored_rollout_of_an_earlier_version_is_read():
    tensors = {"x": torch.zeros(1, 2, dtype=torch.long), "y": torch.zeros(1, 2)}
    x, y = {"tensor": "x"}, {"tensor": "y"}
    columns = {"tokens": x, "attention_mask": x, "completion_mask": x, "unmask_step": x, "logprobs": y, "group_size": 1}
    kept = {"record": "Kept", "fields": {"log_mass": y, "ids": None}}
    order = {"record": "Order", "fields": {"open_step": x, "rank": "confidence", "soft": None, "draw": None}}
    params = {"record": "SamplingParams", "fields": {"temperature": 1.0, "support": "own"}}
    stored = {"record": "Rollout", "fields": {**columns, "kept": kept, "order": order, "sampling_params": params}}
    rollout = record_from_json(stored, tensors, None)
    assert isinstance(rollout, Rollout) and isinstance(rollout.filter_support, FilterSupport)
    assert rollout.order == Order(tensors["x"], rank_name="confidence")
    assert rollout.sampling_params == SamplingParams(1.0)
