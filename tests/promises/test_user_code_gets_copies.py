"""What methods of the user's write into what they get reaches no number of the run."""

import inspect
import sys

import pytest
import torch
from repetitions import slow
from run_outputs import assert_same_weights
from tiny_recipe import ONE_PUZZLE, tiny_recipe

from dllm_rl import ELBO, TIS, Commit, Coupled, Rank, StepFeature, Trajectory, Unmask, train
from dllm_rl.algorithms.losses import PPOClip
from dllm_rl.algorithms.prompt_sources import MixedRewardPrompts
from dllm_rl.samplers.rules import highest
from dllm_rl.types.batch_record import Copied

pytestmark = pytest.mark.usefixtures("no_rehearsal")

WRITES = False  # whether the methods below write


def spoil(value):
    """Write into every tensor in a value."""
    if isinstance(value, torch.Tensor):
        with torch.no_grad():
            value.data.zero_() if value.dtype == torch.bool else value.data.fill_(1)  # not seen by autograd
    elif isinstance(value, Copied):
        for part in vars(value).values():
            spoil(part)
    elif isinstance(value, tuple):
        for part in value:
            spoil(part)


def writing(kind, *methods):
    """A subclass whose methods call the parent's, and then write into what they were given."""

    def method_of(name):
        parent = getattr(kind, name)

        def method(self, *given, **named):
            result = parent(self, *given, **named)
            if isinstance(result, torch.Tensor):
                result = result.clone()  # it may be what was given
            if WRITES and not getattr(result, "requires_grad", False):  # a graph may keep what it was given
                kept = getattr(result, "copied", lambda: result)()
                spoil((*given, *named.values()))
                return kept
            return result

        method.__signature__ = inspect.signature(parent)
        return method

    return type(f"Own{kind.__name__}", (kind,), {"__module__": __name__} | {name: method_of(name) for name in methods})


ESTIMATOR = ("draw_views", "combine", "with_advantages")


def evenly(num_masked, steps_left):
    count = (num_masked + steps_left - 1) // steps_left
    if WRITES:
        spoil((num_masked, steps_left))
    return count


class HighestHalf(Commit):
    """As many positions as are left for the steps."""

    count = staticmethod(evenly)

    def __call__(self, scores, masked, steps_left):
        chosen = highest(scores, masked, count=(masked.sum(-1) + steps_left - 1) // steps_left)
        if WRITES:
            spoil((scores, masked, steps_left))
        return chosen


class Middle(Rank):
    def __call__(self, logits, normalizer, hidden, uniforms):
        scores = logits[:, 0] - normalizer + hidden.float().sum(-1) * 0 + uniforms
        if WRITES:
            spoil((logits, normalizer, hidden, uniforms))
        return scores.float()


class Feature(StepFeature):
    def token_advantages(self, context, samples, views):
        spoil((samples, views)) if WRITES else None


def loss(log_ratio, advantages, mask, inverse_chances):
    result = PPOClip()(log_ratio.clone(), advantages.clone(), mask.clone())
    if WRITES:
        spoil((advantages, mask, inverse_chances))
    return result


def source(history, count, generator):
    drawn = MixedRewardPrompts(equal_weight=0.5).draw(history, count, generator)
    if WRITES:
        spoil(history)
    return drawn


class Clamps:
    """A mixin, which is no estimator itself."""

    def draw_views(self, rollout, generator):
        views = super().draw_views(rollout, generator)
        if WRITES:
            views = views.copied()
            spoil(rollout)
        return views


class Mixed(Clamps, Trajectory):
    pass


def views_of(rollout, generator):
    views = Coupled().draw_views(rollout, generator).copied()
    if WRITES:
        spoil(rollout)
    return views


def short(**changes):
    return {"sampler": Unmask(max_new_tokens=16, diffusion_steps=2, **changes)}


CASES = {
    "Trajectory": {"likelihood": writing(Trajectory, *ESTIMATOR)()},
    "drawn steps": {"likelihood": writing(Trajectory, *ESTIMATOR)(variance_growth=0.5), "loss": loss} | short(),
    "a mixin": {"likelihood": Mixed()},
    "a function for views": {"likelihood": views_of},
    "a commit rule": short(commit=HighestHalf()),
    "a rank": short(rank=Middle()),
    "a sampler": {"sampler": writing(Unmask, "__call__")(max_new_tokens=16, diffusion_steps=2)},
    "a prompt source": {"prompt_source": writing(MixedRewardPrompts, "draw", "group_sizes")(equal_weight=0.5)},
    "a function for prompts": {"prompt_source": source},
    "a feature": {"features": (Feature(),)},
    "ELBO": {"likelihood": writing(ELBO, *ESTIMATOR, "logprobs")(), "num_iterations": 2},
}


@pytest.mark.parametrize("name", [*[*CASES][:-1], slow([*CASES][-1])])
def test_what_a_method_writes_into_what_it_gets_reaches_no_weight(tmp_path, monkeypatch, name):
    changes = dict(CASES[name])
    features = changes.pop("features", ())
    summaries = []
    for writes in (False, True):
        monkeypatch.setattr(sys.modules[__name__], "WRITES", writes)
        recipe = tiny_recipe(tmp_path / str(writes), corrector=TIS(), eval_steps=0, **ONE_PUZZLE, **changes)
        summaries.append(train(recipe, features=features))
    assert_same_weights(*summaries)


class Rollouts(StepFeature):
    def after_rollout(self, context, samples, step):
        samples.rollout.logprobs.numpy().clip(min=-1, out=samples.rollout.logprobs.numpy())
        return samples, {}


class Rewards(StepFeature):
    def after_rollout(self, context, samples, step):
        samples.rewards.sub_(samples.rewards.mean())
        return samples, {}


@pytest.mark.parametrize(
    ("feature", "said"),
    [(Rollouts(), "after_rollout of Rollouts wrote into samples.rollout.logprobs; write into samples.rollout.logp"),
     (Rewards(), "after_rollout of Rewards wrote into samples.rewards; write into samples.rewards.clone")],
)  # fmt: skip
def test_a_feature_that_writes_into_samples_is_refused(tmp_path, feature, said):
    """It returns samples, so that nobody knows whether the run is to have the change."""
    with pytest.raises(ValueError, match=f"^features: {said}"):
        train(tiny_recipe(tmp_path, num_steps=1, eval_steps=0, **ONE_PUZZLE), features=(feature,))
