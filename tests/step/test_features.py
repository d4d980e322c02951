"""Parts of a step that no setting has, each built as a user would: in a class of a few lines, given to `train`."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from readme import example
from run_outputs import metrics_of
from tiny_recipe import Wrapped, with_changes
from tiny_recipe import tiny_recipe as larger_recipe

from dllm_rl import Coupled, OneStep, StepFeature, Trajectory, train
from dllm_rl.algorithms.correctors import NoCorrection
from dllm_rl.algorithms.losses import CISPO, GSPO, SequenceMean
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
    return with_changes(larger, **few | changes)


class LogLayers(StepFeature):
    """The norm of each weight's gradient, after clipping."""

    def after_update(self, context):
        named = context.policy.module.named_parameters()
        return {f"mine/{name}": weight.grad.norm().item() for name, weight in named if weight.grad is not None}


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


class Fails(StepFeature):
    calls = 0

    def after_update(self, context):
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError("mine")
        return {}


@pytest.mark.slow
def test_an_error_after_the_update_leaves_a_checkpoint_of_it(tmp_path):
    recipe = tiny_recipe(tmp_path, num_steps=4, save_steps=4)
    with pytest.raises(RuntimeError, match="mine"):
        train(recipe, features=(Fails(),))
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")][-1] == 2
    train(replace(recipe, resume_from_checkpoint="latest"))
    train(replace(recipe, output_dir=str(tmp_path / "whole")))
    whole, again = (metrics_of(folder)[-1] for folder in (tmp_path / "whole", tmp_path))
    assert again["step"] == 3 and again["grad_norm"] == whole["grad_norm"] and again["reward"] == whole["reward"]


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
    match = r"features: Halves gives tokens advantages in every group.*'Coupled' workers score only.*or late\.max_stal"
    with pytest.raises(ValueError, match=match):
        train(recipe, InProcessPool(), features=(Halves(),))
    assert not (tmp_path / "metrics.jsonl").exists()
    check_features((Halves(),), replace(recipe, beta=0.1))  # the worker scores all groups
    check_features((Halves(),), with_changes(recipe, max_staleness=0))
    check_features((Halves(),), replace(recipe, likelihood=Trajectory()))


def test_metrics_of_ones_own(tmp_path):
    recipe = tiny_recipe(tmp_path, num_steps=1)
    summary = train(recipe, features=(LogLayers(),))
    names = {name for name, _ in summary.policy.module.named_parameters()}
    assert len(trainable_parameters(summary.policy.module)) == len(names)
    (row,) = metrics_of(tmp_path)
    layers = torch.tensor([value for name, value in row.items() if name.removeprefix("mine/") in names])
    assert len(layers) == len(names)
    assert layers.norm().item() == pytest.approx(min(row["grad_norm"], recipe.max_grad_norm), rel=1e-4)


def test_rows_of_earlier_steps_beside_workers_are_refused(tmp_path):
    recipe = tiny_recipe(tmp_path, rollout_workers=1, max_staleness=1)
    with pytest.raises(ValueError, match="features: Again adds rows of earlier steps"):
        train(recipe, features=(Again(),))
    assert not (tmp_path / "metrics.jsonl").exists()


def page(heading):
    """What the page's example under a heading defines."""
    made = {"__name__": "page"}
    exec(example(heading), made)
    return made


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_an_outlying_gradient_is_skipped(tmp_path, factor):
    feature = page("A part of the step (StepFeature)")["SkipOutliers"](factor=factor)
    feature.usual = metrics_of_one_step(tmp_path / "plain")["grad_norm"]
    run = train(tiny_recipe(tmp_path / "run", num_steps=1), features=(feature,))
    (row,) = metrics_of(tmp_path / "run")
    start = tiny_recipe(tmp_path).model().module.state_dict()
    is_moved = [not torch.equal(start[name], weight) for name, weight in run.policy.module.state_dict().items()]
    assert any(is_moved) == (factor > 1) and row.get("skipped_updates", 0) == (factor < 1)


def metrics_of_one_step(folder):
    train(tiny_recipe(folder, num_steps=1))
    return metrics_of(folder)[0]


def test_all_features_see_each_update_and_one_is_enough_to_skip_it(tmp_path):
    class Sees(StepFeature):
        seen = 0

        def before_update(self, context, metrics):
            self.seen += 1
            assert metrics.pop("grad_norm") > 0 and any(w.grad is not None for w in context.policy.module.parameters())
            return self.seen % 2 == 0

    features = Sees(), type("Also", (Sees,), {"seen": 1})()
    train(tiny_recipe(tmp_path, num_steps=1, num_iterations=3), features=features)
    (row,) = metrics_of(tmp_path)
    assert [feature.seen for feature in features] == [3, 4] and row["skipped_updates"] == 3
    assert row["grad_norm"] > 0, "each feature has a copy of the metrics"


OF_ONE_PROCESS = """
from types import SimpleNamespace
from accelerate import Accelerator
from dllm_rl import StepFeature
from dllm_rl.step.update import is_update_taken

class Skips(StepFeature):
    def before_update(self, context, metrics):
        return context.accelerator.process_index != metrics["rank"]

context = SimpleNamespace(accelerator=Accelerator(cpu=True), features=(StepFeature(), Skips()))
print([is_update_taken(context, {"rank": rank}) for rank in (0, 1, 2)])
"""


def test_what_one_process_skips_is_skipped_in_all():
    """Else the learners of the processes would differ from there on."""
    assert [told.splitlines()[-1] for told in run_ranks(OF_ONE_PROCESS, 2)] == ["[False, False, True]"] * 2


@pytest.mark.slow
def test_a_moving_reference_is_resumed_bit_for_bit(tmp_path):
    moving = page("A reference that moves")["MovingReference"]
    whole, parts = (tiny_recipe(tmp_path / name, beta=0.5, learning_rate=1e-2) for name in ("whole", "parts"))
    train(replace(whole, num_steps=4, lr_schedule_steps=4), features=(moving(),))
    train(replace(parts, num_steps=2, lr_schedule_steps=4), features=(moving(),))
    again = replace(parts, num_steps=4, lr_schedule_steps=4, resume_from_checkpoint="latest")
    train(again, features=(moving(),))
    train(replace(whole, output_dir=str(tmp_path / "fixed"), num_steps=4, lr_schedule_steps=4))
    mine, other, fixed = (metrics_of(tmp_path / name) for name in ("whole", "parts", "fixed"))
    assert [row["kl"] for row in mine] == [row["kl"] for row in other]
    assert mine[-1]["kl"] < fixed[-1]["kl"], "it follows the learner"


class Counted(StepFeature):
    """Counts updates; `state` raises after `fails_at` of them."""

    def __init__(self, fails_at=None):
        self.fails_at, self.updates = fails_at, 0

    def learn(self, context, optimizer):
        self.updates += 1

    def state(self, context):
        if self.updates == self.fails_at:
            raise KeyError("mine")
        return str(self.updates).encode()

    def load_state(self, context, state):
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
    context = SimpleNamespace(features=(same,))
    assert load_states(context, tmp_path / "checkpoints" / "step-000001") == [] and same.updates == 1
    train(tiny_recipe(tmp_path, resume_from_checkpoint="latest", **settings), features=(renamed,))
    assert renamed.updates == 1, "it began anew"
    assert "no feature of this run takes the checkpoint's state of Counted" in capsys.readouterr().out


def last_weights(parameters, *, lr):
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
