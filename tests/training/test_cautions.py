"""What cannot learn is said once, in one line; what can is left alone."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny_recipe import tiny_recipe, tiny_recipe_ar, with_changes

from dllm_rl.algorithms.advantages import Advantages, LeaveOneOut
from dllm_rl.algorithms.correctors import AIS, MIS, TBPO, TIS, Compose, NoCorrection, Reject
from dllm_rl.algorithms.losses import CISPO, K1, K2, PPOClip, Reinforce
from dllm_rl.likelihoods.estimators import ELBO, Coupled, OneStep, Trajectory
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.samplers.autoregress import Autoregress
from dllm_rl.samplers.cache import DualCache, PrefixCache
from dllm_rl.samplers.rules import (
    Confidence,
    Entropy,
    EntropyBound,
    FunctionCommit,
    FunctionRank,
    MaxProb,
    PlackettLuce,
    RandomOrder,
    Schedule,
    SoftThreshold,
    Threshold,
)
from dllm_rl.samplers.sampler import Sampler
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.tasks.datasets import task_from_dataset
from dllm_rl.training.cautions import cautions, launch_warnings, learning_rate_warnings
from dllm_rl.training.trainer import train

pytestmark = pytest.mark.usefixtures("no_rehearsal")


def test_what_can_learn_is_left_alone():
    assert cautions(tiny_recipe("x")) == [] and cautions(tiny_recipe_ar("x")) == []
    assert cautions(tiny_recipe("x", num_generations=1, advantages=torch.add)) == []  # a function of C: rewards + group


def test_advantages_may_be_the_difference_of_two_rewards():
    class AboveTheBaseline(Advantages):
        takes_component_rewards = True

        def __call__(self, rewards, group, *, parts, weights):
            return parts[0] - parts[1]

    def right(completions):
        return [0.0] * len(completions)

    def baseline(completions):
        return [0.5] * len(completions)

    task = task_from_dataset([{"prompt": "1="}], reward_funcs=[right, baseline], weights=[1.0, 0.0])
    assert cautions(tiny_recipe("x", task=task, advantages=AboveTheBaseline())) == []


def test_greedy_rollouts():
    greedy = tiny_recipe("x", sampler=Unmask(max_new_tokens=16, diffusion_steps=3, temperature=0.0))
    by_default = tiny_recipe("x", sampler=Unmask(max_new_tokens=16))
    for recipe in (greedy, by_default):
        (said,) = cautions(recipe)
        assert "sampler.temperature=0 is greedy" in said and "\n" not in said
    by_default = Autoregress(max_new_tokens=16)  # temperature 1
    assert cautions(replace(tiny_recipe_ar("x"), sampler=by_default)) == []


def test_a_kl_term_without_a_gradient():
    (said,) = cautions(tiny_recipe("x", beta=0.1, kl=K1()))
    assert "beta=0.1 with kl=K1()" in said and said.endswith("use K2() or K3()")
    assert cautions(tiny_recipe("x", beta=0.1, kl=K1())) == [said]
    assert cautions(tiny_recipe("x", beta=0.1)) == cautions(tiny_recipe("x", kl=K1())) == []
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    logps = logits.log_softmax(-1)
    for kl, mean_is_zero in ((K1(), True), (K2(), False)):
        mean = (logps.detach().exp() * kl(0.0 - logps[None])[0]).sum()
        assert (torch.autograd.grad(mean, logits, retain_graph=True)[0].abs().max() < 1e-12) == mean_is_zero


class Zeros:
    """Advantages that are an object: it has no `__name__`."""

    def __call__(self, rewards, group):
        return torch.zeros_like(rewards)


def test_one_completion_a_group():
    for objects in (Zeros(), partial(Zeros()), Zeros().__call__):
        (said,) = cautions(tiny_recipe("x", num_generations=1, advantages=objects))
        assert "Zeros()" in said and "\n" not in said
    for advantages, name in (
        (tiny_recipe("x").advantages, "GroupRelative(scale_rewards='group'"),
        (LeaveOneOut(), "LeaveOneOut()"),
    ):
        (said,) = cautions(tiny_recipe("x", num_generations=1, advantages=advantages))
        assert f"num_generations=1 with advantages={name}" in said and "\n" not in said


@pytest.mark.parametrize("make", [TIS, MIS, AIS, lambda **k: Compose(parts=(Reject(), TIS(**k), TIS()))])
def test_geometric_weights_of_sequences(make):
    (said,) = cautions(tiny_recipe("x", corrector=make(level="sequence", pool="geometric")))
    assert "level='sequence' and pool='geometric'" in said and "\n" not in said
    for fine in ({"level": "sequence"}, {"pool": "geometric"}):
        assert cautions(tiny_recipe("x", corrector=make(**fine))) == []


def test_weights_that_are_too_coarse_for_their_updates():
    """bf16 has 8 significant bits: between 0.5 and 1 its steps are 2^-8, and half of one is what an update needs."""
    assert torch.tensor(0.99).bfloat16() + 0.0009 == torch.tensor(0.99).bfloat16()
    full = tiny_recipe("x", model="a/checkpoint", dtype="bfloat16", learning_rate=1e-6)
    (said,) = cautions(full)
    assert "bf16 weights above 0.0005 round such updates away; use dtype='float32', bf16=True" in said
    for changes in ({"dtype": "float32", "bf16": True}, {"lora": Lora()}, {"learning_rate": 1e-4}):
        assert cautions(replace(full, **changes)) == []


def test_a_policy_in_bf16_that_is_too_coarse_for_its_updates():
    policy = tiny_masked_lm(characters="12")
    policy.module.bfloat16()
    full = tiny_recipe("x", model=policy, learning_rate=1e-6)
    (said,) = cautions(full)
    assert said.startswith("a policy in bf16 without lora") and "use one in fp32, and bf16=True" in said
    assert cautions(replace(full, lora=Lora())) == []
    policy.module.requires_grad_(False)
    next(policy.module.parameters()).data = next(policy.module.parameters()).data.float()
    next(policy.module.parameters()).requires_grad_(True)  # an adapter of one's own
    assert cautions(full) == []


@pytest.mark.parametrize(
    ("requested", "dtype", "bf16", "warns"),
    [
        (None, None, False, False),
        ("no", None, False, False),
        ("bf16", None, True, False),
        ("bf16", "bfloat16", False, False),
        ("bf16", "float32", False, True),
        ("bf16", None, False, True),
        ("fp16", None, True, True),
        ("fp8", "bfloat16", False, True),
    ],
)
def test_the_precision_of_a_launch_is_not_read(monkeypatch, requested, dtype, bf16, warns):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if requested is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", requested)
    said = launch_warnings(dtype, bf16)
    assert len(said) == warns
    assert not warns or f"mixed_precision={requested} of the launch's config is not read: set it to no" in said[0]


def test_a_run_says_it_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train(tiny_recipe(tmp_path, num_generations=1))
    printed = capsys.readouterr().out
    assert printed.count("warning: num_generations=1") == printed.count("warning: mixed_precision=bf16 of") == 1


def sampler(**options):
    return Unmask(max_new_tokens=16, diffusion_steps=3, temperature=1.0, **options)


def test_updates_without_a_bound_where_the_advantage_is_negative():
    several = tiny_recipe("x", num_iterations=2)
    assert several.rollout_quantization is not None
    (said,) = cautions(several)
    assert "num_iterations=2" in said and said.endswith("use loss=PPOClip(delta=1.2)")
    for settings, wanted in (({"epsilon_high": 0.28}, "1.28"), ({"epsilon": 0.5}, "1.5")):
        (said,) = cautions(replace(several, loss=PPOClip(**settings)))
        assert said.endswith(f"use delta={wanted} in loss")
    for changes in (
        {"loss": PPOClip(delta=1.2)},
        {"corrector": TBPO()},
        {"num_iterations": 1},
        {"rollout_quantization": None},
    ):
        assert cautions(replace(several, **changes)) == []


def test_several_updates_of_a_loss_without_any_bound():
    changes = {"rollout_quantization": None, "corrector": NoCorrection()}
    (said,) = cautions(tiny_recipe("x", loss=Reinforce(), num_iterations=4, **changes))
    assert said.startswith("num_iterations=4 with loss=Reinforce()") and "\n" not in said
    for fine in ({"loss": Reinforce()}, {"loss": CISPO(), "num_iterations": 4}, {"num_iterations": 4}):
        assert cautions(tiny_recipe("x", **fine, **changes)) == []


def test_late_rollouts_whose_lag_nothing_bounds():
    late = tiny_recipe("x", rollout_workers=1, max_staleness=2, corrector=NoCorrection())
    (said,) = cautions(late)
    assert said.startswith("late.max_staleness=2 with old_logprobs='recompute'")
    assert said.endswith("use old_logprobs='rollout' and loss=PPOClip(delta=1.2)")
    (said,) = cautions(replace(late, old_logprobs="rollout", loss=PPOClip(epsilon_high=0.28)))
    assert said.endswith("use old_logprobs='rollout' and delta=1.28 in loss")
    (said,) = cautions(replace(late, loss=PPOClip(delta=1.2)))
    assert said.endswith("use old_logprobs='rollout'")
    for changes in (
        {"old_logprobs": "rollout", "loss": PPOClip(delta=1.2)},
        {"old_logprobs": "rollout", "loss": gspo_of_a_row},
        {"corrector": TIS()},
        {"max_staleness": 0},
        {"max_staleness": 1},
    ):
        assert cautions(with_changes(late, **changes)) == []


@pytest.mark.parametrize("likelihood", [OneStep(), ELBO(), Trajectory(num_segments=2)])
def test_late_rollouts_whose_likelihood_gives_no_ratio(likelihood):
    late = tiny_recipe(
        "x",
        rollout_workers=1,
        max_staleness=2,
        corrector=NoCorrection(),
        old_logprobs="rollout",
        loss=PPOClip(delta=1.2),
        likelihood=likelihood,
    )
    (said,) = (line for line in cautions(late) if line.startswith("late.max_staleness=2"))
    assert f" with likelihood={likelihood.name!r}: " in said and "use late.max_staleness=1, or" in said
    assert not any("max_staleness" in line for line in cautions(with_changes(late, max_staleness=1)))
    several = with_changes(late, rollout_workers=3)
    (said,) = (line for line in cautions(several) if line.startswith("late.max_staleness=2"))
    assert "use late.max_staleness=1, late.workers=2, or" in said  # three workers need a lag of two


def gspo_of_a_row(log_ratio, advantages, mask):
    return log_ratio.exp().clamp(max=2) * advantages[:, None]


def test_orders_whose_law_is_not_known():
    def own(logits, tokens):
        return logits[:, 0]

    def first(logits):
        return logits[:, 0]

    def score(logits, normalizer):
        return logits[:, 0] - normalizer

    noisy = PlackettLuce(temperature=0.3)
    assert (
        cautions(tiny_recipe("x", sampler=sampler(rank=noisy), likelihood=Trajectory(), corrector=NoCorrection())) == []
    )
    coins = {"rank": MaxProb(), "commit": SoftThreshold(tau=0.9)}
    assert cautions(tiny_recipe("x", sampler=sampler(**coins), likelihood=Trajectory(), corrector=NoCorrection())) == []
    own_rule = {"rank": MaxProb(), "commit": lambda *inputs: Schedule()(*inputs)}
    declared = noisy.replace(base_rank=FunctionRank(function=score, order="deterministic"))
    known = (
        {"rank": Confidence(), "commit": Schedule()},
        {"rank": FunctionRank(function=first, order="deterministic")},
    )
    for options in (*known, {"rank": declared}):
        assert (
            cautions(tiny_recipe("x", sampler=sampler(**options), likelihood=Trajectory(), corrector=NoCorrection()))
            == []
        )
    for options, likelihood, name in (
        (
            {"rank": Confidence(), "commit": Threshold(tau=0.9)},
            Trajectory(),
            "rank=Confidence with commit=Threshold",
        ),
        ({"rank": Confidence()}, Trajectory(num_segments=2), "rank=Confidence with commit=Schedule and num_segments"),
        ({"rank": own}, Trajectory(), "rank=own with commit=Schedule"),
        ({"rank": first}, Trajectory(), "rank=first with commit=Schedule"),
        (own_rule, Trajectory(), "rank=MaxProb with commit=<lambda>"),
        ({"rank": noisy.replace(base_rank=score)}, Trajectory(), "rank=PlackettLuce with commit=Schedule"),
        ({"rank": noisy}, Trajectory(num_segments=2), "rank=PlackettLuce with commit=Schedule and num_segments"),
        (coins, Trajectory(num_segments=2), "rank=MaxProb with commit=SoftThreshold and num_segments"),
    ):
        recipe = tiny_recipe("x", sampler=sampler(**options), likelihood=likelihood, corrector=NoCorrection())
        (said,) = cautions(recipe)
        assert "ratios" in said and f"sampler.{name}" in said and "\n" not in said
        assert cautions(replace(recipe, likelihood=likelihood.replace(include_order=False))) == []
        if "rank" not in options:
            assert cautions(replace(recipe, sampler=sampler(**options | {"rank": MaxProb()}))) == []


def test_a_number_of_written_positions_that_no_gradient_sees():
    halves = FunctionCommit(function=Threshold(tau=0.9).__call__, order="deterministic", adaptive=True)
    for rank, commit in ((MaxProb(), Threshold(tau=0.9)), (Entropy(), EntropyBound(gamma=0.5)), (MaxProb(), halves)):
        chosen = sampler(rank=rank, commit=commit)
        recipe = tiny_recipe("x", sampler=chosen, likelihood=Trajectory(), corrector=NoCorrection())
        (said,) = cautions(recipe)
        assert f"commit={commit.name}: how many positions a step writes" in said and "\n" not in said
        assert cautions(replace(recipe, likelihood=ELBO())) == []  # which leaves out every order
        assert cautions(replace(recipe, sampler=chosen.replace(commit=Schedule()))) == []
        assert cautions(replace(recipe, sampler=sampler(rank=MaxProb(), commit=SoftThreshold(tau=0.9)))) == []
    by_chance = FunctionCommit(function=every_masked, order="deterministic", adaptive=True)
    chosen = sampler(rank=RandomOrder(), commit=by_chance)
    assert cautions(tiny_recipe("x", sampler=chosen, likelihood=Trajectory(), corrector=NoCorrection())) == []


def every_masked(scores, masked, steps_left):
    return masked


def test_weights_of_distributions_with_other_supports():
    for options in ({"top_k": 2}, {"top_p": 0.9}, {"top_k": 2, "top_p": 0.9}):
        recipe = tiny_recipe("x", likelihood=Trajectory(), sampler=sampler(rank=MaxProb(), **options))
        (said,) = cautions(recipe)
        assert "top_p=" in said and "sampling_support='rollout'" in said and "\n" not in said
        assert cautions(replace(recipe, sampling_support="rollout")) == []
        assert cautions(replace(recipe, corrector=NoCorrection())) == []
    assert cautions(replace(recipe, sampler=sampler(rank=MaxProb(), top_p=1.0))) == []
    assert cautions(replace(recipe, sampler=OwnSampler(max_new_tokens=16))) == []


class OwnSampler(Sampler):
    top_k: int = 0  # what it means is the sampler's own affair


def test_weights_of_what_is_no_likelihood_ratio():
    for likelihood in (OneStep(), ELBO(), Trajectory(num_segments=2, include_order=False)):
        recipe = tiny_recipe("x", likelihood=likelihood, sampler=sampler(rank=MaxProb()))
        (said,) = cautions(recipe)
        assert f"likelihood={likelihood.name!r} estimates the ratios" in said and "\n" not in said
        assert cautions(replace(recipe, corrector=NoCorrection())) == []
        assert cautions(replace(recipe, rollout_quantization=None)) == []


@pytest.mark.parametrize("likelihood", [ELBO(), Coupled()], ids=str)
def test_a_bonus_of_squared_weights(likelihood):
    recipe = tiny_recipe("x", likelihood=likelihood, corrector=NoCorrection(), entropy_coeff=0.05)
    (said,) = (line for line in cautions(recipe) if line.startswith("entropy_coeff=0.05"))
    assert f"with likelihood={likelihood.name!r}: the bonus grows" in said
    for other in (OneStep(), Trajectory()):
        assert not any("entropy_coeff" in line for line in cautions(replace(recipe, likelihood=other)))


def test_approximate_caches_that_the_estimator_does_not_see():
    recipe = tiny_recipe("x", likelihood=ELBO(), corrector=NoCorrection(), sampler=sampler(cache=DualCache()))
    (said,) = cautions(recipe)
    assert "sampler.cache='dual' is approximate, and likelihood='ELBO' does not replay" in said and "\n" not in said
    assert cautions(replace(recipe, likelihood=Trajectory())) == []
    assert cautions(replace(recipe, sampler=sampler(cache=PrefixCache(refresh=1)))) == []


def test_a_zero_that_would_compare_a_tensor_with_itself_is_refused():
    with pytest.raises(ValueError, match="zero_mismatch=True with likelihood='ELBO' would compare"):
        tiny_recipe("x", likelihood=ELBO(), zero_mismatch=True, rollout_quantization=None)


def test_a_small_models_rate_at_a_large_model(tmp_path, capsys, monkeypatch):
    assert len(learning_rate_warnings(5e-4, 8_015_581_184)) == 1
    assert learning_rate_warnings(1e-4, 8_015_581_184) == learning_rate_warnings(5e-4, 135_000_000) == []
    monkeypatch.setattr("dllm_rl.training.cautions.LARGE_MODEL", 1000)
    train(tiny_recipe(tmp_path, num_steps=0))
    assert capsys.readouterr().out.count("warning: learning_rate=") == 1
