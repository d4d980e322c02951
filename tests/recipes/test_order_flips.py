"""The study of flipped orders: its laws are the sampler's, and its sums are those of every rollout, written out."""

from copy import copy, deepcopy
from dataclasses import replace
from itertools import permutations, product

import pytest
import torch

from dllm_rl import Confidence, Int4WeightOnly, LeftToRight, MaxProb, Unmask
from dllm_rl.decoding.prompts import encode
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.quantization.rollout_policy import quantized_copy
from dllm_rl.samplers.rules import PlackettLuce
from dllm_rl.tasks import Problem
from recipes.studies.quantized import order_flips_controls as controls
from recipes.studies.quantized.order_flips import (
    ORDERS,
    Law,
    Puzzle,
    Sampled,
    Setting,
    canvases,
    coefficients,
    gradient,
    law,
    measured,
    moments,
    token_logits,
    values,
    visits,
)
from recipes.sudoku_tiny import NO_DIGITS

PUZZLE = "1234341020434300"  # blanks: cells 7, 9, 14 and 15
RANKS = {
    "max_prob": MaxProb(),
    "confidence": Confidence(),
    "plackett_luce 0.3": PlackettLuce(temperature=0.3),
    "left_to_right": LeftToRight(),
}


@pytest.fixture(scope="module")
def policy():
    made = tiny_masked_lm(characters="1234", seed=3, hidden_size=32, num_layers=1, intermediate_size=64, head_std=0.5)
    made.module.eval()
    return made


@pytest.fixture(scope="module")
def rollouts(policy):
    """A learner and its INT4 copy on one puzzle."""
    copies = {"INT4": quantized_copy(policy, Int4WeightOnly())}
    at = canvases(PUZZLE, policy)
    with torch.no_grad():
        theirs = {"INT4": token_logits(copies["INT4"], at)}
    return Puzzle(at, policy, copies, token_logits(policy, at), theirs)


def test_canvases_and_the_events_between_them(policy):
    at = canvases(PUZZLE, policy)
    assert len(at.reward) == 5**4 and at.masked[0].all() and not at.masked[-1].any()
    digits = {policy.tokenizer.convert_tokens_to_ids(digit): digit for digit in "1234"} | {policy.spec.mask_id: "."}
    texts = ["".join(digits[token] for token in row) for row in at.tokens.tolist()]
    assert texts[0] == PUZZLE.replace("0", ".") and len(set(texts)) == 5**4
    for blank, digit in product(range(4), range(4)):
        cell = at.cells[blank]
        assert texts[at.following[0, blank, digit]] == texts[0][:cell] + str(digit + 1) + texts[0][cell + 1 :]
    assert [texts[i] for i in at.reward.nonzero()[:, 0]] == ["1234341221434321"]


@pytest.mark.parametrize("rank", RANKS)
def test_a_law_is_that_of_the_library_sampler(policy, rank):
    """Tokens and order of recorded rollouts have the sampler's own log-probs, event by event and in sum."""
    settings = {"max_new_tokens": 0, "diffusion_steps": 4, "temperature": 1.0, "suppress": NO_DIGITS}
    sampler = Unmask(rank=RANKS[rank], **settings)
    problem = Problem(PUZZLE.replace("0", "."), blank=".")
    prompts = encode(policy, [problem], num_generations=32)
    rollout = sampler(policy, prompts, torch.Generator().manual_seed(0))
    at = canvases(PUZZLE, policy)
    ours = law(policy, at, rank)
    unfinished = {state: row for row, state in enumerate(at.masked.any(-1).nonzero()[:, 0].tolist())}
    ids = [policy.tokenizer.convert_tokens_to_ids(digit) for digit in "1234"]
    for row in range(32):
        state, order = 0, 0.0
        for step in range(4):
            (blank,) = (rollout.unmask_step[row, at.cells] == step).nonzero()[:, 0].tolist()
            cell = at.cells[blank]
            digit = ids.index(int(rollout.tokens[row, cell]))
            place = (unfinished[state], blank, digit)
            assert float(ours.tokens[place].detach()) == pytest.approx(float(rollout.logprobs[row, cell]), abs=1e-4)
            order += float(ours.order[place].detach())
            state = int(at.following[state, blank, digit])
        recorded = rollout.order.logprobs
        assert order == pytest.approx(0.0 if recorded is None else float(recorded[row].sum()), abs=1e-3)


@pytest.mark.parametrize("order", ORDERS)
def test_chances_are_those_of_a_law(rollouts, order):
    chances = rollouts.own(order).chances(rollouts.at)
    torch.testing.assert_close(
        chances[rollouts.at.masked.any(-1)].sum((1, 2)), torch.ones(5**4 - 4**4, dtype=torch.float64), rtol=0, atol=1e-6
    )
    assert float(visits(chances, rollouts.at)[rollouts.at.layers[-1]].sum()) == pytest.approx(1, abs=1e-6)


def every_rollout(at, chances):
    """All rollouts written out: their probability and their events."""
    for way in permutations(range(4)):
        for digits in product(range(4), repeat=4):
            state, chance, events = 0, 1.0, []
            for blank in way:
                events.append((state, blank, digits[blank]))
                chance *= float(chances[events[-1]])
                state = int(at.following[events[-1]])
            if chance:
                yield chance, events, float(at.reward[state])


def test_sums_over_states_are_sums_over_rollouts(rollouts):
    at = rollouts.at
    chances = rollouts.sampled(Setting("plackett_luce 0.3", "INT4", "none")).chances
    each = torch.randn(chances.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = each.exp()
    baseline, first, second = 0.0, 0.0, 0.0
    counted = torch.zeros_like(each)
    written = list(every_rollout(at, chances))
    baseline = sum(chance * reward for chance, _, reward in written)
    for chance, events, reward in written:
        total = (reward - baseline) * sum(float(each[event]) for event in events)
        first, second = first + chance * total, second + chance * total**2
        for event in events:
            counted[event] += chance * (reward - baseline) * float(weights[event])
    assert float(values(chances, at, 0.0)[0]) == pytest.approx(baseline, abs=1e-9)
    assert moments(chances, each, at, baseline) == pytest.approx((first, second), rel=1e-6)
    torch.testing.assert_close(coefficients(chances, weights, at, baseline), counted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("order", ["plackett_luce 0.3", "random", "confidence", "left_to_right"])
def test_the_truth_is_the_slope_of_the_expected_reward(policy, rollouts, order):
    """In fp64, along the gradient itself; `Confidence` and max_prob jump where ranks change, and rarely in so small a
    step."""
    truth = rollouts.truth(order)
    way, ends = truth / truth.norm(), []
    moved = copy(policy)
    moved.module = deepcopy(policy.module).double()
    weights = list(moved.module.parameters())
    parts = way.split([weight.numel() for weight in weights])
    with torch.no_grad():
        for step in (1e-4, -2e-4):
            for weight, part in zip(weights, parts, strict=True):
                weight.add_(step * part.view(weight.shape))
            ends.append(float(values(law(moved, rollouts.at, order).chances(rollouts.at), rollouts.at, 0.0)[0]))
    assert (ends[0] - ends[1]) / 2e-4 == pytest.approx(float(truth.norm()), rel=1e-3)


def test_answer_weights_leave_what_order_flips_make_and_nothing_else(policy, rollouts):
    """With the learner's order, and wherever the order is scored or random, they leave no bias."""
    for order in ("max_prob", "random", "left_to_right", "plackett_luce 0.3"):
        setting = Setting(order, "INT4", "answer", "no flips" if order == "max_prob" else "")
        truth = rollouts.truth(order)
        assert float((rollouts.mean_gradient(setting) - truth).norm()) < 1e-4 * float(truth.norm())


def test_a_planted_flip_biases_answer_weights(policy, rollouts):
    own = rollouts.own("max_prob")
    other = own.order.clone()
    masked = rollouts.at.masked[0]
    first = int((other[0, :, 0] == 0).nonzero()[0, 0])
    second = next(blank for blank in range(4) if masked[blank] and blank != first)
    other[0, first], other[0, second] = -torch.inf, 0.0  # the copy begins elsewhere
    flipped = Sampled(rollouts.at, own, Law(own.tokens.detach(), other), scored=False)
    counts = coefficients(flipped.chances, torch.ones_like(flipped.chances), rollouts.at, flipped.baseline)
    truth = rollouts.truth("max_prob")
    found = gradient(own, counts, rollouts.at, False, policy)
    assert float((found - truth).norm()) > 1e-3 * float(truth.norm())
    unflipped = replace(flipped, flips=False)
    counts = coefficients(unflipped.chances, torch.ones_like(flipped.chances), rollouts.at, unflipped.baseline)
    assert float((gradient(own, counts, rollouts.at, False, policy) - truth).norm()) < 1e-4 * float(truth.norm())


def test_a_copy_with_the_learners_weights_leaves_no_bias(policy):
    same = dict.fromkeys(("INT4", "FP8", "kernel"), quantized_copy(policy, None))
    found = measured(policy, same, [canvases(PUZZLE, policy)], directions=1)
    every = {name: each["bias"] for name, each in found["settings"].items() if "alone" not in name}
    assert max(every.values()) < 1e-4 and set(found["flips"].values()) == {0.0}
    assert found["settings"]["confidence, INT4, exact, alone"]["bias"] > 0.01, "the order's part is in the truth"


def test_noise_is_as_long_as_the_copys_error(policy):
    quantized = quantized_copy(policy, Int4WeightOnly())
    made, changed = controls.noisy(policy, quantized, seed=0), 0
    for name, weight in policy.module.named_parameters():
        noise = made.module.get_parameter(name) - weight
        theirs = quantized.module.get_parameter(name)
        if type(theirs.data) is not torch.Tensor:
            error = theirs.dequantize() - weight
            assert float(noise.detach().norm()) == pytest.approx(float(error.detach().norm()), rel=1e-4)
            assert float((noise * error).detach().sum().abs()) < 0.2 * float(error.detach().norm()) ** 2
            changed += 1
        else:
            assert not noise.any()
    assert changed == 6, "query, key, value, output and the two of the MLP"


def test_countdowns_problems_and_their_right_answers():
    answers, (seen, held_out) = controls.sums(), controls.parts()
    assert set(seen) | set(held_out) == set(answers) and not {"".join(sorted(p[:8:3])) for p in seen} & {
        "".join(sorted(p[:8:3])) for p in held_out
    }
    assert answers["1, 2, 4> 3=00000"] == ["1+4-2", "1-2+4", "4+1-2", "4-2+1"]
    policy = tiny_masked_lm(characters=controls.CHOICES + "56789,>= ", hidden_size=32, num_layers=1)
    at = canvases("1, 2, 4> 3=00000", policy, controls.CHOICES, controls.is_right_sum)
    assert len(at.reward) == 7**5 and at.following.shape[-1] == 6
    right = {"".join(policy.tokenizer.convert_ids_to_tokens(row[-5:])) for row in at.tokens[at.reward > 0].tolist()}
    assert right == set(answers["1, 2, 4> 3=00000"])
