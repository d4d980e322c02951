"""Traces: what is written is read, and every planted fault is named."""

import json
import math
from dataclasses import replace
from functools import cache
from importlib.util import find_spec

import pytest
import torch
from refusals import refuses
from sft_toys import block_causal
from tiny_recipe import SIZES
from torch import Generator

from dllm_rl import Autoregress, Unmask
from dllm_rl.diagnostics import traces
from dllm_rl.diagnostics.trace_check import as_json, check_trace, report_table
from dllm_rl.diagnostics.traces import read_trace, write_trace
from dllm_rl.models.base import copied
from dllm_rl.models.tiny import tiny_llama
from dllm_rl.samplers import rules
from dllm_rl.samplers.revise import Remask
from dllm_rl.types.rollouts import Prompts

OPTIONS = {"max_new_tokens": 8, "diffusion_steps": 4, "block_size": 4, "temperature": 0.7, "rank": rules.MaxProb()}


@cache
def model():
    return tiny_llama(**SIZES, causal=False, head_std=0.15)


@cache
def sampled(policy=None, sampler=Unmask, **options):
    policy = policy or model()
    prompts = Prompts.from_ids([[3, 4, 5, 6], [7, 8], [4]], pad_id=policy.pad_id, num_generations=2)
    options = OPTIONS | options if sampler is Unmask else options
    return sampler(**options)(policy, prompts, Generator().manual_seed(0))


def params(rollout, **changes):
    return replace(rollout, sampling_params=replace(rollout.sampling_params, **changes))


def steps(rollout, row, changes):
    """The steps of a row's completion changed, {position: step}."""
    changed = rollout.unmask_step.clone()
    first = int(rollout.completion_mask[row].long().argmax())
    for position, step in changes.items():
        changed[row, first + position] = step
    return replace(rollout, unmask_step=changed)


def moved_weights():
    policy = copied(model())
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=Generator().manual_seed(1)))
    return policy


def swapped(rollout):
    """Row 0 with the steps of its block the other way round."""
    step = rollout.unmask_step[0]
    at = rollout.completion_mask[0].nonzero()[:4, 0]
    return steps(rollout, 0, {i: 1 - int(step[column]) for i, column in enumerate(at)})


def with_a_mask(rollout):
    tokens = rollout.tokens.clone()
    tokens[2, -2] = model().spec.mask_id
    return replace(rollout, tokens=tokens)


def shifted(rollout, by):
    return replace(rollout, logprobs=rollout.logprobs.roll(by, -1) * rollout.completion_mask)


# Each: the trace with the fault, the word that names it, and a part of the verdict.
FAULTS = {
    "temperature": (lambda: params(sampled(), temperature=1.0), "logprobs", "temperature, top_k or top_p"),
    "top_k not recorded": (lambda: params(sampled(top_k=3), top_k=None), "logprobs", "mean |d| 0."),
    "top_p not recorded": (lambda: params(sampled(top_p=0.8), top_p=None), "logprobs", "above 0.02"),
    "log-probs before filters": (lambda: params(sampled(), top_p=0.8), "logprobs", "above 0.02"),
    "stale weights": (lambda: sampled(moved_weights()), "logprobs", "other weights"),
    "before its block": (lambda: steps(sampled(), 0, {7: 0}), "block", "before its block's turn, first in row 0"),
    "after its block": (lambda: steps(sampled(), 1, {0: 3}), "block", "after the next block had begun"),
    "a mask": (lambda: with_a_mask(sampled()), "mask", "left in the completion, first in row 2, column 10"),
    "another order": (lambda: swapped(sampled()), "order", "another position of the block first, first in row 0"),
    "shifted right": (lambda: shifted(sampled(), 1), "logprobs", "a neighboring position"),
    "shifted left": (lambda: shifted(sampled(), -1), "logprobs", "a neighboring position"),
    "steps from 1": (
        lambda: replace(sampled(), unmask_step=sampled().unmask_step + sampled().completion_mask),
        "steps",
        "a step is beyond the 4 forwards",
    ),
    "a negative step": (lambda: steps(sampled(), 0, {2: -1}), "steps", "a token of the completion has no step"),
    "a step missing": (
        lambda: replace(
            sampled(), unmask_step=torch.where(sampled().unmask_step == 3, 5, sampled().unmask_step), forwards=0
        ),
        "steps",
        "the steps before it are missing",
    ),
    "a step outside": (
        lambda: replace(sampled(), unmask_step=sampled().unmask_step.clamp(min=0)),
        "steps",
        "outside the completion",
    ),
    "no numbers": (
        lambda: replace(sampled(), logprobs=sampled().logprobs.clone().index_fill(1, torch.tensor([5]), math.nan)),
        "nonfinite",
        "not a finite number",
    ),
}


def named(report):
    return {fault.kind for fault in report.faults} | ({"logprobs"} if report.differs else set())


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(name):
    make, kind, said = FAULTS[name]
    report = check_trace(model(), make())
    # Other weights choose another order too.
    assert named(report) - ({"order"} if name == "stale weights" else set()) == {kind}
    assert said in report.verdict and not report.ok
    shown = {cell for column in report_table(report).columns for cell in map(str, column.cells)}
    assert (kind if kind != "logprobs" else "above 0.02") in shown


CLEAN = {
    "max_prob": {},
    "confidence": {"rank": rules.Confidence()},
    "late schedule, more steps than positions": {"commit": rules.LateSchedule(), "diffusion_steps": 12},
    "origin": {"rank": rules.RandomOrder(), "commit": rules.Origin(), "diffusion_steps": 8},
    "soft threshold": {"commit": rules.SoftThreshold(tau=0.3)},
    "threshold, top_p": {"commit": rules.Threshold(tau=0.3), "top_p": 0.8},
}


@pytest.mark.repeated(every=3)
@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_trace_has_no_fault(name):
    report = check_trace(model(), sampled(**CLEAN[name]), micro_batch_size=2)
    assert report.ok and report.num_compared == 6 and report.total.max_abs < 1e-4, report.verdict
    assert "log-probs agree" in report.verdict


LATE = {  # kind of model, prompts, new tokens, steps: some blocks have more steps than positions
    "blocks begun by prompts": (True, [[3] * 9, [5, 6]], 8, 6),
    "blanks": (False, [[3, 1, 1, 1, 1, 1, 4], [1, 1, 1, 1, 3, 4]], 0, 4),
    "every block": (False, [[3] * 9, [5, 6]], 8, 24),
}


def late(name, rank):
    is_block_causal, ids, length, diffusion_steps = LATE[name]
    policy = block_causal(4) if is_block_causal else model()
    prompts = Prompts.from_ids(ids, pad_id=0, seeds=[1, 2], mask_id=None if length else policy.spec.mask_id)
    options = OPTIONS | {"max_new_tokens": length, "diffusion_steps": diffusion_steps, "rank": rank}
    sampler = Unmask(**options, commit=rules.LateSchedule(), suppress=("<eos>",))
    return policy, sampler(policy, prompts, Generator())


@pytest.mark.parametrize(
    "rank", [rules.MaxProb(), rules.Entropy(), rules.Confidence(), rules.PlackettLuce(temperature=1)]
)
@pytest.mark.parametrize("name", LATE)
@pytest.mark.repeated(every=4)
def test_a_late_schedule_waits_in_the_blocks_that_have_more_steps_than_positions(name, rank, tmp_path):
    policy, rollout = late(name, rank)
    steps = [row[mask].unique() for row, mask in zip(rollout.unmask_step, rollout.completion_mask, strict=True)]
    assert any(len(row) <= row.max() for row in steps), "a step wrote nothing"
    write_trace(tmp_path / "a.jsonl", rollout)
    for trace in (rollout, read_trace(tmp_path / "a.jsonl")):
        report = check_trace(policy, trace)
        assert report.ok and report.num_compared == 2, report.verdict


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("blocks begun by prompts", {3: 4}),  # within a block of two positions per step
        ("blocks begun by prompts", {2: 3, 3: 4, 5: 6}),  # before a block of two positions per step
        ("every block", {23: 24}),  # within a block of one position per step
    ],
)
def test_steps_that_no_schedule_leaves_out_are_missing(name, moved):
    policy, rollout = late(name, rules.MaxProb())
    step, first = rollout.unmask_step.clone(), rollout.order.block_first_step.clone()
    for values in (step[0], first[0]):
        values.copy_(torch.tensor([moved.get(value, value) for value in values.tolist()]))
    moved_steps = replace(rollout, unmask_step=step, order=replace(rollout.order, block_first_step=first), forwards=0)
    report = check_trace(policy, moved_steps)
    assert named(report) == {"steps"} and "the steps before it are missing, first in row 0" in report.verdict


def test_a_row_in_another_order_is_not_compared_unless_all_are():
    report = check_trace(model(), swapped(sampled()))
    assert report.num_compared == 5 and report.total.num_tokens == 40 and report.total.max_abs < 1e-4
    one = check_trace(model(), swapped(sampled().rows(torch.tensor([0]))))
    assert one.num_compared == 1 and one.total.num_tokens == 8 and one.total.max_abs > 1e-4 and not one.ok


def test_other_models_and_rewriting_samplers_have_no_fault():
    causal = tiny_llama(**SIZES, causal=True, head_std=0.15)
    rollout = sampled(causal, Autoregress, max_new_tokens=5, temperature=0.7)
    assert check_trace(causal, rollout).ok
    backwards = torch.where(
        rollout.completion_mask, rollout.unmask_step.amax(-1, keepdim=True) - rollout.unmask_step, -1
    )
    assert named(check_trace(causal, replace(rollout, unmask_step=backwards))) == {"order"}
    rewritten = sampled(rank=rules.RandomOrder(), commit=Remask(eta=0.2), block_size=8)
    assert rewritten.events is not None and check_trace(model(), rewritten).ok
    refuses("this sampler rewrites tokens", lambda: write_trace("a.jsonl", rewritten))
    blocks = block_causal()
    assert check_trace(blocks, sampled(blocks, block_size=2, diffusion_steps=8)).ok


def test_differences_and_their_ranges_by_hand():
    """d is 0.1 at step 0, 0 at the others: of 48 tokens 12, in positions that are counted here."""
    rollout = sampled()
    wrong = rollout.logprobs + 0.1 * (rollout.unmask_step == 0)
    report = check_trace(model(), replace(rollout, logprobs=wrong), bound=0.05)
    assert report.total.num_tokens == 48 and report.total.mean_abs == pytest.approx(0.025, abs=1e-5)
    assert report.total.max_abs == pytest.approx(0.1, abs=1e-5) and report.ok
    parts = {part.name: part for part in report.parts}
    assert [parts[f"step {i}"].mean_abs for i in range(4)] == pytest.approx([0.1, 0, 0, 0], abs=1e-5)
    completions = (rollout.unmask_step[rollout.completion_mask] == 0).view(6, 8)
    for first in (0, 2, 4, 6):
        share = completions[:, first : first + 2].float().mean().item()
        assert parts[f"positions {first}-{first + 1}"].mean_abs == pytest.approx(0.1 * share, abs=1e-5)


def test_the_replay_is_a_loop_of_plain_forwards():
    rollout, policy = sampled(), model()
    wanted = torch.zeros_like(rollout.logprobs)
    for step in range(4):
        masked = rollout.completion_mask & (rollout.unmask_step >= step)
        tokens = rollout.tokens.masked_fill(masked, policy.spec.mask_id)
        with torch.no_grad():
            logits = policy.logits(tokens, rollout.attention_mask)
        logits[..., list(rollout.sampling_params.suppress)] = -torch.inf
        logp = (logits / 0.7).log_softmax(-1).gather(-1, rollout.tokens[..., None])[..., 0]
        wanted = torch.where(rollout.completion_mask & (rollout.unmask_step == step), logp, wanted)
    noise = 0.3 * torch.randn(wanted.shape, generator=Generator().manual_seed(3)) * rollout.completion_mask
    report = check_trace(policy, replace(rollout, logprobs=wanted + noise))
    assert report.total.mean_abs == pytest.approx(noise[rollout.completion_mask].abs().mean().item(), abs=1e-5)
    assert report.differs and not report.ok


def test_what_is_written_is_read(tmp_path):
    rollout = sampled(top_p=0.9)
    write_trace(tmp_path / "trace.jsonl", rollout)
    found = read_trace(tmp_path / "trace.jsonl")
    real = rollout.attention_mask
    for name in ("attention_mask", "completion_mask", "unmask_step", "logprobs"):
        assert torch.equal(getattr(found, name), getattr(rollout, name)), name
    assert torch.equal(found.tokens[real], rollout.tokens[real]) and torch.equal(found.group, rollout.group)
    assert torch.equal(found.order.block_first_step, rollout.order.block_first_step)
    assert found.order.rank_name == "MaxProb" and found.order.probability == "deterministic"
    for name in ("weights_version", "sampling_params", "forwards"):
        assert getattr(found, name) == getattr(rollout, name)
    assert check_trace(model(), found).ok


GOOD = {"format": "dllm_rl_trace", "version": 1, "tokens": [3, 4], "completion_mask": [0, 1], "unmask_step": [-1, 0]}
REFUSED = {
    "not JSON": ("{", "line 1 is not JSON"),
    "deep": ("[" * 100_000, "line 1 is not JSON"),
    "a list": ("[]", "format and version are not 'dllm_rl_trace' and 1"),
    "other fields": ({"a": 1}, "format and version are not"),
    "version": (GOOD | {"version": 2}, "format and version are not"),
    "a text": (GOOD | {"tokens": "34"}, "tokens='34' must be a list"),
    "a fraction": (GOOD | {"tokens": [3, 4.5]}, "tokens[1]=4.5 must be a whole number in [0, 1e+09]"),
    "a bool": (GOOD | {"tokens": [3, True]}, "tokens[1]=True must be"),
    "negative": (GOOD | {"tokens": [3, -4]}, "tokens[1]=-4 must be"),
    "a huge step": (GOOD | {"unmask_step": [-1, 10**30]}, "unmask_step[1]=1000000"),
    "infinite": (GOOD | {"logprobs": [0, math.inf]}, "logprobs[1]=inf must be a number in [-1e+30, 1e+30]"),
    "lengths": (GOOD | {"unmask_step": [0]}, "unmask_step=[0] must be a list with an entry for each token"),
    "temperature": (GOOD | {"temperature": "hot\u202e"}, "temperature='hot"),
    "top_k": (GOOD | {"top_k": 0}, "top_k=0 must be at least 1"),
    "group": (GOOD | {"group": -1}, "group=-1 must be at least 0"),
    "no tokens": (GOOD | {"tokens": [], "completion_mask": [], "unmask_step": []}, "completion_mask is empty"),
    "no completion": (GOOD | {"completion_mask": [0, 0]}, "completion_mask is empty"),
    "completion_mask": (GOOD | {"completion_mask": [0, 2]}, "completion_mask[1]=2 must be a whole number in [0, 1]"),
    "no steps": ({name: value for name, value in GOOD.items() if name != "unmask_step"}, "unmask_step=None must be"),
    "suppress": (GOOD | {"suppress": [1, "2"]}, "suppress[1]='2' is of type str; give int"),
    "forwards": (GOOD | {"forwards": 1.5}, "forwards=1.5 is of type float; give int"),
    "null": (GOOD | {"logprobs": [None, "-1"]}, "logprobs[1]='-1' must be a number in"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_line_is_refused_in_one(tmp_path, name):
    row, said = REFUSED[name]
    (tmp_path / "a.jsonl").write_text(row if isinstance(row, str) else json.dumps(row))
    with pytest.raises(ValueError, match=r"a\.jsonl") as error:
        read_trace(tmp_path / "a.jsonl")
    assert said in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_files_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"temperature": 2}))
    refuses(r"line 2: temperature=2 differs from that of .*line 1; split", lambda: read_trace(path))
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"block_first_step": [-1, 0]}))
    refuses("line 2: block_first_step is in this line or in", lambda: read_trace(path))
    path.write_text("\n")
    refuses(r"a\.jsonl has no rows", lambda: read_trace(path))
    write_trace(path, sampled())
    found = read_trace(path)
    with pytest.raises(ValueError, match=f"tokens has id 99, the model {model().vocab_size} ids"):
        check_trace(model(), replace(found, tokens=found.tokens.masked_fill(found.completion_mask, 99)))
    for token in (99, -1):
        with pytest.raises(ValueError, match=f"suppress has id {token}, the model {model().vocab_size} ids"):
            check_trace(model(), params(found, suppress=(1, token)))


def test_rows_of_batches_with_other_numbers_of_forwards_are_one_trace(tmp_path):
    """As of a server, whose batches of a causal model end with their longest completion."""
    policy = tiny_llama(**SIZES, causal=True)
    batches = [sampled(policy, Autoregress, max_new_tokens=length, temperature=1.0) for length in (2, 7)]
    rows = [row for batch in batches for row in traces.trace_rows(batch)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_trace(tmp_path / "a.jsonl")
    assert found.forwards == batches[1].forwards > batches[0].forwards and len(found.tokens) == 12
    assert check_trace(policy, found).ok


def test_a_trace_without_logprobs_is_checked_for_its_steps(tmp_path):
    bare = replace(sampled(), logprobs=torch.full_like(sampled().logprobs, math.nan))
    write_trace(tmp_path / "a.jsonl", bare)
    found = read_trace(tmp_path / "a.jsonl")
    report = check_trace(model(), found)
    assert report.ok and report.total.num_tokens == 0 and "log-probs were not compared" in report.verdict
    assert json.loads(json.dumps(as_json(report), allow_nan=False))["total"]["mean_abs"] is None
    assert named(check_trace(model(), swapped(found))) == {"order"}


def test_the_global_generator_is_not_used():
    state = torch.get_rng_state()
    check_trace(model(), shifted(sampled(), 1))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.skipif(
    find_spec("xllamacpp") is None or find_spec("gguf") is None, reason="the wheel xllamacpp, or gguf, is not installed"
)
def test_traces_of_llama_cpp(tmp_path):
    from recipes.engines.llama_cpp import LlamaCpp

    policy = tiny_llama(**SIZES, causal=False, head_std=0.1)
    rollout = sampled(LlamaCpp(format="F32", threads=1).load(policy))
    write_trace(tmp_path / "a.jsonl", rollout)
    report = check_trace(policy, read_trace(tmp_path / "a.jsonl"))
    assert report.ok and 0 < report.total.mean_abs < 0.005
    assert check_trace(policy, params(rollout, temperature=1.0)).differs
