"""A checkpoint that version 0.1.0 wrote still loads, and a run resumes from it."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from runs import metrics_of
from tiny_recipe import SIZES, tiny_recipe

from dllm_rl import load_policy, tiny_masked_lm, train
from dllm_rl.algorithms.correctors import ais, icepop, reject, tis
from dllm_rl.config import describe
from dllm_rl.likelihoods.estimators import trajectory
from dllm_rl.training.checkpoint import read_state

OLD = Path(__file__).parents[1] / "golden" / "checkpoint-0.1.0"
SMALL = SIZES | {"hidden_size": 8, "num_layers": 1, "intermediate_size": 8}


def test_it_loads():
    assert load_policy(OLD).tokenizer.encode("12") == [3, 4]


def test_a_run_resumes_from_it(tmp_path):
    """The next step's numbers are those that version 0.1.0 went on to write, to the rounding of another CPU."""
    folder = tmp_path / "checkpoints" / "step-000001"
    shutil.copytree(OLD, folder, ignore=shutil.ignore_patterns("next_step.json"))
    settings = {"model": partial(tiny_masked_lm, **SMALL), "likelihood": trajectory(order="given")}
    train(tiny_recipe(tmp_path, **settings, num_steps=2, learning_rate=5e-3, resume_from_checkpoint="latest"))
    (row,) = metrics_of(tmp_path)
    expected = json.loads((OLD / "next_step.json").read_text())
    names = ("step", "reward", "grad_norm", "learning_rate", "rollout_corr/k3_kl", "ais/lambda")
    assert {name: row[name] for name in names} == pytest.approx({name: expected[name] for name in names}, rel=1e-3)


def test_another_recipe_is_still_refused(tmp_path):
    shutil.copytree(OLD, tmp_path / "checkpoints" / "step-000001")
    settings = {"model": partial(tiny_masked_lm, **SMALL), "likelihood": trajectory(order="given")}
    changed = tiny_recipe(tmp_path, **settings, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match=r"learning_rate=0\.0005 differs from the checkpoint's 0\.005"):
        train(changed)


@pytest.mark.parametrize(
    ("made", "then"),
    [
        (tis(), {"truncated_weights(": "truncated("}),
        (icepop(), {"masked_weights(": "masked("}),
        (ais(), {"adaptive_weights(": "adaptive(", ", level='token')": ")"}),
        (ais(level="sequence"), {"adaptive_weights(": "adaptive_weights("}),
        (reject(), {"rejection(": "rejected("}),
        (trajectory(), {"exact_for_sampler=": "replays=", "with_advantages=": "given="}),
    ],
)
def test_functions_and_fields_of_then_are_read_under_the_names_of_today(tmp_path, made, then):
    written = today = describe(made)
    for name, old in then.items():
        assert name in written
        written = written.replace(name, old)
    (tmp_path / "state.json").write_text(json.dumps({"recipe": {"a": written, "b": 1}}))
    assert read_state(tmp_path)["recipe"] == {"a": today, "b": 1}


def test_a_field_that_the_checkpoint_does_not_know_counts_as_its_default(tmp_path):
    folder = tmp_path / "checkpoints" / "step-000001"
    shutil.copytree(OLD, folder)
    state = json.loads((folder / "state.json").read_text())
    del state["recipe"]["entropy_coeff"]
    (folder / "state.json").write_text(json.dumps(state))
    settings = {"model": partial(tiny_masked_lm, **SMALL), "likelihood": trajectory(order="given")}
    recipe = partial(tiny_recipe, **settings, num_steps=2, learning_rate=5e-3)
    with pytest.raises(ValueError, match=r"entropy_coeff=0\.1 differs from the checkpoint's 0\.0"):
        train(recipe(tmp_path, entropy_coeff=0.1, resume_from_checkpoint="latest"))
    train(recipe(tmp_path, resume_from_checkpoint="latest"))
