"""Scoring that keeps its graphs: the first update goes back through them, and takes the gradient of the constant-memory
update without a forward."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from repetitions import few
from tiny_recipe import tiny_recipe as larger_recipe
from tiny_recipe import tiny_recipe_ar

from dllm_rl.algorithms.advantages import GroupRelative
from dllm_rl.algorithms.correctors import TIS, NoCorrection, QaRL
from dllm_rl.decoding.prompts import encode
from dllm_rl.likelihoods.estimators import ELBO, Coupled, OneStep
from dllm_rl.models.lora import add_lora
from dllm_rl.models.lora_settings import Lora
from dllm_rl.quantization.rollout_policy import quantized_copy
from dllm_rl.rng import generator_for
from dllm_rl.step.correct import make_batches
from dllm_rl.step.samples import Samples
from dllm_rl.step.score import ScoredSamples, draw_view_sets, metric_weights, retained_graphs, score
from dllm_rl.step.update import forward_backward, update
from dllm_rl.training.make_step import make_step
from dllm_rl.training.policies import make_optimizer
from dllm_rl.types.groups import any_in_group
from dllm_rl.types.retained_graphs import RetainedGraphs
from recipes.examples.bounds import Sandwich
from recipes.studies.likelihoods.surrogates import StableDRL

pytestmark = pytest.mark.usefixtures("no_rehearsal")

MANY = 99


def tiny_recipe(directory, **changes):
    """Of two completions of each prompt in two denoising steps."""
    larger = larger_recipe(directory, num_generations=2)
    return replace(larger, **{"sampler": larger.sampler.replace(diffusion_steps=2)} | changes)


class Step:
    """The learner's part of a step of a recipe, by its own functions, up to the batch; counts the model's forwards.

    The first of four groups teaches nothing, and is scored for its mismatch.
    """

    def __init__(self, recipe):
        self.recipe, self.accelerator = recipe, Accelerator(cpu=True)
        self.policy = recipe.model(seed=0)
        self.policy.gradient_checkpointing = recipe.gradient_checkpointing
        if recipe.lora is not None:
            add_lora(self.policy, recipe.lora)
            for name, parameter in self.policy.module.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.3, generator=generator_for(5))
        scheme = recipe.rollout_quantization
        self.rollout_policy = self.policy if scheme is None else quantized_copy(self.policy, scheme)
        problems = [recipe.task[i] for i in range(recipe.train_batch_size)]
        self.run = make_step(
            recipe,
            accelerator=self.accelerator,
            policy=self.policy,
            rollout_policy=self.rollout_policy,
            reference=None if not recipe.beta else self.policy.reference() if recipe.lora else recipe.model(seed=3),
        )
        with self.forward():
            prompts = encode(self.rollout_policy, problems, num_generations=recipe.num_generations)
            self.rollout = recipe.sampler(self.rollout_policy, prompts, generator_for(1))
        rewards = torch.rand(recipe.train_batch_size, recipe.num_generations, generator=generator_for(2))
        rewards[0] = 0
        self.advantages = GroupRelative()(rewards.flatten(), self.rollout.group)
        self.forwards = []
        encode_ = self.policy.encode
        self.policy.encode = lambda *a, **k: (self.forwards.append(torch.is_grad_enabled()), encode_(*a, **k))[1]

    def forward(self):
        return self.run.arithmetic(learner=True)

    def batch(self):
        recipe = self.recipe
        known = self.rollout.group, self.advantages, self.advantages, torch.ones(len(self.advantages))
        samples = Samples(self.rollout, *known, counts=(len(self.advantages),))
        samples = replace(samples, metric_weights=metric_weights(recipe, samples, 0))
        if not recipe.beta:
            assert (samples.metric_weights > 0).all() and not self.advantages[: recipe.num_generations].any()
        with self.forward():
            noise = draw_view_sets(recipe, samples, 0, self.accelerator)[0]
            keep = any_in_group(self.advantages != 0, self.rollout.group) | bool(recipe.beta or recipe.entropy_coeff)
            self.graphs = retained_graphs(recipe, self.policy, keep)
            self.logps = score(self.run, self.rollout, noise, graphs=self.graphs)
        scored = ScoredSamples(samples, [self.logps], {}, graphs=self.graphs)
        return make_batches(self.run, scored)[0][0]

    def gradient(self):
        """And the forwards of the update: one flag each, whether it was differentiated."""
        batch, recipe = self.batch(), self.recipe
        self.forwards.clear()
        with self.forward():
            size, options = recipe.micro_batch_size, {"loss": recipe.policy_loss, "likelihood": recipe.likelihood}
            metrics = forward_backward(self.policy, batch, batch.old_view_logprobs, micro_batch_size=size, **options)
        found = {n: p.grad for n, p in self.policy.module.named_parameters() if p.grad is not None}
        return found, {name: [x.item() for x in pair] for name, pair in metrics.items()}


CASES = {
    "trajectory": {},
    "one_step": {"likelihood": OneStep()},
    "shared prompts": {"likelihood": OneStep(prompt_mask=0.0)},
    "elbo, micro-batches": {"likelihood": ELBO(num_samples=2), "micro_batch_size": 4},
    "sandwich, KL": {"likelihood": Sandwich(), "beta": 0.1},
    "recomputed": {"likelihood": Coupled(), "gradient_checkpointing": True},
    "aligned": {"corrector": QaRL()},
    "aligned, recomputed": {"corrector": QaRL(), "gradient_checkpointing": True},
    "adapters, KL": {"lora": Lora(r=4), "beta": 0.1},
    "weights of the mismatch": {"corrector": TIS(), "likelihood": Coupled(), "entropy_coeff": 0.1},
    "bf16": {"bf16": True},
    "zero_mismatch": {"zero_mismatch": True, "rollout_quantization": None, "corrector": NoCorrection()},
    "causal": {"causal": True},
}


OFTEN = ["sandwich, KL", "aligned"]


@pytest.mark.parametrize("case", few(CASES, OFTEN))
@pytest.mark.usefixtures("exact_arithmetic")
def test_kept_graphs_give_the_same_scores_and_gradient_without_a_forward(case, tmp_path):
    """Bit for bit: the same rows meet the same kernels, and the forwards' gradients are added in the same order. Of a
    forward that runs the head twice, for tokens and order, a backward adds both before it adds them to the others."""
    changes = dict(CASES[case])
    make = tiny_recipe_ar if changes.pop("causal", False) else tiny_recipe
    kept, plain = (Step(make(tmp_path, max_retained_graphs=number, **changes)) for number in (MANY, 0))
    (ours, ours_metrics), (theirs, metrics) = kept.gradient(), plain.gradient()
    assert plain.graphs is None and kept.graphs.logprobs == {}  # freed
    assert torch.equal(kept.logps.old_logprobs, plain.logps.old_logprobs) and torch.equal(
        kept.logps.rollout_logprobs, plain.logps.rollout_logprobs
    )
    assert kept.forwards == [] and plain.forwards and all(plain.forwards)
    assert ours.keys() == theirs.keys() and ours_metrics == metrics
    assert max(x.abs().max() for x in theirs.values()) > 1e-3
    runs_head_twice = getattr(kept.recipe.likelihood, "include_order", False) and len(plain.forwards) > 1
    for name, gradient in theirs.items():
        if runs_head_twice and "lm_head" in name:
            assert (ours[name] - gradient).norm() < 1e-6 * gradient.norm(), name
        else:
            assert torch.equal(ours[name], gradient), name
    assert (len(plain.forwards) == 1) == (case in ("one_step", "shared prompts", "causal"))


@pytest.mark.usefixtures("exact_arithmetic")
def test_an_update_runs_one_forward_for_each_later_inner_iteration(tmp_path):
    """And the weights end where two forwards an iteration take them: the second's graph is of the moved weights."""
    ends = []
    for number in (MANY, 0):
        step = Step(tiny_recipe(tmp_path, max_retained_graphs=number, num_iterations=3, likelihood=OneStep()))
        batch, optimizer = step.batch(), make_optimizer(step.recipe, step.policy)
        step.forwards.clear()
        with step.forward():
            metrics = update(step.policy, optimizer, [batch] * 3, step.accelerator, step.recipe.update_settings(0))
        ends.append(([p.detach().clone() for p in step.policy.module.parameters()], metrics))
        assert step.forwards == ([True] * 2 if number else [True, *[False, True] * 2])
    (ours, metrics), (theirs, others) = ends
    assert metrics == others and all(map(torch.equal, ours, theirs))


def test_rows_that_teach_nothing_keep_no_graph(tmp_path):
    """They are scored, in a forward of their own."""
    step = Step(tiny_recipe(tmp_path, likelihood=OneStep()))
    step.batch()
    assert step.forwards == [True, False]


def test_a_process_without_trained_rows_has_no_graph_to_go_back_through(tmp_path):
    step = Step(tiny_recipe(tmp_path, likelihood=OneStep(), num_mismatch_groups=4))
    step.advantages = torch.zeros_like(step.advantages)
    gradients, _ = step.gradient()
    assert step.graphs.logprobs == {} and step.forwards == [] and gradients == {}


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, 4),  # all have less than MAX_BYTES
        ({"max_retained_graphs": 0}, 0),
        ({"max_retained_graphs": 3}, 3),
        ({"max_retained_graphs": 5}, 4),
        ({"max_retained_graphs": 5, "micro_batch_size": 2}, 5),
        ({"lora": Lora(r=4)}, 4),
        ({"lora": Lora(r=4, dropout=0.1)}, 0),  # scores have no dropout, the update's forwards have
        ({"lora": Lora(r=4, dropout=0.1), "max_retained_graphs": 4}, 0),
    ],
)
@pytest.mark.usefixtures("exact_arithmetic")
@pytest.mark.repeated
def test_what_is_kept(tmp_path, changes, kept):
    """An update runs the other forwards again. Its gradient does not depend on which graphs were kept."""
    step = Step(tiny_recipe(tmp_path, likelihood=Coupled(num_samples=2), **changes))
    found, metrics = step.gradient()
    assert len(step.forwards) == 4 * (3 if "micro_batch_size" in changes else 1) - kept
    assert not kept or step.graphs.logprobs == {}
    if "lora" not in changes:
        plain = Step(replace(step.recipe, max_retained_graphs=0))
        assert found.keys() == (theirs := plain.gradient())[0].keys() and metrics == theirs[1]
        assert all(torch.equal(found[name], gradient) for name, gradient in theirs[0].items())


def test_bytes_that_graphs_keep():
    """By hand, of 400 bytes each: an exponential keeps its result, a product both factors. Weights do not count."""
    scale, layer = torch.ones(100), torch.nn.Linear(100, 1, bias=False)
    weight = layer.weight
    graphs = RetainedGraphs(torch.ones(2, dtype=torch.bool))
    graphs.MAX_BYTES = 100
    assert graphs.has_room(), "the first is kept whatever its size"
    graphs.add("small", lambda: weight * weight.exp(), layer)
    assert sum(graphs.bytes_of.values()) == 400
    graphs.MAX_BYTES = 800
    assert graphs.has_room()
    graphs.add("large", lambda: weight.exp() * scale, layer)
    assert sum(graphs.bytes_of.values()) == 1200 and graphs.largest == 800
    for limit, has_room in ((1999, False), (2000, True)):
        graphs.MAX_BYTES = limit
        assert graphs.has_room() == has_room
    graphs.logprobs.clear()
    assert not graphs.add("nothing", lambda: scale * 2, layer).requires_grad and graphs.logprobs == {}


def test_graphs_of_several_forwards_are_kept_only_within_a_number():
    """One view of `Renoise` has all its steps' graphs."""
    rows = torch.ones(2, dtype=torch.bool)
    assert not RetainedGraphs(rows).has_room(2) and RetainedGraphs(rows).has_room(1)
    assert RetainedGraphs(rows, 3).has_room(3) and not RetainedGraphs(rows, 3).has_room(4)


def test_a_surrogates_sum_is_over_all_processes(tmp_path, monkeypatch):
    """Where the others double the sum of ratios and add no row, each row weighs half."""
    alone, among = (Step(tiny_recipe(tmp_path, loss=StableDRL())) for _ in range(2))
    twice = torch.tensor([2.0, 1.0], dtype=torch.float64)
    monkeypatch.setattr(among.accelerator, "reduce", lambda x, reduction: x * twice if reduction == "sum" else None)
    (whole, _), (half, _) = alone.gradient(), among.gradient()
    assert whole.keys() == half.keys() and any(g.any() for g in whole.values())
    for name, gradient in whole.items():
        assert torch.equal(half[name], gradient / 2), name
