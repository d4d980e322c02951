"""The plan's memory against what the allocator says of real steps, and each thing that it must know of."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod

import pytest
import torch
from accelerate import Accelerator
from live_bytes import LiveBytes
from mixtures import sharp_moe
from repetitions import few
from tiny_recipe import MOE_SIZES, tiny_recipe

from dllm_rl.likelihoods import estimators as lik
from dllm_rl.models.lora import add_lora
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.merge import merged_copy
from dllm_rl.models.tiny import tiny_diffusion_gemma, tiny_llama
from dllm_rl.quantization import rollout_policy
from dllm_rl.quantization.schemes import Float8WeightOnly
from dllm_rl.rng import generator_for
from dllm_rl.samplers.autoregress import Autoregress
from dllm_rl.samplers.renoise import Renoise
from dllm_rl.samplers.rules import Confidence
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.step.score import retained_graphs
from dllm_rl.step.update import update
from dllm_rl.training.dry_run import memory
from dllm_rl.training.dry_run.memory import PlannedStep, step_memory
from dllm_rl.training.policies import make_optimizer
from dllm_rl.types.rollouts import Prompts
from dllm_rl.types.scoring import Batch

SIZES = {"hidden_size": 128, "num_layers": 4, "num_attention_heads": 4, "intermediate_size": 384, "max_length": 128}
LETTERS = {"characters": "".join(chr(c) for c in range(0x4E00, 0x4E00 + 1500))} | SIZES
PROMPT, LENGTH, ROWS = 24, 72, 8
OF_DRAWS = {"diffusion_steps": 2, "temperature": 1.0, "rank": Confidence()}  # draws at every position


def profiled(work: Callable[[], object]) -> tuple[int, int]:
    """The most bytes that the CPU's allocator held during `work` above those at its start, by its own events, and those
    that it held at its end."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, now


def recipe_of(tmp_path, *, causal: bool = False, canvas: int | None = None, layers: int = 4, **changes):
    if canvas is not None:
        sampler = Renoise(max_new_tokens=LENGTH, diffusion_steps=2, stability_threshold=None, confidence_threshold=None)
        letters = {name: value for name, value in LETTERS.items() if name != "intermediate_size"}
        sizes = letters | {
            "canvas_length": canvas,
            "intermediate_size": 192,
            "moe_intermediate_size": 96,
            "num_layers": layers,
        }
        given = {
            "model": partial(tiny_diffusion_gemma, **sizes),
            "sampler": sampler.replace(confidence_threshold=None, answer="drawn"),
            "likelihood": lik.Trajectory(),
        }
        return replace(recipe_of(tmp_path, **changes), **given)
    sampler = Autoregress(max_new_tokens=LENGTH) if causal else Unmask(max_new_tokens=LENGTH, **OF_DRAWS)
    return tiny_recipe(
        tmp_path,
        model=partial(tiny_llama, causal=causal, **LETTERS),
        sampler=sampler,
        likelihood=lik.Causal() if causal else lik.OneStep(prompt_mask=0.5),
        train_batch_size=2,
        num_generations=4,
        num_iterations=2,
        rollout_quantization=None,
        **changes,
    )


def made(recipe):
    policy = recipe.model()
    if recipe.lora is not None:
        add_lora(policy, recipe.lora)
    policy.gradient_checkpointing = recipe.gradient_checkpointing
    return policy


CASES = {
    "full": {},
    "full, bf16": {"bf16": True},
    "full, recomputed": {"gradient_checkpointing": True},
    "adapters": {"lora": Lora(r=16, dropout=0.05)},
    "adapters, recomputed": {"lora": Lora(r=16, dropout=0.05), "gradient_checkpointing": True},
    "micro-batches": {"micro_batch_size": 4},
    "micro-batches, kept": {"micro_batch_size": 4, "max_retained_graphs": 2},
    "constant memory": {"max_retained_graphs": 0},
    "causal": {"causal": True},
    "renoise": {"canvas": 36, "layers": 2},
    "renoise, kept": {"canvas": 72, "max_retained_graphs": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", few(CASES, ["adapters, recomputed"], ["full, bf16", "constant memory", "renoise"]))
def test_the_plan_agrees_with_the_allocator_within_a_quarter(tmp_path, case):
    recipe = recipe_of(tmp_path, **CASES[case])
    policy = made(recipe)
    planned = step_memory(PlannedStep(recipe, policy, PROMPT))
    prompts = Prompts.from_ids([[5 + i] * PROMPT for i in range(2)], pad_id=0, num_generations=4, seeds=range(8))
    weights = sum(p.nbytes for p in policy.module.parameters())
    optimizer, accelerator = make_optimizer(recipe, policy), Accelerator(cpu=True)
    kept: dict = {}
    graphs_of_step = retained_graphs(recipe, policy, torch.ones(ROWS, dtype=torch.bool))

    def autocast():
        return torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16)

    def sample():
        with autocast():
            kept["rollout"] = recipe.sampler(policy, prompts, generator_for(0))

    def score():
        with autocast():
            noise = kept["noise"] = recipe.likelihood.draw_views(kept["rollout"], generator_for(1))
            kept["scores"] = recipe.likelihood.view_logprobs(
                policy, kept["rollout"], noise, micro_batch_size=recipe.micro_batch_size, graphs=graphs_of_step
            )
            in_a_view = prod(feature.num_forwards for feature in noise.features)
            kept["graphs"] = 0 if graphs_of_step is None else in_a_view * len(graphs_of_step.logprobs)

    def learn():
        rollout, noise, scores = kept["rollout"], kept["noise"], kept["scores"]
        old = recipe.likelihood.combine(scores, noise)
        batch = Batch(
            rollout=replace(rollout, weights_version=policy.weights_version), views=noise, advantages=torch.randn(ROWS),
            old_logprobs=old, old_view_logprobs=scores, importance_weights=torch.ones_like(old),
            loss_mask=rollout.completion_mask, reference_logprobs=None,
            num_tokens=ROWS * LENGTH, num_sequences=ROWS, graphs=graphs_of_step,
        )  # fmt: skip
        with autocast():
            update(
                policy,
                optimizer,
                [batch] * recipe.num_iterations,
                accelerator,
                recipe.update_settings(0),
            )

    for _ in range(2):  # the second step finds the optimizer's state and the gradients of the first
        state = sum(x.nbytes for s in optimizer.state.values() for x in s.values())
        gradients = sum(p.grad.nbytes for p in policy.module.parameters() if p.grad is not None)
        (sampling, _), (scoring, graphs) = profiled(sample), profiled(score)
        measured = {"rollout": weights + state + gradients + sampling, "scoring": weights + state + gradients + scoring}
        optimizer.zero_grad(set_to_none=True)  # as the update does when it begins
        measured["update"] = weights + state + graphs + profiled(learn)[0]
    assert PlannedStep(recipe, policy, PROMPT).num_graphs == kept["graphs"]
    held = planned.persistent
    print({k: (v, planned.peaks.get(k), round(planned.peaks.get(k) / v, 3)) for k, v in measured.items()}, held)
    assert held["weights"] + held.get("adapters", 0) == pytest.approx(weights, rel=0.001)
    assert held["optimizer"] == pytest.approx(state, rel=0.001)
    assert held["gradients"] == gradients
    for name, most in measured.items():
        assert planned.peaks[name] == pytest.approx(most, rel=0.25), name


def test_live_bytes_by_hand():
    """Views share a storage; what is written in place is no new one; what is let go is given back."""
    with LiveBytes() as live:
        a = torch.zeros(100)
        assert live.now == 400
        b = a[10:].view(9, 10)
        b.add_(1)
        assert live.now == 400
        c = (a * 2) + 1  # the product lives until the sum is there
        assert live.now == 800 and live.peak == 1200
        del a
        assert live.now == 800  # b holds it
        del b, c
        assert live.now == 0


class OnDevice(LiveBytes):
    """Counts what is not on the meta device, beyond the tensors of a module."""

    def __init__(self, module):
        super().__init__()
        self._alive = {x.untyped_storage()._cdata for x in [*module.parameters(), *module.buffers()]}

    def _count(self, storage):
        if storage.device.type != "meta":
            super()._count(storage)


def test_what_a_save_merges_leaves_the_device_layer_by_layer():
    """The meta device stands for the host: on the module's own, one merged layer lives at a time."""
    policy = tiny_llama(causal=False, **LETTERS)
    add_lora(policy, Lora(r=4))
    layer = 4 * 384 * 128  # bytes of the largest layer
    with OnDevice(policy.module) as live, torch.no_grad():
        twin = merged_copy(policy.module, device="meta")
    assert 0 < live.peak < 4 * layer < sum(p.nbytes for p in twin.parameters())
    assert all(p.is_meta for p in twin.parameters())


@pytest.mark.repeated
@pytest.mark.parametrize("lora", [None, Lora(r=4)], ids=["full", "lora"])
@pytest.mark.parametrize("limit", [2**17, 2**28], ids=["bounded", "whole"])
def test_the_plan_knows_what_a_sync_of_all_layers_of_a_shape_takes(tmp_path, lora, limit, monkeypatch):
    """128 x 384 weights in 12 layers: two at a time within 2**17 weights, or all."""
    for module in (rollout_policy, memory):
        monkeypatch.setattr(module, "CHUNK_BYTES", 4 * limit)
    recipe = replace(recipe_of(tmp_path, lora=lora), rollout_quantization=Float8WeightOnly())
    policy = made(recipe)
    copied = rollout_policy.quantized_copy(policy, recipe.rollout_quantization)
    planned = step_memory(PlannedStep(recipe, policy, PROMPT))
    expected = planned.peaks["sync"] - sum(planned.persistent.values())
    peak, _ = profiled(lambda: rollout_policy.sync_weights(policy, copied))
    assert 0.5 * expected < peak < 1.25 * expected


def test_a_mixture_is_counted_in_fp32(tmp_path):
    make = partial(sharp_moe, num_experts=4, head_std=0.3, **MOE_SIZES)
    recipe = tiny_recipe(tmp_path, model=make, rollout_quantization=None)
    weights = sum(p.numel() for p in make().module.parameters())
    held = step_memory(PlannedStep(recipe, make(), prompt_tokens=20)).persistent
    assert held["gradients"] == 4 * weights and held.keys() == {"weights", "gradients", "optimizer"}
    assert held["weights"] == pytest.approx(4 * weights, rel=0.01)
    assert held["optimizer"] == pytest.approx(8 * weights, rel=0.01)
