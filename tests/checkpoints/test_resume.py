"""What a resume may change, and how a checkpoint of another recipe is refused."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sft_toys import tiny_sft
from tiny_recipe import tiny_recipe, with_changes

from dllm_rl import TIS, Unmask, manifest
from dllm_rl.algorithms.correctors import Compose, Reject
from dllm_rl.algorithms.losses import GSPO
from dllm_rl.algorithms.optimizers import AdamW8bit, ConstantRate, CosineWithWarmup, LinearWithWarmup
from dllm_rl.checkpoints.resume import check_recipe, contents_of, default_settings
from dllm_rl.checkpoints.state import TrainingState
from dllm_rl.groups import Late
from dllm_rl.recipe import Recipe
from dllm_rl.records import describe, describe_json, to_json, without_folders
from dllm_rl.samplers.rules import PlackettLuce
from dllm_rl.supervised.sft import SFT
from dllm_rl.tasks import Sudoku
from dllm_rl.tasks.datasets import task_from_dataset
from dllm_rl.training.fine_tune import fine_tune
from dllm_rl.training.trainer import train

pytestmark = pytest.mark.usefixtures("no_rehearsal")


@pytest.mark.slow
def test_a_checkpoint_from_before_a_setting_existed_had_its_default(tmp_path):
    train(tiny_recipe(tmp_path, num_steps=1))
    file = tmp_path / "checkpoints/step-000001/state.json"
    state = json.loads(file.read_text())
    del state["recipe"]["max_grad_norm"]
    file.write_text(json.dumps(state))
    manifest.write(file.parent, step=1, processes=1, versions={})
    again = {"num_steps": 2, "lr_schedule_steps": 1, "resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match=r"max_grad_norm=0\.5 differs from the checkpoint's 1\.0"):
        train(tiny_recipe(tmp_path, **again, max_grad_norm=0.5))
    # What does not touch training may be another one.
    state = TrainingState.read(file.parent)
    check_recipe(tiny_recipe(tmp_path, **again, num_mismatch_groups=3, eval_steps=1), state)
    check_recipe(tiny_recipe(tmp_path, **again | {"num_steps": 1}), state)  # nothing is left to do
    with pytest.raises(ValueError, match="num_steps=0 is less than the checkpoint's step 1"):
        check_recipe(tiny_recipe(tmp_path, **again | {"num_steps": 0}), state)


def schedule(step, num_steps):
    return 1.0


def another(step, num_steps):
    return 0.5


@pytest.mark.parametrize("places", [("jobs", "."), (".", "jobs"), ("jobs/sub", ".")])
def test_a_script_may_resume_from_another_working_directory(tmp_path, monkeypatch, places):
    """The name of a script's function is relative to it."""
    (tmp_path / "jobs/sub").mkdir(parents=True)
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "__file__", str(tmp_path / "jobs/sub/mine.py"), raising=False)  # none under xdist
    monkeypatch.setattr(main, "__spec__", None)
    for function in (schedule, another):
        monkeypatch.setattr(function, "__module__", "__main__")
    recipe = tiny_recipe("/x", num_steps=2, lr_schedule=schedule)
    states, names = [], set()
    for place in places:
        monkeypatch.chdir(tmp_path / place)
        settings = recipe.settings()
        names.add(describe_json(settings["lr_schedule"]))
        states.append(TrainingState(step=2, version=2, dtype="float32", recipe=settings, contents=contents_of(recipe)))
    assert len(names) == 2 and all("mine.schedule" in name for name in names)
    check_recipe(recipe, states[0])
    with pytest.raises(ValueError, match=r"mine\.another.* differs from the checkpoint's .*mine\.schedule"):
        check_recipe(replace(recipe, lr_schedule=another), states[0])


@pytest.mark.parametrize("place", ["jobs/sub", "jobs", "."])
def test_only_the_folders_of_the_script_are_left_out_of_a_name(tmp_path, monkeypatch, place):
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "jobs/sub/mine.py"), raising=False)
    relative = ".".join((*Path("jobs/sub").relative_to(place).parts, "mine.f"))
    assert without_folders({"x": [relative]}) == without_folders({"x": ["mine.f"]})
    for other in ("elsewhere.mine.f", "subs.mine.f", "jobs.mine.f", "mine.sub.f"):
        assert without_folders(other) == f'"{other}"'


MAY_CHANGE = {
    **{"output_dir": "elsewhere", "resume_from_checkpoint": "latest", "overwrite_output_dir": True, "dry_run": True},
    **{"eval_steps": 1, "eval_batch_size": 2, "num_mismatch_groups": 3},
    **{"save_steps": 7, "save_total_limit": 3},
    **{"async_save": True, "logging_steps": 3, "log_completions_steps": 1, "report_to": "wandb"},
    **{"push_to_hub": "me/it", "stop_seconds": 1.0, "reward_timeout": None},
    **{"collective_timeout": 60.0, "peer_timeout": 60.0},
    **{"num_steps": 9, "lr_schedule_steps": 5, "max_prompt_length": 20, "shard_size": 0},
    **{"micro_batch_size": 1, "rollout_batch_size": 1, "gradient_checkpointing": True, "max_retained_graphs": 0},
}


@pytest.mark.parametrize("name", MAY_CHANGE)
def test_what_changes_no_number_of_the_steps_before_may_change_on_a_resume(name):
    """The rates of the first two steps are the same in a schedule of 4 steps and in one of 5."""
    recipe = tiny_recipe("x", num_steps=2, lr_schedule_steps=4)
    state = TrainingState(step=2, version=2, dtype="float32", recipe=recipe.settings(), contents=contents_of(recipe))
    changed = with_changes(recipe, **{name: MAY_CHANGE[name]})
    assert changed != recipe
    check_recipe(changed, state)
    with pytest.raises(ValueError, match="seed=1 differs from the checkpoint's 0"):
        check_recipe(replace(changed, seed=1), state)


def saved(recipe):
    return TrainingState(step=1, version=1, dtype="float32", recipe=recipe.settings(), contents=contents_of(recipe))


def test_the_number_of_workers_may_change_and_how_late_they_are_may_not():
    recipe = tiny_recipe("x", late=Late(workers=1, max_staleness=2))
    check_recipe(recipe.replace(late={"workers": 3}), saved(recipe))
    for late in (Late(workers=1, max_staleness=1), None):
        said = f"late={re.escape(repr(late))} differs from the checkpoint's .*, or with allow_changed='late'$"
        with pytest.raises(ValueError, match=said):
            check_recipe(recipe.replace(late=late), saved(recipe))
        check_recipe(recipe.replace(late=late, allow_changed="late"), saved(recipe))


def test_what_an_optimizer_has_may_change_by_its_name_and_its_kind_may_not():
    recipe = tiny_recipe("x")
    decayed = recipe.replace(optim={"weight_decay": 0.1})
    with pytest.raises(ValueError, match=r"optim=AdamW\(.*=0\.1\) differs .*, or with allow_changed='optim'$"):
        check_recipe(decayed, saved(recipe))
    check_recipe(decayed.replace(allow_changed="optim"), saved(recipe))
    descents = recipe.replace(optim=torch.optim.SGD)
    for other, first in ((AdamW8bit(), recipe), (torch.optim.SGD, recipe), (torch.optim.Adam, descents)):
        with pytest.raises(ValueError, match=r"optim=.* differs from the .*; resume with the same recipe$"):
            check_recipe(first.replace(optim=other, allow_changed="optim"), saved(first))


def test_a_schedule_that_differs_in_later_steps_is_refused():
    """Of 4 steps two are done, whose rates are the same in a schedule of 5. Those of the next two are not."""
    recipe = tiny_recipe("x", num_steps=4)
    state = TrainingState(step=2, version=2, dtype="float32", recipe=recipe.settings(), contents=contents_of(recipe))
    rates = [[recipe.lr_schedule(i, steps) for i in range(4)] for steps in (4, 5)]
    assert rates[0][:2] == rates[1][:2] and rates[0][2:] != rates[1][2:]
    check_recipe(recipe, state)
    with pytest.raises(ValueError, match="num_steps=5 would change the learning rates of a schedule that"):
        check_recipe(replace(recipe, num_steps=5), state)


@pytest.mark.parametrize("schedule", [LinearWithWarmup(), CosineWithWarmup(warmup_steps=2)])
def test_added_steps_have_a_learning_rate(schedule):
    """A schedule that ends at 0 would leave it there: stretched, it goes on."""
    recipe = tiny_recipe("x", num_steps=4, lr_schedule=schedule)
    state = TrainingState(step=4, version=4, dtype="float32", recipe=recipe.settings(), contents=contents_of(recipe))
    for changes in ({}, {"lr_schedule_steps": 4}, {"lr_schedule_steps": 4, "allow_changed": "lr_schedule_steps"}):
        with pytest.raises(ValueError, match=r"num_steps=8: the learning rate would be 0 from step 4 on, .*of 4 st"):
            check_recipe(with_changes(recipe, num_steps=8, **changes), state)
    check_recipe(recipe, state)  # nothing is left to do
    check_recipe(replace(recipe, num_steps=8, allow_changed="lr_schedule_steps"), state)
    constant = replace(recipe, lr_schedule=ConstantRate(), allow_changed="lr_schedule")
    check_recipe(replace(constant, num_steps=8), state)


@pytest.mark.parametrize(
    "record",
    [
        TIS(cap=3.0),
        Compose(parts=(Reject(threshold=0.5), TIS())),
        Unmask(max_new_tokens=4, rank=PlackettLuce(temperature=0.5), suppress=(2,)),
        GSPO(epsilon_high=None),
        Sudoku(split="train", clues=(10, 12)),
    ],
)
def test_a_stored_setting_is_shown_as_it_is_pasted(record):
    stored = json.loads(json.dumps(to_json(record)))
    assert describe_json(stored) == describe(record)


def test_a_setting_of_a_class_that_nobody_imported_is_shown_too():
    inner = {"class_path": "mine.Inner", "init_args": {"f": "mine:f", "sizes": [1]}}
    assert describe_json({"class_path": "mine.Outer", "init_args": {"inner": inner, "rate": None}}) == (
        "mine.Outer(inner=mine.Inner(f='mine:f', sizes=(1,)), rate=None)"
    )


def test_the_rows_of_a_data_set_are_not_stored():
    def right(completions, answer):
        return [0.0] * len(answer)

    stored = to_json(task_from_dataset([{"prompt": "1=", "answer": "2"}] * 3, reward_funcs=right, name="sums"))
    assert stored["init_args"].keys() == {"reward_funcs", "weights", "name", "version", "blank", "rows"}
    assert stored["init_args"]["rows"].startswith("3 rows, ") and "1=" not in stored["init_args"]["rows"]


def test_a_resume_with_another_recipe(tmp_path):
    train(tiny_recipe(tmp_path, num_steps=0))
    with pytest.raises(ValueError, match=r"learning_rate=0\.1 differs from the checkpoint's"):
        train(tiny_recipe(tmp_path, learning_rate=0.1, resume_from_checkpoint="latest"))
    said = r"^corrector=TIS\(cap=2\.0, level='token'.*\) differs from the checkpoint's AIS\(cap=2\.0"
    with pytest.raises(ValueError, match=said):
        train(tiny_recipe(tmp_path, corrector=TIS(), resume_from_checkpoint="latest"))


def test_a_checkpoint_of_another_kind_of_run_is_refused_as_such(tmp_path):
    """Also where a field that both kinds have differs, and with no word of damage."""
    rl = tiny_recipe(tmp_path / "rl", num_steps=0, adam_beta2=0.99)
    train(rl)
    supervised = tiny_sft(tmp_path / "sft", num_steps=0)
    fine_tune(supervised)
    with pytest.raises(ValueError, match=r"from another kind of run, without .*, task, .*; give its folder as model"):
        train(replace(rl, output_dir=str(tmp_path / "sft"), resume_from_checkpoint="latest"))
    with pytest.raises(ValueError, match="from another kind of run, without dataset"):
        fine_tune(replace(supervised, output_dir=str(tmp_path / "rl"), resume_from_checkpoint="latest"))


def test_defaults_are_the_records_own():
    assert default_settings(SFT)["max_length"] is None and "max_length" not in default_settings(Recipe)
    assert "dataset" not in default_settings(SFT), "it has none"
