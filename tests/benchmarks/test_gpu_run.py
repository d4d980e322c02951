"""The run on a GPU at toy size, on a small causal model in place of SmolLM2: rows, marks, and how it goes on."""

import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from simulated_cuda import SimulatedCuda

from benchmarks import gpu_run
from dllm_rl.files import read_json
from dllm_rl.models.tiny import tiny_llama
from dllm_rl.monitoring.plots import read_metrics
from recipes import weights

ROOT = Path(__file__).parents[2]
NAMES = ["sums, rollouts in FP8", "sums, rollouts in bf16", "countdown, rollouts in FP8", "countdown, rollouts in bf16"]


@pytest.fixture(autouse=True)
def small_model(monkeypatch, tmp_path):
    sizes = {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    tiny_llama(characters="0123456789 +-()=>,", causal=True, **sizes).save_pretrained(tmp_path / "small")
    monkeypatch.setattr(weights, "smollm2", lambda: tmp_path / "small")


def both_tasks(folder):
    return [row for task in gpu_run.TASKS for row in gpu_run.run(folder, True, task)]


def test_it_goes_on_after_an_interruption_and_marks_a_rehearsal(monkeypatch, tmp_path):
    folder, real, calls = tmp_path / "run", gpu_run.train, []

    def interrupted(recipe):
        calls.append(recipe.directory)
        if len(calls) == 2:  # the second arm, after one of its two steps
            real(gpu_run.replace(recipe, num_steps=1, lr_schedule_steps=2))
            (Path(recipe.directory) / "summary.json").unlink()
            raise KeyboardInterrupt
        return real(recipe)

    monkeypatch.setattr(gpu_run, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        both_tasks(folder)
    stored = read_json(folder / "curves.json")
    assert stored["rehearsal"] is True and list(stored["runs"]) == ["sums-FP8"]
    first = (folder / "sums-FP8" / "metrics.jsonl").read_bytes()

    monkeypatch.setattr(gpu_run, "train", real)
    rows = both_tasks(folder)
    assert [row["what"] for row in rows] == NAMES
    assert all(row["steps with a gradient"] == row["steps"] == 2 and row["least grad_norm"] > 0 for row in rows)
    assert (folder / "sums-FP8" / "metrics.jsonl").read_bytes() == first, "what has ended is not run again"
    assert [row["step"] for row in read_metrics(folder / "sums-bf16")] == [0, 1]
    assert set(read_json(folder / "curves.json")["runs"]) == {f"{t}-{a}" for t in gpu_run.TASKS for a in gpu_run.ARMS}
    assert (folder / "curves.png").stat().st_size > 10_000


def test_both_arms_differ_in_the_rollouts_alone(tmp_path):
    fp8, bf16 = (gpu_run.rewarded("sums", arm, "model", tmp_path, False) for arm in gpu_run.ARMS)
    same = {"rollout_quantization": None, "output_dir": "same"}
    assert fp8.rollout_quantization is not None and bf16.rollout_quantization is None and fp8.seed == bf16.seed
    assert gpu_run.replace(fp8, **same) == gpu_run.replace(bf16, **same)


def test_a_run_without_a_gradient_fails(tmp_path):
    both_tasks(tmp_path)
    recipe = gpu_run.rewarded("sums", "FP8", "model", tmp_path, True)
    metrics = tmp_path / "sums-FP8" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"frac_reward_zero_std": 0.0', '"frac_reward_zero_std": 1.0'))
    with pytest.raises(ValueError, match="not every step trained"):
        gpu_run.told("sums", "FP8", recipe, gpu_run.done(tmp_path / "sums-FP8"))


def test_on_the_simulated_device(monkeypatch, tmp_path):
    # A kept graph of two views ends in a copy into a slice, whose gradient torch makes on the real device.
    monkeypatch.setattr(gpu_run, "REHEARSED", gpu_run.REHEARSED | {"max_retained_graphs": 1})
    with SimulatedCuda():
        rows = both_tasks(tmp_path)
    assert [row["what"] for row in rows] == NAMES


def driver(folder, **environment):
    command = ["bash", str(folder / "benchmarks" / "gpu_minutes.sh"), "--rehearse", "--minutes", "0.01"]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def test_the_driver_waits_for_the_second_part(tmp_path):
    from sys import executable

    from benchmarks import parcels

    for name in ("benchmarks", "recipes", "dllm_rl"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "whole").write_bytes(b"weights")
    parcels.split(tmp_path / "whole", tmp_path / "runs" / "parcels")
    (tmp_path / "runs" / "parcels" / "2").rename(tmp_path / "later")
    done = driver(tmp_path, PYTHON=executable)
    assert done.returncode == 3 and "part 2 of 2 is missing: send runs/parcels/2" in done.stderr


def test_a_stopped_driver_ends_the_queue_and_keeps_what_it_has(tmp_path):
    """A bash that ended at once would leave a part running on the GPU, and no archive of the results."""
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    (tmp_path / "out").mkdir()
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/bash\ntrap 'touch runs/rehearsal/ended; exit 143' TERM\nmkdir -p runs/rehearsal\n"
        "echo [] > runs/rehearsal/sync-rows.json\nwhile :; do sleep 0.05; done\n"
    )
    python.chmod(0o755)
    # Started from the place that the link names, the script goes to its own folder's parent.
    command = ["bash", "benchmarks/gpu_minutes.sh", "--rehearse"]
    environment = os.environ | {"PYTHON": str(python), "OUT": str(tmp_path / "out")}
    running = subprocess.Popen(command, cwd=tmp_path, env=environment)
    while not (tmp_path / "runs/rehearsal/sync-rows.json").exists():
        assert running.poll() is None
    running.terminate()
    assert running.wait() == 143
    with tarfile.open(tmp_path / "out/results.tar.gz") as archive:
        assert {"runs/rehearsal/sync-rows.json", "runs/rehearsal/ended"} <= {*archive.getnames()}
