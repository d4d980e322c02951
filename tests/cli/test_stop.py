"""`dllm-rl stop` against a process that holds a run's lock."""

import subprocess
import sys

import pytest

from dllm_rl.cli.main import main
from dllm_rl.distributed.stop import LOCK

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
