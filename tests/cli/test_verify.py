"""`dllm-rl verify`: which checkpoints are whole."""

from pathlib import Path

import pytest
from tiny_recipe import tiny_recipe

from dllm_rl.cli.main import main
from dllm_rl.training import train


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of three steps with a checkpoint of each."""
    train(tiny_recipe(tmp_path / "run", num_steps=3, save_steps=1, save_total_limit=9))
    return tmp_path / "run"


def test_the_command_says_which_are_whole(run, capsys):
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.count("whole") == 4
    state = run / "checkpoints" / "step-000002" / "state.json"
    state.write_text(state.read_text().replace("0", "1", 1))
    assert main(["verify", str(run)]) == 1
    out = capsys.readouterr().out
    assert out.count("whole") == 3 and "step-000002: state.json is damaged: its SHA-256 differs" in out
    assert main(["verify", str(run / "checkpoints" / "step-000003"), "--quick"]) == 0
    assert main(["verify", str(run.parent)]) == 2
    assert "neither a checkpoint nor a run" in capsys.readouterr().err
