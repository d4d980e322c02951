"""The number of an adaptive rule for a budget of forwards, against every number tried in turn."""

from functools import partial

import pytest

from dllm_rl.evaluation import budget as budget_module
from dllm_rl.evaluation.budget import PARAMETER_FROM_SLACK, within_budget
from dllm_rl.evaluation.evaluate import evaluate
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.samplers.by_name import read_commit, read_rank, required_rank
from dllm_rl.samplers.unmask import unmask
from dllm_rl.tasks import Sudoku

TASK = Sudoku(split="test", size=8)
PROBLEMS = {i: TASK[i] for i in range(8)}


@pytest.fixture(scope="module")
def policy():
    size = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return tiny_masked_lm(characters="1234.=", **size, head_std=1.0)


def sampler_of(name, **options):
    return partial(unmask, max_new_tokens=16, rank=read_rank(required_rank(name) or "max_prob"), **options)


def forwards(policy, commit):
    sampler = partial(sampler_of(commit.partition("=")[0]), commit=read_commit(commit))
    return evaluate(policy, TASK, sampler).summary["forwards_per_answer"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETER_FROM_SLACK)
def test_no_number_tried_comes_closer_to_the_budget_from_below(policy, name):
    tried = [forwards(policy, f"{name}={PARAMETER_FROM_SLACK[name](10 ** (fifth / 5 - 4)):.9g}") for fifth in range(30)]
    for budget in (1, 3, 6):
        found = within_budget(policy, PROBLEMS, sampler_of(name), name, budget, seed=0)
        assert max(each for each in tried if each <= budget) <= forwards(policy, found) <= budget


def test_a_rule_of_steps_is_its_own_budget(policy):
    for name in ("schedule", "origin", "remask=0.5"):
        assert within_budget(policy, PROBLEMS, sampler_of(name), name, 3, seed=0) == name


@pytest.mark.parametrize(
    ("commit", "options", "message"),
    [
        ("threshold=0.9", {}, "commit='threshold=0.9' decides its own forwards; write threshold, whose number"),
        ("edit=0.9", {}, "commit='edit=0.9' decides its own forwards; use threshold, factor, entropy_bound"),
        ("edit", {}, "use threshold, factor, entropy_bound"),
        ("threshold", {"block_size": 4}, "--forwards 3: commit=threshold takes 4 at least; use larger blocks"),
    ],
)
def test_what_has_no_budget_is_refused(policy, commit, options, message):
    with pytest.raises(ValueError, match=message):
        within_budget(policy, PROBLEMS, sampler_of(commit, **options), commit, 3, seed=0)


def test_a_rule_that_takes_exactly_the_budget_is_within_it(policy, monkeypatch):
    """With stated costs: 6 forwards above a threshold of 0.8, 3 above 0.5, else 1."""

    def costs(_policy, problems, sampler, *_):
        tau = sampler.keywords["commit"].keywords["tau"]
        return {
            (problem, 0): {"evaluation": {"steps": 6 if tau > 0.8 else 3 if tau > 0.5 else 1}} for problem in problems
        }

    monkeypatch.setattr(budget_module, "complete", costs)
    found = within_budget(policy, PROBLEMS, sampler_of("threshold"), "threshold", 3, seed=0)
    assert 0.5 < read_commit(found).keywords["tau"] <= 0.8
