"""The command as a whole: its help, and what it refuses."""

import subprocess
import sys

import pytest

from dllm_rl.cli.main import main

EMPTY = [
    ["sample", "", "1"],
    ["sample", "model", "1", "--html", ""],
    ["evaluate", "model", "", "--task", "sudoku"],
    *(["evaluate", "model", "--task", "sudoku", f"--{name}", ""] for name in ("path", "output_dir", "csv", "plot")),
    ["grade", "", "--task", "sudoku"],
    ["doctor", ""],
    ["doctor", "model", "--output_dir", ""],
    ["report", ""],
    ["report", "run", "--out", ""],
    ["verify", ""],
]


@pytest.mark.parametrize("command", EMPTY, ids=" ".join)
def test_an_empty_name_is_refused_in_one_line(command, capsys):
    """As a variable that is not set leaves one: a folder's empty name is the present folder."""
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "='' is empty; give a file or folder" in error and error.count("\n") == 1


def test_help_lists_the_tasks_and_protocols_of_the_table(capsys):
    for command, tasks in (("evaluate", "sudoku, countdown, gsm8k or math500"), ("grade", "gsm8k or math500")):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        assert tasks in shown and "strict (default), d1, spg, espo or math-verify" in shown


def test_help_imports_no_torch():
    program = (
        "import sys; from dllm_rl.cli.main import main\ntry: main(['--help'])\nfinally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("\nFalse\n")
