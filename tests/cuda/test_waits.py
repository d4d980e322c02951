"""How often the host waits for the device, counted on a simulated one."""

from functools import partial

import pytest
import torch
from layouts import checkpoint
from order_toys import stayed_of
from repetitions import few
from simulated_cuda import SimulatedCuda
from tiny_recipe import tiny_recipe

from dllm_rl import load_policy
from dllm_rl.algorithms.correctors import AIS, Compose, Reject
from dllm_rl.decoding.support import with_support
from dllm_rl.likelihoods.estimators import ELBO, OneStep, Trajectory
from dllm_rl.likelihoods.views import each_view
from dllm_rl.models.tiny import tiny_llama
from dllm_rl.quantization import schemes
from dllm_rl.quantization.rollout_policy import quantized_copy, sync_weights
from dllm_rl.samplers import Unmask, rules
from dllm_rl.samplers.cache import BlockCache, DualCache, PrefixCache
from dllm_rl.training.trainer import train
from dllm_rl.types.rollouts import Prompts

SIZES = {"characters": "1234.=", "hidden_size": 16, "num_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
ESTIMATORS = {
    "trajectory": Trajectory(),
    "trajectory over the rollout's support": Trajectory(include_order=False),
    "elbo": ELBO(num_samples=3),
    "one_step, a forward for the group": OneStep(prompt_mask=0.0),
    "packed": Trajectory(block_size=4),
    "noisy order": Trajectory(),
}
NOISY = rules.PlackettLuce(temperature=0.3)
STEPS = {
    "plain": {},
    "filters and suppressed tokens": {"top_k": 3, "suppress": (2, 0)},
    "greedy": {"temperature": 0.0},
    "drawn where it is known": {"rank": rules.RandomOrder()},
    "noisy order": {"rank": NOISY},
    "blocks": {"block_size": 4},
    "prefix cache": {"block_size": 4, "cache": PrefixCache()},
    "dual cache": {"block_size": 4, "cache": DualCache(refresh=2)},
    "block cache": {"cache": BlockCache()},
}


@pytest.mark.parametrize("name", few(STEPS, ["plain", "dual cache"]))
def test_a_sampler_step_waits_once_at_most(name, tmp_path):
    """Eight positions in 2 steps and in 4: 2 steps more. Each may wait where transformers asks for padding."""
    waits = []
    with SimulatedCuda() as cuda:
        if name == "block cache":
            policy = load_policy(checkpoint(tmp_path, "sdar"), device="cuda")
            prompts = Prompts.from_ids([[3, 4, 5, 6], [6, 7, 8, 9]], pad_id=0, num_generations=2)
        else:
            policy = tiny_llama(**SIZES, causal=False).to("cuda")
            prompts = Prompts.from_ids([[3, 4, 5], [6, 7]], pad_id=0, num_generations=2)
        for steps in (2, 4):
            sampler = Unmask(max_new_tokens=8, diffusion_steps=steps, **{"temperature": 1.0} | STEPS[name])
            with cuda.phase(f"{steps} steps"):
                rollout = sampler(policy, prompts, torch.Generator().manual_seed(0))
            assert rollout.forwards == steps
            waits.append(cuda.waits(f"{steps} steps"))
        assert waits[1] - waits[0] <= 2, cuda.report()
        found = cuda.waits(place="samplers/unmask.py")
        assert found == 4, "the rows that share a prompt, and whether a score is NaN, once a rollout: " + cuda.report()


@pytest.mark.parametrize("name", few(ESTIMATORS, ["trajectory"]))
def test_a_scored_view_waits_twice_at_most(name, tmp_path):
    """Forward alone and with its backward: once for which positions are scored, once where transformers asks."""
    likelihood = ESTIMATORS[name]
    with SimulatedCuda() as cuda:
        policy = tiny_llama(**SIZES, causal=False).to("cuda")
        if name == "packed":
            policy = load_policy(checkpoint(tmp_path, "sdar"), device="cuda")
        prompts = Prompts.from_ids([[3, 4, 5], [6, 7]], pad_id=0, num_generations=2)
        generator = torch.Generator().manual_seed(0)
        rank = NOISY if name == "noisy order" else rules.Confidence()
        options = {"max_new_tokens": 4, "diffusion_steps": 2, "temperature": 1.0, "top_k": 3}
        rollout = Unmask(rank=rank, **options)(policy, prompts, generator)
        rollout = with_support(rollout, "rollout" if "support" in name else "per_policy")
        noise = likelihood.draw_views(rollout, generator)
        views = len(noise.masked)
        assert (stayed_of(noise) is None) == (name not in ("trajectory", "packed", "noisy order"))
        with cuda.phase("forward"):
            for view in each_view(noise):
                view.logprobs(policy, rollout)
        with cuda.phase("backward"):
            for view, weight in zip(each_view(noise), noise.coefficients, strict=True):
                view.backward(policy, rollout, weight)
        with cuda.phase("all views"):
            likelihood.view_logprobs(policy, rollout, noise)
        assert 0 < cuda.waits("forward") <= 2 * views and 0 < cuda.waits("backward") <= 2 * views, cuda.report()
        assert cuda.waits("all views") <= 2 * views + 1, "and once for the rows of all views"


@pytest.mark.parametrize(
    "scheme", few([schemes.Float8WeightOnly(), schemes.Int4WeightOnly(), schemes.NVFP4()], [schemes.Float8WeightOnly()])
)
def test_a_sync_waits_as_often_for_many_layers_as_for_few(scheme):
    """Once for whether all weights are finite, once for what has changed."""
    sizes = SIZES | {"hidden_size": 32, "intermediate_size": 32}
    with SimulatedCuda() as cuda:
        for layers in (1, 3):
            policy = tiny_llama(**(sizes | {"num_layers": layers}), causal=False).to("cuda")
            with cuda.phase("copy"):
                rollout_policy = quantized_copy(policy, scheme)
            with cuda.phase("sync"):
                sync_weights(policy, rollout_policy)
        assert (cuda.waits("copy"), cuda.waits("sync")) == (2, 4), cuda.report()


@pytest.mark.slow
def test_the_metrics_of_a_step_are_fetched_together(tmp_path):
    """What the corrector and the mismatch metrics see comes in one transfer, loss metrics and gradient norm in another,
    completions' lengths in a third; correctors, losses and metrics themselves wait for nothing. The rehearsal before
    the first step sees what the corrector does once more."""
    few = {"num_steps": 1, "train_batch_size": 2, "num_generations": 2, "eval_batch_size": 8}
    few["model"] = partial(tiny_llama, **SIZES | {"num_layers": 1}, causal=False)
    recipe = tiny_recipe(tmp_path, corrector=Compose(parts=(AIS(), Reject())), **few)
    with SimulatedCuda() as cuda:
        train(recipe)
        assert cuda.waits(place="gather_on_host") == 2 and cuda.waits(place="sum_over") == 1, cuda.report()
        assert cuda.waits(place="completion_token_ids") == 5, (
            "the rehearsal's, the step's, and those of three evaluations"
        )
        assert cuda.waits(place="reward_metrics") == 0
        for room in ("algorithms/mismatch", "algorithms/correctors", "algorithms/advantages", "step/learner"):
            assert cuda.waits(place=room) == 0, cuda.report()
        assert cuda.waits(place="algorithms/losses") == 2, "how many positions the loss keeps"
