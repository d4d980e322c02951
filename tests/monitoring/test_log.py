"""What a run's log does with a deleted folder, and with numbers that JSON does not have."""

import json
import math
import shutil

from accelerate.tracking import TensorBoardTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dllm_rl.monitoring.log import RunLog
from dllm_rl.monitoring.plots import plot

ALWAYS = {"reward": 0.5, "parsed": 1.0, "rollout_corr/k3_kl": 0.0, "rollout_corr/rollout_is_eff_sample_size": 1.0}


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
    for step in range(3):
        log.write(step, {"reward": 0.5})
    log.close()
    assert capsys.readouterr().out.count("warning: tensorboard takes no more numbers") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_numbers_that_are_not_finite_are_null_and_gaps(tmp_path):
    log = RunLog(tmp_path, start=0, main=True)
    log.write(0, {**ALWAYS, "reward": float("nan")})
    log.write(1, {**ALWAYS, "rollout_corr/k3_kl": float("inf")})
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


def test_a_stage_that_computes_has_the_least_patience_and_a_graders_has_none_to_lose(tmp_path):
    log = RunLog(tmp_path, start=0, main=False)
    found = {"between stages": log.patience}
    for name in ("rollout", "reward", "evaluation", "waiting"):
        with log.stage(name):
            found[name] = log.patience
    assert found == {"between stages": 10, "rollout": 1, "reward": math.inf, "evaluation": math.inf, "waiting": 10}
