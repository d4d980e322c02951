"""What a run says of its rollouts' order, and that an order with a law is scored as it was recorded."""

import pytest
from emulated import five_level_emulated
from run_outputs import metrics_of
from tiny_recipe import SIZES, tiny_recipe

from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.rng import generator_for
from dllm_rl.samplers.choose import order_agreement
from dllm_rl.samplers.rules import Confidence, MaxProb, PlackettLuce, RandomOrder
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.training.trainer import train
from dllm_rl.types.rollouts import Prompts

pytestmark = pytest.mark.usefixtures("no_rehearsal")

NAMES = {"rollout_corr/order_agreement", "rollout_corr/order_agreement_rows"}


def one_step(directory, rank, **changes):
    sampler = Unmask(max_new_tokens=16, diffusion_steps=2, temperature=1.0, rank=rank)
    train(tiny_recipe(directory, sampler=sampler, **{"num_steps": 1, **changes}))
    return metrics_of(directory)[0]


def test_agreement_is_logged_where_the_learner_would_choose_for_itself(tmp_path):
    row = one_step(tmp_path / "a", MaxProb(), rollout_quantization=five_level_emulated, num_steps=2)
    assert NAMES.isdisjoint(metrics_of(tmp_path / "a")[1]), "it takes a forward: every fifth step, from the first"
    assert 0 < row["rollout_corr/order_agreement"] < 1 and row["rollout_corr/order_agreement_rows"] < 1
    assert not NAMES & set(one_step(tmp_path / "b", MaxProb(), rollout_quantization=None))
    policy = tiny_masked_lm(**SIZES)
    prompts = Prompts.from_ids([[3, 4, 5, 6]] * 4, pad_id=policy.pad_id)
    for rank, is_compared in ((RandomOrder(), False), (Confidence(), False), (MaxProb(), True)):
        sampler = Unmask(max_new_tokens=16, diffusion_steps=2, temperature=1.0, rank=rank)
        found = order_agreement(policy, sampler(policy, prompts, generator_for(0)))
        assert bool(found) == is_compared


@pytest.mark.slow
@pytest.mark.parametrize("rank", [Confidence(), PlackettLuce(temperature=0.3)], ids=["confidence", "noisy"])
@pytest.mark.repeated(first_only=True)
def test_unquantized_the_orders_log_probs_have_no_mismatch_bit_for_bit(tmp_path, rank):
    """The sampler's record of tokens and order is what the learner finds, in micro-batches too, or the run stops."""
    settings = {"rollout_quantization": None, "zero_mismatch": True, "micro_batch_size": 4}
    row = one_step(tmp_path, rank, **settings)
    assert row["rollout_corr/abs_log_ratio_max"] == 0 and row["grad_norm"] > 0
    assert "symptoms/error_tokens_positive" not in row, "contributions are not log-probs of single tokens"
