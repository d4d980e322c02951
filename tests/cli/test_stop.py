"""`dllm-rl stop` and `dllm-rl status` against a process that holds a run's lock."""

import json
import os
import subprocess
import sys

import pytest

from dllm_rl import manifest
from dllm_rl.cli.main import main
from dllm_rl.distributed.stop import LOCK
from dllm_rl.files import lock, unlock, write_json

HOLDER = """
import signal, sys, time
from pathlib import Path
from dllm_rl.files import lock
# A shell's background process would ignore it otherwise; a run sets a handler of its own.
signal.signal(signal.SIGINT, signal.SIG_IGN if sys.argv[2] == "deaf" else signal.SIG_DFL)
lock(Path(sys.argv[1]) / ".lock")
print("locked", flush=True)
time.sleep(600)
"""


def holder(folder, kind="hears"):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), kind], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    return process


def test_the_run_gets_sigint_and_the_command_waits_for_its_end(tmp_path, capsys):
    process = holder(tmp_path)
    assert main(["stop", str(tmp_path)]) == 0
    assert process.wait() == -2  # with SIGTERM slurm.sh would queue it again
    out = capsys.readouterr().out
    assert str(process.pid) in out and "no checkpoint" in out


def test_a_run_that_does_not_end_is_said(tmp_path, capsys):
    process = holder(tmp_path, "deaf")
    try:
        assert main(["stop", str(tmp_path), "--timeout", "0.3"]) == 1
    finally:
        process.kill()
        process.wait()


def seen(folder, capsys) -> str:
    assert main(["status", str(folder)]) == 0
    return capsys.readouterr().out


def test_the_status_of_a_run_that_goes_on_was_killed_was_stopped_or_has_ended(tmp_path, capsys):
    recipe = {"num_steps": 5, "likelihood": None}
    for step in (0, 2):
        folder = tmp_path / f"checkpoints/step-{step:06}"
        write_json(folder / "state.json", {"recipe": recipe})
        write_json(folder / manifest.NAME, {})
    rows = [{"warmup_step": 6}, *({"step": step, "reward": step / 4, "step_time": 90.0} for step in range(3))]
    rows[1] |= {"eval/accuracy": 0.75, "rollout_corr/ess": 0.5}
    rows[-1]["rollout_corr/ess"] = 0.4
    last = "step 3/5  reward 0.5  held-out at 1: accuracy 0.75  90 s a step  ESS 0.4, 0.5 in the first step\n"
    for count, line in [(1, "step 0/5  warm-up step 7"), (4, last)]:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
        assert line in seen(tmp_path, capsys)
    process = holder(tmp_path)
    try:
        (tmp_path / LOCK).write_text("process 7 on elsewhere\n")
        for _ in range(2):  # asking changes nothing
            out = seen(tmp_path, capsys)
            assert "going on, process 7 on elsewhere\n" in out and out.endswith("ETA 0:03:00\n")
    finally:
        process.kill()
        process.wait()
    advice = f"continue with --resume_from_checkpoint latest --output_dir {tmp_path}"
    assert f": failed or was killed; {advice}\nstep 3/5" in seen(tmp_path, capsys)
    write_json(tmp_path / "summary.json", {"stopped": {"step": 3, "reason": "the reward is low"}})
    assert f": stopped (the reward is low); {advice}\n" in seen(tmp_path, capsys)
    write_json(tmp_path / "summary.json", {"stopped": {"step": 2, "reason": "SIGINT"}})  # of the part before a resume
    assert ": failed or was killed; " in seen(tmp_path, capsys)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 4, "loss": 0.25}) + "\n")
    assert ": failed or was killed; " in seen(tmp_path, capsys)
    write_json(tmp_path / "summary.json", {"eval_after": {}})
    assert seen(tmp_path, capsys) == f"{tmp_path}: ended\nstep 5/5  loss 0.25\n"


def test_the_time_left_is_that_of_steps_as_long_as_one_of_the_last_20(tmp_path, capsys):
    folder = tmp_path / "checkpoints/step-000022"
    write_json(folder / "state.json", {"recipe": {"num_steps": 30, "likelihood": None}})
    write_json(folder / manifest.NAME, {})
    rows = [{"step": step, "step_time": 1000.0 if step < 2 else 60.0} for step in range(22)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lock(tmp_path / LOCK)
    try:
        assert seen(tmp_path, capsys).endswith("ETA 0:08:00\n")
    finally:
        unlock(tmp_path / LOCK)


def test_the_status_of_this_process_leaves_its_lock(tmp_path, capsys):
    lock(tmp_path / LOCK)
    try:
        for _ in range(2):
            assert f"going on, process {os.getpid()} on " in seen(tmp_path, capsys)
    finally:
        unlock(tmp_path / LOCK)
    (tmp_path / LOCK).unlink()
    assert main(["status", str(tmp_path)]) == 2 and "contains no run" in capsys.readouterr().err


@pytest.mark.parametrize("text", [None, "process 1 on elsewhere\n"], ids=["no lock", "a lock that nobody holds"])
def test_a_folder_that_no_run_writes_is_refused_and_left_as_it_is(tmp_path, capsys, text):
    if text is not None:
        (tmp_path / LOCK).write_text(text)
    assert main(["stop", str(tmp_path)]) == 2
    assert "no run" in capsys.readouterr().err
    assert (tmp_path / LOCK).exists() == (text is not None)


@pytest.mark.parametrize(
    ("text", "said"), [("process 1 on elsewhere\n", "elsewhere"), ("process -1 on here\n", "names no process")]
)
def test_only_a_process_of_this_machine_gets_a_signal(tmp_path, capsys, text, said):
    process = holder(tmp_path)
    try:
        (tmp_path / LOCK).write_text(text)  # the same file, which stays locked
        assert main(["stop", str(tmp_path)]) == 2
        assert said in capsys.readouterr().err and process.poll() is None
    finally:
        process.kill()
        process.wait()
