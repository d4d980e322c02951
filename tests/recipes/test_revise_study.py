"""The recipe and the study of a sampler that revises, cut short: equal forwards, edits and their record, its claims."""

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch

from dllm_rl.config import from_command_line
from dllm_rl.decoding.tokens import encode
from dllm_rl.monitoring.json_lines import current_rows
from dllm_rl.training.trainer import train
from recipes import sudoku_revise
from recipes.studies import revise

SHORT = "--sft_warmup_steps 2 --num_steps 2 --train_batch_size 2 --num_generations 4"
FEW = "--eval_task.size 8 --validation_task.size 8"


@pytest.mark.nightly
def test_the_recipe_runs_and_measures_the_mismatch_of_every_writing(tmp_path):
    short = from_command_line(sudoku_revise.recipe, [*SHORT.split(), *FEW.split(), "--output_dir", str(tmp_path)])
    summary = train(replace(short, model=partial(short.model, num_layers=1)))
    rows = current_rows(tmp_path / "metrics.jsonl")
    assert summary["warmup_steps"] == 2 and [row["step"] for row in rows] == [0, 1]
    assert all(0 < row["rollout_corr/abs_log_ratio_mean"] < 0.1 and row["rollout_corr/ess"] > 0.9 for row in rows)


@pytest.mark.parametrize("name", revise.ARMS)
def test_an_arm_takes_the_forwards_of_its_name_and_edits_if_it_says_so(name):
    made = replace(revise.base, **revise.ARMS[name])
    policy = made.model(num_layers=1)
    problems = [made.task[i] for i in range(2)]
    trained, evaluated = (
        sampler(policy, encode(policy, problems, num_generations=4, seeds=range(8)), torch.Generator().manual_seed(0))
        for sampler in (made.sampler, made.eval_sampler)
    )
    forwards = int(name.split(", ")[-1])
    assert trained.forwards == evaluated.forwards == made.max_retained_graphs == forwards
    revised = tuple(rollout.events is not None for rollout in (trained, evaluated))
    assert revised == ("edits" in name and "plain" not in name, "edits" in name)
    noise = made.likelihood.draw_views(trained, torch.Generator().manual_seed(0))
    assert len(noise.masked) == forwards
    assert (made.likelihood.name == "ELBO") == ("elbo" in name)


def test_every_claim_is_of_two_arms_with_as_many_forwards():
    assert Counter(claim.arm for claim in revise.study.contrasts) == {"edits, 2": 2, "edits, 4": 2, "edits, 8": 3}
    for claim in revise.study.contrasts:
        assert {claim.arm, claim.against} <= set(revise.ARMS)
        assert claim.arm.split(", ")[-1] == claim.against.split(", ")[-1]
    assert set(revise.study.against.values()) <= set(revise.ARMS) and revise.RATE in revise.RATES
