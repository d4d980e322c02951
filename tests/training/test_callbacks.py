"""Callbacks, early stops, the best checkpoint, and settings that a resume changes, each through a run."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layouts import published
from ranks import run_ranks
from readme import example
from refusals import refused, refuses

from dllm_rl import Callback, FakeQuantize, Lora, Unmask, grpo, grpo_recipe, load_policy, sft, tiny_masked_lm
from dllm_rl.callbacks import RunControl, StopBelow, check_callbacks, state_of
from dllm_rl.groups import Evaluation, Log, Saves
from dllm_rl.models.tiny import tiny_moe
from dllm_rl.tasks import task_from_dataset
from dllm_rl.training import hooks, trainer, validation

pytestmark = pytest.mark.usefixtures("no_rehearsal")

ROWS = [{"prompt": f"{a}{b}=", "answer": f"{b}{a}"} for a in "123456" for b in "123456"]


def small_model():
    return tiny_masked_lm(
        characters="123456=", hidden_size=16, num_layers=1, num_attention_heads=2, intermediate_size=16
    )


def close(completions, answer, **columns):
    return [sum(a == b for a, b in zip(*pair, strict=False)) / 2 for pair in zip(completions, answer, strict=True)]


def run(folder, **settings):
    options = {"max_new_tokens": 2, "num_steps": 6, "train_batch_size": 4, "num_generations": 4, "report_to": "none"}
    options |= {"save_steps": 100, "log": Log(completions_steps=0)}
    return grpo(small_model(), ROWS, close, output_dir=str(folder), **options | settings)


def test_the_pages_bar_of_evaluations_shows_each_batch(tmp_path, capsys):
    page = {}
    exec(example("Callbacks and trackers"), page)
    counts = []

    class Bar(page["EvaluationBar"]):
        def on_progress(self, done, total):
            counts.append((done, total))
            super().on_progress(done, total)

    run(tmp_path, num_steps=1, eval_split=5, evaluation=Evaluation(batch_size=2), callbacks=[Bar()])
    assert counts == [(2, 5), (4, 5), (5, 5)] * 2, "before the first step, and after the last one"
    assert "held-out 5/5\n" in capsys.readouterr().out


class Recorder(Callback):
    def __init__(self):
        self.calls = []

    def on_start(self, run):
        self.calls.append(("start", run.step))

    def on_step(self, run, metrics):
        self.calls.append(("step", run.step))
        return {"mine/twice": 2 * metrics["reward"]}

    def on_evaluate(self, run, metrics):
        self.calls.append(("evaluate", run.step, metrics["eval/reward"]))

    def on_save(self, run, folder):
        self.calls.append(("save", folder.name))

    def on_end(self, run, summary):
        self.calls.append(("end", summary["seed"]))


class Meddler(Callback):
    """Leaves the folder, as a hook that writes a report does, and empties what it is given."""

    def __init__(self, folder):
        self.folder = folder

    def on_start(self, run):
        os.chdir(self.folder)
        torch.set_grad_enabled(False)

    def on_step(self, run, metrics):
        os.chdir(self.folder)
        metrics.clear()

    on_evaluate = on_step

    def on_save(self, run, folder):
        os.chdir(self.folder)

    def on_end(self, run, summary):
        os.chdir(self.folder)
        summary["recipe"].clear()


def choose(monkeypatch, values, *names):
    """Give every evaluation during a run chosen values, so that the best step is known."""
    names = names or ("eval/reward",)
    monkeypatch.setattr(trainer, "validate", lambda run, step: dict.fromkeys(names, values[step]))


class Numbered(Callback):
    """Logs the number of the step."""

    def on_step(self, run, metrics):
        return {"step_number": float(run.step)}


class SaveNumbered(Callback):
    """Requests a checkpoint after each step whose number `Numbered` has logged."""

    def on_step(self, run, metrics):
        if metrics["step_number"] == run.step:
            run.save()


def metrics_of(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def test_every_hook_is_called_in_order_and_its_numbers_are_logged(tmp_path, monkeypatch):
    recorder, elsewhere = Recorder(), tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    done = run("run", num_steps=2, eval_steps=2, callbacks=[Meddler(elsewhere), recorder])
    assert Path.cwd() == tmp_path and not list(elsewhere.iterdir()) and torch.is_grad_enabled()
    assert done["recipe"]["num_steps"] == 2
    kinds = [call[:2] for call in recorder.calls]
    assert kinds == [
        *[("save", "step-000000"), ("start", 0), ("evaluate", 0), ("step", 1), ("evaluate", 2), ("step", 2)],
        *[("save", "step-000002"), ("end", 0)],
    ]
    rows = metrics_of(tmp_path / "run")
    assert [row["mine/twice"] for row in rows] == [2 * row["reward"] for row in rows]
    assert recorder.calls[4][2] == rows[1]["eval/reward"]


def test_a_stop_saves_the_step_ends_the_run_with_its_reason_and_can_be_resumed(tmp_path):
    summary = run(tmp_path, callbacks=[StopBelow("reward", 2.0, steps=2)])
    assert summary["stopped"] == {"step": 2, "reason": "reward was below 2 for 2 steps"}
    assert Path(summary["checkpoint"]).name == "step-000002"
    # The two low steps before the resume count, so that the first further one ends it.
    again = run(tmp_path, resume_from_checkpoint="latest", callbacks=[StopBelow("reward", 2.0, steps=3)])
    assert again["stopped"]["step"] == 3
    whole = run(tmp_path / "whole", num_steps=3, lr_schedule_steps=6)
    for mine, other in zip(again.policy.module.parameters(), whole.policy.module.parameters(), strict=True):
        assert torch.equal(mine, other)  # callbacks change no number


@pytest.mark.parametrize(
    ("values", "low"),
    [([0.1, 0.6, 0.2, 0.3], 2), ([None, 0.1], 2), ([0.5], 0), ([0.1, "absent", 0.2], 2), ([float("inf"), 0.1], 1)],
    ids=["a high one starts anew", "null is low", "the bound itself is high", "absent does not count", "infinity"],
)
def test_stop_below_counts_by_hand(tmp_path, values, low):
    callback = StopBelow("m", 0.5, steps=10)
    control = RunControl(tmp_path, 0, 100)
    for value in values:
        callback.on_step(control, {} if value == "absent" else {"m": float("nan") if value is None else value})
    # An infinite number is no measurement, and counts as low.
    assert callback._low == low + (values[0] == float("inf"))


class StopOnSave(Callback):
    def __init__(self, step):
        self.step = step

    def on_save(self, run, folder):
        if folder.name >= f"step-{self.step:06d}":
            run.stop(f"saved {folder.name}")


@pytest.mark.parametrize(("async_save", "step"), [(False, 1), (False, 2), (True, 1)])
@pytest.mark.repeated(first_only=True)
def test_the_last_checkpoint_has_merged_weights_if_a_save_ended_the_run(tmp_path, async_save, step):
    small_model().save_pretrained(tmp_path / "model")
    settings = {
        "lora": Lora(r=2),
        "save_steps": 1,
        "saves": Saves(in_background=async_save),
        "callbacks": [StopOnSave(step)],
    }
    options = {"max_new_tokens": 2, "num_steps": 9, "train_batch_size": 4, "num_generations": 4, "report_to": "none"}
    summary = grpo(str(tmp_path / "model"), ROWS, close, output_dir=str(tmp_path / "run"), **options | settings)
    saved = Path(summary["checkpoint"])
    # In the background, `on_save` is called when the next checkpoint is due; that one is the last.
    assert summary["stopped"]["reason"] == f"saved step-{step:06d}"
    assert saved.name == f"step-{step + async_save:06d}"
    merged = [path.name for path in saved.parent.glob("step-*") if (path / "model.safetensors").exists()]
    assert merged == [saved.name]
    stored = load_policy(saved).module.state_dict()
    assert all(torch.isfinite(weight).all() for weight in stored.values())


SEVERAL = """
import sys
sys.path.insert(0, "tests/training")
from test_callbacks import StopOnSave, run
from dllm_rl.groups import Limits, Saves
settings = {"callbacks": [StopOnSave(2)], "save_steps": 2, "saves": Saves(in_background=sys.argv[2] == "True")}
summary = run(sys.argv[1], **settings, limits=Limits(collective_timeout=60.0))
print(summary["stopped"]["reason"])
"""


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.repeated(first_only=True)
def test_every_process_stops_if_a_save_ends_the_run(tmp_path, async_save):
    said = run_ranks(SEVERAL, 2, tmp_path, async_save)
    assert all("saved step-000002" in each for each in said), said


@pytest.mark.slow
@pytest.mark.parametrize("num_runs", [2, 3])
def test_callbacks_carry_nothing_into_the_next_run(tmp_path, num_runs):
    callbacks = [StopBelow("reward", 2.0, steps=3), Numbered(), SaveNumbered()]
    for i in range(num_runs):
        folder = tmp_path / str(i)
        assert run(folder, seed=i, callbacks=callbacks, save_total_limit=9)["stopped"]["step"] == 3
        assert len(list((folder / "checkpoints").glob("step-*"))) == 4
    resumed = run(folder, seed=i, callbacks=[StopBelow("reward", 2.0, steps=4)], resume_from_checkpoint="latest")
    assert resumed["stopped"]["step"] == 4  # a resume counts the steps before it


def test_the_best_checkpoint_survives_the_limit_and_is_what_the_run_returns(tmp_path, monkeypatch):
    choose(monkeypatch, [0.1, 0.7, 0.3])
    settings = {"save_steps": 1, "save_total_limit": 1, "eval_steps": 3, "num_steps": 3}
    best = {"metric_for_best_model": "eval_reward", "load_best_model_at_end": True}
    summary = run(tmp_path, rollout_quantization=None, **settings, **best)
    assert (summary["best_step"], summary["best_value"]) == (2, 0.7)
    saved = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert saved == ["step-000002", "step-000003"]
    assert summary["checkpoint"] == summary["best_checkpoint"] == str(tmp_path / "checkpoints" / "step-000002")
    stored = load_policy(summary["best_checkpoint"]).module.state_dict()
    returned = summary.policy.module.state_dict()
    assert all(torch.equal(returned[name], stored[name]) for name in stored)


def test_of_a_loss_the_lowest_is_the_best(tmp_path):
    rows = [{"prompt": row["prompt"], "completion": row["answer"]} for row in ROWS]
    options = {"max_length": 8, "num_steps": 4, "eval_steps": 1, "save_steps": 100, "report_to": "none"}
    summary = sft(
        small_model(),
        rows,
        output_dir=str(tmp_path),
        learning_rate=0.3,  # too large: the loss rises again
        **options,
        metric_for_best_model="loss",
        load_best_model_at_end=True,
    )
    losses = {row["step"] + 1: row["eval/loss"] for row in metrics_of(tmp_path)}
    assert summary["best_step"] == min(losses, key=losses.__getitem__)
    assert summary["eval_after"]["loss"] == pytest.approx(min(losses.values()), rel=1e-6)


BEST = {"eval_steps": 1, "metric_for_best_model": "reward", "load_best_model_at_end": True, "save_steps": 1}


@pytest.mark.parametrize(
    ("changed", "best"),
    [
        ({}, (1, 0.9)),
        ({"metric_for_best_model": "eval_reward"}, (1, 0.9)),
        ({"metric_for_best_model": "close"}, (2, 0.3)),
    ],
    ids=["same", "another spelling", "another metric"],
)
@pytest.mark.repeated(first_only=True)
def test_a_resume_with_another_metric_forgets_the_best_of_the_old_one(tmp_path, capsys, monkeypatch, changed, best):
    choose(monkeypatch, [0.9, 0.3], "eval/reward", "eval/close")
    run(tmp_path, num_steps=1, lr_schedule_steps=2, **BEST)
    capsys.readouterr()
    resume = {"num_steps": 2, "lr_schedule_steps": 2, "resume_from_checkpoint": "latest"}
    summary = run(tmp_path, **BEST | resume | changed)
    assert (summary["best_step"], summary["best_value"]) == best and Path(summary["best_checkpoint"]).exists()
    said = "the best checkpoint so far, of step 1, no longer counts: saves.best.metric has"
    assert (said in capsys.readouterr().out) == (best[0] != 1)


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["validation_task", "eval_sampler"])
def test_a_resume_with_other_evaluations_forgets_the_best_of_the_old_ones(tmp_path, capsys, monkeypatch, changed):
    choose(monkeypatch, [0.9, 0.2, 0.1, 0.3], "eval/reward")
    run(tmp_path, num_steps=2, lr_schedule_steps=4, **BEST)
    resume = {"num_steps": 4, "lr_schedule_steps": 4, "resume_from_checkpoint": "latest", "allow_changed": changed}
    other = {
        "validation_task": task_from_dataset([{"prompt": "12=", "answer": "21"}], reward_funcs=[close]),
        "eval_sampler": Unmask(max_new_tokens=2, diffusion_steps=1, temperature=0.0),
    }
    summary = run(tmp_path, **BEST | resume | {changed: other[changed]})
    assert (summary["best_step"], summary["best_value"]) == (4, 0.3)
    said = f"the best checkpoint so far, of step 1, no longer counts: {changed} has changed"
    assert said in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("load", [True, False])
@pytest.mark.parametrize("case", ["another folder", "deleted", "kept", "no evaluation since"])
@pytest.mark.repeated(first_only=True)
def test_a_resume_forgets_a_best_checkpoint_that_is_not_there(tmp_path, capsys, monkeypatch, case, load):
    settings = BEST | {"load_best_model_at_end": load, "lr_schedule_steps": 3}
    with monkeypatch.context() as patched:
        choose(patched, [0.9, 0.1, 0.95])
        run(tmp_path / "run", num_steps=3 if case == "deleted" else 2, **settings, save_total_limit=2)
    capsys.readouterr()
    start = tmp_path / "run" / "checkpoints" / "step-000002"
    folder = tmp_path / ("run" if case in ("deleted", "kept") else "other")
    if case == "no evaluation since":
        settings |= {"eval_steps": 2}
    else:
        choose(monkeypatch, [0.0, 0.0, 0.3])
    summary = run(folder, num_steps=3, **settings, resume_from_checkpoint=str(start))
    said = f"the best checkpoint so far, of step 1, no longer counts: {folder / 'checkpoints'} does not have it"
    assert (said in capsys.readouterr().out) == (case != "kept")
    expected = {"kept": 1, "no evaluation since": None}.get(case, 3)
    assert summary.get("best_step") == expected
    assert Path(summary.get("best_checkpoint", summary["checkpoint"])).exists()


test_what_cannot_be_called_or_measured_is_refused_before_the_first_step = refused(
    ({"callbacks": [print]}, "callbacks"),
    ({"callbacks": StopBelow()}, "callbacks"),
    ({"callbacks": [StopBelow]}, "callbacks"),
    ({"metric_for_best_model": "reward"}, r"evaluation\.steps"),
    ({"metric_for_best_model": "rewards", "eval_steps": 1}, r"saves\.best\.metric"),
    ({"load_best_model_at_end": True}, "Best needs metric"),
    ({"metric_for_best_model": "reward", "eval_steps": 0}, r"evaluation\.steps=0 never"),
    ({"callbacks": [StopBelow("eval/reward")], "eval_steps": 0}, r"StopBelow\('eval/reward'\) .*\.steps=0"),
    ({"callbacks": [StopBelow("eval/reward")], "eval_steps": 9}, r"StopBelow\('eval/reward'\) .* every 9 steps"),
    ({"callbacks": [StopBelow("eval/rewards")], "eval_steps": 1}, "the nearest is 'reward'"),
    by=lambda settings, tmp_path: run(tmp_path / "run", **settings),
)


class Named(Callback):
    def __init__(self, *names):
        self.names = names

    def on_step(self, run, metrics):
        return dict.fromkeys(self.names, 7.0)


@pytest.mark.parametrize("name", ["step", "reward", "eval/reward", "other/number"])
@pytest.mark.repeated(first_only=True)
def test_a_number_of_a_callback_replaces_none_of_the_runs_or_of_another_callback(tmp_path, name):
    """`eval/reward` also at a step without an evaluation: the next one would pick the best checkpoint by it."""
    with pytest.raises(ValueError, match=rf"Named\.on_step returned '{name}', a name of the run .*'mine/{name}'"):
        run(tmp_path, num_steps=1, eval_steps=9, callbacks=[Named("other/number"), Named("mine/fine", name)])
    assert metrics_of(tmp_path) == []


def test_names_that_only_the_log_gives_are_the_runs_too():
    for name in ("time/update", "step_time", "memory/peak_gb", "eval/mine", "resume_from", "warmup_step", "changed"):
        with pytest.raises(ValueError, match=f"'{name}', a name of the run"):
            hooks.check_numbers(Named(), {"mine": 1, name: 2.0}, {"reward": 0.5})
    assert hooks.check_numbers(Named(), {"mine/reward": 1}, {"reward": 0.5}) == {"mine/reward": 1.0}


def test_a_metric_that_never_occurs_is_named_after_the_first_step(tmp_path, capsys):
    metrics = ("eval_reward", "rewards", "mine/late", "step_time", "eval/reward", "reward", "mine/number")
    acting = [StopBelow(name, 0.0) for name in metrics]
    run(tmp_path, num_steps=2, eval_steps=2, callbacks=[Named("mine/number"), *acting, StopBelow(), Named("mine/late")])
    out = capsys.readouterr().out.replace("\n", " ")
    for said in (
        "'eval_reward', .*?; the nearest is 'eval/reward'",
        "'rewards', .*?; the nearest is 'reward'",
        "'mine/late', which step 1 does not have",
        "'step_time', which step 1 does not have",
    ):
        assert re.search(f"StopBelow acts on the metric {said}", out)
    assert out.count("acts on the metric") == 4


class Renamed(Callback):
    def on_evaluation(self, run, metrics):
        """A hook of no run."""


class OfTransformers(Callback):
    def on_step_end(self, args, state, control, **kwargs):
        """transformers' hook."""


class Short(Callback):
    def on_step(self, run):
        """Lacks the metrics."""


class Long(Callback):
    def on_save(self, run, folder, step):
        """One argument more."""


class Waiting(Callback):
    async def on_evaluate(self, run, metrics):
        """Never awaited."""


class Loading(Callback):
    def load_state(self):
        """Lacks the state."""


@pytest.mark.parametrize(
    ("callback", "said"),
    [
        (Renamed, r"callbacks\[0\]: Renamed.on_evaluation is never called; the nearest is on_evaluate"),
        (OfTransformers, "OfTransformers.on_step_end is never called; the nearest is on_step"),
        (Short, r"Short.on_step cannot be called with \(run, metrics\): too many positional arguments"),
        (Long, r"Long.on_save cannot be called with \(run, folder\): missing a required argument: 'step'"),
        (Waiting, "Waiting.on_evaluate is async, .*; write def"),
        (Loading, r"Loading.load_state cannot be called with \(state\)"),
    ],
)
def test_a_hook_that_no_run_can_call_is_refused_before_the_model_is_loaded(tmp_path, callback, said):
    def model(seed):
        raise AssertionError("loaded")

    recipe = grpo_recipe(small_model(), ROWS, close, output_dir=str(tmp_path / "run"))
    refuses(said, lambda: replace(recipe, model=model, callbacks=[callback()]))


def test_hooks_may_take_more_if_it_has_defaults():
    class Free(Callback):
        on_gpu = False

        def on_step(self, *arguments, **keywords):
            """Takes anything."""

        def on_save(self, run, folder, copies=2):
            """One with a default."""

    check_callbacks([Free(), Recorder(), StopBelow()])


class Misspelled(Callback):
    def on_evaluate(self, run, metrics):
        return metrics["eval/rewards"]


def test_on_evaluate_is_first_called_before_the_training(tmp_path):
    refuses("eval/rewards", lambda: run(tmp_path, num_steps=2, eval_steps=2, callbacks=[Misspelled()]), KeyError)
    assert metrics_of(tmp_path) == []


class Counting(Callback):
    """Its state is the number of steps that it has seen."""

    def on_start(self, run):
        self.steps = 0

    def on_step(self, run, metrics):
        self.steps += 1
        return {f"{self.name}/steps": self.steps}

    def state(self):
        return {"steps": self.steps}

    def load_state(self, state):
        self.steps = state["steps"]

    def __init__(self, name="mine"):
        self.name = name


class Forgetting(Counting):
    state = Callback.state


def test_a_resume_restores_the_state_of_callbacks_and_names_those_that_start_anew(tmp_path, capsys):
    run(tmp_path, num_steps=1, lr_schedule_steps=6, callbacks=[Counting("a"), Forgetting("b"), Counting("c")])
    assert "start over" not in capsys.readouterr().out
    resume = {"lr_schedule_steps": 6, "resume_from_checkpoint": "latest"}
    # Of one class by their order, whatever stands between; a new one has no state in the checkpoint.
    more = [StopBelow("reward", 0.0), Counting("a"), Counting("c"), Forgetting("b"), Counting("new"), StopBelow()]
    run(tmp_path, num_steps=2, **resume, callbacks=more)
    said = " ".join(capsys.readouterr().out.split())
    assert "callbacks that start over, since the checkpoint has no state of theirs: Forgetting, Counting;" in said
    last = metrics_of(tmp_path)[-1]
    assert [last[f"{name}/steps"] for name in ("a", "b", "c", "new")] == [2, 1, 2, 1]
    run(tmp_path, num_steps=3, **resume, callbacks=[Counting("a"), StopBelow()])
    assert "start over" not in capsys.readouterr().out
    assert metrics_of(tmp_path)[-1]["a/steps"] == 3


@pytest.mark.parametrize(
    "value",
    [{"seen": {1, 2}}, {"pair": (1, 2)}, {"by step": {1: 0.5}}, {"mean": float("nan")}, [1], "text"],
    ids=["a set", "a tuple", "keys that are numbers", "NaN", "a list", "text"],
)
@pytest.mark.repeated(first_only=True)
def test_a_state_that_json_would_change_is_refused_before_the_first_step(tmp_path, value):
    callback = Counting()
    callback.state = lambda: value
    with pytest.raises(ValueError, match=r"Counting\.state returned .*; return a dict of JSON values"):
        run(tmp_path, num_steps=1, callbacks=[callback])
    assert metrics_of(tmp_path) == []


def test_a_state_that_changes_after_it_was_read_is_stored_as_it_was():
    callback = Counting()
    callback.steps = [1]
    stored = state_of(callback)
    callback.steps.append(2)
    assert stored == {"steps": [1]}


@pytest.mark.slow
def test_a_resume_may_change_what_allow_changed_names_and_says_so(tmp_path):
    run(tmp_path, num_steps=2, lr_scheduler_type="constant")
    resume = {"num_steps": 3, "resume_from_checkpoint": "latest", "learning_rate": 1e-3, "max_grad_norm": 0.5}
    with pytest.raises(ValueError, match=r"learning_rate.*allow_changed='learning_rate'"):
        run(tmp_path, lr_scheduler_type="constant", **resume)
    summary = run(tmp_path, lr_scheduler_type="constant", **resume, allow_changed="learning_rate, max_grad_norm, loss")
    changes = [(row["step"], row["field"], row["before"], row["after"]) for row in summary["changes"]]
    assert changes == [(2, "learning_rate", 5e-4, 1e-3), (2, "max_grad_norm", 1.0, 0.5)]
    rows = metrics_of(tmp_path)
    assert [row["changed"] for row in rows if "changed" in row] == ["learning_rate", "max_grad_norm"]
    rates = {row["step"]: row["learning_rate"] for row in rows if "step" in row}
    assert (rates[1], rates[2]) == (5e-4, 1e-3)
    # The change stays: it is the checkpoint's setting from there on, and the record of it is kept.
    with pytest.raises(ValueError, match="learning_rate"):
        run(tmp_path, num_steps=4, lr_scheduler_type="constant", resume_from_checkpoint="latest")


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [{"micro_batch_size": 2}, {"rollout_batch_size": 3}, {"gradient_checkpointing": True}, {"max_retained_graphs": 0}],
    ids=str,
)
def test_a_resume_may_save_memory_and_says_so(tmp_path, capsys, change):
    """What an OOM asks for changes no meaning of the run: it needs no `allow_changed`, and is recorded."""
    run(tmp_path, num_steps=1)
    summary = run(tmp_path, num_steps=2, lr_schedule_steps=1, resume_from_checkpoint="latest", **change)
    ((name, value),) = change.items()
    (recorded,) = summary["changes"]
    assert (recorded["step"], recorded["field"], recorded["after"]) == (1, name, value)
    assert f"{name} changes after step 1:" in (out := capsys.readouterr().out) and "numbers round otherwise" in out


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The folder of a run that has its first checkpoint. Its tests write nothing there."""
    folder = tmp_path_factory.mktemp("begun")
    run(folder, num_steps=0, lr_schedule_steps=1)
    return folder


def test_what_no_resume_can_change_is_refused_by_name(begun):
    for names, wrong in (("learning_rat", "learning_rat"), ("lora", "lora"), ("seed,model", "model")):
        with pytest.raises(ValueError, match=f"allow_changed.*{wrong}"):
            run(begun, num_steps=1, lr_schedule_steps=1, resume_from_checkpoint="latest", allow_changed=names)


@pytest.mark.parametrize("change", [{"beta": 0.1}, {"teacher": {"model": "reference"}}], ids=str)
@pytest.mark.repeated(first_only=True)
def test_a_resume_cannot_compare_with_a_start_that_was_not_stored(begun, change):
    resume = {"num_steps": 1, "lr_schedule_steps": 1, "resume_from_checkpoint": "latest", **change}
    for allowed in (None, next(iter(change))):
        with pytest.raises(ValueError, match=r"needs the model that RL started from, which this run did not store"):
            run(begun, **resume, allow_changed=allowed)


@pytest.mark.slow
def test_weights_of_several_dtypes_keep_them_in_a_resume(tmp_path):
    """A frozen body in bf16 below a head in fp32: one dtype for all would round what is trained."""
    policy = small_model()
    policy.module.to(torch.bfloat16).requires_grad_(False)
    policy.module.lm_head.float()
    policy.module.lm_head.requires_grad_(True)
    before = {name: weight.dtype for name, weight in policy.module.named_parameters()}
    options = {"max_new_tokens": 2, "train_batch_size": 4, "num_generations": 4, "report_to": "none"}
    options |= {"output_dir": str(tmp_path), "lr_schedule_steps": 2, "learning_rate": 0.02}
    grpo(policy, ROWS, close, num_steps=1, **options)
    resumed = grpo(policy, ROWS, close, num_steps=2, **options, resume_from_checkpoint="latest").policy
    whole = grpo(policy, ROWS, close, num_steps=2, **options | {"output_dir": str(tmp_path / "whole")}).policy
    assert {name: weight.dtype for name, weight in resumed.module.named_parameters()} == before
    assert len(set(before.values())) == 2
    expected = whole.module.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in resumed.module.state_dict().items())


def mixture():
    return tiny_moe(characters="123456=", causal=False, num_layers=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llada", "mixture"])
def test_a_policy_in_memory_is_loaded_from_the_checkpoints_of_its_run(tmp_path, monkeypatch, name):
    """Their tensors have the names of the published layout, or one tensor per expert."""

    def policy():
        return mixture() if name == "mixture" else load_policy(published(tmp_path / "published", "llada"))

    options = {"max_new_tokens": 2, "train_batch_size": 4, "num_generations": 4, "report_to": "none"}
    options |= {"lr_schedule_steps": 2, "beta": 0.1}
    rows, folder = (ROWS, tmp_path / "run") if name == "mixture" else ([{"prompt": "a", "answer": "ab"}] * 20, tmp_path)
    grpo(policy(), rows, close, num_steps=1, **options, output_dir=str(folder))
    resumed = grpo(
        policy(), rows, close, num_steps=2, **options, output_dir=str(folder), resume_from_checkpoint="latest"
    )
    whole = grpo(policy(), rows, close, num_steps=2, **options, output_dir=str(folder / "whole"))
    expected = whole.policy.module.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in resumed.policy.module.state_dict().items())
    choose(monkeypatch, [0.9, 0.2], "eval/reward")
    best = grpo(policy(), rows, close, num_steps=2, **options | BEST, output_dir=str(folder / "best"))
    assert best["best_step"] == 1 and best.policy.weights_version == 1


@pytest.mark.slow
def test_a_quantized_copy_in_bf16_is_evaluated_in_the_arithmetic_of_rollouts(tmp_path, monkeypatch):
    """Its weights are in bf16; a module that adds a buffer in fp32 computes with them under autocast alone."""
    seen, evaluation_of = [], validation.evaluation_of

    def evaluated(recipe, policy, task, accelerator):
        seen.append((next(policy.module.parameters()).dtype, torch.is_autocast_enabled("cpu")))
        return evaluation_of(recipe, policy, task, accelerator)

    monkeypatch.setattr(validation, "evaluation_of", evaluated)
    run(tmp_path, num_steps=1, bf16=True, rollout_quantization=FakeQuantize())
    assert seen == [(torch.float32, False), (torch.float32, False), (torch.bfloat16, True)]  # before RL, and after


test_refused = refused(
    (lambda: hooks.check_numbers(Named(), {"mine": "high"}, {}), r"Named\.on_step"),
    (
        lambda tmp_path: sft(
            small_model(),
            [{"prompt": row["prompt"], "completion": row["answer"]} for row in ROWS],
            **{"max_length": 8, "num_steps": 1, "report_to": "none", "output_dir": str(tmp_path)},
            callbacks=[Named("loss")],
        ),
        r"Named\.on_step returned 'loss'",
    ),
)
