"""Parts of a step that no setting has, each built as a user would: in a class of a few lines, given to `train`."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from emulated import int3_emulated
from run_outputs import metrics_of
from tiny_recipe import Wrapped, with_changes
from tiny_recipe import tiny_recipe as larger_recipe

from dllm_rl import ELBO, Coupled, Int8WeightOnly, OneStep, StepFeature, Trajectory, evaluate, quantized_copy, train
from dllm_rl.algorithms.correctors import NoCorrection
from dllm_rl.algorithms.losses import CISPO, GSPO, Reinforce, SequenceMean
from dllm_rl.checkpoints.checkpoint import list_checkpoints
from dllm_rl.models.base import trainable_parameters
from dllm_rl.monitoring.json_lines import current_rows
from dllm_rl.samplers.sampler import FunctionSampler
from dllm_rl.training.late_rollouts.schedule import InProcessPool
from dllm_rl.training.saving import load_states
from dllm_rl.training.start import check_features

pytestmark = pytest.mark.usefixtures("no_rehearsal")


def tiny_recipe(directory, **changes):
    """Of two denoising steps in place of three, evaluated on one puzzle."""
    larger = larger_recipe(directory)
    few = {"sampler": larger.sampler.replace(diffusion_steps=2)}
    few |= {name: replace(getattr(larger, name), size=1) for name in ("eval_task", "validation_task")}
    return replace(larger, **few | changes)


class SyncEvery(StepFeature):
    """The rollout policy gets new weights every `steps` updates."""

    def __init__(self, steps):
        self.steps, self.max_staleness, self.versions = steps, steps - 1, []

    def after_rollout(self, context, samples, step):
        self.versions.append(samples.rollout.weights_version)
        return samples, {}

    def syncs(self, context, step):
        return (step + 1) % self.steps == 0


class DropSmallViews(StepFeature):
    """Views that score fewer than `least` tokens of this process are not scored: by no policy, so ratios agree."""

    changes_views = True

    def __init__(self, least):
        self.least, self.sizes = least, []

    def views_to_score(self, context, rollout, views, *, recorded):
        sizes = (views.coefficients != 0).sum((-1, -2))
        self.sizes.append(sizes.tolist())
        kept = (sizes >= self.least).to(views.coefficients)[:, None, None]
        return replace(views, coefficients=views.coefficients * kept)


class LogLayers(StepFeature):
    """The norm of each weight's gradient, after clipping."""

    def after_update(self, context):
        named = context.policy.module.named_parameters()
        return {f"mine/{name}": weight.grad.norm().item() for name, weight in named if weight.grad is not None}


class LogHighest(StepFeature):
    """The 99th percentile of |log ratio| of a step's scored tokens."""

    def check_scores(self, context, rollout, logps):
        scored = logps.views.scored(rollout.completion_mask)
        self.found = (logps.old_logprobs - logps.rollout_logprobs)[scored].abs().quantile(0.99).item()

    def metrics(self, context):
        return {"mine/p99": self.found}


@pytest.mark.slow
def test_a_sync_every_four_updates(tmp_path):
    feature = SyncEvery(4)
    recipe = tiny_recipe(tmp_path, num_steps=6, rollout_quantization=int3_emulated, learning_rate=1e-2)
    train(recipe, features=(feature,))
    assert feature.versions == [0, 0, 0, 0, 4, 4]
    with pytest.raises(ValueError, match=r"SyncEvery says when .*: set rollout_quantization or rollout_engine"):
        train(tiny_recipe(tmp_path / "own", rollout_quantization=None), features=(SyncEvery(4),))
    check_features(
        (SyncEvery(4),), recipe.replace(rollout_quantization=None, shard_size=2)
    )  # which samples with a copy
    rows = metrics_of(tmp_path)
    assert ["quantization/codes_changed" in row for row in rows] == [False, False, False, True, False, False]


def test_without_its_promise_an_older_rollout_is_refused(tmp_path):
    feature = SyncEvery(4)
    feature.max_staleness = 0
    with pytest.raises(RuntimeError, match="is 1 updates behind the learner's 1"):
        train(tiny_recipe(tmp_path, rollout_quantization=int3_emulated), features=(feature,))


@pytest.mark.parametrize("likelihood", [Trajectory(), Trajectory(num_segments=2)])
@pytest.mark.repeated(first_only=True)
def test_small_views_are_dropped_for_every_policy(likelihood, tmp_path):
    changes = {"num_steps": 1, "rollout_quantization": None, "corrector": NoCorrection(), "likelihood": likelihood}
    changes["sampler"] = larger_recipe(tmp_path).sampler  # of three steps, so that sizes differ
    feature = DropSmallViews(least=0)
    train(tiny_recipe(tmp_path / "all", **changes), features=(feature,))
    feature = DropSmallViews(least=max(feature.sizes[-1]))  # the largest one stays
    train(tiny_recipe(tmp_path / "one", **changes), features=(feature,))
    assert min(feature.sizes[-1]) < feature.least
    train(tiny_recipe(tmp_path / "plain", **changes))
    one, every, plain = (metrics_of(tmp_path / name)[0] for name in ("one", "all", "plain"))
    assert one["rollout_corr/abs_log_ratio_max"] == 0, "rollout and learner score the same views"
    assert 0 < one["grad_norm"] != plain["grad_norm"] == every["grad_norm"]


@pytest.mark.slow
def test_the_reference_scores_the_views_that_are_left(tmp_path):
    """The learner is the reference before the first update, so that the KL term is 0 in every view."""
    likelihood = ELBO(num_samples=3)  # a position is scored in several views
    recipe = tiny_recipe(tmp_path, beta=0.5, num_steps=1, rollout_quantization=None, likelihood=likelihood)
    feature = DropSmallViews(least=0)
    train(recipe, features=(feature,))
    feature = DropSmallViews(least=max(feature.sizes[-1]))
    train(replace(recipe, output_dir=str(tmp_path / "one")), features=(feature,))
    assert any(size < feature.least for size in feature.sizes[-1])
    assert metrics_of(tmp_path / "one")[0]["kl"] == 0


@pytest.mark.slow
def test_without_its_promise_the_record_of_all_views_is_taken(tmp_path):
    """The trap: the order's log-probs of the dropped steps stay in the rollout's, and the learner has none."""
    changes = {"num_steps": 1, "rollout_quantization": None, "corrector": NoCorrection(), "likelihood": Trajectory()}
    feature = DropSmallViews(least=0)
    train(tiny_recipe(tmp_path / "all", **changes), features=(feature,))
    feature = DropSmallViews(least=max(feature.sizes[-1]))
    feature.changes_views = False
    train(tiny_recipe(tmp_path / "one", **changes), features=(feature,))
    assert metrics_of(tmp_path / "one")[0]["rollout_corr/abs_log_ratio_max"] > 0.1


class Filters(StepFeature):
    """Leaves out the first completion of each group: its row, or only its reward and advantage."""

    def __init__(self, *, rows):
        self.rows = rows

    def after_rollout(self, context, samples, step):
        is_first = torch.arange(len(samples.group)) % 4 == 0
        if not self.rows:
            rewards, advantages = samples.rewards.masked_fill(is_first, torch.nan), samples.advantages
            return replace(samples, rewards=rewards, advantages=advantages.masked_fill(is_first, 0)), {}
        kept = (~is_first).nonzero()[:, 0]
        changes = {name: getattr(samples, name)[kept] for name in ("group", "rewards", "advantages", "metric_weights")}
        return replace(samples, rollout=samples.rollout.rows(kept), counts=(len(kept),), **changes), {}


class Twice(StepFeature):
    """Trains on each row two times."""

    def after_rollout(self, context, samples, step):
        return samples.concatenate(samples, pad_id=context.policy.pad_id), {}


class Again(StepFeature):
    """Trains on the rows of the step before, too."""

    earlier, max_staleness = None, 1

    def after_rollout(self, context, samples, step):
        earlier, self.earlier = self.earlier, samples
        return (samples if earlier is None else samples.concatenate(earlier, pad_id=context.policy.pad_id)), {}


def test_rows_of_older_weights_need_the_log_probs_that_the_sampler_recorded(tmp_path):
    """Else their ratio to the weights that sampled them would be 1."""
    changes = {"num_steps": 2, "rollout_quantization": None, "corrector": NoCorrection()}
    with pytest.raises(ValueError, match=r"^features: after_rollout of Again added rows of weights_version=0 to those"):
        train(tiny_recipe(tmp_path / "estimate", likelihood=OneStep(), **changes), features=(Again(),))
    assert len(metrics_of(tmp_path / "estimate")) == 1
    train(tiny_recipe(tmp_path / "exact", likelihood=Trajectory(), **changes), features=(Again(),))
    late = metrics_of(tmp_path / "exact")[1]
    assert late["rollout_corr/abs_log_ratio_max"] > 1e-4


@pytest.mark.parametrize(("before", "numbers"), [((), "4 of 16"), ((Twice(),), "8 of 32")])
@pytest.mark.repeated(first_only=True)
def test_a_row_does_not_leave_its_place(before, numbers, tmp_path):
    """Else completions.jsonl would pair a completion with another's tokens and advantage."""
    with pytest.raises(ValueError, match=f"^features: after_rollout of Filters left out {numbers} rows; keep them"):
        train(tiny_recipe(tmp_path), features=(*before, Filters(rows=True)))
    assert metrics_of(tmp_path) == []


def test_a_row_that_does_not_count_stays(tmp_path):
    train(tiny_recipe(tmp_path, num_steps=1, log_completions_steps=1), features=(Filters(rows=False),))
    rows = current_rows(tmp_path / "completions.jsonl")
    assert {row["advantage"] == 0 for row in rows} == {True, False}
    for row in rows:
        assert row["completion"] in "".join(token["text"] for token in row["tokens"]).replace("<pad>", "")


class Gives(StepFeature):
    """Gives each completion an advantage, whatever it is worth, in one of its methods."""

    def __init__(self, method):
        self.method = method

    def given(self, method, samples):
        advantages = torch.linspace(-1, 1, len(samples.advantages))
        return replace(samples, advantages=advantages) if method == self.method else samples

    def after_rollout(self, context, samples, step):
        return self.given("after_rollout", samples), {}

    def before_scoring(self, context, samples):
        return self.given("before_scoring", samples)


def test_advantages_that_come_after_the_choice_of_what_is_scored(tmp_path):
    """Before it they count; after it, only groups that had advantages can get others."""

    def norm(name, beginnings, method):
        recipe = tiny_recipe(tmp_path / name, num_steps=1, corrector=NoCorrection(), num_mismatch_groups=1)
        train(replace(recipe, task=Dull(recipe.task, beginnings)), features=(Gives(method),))
        return metrics_of(recipe.output_dir)[0]["grad_norm"]

    expected = norm("early", ".1234", "after_rollout")  # all groups are of equal rewards
    assert norm("late", "", "before_scoring") == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"^features: before_scoring of Gives gave advantages to groups that had none"):
        norm("too_late", ".1234", "before_scoring")


class Fails(StepFeature):
    def __init__(self, method):
        self.calls = 0
        setattr(self, method, self.fail)

    def fail(self, context, step=None):
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError("mine")
        return {} if step is None else True


@pytest.mark.slow
@pytest.mark.parametrize("method", ["after_update", "syncs"])
def test_an_error_after_the_update_leaves_a_checkpoint_of_it(method, tmp_path):
    recipe = tiny_recipe(tmp_path, num_steps=4, save_steps=4)
    with pytest.raises(RuntimeError, match="mine"):
        train(recipe, features=(Fails(method),))
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")][-1] == 2
    train(replace(recipe, resume_from_checkpoint="latest"))
    train(replace(recipe, output_dir=str(tmp_path / "whole")))
    whole, again = (metrics_of(folder)[-1] for folder in (tmp_path / "whole", tmp_path))
    assert again["step"] == 3 and again["grad_norm"] == whole["grad_norm"] and again["reward"] == whole["reward"]


class Watches(StepFeature):
    """Has a context for each forward."""

    def around_forward(self, context):
        return nullcontext()


class Halves(StepFeature):
    """Gives the later tokens of a row half of its advantage."""

    def token_advantages(self, context, samples, views):
        rows = samples.local(samples.advantages, context.accelerator)[:, None]
        late = samples.rollout.unmask_step > samples.rollout.unmask_step.amax(-1, keepdim=True) / 2
        return torch.where(late, rows / 2, rows)


def test_advantages_of_tokens_need_a_loss_of_tokens(tmp_path):
    recipe = tiny_recipe(tmp_path, num_steps=1, loss_reduction=SequenceMean())
    with pytest.raises(ValueError, match="features: Halves gives each token its advantage, and loss=GSPO"):
        train(replace(recipe, loss=GSPO()), features=(Halves(),))
    assert not (tmp_path / "metrics.jsonl").exists()
    check_features((Halves(),), replace(recipe, loss=CISPO()))  # with which the next test trains


class ProcessRewards(StepFeature):
    """Each token has an advantage of its own, whatever the completion is worth."""

    def token_advantages(self, context, samples, views):
        return samples.rollout.completion_mask * torch.linspace(-1, 1, samples.rollout.tokens.shape[1])


class Dull(Wrapped):
    """All completions are worth the same, if their puzzle begins with one of these."""

    def __init__(self, task, beginnings):
        super().__init__(task)
        self.beginnings = beginnings

    def reward(self, problem, completion):
        graded = self.task.reward(problem, completion)
        return replace(graded, value=0.5) if problem.prompt[0] in self.beginnings else graded


def test_advantages_of_tokens_count_in_groups_of_equal_rewards_too(tmp_path):
    changes = {"num_steps": 1, "corrector": NoCorrection(), "likelihood": Trajectory(include_order=False)}
    changes |= {"loss": CISPO(), "loss_reduction": SequenceMean()}
    found = []
    for beginnings in (".", ".1234"):
        recipe = tiny_recipe(tmp_path / f"dull{beginnings}", **changes)
        train(replace(recipe, task=Dull(recipe.task, beginnings)), features=(ProcessRewards(),))
        (row,) = metrics_of(recipe.output_dir)
        found.append((row["frac_reward_zero_std"], row["grad_norm"]))
    shares, norms = zip(*found, strict=True)
    assert 0 < shares[0] < 1 == shares[1]
    assert norms[0] == norms[1] > 0


def test_advantages_of_tokens_need_what_a_worker_scores(tmp_path):
    recipe = tiny_recipe(tmp_path, rollout_workers=1, max_staleness=1, likelihood=Coupled(), num_steps=1)
    match = r"features: Halves gives tokens advantages in every group.*'Coupled' workers score only.*or max_staleness=0"
    with pytest.raises(ValueError, match=match):
        train(recipe, InProcessPool(), features=(Halves(),))
    assert not (tmp_path / "metrics.jsonl").exists()
    check_features((Halves(),), replace(recipe, beta=0.1))  # the worker scores all groups
    check_features((Halves(),), with_changes(recipe, max_staleness=0))
    check_features((Halves(),), replace(recipe, likelihood=Trajectory()))


def test_views_are_changed_for_every_update_also_if_nothing_reads_a_ratio(tmp_path):
    changes = {"num_steps": 1, "rollout_quantization": None, "corrector": NoCorrection(), "num_iterations": 3}
    recipe = tiny_recipe(tmp_path, likelihood=ELBO(num_samples=2), loss=Reinforce(), **changes)
    train(recipe, features=(DropSmallViews(least=10**6),))
    (row,) = metrics_of(tmp_path)
    norms = [value for name, value in row.items() if name.startswith("grad_norm")]
    assert norms == [0, 0, 0, 0], "each update's, and the last one's"


@pytest.mark.parametrize("feature", [SyncEvery(4), DropSmallViews(least=6), Watches()])
def test_what_workers_would_contradict_is_refused(feature, tmp_path):
    recipe = tiny_recipe(tmp_path, rollout_workers=1, max_staleness=1)
    with pytest.raises(ValueError, match=f"features: {type(feature).__name__} changes forwards, what is scored"):
        train(recipe, features=(feature,))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_metrics_of_ones_own(tmp_path):
    recipe = tiny_recipe(tmp_path, num_steps=1, rollout_quantization=int3_emulated)
    summary = train(recipe, features=(LogLayers(), LogHighest()))
    names = {name for name, _ in summary.policy.module.named_parameters()}
    assert len(trainable_parameters(summary.policy.module)) == len(names)
    (row,) = metrics_of(tmp_path)
    layers = torch.tensor([value for name, value in row.items() if name.removeprefix("mine/") in names])
    assert len(layers) == len(names)
    assert layers.norm().item() == pytest.approx(min(row["grad_norm"], recipe.max_grad_norm), rel=1e-4)
    assert 0 < row["mine/p99"] <= row["rollout_corr/abs_log_ratio_max"]


class Counted(StepFeature):
    """Counts updates; `state` raises after `fails_at` of them."""

    def __init__(self, fails_at=None):
        self.fails_at, self.updates = fails_at, 0

    def learn(self, context, optimizer):
        self.updates += 1

    def state(self):
        if self.updates == self.fails_at:
            raise KeyError("mine")
        return str(self.updates).encode()

    def load_state(self, state):
        self.updates = int(state)


@pytest.mark.slow
@pytest.mark.parametrize("async_save", [False, True])
def test_an_error_of_a_state_loses_no_step(tmp_path, async_save):
    settings = {"num_steps": 3, "save_steps": 2, "save_total_limit": 9, "lr_schedule_steps": 3}
    whole, parts = (tiny_recipe(tmp_path / name, async_save=async_save, **settings) for name in ("whole", "parts"))
    train(whole, features=(Counted(),))
    with pytest.raises(KeyError, match="mine") as caught:
        train(parts, features=(Counted(fails_at=2),))
    assert "the checkpoint has no state of Counted" in "".join(caught.value.__notes__)
    folder = dict(list_checkpoints(tmp_path / "parts" / "checkpoints"))[2]
    assert not (folder / "Counted.state").exists(), "the weights of the step are saved"
    again = Counted()
    train(replace(parts, resume_from_checkpoint="latest"), features=(again,))
    assert again.updates == 1, "it began anew"
    mine, other = (metrics_of(tmp_path / name) for name in ("whole", "parts"))
    assert [row["loss"] for row in mine] == [row["loss"] for row in other]
    last = dict(list_checkpoints(tmp_path / "whole" / "checkpoints"))[3]
    assert (last / "Counted.state").read_bytes() == b"3"


def test_a_state_that_no_feature_takes_is_named(tmp_path, capsys):
    class Renamed(Counted):
        """Another name for the same state."""

    settings = {"lr_schedule_steps": 2, "train_batch_size": 1}
    train(tiny_recipe(tmp_path, num_steps=1, **settings), features=(Counted(),))
    assert "takes the checkpoint's state" not in capsys.readouterr().out
    same, renamed = Counted(), Renamed()
    assert load_states((same,), tmp_path / "checkpoints" / "step-000001") == [] and same.updates == 1
    train(tiny_recipe(tmp_path, resume_from_checkpoint="latest", **settings), features=(renamed,))
    assert renamed.updates == 1, "it began anew"
    assert "no feature of this run takes the checkpoint's state of Counted" in capsys.readouterr().out


@pytest.mark.slow
def test_the_last_evaluation_of_the_copy_has_the_last_weights(tmp_path):
    """Although the feature skipped the last sync."""
    recipe = tiny_recipe(tmp_path, num_steps=3, learning_rate=0.05, rollout_quantization=Int8WeightOnly())
    run = train(recipe, features=(SyncEvery(2),))
    copied = evaluate(quantized_copy(run.policy, Int8WeightOnly()), recipe.eval_task, recipe.eval_sampler, batch_size=8)
    assert run["eval_after_quantized"]["reward"] == pytest.approx(copied.means["reward"])


def last_weights(parameters, *, lr, betas, weight_decay):
    return torch.optim.SGD(list(parameters)[-2:], lr=lr)


def test_gradients_of_weights_that_are_not_optimized_do_not_add_up(tmp_path):
    """At a rate of about 0, the gradients of the same rows are the same at every update of every step."""
    recipe, first = tiny_recipe(tmp_path), []

    def same(policy, prompts, generator):
        first.append(recipe.sampler(policy, prompts, generator))
        return replace(first[0], weights_version=policy.weights_version)

    again = {"sampler": FunctionSampler(function=same, max_new_tokens=16), "likelihood": OneStep(prompt_mask=0.0)}
    again |= {"advantages": lambda rewards, group: torch.linspace(-1, 1, len(rewards)), "num_iterations": 2}
    train(with_changes(recipe, learning_rate=1e-9, optim=last_weights, **again))
    norms = [row[f"grad_norm/iteration_{i}"] for row in metrics_of(tmp_path) for i in range(2)]
    assert len(norms) == 4 and norms == pytest.approx(norms[:1] * 4, rel=1e-4) and norms[0] > 0
