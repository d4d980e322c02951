"""A sample of the campaign of faults (`python -m tests.faults`), and runs that are stopped in a known place."""

import json
import os
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
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, **options
    )


@pytest.mark.slow
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
        ("SIGUSR1", 138, [0, 2], "interrupted after step 2; continue with --resume_from_checkpoint latest"),
        ("Ctrl-C", 130, [0, 2], "interrupted after step 2; continue with --resume_from_checkpoint latest"),
        ("overdue", 143, [0, 1], "stopped in the step after step 1, which is saved; continue with"),
        ("overdue, LoRA", 129, [0, 1], "stopped in the step after step 1, which is saved; continue with"),
        ("overdue, grading", 143, [0, 1], "stopped in the step after step 1, which is saved; continue with"),
        ("Ctrl-C, grading", 130, [0, 2], "interrupted after step 2; continue with --resume_from_checkpoint latest"),
        ("second Ctrl-C", 130, [0], "stopped at once by a second Ctrl-C: the step in hand was not saved"),
        ("two processes", 143, [0, 2], "interrupted after step 2; continue with --resume_from_checkpoint latest"),
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


@pytest.mark.slow
@pytest.mark.parametrize("case", ["raises", "dies", "is stuck"])
def test_a_process_that_is_lost_is_told_by_the_others_and_costs_no_step(processes, case):
    code, out, saved, same = processes[case]
    said = [
        line for line in out.splitlines() if line.startswith("process 0: the step after step 1 failed: another pro")
    ]
    assert code == 1 and len(said) == 1 and "--resume_from_checkpoint latest" in said[0], out
    assert ("process 1: the step after step 1 failed; mend the cause" in out) == (case == "raises")
    assert saved == [0, 1] and same is True, same


@pytest.mark.slow
def test_a_training_process_does_not_outlive_its_launcher(tmp_path):
    """The launcher is killed; its child, which waits for signals only, must end by itself."""
    program = tmp_path / "program.py"
    program.write_text(
        f"import os, sys\nsys.path[:0] = {[str(ROOT / 'tests' / 'faults'), *SUPPORT]!r}\n"
        "from stops import Signalling\nfrom scenarios import small_recipe\nfrom dllm_rl.training import train\n"
        "print(os.getpid(), flush=True)\n"
        "task = Signalling(39, wait=True)\n"
        "class Said(type(task)):\n"
        "    def __getitem__(self, index):\n"
        "        if self.taken + 1 == self.at: print('waiting', flush=True)\n"
        "        return super().__getitem__(index)\n"
        f"train(small_recipe({str(tmp_path / 'run')!r}, 'plain', task=Said(39, wait=True), stop_seconds=0.0))\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", str(program)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as launcher:
        lines = iter(launcher.stdout.readline, "")
        child = next(int(line) for line in lines if line.strip().isdigit())
        assert any("waiting" in line for line in lines)
        launcher.send_signal(signal.SIGKILL)
        rest = launcher.stdout.read()  # ends when the child, the last to hold the pipe, has ended
    assert "stopped in the step after step 1, which is saved" in rest
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]
    assert (tmp_path / "run" / "checkpoints" / "step-000001").is_dir()
