"""Each cause of mismatch, planted, is ranked first; the steps add up to the whole; a healthy setup is called so."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from doctor_cases import make, prompts, sampler
from emulated import int3_emulated
from mixtures import moe

from dllm_rl.doctor.mismatch import ADVICE, Cause, Report, diagnose, tables, write_doctor
from dllm_rl.likelihoods.estimators import Trajectory
from dllm_rl.quantization.rollout_policy import quantized_copy
from dllm_rl.quantization.schemes import FakeQuantize
from dllm_rl.samplers.autoregress import Autoregress
from dllm_rl.samplers.cache import DualCache
from dllm_rl.samplers.rules import Confidence


def weights(policy):
    return {"config": FakeQuantize(weight="int4")}


def activations(policy):
    return {"config": FakeQuantize(weight=None, activation="int4")}


def stale(policy):
    other = quantized_copy(policy, None)
    for parameter in other.module.parameters():
        parameter.data.mul_(1.05)
    return {"rollout_policy": other}


def precision(policy):
    other = quantized_copy(policy, None)
    other.module.bfloat16()
    return {"rollout_policy": other}


def rotary(policy):
    other = quantized_copy(policy, None)
    tables = other.module.model.rotary_emb
    tables.inv_freq = tables.inv_freq.to(torch.float8_e4m3fn).float()
    return {"rollout_policy": other}


def logits(policy):
    other, head = quantized_copy(policy, None), policy.spec.head
    other.spec = replace(policy.spec, head=lambda module, hidden: head(module, hidden).bfloat16().float())
    return {"rollout_policy": other}


def head_in_half(policy):
    """A head in bf16 on both sides, logits in fp32 on one; the body in fp32, whose own noise would be as large."""
    policy.module.lm_head.bfloat16()
    policy.spec = replace(policy.spec, head=lambda module, hidden: module.lm_head(hidden.bfloat16()))
    other = quantized_copy(policy, None)
    other.float32_head = False
    return {"rollout_policy": other}


def cache(policy):
    return {"sampler": sampler.replace(diffusion_steps=4, block_size=4, cache=DualCache())}


def padding(policy):
    encode = policy.spec.encode
    blind = lambda module, tokens, mask, positions: encode(module, tokens, torch.ones_like(mask), positions)  # noqa: E731
    policy.spec = replace(policy.spec, encode=blind)
    return {}


def batch_shape(policy):
    encode = policy.spec.encode
    shaky = lambda module, tokens, *rest: encode(module, tokens, *rest) * (1.05 if len(tokens) > 4 else 1.0)  # noqa: E731
    policy.spec = replace(policy.spec, encode=shaky)
    return {}


PLANTED = {
    "quantized weights": [weights],
    "quantized activations": [activations],
    "stale weights": [stale],
    "precision": [precision, rotary, logits],
    "head precision": [head_in_half],
    "cache or sampler": [cache],
    "padding": [padding],
    "batch shape": [batch_shape],
}


@pytest.mark.repeated(every=3)
@pytest.mark.parametrize(("name", "plant"), [(name, plant) for name, plants in PLANTED.items() for plant in plants])
def test_a_planted_cause_is_ranked_first(name, plant):
    policy = make()
    report = diagnose(policy, **({"prompts": prompts(), "sampler": sampler} | plant(policy)))
    assert report.causes[0].name == name, report.causes
    assert report.causes[0].mean_abs > 2 * report.causes[1].mean_abs
    assert name in report.verdict and ADVICE[name] in report.verdict
    assert set(PLANTED) >= {cause.name for cause in report.causes}
    if plant in (weights, stale, cache):  # it is the whole, sign included
        for part in ("mean_abs", "max_abs", "k3", "ess"):
            assert getattr(report.causes[0], part) == pytest.approx(getattr(report.total, part), rel=1e-4), part
        assert abs(report.total.k3 - opposite_k3(policy, plant)) > 1e-3 * report.total.k3


def opposite_k3(policy, plant):
    """k3 = mean(rho - 1 - log rho) of log rho = rollout - learner, from the log-probs themselves."""
    given = {"sampler": sampler} | plant(policy)
    other = given.get("rollout_policy") or quantized_copy(policy, given.get("config"))
    rollout = given["sampler"](other, prompts(), torch.Generator().manual_seed(0))
    learner = Trajectory().logprobs(policy, rollout, Trajectory().draw_views(rollout, torch.Generator()))
    log_rho = (rollout.logprobs - learner)[rollout.completion_mask].double()
    return (log_rho.exp() - 1 - log_rho).mean().item()


def test_without_a_cause_everything_is_exactly_zero_or_rounding():
    report = diagnose(make(), prompts=prompts(), sampler=sampler)
    by_name = {cause.name: cause for cause in report.causes}
    for name in ("precision", "head precision", "stale weights"):
        assert by_name[name].max_abs == 0 and by_name[name].ess == 1
    assert report.worst < 1e-5 and report.verdict.startswith("No mismatch worth a correction")
    assert report.order == (1.0, 1.0) and "another order" not in report.verdict


def test_the_steps_add_up_to_the_whole():
    """Token by token the chain telescopes; with one sign per cause the means would too, here an inequality remains."""
    policy = make()
    cached = sampler.replace(diffusion_steps=4, block_size=4, cache=DualCache())
    report = diagnose(policy, int3_emulated, prompts=prompts(), sampler=cached)
    by_name = {cause.name: cause.mean_abs for cause in report.causes}
    chain = sum(by_name[n] for n in ("quantized weights", "quantized activations", "stale weights", "cache or sampler"))
    assert 0 < report.total.mean_abs <= chain
    assert report.total.mean_abs >= 2 * max(by_name.values()) - chain
    assert by_name["quantized weights"] > by_name["quantized activations"] > by_name["stale weights"] == 0


def test_a_quantized_rollout_in_bf16_is_precision_and_quantization_and_nothing_else():
    policy, half = make(), make()
    half.module.bfloat16()
    rollout_policy = quantized_copy(half, FakeQuantize(weight="int4"))
    report = diagnose(policy, prompts=prompts(), sampler=sampler, rollout_policy=rollout_policy)
    by_name = {cause.name: cause.mean_abs for cause in report.causes}
    assert by_name["quantized weights"] > by_name["precision"] > 0 == by_name["stale weights"]


def test_worst_layers_are_the_ones_that_differ_most():
    policy = make()
    other = quantized_copy(policy, None)
    other.module.model.layers[1].mlp.up_proj.weight.data.mul_(1.5)
    report = diagnose(policy, prompts=prompts(), sampler=sampler, rollout_policy=other)
    worst = dict(report.layers)
    # ||1.5 y - y|| / ||y||, also of down_proj, which is linear in y: rounding decides which of the two comes first.
    assert {name for name, _ in report.layers[:2]} == {f"model.layers.1.mlp.{part}_proj" for part in ("up", "down")}
    assert worst["model.layers.1.mlp.up_proj"] == pytest.approx(0.5, rel=1e-5) == report.layers[0][1]
    assert len(report.layers) == 5 and report.num_tokens == 12 * 8


def test_autoregressive_policies_are_examined_too():
    six = Autoregress(max_new_tokens=6)
    report = diagnose(make(causal=True), int3_emulated, prompts=prompts(), sampler=six)
    assert report.causes[0].name == "quantized weights"
    assert {c.name: c.mean_abs for c in report.causes}["cache or sampler"] < 1e-5


@pytest.mark.slow
def test_heads_in_16_bits_are_a_cause_and_heads_in_fp32_are_none():
    """The same quantized model with both heads either way: the cause is there or spared."""
    policy, config = make(), int3_emulated
    policy.module.bfloat16()
    other = quantized_copy(policy, config)
    spared = diagnose(policy, config, prompts=prompts(), sampler=sampler, rollout_policy=other)
    assert {c.name: c.max_abs for c in spared.causes}["head precision"] == 0
    policy.float32_head = other.float32_head = False
    report = diagnose(policy, config, prompts=prompts(), sampler=sampler, rollout_policy=other)
    cause = {c.name: c for c in report.causes}["head precision"]
    assert 1e-4 < cause.mean_abs < 0.02
    policy.float32_head = True
    one = diagnose(policy, config, prompts=prompts(), sampler=sampler, rollout_policy=other)
    assert {c.name: c for c in one.causes}["head precision"].mean_abs > cause.mean_abs / 2


def test_an_order_that_the_learner_would_not_choose_is_named():
    """int3's weights change which position is the most certain."""
    report = diagnose(make(), int3_emulated, prompts=prompts(), sampler=sampler)
    assert report.order is not None and report.order[1] < 1 and report.order[0] <= 1
    assert "of the prompts begin in another order than the learner's own" in report.verdict
    assert "rank=RandomOrder()" in report.verdict and "order of the first step" in str(tables(report))


def test_ranked_by_confidence_tokens_and_order_are_one_record():
    """Unquantized, nothing is left of the whole, though every row holds the order's log-probs."""
    report = diagnose(make(), None, prompts=prompts(), sampler=sampler.replace(rank=Confidence()))
    assert report.worst < 1e-5 and report.order is None


def test_quantized_experts_are_quantization_and_the_chain_adds_up():
    policy = moe()
    report = diagnose(policy, int3_emulated, prompts=prompts(), sampler=sampler)
    by_name = {cause.name: cause.mean_abs for cause in report.causes}
    assert by_name["quantized weights"] > 0 and by_name["stale weights"] < 1e-5
    assert report.total.mean_abs <= sum(by_name.values())
    json.dumps(asdict(report))


CAUSES = (
    Cause("padding", 0.5, 2.0, 0.04, 0.8),
    Cause("stale weights", 0.005, 0.01, 0.0, 1.0),
    Cause("precision", 0.004, 0.009, 0.0, 1.0),
)
REPORT = Report("none", 12, Cause("all", 0.25, 1.5, 0.03, 0.9), CAUSES, (("layer", 0.125),))


def test_a_report_is_printed_as_tables_or_json(capsys):
    report = replace(REPORT, order=(0.75, 0.5))
    write_doctor(report)
    table = capsys.readouterr().out
    assert "stale weights" in table and report.verdict[:40] in table.replace("\n", " ")
    write_doctor(report, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["causes"][0]["name"] == report.causes[0].name and found["verdict"] == report.verdict
    assert found["num_tokens"] == report.num_tokens


def test_rows_by_hand():
    """Advice stands where a cause is a hundredth of the worst or more, which may be a probe that the total lacks."""
    assert REPORT.worst == 0.5
    assert REPORT.verdict == f"Mostly padding: mean |d| 0.5 of 0.5 nats in all. To do: {ADVICE['padding']}."
    found = {title.partition(",")[0]: lines for title, _, lines in tables(REPORT)}
    assert found["log-prob mismatch over 12 tokens"] == [
        ("all", "2.50e-01", "1.50e+00", "3.0e-02", "0.9000", ""),
        ("padding", "5.00e-01", "2.00e+00", "4.0e-02", "0.8000", ADVICE["padding"]),
        ("stale weights", "5.00e-03", "1.00e-02", "0.0e+00", "1.0000", ADVICE["stale weights"]),
        ("precision", "4.00e-03", "9.00e-03", "0.0e+00", "1.0000", ""),
    ]
    assert found["worst layers"] == [("layer", "1.25e-01")] and len(found) == 2
