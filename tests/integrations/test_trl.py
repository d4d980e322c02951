"""`DiffusionGRPOTrainer` trains as this library's own learner does, in TRL's trainer."""

import ast
import dataclasses
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import warnings
from collections import defaultdict
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")

from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from layouts import checkpoint
from live_bytes import LiveBytes
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from ranks import run_ranks
from refusals import refuses
from repetitions import nightly
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, BertTokenizer, PrinterCallback, TrainerState
from trl import GRPOConfig, GRPOTrainer
from trl_runs import LORA, ROWS, Watched, config, reward, tiny, trainer

from dllm_rl import (
    AIS,
    CISPO,
    ELBO,
    GSPO,
    K3,
    TBPO,
    TIS,
    VESPO,
    Causal,
    Coupled,
    FixedLengthMean,
    Float8WeightOnly,
    IcePop,
    Int8WeightOnly,
    NoCorrection,
    OneStep,
    PPOClip,
    QaRL,
    Reinforce,
    Reject,
    Renoise,
    SequenceMean,
    Trajectory,
    Unmask,
    grpo,
    grpo_recipe,
    load_policy,
    quantized_copy,
)
from dllm_rl.callbacks import StopBelow
from dllm_rl.frontend.trl_names import LOSS_TYPES, unused_defaults
from dllm_rl.integrations import trl as ours
from dllm_rl.integrations import trl_settings
from dllm_rl.integrations.oracle import Oracle
from dllm_rl.models.lora import add_lora
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.policy import make_policy
from dllm_rl.models.tiny import tiny_diffusion_gemma, tiny_llama, tiny_moe
from dllm_rl.step.samples import Samples
from dllm_rl.step.update import train_step
from dllm_rl.training.make_step import make_step
from dllm_rl.types.rollouts import Rollout
from dllm_rl.types.scoring import Batch, Views

LIKELIHOODS = [Trajectory(), OneStep(), ELBO(num_samples=2), Coupled()]
CORRECTORS = [NoCorrection(), TIS(cap=1.01), AIS(), IcePop(), Reject(threshold=1e-4), TBPO()]
SCHEMES = [None, Int8WeightOnly(), Float8WeightOnly()]
TWO_PARTS = {"gradient_accumulation_steps": 2}  # of each update's rows
FEW_ROWS = {"gradient_accumulation_steps": 1, "max_steps": 1}  # eight
# Every pair of an estimator, a corrector and a scheme occurs; the other combinations run in the nightly part.
CASES = [(a, b, c) for a in LIKELIHOODS for b in CORRECTORS for c in SCHEMES]
FAST = [
    (a, b, c)
    for i, a in enumerate(LIKELIHOODS)
    for j, b in enumerate(CORRECTORS)
    for k, c in enumerate(SCHEMES)
    if (i + j + k) % 3 == 0 and (j + k) % 2 == i % 2
]


class Recorder(torch.optim.SGD):
    """Each step keeps the gradients, and gives the module the weights that TRL's optimizer made."""

    def __init__(self, module, weights):
        super().__init__(module.parameters(), lr=1.0)
        self.module, self.weights, self.gradients = module, weights, []

    def step(self):
        named = self.module.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        self.module.load_state_dict(self.weights[min(len(self.gradients), len(self.weights) - 1)])


def learner(run, **settings):
    """Losses and gradients of this library's learner for the run's first rollout."""
    batches, advantages = run.first
    rollout = batches[0].rollout
    policy, module = run._policy, run._policy.module
    module.load_state_dict(run.weights[0])
    module.eval()
    recipe = grpo_recipe(
        policy,
        ROWS,
        lambda completions: [0.0] * len(completions),
        preset="none",
        max_new_tokens=4,
        num_generations=4,
        num_iterations=2,
        max_grad_norm=1e9,
        seed=run.args.seed,
        **settings,
    )
    scheme = settings.get("rollout_quantization")
    rollout_policy = policy if scheme is None else quantized_copy(policy, scheme)
    reference = run._context.reference if settings.get("beta") else None
    context = make_step(
        recipe, accelerator=Accelerator(cpu=True), policy=policy, rollout_policy=rollout_policy, reference=reference
    )
    group = torch.arange(len(advantages)) // 4
    weights = torch.ones(len(advantages), dtype=torch.double)
    samples = Samples(rollout, group, advantages, advantages, weights, (len(advantages),))
    recorder = Recorder(module, run.weights)
    rollout_version = policy.weights_version
    rollout = dataclasses.replace(rollout, weights_version=rollout_version)
    result = train_step(context, dataclasses.replace(samples, rollout=rollout), 0, recorder)
    return result, recorder.gradients


def difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


TWO_STEPS = Unmask(max_new_tokens=4, diffusion_steps=2)


def run_of(tmp_path, likelihood, corrector, scheme, *, lora=False, settings=None, sampler=TWO_STEPS, **more):
    run = trainer(
        tmp_path,
        kind=Watched,
        lora=lora,
        likelihood=likelihood,
        corrector=corrector,
        rollout_quantization=scheme,
        sampler=sampler,
        settings={"num_iterations": 2} | (settings or {}),
        **more,
    )
    run.train()
    return run


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    ("likelihood", "corrector", "scheme"),
    [case if case in FAST else pytest.param(*case, marks=pytest.mark.nightly) for case in CASES],
)
@pytest.mark.repeated(first_only=True)
def test_losses_and_gradients_are_the_learners(tmp_path, likelihood, corrector, scheme, lora):
    settings = None if lora else TWO_PARTS  # with few rows of adapters, TBPO leaves none
    more = {} if scheme is None else {"model": tiny(num_layers=2), "sampler": None}  # a mismatch that rows differ by
    run = run_of(tmp_path, likelihood, corrector, scheme, lora=lora, settings=settings, **more)
    result, gradients = learner(run, likelihood=likelihood, corrector=corrector, rollout_quantization=scheme)
    assert len(gradients) == len(run.gradients) == 2
    for own, trls in zip(gradients, run.gradients, strict=True):
        assert max(x.abs().max() for x in own.values()) > 1e-3
        assert difference(own, trls) < 1e-6
    assert abs(run.losses[-1] - result.metrics["loss"]) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("field", ["importance_weights", "loss_mask", "old_logprobs", "advantages", "views", "rollout"])
def test_the_comparison_sees_what_is_moved_to_another_row(tmp_path, monkeypatch, field):
    rows_of = ours.rows_of

    def moved(batch, rows, share):
        other = rows_of(batch, (rows + 1) % len(batch.loss_mask), share)
        return dataclasses.replace(rows_of(batch, rows, share), **{field: getattr(other, field)})

    monkeypatch.setattr(ours, "rows_of", moved)
    given = {"likelihood": Trajectory(), "corrector": Reject(threshold=1e-5)}
    if field == "importance_weights":
        given["corrector"] = TIS()
    run = run_of(tmp_path, scheme=Int8WeightOnly(), model=tiny(num_layers=2), sampler=None, **given)
    _, gradients = learner(run, rollout_quantization=Int8WeightOnly(), **given)
    assert max(difference(own, trls) for own, trls in zip(gradients, run.gradients, strict=True)) > 1e-5


@pytest.mark.parametrize(
    ("trls", "own"),
    [
        ({"beta": 0.1, "use_bias_correction_kl": True}, {"beta": 0.1, "kl": K3(bias_correction=True)}),
        ({"beta": 0.1, "use_bias_correction_kl": False}, {"beta": 0.1, "kl": K3()}),
        ({"loss_type": "grpo"}, {"loss_reduction": SequenceMean()}),
        ({"loss_type": "dr_grpo"}, {"loss_reduction": FixedLengthMean(length=4)}),
        ({"epsilon": 0.01, "epsilon_high": 0.02}, {"loss": PPOClip(epsilon=0.01, epsilon_high=0.02)}),
        ({"importance_sampling_level": "sequence"}, {"loss": GSPO(epsilon=0.2, epsilon_high=None)}),
    ],
)
@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.repeated(first_only=True)
def test_settings_of_grpo_config_are_the_learners(tmp_path, trls, own, lora):
    run = run_of(tmp_path, Trajectory(), NoCorrection(), None, lora=lora, settings=trls | TWO_PARTS)
    result, gradients = learner(run, likelihood=Trajectory(), **own)
    assert all(difference(*pair) < 1e-6 for pair in zip(gradients, run.gradients, strict=True))
    assert abs(run.losses[-1] - result.metrics["loss"]) < 1e-6


LOSS_SETTINGS = [
    {"loss_type": loss_type, "importance_sampling_level": level, "epsilon": 0.1, "epsilon_high": 0.3}
    for loss_type in ("bnpo", "dapo", "dr_grpo", "grpo", "luspo")
    for level in ("token", "sequence")
]
LOSS_SETTINGS += [
    {"loss_type": "dapo", "delta": 1.5, "off_policy_mask_threshold": 0.05},
    {"loss_type": "cispo"},  # TRL caps its ratios at epsilon
    {"loss_type": "cispo", "epsilon_high": 1.2, "off_policy_mask_threshold": 0.1},
    {"loss_type": "sapo"},
    {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 3.0},
    {"loss_type": "vespo"},
    {"loss_type": "vespo", "importance_sampling_level": "sequence", "vespo_k_pos": 1.0, "vespo_lambda_neg": 1.5},
]


def random_batch(rows=8, length=5):
    """A scored batch whose completions have several lengths, with log-probs of after an update, also of padding."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=generator)
    old = -torch.rand(rows, length, generator=generator) * 3
    new = old + torch.randn(rows, length, generator=generator) / 3
    rollout = Rollout(
        torch.ones_like(mask, dtype=torch.long), mask, mask, mask.long() - 1, old, torch.arange(rows), weights_version=3
    )
    views = Views(mask[None], mask[None].float())
    ones = torch.ones(rows, length)
    numbers = {"num_tokens": int(mask.sum()), "num_sequences": rows, "rollout_logprobs": old - 0.5}
    advantages = torch.randn(rows, generator=generator)
    return Batch(rollout, views, advantages, old, old[None], ones, mask, None, **numbers), new


def trls_loss(args, batch, new, rows, num_items):
    """TRL's own code, on given log-probs: the loss of a micro-batch, and its gradient."""
    logps = new[rows].requires_grad_()
    mask = batch.rollout.completion_mask[rows].long()
    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    run = SimpleNamespace(
        args=args, accelerator=accelerator, model=SimpleNamespace(training=True), use_vllm=False, beta=0.0,
        aux_loss_enabled=False, use_adaptive_entropy=False, _entropy_bonus_enabled=False, epsilon_low=args.epsilon,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        current_gradient_accumulation_steps=args.gradient_accumulation_steps, _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask, get_gamma_weights=GRPOTrainer.get_gamma_weights,
        **{name: getattr(args, name) for name in ("loss_type", "importance_sampling_level", "max_completion_length",
           "off_policy_mask_threshold", "top_entropy_quantile")},
    )  # fmt: skip
    inputs = {"prompt_ids": mask[:, :0], "prompt_mask": mask[:, :0], "completion_ids": mask, "completion_mask": mask}
    inputs |= {"advantages": batch.advantages[rows], "old_per_token_logps": batch.old_logprobs[rows]}
    loss = GRPOTrainer._compute_loss(run, None, inputs | {"num_items_in_batch": num_items})
    loss.backward()
    value = loss.detach()
    if args.loss_type in ("cispo", "vespo"):  # a weight times log p, for which the library has the log-ratio
        value = value - (logps.grad * batch.old_logprobs[rows]).sum()
    return value, logps.grad


@pytest.mark.parametrize("settings", LOSS_SETTINGS)
def test_each_loss_type_has_trls_value_and_gradient(tmp_path, monkeypatch, settings):
    """Of two micro-batches of a window of accumulation, on the same log-probs, after an update."""
    args = config(
        tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=4, max_completion_length=5, **settings
    )
    batch, new = random_batch()
    found = []

    def compute(policy, batch, view_logprobs, loss, likelihood):
        value, _, gradient = loss(new[batch.rollout.group], batch)
        found.append((value, gradient))
        return {"loss": (value, torch.ones(()))}

    monkeypatch.setattr(ours, "forward_backward", compute)
    recipe = trl_settings.make_recipe(tiny(), args)
    run = SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cpu"), num_processes=1), args=args, num_iterations=1, _step=0,
        model=SimpleNamespace(training=True), state=SimpleNamespace(global_step=3), loss_type=args.loss_type,
        current_gradient_accumulation_steps=2, _recipe=recipe, _policy=None, _log=lambda *_: None,
        _arithmetic=nullcontext, _router_loss=lambda *_: torch.zeros(()),
    )  # fmt: skip
    monkeypatch.setattr(ours, "reduce_metrics", lambda *_: {})
    for rows in (torch.arange(4), torch.arange(4, 8)):
        returned = ours.DiffusionGRPOTrainer._compute_loss(
            run, None, {"dllm_rl": [([batch], row) for row in rows.tolist()]}
        )
        value, gradient = trls_loss(args, batch, new, rows, batch.rollout.completion_mask.sum())
        torch.testing.assert_close(found[-1][0], value)
        torch.testing.assert_close(found[-1][1], gradient)
        torch.testing.assert_close(returned.detach(), value)
        assert gradient.abs().max() > 1e-3


def test_each_update_of_a_generation_takes_its_own_masks(tmp_path, monkeypatch):
    """A generation of two steps, trained on twice: TRL's steps 0 to 5 are the updates 0, 0, 1, 1, and again 0, 0."""
    args = config(tmp_path, num_iterations=2, per_device_train_batch_size=2, max_completion_length=5)
    args.steps_per_generation = 2
    batch, _ = random_batch()
    batches = [dataclasses.replace(batch, num_sequences=number) for number in range(2)]
    found = []
    monkeypatch.setattr(ours, "reduce_metrics", lambda *_: {})
    monkeypatch.setattr(
        ours, "forward_backward", lambda _, batch, *rest, **more: found.append(batch) or {"loss": (torch.zeros(()), 1)}
    )
    monkeypatch.setattr(ours, "rows_of", lambda batch, rows, share: batch)
    recipe = trl_settings.make_recipe(tiny(), args)
    for step in range(6):
        run = SimpleNamespace(
            accelerator=SimpleNamespace(device=torch.device("cpu"), num_processes=1), args=args, num_iterations=2,
            model=SimpleNamespace(training=True), state=SimpleNamespace(global_step=3), loss_type=args.loss_type,
            current_gradient_accumulation_steps=1, _step=step, _recipe=recipe, _policy=None, _log=lambda *_: None,
            _arithmetic=nullcontext, _router_loss=lambda *_: torch.zeros(()),
        )  # fmt: skip
        ours.DiffusionGRPOTrainer._compute_loss(run, None, {"dllm_rl": [(batches, 0)]})
    assert [batch.num_sequences for batch in found] == [0, 0, 1, 1, 0, 0]


def test_truncated_completions_are_in_no_mean_over_tokens(tmp_path):
    """As in TRL, whose mask of them is 0: they count as sequences, and in the groups' mean rewards."""
    settings = {"mask_truncated_completions": True, "max_steps": 1, "num_iterations": 1}
    run = run_of(tmp_path, Trajectory(), NoCorrection(), None, settings=settings | TWO_PARTS)
    (batch, *_), advantages = run.first
    truncated = ~batch.rollout.completion_mask.any(-1)
    has_end = (batch.rollout.tokens[:, -4:] == run._policy.spec.eos_ids[0]).any(-1)
    assert truncated.any() and has_end.any() and torch.equal(truncated, ~has_end)
    assert not batch.loss_mask[truncated].any() and batch.loss_mask[~truncated & (advantages != 0)].any(-1).all()
    assert batch.num_tokens == 4 * int((~truncated).sum()) and batch.num_sequences == len(truncated)


@pytest.mark.slow
def test_a_batch_of_truncated_completions_alone_changes_nothing(tmp_path):
    settings = {"mask_truncated_completions": True, "max_steps": 1, "num_iterations": 1}
    model = tiny()
    model.spec = dataclasses.replace(model.spec, eos_ids=(model.spec.mask_id,))  # which no sampler writes
    run = run_of(tmp_path, Trajectory(), NoCorrection(), None, settings=settings, model=model)
    assert not run.first[0][0].loss_mask.any()
    assert all(torch.equal(x, run._policy.module.state_dict()[name]) for name, x in run.weights[0].items())


def test_the_reference_follows_the_weights(tmp_path):
    """TRL's formula, at its steps: reference = 0.75 reference + 0.25 weights."""
    settings = {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.25}
    settings |= {"max_steps": 4, "num_iterations": 1, "gradient_accumulation_steps": 1}
    run = run_of(tmp_path, Trajectory(), NoCorrection(), None, settings=settings)
    assert run.ref_model is run._context.reference.module
    name, reference = next(iter(run.ref_model.named_parameters()))
    first, second = (run.weights[step][name] for step in (0, 2))
    final = run._policy.module.get_parameter(name)
    expected = 0.75 * (0.75 * first + 0.25 * second) + 0.25 * final
    torch.testing.assert_close(reference, expected)
    assert (first - final).abs().max() > 1e-3


@pytest.mark.slow
def test_a_peft_model_is_trained_further_against_its_own_adapters(tmp_path):
    """Its adapters change the weights from the start, and its reference has a copy of them, as in TRL."""
    policy = tiny()
    torch.manual_seed(1)
    model = get_peft_model(policy.module, LoraConfig(**LORA, init_lora_weights=False))
    given = {"model": model, "processing_class": policy.tokenizer, "settings": {"beta": 0.1, "num_iterations": 1}}
    run = run_of(tmp_path, Trajectory(), NoCorrection(), None, **given)
    logged = [log["kl"] for log in run.state.log_history if "kl" in log]
    assert abs(logged[0]) < 1e-6 < abs(logged[1])
    tokens = torch.tensor([[3, 4, 5]])
    at = torch.ones_like(tokens, dtype=torch.bool)
    run._policy.module.eval()
    trained, reference = run._policy.logits(tokens, at), run._context.reference.logits(tokens, at)
    with model.disable_adapter():
        base = policy.logits(tokens, at)
    assert min((trained - reference).abs().max(), (reference - base).abs().max()) > 1e-3
    changed = {name for name, x in run.weights[0].items() if not torch.equal(x, run._policy.module.state_dict()[name])}
    assert changed == {name for name in run.weights[0] if "lora_" in name and ".default." in name}


def test_the_router_loss_trains_a_mixture_whose_answers_are_equally_good(tmp_path, monkeypatch):
    """The gradient, and TRL's metric, are those of transformers' own loss of the model, times its coefficient."""
    monkeypatch.setattr("trl_runs.reward", lambda completions, **_: [1.0] * len(completions))
    model = tiny_moe(characters="12345678=", hidden_size=32, num_layers=2)
    model.module.config.router_aux_loss_coef = 0.5
    run = run_of(tmp_path, Trajectory(), NoCorrection(), None, model=model, settings=FEW_ROWS | {"num_iterations": 1})
    (batch, *_), _ = run.first
    tokens = torch.where(batch.views.masked[0], model.spec.mask_id, batch.rollout.tokens)
    model.module.load_state_dict(run.weights[0])
    model.module.zero_grad()
    output = model.module(input_ids=tokens, attention_mask=batch.rollout.attention_mask, output_router_logits=True)
    (0.5 * output.aux_loss).backward()
    gradients = {name: p.grad for name, p in model.module.named_parameters() if p.grad is not None}
    expected = {name: torch.zeros_like(x) for name, x in run.gradients[0].items()} | gradients
    assert difference(run.gradients[0], expected) < 1e-5 and max(x.abs().max() for x in expected.values()) > 1e-3
    assert run.state.log_history[0]["aux_loss"] == pytest.approx(output.aux_loss.item(), abs=1e-5)
    assert run.losses[0] == pytest.approx(0.5 * output.aux_loss.item(), abs=1e-5)


def test_a_router_loss_that_transformers_lacks_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"not a Mixture-of-Experts model"):  # TRL's own line
        trainer(tmp_path, settings={"router_aux_loss_coef": 0.1})
    source = checkpoint(tmp_path / "source", "llada2")
    with pytest.raises(ValueError, match="router_aux_loss_coef: transformers has no load-balancing loss of Glm4Moe"):
        trainer(tmp_path, model=str(source), rows=[{"prompt": "ab"}] * 8, settings={"router_aux_loss_coef": 0.1})


def test_the_rollouts_of_a_step_have_their_own_random_numbers(tmp_path, monkeypatch):
    """Two generations of one optimizer step: each takes part of its accumulation."""
    drawn = []

    def watched(*arguments):
        drawn.append(row_seeds(*arguments))
        return drawn[-1]

    row_seeds = ours.row_seeds
    monkeypatch.setattr(ours, "row_seeds", watched)
    settings = {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "max_steps": 2}
    run = trainer(tmp_path, settings=settings, eval_rows=ROWS[:2])
    run.train()
    assert len(drawn) == 4 and len(torch.cat(drawn).unique()) == 4 * 8
    evaluated = []
    for _ in range(2):
        drawn.clear()
        run.evaluate()
        evaluated.append(torch.cat(drawn))
    assert torch.equal(*evaluated), "each evaluation has the same random numbers"


@pytest.mark.slow
def test_the_console_has_trls_numbers_and_the_log_all(tmp_path, capsys):
    settings = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "beta": 0.1}
    run = ours.DiffusionGRPOTrainer(
        tiny(),
        reward,
        config(tmp_path, **settings),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS[:4]),
    )
    run.train()
    printed = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert len(printed) == len(run.state.log_history) == 4
    for shown, log in zip(printed, run.state.log_history, strict=True):
        assert shown.keys() <= log.keys() and len(shown) < 40
        assert not [
            name for name in shown if name.removeprefix("eval_").startswith(("rollout_corr", "trained", "off_policy"))
        ]
    assert {"loss", "reward", "kl", "clip_ratio/low_mean", "completions/mean_length"} <= printed[0].keys()
    assert "rollout_corr/ess" in run.state.log_history[0] and "eval_reward" in printed[2]


@pytest.mark.parametrize(("given", "expected"), [({}, "1="), ({"more": "23"}, "231="), ({"more": "4"}, "41=")])
@pytest.mark.repeated(first_only=True)
def test_variables_of_the_chat_template_are_in_the_prompts(tmp_path, monkeypatch, given, expected):
    monkeypatch.setattr("trl_runs.reward", lambda completions, **_: [0.0] * len(completions))
    policy = tiny()
    policy.tokenizer.chat_template = "{{ more }}{{ messages[0]['content'] }}"
    rows = [{"prompt": [{"role": "user", "content": "1="}]}] * 8
    run = trainer(tmp_path, model=policy, rows=rows, settings=FEW_ROWS | {"chat_template_kwargs": given})
    run.train()
    rollout = run._generated[0]
    rows_and_masks = zip(rollout.tokens[:, :-4], rollout.attention_mask[:, :-4], strict=True)
    (prompt,) = {tuple(row[at].tolist()) for row, at in rows_and_masks}
    assert policy.tokenizer.decode(list(prompt)) == expected


def test_variables_that_the_chat_template_does_not_read_are_refused(tmp_path):
    policy = tiny()
    policy.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    rows = [{"prompt": [{"role": "user", "content": "1="}]}] * 8
    with pytest.raises(
        ValueError, match=r"train_dataset: row 0: .*thinking=True is not read by the model's chat template"
    ):
        trainer(tmp_path, model=policy, rows=rows, settings={"chat_template_kwargs": {"thinking": True}})


def test_a_given_tokenizer_of_a_checkpoint_is_used(tmp_path):
    source = checkpoint(tmp_path / "source", "llada")
    tokenizer = load_policy(source).tokenizer
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    run = trainer(tmp_path, model=str(source), processing_class=tokenizer, rows=[{"prompt": "ab"}] * 8)
    assert run._policy.tokenizer is tokenizer is run.processing_class
    with pytest.raises(ValueError, match="processing_class has other tokens than the tokenizer of model="):
        trainer(tmp_path, model=str(source), processing_class=tiny().tokenizer, rows=[{"prompt": "ab"}] * 8)


def test_a_loaded_model_brings_the_tokenizer_of_its_folder(tmp_path):
    """As in TRL."""
    tiny().save_pretrained(tmp_path / "model")
    run = trainer(tmp_path / "out", model=AutoModelForMaskedLM.from_pretrained(tmp_path / "model"))
    assert run._policy.tokenizer.get_vocab() == tiny().tokenizer.get_vocab()


@pytest.mark.parametrize("loss", [GSPO(), CISPO(), VESPO(), Reinforce()])
@pytest.mark.repeated(first_only=True)
def test_losses_of_the_library(tmp_path, loss):
    run = run_of(tmp_path, Trajectory(), NoCorrection(), None, loss=loss, settings=TWO_PARTS)
    _, gradients = learner(run, likelihood=Trajectory(), loss=loss)
    assert all(difference(*pair) < 1e-6 for pair in zip(gradients, run.gradients, strict=True))


@pytest.mark.slow
def test_diffusion_gemma_by_default(tmp_path):
    """Its noise is random tokens: sampler and likelihood are those of `grpo`."""
    model = tiny_diffusion_gemma(characters="12345678=", canvas_length=4, hidden_size=32)
    settings = {"num_iterations": 1, "max_steps": 1}
    run = run_of(tmp_path, None, None, None, model=model, sampler=None, settings=settings)
    assert isinstance(run._recipe.sampler, Renoise) and run.state.log_history[0]["rollout_corr/ess"] == 1
    _, gradients = learner(run)
    assert max(x.abs().max() for x in gradients[0].values()) > 1e-3
    assert difference(run.gradients[0], gradients[0]) < 1e-5


def test_an_evaluation_samples_from_a_copy_of_the_weights_that_are_there(tmp_path):
    """The trainer may load the best weights at the end, at the same step."""
    run = trainer(tmp_path, settings=FEW_ROWS, rollout_quantization=Int8WeightOnly(), eval_rows=ROWS[:2])
    run.train()
    with torch.no_grad():
        for weight in run._policy.module.parameters():
            weight.mul_(0.5)
    run.evaluate()
    tokens = torch.tensor([[3, 4, 5]])
    there, fresh = (
        policy.logits(tokens, torch.ones_like(tokens, dtype=torch.bool))
        for policy in (run._context.rollout_policy, quantized_copy(run._policy, Int8WeightOnly()))
    )
    assert torch.equal(there, fresh)


def test_several_updates_take_parts_of_a_generation_batch(tmp_path):
    """At equal weights, the mean of the gradients of the two halves is the gradient of all rows."""
    settings = {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "learning_rate": 0.0, "num_iterations": 1}
    settings |= {"per_device_train_batch_size": 4, "loss_type": "grpo"}
    run = run_of(tmp_path, Trajectory(), NoCorrection(), None, settings=settings)
    _, gradients = learner(run, likelihood=Trajectory(), loss_reduction=SequenceMean())
    halves = {name: (x + run.gradients[1][name]) / 2 for name, x in run.gradients[0].items()}
    assert difference(halves, gradients[0]) < 1e-6
    assert difference(run.gradients[0], gradients[0]) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", [Trajectory(), Trajectory(num_segments=2)])
def test_a_view_runs_equal_rows_of_a_group_once(tmp_path, likelihood):
    """A rollout's first step reads the same masks in every row of a group, and TRL shuffles the rows."""
    counts = [0]

    def count(module, inputs, given):
        counts[-1] += len(given["input_ids"]) * torch.is_grad_enabled()

    model = tiny()
    model.module.base_model.register_forward_pre_hook(count, with_kwargs=True)
    settings = {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 1}
    run = run_of(tmp_path, likelihood, NoCorrection(), None, model=model, settings=settings)
    counts.append(0)
    learner(run, likelihood=likelihood, max_retained_graphs=0)
    num_views = len(run.first[0][0].views.masked)
    assert counts[0] == counts[1] < 2 * num_views * len(run.first[1])


@pytest.mark.slow
@pytest.mark.parametrize(("likelihood", "lora"), [(ELBO, False), (Coupled, True)])
def test_memory_does_not_grow_with_the_number_of_views(tmp_path, likelihood, lora):
    """The peak of a whole run's tensors, against that of the same run with a graph through all views."""

    def peak(num_samples, loss=None):
        settings = {"per_device_train_batch_size": 64, "gradient_accumulation_steps": 1, "max_steps": 1}
        run = trainer(
            tmp_path, settings=settings, rows=ROWS * 2, likelihood=likelihood(num_samples=num_samples), lora=lora
        )
        if loss is not None:
            run._compute_loss = partial(loss, run)
        with LiveBytes() as memory:
            run.train()
        return memory.peak

    def through_all_views(run, model, inputs):
        (batch, *_), _ = inputs["dllm_rl"][0]
        run._has_loss = True
        return run._recipe.likelihood.view_logprobs(run._policy, batch.rollout, batch.views, retain_graphs=True).sum()

    one, several, through_all = peak(1), peak(8), peak(8, through_all_views)
    assert several < 1.5 * one  # a view has its own rows and positions
    assert through_all > 3 * several


def weights_of(run):
    return {name: x.detach().clone() for name, x in run._policy.module.named_parameters() if x.requires_grad}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("num_iterations", "steps_per_generation"), [(1, 2), nightly(2, 2), nightly(1, 4), (2, 4)])
def test_a_resume_ends_with_the_same_bits(tmp_path, lora, num_iterations, steps_per_generation):
    """With quantized rollouts, a corrector and evaluations between, in one epoch: TRL's sampler draws the prompts of a
    later epoch from where it stands. Two steps of accumulation are an update: a rollout serves 1, 2, 2 and 4 of them.
    """
    given = {
        "lora": lora,
        "rollout_quantization": Int8WeightOnly(),
        "corrector": TIS(),
        "likelihood": ELBO(num_samples=2),
    }
    settings = {
        "num_iterations": num_iterations,
        "steps_per_generation": steps_per_generation,
        "max_steps": 8,
        "lr_scheduler_type": "linear",
        "save_strategy": "steps",
    }
    settings |= {"save_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "gradient_accumulation_steps": 2}
    whole = trainer(tmp_path / "a", settings=settings, rows=ROWS * 4, eval_rows=ROWS[:4], **given)
    whole.train()
    resumed = trainer(tmp_path / "b", settings=settings, rows=ROWS * 4, eval_rows=ROWS[:4], **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-4"))
    expected, weights = weights_of(whole), weights_of(resumed)
    assert expected.keys() == weights.keys() and all(torch.equal(expected[name], x) for name, x in weights.items())
    logs = [[log["eval_reward"] for log in run.state.log_history if "eval_reward" in log] for run in (whole, resumed)]
    assert logs[0] == logs[1] and len(logs[0]) == 4


RANK = """
import sys, torch
from dllm_rl import Coupled, Int8WeightOnly, TIS
from trl_runs import Watched, trainer
run = trainer(sys.argv[1], kind=Watched, lora=sys.argv[2] == "True", likelihood=Coupled(), corrector=TIS(cap=1.01),
              rollout_quantization=Int8WeightOnly(), settings={"num_iterations": 2, "gradient_accumulation_steps": 2,
              "adam_epsilon": 1e-3, "per_device_train_batch_size": 16 // int(sys.argv[3]),
              "num_generations": int(sys.argv[4])})
run.train()
torch.save((run.gradients, [log["loss"] for log in run.state.log_history if "loss" in log],
            run.state.log_history[0]["trained/rollout_is_max"]),
           f"{sys.argv[1]}/{sys.argv[3]}-{run.accelerator.process_index}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("lora", "generations"), [(False, 8), (True, 32)])
def test_two_processes_equal_one(tmp_path, lora, generations):
    """With 32 completions a prompt, the two processes share its group. With its small eps Adam would turn rounding into
    steps."""
    for processes in (1, 2):
        run_ranks(RANK, processes, tmp_path, lora, processes, generations)
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for alone, left, right in zip(one[0], first[0], second[0], strict=True):
        assert difference(left, right) == 0
        assert difference(alone, left) < 1e-6
        assert max(x.abs().max() for x in alone.values()) > 1e-3
    assert first[1] == second[1] or second[1] == []
    assert one[1] == pytest.approx(first[1], abs=2e-6) and one[2] == pytest.approx(first[2], rel=1e-5) != 1


MODELS = ["llada", "dream", "sdar", "llada2", "bert", "nemotron"]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.repeated(first_only=True)
def test_what_is_saved_is_reopened(tmp_path, family):
    """A run's checkpoint, in the stock class's layout, and `save_model`, in the published one."""
    source = checkpoint(tmp_path / "source", family)
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 1}
    rows = [{"prompt": text} for text in ("ab", "cde", "fgh", "ij")]
    run = trainer(tmp_path / "out", model=str(source), rows=rows, settings=settings)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    tokens = torch.randint(3, 38, (2, 13), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    policy = run._policy
    policy.module.eval()
    expected = policy.logits(tokens, mask)
    assert not torch.equal(expected, load_policy(source).logits(tokens, mask))
    for folder in (tmp_path / "out/checkpoint-1", tmp_path / "saved"):
        reopened = load_policy(folder)
        assert torch.equal(reopened.logits(tokens, mask), expected)
        assert (reopened.spec.attention, reopened.spec.shift, reopened.spec.block_size) == (
            policy.spec.attention,
            policy.spec.shift,
            policy.spec.block_size,
        )
    config = [json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "saved")]
    assert config[0]["architectures"] == config[1]["architectures"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llada", "dream", "sdar", "bert"])
def test_saved_adapters_are_reopened_on_their_base(tmp_path, family):
    source = checkpoint(tmp_path / "source", family)
    names = ["query", "value"] if family == "bert" else ["q_proj", "v_proj"]
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 1}
    rows = [{"prompt": text} for text in ("ab", "cde", "fgh", "ij")]
    lora = LoraConfig(r=4, target_modules=names, init_lora_weights="gaussian")
    run = trainer(tmp_path / "out", model=str(source), rows=rows, settings=settings, peft_config=lora)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    tokens = torch.randint(3, 38, (2, 13), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    run._policy.module.eval()
    expected = run._policy.logits(tokens, mask)
    for folder in (tmp_path / "out/checkpoint-1", tmp_path / "saved"):
        torch.testing.assert_close(load_policy(folder).logits(tokens, mask), expected, atol=1e-5, rtol=1e-4)
        base = load_policy(source)
        PeftModel.from_pretrained(base.module, folder)  # it changes the module
        torch.testing.assert_close(base.logits(tokens, mask), expected, atol=1e-5, rtol=1e-4)


def test_the_defaults_that_grpo_accepts_are_trls():
    fields = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    parameters = inspect.signature(GRPOTrainer.__init__).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()} | fields
    accepted = unused_defaults({})
    assert {name: defaults[name] for name in accepted} == accepted


def test_what_has_no_meaning_is_refused_by_name_and_all_at_once(tmp_path):
    settings = {"loss_type": "ppo", "entropy_coef": 0.1, "top_entropy_quantile": 0.5, "min_p": 0.1, "fp16": True}
    settings |= {"torch_compile": True, "neftune_noise_alpha": 5.0, "bf16_full_eval": True}
    if "trust_remote_code" in {field.name for field in dataclasses.fields(GRPOConfig)}:
        settings |= {"trust_remote_code": True}
    with pytest.raises(ValueError, match="has no use for") as refused:
        trainer(tmp_path, settings=settings, tools=[print], rollout_func=print)
    for part in [*(f"{name}={value!r}" for name, value in settings.items()), "tools", "rollout_func"]:
        assert part in str(refused.value)


@pytest.mark.repeated(every=4)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "peft_config: use_dora=True is not supported"),
        ({"rank_pattern": {"query": 2}}, "peft_config: rank_pattern=.* is not supported"),
        ({"alpha_pattern": {"query": 2}}, "peft_config: alpha_pattern=.* is not supported"),
        ({"modules_to_save": ["embeddings"]}, "peft_config: modules_to_save=.* is not supported"),
        ({"bias": "lora_only"}, "peft_config: bias='lora_only' is not supported"),
        ({"lora_bias": True}, "peft_config: lora_bias=True is not supported"),
        ({"trainable_token_indices": [1]}, "peft_config: trainable_token_indices=.* is not supported"),
        ({"init_lora_weights": "pissa"}, "peft_config: init_lora_weights='pissa' also changed the base"),
        ({"lora_dropout": 0.1}, "peft_config: lora_dropout=0.1: forwards have no dropout; set it to 0"),
    ],
)
@pytest.mark.parametrize("is_given", [False, True])
def test_adapters_that_load_policy_would_refuse_are_refused_before_training(tmp_path, changes, message, is_given):
    """As the config of adapters to come, and in a PeftModel."""
    config, policy = LoraConfig(**LORA | changes), tiny()
    given = {"peft_config": config}
    if is_given:
        if "trainable_token_indices" in changes:
            pytest.skip("peft finds no embeddings of this name")
        given = {"model": get_peft_model(policy.module, config), "processing_class": policy.tokenizer}
        message = message.replace("peft_config", "model")
    refuses(message, lambda: trainer(tmp_path, **given))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.merge_adapter(), r"adapters are merged into its weights: call model.unmerge_adapter\(\)"),
        (lambda model: model.disable_adapter_layers(), "adapters are switched off: call model.enable_adapter_layers"),
        (lambda model: model.requires_grad_(False), r"adapters are frozen: load them by .*is_trainable=True"),
        (
            lambda model: (model.add_adapter("b", LoraConfig(**LORA)), model.base_model.set_adapter(["default", "b"])),
            r"the active adapters \['default', 'b'\], and one is trained: call model.set_adapter\(NAME\)",
        ),
    ],
)
def test_adapters_that_would_not_be_trained_are_refused(tmp_path, change, message):
    policy = tiny()
    model = get_peft_model(policy.module, LoraConfig(**LORA))
    change(model)
    refuses(message, lambda: trainer(tmp_path, model=model, processing_class=policy.tokenizer))


def test_another_method_of_peft_is_refused(tmp_path):
    with pytest.raises(ValueError, match="peft_config: peft_type='IA3' is not supported; only LoRA is"):
        trainer(tmp_path, peft_config=IA3Config(target_modules=["query"], feedforward_modules=[]))


class Score:
    def __call__(self, completions, **_):
        return [0.0] * len(completions)


def measured(completions):
    return [0.0] * len(completions)


@pytest.mark.parametrize("given", [Oracle(measured), [Score(), Oracle(measured)]])
def test_an_oracle_is_refused(tmp_path, given):
    with pytest.raises(ValueError, match=r"reward_funcs\[[01]\] is an Oracle, .* use grpo, or give the function"):
        ours.DiffusionGRPOTrainer(tiny(), given, config(tmp_path), train_dataset=Dataset.from_list(ROWS))


@pytest.mark.parametrize("lora", [False, True])
def test_transformers_own_checkpointing_stays_off_and_warns_of_nothing(tmp_path, recwarn, lora):
    """TRL turns it on by default; it has no effect in eval mode, and each rollout would warn of its old names."""
    run = trainer(tmp_path, settings={"gradient_checkpointing": True} | FEW_ROWS, lora=lora)
    run.train()
    assert run._policy.gradient_checkpointing and run.args.gradient_checkpointing
    assert not any(getattr(part, "gradient_checkpointing", False) for part in run.model.modules())
    assert not [str(each.message) for each in recwarn if "gradient_checkpointing_" in str(each.message)]


def test_a_user_is_not_warned_of_an_argument_that_he_did_not_give(tmp_path, recwarn, monkeypatch):
    monkeypatch.delenv("TRL_EXPERIMENTAL_SILENCE", raising=False)
    trainer(tmp_path)
    assert not [str(warning.message) for warning in recwarn if "rollout_func" in str(warning.message)]
    before = list(warnings.filters)
    trainer(tmp_path)
    assert warnings.filters == before, "the user's own filters are as before"


@pytest.mark.parametrize("callback", [StopBelow(), StopBelow, TrainerState(), object()])
def test_what_is_no_callback_of_transformers_is_refused(tmp_path, callback):
    kind = getattr(callback, "__name__", type(callback).__name__)
    with pytest.raises(ValueError, match=rf"callbacks\[1\] is of type {kind}; give an object of transformers"):
        trainer(tmp_path, callbacks=[PrinterCallback, callback])


def test_the_warnings_of_grpo_are_given(tmp_path):
    """With the learning rate of GRPOConfig, and peft's adapters as adapters."""
    with pytest.warns(UserWarning, match=r"likelihood=.*estimates the ratios: with two segments no gain"):
        trainer(tmp_path, likelihood=OneStep(), corrector=TIS(), rollout_quantization=Int8WeightOnly())
    coarse = tiny()
    coarse.module.bfloat16()
    rate = {"learning_rate": 1e-6}
    with pytest.warns(UserWarning, match=r"a policy in bf16 without lora and learning_rate=1e-06"):
        trainer(tmp_path, model=coarse, settings=rate)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        trainer(tmp_path, model=coarse, settings=rate, lora=True)
        trainer(tmp_path)
    assert not [each for each in given if "without lora" in str(each.message)]


def test_an_engine_of_the_launch_is_refused(tmp_path, monkeypatch):
    """FSDP; of DeepSpeed, which is not installed here, transformers says so first."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    refuses("no use for distributed_type=FSDP in the launch's config", lambda: trainer(tmp_path))


class Own(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


def own_policy():
    policy = tiny()
    policy.module = Own(policy.module)
    return policy


def whitened(log_ratio, advantages, mask, sum_over_processes):
    return log_ratio * sum_over_processes(advantages.sum())


def adapted():
    policy = tiny()
    add_lora(policy, Lora(r=2))
    return policy


def resized():
    policy = tiny()
    with torch.random.fork_rng(devices=[]):
        policy.module.resize_token_embeddings(policy.vocab_size + 2, mean_resizing=False)
    return policy


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"sampler.max_new_tokens=3 is not GRPOConfig's \(4\)", {"sampler": Unmask(max_new_tokens=3)}),
        (r"sampler.top_k=2 is not GRPOConfig's \(None\)", {"sampler": Unmask(max_new_tokens=4, top_k=2)}),
        (r"sampler.temperature=0.5 is not", {"sampler": Unmask(max_new_tokens=4, temperature=0.5)}),
        (
            r"corrector=QaRL.*does not work by micro-batches of TRL; use grpo",
            {"corrector": QaRL(), "rollout_quantization": Int8WeightOnly()},
        ),
        (r"loss=.*does not work by micro-batches", {"loss": whitened}),
        (r"two objectives", {"corrector": TBPO(), "loss": GSPO()}),
        (r"two objectives", {"corrector": TBPO(), "settings": {"off_policy_mask_threshold": 0.1}}),
        (r"corrector='TSI'.*TIS", {"corrector": "TSI"}),
        (
            r"loss=PPOClip.* replaces the objective that GRPOConfig's epsilon=0.1, loss_type='cispo' would choose",
            {"loss": PPOClip(), "settings": {"epsilon": 0.1, "loss_type": "cispo"}},
        ),
        (
            r"corrector=TBPO.* replaces the objective that GRPOConfig's delta=2.0 would choose",
            {"corrector": TBPO(), "settings": {"delta": 2.0}},
        ),
        (
            r"importance_sampling_level='sequence' with loss_type='sapo' is not supported",
            {"settings": {"loss_type": "sapo", "importance_sampling_level": "sequence"}},
        ),
        (
            r"sync_ref_model=True needs a copy of the weights as the reference: beta > 0",
            {"settings": {"sync_ref_model": True}},
        ),
        (r"sync_ref_model=True needs a copy", {"settings": {"sync_ref_model": True, "beta": 0.1}, "lora": True}),
        (r"train_dataset has no column 'prompt', only \['question'\]", {"rows": [{"question": "1"}] * 8}),
        (r"eval_dataset has no column 'prompt', only \['q', 's'\]", {"eval_rows": [{"q": "1", "s": 1}] * 8}),
        (
            r"processing_class=None: a loaded RobertaPreLayerNormForMaskedLM needs its tokenizer",
            {"model": get_peft_model(tiny().module, LoraConfig(**LORA))},
        ),
        (r"model_init_kwargs=.*bfloat16.* leave it out", {"settings": {"model_init_kwargs": {"dtype": "bfloat16"}}}),
        (r"causal", {"model": tiny_llama(characters="12345678=", causal=True)}),
        (
            r"model's module, Own, is not one of transformers' models, which TRL needs; use grpo",
            {"model": own_policy()},
        ),
        (r"likelihood='Causal' is for causal", {"likelihood": Causal()}),
        (r"model has adapters of rank 2 already; merge them first, .* and give peft_config to", {"model": adapted()}),
        (r"model has \d+ tokens since its embeddings were resized, .*: give make_policy", {"model": resized()}),
    ],
)
def test_what_cannot_be_combined_is_refused(tmp_path, message, arguments):
    refuses(message, lambda: trainer(tmp_path, **arguments))


@pytest.mark.parametrize("version", ["1.7.1", "1.14.2", "1.17.0", "2.0.0", "0.29.0"])
def test_a_trl_that_was_not_tried_is_refused(tmp_path, monkeypatch, version):
    monkeypatch.setattr(ours.trl, "__version__", version)
    refuses(rf"TRL {version} was not tried; install TRL 1.15 to 1.16", lambda: trainer(tmp_path), RuntimeError)


@pytest.mark.parametrize("name", ours.OVERRIDDEN)
def test_a_trl_with_other_methods_is_refused(tmp_path, monkeypatch, name):
    def other(self, batch):
        raise AssertionError

    monkeypatch.setattr(ours.GRPOTrainer, name, other)
    refuses(rf"GRPOTrainer.{name}\('self', 'batch'\) should be {name}", lambda: trainer(tmp_path), RuntimeError)


def test_a_trl_without_a_method_is_refused(tmp_path, monkeypatch):
    monkeypatch.delattr(ours.GRPOTrainer, "_compute_loss")
    with pytest.raises(
        RuntimeError, match=r"GRPOTrainer._compute_loss\(\) should be _compute_loss\('self', 'model', 'inputs'"
    ):
        trainer(tmp_path)


def test_a_trl_that_computes_its_loss_elsewhere_is_stopped(tmp_path, monkeypatch):
    run = trainer(tmp_path, settings=FEW_ROWS)
    monkeypatch.setattr(
        ours.GRPOTrainer, "compute_loss", lambda self, model, inputs, **_: torch.zeros(()).requires_grad_()
    )
    refuses("did not call _compute_loss", run.train, RuntimeError)


ROOT = Path(__file__).parents[2]
OLDEST, NEWEST = ours.VERSIONS


def test_the_extra_takes_the_versions_that_were_tried():
    wanted = f'trl = ["trl>={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}", '
    assert wanted in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    "version",
    [pytest.param(f"=={OLDEST[0]}.{OLDEST[1]}.*", marks=pytest.mark.slow), pytest.param("", marks=pytest.mark.nightly)],
)
def test_the_oldest_and_the_newest_trl_pass_the_tests_of_this_file(tmp_path, version):
    """TRL comes from the package index, without which this fails. CI's default part has the newest of the range."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), f"trl{version}"]
    install = subprocess.run(command, capture_output=True, text=True)
    assert install.returncode == 0, f"pip did not get trl{version}: {install.stderr}"
    program = "import sys, pytest, trl; assert sys.argv[1] in trl.__file__; sys.exit(pytest.main(sys.argv[2:]))"
    arguments = [str(tmp_path), "-n", "0", "-p", "no:cacheprovider", "-m", "not slow and not nightly", __file__]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


PAGE = ROOT / "docs" / "trl.md"
STOCK_SCRIPT = """
from trl import GRPOTrainer
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig

seen = []


def length(completions, completion_ids, trainer_state, **columns):
    assert trainer_state.max_steps == 4
    return [len(ids) / 10 for ids in completion_ids]


async def digits(completions, **columns):
    return [sum(map(str.isdigit, text)) for text in completions]


class Watch(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        seen.append(logs)


args = GRPOConfig(
    output_dir="sums",
    max_completion_length=8,
    num_generations=4,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=2,
    max_steps=4,
    learning_rate=1e-3,
    eval_strategy="steps",
    eval_steps=2,
    save_steps=2,
    log_completions=True,
    load_best_model_at_end=True,
    metric_for_best_model="eval_reward",
    report_to="wandb",
)
trainer = GRPOTrainer(
    "SDAR",
    [length, digits],
    args,
    train_dataset=train_dataset,
    eval_dataset=eval_dataset,
    callbacks=[Watch()],
    peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"]),
)
trainer.train()
trainer.save_model("sums/best")
"""


@pytest.mark.slow
def test_the_two_lines_of_the_page_change_a_script_of_trls(tmp_path, monkeypatch):
    """TRL's own features: two rewards, one of them async, a callback, a tracker, evaluations, the best model, LoRA."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    diff = re.search(r"```diff\n(.*?)```", PAGE.read_text(), re.DOTALL)[1].splitlines()
    source = STOCK_SCRIPT
    for before, after in zip(diff[::2], diff[1::2], strict=True):
        assert (before[:2], after[:2]) == ("- ", "+ ") and source.count(f"\n{before[2:]}\n") == 1
        source = source.replace(before[2:], after[2:])
    checkpoint(tmp_path / "SDAR", "sdar")
    rows = [{"prompt": text} for text in ("ab", "c1e", "fgh", "9j", "k", "lmn", "3p", "q")]
    script = {"train_dataset": Dataset.from_list(rows), "eval_dataset": Dataset.from_list(rows[:4])}
    tracker = "wandb" if importlib.util.find_spec("wandb") else "tensorboard"
    source = source.replace('report_to="wandb"', f'report_to="{tracker}", use_cpu=True, bf16=False')
    exec(compile(source, "script.py", "exec"), script)
    run = script["trainer"]
    assert script["seen"] and run.state.best_model_checkpoint is not None
    history = run.state.log_history
    assert any("eval_rewards/digits/mean" in log and "eval_rewards/length/mean" in log for log in history)
    assert any("eval_reward" in log for log in history)
    assert any("eval_rollout_corr/ess" in log for log in history) and list((tmp_path / "sums/completions").iterdir())
    assert not [name for log in history for name in log if name.startswith(("time/", "memory/"))]
    assert not list(tmp_path.rglob("metrics.jsonl"))
    load_policy(tmp_path / "sums" / "best")


class Kept(ours.DiffusionGRPOTrainer):
    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        runs.append(self)


runs = []


@pytest.mark.slow
def test_the_block_of_the_page_plans_the_batch_that_it_trains(tmp_path, monkeypatch, capsys):
    """On a small LLaDA. tests/test_docs.py has the plan's numbers for the large one."""
    monkeypatch.chdir(tmp_path)
    runs.clear()
    block = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    for old, new in (
        ("from dllm_rl.integrations.trl import DiffusionGRPOTrainer\n", ""),  # `Kept` below has its place
        ("=256", "=8"),
        ("diffusion_steps=128", "diffusion_steps=4"),
        ("block_size=32", "block_size=4"),
        ("max_steps=1000", "max_steps=1"),
        ("dry_run=True", "dry_run=True, max_prompt_length=8"),
        ('{"dtype": "bfloat16"}, ', '{"dtype": "bfloat16"}, use_cpu=True, bf16=False, report_to="none", '),
    ):
        assert old in block
        block = block.replace(old, new)
    names = {"LoraConfig": LoraConfig, "GRPOConfig": GRPOConfig, "DiffusionGRPOTrainer": Kept, "grpo": grpo}
    names |= {"Unmask": Unmask, "model": str(checkpoint(tmp_path / "llada", "llada")), "reward": reward}
    names["rows"] = Dataset.from_list([{"prompt": text} for text in "abcdefghijklmnop"])
    exec(compile(block, "block.py", "exec"), names)
    assert "64 rows x " in (printed := capsys.readouterr().out) and "8 prompts x 8 completions" in printed
    (run,) = runs
    rollout, _, completions = run._generated
    assert len(rollout.tokens) == 64 and completions == 8 and run.state.global_step == 1
    adapters = {name: x for name, x in weights_of(run).items() if "lora_B" in name}
    assert adapters and all(x.abs().max() > 0 for x in adapters.values())


def test_the_table_of_the_page_names_what_is_refused_and_nothing_else():
    """The settings of its first column, and each of those that the code refuses."""
    table = PAGE.read_text().partition("| Refused |")[2].partition("\n\n")[0]
    told = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert told == {*trl_settings.UNUSED_FIELDS, *trl_settings.UNUSED_ARGUMENTS}


def test_an_evaluations_loss_is_the_sum_of_the_processes_shares(monkeypatch):
    """TRL takes the mean over processes, and the shares add up to the loss."""
    recipe = SimpleNamespace(policy_loss=lambda logps, batch: (torch.tensor(0.25), {}, None))
    batch = SimpleNamespace(old_logprobs=None)
    monkeypatch.setattr(ours, "rows_of", lambda *_: batch)
    for processes in (1, 2):
        run = SimpleNamespace(
            accelerator=SimpleNamespace(device=torch.device("cpu"), num_processes=processes),
            model=SimpleNamespace(training=False), args=SimpleNamespace(steps_per_generation=1), _recipe=recipe,
        )  # fmt: skip
        run.loss_type, run._router_loss = "dapo", lambda *_: 0.0
        share = ours.DiffusionGRPOTrainer._compute_loss(run, None, {"dllm_rl": [([batch], 0)]})
        assert share.item() == 0.25 * processes


def test_a_completion_without_a_reward_is_in_no_mean_of_the_loss(tmp_path, monkeypatch):
    """As in the library's step."""

    def judge(completions, **_):
        return [None if text[:1] in "1234" else float(len(set(text))) for text in completions]

    monkeypatch.setattr("trl_runs.reward", judge)
    run = trainer(tmp_path, settings=TWO_PARTS | {"beta": 0.1, "max_steps": 1})
    seen, rewards = [], []
    made, graded = run._generate_and_score_completions, run._calculate_rewards

    def watched(inputs):
        output = made(inputs)
        seen.append(output["dllm_rl"][0][0][0])
        return output

    def counted(*arguments):
        rewards.append(graded(*arguments))
        return rewards[-1]

    run._generate_and_score_completions, run._calculate_rewards = watched, counted
    run.train()
    lacking = [each.isnan().all(1).cpu() for each in rewards]
    assert any(each.any() for each in lacking)
    for batch, lacks in zip(seen, lacking, strict=True):
        assert batch.num_sequences == int((~lacks).sum()) and not batch.loss_mask[lacks].any()


def of_residues(tmp_path, **special):
    """A small BERT whose tokens are residues, which its tokenizer writes with spaces between them."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"ACDEFGHIKLMNPQRSTVWY"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"), do_lower_case=False, **special)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make_policy(BertForMaskedLM(BertConfig(vocab_size=len(words), **sizes)), tokenizer)


@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.repeated(first_only=True)
def test_residues_are_graded_and_logged_without_spaces(tmp_path, monkeypatch, is_chat):
    """As `grpo` gives them; words keep their spaces."""
    policy = of_residues(tmp_path, eos_token="[SEP]")
    policy.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    graded = []

    def score(completions, **_):
        graded.extend(completions)
        return [float(len(str(text))) for text in completions]

    monkeypatch.setattr("trl_runs.reward", score)
    rows = [{"prompt": [{"role": "user", "content": "MKV"}] if is_chat else "MKV"}] * 8
    run = trainer(tmp_path, model=policy, rows=rows, settings=FEW_ROWS)
    run.train()
    texts = [each[0]["content"] for each in graded] if is_chat else graded
    assert max(map(len, texts)) > 2 and all(set(text) <= {*"ACDEFGHIKLMNPQRSTVWY"} for text in texts)
    assert [*run._logs["completion"]] == graded[-len(run._logs["completion"]) :]


@pytest.mark.slow
def test_a_tokenizer_of_words_keeps_its_spaces(tmp_path, monkeypatch):
    graded = []
    monkeypatch.setattr("trl_runs.reward", lambda completions, **_: graded.extend(completions) or [0.0] * 32)
    trainer(tmp_path, model=tiny(characters="1 "), rows=[{"prompt": "1"}] * 8, settings={"max_steps": 1}).train()
    assert any(" " in text for text in graded)


@pytest.mark.slow
@pytest.mark.parametrize("special", [{}, {"eos_token": "[SEP]"}])
def test_completions_may_end_without_an_eos_token_of_the_tokenizer(tmp_path, monkeypatch, special):
    """BERT's text ends with [SEP], which its tokenizer does not call eos."""
    policy = of_residues(tmp_path, **special)
    assert policy.tokenizer.eos_token_id == (3 if special else None) and policy.spec.eos_ids == (3,)
    ends = []

    def score(completions, completion_ids, **_):
        ends.extend(ids[-1] == 3 and len(ids) < 4 for ids in completion_ids)
        return [float(len(text)) for text in completions]

    monkeypatch.setattr("trl_runs.reward", score)
    run = trainer(tmp_path, model=policy, rows=[{"prompt": "MKV"}] * 8, settings={"max_steps": 2})
    run.train()
    assert any(ends) and not all(ends)
    shares = [log["completions/clipped_ratio"] for log in run.state.log_history if "completions/clipped_ratio" in log]
    assert all(share < 1 for share in shares)


@pytest.mark.parametrize("field", ["train_dataset", "eval_dataset", "one of several"])
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("1é", "row 8: text '1é' cannot be tokenized by this model"),
        ("1" * 61, "row 8: the prompt has 61 tokens and its completion 4, more than the model's 64 positions"),
    ],
)
def test_a_prompt_that_cannot_be_completed_is_named_before_training(tmp_path, field, prompt, message):
    """As by `grpo`: such a row could be drawn after hours."""
    good = [{"prompt": "1" * 60}] * 8
    bad = Dataset.from_list([*good, {"prompt": prompt}])
    given = {"train_dataset": Dataset.from_list(good), "eval_dataset": Dataset.from_list(good)}
    given |= {"eval_dataset": {"a": Dataset.from_list(good), "b": bad}} if field == "one of several" else {field: bad}
    with pytest.raises(ValueError, match=f"^{'eval_dataset' if 'one' in field else field}: {message}"):
        ours.DiffusionGRPOTrainer(tiny(), reward, config(tmp_path), **given)


def test_the_remedy_for_a_long_completion_is_the_field_of_grpo_config(tmp_path):
    short = Dataset.from_list([{"prompt": "1"}] * 8)
    with pytest.raises(
        ValueError, match=r"its completion 64, more than .* 64 positions; lower max_completion_length=64, or"
    ):
        ours.DiffusionGRPOTrainer(tiny(), reward, config(tmp_path, max_completion_length=64), train_dataset=short)


def test_a_streamed_data_set_is_read_as_it_is_trained_on(tmp_path):
    def rows():
        yield {"prompt": "1"}
        raise AssertionError("read before training")

    given = {"train_dataset": IterableDataset.from_generator(rows), "eval_dataset": Dataset.from_list(ROWS)}
    ours.DiffusionGRPOTrainer(tiny(), reward, config(tmp_path), **given)


OF_TRL = """
import pytest
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

from .testing_utils import TrlTestCase

MODEL = "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5"
REWARD = "trl-internal-testing/tiny-Qwen2ForSequenceClassification-2.5"


class TestGetHighEntropyMask:
    def test_of_a_mock(self):
        raise AssertionError("not run")


class TestTrainer(TrlTestCase):
    @pytest.mark.parametrize("layout", ["standard_prompt_only", "conversational_prompt_only"])
    def test_trains(self, layout):
        data = load_dataset("trl-internal-testing/zen", layout, split="train")
        sizes = dict(per_device_train_batch_size=4, num_generations=4, max_completion_length=4)
        args = GRPOConfig(output_dir=self.folder, report_to="none", max_steps=1, **sizes)
        trainer = GRPOTrainer(model=MODEL, reward_funcs=REWARD, args=args, train_dataset=data)
        trainer.train()
        assert trainer.state.global_step == 1

    def test_is_refused(self):
        data = load_dataset("trl-internal-testing/zen", split="train")
        GRPOTrainer(model=MODEL, reward_funcs=REWARD, train_dataset=data, tools=[print])

    def test_fails(self):
        raise ValueError("of the test itself")

    @pytest.mark.parametrize("level", ["token", "sequence"])
    def test_luspo_loss_ignores_padding(self, level):
        raise AssertionError("not run")

    def test_reads_other_rows(self):
        load_dataset("trl-internal-testing/zen-image", split="train")
"""
UTILITIES = """
import pytest


class TrlTestCase:
    @pytest.fixture(autouse=True)
    def in_folder(self, tmp_path):
        self.folder = str(tmp_path)
"""


@pytest.mark.nightly
def test_trls_own_tests_run_with_this_trainer_in_the_place_of_trls(tmp_path):
    (tmp_path / "tests").mkdir()
    for name, text in {"__init__": "", "testing_utils": UTILITIES, "test_grpo_trainer": OF_TRL}.items():
        (tmp_path / "tests" / f"{name}.py").write_text(text)
    path = tmp_path / "tests" / "test_grpo_trainer.py"
    command = [sys.executable, "-m", "benchmarks.trl_suite", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    told = done.stdout.splitlines()
    assert told[-1] == "2 passed, 1 refused, 1 failed, 1 skipped, 3 left out" and done.returncode == 1
    assert "\nrefused: test_is_refused: DiffusionGRPOTrainer has no use for tools" in done.stdout
    assert "failed: test_fails: ValueError: of the test itself" in told
    assert [line.rpartition(":")[0] for line in told[-3:-1]] == [
        "left out: 1 of TestGetHighEntropyMask",
        "left out: 2 of test_luspo_loss_ignores_padding",
    ]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_grpo_names_the_classes_that_the_trainer_takes_for_a_loss_type(tmp_path, loss_type):
    level = "sequence" if loss_type == "luspo" else "token"
    args = config(tmp_path, loss_type=loss_type, importance_sampling_level=level)
    recipe, remedy = trl_settings.make_recipe(tiny(), args), LOSS_TYPES[loss_type]
    loss, reduction = recipe.resolved_loss, type(recipe.resolved_loss_reduction).__name__
    if loss_type == "bnpo":  # whose mean is over a micro-batch, which only the trainer has
        assert remedy.startswith("loss_type='dapo'") and reduction == "TokenMean"
    else:
        assert remedy.startswith(f"loss={type(loss).__name__}(")
        default = type(recipe.replace(loss=loss, loss_reduction=None).resolved_loss_reduction).__name__
        assert f"loss_reduction={reduction}(" in remedy or ("loss_reduction" not in remedy and default == reduction)
    with pytest.raises(ValueError, match=re.escape(f"loss_type={loss_type!r} (give {remedy})")):
        grpo_recipe(tiny(), ROWS, reward, max_new_tokens=2, loss_type=loss_type)
