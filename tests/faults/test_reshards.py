"""Checkpoints of a learner that several processes share: another number of processes goes on, and a kill costs none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dllm_rl.checkpoints import checkpoint

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> tuple[Path, dict]:
    """The folder of the runs of reshards.py, and what it prints."""
    folder = tmp_path_factory.mktemp("reshards")
    names = {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "support"), str(ROOT)])}
    command = [sys.executable, str(HERE / "reshards.py"), str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | names, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, json.loads(done.stdout)


@pytest.mark.nightly
def test_every_number_of_processes_goes_on_from_every_other(told):
    """Weights and moments to fp32 rounding (4e-6 here, moments lost: 5e-3), and bit for bit where the number is the
    same. Of 4 processes the last holds no row of some weights."""
    _, found = told
    first = found["1 to 1"][4]
    assert first["grad_norm"] > 0
    for before in (1, 2, 3, 4):
        for after in (1, 2, 4):
            code, out, same, far, metrics = found[f"{before} to {after}"]
            assert code == 0, out
            assert far < 2e-5 and metrics == pytest.approx(first, rel=2e-3, abs=2e-5), (before, after)
            assert same == (before == after)


@pytest.mark.nightly
def test_a_kill_while_a_part_is_written_leaves_the_checkpoint_before(told):
    code, out, saved, same = told[1]["killed"]
    assert code == 75 and "error: process 1 (" in out and " is gone, last heard in " in out and saved == [0, 1]
    assert same is True, same


@pytest.mark.nightly
def test_a_damaged_part_is_named_and_skipped(told):
    folder = told[0] / "4" / "checkpoints"
    parts = sorted((folder / "step-000002").glob("optimizer-*"))
    assert [path.name[10:24] for path in parts] == [f"0000{n}-of-00004" for n in (1, 2, 3, 4)]
    content, said = bytearray(parts[2].read_bytes()), []
    content[-1] ^= 1
    parts[2].write_bytes(content)
    assert checkpoint.locate("latest", folder, say=said.append) == folder / "step-000001"
    assert said == [f"skipped {folder / 'step-000002'}: {parts[2].name} is damaged: its SHA-256 differs"]
    parts[2].unlink()
    with pytest.raises(ValueError, match=r"optimizer-00003-of-00004\.safetensors is missing"):
        checkpoint.check(folder / "step-000002")
