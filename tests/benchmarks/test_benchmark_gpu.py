"""The GPU suite at toy size: every part on a CPU, the parts that hold no FP8 product under the simulated device too."""

import signal
import subprocess
import sys

import pytest
import torch
from simulated_cuda import SimulatedCuda

from benchmarks import gpu, sampler
from dllm_rl.files import read_json


@pytest.mark.nightly
@pytest.mark.parametrize("part", ["sampler 1", "sync", "learner"])
def test_on_the_simulated_device(part, monkeypatch):
    on_the_host = sampler.random_policy  # no generator draws on a device that is none
    monkeypatch.setattr(
        sampler, "random_policy", lambda shape, _, **more: on_the_host(shape, torch.device("cpu"), **more).to("cuda")
    )
    with SimulatedCuda():
        rows = list(gpu.PARTS[part](True, "cuda"))
    assert len(rows) == {"sampler 1": 6, "sync": 2, "learner": 3}[part]


def queue(monkeypatch, folder, *more):
    monkeypatch.setattr("sys.argv", ["gpu", "--rehearse", "--device", "cpu", "--queue", str(folder), *more])
    return gpu.main()


@pytest.mark.nightly
def test_the_whole_queue_runs_at_toy_size(monkeypatch, tmp_path):
    # All but the runs, which take the pretrained weights: test_gpu_run.py.
    monkeypatch.setattr(gpu, "QUEUE", [part for part in gpu.QUEUE if not part.startswith("run ")])
    assert queue(monkeypatch, tmp_path, "--minutes", "40") == 0
    for part in gpu.QUEUE:
        result = read_json(tmp_path / f"{part}.json")
        rows = result["rows"]
        assert result["rehearsal"] and rows and all("what" in row for row in rows)
        assert all(row["seconds"] > 0 for row in rows if "tokens/s" in row)
    names = {row["what"] for row in read_json(tmp_path / "sampler 8.json")["rows"]}
    assert {"exact", "FP8, dual cache, compiled", "plain: the published algorithm"} <= names


@pytest.mark.nightly
def test_a_part_that_fails_is_named_and_takes_nothing_with_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "QUEUE", ("roofline", "no such part"))
    assert queue(monkeypatch, tmp_path, "--minutes", "5") == 1
    out = capsys.readouterr().out
    assert "256^3 product, bf16" in out and "no such part, " in out and "FAILED, gpu.py: error: argument --part" in out
    assert "failed" not in read_json(tmp_path / "roofline.json")
    before = (tmp_path / "roofline.json").stat().st_mtime_ns
    monkeypatch.setattr(gpu, "in_own_process", None)  # what is there is not run again
    assert queue(monkeypatch, tmp_path) == 1 and (tmp_path / "roofline.json").stat().st_mtime_ns == before


@pytest.mark.nightly
def test_what_the_minutes_cut_off_runs_again(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "QUEUE", ("roofline",))
    assert queue(monkeypatch, tmp_path, "--minutes", "0.01") == 3
    assert "roofline: out of time" in capsys.readouterr().out and not list(tmp_path.iterdir())
    assert queue(monkeypatch, tmp_path, "--minutes", "5") == 0


def test_a_stopped_queue_ends_its_part(monkeypatch, tmp_path):
    """The part has a process group of its own, which Ctrl-C and a SIGTERM to the queue do not reach."""
    program, children = tmp_path / "python", []
    program.write_text("#!/bin/bash\nexec sleep 600\n")
    program.chmod(0o755)

    class Stopped(subprocess.Popen):
        def communicate(self, *args, **options):
            children.append(self)
            if len(children) == 1:
                raise KeyboardInterrupt
            return super().communicate(*args, **options)

    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(subprocess, "Popen", Stopped)
    with pytest.raises(KeyboardInterrupt):
        gpu.in_own_process("sync", True, "cpu", tmp_path, 60.0)
    assert children[0].returncode == -signal.SIGTERM and not (tmp_path / "sync.json").exists()


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu", "--device", "cpu", "--queue", "unused"])
    assert gpu.main() == 2 and "no GPU is here" in capsys.readouterr().err
    assert sampler.PRESETS["llada-8b"].layers == 32
