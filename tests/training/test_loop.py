"""The loop as a whole: what a run leaves, identities on- and off-policy, equal batches however they are split."""

import json
from dataclasses import replace

import pytest
import torch
from emulated import int3_emulated
from readme import example
from repetitions import few
from rows import NO_ROWS
from run_outputs import assert_same_weights, metrics_of, weights_of
from tiny_recipe import ONE_PUZZLE, OddPuzzles, tiny_recipe, tiny_recipe_ar, with_changes

from dllm_rl import load_policy
from dllm_rl.algorithms import correctors
from dllm_rl.algorithms.correctors import TIS, FunctionCorrector, NoCorrection
from dllm_rl.algorithms.losses import K1, K2, FixedLengthMean, SequenceMean, TokenMean
from dllm_rl.algorithms.optimizers import LinearWithWarmup
from dllm_rl.decoding.texts import decode
from dllm_rl.distributed.collectives import make_accelerator
from dllm_rl.likelihoods import estimators as likelihoods
from dllm_rl.monitoring.plots import draw_run, read_metrics
from dllm_rl.step.collect import collect
from dllm_rl.step.samples import Samples
from dllm_rl.step.score import metric_weights
from dllm_rl.training.make_step import make_step
from dllm_rl.training.trainer import train

pytestmark = pytest.mark.usefixtures("no_rehearsal")


@pytest.mark.parametrize("make", few([tiny_recipe, tiny_recipe_ar], [tiny_recipe]))
def test_a_run_leaves_what_it_promises(make, tmp_path, capsys):
    summary = train(
        make(tmp_path / "run", sft_warmup_steps=2, sft_warmup_eval_steps=1, eval_steps=1, report_to="tensorboard")
    )
    run = tmp_path / "run"
    assert json.loads((run / "summary.json").read_text()) == summary
    for part in ("eval_before", "eval_after"):
        assert 0 <= summary[part]["solve_rate"] <= 1 and 0 <= summary[part]["cell_accuracy"] <= 1
    assert summary["seed"] == 0 and summary["seconds"] > 0 and summary["recipe"]["num_generations"] == 4
    assert {"torch", "transformers"} <= set(summary["machine"]["versions"])
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [0, 1]
    wanted = {
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "rollout_corr/k3_kl",
        "rollout_corr/rollout_is_eff_sample_size",
    }
    wanted |= {
        "step_time",
        "grad_norm",
        "clip_ratio/region_mean",
        "completions/mean_length",
        "completions/mean_forwards",
        "eval/solve_rate",
        "time/rollout",
    }
    assert wanted <= set(rows[0])
    assert rows[0]["reward_std"] > 0, "equal rewards would prove nothing"
    assert rows[0]["rollout_corr/k3_kl"] > 0, "FP8 weights must differ from the learner's"
    assert (run / "training.png").is_file()
    assert {"Reward", "Problems solved", "Mismatch"} <= {axis.get_title() for axis in draw_run(run).axes}
    assert list((run / "tensorboard").glob("*/events*"))
    out = capsys.readouterr().out
    assert "->" in out and "dllm-rl sample" in out
    policy = load_policy(summary["checkpoint"])
    assert policy.tokenizer.encode("12") == [3, 4]


@pytest.mark.parametrize("make", few([tiny_recipe, tiny_recipe_ar], [tiny_recipe]))
@pytest.mark.usefixtures("exact_arithmetic")
def test_unquantized_rollouts_have_exactly_no_mismatch(make, tmp_path):
    train(make(tmp_path, rollout_quantization=None, train_batch_size=2, micro_batch_size=4, **ONE_PUZZLE))
    for row in metrics_of(tmp_path):
        exact = {"kl": 0, "k3_kl": 0, "abs_log_ratio_max": 0, "chi2_token": 0, "chi2_seq": 0, "log_ppl_diff": 0}
        exact |= {"rollout_is_mean": 1, "rollout_is_min": 1, "rollout_is_max": 1, "rollout_is_eff_sample_size": 1}
        assert {name: row[f"rollout_corr/{name}"] for name in exact} == exact


@pytest.mark.slow
@pytest.mark.parametrize(
    "corrector",
    [
        correctors.AIS(),
        *(pytest.param(c, marks=pytest.mark.slow) for c in (TIS(), TIS(level="sequence"), correctors.IcePop())),
    ],
)
@pytest.mark.usefixtures("exact_arithmetic")
def test_on_policy_every_weighting_is_none(corrector, tmp_path):
    given = {"rollout_quantization": None, "num_steps": 1}
    a = train(tiny_recipe(tmp_path / "a", corrector=NoCorrection(), **given))
    b = train(tiny_recipe(tmp_path / "b", corrector=corrector, **given))
    assert_same_weights(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss_reduction",
    [
        TokenMean(),
        *(pytest.param(f, marks=pytest.mark.slow) for f in (SequenceMean(), FixedLengthMean(length=16))),
    ],
)
def test_micro_batches_change_nothing_beyond_rounding(loss_reduction, tmp_path):
    # Plain descent: AdamW divides a gradient by its own size, and so shows the rounding of one near zero at full scale.
    changes = {"loss_reduction": loss_reduction, "num_iterations": 2, "beta": 0.04, "kl": K2(), "optim": descent}
    changes |= {"learning_rate": 0.5, "num_steps": 1}
    whole = train(tiny_recipe(tmp_path / "whole", **changes))
    parts = train(tiny_recipe(tmp_path / "parts", micro_batch_size=4, **changes))
    assert_same_weights(whole, parts, rtol=1e-5, atol=1e-6)
    for a, b in zip(metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "parts"), strict=True):
        assert a == pytest.approx(b, rel=2e-4, abs=1e-6)


@pytest.mark.slow
def test_leaving_out_groups_without_advantage_changes_nothing_but_time(tmp_path):
    # A KL term of weight 1e-30 keeps every row in the batch and adds nothing that fp32 could show.
    # Plain descent, as above: AdamW would show the rounding of gradients near zero at full scale.
    changes = {"advantages": one_live_group, "rollout_quantization": None, "optim": descent, "learning_rate": 0.5}
    changes["num_steps"] = 1
    skipped = train(tiny_recipe(tmp_path / "skipped", **changes))
    kept = train(tiny_recipe(tmp_path / "kept", beta=1e-30, kl=K1(), **changes))
    assert_same_weights(skipped, kept, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_entropy_bonus_reaches_the_weights_without_any_advantage(tmp_path):
    """With advantages 0 the bonus is all there is: it must raise -log p of what is sampled, and 0 must move nothing."""
    still = {"advantages": no_live_group, "rollout_quantization": None, "num_steps": 6}
    still |= {"likelihood": likelihoods.Trajectory(include_order=False)}
    a = train(tiny_recipe(tmp_path / "a", **still))
    b = train(tiny_recipe(tmp_path / "b", num_iterations=2, **still))
    assert_same_weights(a, b)
    still |= {"num_steps": 20, "train_batch_size": 16}
    train(tiny_recipe(tmp_path / "c", entropy_coeff=0.5, learning_rate=1e-3, sft_warmup_steps=60, **still))
    entropy = [row["entropy"] for row in metrics_of(tmp_path / "c")]
    assert sum(entropy[-5:]) / 5 > sum(entropy[:5]) / 5 + 0.03  # without its baseline the bonus LOWERS it, by 0.3
    assert "entropy" not in metrics_of(tmp_path / "a")[0]


@pytest.mark.parametrize("make", few([tiny_recipe, tiny_recipe_ar], [tiny_recipe]))
def test_dynamic_sampling_draws_until_groups_differ(make, tmp_path):
    changes = {"task": OddPuzzles(), "train_batch_size": 8, "num_steps": 1, "rollout_quantization": None}
    train(make(tmp_path / "many", max_num_gen_batches=40, **ONE_PUZZLE, **changes))
    (many,) = metrics_of(tmp_path / "many")
    recipe, accelerator = make(tmp_path, **changes), make_accelerator()
    policy = recipe.model(seed=0)
    run = make_step(recipe, accelerator=accelerator, policy=policy, rollout_policy=policy)
    one, some = (collect(replace(run, settings=recipe.replace(max_num_gen_batches=n)), 0)[2] for n in (1, 2))
    before = one["frac_reward_zero_std"]
    assert before > 0 and {some["frac_reward_zero_std"], many["frac_reward_zero_std"]} == {before}  # of the first draw
    assert many["dynamic_sampling/frac_reward_zero_std"] == 0 < many["dynamic_sampling/draws"] < 40
    assert some["dynamic_sampling/draws"] == 2 and some["dynamic_sampling/frac_reward_zero_std"] <= before
    assert many["rollout_corr/abs_log_ratio_max"] < 1e-5, "what was sampled at another width is scored the same"


def test_after_dynamic_sampling_every_reward_is_its_own_rows(tmp_path):
    recipe = replace(tiny_recipe(tmp_path, train_batch_size=8), task=OddPuzzles())
    policy, accelerator = recipe.model(seed=0), make_accelerator()
    run = make_step(recipe, accelerator=accelerator, policy=policy, rollout_policy=policy)
    before, _, _ = collect(run, 0)
    now, answers, metrics = collect(replace(run, settings=replace(run.settings, max_num_gen_batches=3)), 0)
    first, rewards, after, rewards_after = before.rollout, before.rewards, now.rollout, now.rewards
    assert metrics["dynamic_sampling/draws"] > 1
    dull = (rewards.view(8, 4) == rewards.view(8, 4)[:, :1]).all(-1)
    kept = (~dull).repeat_interleave(4)
    assert 0 < dull.sum() < 8 and torch.equal(rewards_after[kept], rewards[kept])
    width = after.tokens.shape[1] - first.tokens.shape[1]
    assert torch.equal(after.tokens[kept, width:], first.tokens[kept])
    assert not after.attention_mask[kept, :width].any() and (after.unmask_step >= 0).equal(after.completion_mask)
    known = {problem.prompt: problem for problem in (recipe.task[i] for i in range(len(recipe.task)))}
    replaced = 0
    for row, completion in enumerate(decode(policy, after)):
        asked = policy.tokenizer.decode(after.tokens[row, after.attention_mask[row] & ~after.completion_mask[row]])
        before = policy.tokenizer.decode(first.tokens[row, first.attention_mask[row] & ~first.completion_mask[row]])
        replaced += asked != before
        assert (answers[row].problem.prompt, answers[row].completion) == (asked, completion)
        assert recipe.task.reward(known[asked], completion).value == pytest.approx(rewards_after[row].item())
    assert replaced >= 4


@pytest.mark.slow
def test_dynamic_sampling_with_nothing_to_replace_changes_nothing(tmp_path):
    a = train(tiny_recipe(tmp_path / "a", num_steps=1))
    b = train(tiny_recipe(tmp_path / "b", num_steps=1, max_num_gen_batches=5))
    assert metrics_of(tmp_path / "a")[0]["frac_reward_zero_std"] == 0
    assert_same_weights(a, b)


def descent(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr)


@pytest.mark.slow
def test_parameter_groups_keep_the_ratio_of_their_rates(tmp_path):
    """Also if the run is resumed with another rate and weight decay. AdamW's state is loaded in one way, any other's in
    another.
    """
    for optimizer in (torch.optim.SGD, torch.optim.AdamW):
        used, decay = [], [0.0]  # both rates, and the weight decay, in each update

        def two_groups(parameters, lr, optimizer=optimizer, used=used, decay=decay):
            first, *others = parameters
            groups = [{"params": [first], "lr": 3 * lr}, {"params": others, "lr": 0.002}]
            made = optimizer(groups, lr=lr, weight_decay=decay[0])

            def record(*_):
                used.append([group["lr"] for group in made.param_groups] + [made.param_groups[0]["weight_decay"]])

            made.register_step_pre_hook(record)
            return made

        changes = {"optim": two_groups, "lr_schedule": LinearWithWarmup(), "lr_schedule_steps": 2}
        folder = tmp_path / optimizer.__name__
        train(tiny_recipe(folder, num_steps=1, learning_rate=1e-3, **changes))
        decay[0] = 0.3
        changes |= {"allow_changed": "learning_rate,optim", "resume_from_checkpoint": "latest"}
        train(tiny_recipe(folder, num_steps=2, learning_rate=1e-2, **changes))
        assert [row["learning_rate"] for row in metrics_of(folder)] == pytest.approx([1e-3, 0.5e-2])
        assert used[0] == pytest.approx([3e-3, 2e-3, 0.0]) and used[-1] == pytest.approx([1.5e-2, 1e-3, 0.3])


def test_each_layer_has_the_rate_that_the_pages_optimizer_gives_it_also_after_a_resume(tmp_path):
    page = {}
    exec(example("An optimizer with a rate per layer"), page)
    used = []

    def optimizer(*given, **settings):
        made = page["half_rate_of_embeddings"](*given, **settings)
        made.register_step_pre_hook(
            lambda *_: used.append({group["param_names"][0]: group["lr"] for group in made.param_groups})
        )
        return made

    changes = {"optim": optimizer, "lr_schedule": LinearWithWarmup(), "lr_schedule_steps": 4, **ONE_PUZZLE}
    train(tiny_recipe(tmp_path, num_steps=2, learning_rate=1e-2, **changes))
    train(tiny_recipe(tmp_path, num_steps=3, learning_rate=1e-2, resume_from_checkpoint="latest", **changes))
    for rates, row in zip(used, metrics_of(tmp_path), strict=True):
        rate = row["learning_rate"]
        expected = {name: rate / 2 if "embed" in name else rate for name in rates}
        assert rates == pytest.approx(expected) and min(expected.values()) < rate


def one_live_group(rewards, group):
    return torch.where(group == 0, rewards - rewards[group == 0].mean(), 0)


def no_live_group(rewards, group):
    return torch.zeros_like(rewards)


def test_a_batch_without_any_advantage_still_measures_mismatch(tmp_path):
    before = tiny_recipe(tmp_path, advantages=no_live_group, num_steps=1, **ONE_PUZZLE)
    summary = train(before)
    (row,) = metrics_of(tmp_path)
    assert row["rollout_corr/k3_kl"] > 0 and row["grad_norm"] == 0
    assert row["rollout_corr/rows"] == 2 * 4 and not any(name.startswith("trained/k3") for name in row)
    assert row["ais/lambda"] == 0, "there is nothing to correct"
    untouched = before.model().module.state_dict()
    assert all(torch.equal(value, untouched[name]) for name, value in weights_of(summary).items())


@pytest.mark.slow
def test_mismatch_is_that_of_all_rows_whatever_the_number_of_live_ones(tmp_path):
    """Six groups of which one is live: all scored by a KL term of weight 1e-30, or as a sample of every other group."""
    changes = {"advantages": one_live_group, "train_batch_size": 6, "num_steps": 1}
    changes["rollout_quantization"] = int3_emulated
    train(tiny_recipe(tmp_path / "all", beta=1e-30, kl=K1(), **changes))
    train(tiny_recipe(tmp_path / "five", num_mismatch_groups=5, **changes))
    train(tiny_recipe(tmp_path / "two", **changes))
    every, five, two = (metrics_of(tmp_path / name)[0] for name in ("all", "five", "two"))
    shared = [name for name in every if name.startswith("rollout_corr/")]
    assert {name: five[name] for name in shared} == pytest.approx({name: every[name] for name in shared}, rel=1e-4)
    assert [row["rollout_corr/rows"] for row in (every, five, two)] == [24, 24, 12]
    assert [row["trained/rows"] for row in (every, five, two)] == [24, 4, 4]
    assert five["trained/k3_kl"] == pytest.approx(two["trained/k3_kl"], rel=1e-4)
    assert five["trained/k3_kl"] != pytest.approx(five["rollout_corr/k3_kl"], rel=1e-3)
    assert two["rollout_corr/k3_kl"] != pytest.approx(five["rollout_corr/k3_kl"], rel=1e-3), "an estimate, not the mean"
    # The corrector's own statistics are of the rows that it corrects, however many others are measured.
    lam = [row["ais/lambda"] for row in (every, five, two)]
    assert lam[1] == pytest.approx(lam[2], rel=1e-5) and lam[1] != pytest.approx(lam[0], rel=1e-3)
    learned = ("loss", "grad_norm")
    assert [five[name] for name in learned] == pytest.approx([two[name] for name in learned], rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ({"advantages": one_live_group}, [0]),
        ({"advantages": no_live_group}, []),
        ({"advantages": one_live_group, "beta": 0.1}, [0, 1, 2, 3]),
        ({"advantages": one_live_group, "num_iterations": 2, "likelihood": likelihoods.Coupled()}, [0]),
    ],
    ids=["one group", "none", "a KL term trains on all", "masks of a second update"],
)
@pytest.mark.repeated
def test_a_corrector_gets_the_groups_that_the_update_trains_on_and_no_other(tmp_path, changes, trained):
    """All sixteen rows are measured. The others' ratios must reach neither its weights nor its metrics."""
    seen = []

    def watch(stats):
        seen.append(stats)
        numbers = {"mine/rows": float(stats.mask.any(-1).sum()), "mine/sum": stats.log_mismatch.abs().sum().item()}
        return NoCorrection().weights(stats)._replace(metrics=numbers)

    fixed = {"num_steps": 1, "num_mismatch_groups": 9, "rollout_quantization": int3_emulated, **ONE_PUZZLE}
    train(tiny_recipe(tmp_path, corrector=FunctionCorrector(function=watch), **fixed | changes))
    (row,) = metrics_of(tmp_path)
    assert row["rollout_corr/rows"] == 16 and row["mine/rows"] == 4 * len(trained)
    updates = seen[-changes.get("num_iterations", 1) :]
    for stats in updates:
        groups = [rows.any().item() for rows in stats.mask.split(4)]
        mismatched = [rows.any().item() for rows in stats.log_mismatch.split(4)]
        assert [index for index in range(4) if groups[index]] == trained
        assert [index for index in range(4) if mismatched[index]] == trained
    assert row["mine/sum"] == updates[0].log_mismatch.abs().sum().item()


def test_the_sample_of_groups_depends_on_seed_and_step_alone(tmp_path):
    recipe, advantages = tiny_recipe(tmp_path, seed=3), torch.zeros(128)
    advantages[20:22] = torch.tensor([1.0, -1.0])  # of group 5
    samples = Samples(NO_ROWS, torch.arange(128) // 4, advantages, advantages, advantages, (128,))

    def weights(recipe, step):
        found = metric_weights(recipe, samples, step).view(32, 4)
        assert torch.equal(found, found[:, :1].expand(32, 4))
        return found[:, 0]

    found = [weights(recipe, step) for step in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert found[0][5] == 1 and sorted(found[0].tolist())[-3:] == [1, 15.5, 15.5] and found[0].sum() == 32
    assert not torch.equal(found[0], weights(replace(recipe, seed=4), 0))
    assert weights(replace(recipe, beta=0.1), 0).tolist() == [1.0] * 32
    with pytest.raises(ValueError, match="num_mismatch_groups=0 must be at least 1"):
        replace(recipe, num_mismatch_groups=0)


@pytest.mark.usefixtures("exact_arithmetic")
def test_aligned_forward_leaves_no_mismatch(tmp_path):
    train(tiny_recipe(tmp_path, corrector=correctors.Aligned(), num_iterations=2, train_batch_size=2, **ONE_PUZZLE))
    assert all(row["rollout_corr/abs_log_ratio_max"] == 0 and row["grad_norm"] > 0 for row in metrics_of(tmp_path))


@pytest.mark.slow
def test_global_random_state_is_untouched(tmp_path):
    before = torch.random.get_rng_state()
    train(tiny_recipe(tmp_path, sft_warmup_steps=2, num_steps=1))
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_reward_that_does_not_apply_everywhere_is_averaged_where_it_does():
    import torch
    from accelerate import Accelerator

    from dllm_rl.step.collect import GradedCompletion, reward_metrics
    from dllm_rl.tasks.base import Problem, Reward

    rewards = [Reward(1.0, True, {"a": 0.25, "b": 3.0}), Reward(0.0, False, {"a": 0.75})]
    problem = Problem("1 + 1", {})
    # Four tokens each: the first never ends, the second ends with its second token.
    answers = [
        GradedCompletion(problem, "2", rewards[0], 9, 4, False, 4),
        GradedCompletion(problem, "2", rewards[1], 9, 2, True, 3),
    ]
    group = torch.tensor([0, 0])
    found = reward_metrics(torch.tensor([1.0, 0.0]), group, answers, group, Accelerator(cpu=True))
    assert found == {
        "reward": 0.5,
        "reward_std": 0.5,
        "frac_reward_zero_std": 0.0,
        "parsed": 0.5,
        "completions/mean_length": 3.0,
        "completions/clipped_ratio": 0.5,
        "completions/distinct_ratio": 0.5,
        "completions/mean_forwards": 3.5,
        "rewards/a/mean": 0.5,
        "rewards/b/mean": 3.0,
    }


@pytest.mark.slow
def test_kl_starts_at_zero_and_grows(tmp_path):
    train(tiny_recipe(tmp_path, beta=0.1, learning_rate=1e-2))
    kls = [row["kl"] for row in metrics_of(tmp_path)]
    assert kls[0] == 0 and kls[-1] > 0


class TestRefusals:
    def test_a_sampler_of_the_other_kind_before_any_work(self, tmp_path, rehearsal):
        wrong = with_changes(tiny_recipe_ar(tmp_path), sampler=tiny_recipe(tmp_path).sampler, sft_warmup_steps=10**6)
        with pytest.raises(ValueError, match="use Autoregress"):
            train(wrong)

    def test_a_likelihood_of_the_other_kind_before_any_work(self, tmp_path):
        with pytest.raises(ValueError, match="likelihood='Causal'"):
            train(tiny_recipe(tmp_path, likelihood=likelihoods.Causal(), sft_warmup_steps=10**6))
