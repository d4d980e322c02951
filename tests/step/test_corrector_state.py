"""A corrector keeps a state from step to step, and a resume continues with it."""

import json
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from emulated import int3_emulated
from readme import example
from run_outputs import metrics_of
from tiny_recipe import ONE_PUZZLE, tiny_recipe

from dllm_rl import TIS, Compose, Corrector, OneStep, RandomOrder, train
from dllm_rl.algorithms.correctors import FunctionCorrector
from dllm_rl.checkpoints.checkpoint import list_checkpoints
from dllm_rl.distributed.collectives import make_accelerator
from dllm_rl.step.collect import collect
from dllm_rl.step.update import train_step
from dllm_rl.testing import check_corrector, make_stats
from dllm_rl.training.make_step import make_step
from dllm_rl.training.parts.corrector_state import CorrectorState

pytestmark = pytest.mark.usefixtures("no_rehearsal")


@pytest.fixture(scope="module")
def usual():
    """The corrector of the page."""
    made = {"__name__": "page"}
    exec(example("A corrector with a state"), made)
    return made["Usual"]


class Counting(Corrector):
    """Counts its calls."""

    key: str = "calls"

    def weights(self, stats):
        stats.state[self.key] = stats.state.get(self.key, 0) + 1
        result = super().weights(stats)
        return result._replace(metrics=result.metrics | {f"counting/{self.key}": float(stats.state[self.key])})


class Other(Counting):
    """Of another name."""


def recipe_of(directory, corrector, **changes):
    sampler = tiny_recipe(directory).sampler.replace(rank=RandomOrder())
    settings = {"rollout_quantization": int3_emulated, "sampler": sampler, "lr_schedule_steps": 4, "num_steps": 4}
    return tiny_recipe(directory, corrector=corrector, **settings | ONE_PUZZLE | changes)


def state_of(directory, step):
    return json.loads((dict(list_checkpoints(directory / "checkpoints"))[step] / "CorrectorState.state").read_bytes())


def test_the_pages_corrector_keeps_the_contract_and_measures_by_the_steps_before(usual):
    check_corrector(usual())
    stats = make_stats(torch.tensor([[1.0, -3.0]]), torch.ones(1), torch.ones(1, 2, dtype=torch.bool))
    weights, _, metrics = usual(decay=0.5).weights(stats)
    assert metrics["usual/mismatch"] == 2 and torch.equal(weights, torch.tensor([[-0.5, -1.5]]).exp())
    stats.log_mismatch.fill_(4)
    assert usual(decay=0.5).weights(stats)[2]["usual/mismatch"] == 2 and stats.state == {"usual": 3}


@pytest.mark.slow
@pytest.mark.parametrize("async_save", [False, True])
def test_a_resume_continues_bit_for_bit(tmp_path, usual, async_save):
    whole, parts = (
        recipe_of(tmp_path / name, usual(), async_save=async_save, save_steps=1, save_total_limit=9)
        for name in ("whole", "parts")
    )
    train(whole)
    train(replace(parts, num_steps=2))
    train(replace(parts, resume_from_checkpoint="latest", allow_changed="num_steps"))
    mine, other = (metrics_of(tmp_path / name) for name in ("whole", "parts"))
    for name in ("loss", "grad_norm", "usual/mismatch", "trained/abs_log_ratio_max"):
        assert [row[name] for row in mine] == [row[name] for row in other]
    assert len({row["usual/mismatch"] for row in mine}) == 3, "the first two are the same"
    for step in range(1, 5):
        assert state_of(tmp_path / "whole", step) == state_of(tmp_path / "parts", step)


def steps_of(recipe, optimizer_of=torch.optim.SGD, **context_fields):
    """Endless steps of a recipe's model, whose rollouts are its own: the metrics of each."""
    policy = recipe.model(seed=0)
    context = make_step(recipe, accelerator=make_accelerator(), policy=policy, rollout_policy=policy)
    context = replace(context, **context_fields)
    optimizer = optimizer_of(policy.module.parameters())
    for step in count():
        samples, _, _ = collect(context, step)
        try:
            yield train_step(context, samples, step, optimizer).metrics
        except ArithmeticError as error:
            yield {"error": str(error)}


def test_an_update_that_fails_keeps_nothing(tmp_path):
    class Failing(torch.optim.SGD):
        calls = 0

        def step(self):
            Failing.calls += 1
            if Failing.calls == 2:
                raise ArithmeticError("mine")

    steps = steps_of(tiny_recipe(tmp_path, corrector=Counting(), train_batch_size=1), Failing)
    assert next(steps)["counting/calls"] == 1
    assert next(steps) == {"error": "mine"}
    assert [next(steps)["counting/calls"] for _ in range(2)] == [2, 3]


def test_each_set_of_masks_continues_with_the_state_of_the_one_before(tmp_path):
    """Metrics are those of the first set."""
    recipe = tiny_recipe(tmp_path, corrector=Counting(), likelihood=OneStep(), num_iterations=2, train_batch_size=1)
    steps = steps_of(recipe)
    assert [next(steps)["counting/calls"] for _ in range(3)] == [1, 3, 5]


def test_parts_of_a_composition_have_states_of_their_own(tmp_path):
    parts = (Counting(), Counting(key="more"), TIS(), Counting())
    steps = steps_of(tiny_recipe(tmp_path, corrector=Compose(parts=parts), train_batch_size=1))
    next(steps)
    metrics = next(steps)
    assert {name: value for name, value in metrics.items() if name.startswith("counting/")} == {
        "counting/calls": 2,
        "counting/more": 2,
    }


@pytest.mark.parametrize(
    "value", [torch.ones(2), float("nan"), (1, 2), {1: 2}, b"1", {"a": [torch.ones(1)]}], ids=lambda x: type(x).__name__
)
def test_what_a_checkpoint_would_not_keep_is_refused(tmp_path, value):
    def keeps(stats):
        stats.state["value"] = value
        return Corrector().weights(stats)

    steps = steps_of(tiny_recipe(tmp_path, corrector=FunctionCorrector(function=keeps), train_batch_size=1))
    with pytest.raises(ValueError, match=r"wrote .* into stats.state, which a checkpoint does not keep: write finite"):
        next(steps)


def test_a_loop_that_saves_no_features_refuses_a_state(tmp_path):
    steps = steps_of(tiny_recipe(tmp_path, corrector=Counting(), train_batch_size=1), corrector_state=None)
    with pytest.raises(ValueError, match="corrector=Counting keeps a state"):
        next(steps)
    assert next(steps_of(tiny_recipe(tmp_path, corrector=TIS(), train_batch_size=1), corrector_state=None))


def test_a_resume_with_another_corrector_begins_with_an_empty_state(tmp_path):

    def context(corrector, **kept):
        return SimpleNamespace(settings=SimpleNamespace(corrector=corrector), corrector_state=kept)

    stored = CorrectorState().state(context(Counting(), calls=7))
    for corrector, expected in ((Counting(), {"calls": 7}), (Counting(key="other"), {"calls": 7}), (Other(), {})):
        again = context(corrector)
        CorrectorState().load_state(again, stored)
        assert again.corrector_state == expected
    assert CorrectorState().state(context(TIS())) is None, "a corrector without a state has no file"
