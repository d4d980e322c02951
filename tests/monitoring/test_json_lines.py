"""Files of rows that only grow: a kill, a full disk and a second start leave the rows that count."""

import errno
import json
import os

import pytest

from dllm_rl.monitoring.json_lines import JsonLines, current_rows, finite_numbers, warmup_rows
from dllm_rl.monitoring.log import RunLog
from dllm_rl.monitoring.plots import plot


def test_a_warm_up_that_is_begun_again_counts_once(tmp_path):
    rows = [
        '{"warmup_step": 0, "a": 1}',
        '{"warmup_step": 1, "a": 2}',
        '{"resume_from": 0}',
        '{"warmup_step": 0, "a": 3}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    assert warmup_rows(tmp_path / "metrics.jsonl") == [{"warmup_step": 0, "a": 3}]


@pytest.mark.parametrize(
    "tail",
    [b"null\n", b"17\n", b'"text"\n', b"[1]\n", b"\xff\xfe\n", b'{"step": 2, "rew', b'{"reward": 1}\n', b"\n"],
)
def test_no_tail_stops_a_resume(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0, "a": 1}\n{"step": 1, "a": 2}\n' + tail)
    log = RunLog(tmp_path, start=1, main=True)
    log.write(1, {"a": 3.0})
    log.close()
    assert [(row["step"], row["a"]) for row in current_rows(path)] == [(0, 1), (1, 3)]


def test_opening_a_file_cuts_off_half_a_line(tmp_path):
    """Other readers take no line that is not JSON."""
    path = tmp_path / "completions.jsonl"
    path.write_bytes(b'{"step": 0}\n{"step": 1, "compl')
    JsonLines(path, start=1).close()
    assert path.read_bytes() == b'{"step": 0}\n{"resume_from": 1}\n'


def test_what_a_disk_takes_in_parts_is_whole_and_a_full_one_ends_the_run(tmp_path, monkeypatch):
    full, write = [False], os.write

    def short(handle, content):
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, content[:7])

    log = RunLog(tmp_path, start=0, main=True)
    monkeypatch.setattr(os, "write", short)
    log.write(0, {"a": 1.0})
    log.write(1, {"a": 2.0})
    full[0] = True
    with pytest.raises(OSError, match=r"metrics\.jsonl: No space left on device; free disk space and resume"):
        log.write(2, {"a": 3.0})
    assert [row["a"] for row in current_rows(tmp_path / "metrics.jsonl")] == [1.0, 2.0]


def test_what_is_known_of_a_row_are_its_numbers():
    assert finite_numbers({"a": None, "b": 1.0}) == {"b": 1.0}


def test_what_is_no_number_of_a_run_is_not_drawn(tmp_path):
    values = ["1e999", "-1e999", '"x"', "[1]", "0.5", "0.25"]
    for first in ("reward", "loss"):  # a run of RL, and of SFT
        names = [first, f"eval/{first}", "grad_norm"]
        rows = [json.dumps({"step": i} | dict.fromkeys(names, "@")).replace('"@"', v) for i, v in enumerate(values)]
        (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
        assert plot(tmp_path).is_file()
