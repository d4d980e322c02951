"""A format of one's own, with random numbers: drawn anew at each sync, the same wherever the weights are the same."""

import pytest
import torch
from readme import example
from run_outputs import metrics_of
from tiny_recipe import MOE_SIZES, ONE_PUZZLE, tiny_recipe

from dllm_rl import Lora, quantized_copy, train
from dllm_rl.models.lora import add_lora
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm, tiny_moe
from dllm_rl.quantization.rollout_policy import quantized_layers, sync_weights
from dllm_rl.quantization.schemes import EmulatedLinear, Rounding

SIZES = {"characters": "1234.=", "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def stochastic():
    """The scheme of the page."""
    made = {"__name__": "page"}
    exec(example("Quantization schemes"), made)
    return made["Stochastic"]


def weights(policy):
    return {name: layer.weight.clone() for name, layer in quantized_layers(policy)}


def equal(one, other):
    return [torch.equal(one[name], other[name]) for name in one]


def test_the_pages_rounding_goes_to_neighbors_and_keeps_the_mean(stochastic):
    weight = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    drawn = torch.stack([EmulatedLinear(weight, None, stochastic(), "a", version).weight for version in range(400)])
    scale = weight.abs().amax(-1, keepdim=True) / 7
    assert ((drawn - weight).abs() < scale * 1.001).all()
    error = (drawn.mean(0) - weight).abs()
    assert (error < 5 * scale / 2 / 400**0.5).all(), "a draw's standard deviation is at most half of the distance"
    assert drawn.std(0).max() > 0.4 * scale.min()


@pytest.mark.parametrize("make", [tiny_masked_lm, tiny_llama, tiny_moe, "lora"])
def test_a_sync_draws_what_a_new_copy_of_these_weights_would(stochastic, make):
    sizes = {"causal": False} if make in (tiny_llama, tiny_moe, "lora") else {}
    make_policy = tiny_llama if make == "lora" else make
    policy = make_policy(**(MOE_SIZES if make is tiny_moe else SIZES), **sizes)
    if make == "lora":
        add_lora(policy, Lora(r=2))
    state = torch.random.get_rng_state()
    copy, other = (quantized_copy(policy, stochastic()) for _ in range(2))
    first = weights(copy)
    assert all(equal(first, weights(other)))
    sync_weights(policy, copy)
    assert all(equal(first, weights(copy))), "the same version"
    policy.weights_version += 1
    metrics = sync_weights(policy, copy)
    assert not any(equal(first, weights(copy))) and 0.1 < metrics["quantization/codes_changed"] < 1
    assert all(equal(weights(quantized_copy(policy, stochastic())), weights(copy)))
    assert torch.equal(torch.random.get_rng_state(), state)
    tokens = torch.arange(3, 9)[None]
    assert copy.logits(tokens, torch.ones_like(tokens, dtype=torch.bool)).isfinite().all()


def test_layers_of_one_shape_draw_different_numbers():
    class Noise(Rounding):
        def rounded(self, weight, generator):
            return torch.rand(weight.shape, generator=generator, device=weight.device)

    drawn = weights(quantized_copy(tiny_llama(**SIZES, causal=False), Noise()))
    square = [weight for weight in drawn.values() if weight.shape == (32, 32)]
    assert len(square) >= 8
    assert not any(torch.equal(one, other) for i, one in enumerate(square) for other in square[:i])


@pytest.mark.slow
@pytest.mark.usefixtures("no_rehearsal")
def test_a_resumed_run_draws_what_the_run_would_have_drawn(stochastic, tmp_path):
    settings = {"rollout_quantization": stochastic(), "learning_rate": 1e-3, "lr_schedule_steps": 4, **ONE_PUZZLE}
    train(tiny_recipe(tmp_path / "whole", num_steps=4, **settings))
    train(tiny_recipe(tmp_path / "parts", num_steps=2, **settings))
    again = {"resume_from_checkpoint": "latest", "allow_changed": "num_steps"}
    train(tiny_recipe(tmp_path / "parts", num_steps=4, **settings, **again))
    mine, other = (metrics_of(tmp_path / name) for name in ("whole", "parts"))
    for name in ("loss", "reward", "rollout_corr/abs_log_ratio_max"):
        assert [row[name] for row in mine] == [row[name] for row in other]


def test_what_is_refused():
    class Wide(Rounding):
        def rounded(self, weight, generator):
            return weight[:, :1]

    class Infinite(Rounding):
        def rounded(self, weight, generator):
            return weight / 0

    policy = tiny_llama(**SIZES, causal=False)
    with pytest.raises(ValueError, match="Rounding has no format: write a subclass that defines rounded"):
        quantized_copy(policy, Rounding())
    with pytest.raises(ValueError, match=r"Wide.rounded returned .*\[32, 1\].* for the weight of model.layers.0"):
        quantized_copy(policy, Wide())
    with pytest.raises(ValueError, match="has NaN or infinity"):
        quantized_copy(policy, Infinite())


def test_a_scheme_may_write_into_the_weight_that_it_gets(stochastic):
    class InPlace(Rounding):
        def rounded(self, weight, generator):
            return weight.zero_()

    policy = tiny_llama(**SIZES, causal=False)
    before = {name: tensor.clone() for name, tensor in policy.module.state_dict().items()}
    copy = quantized_copy(policy, InPlace())
    assert not any(weight.any() for weight in weights(copy).values())
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.module.state_dict().items())
