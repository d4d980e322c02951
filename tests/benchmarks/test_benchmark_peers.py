"""The benchmark against d1 at its smoke size, with a stand-in of d1's checkout: what its functions do, written anew."""

import json

import pytest
import torch

from benchmarks import peers

D1 = """
import torch
import wandb
from datasets import Dataset
from torch.nn.functional import log_softmax
from trl.extras.profiling import profiling_decorator
from trl.trainer.grpo_trainer import GRPOTrainer


class DiffuGRPOTrainer(GRPOTrainer):
    def generate(self, model, prompt, steps, gen_length, block_length, temperature, mask_id):
        start, per_step = prompt.shape[1], gen_length // steps
        tokens = torch.cat([prompt, torch.full((len(prompt), gen_length), mask_id)], dim=1)
        for step in range(steps):
            end = start + (step * per_step // block_length + 1) * block_length
            probs = model(tokens).logits.softmax(-1)
            scores, best = probs.max(-1)
            scores = scores.masked_fill(tokens != mask_id, -1)
            scores[:, end:] = -1
            places = scores.topk(per_step).indices
            tokens = tokens.scatter(1, places, best.gather(1, places))
        return tokens

    def forward_process(self, batch, prompt_index, mask_id, seed):
        drawn = torch.rand(batch.shape, generator=torch.Generator().manual_seed(seed)) < self.args.p_mask_prompt
        return torch.where(drawn | ~prompt_index, mask_id, batch), None

    def _get_per_token_logps(self, model, input_ids, logits_to_keep, mask_seeds):
        (tokens,), (seed,) = input_ids, mask_seeds
        in_prompt = torch.arange(tokens.shape[1]) < tokens.shape[1] - logits_to_keep
        noisy, _ = self.forward_process(tokens, in_prompt, self.args.mask_id, seed)
        logps = log_softmax(model(noisy).logits, dim=-1).gather(-1, tokens[..., None])[..., 0]
        return logps[None, :, -logits_to_keep:] + SHIFT

    @profiling_decorator
    def compute_loss(self, model, inputs):
        tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        logps = self._get_per_token_logps(
            model, tokens[None], inputs["completion_ids"].shape[1], inputs["mask_seeds"]
        )[0]
        mask = inputs["completion_mask"]
        ratio = (logps - logps.detach()).exp()
        return -(ratio * inputs["advantages"][:, None] * mask).sum() / mask.sum()
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    def run(shift):
        (tmp_path / "diffu-grpo").mkdir()
        (tmp_path / "diffu-grpo" / "diffu_grpo_trainer.py").write_text(D1.replace("SHIFT", str(shift)))
        file = tmp_path / "peers.json"
        monkeypatch.setattr("sys.argv", ["peers", "--d1", str(tmp_path), "--smoke", "--json", str(file)])
        monkeypatch.setattr("torch.set_num_threads", lambda number: None)
        with torch.random.fork_rng():
            peers.main()
        return json.loads(file.read_text())

    return run


def test_smoke(run):
    (row,) = run(0.0)["rows"]
    assert {name for name in row if name.startswith("d1 / ours, step")} == {
        "d1 / ours, step",
        "d1 / ours, step, d1's masks",
        "d1 / ours, step, greedy",
    }
    assert all(value > 0 for name, value in row.items() if name.startswith("d1 / ours"))


def test_other_logprobs_are_an_error(run):
    with pytest.raises(ValueError, match=r"log-probs differ by 0\.001"):
        run(0.001)
