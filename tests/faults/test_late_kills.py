"""Late rollouts with two learners and two Ray workers, of which processes are killed (`late_kills.py`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TURNS = ["worker", "other", "main"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "victims", [pytest.param(["worker", "main"], id="two"), pytest.param((TURNS * 7)[:20], marks=pytest.mark.nightly)]
)
def test_killed_workers_and_learners_change_no_bit(victims, tmp_path):
    pytest.importorskip("ray", reason="Ray is an optional extra")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])}
    command = [sys.executable, str(ROOT / "tests" / "faults" / "late_kills.py"), str(tmp_path), *victims]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == len(victims) and found["same weights"] and found["same numbers"], done.stdout
