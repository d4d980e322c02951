"""The learner's parts, where a setting alone changes what is computed."""

import json

import pytest
import torch
from emulated import int3_emulated
from run_outputs import metrics_of
from tiny_recipe import tiny_recipe

from dllm_rl.algorithms.correctors import none
from dllm_rl.training.trainer import train


def test_under_autocast_a_later_inner_iteration_sees_the_weights_that_moved(tmp_path, monkeypatch):
    """As far from the step's start as without autocast's cache, which holds bf16 copies of the weights."""
    changes = {"bf16": True, "num_iterations": 2, "num_steps": 1, "kept_graphs": 0, "learning_rate": 0.01}
    train(tiny_recipe(tmp_path / "cached", **changes))
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: autocast(*a, **k | {"cache_enabled": False}))
    train(tiny_recipe(tmp_path / "not", **changes))
    cached, plain = (metrics_of(tmp_path / name)[0]["off_policy/old/m2/iteration_1"] for name in ("cached", "not"))
    assert cached == pytest.approx(plain, rel=0.02) and plain > 0


def test_with_ratios_against_the_rollout_the_steps_start_is_still_reported_as_such(tmp_path):
    changes = {"old_logprobs": "rollout", "corrector": none(), "rollout_quantization": int3_emulated}
    train(tiny_recipe(tmp_path, num_steps=1, **changes))
    row = metrics_of(tmp_path)[0]
    assert row["off_policy/old/m2"] < 1e-8 < 1e-6 < row["off_policy/rollout/m2"]


def test_an_update_makes_weights_of_the_next_version(tmp_path):
    """One more a step, however many inner updates it has: what late and aligned rollouts are told apart by."""
    summary = train(tiny_recipe(tmp_path, num_iterations=2, save_steps=1, save_total_limit=9))
    assert summary.policy.version == 2
    states = sorted((tmp_path / "checkpoints").glob("step-*/state.json"))
    assert [json.loads(path.read_text())["version"] for path in states] == [0, 1, 2]
