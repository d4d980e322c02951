"""The benchmark against TRL's trainer at its smoke size."""

import pytest
import torch

pytest.importorskip("trl")
from benchmarks import peers_trl
from dllm_rl import Autoregress
from dllm_rl.models.policy import make_policy

(SIZE,) = peers_trl.SMOKE


@pytest.mark.nightly
def test_both_take_as_many_steps(monkeypatch):
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    seen = []
    monkeypatch.setattr(peers_trl.Measured, "least", lambda self, name: seen.append(len(self.seconds[name])) or 1.0)
    with torch.random.fork_rng():
        row = peers_trl.compared(sizes=SIZE, repeats=2)
    assert seen == [peers_trl.WARM_UP + 2] * 4
    assert row["TRL / ours, step"] == row["TRL / ours, generation"] == 1 and row["peak_mib"].keys() == {"TRL", "ours"}


def test_other_completions_are_an_error():
    with torch.random.fork_rng():
        model, other = peers_trl.model_of(SIZE.vocabulary), peers_trl.model_of(SIZE.vocabulary)
        torch.nn.init.normal_(other.lm_head.weight)
    policy = make_policy(other, peers_trl.tokenizer_of(SIZE.vocabulary))
    sampler = Autoregress(max_new_tokens=SIZE.new, suppress=("<eos>",))
    peers_trl.check_greedy(SIZE, other, policy, sampler)
    with pytest.raises(ValueError, match="differ at temperature 0"):
        peers_trl.check_greedy(SIZE, model, policy, sampler)
