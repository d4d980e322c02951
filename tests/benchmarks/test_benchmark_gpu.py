"""The GPU suite at toy size: every part on a CPU, the parts that hold no FP8 product under the simulated device too."""

import json

import pytest
import torch
from simulated_cuda import SimulatedCuda

from benchmarks import gpu, sampler


@pytest.mark.slow
@pytest.mark.parametrize("part", gpu.PARTS)
def test_every_part_runs_at_toy_size(part):
    rows = gpu.PARTS[part](True, "cpu")
    assert rows and all("what" in row for row in rows)
    assert all(row["seconds"] > 0 for row in rows if "tokens/s" in row)


@pytest.mark.parametrize("part", ["sampler", "sync", "learner"])
def test_on_the_simulated_device(part, monkeypatch):
    on_the_host = sampler.random_policy  # no generator draws on a device that is none
    monkeypatch.setattr(
        sampler, "random_policy", lambda shape, _, **more: on_the_host(shape, torch.device("cpu"), **more).to("cuda")
    )
    with SimulatedCuda():
        rows = gpu.PARTS[part](True, "cuda")
    assert len(rows) == {"sampler": 14, "sync": 2, "learner": 3}[part]


def test_a_part_that_fails_is_named_and_takes_nothing_with_it(monkeypatch, tmp_path, capsys):
    done = {"roofline": {"rows": [{"what": "a", "TFLOP/s": 1.0}], "seconds": 1.0}}
    broken = {"rows": [], "seconds": 2.0, "failed": "torch.OutOfMemoryError: CUDA out of memory"}
    monkeypatch.setattr(gpu, "in_own_process", lambda part, smoke, device: done.get(part, broken))
    monkeypatch.setattr("sys.argv", ["gpu", "--smoke", "--device", "cpu", "--json", str(tmp_path / "gpu.json")])
    assert gpu.main() == 1
    out = capsys.readouterr().out
    assert "| a | 1 |" in out and "sampler, 2.0 s: FAILED, torch.OutOfMemoryError" in out
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"]["roofline"] == done["roofline"]
    assert (tmp_path / "gpu.png").is_file()


@pytest.mark.slow
def test_a_part_in_its_own_process():
    found = gpu.in_own_process("roofline", True, "cpu")
    assert "failed" not in found and found["rows"][0]["TFLOP/s"] > 0
    assert gpu.in_own_process("roofline", True, "cuda:7")["failed"].strip()


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu", "--device", "cpu"])
    assert gpu.main() == 2 and "no GPU is here" in capsys.readouterr().err
    assert sampler.PRESETS["llada-8b"].layers == 32
