"""rollout_batch_size is a matter of memory: tokens are the same however few rows go at a time, log-probs to rounding,
and bit for bit in arithmetic in which a row does not depend on how many others are multiplied with it."""

import dataclasses
import json
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from layouts import checkpoint
from repetitions import slow
from rollouts import fields_of
from tiny_recipe import ONE_PUZZLE, SIZES, OddPuzzles, tiny_recipe, tiny_recipe_ar
from torch import Tensor

from dllm_rl import Replay, load_policy
from dllm_rl.algorithms.advantages import Decoupled, GroupRelative, LeaveOneOut
from dllm_rl.algorithms.correctors import MIS, NoCorrection, Reject, TokenWeights
from dllm_rl.algorithms.losses import FixedLengthMean, SequenceMean, TokenMean
from dllm_rl.likelihoods.estimators import Trajectory
from dllm_rl.models.forward.batch_invariance import batch_invariant
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.monitoring.log import RunLog
from dllm_rl.monitoring.plots import read_metrics
from dllm_rl.rng import generator_for
from dllm_rl.samplers.autoregress import Autoregress
from dllm_rl.samplers.cache import BlockCache
from dllm_rl.samplers.sampler import FunctionSampler
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.step import collect as rollouts_module
from dllm_rl.step import update as update_module
from dllm_rl.step.collect import (
    GradedCompletion,
    collect,
    compute_advantages,
    reward_metrics,
)
from dllm_rl.tasks.base import Problem, Reward
from dllm_rl.tasks.datasets import task_from_dataset
from dllm_rl.training.make_step import make_step
from dllm_rl.training.policies import build_policy
from dllm_rl.training.trainer import train
from dllm_rl.types.groups import any_in_group
from dllm_rl.types.rollouts import FilterSupport, Prompts, Rollout

pytestmark = pytest.mark.usefixtures("no_rehearsal")

PROMPTS = Prompts.from_ids(
    [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]], pad_id=1, num_generations=2, seeds=list(range(100, 108))
)


def assert_same(one: Rollout, other: Rollout, *, exact: bool = True) -> None:
    for (name, a), (same, b) in zip(fields_of(one), fields_of(other), strict=True):
        assert name == same
        if isinstance(a, Tensor):
            close = not exact and a.is_floating_point() and torch.allclose(a, b, rtol=0, atol=1e-5)
            assert torch.equal(a, b) or close, name
        elif name != "forwards":
            assert a == b, name


def sampled(sampler, policy, rows: int) -> Rollout:
    with batch_invariant():
        parts = [sampler(policy, batch, generator_for(0)) for batch in PROMPTS.split(rows)]
    return Rollout.concatenate(parts, pad_id=policy.pad_id)


@pytest.mark.parametrize(
    ("how", "rows"),
    [("dream", 3), ("sdar, cached", 3), ("llama", 3), slow("dream", 4), slow("sdar", 2), slow("llama", 6)],
)
@pytest.mark.repeated(first_only=True)
def test_batches_of_rows_are_the_batch(tmp_path, how, rows):
    """Rows end early, at different times; the filters keep different numbers of tokens. Elsewhere than with full
    attention rows leave a batch at different times, and sums may round in the last bit."""
    family, exact = how.split(",")[0], how == "dream"
    policy = load_policy(checkpoint(tmp_path, family))
    options = {"max_new_tokens": 8, "temperature": 1.2, "top_p": 0.8, "suppress": (0, 1)}
    sampler = Autoregress(**options) if family == "llama" else Unmask(**options)
    if how == "sdar, cached":
        sampler = sampler.replace(cache=BlockCache())
    whole = sampled(sampler, policy, 8)
    assert_same(whole, sampled(sampler, policy, rows), exact=exact)
    lengths = whole.completion_mask.sum(-1)
    assert len(lengths.unique()) > 1 or family == "dream"


def test_shorter_batches_are_filled_up_on_the_right():
    """Two rollouts of two rows by hand, 3 and 4 columns wide, that kept one token and two."""
    rollouts = []
    for width, kept in ((3, 1), (4, 2)):
        tokens = torch.arange(2 * width).view(2, width) + 10
        yes = torch.ones(2, width, dtype=torch.bool)
        rollouts.append(
            Rollout(tokens, yes, yes, tokens - 10, -tokens.float(), group=torch.tensor([4, 4]), forwards=width,
                    filter_support=FilterSupport(tokens / 100, tokens[..., None].repeat(1, 1, kept).int()))
        )  # fmt: skip
    both = Rollout.concatenate(rollouts, pad_id=7)
    assert both.tokens.tolist() == [[10, 11, 12, 7], [13, 14, 15, 7], [10, 11, 12, 13], [14, 15, 16, 17]]
    assert both.attention_mask[:, 3].tolist() == both.completion_mask[:, 3].tolist() == [False, False, True, True]
    assert both.unmask_step[0].tolist() == [0, 1, 2, -1]
    assert both.logprobs[0].tolist() == [-10, -11, -12, 0] and both.filter_support.log_mass[0, 3] == 0
    assert both.filter_support.ids[0].tolist() == [[10, -1], [11, -1], [12, -1], [-1, -1]]
    assert both.forwards == 7 and both.group.tolist() == [0, 0, 1, 1]
    none = Rollout.concatenate(
        [
            rollouts[0],
            dataclasses.replace(rollouts[1], filter_support=dataclasses.replace(rollouts[1].filter_support, ids=None)),
        ],
        pad_id=7,
    )
    assert none.filter_support.ids is None  # some set was too large to record


@pytest.mark.parametrize(
    "make",
    [tiny_recipe, slow(tiny_recipe_ar), slow(partial(tiny_recipe, model=partial(tiny_llama, causal=False, **SIZES)))],
)
def test_a_step_of_a_run(tmp_path, make):
    """With dynamic sampling, whose second draw has other prompts and fewer."""
    rows, seen, policy = [], [], None
    for size in (None, 8, 3):  # groups have four rows, and 3 splits them
        recipe = make(tmp_path, task=OddPuzzles(), max_num_gen_batches=2, rollout_batch_size=size, train_batch_size=3)
        sampler = recipe.sampler
        spied = FunctionSampler(function=partial(spy, sampler, rows), max_new_tokens=16)
        recipe = dataclasses.replace(recipe, sampler=spied)
        policy = policy or build_policy(recipe, torch.device("cpu"))
        run = make_step(recipe, accelerator=Accelerator(cpu=True), policy=policy, rollout_policy=policy)
        samples, answers, _ = collect(run, 0)
        assert [answer.reward.value for answer in answers] == samples.rewards.tolist()
        seen.append((samples.rollout, samples.rewards))
        assert max(rows) <= (size or 12)
        rows.clear()
    for rollout, rewards in seen[1:]:
        assert_same(seen[0][0], rollout, exact=False)
        assert torch.equal(seen[0][1], rewards)


def spy(sampler, rows, policy, prompts, generator):
    rows.append(len(prompts.tokens))
    return sampler(policy, prompts, generator)


def test_groups_stay_whole_if_they_fit():
    assert [part.group.tolist() for part in PROMPTS.split(5)] == [[0, 0, 1, 1], [2, 2, 3, 3]]
    assert [part.seeds.tolist() for part in PROMPTS.split(1)] == [[seed] for seed in range(100, 108)]
    with pytest.raises(ValueError, match="every row needs a seed, so that it does not depend on the split"):
        dataclasses.replace(PROMPTS, seeds=None).split(2)


def test_rows_that_are_drawn_again_have_seeds_of_their_own(tmp_path):
    """Every prompt with an odd number tells completions apart; the others' places are drawn again."""
    seen, plain = [], Unmask(max_new_tokens=16, diffusion_steps=3, temperature=1.0)

    def spied(policy, prompts, generator):
        seen.append(set() if prompts.seeds is None else set(prompts.seeds.tolist()))
        return plain(policy, prompts, generator)

    sampler = FunctionSampler(function=spied, max_new_tokens=16)
    recipe = tiny_recipe(tmp_path, task=OddPuzzles(), sampler=sampler, max_num_gen_batches=2)
    policy = build_policy(recipe, torch.device("cpu"))
    collect(make_step(recipe, accelerator=Accelerator(cpu=True), policy=policy, rollout_policy=policy), 0)
    first, again = seen
    assert first and again and not first & again


@pytest.mark.slow
def test_a_sampler_that_ignores_the_seeds_draws_other_numbers_in_every_batch(tmp_path):
    drawn, plain = [], Unmask(max_new_tokens=16, diffusion_steps=3, temperature=1.0)

    def without_seeds(policy, prompts, generator):
        drawn.append(torch.rand(3, generator=generator).tolist())
        return plain(policy, dataclasses.replace(prompts, seeds=None), generator)

    def sampled_by(name):
        drawn.clear()
        sampler = FunctionSampler(function=without_seeds, max_new_tokens=16)
        train(tiny_recipe(tmp_path / name, sampler=sampler, rollout_batch_size=2))
        return list(map(tuple, drawn))

    first = sampled_by("first")
    assert len(set(first[-16:])) == 16, "two steps of eight batches"
    assert first == sampled_by("again")


@pytest.mark.parametrize("make", [tiny_recipe, tiny_recipe_ar])
@pytest.mark.repeated(first_only=True)
def test_num_tokens_counts_every_prompt_and_completion_that_was_sampled_so_far(tmp_path, make):
    """With dynamic sampling, whose later draws count too. What the sampler was asked and returned is counted here."""
    seen = []

    def counted(policy, prompts, generator, *, sampler):
        rollout = sampler(policy, prompts, generator)
        seen.append(int(rollout.attention_mask.sum()))  # of every row: its prompt and its completion
        return rollout

    recipe = make(tmp_path, task=OddPuzzles(), max_num_gen_batches=3)
    sampler = FunctionSampler(function=partial(counted, sampler=recipe.sampler), max_new_tokens=16)
    recipe = dataclasses.replace(recipe, sampler=sampler)
    policy, log = build_policy(recipe, torch.device("cpu")), RunLog(tmp_path, start=0, main=True)
    run = make_step(recipe, accelerator=Accelerator(cpu=True), policy=policy, rollout_policy=policy, log=log)
    for step in (0, 1):
        *_, metrics = collect(run, step)
        log.write(step, metrics)
        assert metrics["dynamic_sampling/draws"] > 1 and metrics["num_tokens"] == sum(seen)


@pytest.mark.slow
def test_num_tokens_goes_on_after_a_resume(tmp_path):
    """A step of a 4x4 Sudoku has 16 completions of 16 tokens, each after a prompt of 17: 528 tokens."""
    train(tiny_recipe(tmp_path, num_steps=1, lr_schedule_steps=2))
    train(tiny_recipe(tmp_path, lr_schedule_steps=2, resume_from_checkpoint="latest"))
    assert [row["num_tokens"] for row in read_metrics(tmp_path)] == [528, 1056]


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_an_advantage_function_that_fails_in_a_later_step_is_named(wrong, tmp_path):
    def sometimes(rewards, group):
        return rewards if rewards.max() < 2 else rewards * wrong

    recipe = tiny_recipe(tmp_path, advantages=sometimes)
    ones, group = torch.ones(6), torch.arange(6) // 3
    assert torch.equal(compute_advantages(recipe.advantages, ones, group, {}), ones)
    for function, rewards in ((sometimes, 2 * ones), (lambda *given: ones[0], ones), (lambda *given: None, ones)):
        recipe = dataclasses.replace(recipe, advantages=function)
        with pytest.raises(ValueError, match=f"advantages=.*{'sometimes' if function is sometimes else 'lambda'}"):
            compute_advantages(recipe.advantages, rewards, group, {})


def test_an_advantage_function_that_works_in_place_changes_no_samples():
    def centered(rewards, group, *, parts, weights):
        group.zero_()
        weights *= 0
        parts -= 1
        return rewards.sub_(rewards.mean())

    given = [torch.tensor([1.0, 3.0]), torch.tensor([0, 1]), torch.tensor([[1.0, 3.0]]), torch.tensor([1.0])]
    before = [each.clone() for each in given]
    advantages = compute_advantages(centered, given[0], given[1], {"parts": given[2], "weights": given[3]})
    assert advantages.tolist() == [-1, 1] and all(map(torch.equal, given, before))


@pytest.mark.parametrize("advantages", [GroupRelative(), Decoupled()], ids=str)
def test_rewards_that_fp32_cannot_tell_apart_have_advantages(tmp_path, advantages):
    """Total energies: about a million, and hundredths apart. The sum of two weights tells them apart too."""

    def energy(completions, **columns):
        return [-1e6 - 0.01 * index for index in range(len(completions))]

    def constant(completions, **columns):
        return [3e6] * len(completions)

    rows = [{"prompt": "1+1="}, {"prompt": "1+2="}]
    task = task_from_dataset(rows, reward_funcs=[energy, constant], weights=[0.7, 0.3])
    policy = tiny_masked_lm(characters="0123456789+=")
    recipe = tiny_recipe(tmp_path, task=task, eval_task=task, validation_task=task, advantages=advantages)
    context = make_step(recipe, accelerator=Accelerator(cpu=True), policy=policy, rollout_policy=policy)
    samples, _, metrics = collect(context, 0)
    assert samples.rewards.dtype == torch.float64 and samples.advantages.dtype == torch.float32
    first = samples.rewards[samples.group == 0]
    torch.testing.assert_close(first.diff(), torch.full_like(first.diff(), -0.007), rtol=1e-6, atol=0)
    assert (samples.advantages.diff()[: len(first) - 1] < 0).all()
    assert metrics["frac_reward_zero_std"] == 0


def test_a_batch_of_one_completion_has_a_reward_std_of_zero():
    completion = GradedCompletion(Problem("1"), "2", Reward(0.5, True), 1, 1, False, 1)
    group = torch.tensor([0])
    metrics = reward_metrics(torch.tensor([0.5]), group, [completion], group, Accelerator(cpu=True))
    assert metrics["reward_std"] == 0.0 and metrics["completions/clipped_ratio"] == 1.0


def test_a_completion_or_a_process_that_lacks_a_metric_is_left_out_of_its_mean(monkeypatch):
    breakdowns = [{"reward": 0.5}, {"reward": 0.0, "accuracy": 0.75}]
    graded = [GradedCompletion(Problem("1"), "2", Reward(0.5, True, each), 1, 1, False, 1) for each in breakdowns]
    group = torch.tensor([0, 0])
    monkeypatch.setattr(rollouts_module, "gather_objects", lambda names, _: [*names, "only_elsewhere"])
    metrics = reward_metrics(torch.tensor([0.5, 0.0]), group, graded, group, Accelerator(cpu=True))
    assert metrics["rewards/accuracy/mean"] == 0.75 and metrics["rewards/reward/mean"] == 0.25
    assert "rewards/only_elsewhere/mean" not in metrics


def judge(completions, **_):
    """Applies to completions that begin with one of the first letters of a tiny vocabulary."""
    return [None if text[:1] in ("1", "2", "") else float(len(set(text))) for text in completions]


def judged_recipe(directory, function=judge, **settings):
    task = task_from_dataset([{"prompt": f"{a}{b}="} for a in "1234" for b in "1234"], reward_funcs=[function])
    small = {"num_steps": 3, "log_completions_steps": 1, "num_generations": 4, "train_batch_size": 4}
    return tiny_recipe(directory, task=task, **small | ONE_PUZZLE | settings)


@pytest.mark.parametrize("settings", [{"num_steps": 1}, {}, {"advantages": LeaveOneOut()}, {"max_num_gen_batches": 3}])
@pytest.mark.repeated(first_only=True)
def test_a_completion_without_a_reward_has_no_advantage_and_is_not_counted(tmp_path, settings, monkeypatch):
    recipe = judged_recipe(tmp_path, **settings)
    seen = []
    compute = rollouts_module.compute_advantages

    def record(function, rewards, group, arguments):
        advantages = compute(function, rewards, group, arguments)
        seen.append((rewards, advantages))
        return advantages

    monkeypatch.setattr(rollouts_module, "compute_advantages", record)
    train(recipe)
    rows = read_metrics(tmp_path)
    assert len(rows) == len(seen) == recipe.num_steps
    assert any(rewards.isnan().any() and not rewards.isnan().all() for rewards, _ in seen)
    for row, (rewards, advantages) in zip(rows, seen, strict=True):
        graded = rewards[~rewards.isnan()]
        assert not advantages[rewards.isnan()].any() and advantages.isfinite().all()
        if recipe.max_num_gen_batches == 1:
            assert row["reward"] == pytest.approx(graded.mean().item())
            assert row["rewards/judge/mean"] == pytest.approx(row["reward"]) and row["parsed"] == 1.0
    logged = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert all((row["reward"] is None) == (row["parts"] == {}) for row in logged)


@pytest.mark.parametrize(
    "settings",
    [{"num_steps": 1}, {}, {"beta": 0.5}, {"entropy_coeff": 0.1}, {"corrector": Reject(threshold=1e-9)}],
)
@pytest.mark.repeated(first_only=True)
def test_a_completion_without_a_reward_is_in_no_term_and_no_mean_of_the_loss(tmp_path, settings, monkeypatch):
    """Tokens that the corrector rejects are in no mean either; the rows of a group without an advantage are."""
    seen = []

    def watched(context, samples, *given):
        (batch, *_), metrics = make(context, samples, *given)
        seen.append((samples.samples, batch, metrics["trained/rollout_rs_masked_fraction"]))
        return [batch], metrics

    make = update_module.make_batches
    monkeypatch.setattr(update_module, "make_batches", watched)
    train(judged_recipe(tmp_path, **settings))
    assert any(samples.rewards.isnan().any() for samples, *_ in seen)
    for samples, batch, masked in seen:
        lacks = samples.rewards.isnan()
        sizes = batch.rollout.completion_mask.sum(-1)
        trains_all = "beta" in settings or "entropy_coeff" in settings
        mixed = any_in_group(samples.advantages != 0, samples.group)
        trained = ~lacks & (mixed | trains_all)
        counted = ~lacks & (batch.loss_mask.any(-1) | ~trained)
        assert batch.num_sequences == int(counted.sum()) and not batch.loss_mask[lacks].any()
        if "corrector" in settings:
            assert batch.num_tokens == int(sizes[~lacks & ~trained].sum() + batch.loss_mask.sum())
            assert masked == pytest.approx(1 - batch.loss_mask.sum().item() / sizes[trained].sum().item())
        else:
            assert batch.num_tokens == int(sizes[~lacks].sum()) and masked == 0
            assert torch.equal(batch.loss_mask.any(-1), trained)


def odd_rows(stats):
    is_odd = torch.arange(len(stats.mask)) % 2 == 1
    return TokenWeights(torch.ones_like(stats.log_mismatch), stats.mask & is_odd[:, None], {})


@pytest.mark.parametrize(
    "corrector", [odd_rows, Reject(threshold=5e-4), MIS(min_ratio=0.9, max_ratio=1.1, level="sequence", outside="drop")]
)
@pytest.mark.repeated(first_only=True)
def test_completions_that_the_corrector_drops_are_in_no_mean_over_sequences(tmp_path, corrector, monkeypatch):
    """The coefficients of what stays sum to 1, as under `TokenMean`; those of a constant length to the mean length."""
    seen, make = [], update_module.make_batches

    def watched(*given):
        seen.append(make(*given))
        return seen[-1]

    monkeypatch.setattr(update_module, "make_batches", watched)
    train(tiny_recipe(tmp_path, corrector=corrector, beta=0.1, num_steps=1, **ONE_PUZZLE))  # beta trains all rows
    ((batch, *_), _) = seen[-1]
    counts = {"num_tokens": batch.num_tokens, "num_sequences": batch.num_sequences}
    kept = batch.loss_mask.any(-1).sum()
    assert 0 < kept < len(batch.loss_mask)
    for reduction in (TokenMean(), SequenceMean()):
        assert reduction(batch.loss_mask, **counts).sum().item() == pytest.approx(1)
    constant = FixedLengthMean(length=4)(batch.loss_mask, **counts).sum()
    assert constant.item() == pytest.approx((batch.loss_mask.sum() / kept / 4).item())


@pytest.mark.parametrize("changes", [{}, {"num_iterations": 0, "replay": Replay(min_reward=2.0)}])
@pytest.mark.repeated(first_only=True)
def test_no_token_is_rejected_where_none_is_trained(tmp_path, changes):
    def same(completions, **_):
        return [1.0] * len(completions)

    train(judged_recipe(tmp_path, same, num_steps=1, **changes))
    assert all(row["trained/rollout_rs_masked_fraction"] == 0 for row in read_metrics(tmp_path))


def test_a_step_without_any_reward_ends_the_run_with_an_error(tmp_path):
    calls = []

    def outage(completions, **_):
        calls.append(len(completions))
        return [1.0 if len(calls) < 2 else None for _ in completions]

    told = r"no completion of step \d has a reward: every reward function returned None"
    with pytest.raises(RuntimeError, match=told):
        train(judged_recipe(tmp_path, outage))


def test_an_advantage_function_that_counts_missing_rewards_is_named(tmp_path):
    def mine(rewards, group):
        return rewards - rewards.mean()

    with pytest.raises(
        ValueError, match=r"mine\) gave numbers that are not finite for rewards of shape \(16,\); \d+ of them"
    ):
        train(judged_recipe(tmp_path, advantages=mine))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"max_retained_graphs": 0}, {"zero_mismatch": True}])
def test_a_completion_without_a_reward_has_the_mismatch_that_it_has(tmp_path, settings):
    """Here none: learner and rollout are one model."""
    given = {"likelihood": Trajectory(), "rollout_quantization": None, "corrector": NoCorrection()}
    train(judged_recipe(tmp_path, num_steps=3, **given, **settings))
    rows = read_metrics(tmp_path)
    assert all(row["rollout_corr/ess"] == pytest.approx(1, abs=1e-5) for row in rows)
    assert all(row["rollout_corr/abs_log_ratio_mean"] < 1e-5 for row in rows)
