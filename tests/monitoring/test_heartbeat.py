"""Long stages give a sign of life; graders and exchanges have a time limit that recipes set."""

import inspect
import threading

import pytest
from tiny_recipe import tiny_recipe
from torch.distributed.elastic.multiprocessing.api import PContext

from dllm_rl.groups import Limits
from dllm_rl.monitoring import log as module
from dllm_rl.monitoring.log import RunLog
from dllm_rl.training.trainer import train


def test_a_stage_that_takes_long_says_which_it_is_and_for_how_long(tmp_path, monkeypatch):
    said, thrice, log = [], threading.Event(), RunLog(tmp_path, start=7, main=True)

    def say(line: str) -> None:
        said.append(line)
        if len(said) == 3:
            thrice.set()

    monkeypatch.setattr(module, "FIRST_HEARTBEAT", 0.01)
    monkeypatch.setattr(log, "say", say)
    monkeypatch.setenv("RANK", "3")
    with log.stage("reward"):
        assert thrice.wait()
    told = [f"process 3: reward, after 7 steps, has taken {s} s so far" for s in ("0.01", "0.02", "0.04")]
    assert said[:3] == told


def test_other_processes_say_it_on_standard_error_and_a_short_stage_nothing(tmp_path, monkeypatch, capsys):
    written, log = threading.Event(), RunLog(tmp_path, start=0, main=False)
    monkeypatch.setattr(module, "print", lambda *a, **k: [print(*a, **k), written.set()], raising=False)
    with log.stage("scoring"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module, "FIRST_HEARTBEAT", 0.01)
    with log.stage("scoring"):
        assert written.wait()
    assert capsys.readouterr().err.startswith("process 0: scoring, after 0 steps, has taken 0.01 s so far\n")


def test_every_stage_of_a_run_is_watched_and_a_recipes_limit_holds_for_every_grader(tmp_path, monkeypatch):
    stages, limits = [], []
    monkeypatch.setattr(RunLog, "_print_heartbeats", lambda log, done: stages.append(log.place))
    for place in ("step.collect", "evaluation.evaluate"):
        grade = __import__(f"dllm_rl.{place}", fromlist=["grade"]).grade

        def noted(*arguments, timeout, grade=grade, place=place):
            limits.append((place, timeout))
            return grade(*arguments, timeout=timeout)

        monkeypatch.setattr(f"dllm_rl.{place}.grade", noted)
    train(tiny_recipe(tmp_path, num_steps=1, reward_timeout=77.0))
    assert set(limits) == {(p, 77.0) for p in ("step.collect", "evaluation.evaluate")}
    assert [place for place, _ in limits].count("step.collect") == 2  # the rehearsal's and the step's
    watched = {stage.split(",")[0] for stage in stages}
    assert watched == {"warm-up", "evaluation", "rollout", "reward", "waiting", "scoring", "update", "sync"}
    assert {"rollout, after 0 steps", "evaluation, after 1 steps"} <= set(stages)


def test_a_stop_saves_before_the_launcher_loses_patience():
    patience = inspect.signature(PContext.close).parameters["timeout"].default
    assert Limits().stop_seconds <= patience - 10


@pytest.mark.parametrize("field", ["collective_timeout", "reward_timeout"])
def test_a_limit_of_nothing_is_refused(field):
    with pytest.raises(ValueError, match=rf"{field}=0"):
        tiny_recipe("x", **{field: 0.0})
