"""The example of two turns: its log-probs against enumeration, and against sequences without the hidden columns."""

import math
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from likelihood_toys import TablePolicy
from refusals import refuses
from run_outputs import metrics_of

from dllm_rl import ELBO, Confidence, Coupled, MaxProb, OneStep, Prompts, Trajectory, Unmask
from dllm_rl.decoding.texts import completion_token_ids
from dllm_rl.decoding.tokens import text_ids
from dllm_rl.diagnostics.traces import write_trace
from dllm_rl.likelihoods.estimators import recorded
from dllm_rl.models.base import trainable_parameters
from dllm_rl.models.tiny import char_tokenizer, tiny_llama, tiny_masked_lm
from dllm_rl.rng import generator_for
from dllm_rl.samplers.choose import order_agreement
from dllm_rl.samplers.rules import RandomOrder, Threshold
from dllm_rl.training.parts.teacher import refine_steps
from dllm_rl.training.trainer import train
from recipes.examples.turns import TwoTurns, calculator, recipe, small, taught

PAD, MASK, EOS, A, B = range(5)
WORDS = (A, B)
SUPPRESS = (PAD, EOS)
TEXTS = {"aa": "a", "ab": "bb", "ba": "", "bb": "baab"}  # of a tool: of different lengths, empty, and too long
WRITE = Unmask(max_new_tokens=2, temperature=1.0, suppress=SUPPRESS)


class Toy(TablePolicy):
    """Random logits that are a function of all visible tokens, in order, and of nothing else."""

    def __init__(self):
        super().__init__(length=1, words=2, seed=0)
        self.tokenizer, self.vocab_size, self.mask_id, self.pad_id = char_tokenizer("ab"), 5, MASK, PAD
        self.spec = replace(self.spec, mask_id=MASK, eos_ids=(EOS,))
        self.known, self.outputs = {}, []

    def logits_of(self, ids):
        if ids not in self.known:
            self.known[ids] = torch.randn(len(ids), 5, generator=generator_for("toy", ids))
        return self.known[ids]

    def hidden(self, tokens, attention_mask):
        out = torch.zeros(*tokens.shape, 5)
        for row, mask in enumerate(attention_mask):
            out[row, mask] = self.logits_of(tuple(tokens[row, mask].tolist()))
        self.outputs.append(out.requires_grad_(torch.is_grad_enabled()))
        return out


def two_turns(turn, tool, tool_length):
    total = 2 * turn.max_new_tokens + tool_length
    return TwoTurns(max_new_tokens=total, turn=turn, tool=tool, tool_length=tool_length)


def turn_outcomes(toy, context, per_step):
    """{tokens: probability} of a turn of two positions, from left to right."""
    found = {(MASK, MASK): 1.0}
    for start in range(0, 2, per_step):
        after = {}
        for (state, chance), words in product(found.items(), product(WORDS, repeat=per_step)):
            written = list(state)
            for i, word in enumerate(words, start):
                weights = {v: math.exp(toy.logits_of(context + state)[len(context) + i, v]) for v in WORDS}
                chance *= weights[word] / sum(weights.values())
                written[i] = word
            after[tuple(written)] = chance
        found = after
    return found


def all_outcomes(toy, prompt, per_step, tool_length):
    """{tokens of both turns: probability}."""
    names, found = dict(zip(WORDS, "ab", strict=True)), {}
    for first, chance in turn_outcomes(toy, prompt, per_step).items():
        text = TEXTS["".join(names[token] for token in first)][:tool_length]
        context = (*prompt, *first, *(WORDS["ab".index(character)] for character in text))
        for second, then in turn_outcomes(toy, context, per_step).items():
            found[first + second] = chance * then
    return found


def scored(policy, rollout, estimator=Trajectory()):
    return estimator.logprobs(policy, rollout, estimator.draw_views(rollout, torch.Generator()))


@pytest.mark.repeated(first_only=True)
@pytest.mark.parametrize("per_step", [1, 2])
def test_every_outcome_has_its_probability(per_step):
    toy, ids, count = Toy(), [[A], [B, B, A]], 400
    prompts = Prompts.from_ids(ids, pad_id=PAD, num_generations=count)
    turn = WRITE.replace(diffusion_steps=2 // per_step, block_size=per_step)
    rollout = two_turns(turn, TEXTS.get, 3)(toy, prompts, torch.Generator().manual_seed(0))
    logprobs = scored(toy, rollout)
    torch.testing.assert_close(logprobs, rollout.logprobs)
    for number, prompt in enumerate(ids):
        exact = all_outcomes(toy, tuple(prompt), per_step, 3)
        assert len(exact) == 16 and sum(exact.values()) == pytest.approx(1, abs=1e-12)
        rows = (rollout.group == number).nonzero()[:, 0]
        drawn = [tuple(ids) for ids in completion_token_ids(rollout.rows(rows))]
        estimates = dict(zip(drawn, logprobs[rows].sum(-1).tolist(), strict=True))
        assert estimates == pytest.approx({outcome: math.log(p) for outcome, p in exact.items()}, abs=1e-5)
        assert sum(map(math.exp, estimates.values())) == pytest.approx(1, abs=1e-5)
        for outcome, p in exact.items():  # the draws of the second turn are independent of those of the first
            assert abs(drawn.count(outcome) - count * p) < 4.5 * math.sqrt(count * p * (1 - p))


def test_without_first_step_the_first_turn_has_other_numbers():
    toy, prompts = Toy(), Prompts.from_ids([[A]], pad_id=PAD, num_generations=16)
    rollout = two_turns(WRITE, TEXTS.get, 3)(toy, prompts, torch.Generator().manual_seed(0))
    difference = scored(toy, replace(rollout, first_step=None)) - rollout.logprobs
    assert difference[:, 1:3].abs().max() > 0.5 and difference[:, 1:3].abs().mean() > 0.1
    assert difference[:, 3:].abs().max() < 1e-6  # the second turn sees everything


def test_the_tools_tokens_are_not_scored_and_get_no_gradient():
    toy, prompts = Toy(), Prompts.from_ids([[A], [B, A]], pad_id=PAD, num_generations=4)
    rollout = two_turns(WRITE, TEXTS.get, 3)(toy, prompts, torch.Generator().manual_seed(0))
    tool, written = slice(4, 7), [2, 3, 7, 8]
    assert not rollout.completion_mask[:, tool].any() and rollout.completion_mask[:, written].all()
    assert (rollout.unmask_step[:, tool] == -1).all() and not rollout.logprobs[:, tool].any()
    views = Trajectory().draw_views(rollout, torch.Generator())
    assert not views.coefficients[:, :, tool].any() and (views.coefficients.sum(0)[:, written] == 1).all()
    toy.outputs.clear()
    logprobs = Trajectory().view_logprobs(toy, rollout, views, retain_graphs=True)
    factors = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(1))
    (logprobs * factors).sum().backward()
    gradients = [out.grad for out in toy.outputs]
    assert len(gradients) == 4 and not any(each[:, tool].any() for each in gradients)
    assert all((sum(gradients)[:, column] != 0).any() for column in written)


@pytest.mark.parametrize("estimator", [ELBO(), Coupled(), OneStep(), Trajectory(num_segments=2)])
def test_other_estimators_refuse_the_rollout(estimator):
    toy, prompts = Toy(), Prompts.from_ids([[A]], pad_id=PAD, num_generations=2)
    rollout = two_turns(WRITE, TEXTS.get, 3)(toy, prompts, torch.Generator().manual_seed(0))
    refuses(r"the rollout has several turns .* use Trajectory\(\)", lambda: scored(toy, rollout, estimator))


def test_the_first_canvas_has_no_columns_of_the_second_turn():
    """The policy that sampled commits the positions that it committed."""
    policy = tiny_masked_lm(characters="12345=", head_std=0.5)
    for weights in trainable_parameters(policy.module):
        weights.data *= 4 if weights.dim() == 2 else 1  # so that what a position sees matters
    write = Unmask(max_new_tokens=4, diffusion_steps=4, rank=MaxProb(), temperature=1.0)
    prompts = Prompts.from_ids([[3, 4, 5], [6, 7]] * 8, pad_id=policy.pad_id)
    rollout = two_turns(write, lambda text: "123", 3)(policy, prompts, torch.Generator().manual_seed(0))
    found = {name: (total / count).item() for name, (total, count) in order_agreement(policy, rollout).items()}
    assert found == {"order_agreement": 1.0, "order_agreement_rows": 1.0}
    seen = order_agreement(policy, replace(rollout, first_step=None))
    assert (seen["order_agreement"][0] < seen["order_agreement"][1]).item(), "the columns change the order"


def test_a_trace_refuses_the_rollout(tmp_path):
    toy, prompts = Toy(), Prompts.from_ids([[A]], pad_id=PAD, num_generations=2)
    rollout = two_turns(WRITE, TEXTS.get, 3)(toy, prompts, torch.Generator().manual_seed(0))
    refuses("a trace holds one turn", lambda: write_trace(tmp_path / "trace.jsonl", rollout))


def without_hidden_columns(policy, rollout):
    """The log-prob of every written token, from a forward of the tokens that its step saw and no padding."""
    expected = torch.zeros(rollout.logprobs.shape)
    outside = list(rollout.sampling_params.suppress)
    for row, steps in enumerate(rollout.unmask_step):
        start = int(steps[-2:].min())  # first step of the second turn
        for step in range(int(steps.max()) + 1):
            seen = rollout.attention_mask[row].clone()
            if step < start:
                seen[-5:] = False  # the tool's three columns and the second turn
            tokens = torch.where(steps >= step, policy.spec.mask_id, rollout.tokens[row])[seen][None]
            logits = policy.logits(tokens, torch.ones_like(tokens, dtype=torch.bool))[0].detach()
            logits[:, outside] = -torch.inf
            chosen = steps[seen] == step
            columns = seen.nonzero()[chosen, 0]
            expected[row, columns] = logits.log_softmax(-1)[chosen, rollout.tokens[row, columns]]
    return expected


@pytest.mark.parametrize("make", [tiny_masked_lm, partial(tiny_llama, causal=False)])
@pytest.mark.parametrize(
    "turn",
    [
        WRITE.replace(rank=MaxProb()),
        WRITE.replace(rank=Confidence()),  # its order has a log-prob
        WRITE.replace(commit=Threshold(tau=0.55)),  # rows differ in steps
        WRITE.replace(rank=RandomOrder(), top_k=2),
    ],
)
@pytest.mark.repeated(first_only=True)
def test_rows_whose_prompts_and_tool_texts_differ(make, turn):
    policy = make(characters="abc", hidden_size=32, num_layers=2, intermediate_size=32, head_std=0.1)
    prompts = Prompts.from_ids([[A], [B, B, A, A], [A, B]], pad_id=PAD, num_generations=[16, 3, 1], seeds=range(20))
    sampler = two_turns(turn, lambda text: TEXTS.get(text, "c"), 3)
    rollout = sampler(policy, prompts, torch.Generator())
    assert len({tuple(row) for row in rollout.attention_mask[:16].tolist()}) > 1  # tool texts differ within a group
    assert torch.equal(rollout.group, prompts.group) and rollout.tokens.shape == (20, 4 + sampler.max_new_tokens)
    if not turn.top_k:
        torch.testing.assert_close(rollout.logprobs, without_hidden_columns(policy, rollout), rtol=0, atol=1e-5)
    views = Trajectory().draw_views(rollout, torch.Generator())
    logprobs = Trajectory().logprobs(policy, rollout, views)
    torch.testing.assert_close(logprobs, recorded(rollout, views), rtol=0, atol=1e-5)
    alone = sampler(policy, prompts.rows(torch.tensor([17])), torch.Generator())  # a row does not depend on the others
    assert torch.equal(alone.tokens[0], rollout.tokens[17])


def test_steps_that_a_teacher_splits_hide_later_turns_too():
    policy = tiny_masked_lm(characters="ab", hidden_size=32, num_layers=2, intermediate_size=32, head_std=0.1)
    prompts = Prompts.from_ids([[A]], pad_id=PAD, num_generations=8, seeds=range(8))
    rollout = two_turns(WRITE.replace(diffusion_steps=1), TEXTS.get, 3)(policy, prompts, torch.Generator())
    split = refine_steps(rollout, torch.arange(8), num_parts=2)
    assert split.unmask_step[:, 1:3].sort().values.tolist() == [[0, 1]] * 8
    torch.testing.assert_close(scored(policy, split), without_hidden_columns(policy, split), rtol=0, atol=1e-5)


def test_the_tool_reads_the_first_turn():
    toy, texts = Toy(), []

    def tool(text):
        texts.append(text)
        return TEXTS[text]

    prompts = Prompts.from_ids([[A]], pad_id=PAD, num_generations=16)
    rollout = two_turns(WRITE, tool, 3)(toy, prompts, torch.Generator().manual_seed(0))
    assert set(texts) == set(TEXTS)
    for row, text in enumerate(texts):
        assert rollout.tokens[row, 1:3].tolist() == text_ids(toy, text)
        shown = rollout.tokens[row, 3:6][rollout.attention_mask[row, 3:6]].tolist()
        assert shown == text_ids(toy, TEXTS[text])[:3]
    assert rollout.first_step[0].tolist() == [0, 0, 0, 2, 2, 2, 2, 2] and rollout.forwards == 4


def test_a_wrong_total_length_is_refused():
    refuses("max_new_tokens=9 must be 7", lambda: TwoTurns(max_new_tokens=9, turn=WRITE, tool=TEXTS.get, tool_length=3))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3+5-10", "[-2]"),
        (" (7-2)*3  ", "[15]"),
        ("1/3", "[1/3]"),
        ("", "[?]"),
        ("1/0", "[?]"),
        ("9**9**9", "[?]"),
        ("__import__('os')", "[?]"),
        ("1" * 10**6, "[?]"),
        ("(" * 10**5, "[?]"),
        ("-" * 400 + "1", "[?]"),
        ("\ud800", "[?]"),
        ("9" * 39 + "*" + "9" * 39, "[?]"),
    ],
)
def test_the_calculator_on_hostile_texts(text, answer):
    assert calculator(text) == answer


@pytest.mark.usefixtures("no_rehearsal")
def test_a_step_of_training_has_no_mismatch(tmp_path):
    tiny = replace(
        recipe,
        model=partial(taught, steps=1),
        validation_task=small(split="validation", size=4),
        eval_task=small(split="test", size=4),
        rollout_quantization=None,
        train_batch_size=4,
        num_generations=4,
        rollout_batch_size=8,
        num_steps=1,
        output_dir=str(tmp_path),
    )
    summary = train(tiny)
    (row,) = [row for row in metrics_of(tmp_path) if "rollout_corr/ess" in row]
    assert row["rollout_corr/abs_log_ratio_max"] < 1e-5 and row["rollout_corr/ess"] == pytest.approx(1, abs=1e-6)
    assert row["completions/mean_length"] == 20 and "rewards/draft_accuracy/mean" in row
    assert summary.policy.weights_version == 1
