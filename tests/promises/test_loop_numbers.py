"""The loop's numbers, worked out again from the model's logits alone: no stored curve, so they hold on any machine.

One step by plain descent, with rollouts of five levels (far off-policy), rows of unequal lengths, planted advantages
and a group without any. What `train` makes of the weights is compared with formulas written out here.
"""

import math
from copy import copy, deepcopy
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from emulated import five_level_emulated
from repetitions import few
from run_outputs import metrics_of
from tiny_recipe import SIZES, Wrapped, tiny_recipe, with_changes

from dllm_rl import load_policy
from dllm_rl.algorithms.correctors import TIS, Compose, NoCorrection, Reject
from dllm_rl.algorithms.losses import K2, FixedLengthMean, PPOClip, SequenceMean, TokenMean
from dllm_rl.algorithms.optimizers import AdamW, LinearDecay
from dllm_rl.checkpoints.checkpoint import list_checkpoints
from dllm_rl.likelihoods.estimators import ELBO, Coupled, OneStep
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.quantization.rollout_policy import quantized_copy
from dllm_rl.samplers.sampler import FunctionSampler
from dllm_rl.tasks.base import Reward
from dllm_rl.training.trainer import train

pytestmark = pytest.mark.usefixtures("no_rehearsal")

MODEL = partial(tiny_masked_lm, **SIZES | {"num_layers": 2}, head_std=0.3)
RATE, PROMPTS, GROUP, SHORTER = 0.5, 3, 4, 5
A = torch.tensor([[1.0, -0.5, 0.25, -0.75], [0.0, 0.0, 0.0, 0.0], [-1.5, 0.5, 0.75, 0.25]])


def descent(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr)


class Planted:
    """A recipe of one step of plain descent, and what its sampler gave."""

    def __init__(self, directory, **changes):
        self.rollouts = []
        base = tiny_recipe(directory)
        settings = {
            "model": MODEL,
            "seed": 3,
            "likelihood": OneStep(prompt_mask=0.0),
            "corrector": NoCorrection(),
            "rollout_quantization": five_level_emulated,
            "advantages": lambda rewards, group: A.flatten(),
            "train_batch_size": PROMPTS,
            "num_generations": GROUP,
            "num_steps": 1,
            "optim": descent,
            "lr_schedule": lambda step, num_steps: 1.0,
            "learning_rate": RATE,
            "max_grad_norm": 1e9,
            "validation_task": replace(base.validation_task, size=1),
            "eval_task": replace(base.eval_task, size=1),
            "eval_sampler": base.eval_sampler.replace(diffusion_steps=1),
            "sampler": FunctionSampler(function=partial(self.sample, base.sampler), max_new_tokens=16),
        }
        self.recipe = with_changes(base, **settings | changes)

    def sample(self, sampler, policy, prompts, generator):
        """A rollout whose row i has i % 3 * 5 completion tokens fewer than 16: the first ones count as the prompt."""
        rollout = sampler(policy, prompts, generator)
        mask = rollout.completion_mask.clone()
        for row in range(len(mask)):
            mask[row, mask[row].nonzero()[: row % 3 * SHORTER, 0]] = False
        rollout = replace(rollout, completion_mask=mask)
        self.rollouts.append(rollout)
        return rollout

    def train(self):
        self.summary = train(self.recipe)
        self.after = self.summary.policy.module.state_dict()
        return metrics_of(self.directory)

    @property
    def directory(self):
        return Path(self.recipe.directory)


def log_probs(policy, rollout):
    """log p of each completion token with the whole completion masked, (B, T): the mask token itself is never drawn."""
    mask = rollout.completion_mask
    logits = policy.logits(rollout.tokens.masked_fill(mask, policy.spec.mask_id), rollout.attention_mask).float()
    logits[..., policy.spec.mask_id] = -math.inf
    logp = torch.log_softmax(logits, -1).gather(-1, rollout.tokens[..., None])[..., 0]
    return torch.where(mask, logp, 0)


def flat(state, names):
    return torch.cat([state[name].flatten() for name in names])


def moved(planted, before=None):
    """How far the step moved the weights, one vector: from those of the seed, or from `before`."""
    before = at_the_start()[0].module.state_dict() if before is None else before
    return flat(planted.after, before) - flat(before, before)


@cache
def at_the_start():
    """The policy that the recipe makes, and its quantized copy. Not to be trained."""
    policy = MODEL(seed=3)
    return policy, quantized_copy(policy, five_level_emulated)


def mismatch_of(rollout):
    """log p of the learner at the start less that of the quantized policy, (B, T)."""
    with torch.no_grad():
        learner, behind = (log_probs(policy, rollout) for policy in at_the_start())
    return learner - behind


def by_hand(planted, *, weight=None, kept=None, coefficient=None, base="old", updates=1, given=A, clip=(0.8, 1.2)):
    """The same by plain autograd: -rate * grad of -sum c w min(r A, clip(r, 0.8, 1.2) A), `updates` times."""
    rollout, start = planted.rollouts[0], at_the_start()[0]
    policy = copy(start)
    policy.module = deepcopy(start.module)
    mask, advantages = rollout.completion_mask, given.flatten()[:, None]
    with torch.no_grad():
        old = log_probs(policy, rollout)
    behind = old - mismatch_of(rollout)
    rho = (old - behind).exp()
    assert rho[mask].max() > 1.5 and rho[mask].min() < 0.7, "without mismatch these tests would prove nothing"
    weight = torch.ones_like(rho) if weight is None else weight(rho)
    dead = (given == 0).all(-1).repeat_interleave(GROUP)[:, None]
    keep = mask if kept is None else mask & (kept(rho) | dead)  # nothing is rejected where nothing is learned
    c = coefficient(keep)
    for _ in range(updates):
        ratio = (log_probs(policy, rollout) - (old if base == "old" else behind)).exp()
        objective = torch.minimum(ratio * advantages, ratio.clamp(*clip) * advantages)
        (-(c * weight * objective)[keep].sum()).backward()
        with torch.no_grad():
            for parameter in policy.module.parameters():
                if parameter.grad is not None:
                    parameter -= RATE * parameter.grad
                    parameter.grad = None
    before = start.module.state_dict()
    return flat(policy.module.state_dict(), before) - flat(before, before)


def assert_same_direction_and_length(got, want):
    assert want.norm() > 1e-3, "a step of zero would prove nothing"
    assert (got - want).norm() < 2e-3 * want.norm(), f"off by {(got - want).norm() / want.norm():.4f} of the step"


def by_token(keep):
    return torch.ones(keep.shape) / keep.sum()


def by_sequence(keep):
    return torch.ones(keep.shape) / keep.sum(-1, keepdim=True).clamp(min=1) / len(keep)


def by_constant(keep):
    return torch.ones(keep.shape) / (len(keep) * 20)


CAPPED = partial(torch.clamp, max=1.5)
LIMIT = 0.3
CASES = {
    "no correction": ({}, {}),
    "weights and rejection": (
        {"corrector": Compose(parts=(TIS(cap=1.5), Reject(level="token", statistic="k1", threshold=LIMIT)))},
        {"weight": CAPPED, "kept": lambda rho: rho.log().abs() <= LIMIT},
    ),
    "mean over sequences, those without advantage counted": (
        {"loss_reduction": SequenceMean()},
        {"coefficient": by_sequence},
    ),
    "rejection under sequence": (
        {"loss_reduction": SequenceMean(), "corrector": Reject(level="token", statistic="k1", threshold=LIMIT)},
        {"coefficient": by_sequence, "kept": lambda rho: rho.log().abs() <= LIMIT},
    ),
    "constant length": ({"loss_reduction": FixedLengthMean(length=20)}, {"coefficient": by_constant}),
    "two updates, ratios against the start of the update": (
        {"num_iterations": 2, "corrector": TIS(cap=1.5)},
        {"updates": 2, "weight": CAPPED},
    ),
    "bypass, two updates": ({"old_logprobs": "rollout", "num_iterations": 2}, {"base": "rollout", "updates": 2}),
    "bypass and rejection": (
        {"old_logprobs": "rollout", "corrector": Reject(level="token", statistic="k1", threshold=LIMIT)},
        {"base": "rollout", "kept": lambda rho: rho.log().abs() <= LIMIT},
    ),
    "micro-batches": (
        {"micro_batch_size": GROUP, "num_iterations": 2, "corrector": TIS(cap=1.5)},
        {"updates": 2, "weight": CAPPED},
    ),
}


OFTEN = ["weights and rejection", "bypass, two updates", "micro-batches"]  # and the next test's


@pytest.mark.parametrize("name", few(CASES, OFTEN))
def test_one_step_is_the_formula(name, tmp_path):
    changes, formula = CASES[name]
    planted = Planted(tmp_path, **changes)
    planted.train()
    assert_same_direction_and_length(moved(planted), by_hand(planted, **{"coefficient": by_token} | formula))


@pytest.mark.slow
def test_the_cases_differ(tmp_path):
    """Each formula is far from the plain one, so that a part that is left out is seen."""
    planted = Planted(tmp_path)
    planted.train()
    plain = by_hand(planted, coefficient=by_token)
    for name, (_, formula) in list(CASES.items())[1:]:
        other = by_hand(planted, **{"coefficient": by_token} | formula)
        assert (other - plain).norm() > 0.02 * plain.norm(), name
    inverse = by_hand(planted, coefficient=by_token, weight=lambda rho: (1 / rho).clamp(max=1.5))
    right = by_hand(planted, coefficient=by_token, weight=CAPPED)
    assert (inverse - right).norm() > 0.02 * right.norm(), "the sign of log_mismatch must matter"


def test_metrics_are_of_the_tokens_before_rejection_and_shares_of_what_is_corrected(tmp_path):
    """And the step under rejection is the formula."""
    changes, formula = CASES["rejection under sequence"]
    planted = Planted(tmp_path, **changes, num_mismatch_groups=9)
    (row,) = planted.train()
    assert_same_direction_and_length(moved(planted), by_hand(planted, **formula))
    rollout = planted.rollouts[0]
    mask, live = rollout.completion_mask, (A != 0).any(-1).repeat_interleave(GROUP)
    d = mismatch_of(rollout).double()
    for prefix, tokens in (("rollout_corr/", mask), ("trained/", mask & live[:, None])):
        x = d[tokens]
        assert row[f"{prefix}k3_kl"] == pytest.approx((x.exp() - 1 - x).mean().item(), rel=1e-3)
        assert row[f"{prefix}kl"] == pytest.approx(-x.mean().item(), rel=1e-3, abs=1e-5)
        assert row[f"{prefix}abs_log_ratio_max"] == pytest.approx(x.abs().max().item(), rel=1e-3)
    rejected = d[mask & live[:, None]].abs() > LIMIT
    assert 0.05 < rejected.double().mean() < 0.95
    assert row["trained/rollout_rs_masked_fraction"] == pytest.approx(rejected.double().mean().item())
    r = d.exp() - 1
    for name, sign in (("positive", A.flatten() > 0), ("negative", A.flatten() < 0)):
        sums = (-r * A.flatten()[:, None])[mask & sign[:, None]].sum().item()
        assert row[f"rollout_corr/contribution_{name}"] == pytest.approx(sums / mask.sum().item(), rel=1e-3)


def test_a_sample_of_the_groups_without_advantage_stands_for_all_of_them_and_moves_nothing(tmp_path):
    """Two such groups, of which one is scored: it counts twice, and rows that are not scored stay in denominators."""
    live = A * torch.tensor([[1.0], [0.0], [0.0]])
    changes = {"advantages": lambda rewards, group: live.flatten(), "loss_reduction": SequenceMean()}
    one = Planted(tmp_path, num_mismatch_groups=1, **changes)
    (row,) = one.train()
    assert_same_direction_and_length(moved(one), by_hand(one, coefficient=by_sequence, given=live))
    rollout = one.rollouts[0]
    d = mismatch_of(rollout)
    k3 = (d.double().exp() - 1 - d).sum(-1).view(PROMPTS, GROUP).sum(-1)  # 0 off the completion
    drawn = [(k3[0] + 2 * k3[group]).item() / rollout.completion_mask.sum().item() for group in (1, 2)]
    assert min(abs(row["rollout_corr/k3_kl"] / value - 1) for value in drawn) < 1e-3


def test_contributions_are_logged_at_every_update(tmp_path):
    planted = Planted(tmp_path, num_iterations=2, learning_rate=0.02)  # small: the step goes its advantages' way
    (row,) = planted.train()
    for name in ("contribution_positive", "contribution_negative"):
        assert row[f"off_policy/old/{name}/iteration_0"] == 0 > row[f"off_policy/old/{name}/iteration_1"]
        first = row[f"off_policy/rollout/{name}/iteration_0"]
        assert first == pytest.approx(row[f"rollout_corr/{name}"], rel=1e-3), "nothing has moved yet"
        assert row[f"off_policy/rollout/{name}/iteration_1"] == row[f"off_policy/rollout/{name}"] != first
    rollout = planted.rollouts[0]
    live = rollout.completion_mask & (A != 0).any(-1).repeat_interleave(GROUP)[:, None]
    d = mismatch_of(rollout)
    assert row["off_policy/rollout/m2/iteration_0"] == pytest.approx(d[live].square().mean().item(), rel=1e-3)


def test_the_gradient_is_the_recipes_objectives_scaled_down_to_the_norm_and_logged_before_that(tmp_path):
    """In bypass r is far from 1 at the first update: another clip is another step."""
    wide = {"loss": PPOClip(epsilon=10.0), "loss_reduction": TokenMean(), "old_logprobs": "rollout"}
    planted = Planted(tmp_path, max_grad_norm=0.01, **wide)
    (row,) = planted.train()
    want, narrow = (by_hand(planted, coefficient=by_token, base="rollout", clip=c) for c in ((-9, 11), (0.8, 1.2)))
    assert (want - narrow).norm() > 0.05 * narrow.norm()
    assert row["grad_norm"] == pytest.approx(want.norm().item() / RATE, rel=2e-3) and row["grad_norm"] > 0.02
    assert moved(planted).norm().item() == pytest.approx(RATE * 0.01, rel=1e-3)
    assert_same_direction_and_length(moved(planted) / moved(planted).norm(), want / want.norm())


def test_the_kl_term_reaches_groups_without_advantage_and_counts_every_token(tmp_path):
    """The second step's advantages are all 0: what moves is beta * mean over all tokens of (logp - ref)^2 / 2."""
    steps = iter([A.flatten(), torch.zeros(A.numel())])

    def advantages(rewards, group):  # a run also tries them on made-up rewards, before its first step
        made_up = torch.equal(rewards, torch.arange(len(rewards)) / len(rewards))
        return torch.ones_like(rewards) if made_up else next(steps)

    planted = Planted(tmp_path, num_steps=2, beta=0.7, kl=K2(), advantages=advantages, save_steps=1, save_total_limit=9)
    rows = planted.train()
    assert [rollout.weights_version for rollout in planted.rollouts] == [0, 1]
    rollout, mask = planted.rollouts[1], planted.rollouts[1].completion_mask
    with torch.no_grad():
        reference = log_probs(at_the_start()[0], rollout)
    policy = load_policy(planted.directory / "checkpoints" / "step-000001")
    names = {name: value.clone() for name, value in policy.module.state_dict().items()}
    distance = (log_probs(policy, rollout) - reference)[mask].square() / 2
    (0.7 * distance.mean()).backward()
    gradients = {name: p.grad for name, p in policy.module.named_parameters() if p.grad is not None}
    want = torch.cat([-RATE * gradients.get(name, torch.zeros_like(value)).flatten() for name, value in names.items()])
    assert_same_direction_and_length(moved(planted, names), want)
    assert rows[1]["kl"] == pytest.approx(distance.mean().item(), rel=1e-3)


@pytest.mark.parametrize(
    "estimator", [ELBO(num_samples=2), pytest.param(Coupled(), marks=pytest.mark.slow)], ids=["elbo", "coupled"]
)
@pytest.mark.slow
def test_masks_are_drawn_anew_every_step_and_depend_on_the_seed(estimator, tmp_path, monkeypatch):
    draw_views = type(estimator).draw_views

    def masks(folder, **changes):
        drawn = []
        monkeypatch.setattr(type(estimator), "draw_views", lambda *given: drawn.append(draw_views(*given)) or drawn[-1])
        planted = Planted(tmp_path / folder, likelihood=estimator, num_steps=3, **changes)
        once, sample = [], planted.recipe.sampler  # the same completions at every step: only masks can differ

        def same(policy, prompts, generator):
            once.append(sample(policy, prompts, generator))
            return replace(once[0], weights_version=policy.weights_version)

        planted.recipe = replace(planted.recipe, sampler=FunctionSampler(function=same, max_new_tokens=16))
        planted.train()
        return [noise.masked for noise in drawn]

    first, again, other = masks("a"), masks("b"), masks("c", seed=4, model=partial(tiny_masked_lm, **SIZES))
    assert len(first) == 3 and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])
    assert first[0].shape != other[0].shape or not torch.equal(first[0], other[0])


@pytest.mark.slow
def test_the_model_is_made_from_the_runs_seed(tmp_path):
    planted = Planted(tmp_path, seed=7)
    planted.train()
    start = load_policy(planted.directory / "checkpoints" / "step-000000").module.state_dict()
    seven, three = (flat(planted.recipe.model(seed=s).module.state_dict(), start) for s in (7, 3))
    assert torch.equal(flat(start, start), seven) and not torch.equal(seven, three)


class Ones(Wrapped):
    """Rewards the share of the digit 1 in a completion, times `worth`."""

    name = "ones"

    def __init__(self, task, worth=1.0):
        super().__init__(task)
        self.worth = worth

    def reward(self, problem, completion):
        share = completion.count("1") / 16
        return Reward(share * self.worth, True, {"solve_rate": float(set(completion) == {"1"})})


def test_evaluations_and_checkpoints_come_after_every_so_many_steps_and_each_policy_is_its_own(tmp_path):
    """The learner answers 1s and 2s by turns, the quantized policy 1s alone; the training sampler answers neither. The
    validation task is worth half of the evaluation task."""
    calls = []

    def digits(policy, prompts, generator, *, sampler):
        rollout, mine = sampler(policy, prompts, generator), getattr(policy, "quantization", None) is not None
        calls.append("quantized" if mine else "learner")
        one, two = policy.tokenizer.encode("12", add_special_tokens=False)
        place = rollout.completion_mask.cumsum(-1) % 2
        answer = torch.full_like(rollout.tokens, one) if mine else torch.where(place == 1, one, two)
        return replace(rollout, tokens=torch.where(rollout.completion_mask, answer, rollout.tokens))

    plain = tiny_recipe(tmp_path)
    recipe = with_changes(
        plain,
        sampler=plain.sampler.replace(diffusion_steps=1),
        rollout_quantization=five_level_emulated,
        train_batch_size=1,
        eval_sampler=FunctionSampler(function=partial(digits, sampler=plain.eval_sampler), max_new_tokens=16),
        eval_task=Ones(plain.eval_task),
        validation_task=Ones(plain.validation_task, worth=0.5),
        num_steps=3,
        eval_steps=2,
        save_steps=2,
        save_total_limit=9,
    )
    summary, rows = train(recipe), metrics_of(tmp_path)
    assert (summary["eval_before"]["reward"], summary["eval_after"]["reward"]) == (0.5, 0.5)
    assert (summary["eval_after_quantized"]["reward"], summary["eval_after_quantized"]["solve_rate"]) == (1.0, 1.0)
    assert [row.get("eval/reward") for row in rows] == [None, 0.25, None]
    assert calls == ["learner", "learner", "learner", "quantized"]
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [0, 2, 3]


def test_schedule_betas_and_weight_decay_are_those_of_an_adamw_written_by_hand(tmp_path):
    """Four steps; the rate rises over 2, is flat to the middle, and falls towards a tenth: 1/2, 1, 1, 0.55 of it."""
    seen = []

    def watched(*arguments, **settings):
        optimizer = AdamW(beta1=first, beta2=second, weight_decay=decay)(*arguments, **settings)
        (group,) = optimizer.param_groups
        optimizer.register_step_pre_hook(lambda *_: seen.append([p.grad.clone().double() for p in group["params"]]))
        return optimizer

    rate, (first, second), decay = 0.01, (0.8, 0.95), 0.1
    model = partial(tiny_masked_lm, **SIZES)
    recipe = tiny_recipe(
        tmp_path,
        model=model,
        sampler=tiny_recipe(tmp_path).sampler.replace(diffusion_steps=1),
        advantages=lambda rewards, group: torch.linspace(-1, 1, len(rewards)),
        rollout_quantization=None,
        train_batch_size=1,
        optim=watched,
        num_steps=4,
        learning_rate=rate,
        lr_schedule=LinearDecay(warmup_steps=2, constant_until=0.5, final=0.1),
        max_grad_norm=1.0,
    )
    summary, rows = train(recipe), metrics_of(tmp_path)
    rates = [rate * factor for factor in (0.5, 1.0, 1.0, 0.55)]
    assert [row["learning_rate"] for row in rows] == pytest.approx(rates)
    policy = model(seed=recipe.seed)
    weights = [p.detach().double() for p in policy.module.parameters()]
    means, squares = [0.0] * len(weights), [0.0] * len(weights)
    for t, (lr, gradients) in enumerate(zip(rates, seen, strict=True), start=1):
        assert torch.cat([g.flatten() for g in gradients]).norm() > 1e-3
        for i, g in enumerate(gradients):
            means[i] = first * means[i] + (1 - first) * g
            squares[i] = second * squares[i] + (1 - second) * g.square()
            step = (means[i] / (1 - first**t)) / ((squares[i] / (1 - second**t)).sqrt() + 1e-8)
            weights[i] = weights[i] * (1 - lr * decay) - lr * step
    got = torch.cat([p.detach().flatten().double() for p in summary.policy.module.parameters()])
    want = torch.cat([w.flatten() for w in weights])
    start = torch.cat([p.detach().flatten().double() for p in policy.module.parameters()])
    assert (got - want).norm() < 1e-4 * (want - start).norm()
