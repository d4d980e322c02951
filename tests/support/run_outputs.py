"""What a run left in its folder, compared."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from dllm_rl.monitoring.plots import read_metrics

TIMES = ("time/", "step_time", "memory/", "waiting/")


def metrics_of(directory) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in read_metrics(Path(directory))]


def weights_of(summary) -> dict[str, torch.Tensor]:
    return load_file(Path(summary["checkpoint"]) / "model.safetensors")


def assert_same_weights(a, b, **tolerance):
    first, second = weights_of(a), weights_of(b)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **(tolerance or {"rtol": 0, "atol": 0}))
