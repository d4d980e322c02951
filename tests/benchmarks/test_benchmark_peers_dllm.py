"""The benchmark against dllm's sampler at its smoke size, with a stand-in for its checkout, written anew."""

import json
import sys

import pytest
import torch

from benchmarks import peers_dllm

SAMPLER = """
import torch
from dllm.core.samplers.count import per_step


class MDLMSampler:
    def __init__(self, model, tokenizer):
        self.model, self.mask_id = model, tokenizer.mask_token_id

    @torch.no_grad()
    def sample(self, inputs, steps, max_new_tokens, block_size, temperature):
        prompts, count = torch.tensor(inputs), per_step(max_new_tokens, steps)
        tokens = torch.cat([prompts, torch.full((len(prompts), max_new_tokens), self.mask_id)], dim=1)
        for step in range(steps):
            end = prompts.shape[1] + (step * count // block_size + 1) * block_size
            scores, best = self.model(tokens).logits.softmax(-1).max(-1)
            scores = scores.masked_fill(tokens != self.mask_id, -1)
            scores[:, end:] = -1
            places = scores.topk(count).indices
            tokens = tokens.scatter(1, places, best.gather(1, places) + SHIFT)
        return tokens
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    def run(shift):
        folder = tmp_path / "dllm" / "core" / "samplers"
        folder.mkdir(parents=True)
        (tmp_path / "dllm" / "__init__.py").write_text("raise ImportError('of training')")
        (folder / "mdlm.py").write_text(SAMPLER.replace("SHIFT", str(shift)))
        (folder / "count.py").write_text("def per_step(length, steps):\n    return length // steps\n")
        file = tmp_path / "peers.json"
        monkeypatch.setattr("sys.argv", ["peers", "--dllm", str(tmp_path), "--smoke", "--json", str(file)])
        monkeypatch.setattr("torch.set_num_threads", lambda number: None)
        with torch.random.fork_rng():
            peers_dllm.main()
        return json.loads(file.read_text())

    return run


def test_smoke(run):
    (row,) = run(0)["rows"]
    assert row["dllm / ours"] > 0 and row["dllm / ours, greedy"] > 0 and row["steps"] == 4
    assert not [name for name in sys.modules if name.partition(".")[0] == "dllm"]


def test_other_tokens_are_an_error(run):
    with pytest.raises(ValueError, match="differ at temperature 0"):
        run(1)


def test_a_folder_that_is_no_checkout_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"has no dllm/core/samplers/mdlm\.py"):
        peers_dllm.dllm_sampler_class(str(tmp_path))
