"""What a run's log does with a deleted folder and numbers that JSON does not have; which trackers take them."""

import json
import re
import shutil
import threading
from pathlib import Path
from typing import ClassVar

import pytest
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, TensorBoardTracker
from accelerate.utils import LoggerType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_recipe import tiny_recipe

from dllm_rl.monitoring import log as module
from dllm_rl.monitoring.log import RunLog
from dllm_rl.monitoring.plots import plot
from dllm_rl.training.trainer import train
from recipes.sudoku_unique import recipe as main_job

pytestmark = pytest.mark.usefixtures("no_rehearsal")


def board(directory):
    made = TensorBoardTracker("run", directory / "tensorboard")
    made.start()
    return made


def test_a_deleted_tensorboard_folder_is_made_again(tmp_path):
    log = RunLog(tmp_path, start=0, main=True, trackers=[board(tmp_path)])
    log.write(0, {"reward": 0.5})
    shutil.rmtree(tmp_path / "tensorboard")
    for step in (1, 2):
        log.write(step, {"reward": 0.5})
    log.close()
    found = EventAccumulator(str(tmp_path / "tensorboard/run")).Reload()
    assert [event.step for event in found.Scalars("reward")] == [1, 2]


def test_a_run_goes_on_without_a_tensorboard_folder(tmp_path, capsys):
    log = RunLog(tmp_path, start=0, main=True, trackers=[board(tmp_path)])
    shutil.rmtree(tmp_path / "tensorboard")
    (tmp_path / "tensorboard").write_text("in its place")
    for step in range(4):
        log.write(step, {"reward": 0.5})
    log.close()
    assert capsys.readouterr().out.count("warning: tensorboard did not accept the numbers") == 3
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_numbers_that_are_not_finite_are_null_and_gaps(tmp_path):
    log = RunLog(tmp_path, start=0, main=True)
    log.write(0, {"reward": float("nan"), "rollout_corr/k3_kl": 0.0})
    log.write(1, {"reward": 0.5, "rollout_corr/k3_kl": float("inf")})
    log.close()

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert rows[0]["reward"] is None and rows[1]["rollout_corr/k3_kl"] is None and rows[1]["reward"] == 0.5
    assert plot(tmp_path).is_file()


def test_a_steps_seconds_are_those_of_its_own_stages(tmp_path):
    log = RunLog(tmp_path, start=0, main=True)
    for step, name in enumerate(("rollout", "update")):
        with log.stage(name):
            pass
        log.write(step, {})
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row.keys() for row in rows] == [
        {"step", "step_time", "memory/peak_gb", f"time/{name}"} for name in ("rollout", "update")
    ]
    for row, (name, spent) in zip(rows, log.seconds.items(), strict=True):
        assert row["step_time"] == row[f"time/{name}"] == spent > 0


def events(directory: Path) -> EventAccumulator:
    (file,) = directory.glob("*/events*")
    return EventAccumulator(str(file)).Reload()


class Recorder(GeneralTracker):
    """Stands for wandb: it keeps what it is sent."""

    name, requires_logging_directory, main_process_only = "wandb", False, True
    made: ClassVar[list["Recorder"]] = []
    fails_at: int | None = None

    def __init__(self, project, **options):
        super().__init__()
        self.project, self.options, self.sent, self.config, self.finished = project, options, [], None, False
        self.made.append(self)

    def start(self):
        pass

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **options):
        if step == self.fails_at:
            raise RuntimeError("the line is dead")
        self.sent.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    for name in ("accelerate.tracking", "accelerate.accelerator", "dllm_rl.monitoring.log"):
        monkeypatch.setattr(
            f"{name}.get_available_trackers", lambda: [LoggerType.TENSORBOARD, LoggerType.WANDB], raising=False
        )
    monkeypatch.setattr(Recorder, "made", [])
    monkeypatch.setattr(Recorder, "fails_at", None)
    return Recorder


def test_tensorboard_is_the_default():
    assert main_job.log.trackers == ["tensorboard"]


def test_none_is_none(tmp_path):
    train(tiny_recipe(tmp_path, report_to=None, num_steps=0))
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("project", [None, "sums"])
def test_wandb_takes_its_project_from_the_environment(tmp_path, wandb, monkeypatch, project):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    if project:
        monkeypatch.setenv("WANDB_PROJECT", project)
    module.start_trackers(tiny_recipe(tmp_path / "run", report_to="wandb"), Accelerator(log_with="wandb"), start=0)
    assert [(made.project, made.options["name"]) for made in wandb.made] == [(project or "tiny", "run")]


def test_others_get_every_step_and_the_recipe(tmp_path, wandb, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    train(tiny_recipe(tmp_path / "run", report_to="tensorboard,wandb", sft_warmup_steps=2, sft_warmup_eval_steps=2))
    (made,) = wandb.made
    assert made.project == "tiny" and made.options == {"name": "run", "dir": str(tmp_path / "run")}
    scheme = {"class_path": "Float8WeightOnly", "init_args": {"dequantized": False}}
    assert made.config["rollout_quantization"] == scheme and made.finished
    assert [step for step, _ in made.sent] == [0, 1], "its steps may not begin at 0 twice: no warm-up"
    found = events(tmp_path / "run/tensorboard")
    assert [event.step for event in found.Scalars("warmup/loss")] == [0, 1]
    assert [event.step for event in found.Scalars("reward")] == [0, 1]
    assert made.sent[1][1]["reward"] == found.Scalars("reward")[1].value


def test_a_tracker_that_fails_once_gets_the_next_step(tmp_path, wandb, capsys):
    wandb.fails_at = 0
    train(tiny_recipe(tmp_path, report_to="wandb"))
    out = capsys.readouterr().out
    assert (
        out.count("warning: wandb did not accept the numbers of step 0 (the line is dead): it gets those of the") == 1
    )
    assert [step for step, _ in wandb.made[0].sent] == [1] and wandb.made[0].finished, (
        "else it would block the next run of the process"
    )


class Picky(Recorder):
    """Accepts only names of a pattern, and, as mlflow, one run of a process at a time."""

    pattern = r"[\w.\-: ]+"
    active: ClassVar[list["Picky"]] = []

    def start(self):
        if self.active:
            raise RuntimeError("a run is already active")
        self.active.append(self)

    def log(self, values, step=None, **options):
        if refused := [name for name in values if not re.fullmatch(self.pattern, name)]:
            raise ValueError(f"{refused[0]} is no name")
        super().log(values, step)

    def finish(self):
        self.active.remove(self)


@pytest.mark.parametrize("name", ["rewards/<lambda>/mean", "energy (kcal/mol)", "eval/正解"])
def test_mlflow_gets_a_number_of_any_name(name):
    tracker = Picky("run")
    tracker.name = "mlflow"
    assert module.track([tracker], {"reward": 1.0, name: 2.0}, 0, pytest.fail) == [tracker]
    (sent,) = tracker.sent
    assert [*sent[1].values()] == [1.0, 2.0]


def test_a_refused_name_costs_a_tracker_that_number_alone(tmp_path, capsys):
    tracker = Picky("run")
    tracker.pattern = r"[a-z_/]+"
    log = RunLog(tmp_path, start=0, main=True, trackers=[tracker])
    names = ["<lambda>", "reward", "eval/p@1"]  # one that is refused stands first
    for step in range(2):
        log.write(step, dict.fromkeys(names, 1.0))
    for step in (0, 1):
        assert {name for at, values in tracker.sent if at == step for name in values} >= {"reward", "step_time"}
    out = capsys.readouterr().out
    for name in ("<lambda>", "eval/p@1"):
        assert out.count(f"does not accept the metric {name!r}") == 1
    tracker.pattern = "no name"
    tries = []
    log.trackers[0].log = lambda values, step: [tries.append(values), 1 / 0]
    log.write(2, {"reward": 1.0, "loss": 1.0})
    assert len(tries) == 2, "a server that does not answer is asked for one number alone"
    assert log.trackers == [tracker] and "of step 2 (division by zero): it gets" in capsys.readouterr().out


def timing_out(fails):
    """A tracker that takes every name and times out in the calls of which `fails(number, step)` is true; its calls."""
    tracker, tries = Picky("run"), []
    tracker.pattern = ".*"
    write = tracker.log

    def slow(values, step=None, **_):
        tries.append(step)
        if fails(len(tries), step):
            raise TimeoutError("no answer")
        write(values, step)

    tracker.log = slow
    return tracker, tries


@pytest.mark.parametrize(
    ("fails", "sent"),
    [
        ([0], [1, 2, 3, 4, 5, 6, 7]),
        ([2], [0, 1, 3, 4, 5, 6, 7]),
        ([1, 2, 4, 5], [0, 3, 6, 7]),
        ([0, 1, 2], []),
        ([1, 3, 4, 5, 6], [0, 2]),
    ],
)
def test_a_tracker_that_times_out_is_asked_again_until_it_has_failed_three_steps_in_a_row(
    tmp_path, capsys, fails, sent
):
    """And one that fails costs the other nothing."""
    (tracker, tries), other = timing_out(lambda number, step: step in fails), Picky("run 2")
    other.name, other.pattern = "other", ".*"
    log = RunLog(tmp_path, start=0, main=True, trackers=[tracker, other])
    for step in range(8):
        log.write(step, {"reward": 1.0})
    assert [step for step, _ in tracker.sent] == sent and len(other.sent) == 8
    out = capsys.readouterr().out
    is_ended = "the run continues without it, after 3 such steps in a row" in out
    assert is_ended == (sent in ([], [0, 2])) == (tracker not in log.trackers)
    assert out.count("did not accept") == len([step for step in fails if step in tries]) and other in log.trackers


def test_a_single_time_out_costs_two_more_calls_and_no_number(tmp_path, capsys):
    """Of a server that is slow each further call may take a minute."""
    tracker, tries = timing_out(lambda number, step: number == 1)
    log = RunLog(tmp_path, start=0, main=True, trackers=[tracker])
    log.write(0, dict.fromkeys(["reward", *(f"a/{n}" for n in range(50))], 1.0))
    assert len(tries) == 3 and {name for _, values in tracker.sent for name in values} >= {"reward", "a/0", "a/49"}
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("dead", [{1, 2}, {1, 3}, {1, 3, 5}, {1, 3, 4, 9}, {2, 5}])
def test_a_tracker_that_times_out_between_numbers_still_gets_each_name(tmp_path, capsys, dead):
    """Of its calls some fail: of a step's numbers all are sent, or the whole step counts as failed."""
    tracker, _ = timing_out(lambda number, step: number in dead)
    log = RunLog(tmp_path, start=0, main=True, trackers=[tracker])
    names = ["reward", "a/b", "c/d", "e/f"]
    for step in range(4):
        log.write(step, dict.fromkeys(names, 1.0))
    got = {step: {name for at, values in tracker.sent if at == step for name in values} for step in range(4)}
    assert all(set(names) <= got[step] for step in range(4) if got[step]) and sum(map(bool, got.values())) >= 3
    assert "does not accept the metric" not in capsys.readouterr().out


def test_a_server_that_dies_between_numbers_is_not_asked_for_each(tmp_path, capsys):
    tracker, tries = Picky("run"), []
    tracker.pattern = ".*"
    log = RunLog(tmp_path, start=0, main=True, trackers=[tracker])

    def dying(values, step=None, **_):
        tries.append(values)
        if len(tries) not in (2, 4):
            raise TimeoutError("no answer")

    tracker.log = dying
    log.write(0, dict.fromkeys(["reward", *(f"a/{n}" for n in range(50))], 1.0))
    assert len(tries) == 6, "all, the plainest, the others, one more, one that fails, the plainest again"
    assert capsys.readouterr().out.count("did not accept the numbers of step 0 (no answer)") == 1


def test_trackers_that_take_long_say_so(tmp_path, monkeypatch):
    tracker, said = Picky("run"), threading.Event()
    log = RunLog(tmp_path, start=4, main=True, trackers=[tracker])
    lines = []
    monkeypatch.setattr(module, "FIRST_HEARTBEAT", 0.01)
    monkeypatch.setattr(log, "say", lambda line: [lines.append(line), said.set()])
    tracker.log = lambda values, step=None: said.wait(60)
    log.write(4, {"reward": 1.0})
    assert lines[0] == "process 0: trackers, after 5 steps, has taken 0.01 s so far"
    assert "time/trackers" not in log.last and log.trackers == [tracker]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["the tracker fails", "the run fails", "another does not start"])
def test_a_tracker_of_a_run_does_not_block_the_next(tmp_path, wandb, monkeypatch, way):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Picky)
    recipe = tiny_recipe(tmp_path / "a", report_to="wandb", num_steps=1)
    with monkeypatch.context() as patch:
        if way == "the tracker fails":
            patch.setattr(Picky, "fails_at", 0)
            patch.setattr(Picky, "pattern", ".*")
            train(recipe)
        elif way == "the run fails":
            patch.setattr("dllm_rl.training.trainer.train_step", lambda *arguments: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                train(recipe)
        else:
            patch.setattr(Picky, "store_init_configuration", lambda self, values: 1 / 0)
            with pytest.raises(ValueError, match="did not start"):
                train(recipe)
    assert Picky.active == []


def test_mlflows_file_store_can_hold_every_name():
    """There `grad_norm` is a file, and `grad_norm/iteration_1` lies in a folder of that name."""
    tracker = Recorder("run")
    tracker.name = "mlflow"
    sent = {"grad_norm": 1.0, "grad_norm/iteration_1": 2.0}
    assert module.track([tracker], sent, 0, pytest.fail) == [tracker]
    assert tracker.sent == [(0, {"grad_norm": 1.0, "grad_norm.iteration_1": 2.0})]


def test_a_missing_package_is_one_line_before_work(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "get_available_trackers", lambda: ["tensorboard"])
    said = "report_to='tensorboard,trackio': trackio is not installed; pip install trackio, or leave it out"
    with pytest.raises(ValueError, match=said):
        train(tiny_recipe(tmp_path / "run", report_to="tensorboard,trackio"))
    assert not (tmp_path / "run").exists()


def test_one_that_does_not_start_is_one_line(tmp_path, wandb, monkeypatch):
    def refuse(self):
        raise KeyError("api_key not configured")

    monkeypatch.setattr(wandb, "start", refuse)
    with pytest.raises(ValueError, match="report_to='wandb' did not start: 'api_key not configured'"):
        train(tiny_recipe(tmp_path / "run", report_to="wandb"))


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="report_to='comet' is not known; use tensorboard, wandb, trackio, mlflow"):
        tiny_recipe(tmp_path, report_to="tensorboard, comet")
    assert tiny_recipe(tmp_path, report_to="tensorboard, wandb").log.trackers == ["tensorboard", "wandb"]


def test_a_resumed_run_purges_what_it_runs_again(tmp_path):
    """tensorboard hides events of the steps from the resume on, as metrics.jsonl does."""
    accelerator = Accelerator(cpu=True)
    accelerator.log_with, accelerator.project_configuration.logging_dir = ["tensorboard"], str(tmp_path)
    seen = []
    accelerator.init_trackers = lambda name, init_kwargs: seen.append(init_kwargs["tensorboard"])
    accelerator.trackers = []
    module.start_trackers(tiny_recipe(tmp_path), accelerator, start=7)
    assert seen == [{"purge_step": 7}]


def test_a_resumed_run_knows_the_numbers_of_the_step_before(tmp_path):
    """Of the steps that it goes on from: what a kill cut off does not count."""
    log = RunLog(tmp_path, start=0, main=True)
    for step in range(4):
        log.write(step, {"reward": step / 4})
    log.close()
    resumed = RunLog(tmp_path, start=3, main=True)
    resumed.close()
    assert resumed.last["reward"] == 0.5 and RunLog(tmp_path, start=3, main=False).last == {}
