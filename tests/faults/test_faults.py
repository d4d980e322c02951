"""A sample of the campaign of faults (`python -m tests.faults`), and runs that are stopped in a known place."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUPPORT = [str(ROOT / "tests" / "support"), str(ROOT)]


def python(*arguments: str, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(SUPPORT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, **options
    )


@pytest.mark.nightly
def test_a_sample_of_kills_signals_full_disks_and_damage_loses_nothing():
    done = python("-m", "tests.faults", "--count", "20", "--damages", "8", "--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr


def results_of(script: str, folder: Path) -> dict:
    """What a script of this folder prints, as JSON."""
    done = python(str(ROOT / "tests" / "faults" / script), str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def stops(tmp_path_factory) -> dict:
    return results_of("stops.py", tmp_path_factory.mktemp("stops"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "status", "saved", "said"),
    [
        ("warm-up", 129, [], "nothing new was saved; start again with the same command"),
        ("warm-up, two processes", 143, [], "nothing new was saved; start again with the same command"),
        ("SIGUSR1", 138, [0, 2], "interrupted after step 2; continue with resume_from_checkpoint='latest'"),
        ("Ctrl-C", 130, [0, 2], "interrupted after step 2; continue with resume_from_checkpoint='latest'"),
        ("overdue", 143, [0, 1], "stopped in the step after step 1, which is saved; continue with"),
        ("overdue, LoRA", 129, [0, 1], "stopped in the step after step 1, which is saved; continue with"),
        ("overdue, grading", 143, [0, 1], "stopped in the step after step 1, which is saved; continue with"),
        ("Ctrl-C, grading", 130, [0, 2], "interrupted after step 2; continue with resume_from_checkpoint='latest'"),
        ("second Ctrl-C", 130, [0, 1], "stopped in the step after step 1, which is saved; continue with"),
        ("two processes", 143, [0, 2], "interrupted after step 2; continue with resume_from_checkpoint='latest'"),
        ("two processes, overdue", 143, [0, 1], "stopped in the step after step 1, which is saved; continue with"),
    ],
)
def test_a_signal_saves_what_is_whole_and_the_resumed_run_is_the_same(stops, case, status, saved, said):
    code, out, steps, same = stops[case]
    assert code == status and steps == saved and said in out and "Traceback" not in out, out
    assert same is True, same


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> dict:
    return results_of("processes.py", tmp_path_factory.mktemp("processes"))


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("raises", "error: process 1 (HOST) raised RuntimeError: the grader of task 'faulty' raised on problem"),
        ("dies", "error: process 1 (HOST) is gone, last heard in "),
        ("is stopped", "error: process 1 (HOST) has been silent for peer_timeout=4 s, last heard in "),
        ("is stopped, the first", "error: process 0 (HOST) has been silent for peer_timeout=4 s, last heard in "),
        (
            "is stopped, weights shared out",
            "error: process 2 (HOST) has been silent for peer_timeout=4 s, last heard in ",
        ),
    ],
)
def test_a_process_that_is_lost_is_named_once_by_the_others_and_costs_no_step(processes, case, said):
    """The others end with 75. Of the main process itself, and of weights that are shared out, nobody is left to save
    the step in between."""
    code, out, saved, same = processes[case]
    lines = [re.sub(r"\(\S+, pid \d+\)", "(HOST)", line) for line in out.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and lines[0].startswith(said), out
    # A process that stops in its reward may have told its rollout last.
    stage = "reward" if case == "raises" else "(reward|rollout)"
    assert re.search(rf"in {stage}, after 1 steps.*this run ends; continue with (--)?resume_from_checkp", lines[0])
    assert code == (-signal.SIGKILL if "first" in case else 75)
    note = "process 1, whose last stage was reward: failed after step 1 was complete; fix the cause"
    assert (note in out) == (case == "raises")
    assert out.count("Traceback") == (2 if case == "raises" else 0), "the process's own, and what its error came from"
    assert saved == ([0] if "," in case else [0, 1]) and (same is True or "shared" in case), same


@pytest.mark.nightly
def test_a_process_that_is_stuck_is_named_with_its_stage(processes):
    """It lives, so that the limit of an exchange ends the run."""
    code, out, saved, same = processes["is stuck"]
    start = "^process 0, whose last stage was .*: failed after step 1 was complete: another pro.*$"
    said = re.findall(start, out, re.MULTILINE)
    assert code == 1 and len(said) == 1 and "resume_from_checkpoint='latest'" in said[0], out
    assert re.search(r"^process 1 \(\S+, pid \d+\) was last heard in reward, after 1 steps$", out, re.MULTILINE), out
    assert saved == [0, 1] and same is True, same


@pytest.mark.nightly
def test_a_process_that_waits_for_an_engine_is_not_lost(processes):
    code, out, _, same = processes["waits for an engine"]
    assert code == 0 and same is True, out
