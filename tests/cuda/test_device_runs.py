"""Everything that runs on a GPU, on a simulated one: no tensor is left behind, and the numbers are the CPU's.

With `pytest -m gpu` on a machine that has one, on the real one: the numbers are near the CPU's.
"""

from dataclasses import replace
from functools import partial
from importlib import import_module

import pytest
import torch
from accelerate.state import AcceleratorState
from devices import REAL, Cuda
from layouts import checkpoint
from repetitions import few, slow
from run_outputs import metrics_of
from tiny_recipe import tiny_recipe, tiny_recipe_ar, with_changes
from torch.utils._pytree import tree_map

from dllm_rl import load_policy
from dllm_rl.algorithms import correctors
from dllm_rl.algorithms.losses import PPOClip
from dllm_rl.decoding.support import with_support
from dllm_rl.doctor.mismatch import diagnose
from dllm_rl.evaluation.evaluate import evaluate
from dllm_rl.likelihoods import estimators
from dllm_rl.likelihoods.views import each_view
from dllm_rl.models.lora import add_lora
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.quantization import schemes
from dllm_rl.quantization.aligned import aligned_forward
from dllm_rl.quantization.rollout_policy import quantized_copy, sync_weights
from dllm_rl.records import subclasses
from dllm_rl.samplers import Autoregress, Unmask, rules
from dllm_rl.samplers.cache import BlockCache, DualCache, PrefixCache
from dllm_rl.testing import make_stats
from dllm_rl.training.trainer import train
from dllm_rl.types.batch_record import BatchRecord
from dllm_rl.types.rollouts import Prompts
from recipes.studies.likelihoods import surrogates as published

pytestmark = [pytest.mark.gpu, pytest.mark.slow]  # slow on a simulated device; `-m gpu` runs all on a real one
SIZES = {"characters": "1234.=", "hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
FEW = {"train_batch_size": 2, "num_generations": 2, "num_steps": 1, "eval_batch_size": 4, "eval_task.size": 2}
PLAIN = Unmask(max_new_tokens=6, diffusion_steps=3, temperature=1.0)


def masked_lm(**more):
    return tiny_masked_lm(**SIZES, head_std=0.3, **more)


def llada(**more):
    return tiny_llama(**SIZES, causal=False, head_std=0.3, **more)


def prompts(group: int = 2) -> Prompts:
    return Prompts.from_ids([[3, 4, 5], [6, 7]], pad_id=0, num_generations=group)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def run(sampler, policy):
    return sampler(policy, prompts(), generator())


def assert_same(there, here, near=1e-3):
    """Records or tensors, from the device and from the host: the same numbers; near ones where it is real."""
    if isinstance(here, torch.Tensor):
        assert there.is_cuda
        near = near if REAL and here.is_floating_point() else 0
        torch.testing.assert_close(there.cpu(), here, rtol=near, atol=near)
        return
    for name, value in vars(here).items():
        if isinstance(value, torch.Tensor | BatchRecord):
            assert_same(getattr(there, name), value, near)
        else:
            assert getattr(there, name) == value


def on_both(work, make=masked_lm, near=1e-3):
    """What `work` makes of a policy on the CPU and of one on the device has the same numbers."""
    here = work(make())
    with Cuda():
        there = work(make().to("cuda"))
        assert_same(there, here, near)


RANKS = ("Confidence", "MaxProb", "Margin", "Entropy", "RandomOrder")
RULES = {
    **{f"rank {name}": {"rank": getattr(rules, name)()} for name in RANKS},
    **{f"greedy {name}": {"rank": getattr(rules, name)(), "temperature": 0.0} for name in ("Confidence", "Margin")},
    "rank plackett_luce": {"rank": rules.PlackettLuce(temperature=0.3)},
    "late_schedule": {"commit": rules.LateSchedule()},
    "origin": {"commit": rules.Origin(), "rank": rules.RandomOrder(), "temperature": 0.7},
    "threshold": {"commit": rules.Threshold(tau=0.3)},
    "entropy_bound": {"commit": rules.EntropyBound(gamma=0.5), "rank": rules.Entropy()},
    "filters": {"top_k": 3, "top_p": 0.9, "suppress": (2,)},
    "blocks, early exit": {"block_size": 3, "approximate_early_exit": True},
    "watched": {"on_step": lambda rollout: rollout.tokens.tolist()},
}


@pytest.mark.parametrize("rule", few(RULES, ["rank Confidence", "rank plackett_luce", "filters", "blocks, early exit"]))
def test_sampler_rules(rule):
    settings = dict(RULES[rule])
    watched = {"on_step": settings.pop("on_step", None)}
    on_both(lambda policy: run(partial(PLAIN.replace(**settings), **watched), policy))


@pytest.mark.parametrize("dtype", few(["float32", "bfloat16"], ["bfloat16"]))
@pytest.mark.parametrize(
    ("family", "cache"),
    [("dream", DualCache(refresh=2)), ("sdar", BlockCache()), slow("llada", PrefixCache()), slow("llama", None)],
)
def test_caches_of_loaded_checkpoints(tmp_path, family, cache, dtype):
    folder = checkpoint(tmp_path, family)
    settings = {"max_new_tokens": 6, "temperature": 1.0}
    if family == "llama":
        sampler = Autoregress(**settings)
    else:
        size = 4 if family == "sdar" else 3
        sampler = Unmask(**settings, diffusion_steps=4, block_size=size, cache=cache, top_k=5)
    here = run(sampler, load_policy(folder, dtype=dtype))
    with Cuda():
        policy = load_policy(folder, dtype=dtype, device="cuda")
        assert_same(run(sampler, policy), here, near=1e-3 if dtype == "float32" else 5e-2)
        policy.save_pretrained(tmp_path / "saved")
    saved, first = (load_policy(path, dtype=dtype).module.state_dict() for path in (tmp_path / "saved", folder))
    assert all(torch.equal(saved[name], first[name]) for name in first)


ESTIMATORS = {
    "causal": estimators.Causal(),
    "one_step": estimators.OneStep(),
    "one_step, clean prompt": estimators.OneStep(prompt_mask=0.0),
    "elbo": estimators.ELBO(num_samples=2, antithetic=True),
    "coupled": estimators.Coupled(),
    "trajectory": estimators.Trajectory(include_order=False),
    "trajectory, its order too": estimators.Trajectory(),
    "segments": estimators.Trajectory(num_segments=2),
    "packed": estimators.Trajectory(block_size=4),
}


@pytest.mark.parametrize("name", few(ESTIMATORS, ["sandwich", "trajectory, its order too", "packed"]))
def test_estimators(name, tmp_path):
    likelihood = ESTIMATORS[name]
    family = {"causal": "llama", "packed": "sdar"}.get(name)
    folder = family and checkpoint(tmp_path, family)
    sampler = Autoregress(max_new_tokens=6) if name == "causal" else PLAIN.replace(top_p=0.9)

    def work(policy):
        rollout = with_support(run(sampler, policy), "rollout" if name == "trajectory" else "per_policy")
        noise = likelihood.draw_views(rollout, generator())
        signs = torch.tensor([1.0, -1.0, 0.5, -0.5], device=policy.device)
        noise = likelihood.with_advantages(noise, signs)
        logps = likelihood.logprobs(policy, rollout, noise, micro_batch_size=2)
        vector = logps.sin() * rollout.completion_mask
        for view, weight in zip(each_view(noise), noise.coefficients, strict=True):
            view.backward(policy, rollout, vector * weight)
        gradient = next(p.grad for p in policy.module.parameters() if p.grad is not None)
        return torch.cat([logps.flatten(), gradient.flatten()])

    on_both(work, make=masked_lm if folder is None else partial(load_policy, folder))


ELSEWHERE = (
    "Rounding",
    "Float8ByGPU",
    "Float8Dynamic",
    "Int4Packed",
    "Float8DynamicEmulated",
    "FunctionScheme",
)  # kernels of CUDA's, and the CPU's


def with_loss(loss):
    return correctors.FunctionCorrector(function=correctors.TIS().weights, loss=loss)


CORRECTORS = {
    "none": correctors.NoCorrection(),
    "tis": correctors.TIS(),
    "tis of sequences": correctors.TIS(level="sequence", pool="geometric"),
    "mis": correctors.MIS(),
    "icepop": correctors.IcePop(),
    "reject": correctors.Reject(),
    "reject tokens": correctors.Reject(level="token", statistic="k2"),
    "ais": correctors.AIS(),
    "ais of sequences": correctors.AIS(level="sequence"),
    "bgpo": with_loss(published.BGPO()),
    "ebpo": with_loss(published.EBPO()),
    "gdsd": with_loss(published.GDSD()),
    "stable_drl": with_loss(partial(published.StableDRL(), sum_over_processes=lambda x: x)),
    "tbpo": correctors.TBPO(),
    "aligned": correctors.Aligned(),
    "qarl": correctors.QaRL(),
    "compose": correctors.Compose(parts=(correctors.TIS(), correctors.Reject())),
}


@pytest.mark.parametrize("name", CORRECTORS)
def test_correctors(name):
    corrector = CORRECTORS[name]
    log_mismatch, advantages = torch.linspace(-1, 1, 12).view(3, 4), torch.tensor([1.0, -1.0, 0.5])
    log_mismatch[0, 1], mask = torch.inf, torch.ones(3, 4, dtype=torch.bool)

    def work(device):
        seen = [x.to(device) for x in (log_mismatch, advantages, mask)]
        weights, keep, metrics = corrector.weights(make_stats(*seen))
        objective = (corrector.loss or PPOClip())(torch.where(mask.to(device), 0.1, 0.0), *seen[1:])
        return weights, keep, objective, metrics

    *here, numbers = work("cpu")
    with Cuda():
        *there, same = work("cuda")
        for one, other in zip(there, here, strict=True):
            assert_same(one, other)
        assert same == numbers


SCHEMES = [name for name in subclasses(schemes.Scheme) if name not in ELSEWHERE]


@pytest.mark.parametrize("name", SCHEMES)
def test_schemes_their_sync_and_the_aligned_forward(name):
    tokens, mask = torch.tensor([[3, 4, 5, 1]] * 2), torch.ones(2, 4, dtype=torch.bool)

    def work(policy):
        rollout_policy = quantized_copy(policy, getattr(schemes, name)())
        seen = tokens.to(policy.device), mask.to(policy.device)
        with torch.no_grad():
            policy.module.model.layers[0].mlp.up_proj.weight[0, :9] += 5
        policy.weights_version += 1
        changed = sync_weights(policy, rollout_policy)
        assert changed and all(value > 0 for value in changed.values())
        with aligned_forward(policy, rollout_policy):
            logits = policy.logits(*seen)
            logits.square().mean().backward()
        assert torch.equal(logits, rollout_policy.logits(*seen))
        return torch.cat([logits.detach().flatten(), policy.module.model.layers[0].mlp.up_proj.weight.grad.flatten()])

    make = partial(tiny_llama, **(SIZES | {"hidden_size": 32, "intermediate_size": 32}), causal=False)
    on_both(work, make, near=2e-2)  # inputs are rounded to other codes where the sums before them differ


@pytest.mark.parametrize("dtype", few([torch.float32, torch.bfloat16], [torch.bfloat16]))
def test_adapters_with_dropout(dtype):
    def work(policy):
        policy.module.to(dtype)
        add_lora(policy, Lora(r=2, dropout=0.5))
        rollout, likelihood = run(PLAIN, policy), estimators.ELBO(num_samples=1)
        noise = likelihood.draw_views(rollout, generator())
        (view,) = each_view(noise)
        view.backward(policy, rollout, noise.coefficients[0])
        sync_weights(policy, quantized_copy(policy, None))
        gradients = [p.grad.flatten() for p in policy.module.parameters() if p.requires_grad]
        return torch.cat([likelihood.logprobs(policy.reference(), rollout, noise).flatten(), *gradients])

    on_both(work, make=llada, near=1e-3 if dtype == torch.float32 else 0.2)


def small(directory, *, causal=False, **changes):
    """Two steps of two prompts with two completions each."""
    recipe = (tiny_recipe_ar if causal else tiny_recipe)(directory)
    few = {"train_batch_size": 2, "num_generations": 2, "num_mismatch_groups": 1, "num_steps": 2, "save_steps": 1}
    few |= {"model": partial(tiny_llama, causal=causal, **SIZES), "eval_task": replace(recipe.eval_task, size=2)}
    return with_changes(recipe, **few | changes)


def trains_alike(recipe, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        train(recipe(tmp_path / "cpu"))
    AcceleratorState._reset_state(reset_partial_state=True)
    with Cuda() as cuda, cuda.phase("training"):
        train(recipe(tmp_path / "cuda"))
        assert REAL or cuda.waits() > 0, "it was the CPU that trained"
    assert not REAL or cuda.waits() > 0, "it was the CPU that trained"
    assert_alike(metrics_of(tmp_path / "cuda"), metrics_of(tmp_path / "cpu"))


def assert_alike(there, here):
    """Metrics of a run on the device and of one on the CPU."""
    # A simulated device computes on the CPU, whose last bits may depend on where in memory a tensor lies.
    small = 0.02 if REAL else 1e-6
    for one, other in zip(there, here, strict=True):
        if REAL:  # a largest difference is one bf16 log-prob's, which rounds otherwise in another pass
            largest = {
                name: value for name, value in other.items() if name.startswith("off_policy/") and "/max" in name
            }
            assert {name: one[name] for name in largest} == pytest.approx(largest, abs=0.1)
            one = one | largest
        assert one == pytest.approx(other, rel=0.02, abs=small, nan_ok=True)


def resumes(recipe, tmp_path):
    (tmp_path / "cuda/checkpoints/step-000002").rename(tmp_path / "later")
    with Cuda():
        train(replace(recipe(tmp_path / "cuda"), resume_from_checkpoint="latest"))
    assert_alike(metrics_of(tmp_path / "cuda"), metrics_of(tmp_path / "cpu"))


@pytest.mark.slow
def test_a_run_in_bf16_with_adapters_resumes(tmp_path):
    fields = {"lora": Lora(r=2, dropout=0.1), "bf16": True, "beta": 0.1, "eval_steps": 2, "num_iterations": 2}
    recipe = partial(small, **fields)
    trains_alike(recipe, tmp_path)
    resumes(recipe, tmp_path)


@pytest.mark.slow
def test_a_run_of_all_weights_with_a_warm_up_resumes(tmp_path):
    fields = {"corrector": correctors.QaRL(), "rollout_quantization": schemes.Int8WeightOnly(), "beta": 0.1}
    recipe = partial(
        small, sft_warmup_steps=2, sft_warmup_batch_size=2, max_num_gen_batches=2, entropy_coeff=0.01, **fields
    )
    trains_alike(recipe, tmp_path)
    resumes(recipe, tmp_path)


@pytest.mark.slow
def test_an_autoregressive_run(tmp_path):
    trains_alike(partial(small, causal=True), tmp_path)


@pytest.mark.slow
def test_a_run_without_mismatch(tmp_path, monkeypatch):
    """On a GPU it takes attention's plain kernel, so that its numbers are others."""
    if REAL:
        pytest.skip("needs a process of its own: see test_gpu.py")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # and put back afterwards
    with Cuda():
        train(small(tmp_path, zero_mismatch=True, rollout_quantization=None, num_steps=1))
    (row,) = metrics_of(tmp_path)
    assert row["rollout_corr/abs_log_ratio_max"] == 0 and row["grad_norm"] > 0


@pytest.mark.slow
def test_an_evaluation_and_a_diagnosis(tmp_path):
    task = replace(tiny_recipe(tmp_path).eval_task, size=2)

    def work(policy, kept):
        found = evaluate(policy, task, PLAIN, samples=2, completions=tmp_path / kept)
        report = diagnose(policy, schemes.Int8WeightOnly(), prompts=prompts(), sampler=PLAIN)
        return found.means, report

    here = work(llada(), "cpu.jsonl")
    with Cuda():
        means, report = work(llada().to("cuda"), "cuda.jsonl")
    assert means == here[0]
    assert report == here[1] or (REAL and report.total.mean_abs == pytest.approx(here[1].total.mean_abs, rel=0.5))


# --- planted: a tensor of the host among those of the device ------------------------------------------------------


def on_host(work):
    """`work`, with the tensors that it returns on the host."""

    def planted(*args, **kwargs):
        return tree_map(lambda x: x.to("cpu") if hasattr(x, "to") else x, work(*args, **kwargs))

    return planted


PLANTED = {
    "sampler, drawn": ("samplers.choose", "uniforms"),
    "sampler, scores": ("samplers.choose", "rank_and_draw"),
    "scoring, log-probs": ("decoding.order", "token_logprobs_and_confidences"),
    "scoring, order": ("decoding.order", "stay_masked_logprobs"),
    "learner, masks": ("step.score", "draw_view_sets"),
    "learner, loss": ("step.settings", "policy_loss"),
    "metrics": ("step.update", "off_policy_metrics"),
}


@pytest.mark.parametrize("name", few(PLANTED, ["sampler, drawn", "learner, loss"]))
def test_a_tensor_left_on_the_host_is_found(name, tmp_path, monkeypatch):
    place, function = PLANTED[name]
    module = import_module(f"dllm_rl.{place}")
    monkeypatch.setattr(module, function, on_host(getattr(module, function)))
    said = "to be on the same device|expected the value on cuda:0|indices should be|expected device cuda:0 but got cpu"
    with Cuda(), pytest.raises(RuntimeError, match=said):
        train(small(tmp_path, num_steps=1, corrector=correctors.NoCorrection()))
