"""`dllm-rl check-trace`: its table, its JSON, its status, and what it refuses."""

import json
from dataclasses import replace

import pytest
from tiny_recipe import SIZES
from torch import Generator

from dllm_rl import Unmask
from dllm_rl.cli.main import main
from dllm_rl.diagnostics.traces import write_trace
from dllm_rl.models.tiny import tiny_llama
from dllm_rl.types.rollouts import Prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, a clean trace of it, and one whose log-probs are of another temperature than is recorded."""
    folder = tmp_path_factory.mktemp("traces")
    policy = tiny_llama(**SIZES, causal=False, head_std=0.15)
    policy.save_pretrained(folder / "model")
    prompts = Prompts.from_ids([[3, 4, 5], [6]], pad_id=policy.pad_id, num_generations=2)
    sampler = Unmask(max_new_tokens=6, diffusion_steps=3, temperature=0.7)
    rollout = sampler(policy, prompts, Generator().manual_seed(0))
    write_trace(folder / "clean.jsonl", rollout)
    other = replace(rollout, sampling_params=replace(rollout.sampling_params, temperature=1.5))
    write_trace(folder / "other.jsonl", other)
    (folder / "bad.jsonl").write_text('{"format": "\\u001b]0;x", "version": 1}')
    return folder


def run(folder, name, *options):
    return main(["check-trace", str(folder / name), "--model", str(folder / "model"), "--device", "cpu", *options])


def test_a_clean_trace_ends_with_0_and_another_temperature_with_1(folder, capsys):
    assert run(folder, "clean.jsonl") == 0
    shown = capsys.readouterr().out
    assert "trace of 4 rows, 4 replayed" in shown and "log-probs agree" in shown and "positions" not in shown.split()
    assert run(folder, "other.jsonl") == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "above 0.02" in shown and "other weights (stale, quantized), tokens, temperature" in shown
    assert run(folder, "other.jsonl", "--temperature", "0.7") == 0  # the one that sampled


def test_the_report_as_json(folder, capsys):
    assert run(folder, "other.jsonl", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"].startswith("logprobs: ") and not found["ok"] and found["total"]["num_tokens"] == 24
    assert [part["name"] for part in found["parts"]][:3] == ["step 0", "step 1", "step 2"]
    assert run(folder, "other.jsonl", "--bound", "9") == 0


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("bad.jsonl", (), "line 1: format and version are not 'dllm_rl_trace' and 1"),
        ("none.jsonl", (), "none.jsonl: No such file or directory"),
        ("clean.jsonl", ("--bound", "nan"), "bound=nan must be at least 0"),
        ("clean.jsonl", ("--batch_size", "0"), "batch_size=0 must be at least 1"),
        ("clean.jsonl", ("--top_k", "0"), "top_k=0 must be at least 1"),
        ("clean.jsonl", ("--model", ""), "model='' is empty"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(folder, capsys, name, options, said):
    assert run(folder, name, *options) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and "\x1b" not in error
