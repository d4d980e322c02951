"""DiffusionGemma as a policy: opened, saved, quantized, adapted, and scored as it was sampled."""

import json

import pytest
import torch
import transformers
from refusals import refused, refuses
from repetitions import slow

from dllm_rl import Lora, Prompts, Trajectory, Unmask, load_policy
from dllm_rl.models.forward.batch_invariance import batch_invariant
from dllm_rl.models.lora import add_lora
from dllm_rl.models.merge import merge_lora
from dllm_rl.models.tiny import tiny_diffusion_gemma
from dllm_rl.quantization.rollout_policy import quantized_copy, sync_weights
from dllm_rl.quantization.schemes import FakeQuantize, Float8WeightOnly
from dllm_rl.samplers import Renoise
from dllm_rl.testing import check_policy

pytestmark = pytest.mark.skipif(
    not hasattr(transformers, "DiffusionGemmaConfig"), reason="this transformers has no DiffusionGemma"
)
SHORT = {"max_new_tokens": 8, "diffusion_steps": 2, "stability_threshold": None, "confidence_threshold": None}


@pytest.fixture(scope="module")
def policy():
    return tiny(0)


def tiny(seed):
    sizes = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "sliding_window": 4,
    }
    return tiny_diffusion_gemma(characters="abcdefg", seed=seed, canvas_length=4, embedding_std=0.5, **sizes)


def sampled(policy, *, num_generations=2, seed=0, **changes):
    prompts = Prompts.from_ids([[3, 4, 5, 6, 7, 3], [8]], pad_id=policy.pad_id, num_generations=num_generations)
    return Renoise(**SHORT | {"answer": "drawn"} | changes)(policy, prompts, torch.Generator().manual_seed(seed))


def scored(policy, rollout, estimator=None):
    estimator = estimator or Trajectory()
    views = estimator.draw_views(rollout, torch.Generator())
    with torch.no_grad():
        return estimator.logprobs(policy, rollout, views)


def test_saved_it_opens_again_here_and_in_transformers(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    again = load_policy(tmp_path)
    rollout = sampled(policy)
    assert (sampled(again).tokens == rollout.tokens).all()
    stock = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path).eval()
    tokens = torch.tensor([[3, 4, 5], [6, 7, 8]])
    canvas = torch.tensor([[3, 3, 4, 4], [5, 6, 7, 8]])
    outs = []
    for module in (policy.module, again.module, stock):
        with torch.no_grad():
            outs.append(module(input_ids=tokens, decoder_input_ids=canvas).logits)
    for name, tensor in policy.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[name], tensor) and torch.equal(stock.state_dict()[name], tensor)
    # Logits to rounding: the memory of loaded weights may be aligned otherwise.
    assert (outs[0] - outs[1]).abs().max() < 1e-5 and (outs[0] - outs[2]).abs().max() < 1e-5
    assert again.spec.block_size == 4 and again.spec.attention == "encoder_decoder" and again.spec.mask_id is None


def test_encoder_and_decoder_hold_the_same_layers(policy):
    reader, writer = policy.module.model.encoder.language_model, policy.module.model.decoder
    for ours, theirs in zip(reader.layers, writer.layers, strict=True):
        assert ours.self_attn.q_proj is theirs.self_attn.q_proj and ours.mlp is theirs.mlp
        assert ours.experts is theirs.experts and ours.router is theirs.router
        assert ours is not theirs and ours.layer_scalar is not theirs.layer_scalar  # transformers does not tie it


@pytest.mark.parametrize("answer", ["argmax", slow("drawn")])
def test_zero_mismatch_unquantized(policy, answer):
    """Bit for bit in batch-invariant arithmetic, whichever rows are scored together."""
    with batch_invariant():
        rollout = sampled(policy, answer=answer)
        estimator = Trajectory()
        views = estimator.draw_views(rollout, torch.Generator())
        with torch.no_grad():
            for size in (None, 2):
                ours = estimator.logprobs(policy, rollout, views, micro_batch_size=size)
                assert torch.equal(ours, rollout.logprobs)
    plain = sampled(policy, answer=answer)
    assert (scored(policy, plain) - plain.logprobs).abs().max() < 1e-4  # of rounding: 2e-6 was seen


def test_rows_of_two_batches_are_scored_together(policy):
    """`Rollout.concatenate` pads narrower parts on the right, so that completions begin at different columns."""
    parts = [sampled(policy, seed=1)]
    short = Prompts.from_ids([[4, 5]], pad_id=policy.pad_id, num_generations=2)
    parts.append(Renoise(**SHORT | {"answer": "drawn"})(policy, short, torch.Generator().manual_seed(3)))
    whole = type(parts[0]).concatenate(parts, pad_id=policy.pad_id)
    assert (scored(policy, whole) - whole.logprobs).abs().max() < 1e-4
    wider = whole.padded(3, pad_id=policy.pad_id)
    assert (scored(policy, wider) - wider.logprobs).abs().max() < 1e-4


def test_a_row_depends_on_its_prompt_and_seed_alone(policy):
    ids, seeds = [[3, 4, 5, 6], [8]], [11, 12]
    together = Renoise(**SHORT)(policy, Prompts.from_ids(ids, pad_id=0, seeds=seeds), torch.Generator())
    for row, (one, seed) in enumerate(zip(ids, seeds, strict=True)):
        alone = Renoise(**SHORT)(policy, Prompts.from_ids([one], pad_id=0, seeds=[seed]), torch.Generator())
        mine = together.completion_mask[row]
        assert together.tokens[row][mine].tolist() == alone.tokens[0][alone.completion_mask[0]].tolist()


@pytest.mark.parametrize("scheme", [Float8WeightOnly, slow(FakeQuantize)])
def test_a_quantized_copy_has_both_sides_and_the_experts(scheme):
    policy = tiny(1)
    copied = quantized_copy(policy, scheme())
    names = copied.quantization_report.quantized
    for part in ("self_attn.q_proj", "mlp.down_proj", "experts.gate_up_proj.1", "experts.down_proj.0"):
        assert any(name.endswith(part) for name in names), part
    reader, writer = copied.module.model.encoder.language_model, copied.module.model.decoder
    assert reader.layers[0].experts is writer.layers[0].experts
    assert reader.layers[0].self_attn.q_proj is writer.layers[0].self_attn.q_proj
    rollout = sampled(copied)
    assert (scored(copied, rollout) - rollout.logprobs).abs().max() < 1e-4
    apart = (scored(policy, rollout) - rollout.logprobs).abs().max()
    assert 1e-4 < apart < 5
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    sync_weights(policy, copied)
    fresh = quantized_copy(policy, scheme())
    assert torch.equal(scored(copied, rollout), scored(fresh, rollout))


@pytest.mark.slow
def test_adapters_are_one_for_both_sides():
    policy = tiny(2)
    rollout = sampled(policy, diffusion_steps=3)
    before = scored(policy, rollout)
    add_lora(policy, Lora(r=2, experts=True))
    assert torch.equal(scored(policy, rollout), before)
    reader, writer = policy.module.model.encoder.language_model, policy.module.model.decoder
    assert reader.layers[1].self_attn.q_proj is writer.layers[1].self_attn.q_proj
    with torch.no_grad():
        for name, parameter in policy.module.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    adapted = scored(policy, rollout)
    assert (adapted - before).abs().max() > 1e-3
    assert (scored(policy.reference(), rollout) - before).abs().max() < 1e-5
    merge_lora(policy)
    assert (scored(policy, rollout) - adapted).abs().max() < 1e-4


@pytest.mark.slow
def test_memory_of_a_detached_view_is_of_one_step():
    """Tensors that autograd saves during a backward, at most at once: as many for nine steps as for three."""

    def most_saved(estimator, steps):
        policy = tiny(3)
        rollout = sampled(policy, diffusion_steps=steps, entropy_bound=0.5)
        views = estimator.draw_views(rollout, torch.Generator())
        vectors = rollout.completion_mask[None].float()
        held = {"now": 0, "most": 0}

        class Held:
            def __init__(self, tensor):
                self.tensor = tensor
                held["now"] += 1
                held["most"] = max(held["most"], held["now"])

            def __del__(self):
                held["now"] -= 1

        with torch.autograd.graph.saved_tensors_hooks(Held, lambda one: one.tensor):
            estimator.backward(policy, rollout, views, vectors)
        return held["most"]

    few, many = (most_saved(Trajectory(), steps) for steps in (3, 9))
    assert many <= 1.05 * few
    few, many = (most_saved(Trajectory(self_conditioning="full"), steps) for steps in (3, 9))
    assert many > 2 * few


def test_the_gradient_reaches_the_encoder_as_in_one_graph():
    """The cut cache gives the gradient of one graph through encoder and decoder, over two canvases."""
    policy = tiny(4)
    rollout = sampled(policy)
    estimator = Trajectory()
    views = estimator.draw_views(rollout, torch.Generator())
    vectors = torch.randn(views.coefficients.shape, generator=torch.Generator().manual_seed(0))
    found = []
    for kept in (False, True):
        policy.module.zero_grad()
        if kept:
            estimator.view_logprobs(policy, rollout, views, retain_graphs=True).backward(vectors)
        else:
            estimator.backward(policy, rollout, views, vectors)
        found.append({n: p.grad.clone() for n, p in policy.module.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and not any("vision" in name for name in found[0])
    for name, one in found[0].items():
        assert (one - found[1][name]).abs().max() < 1e-4 * (1 + found[1][name].abs().max()), name


def test_the_contract_of_policies(policy):
    check_policy(policy)


test_settings_out_of_range_are_refused = refused(
    ({"max_new_tokens": 6}, "max_new_tokens=6 must be a multiple of the canvas's 4 tokens; nearest: 4, 8"),
    ({"diffusion_steps": 0}, "diffusion_steps=0 must be at least 1"),
    ({"t_min": 0.0}, "t_min=0.0 must be at least 1e-30"),
    ({"t_max": 0.3}, "t_min=0.4 must be at most t_max=0.3"),
    ({"entropy_bound": 0.0}, "entropy_bound=0.0 must be above 0 nats"),
    ({"answer": "last"}, "answer='last' must be one of 'argmax', 'drawn'"),
    ({"stability_threshold": 1}, "stability_threshold=1 and confidence_threshold=None stop a canvas together"),
    ({"max_new_tokens": 400}, "exceeds the model's 128 positions"),
    by=lambda changes, policy: sampled(policy, **changes),
)


def test_other_samplers_and_models_are_refused(policy, tmp_path):
    from dllm_rl.models.tiny import tiny_masked_lm

    prompts = Prompts.from_ids([[3, 4]], pad_id=0)
    with pytest.raises(ValueError, match="no mask token, its noise is random tokens: use Renoise"):
        Unmask(max_new_tokens=4)(policy, prompts, torch.Generator())
    with pytest.raises(ValueError, match="'full' attention; Renoise is for models whose noise is random"):
        Renoise(max_new_tokens=4)(tiny_masked_lm(characters="abc"), prompts, torch.Generator())
    policy.module.config.image_token_id = 4
    try:
        with pytest.raises(ValueError, match="has the image token, and images are not supported"):
            Renoise(max_new_tokens=4)(policy, prompts, torch.Generator())
    finally:
        policy.module.config.image_token_id = 258_880
    policy.save_pretrained(tmp_path)
    refuses("quantization='nf4' would separate the weights", lambda: load_policy(tmp_path, quantization="nf4"))
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 10**9
    (tmp_path / "config.json").write_text(json.dumps(config))
    refuses(r"num_hidden_layers=1e\+09 is more than 1000000", lambda: load_policy(tmp_path))
