"""Does the model learn, sync and resume? One training step of adapters, and what follows an update."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from dllm_rl.checkpoints import checkpoint
from dllm_rl.checkpoints.state import TrainingState
from dllm_rl.distributed.collectives import make_accelerator
from dllm_rl.doctor.subject import QUESTIONS, Finding, Subject, timed
from dllm_rl.frontend.grpo import default_likelihood
from dllm_rl.models.base import Policy, trainable_parameters, with_new_layers
from dllm_rl.models.checkpoint.adapters import adapter_state, load_adapter
from dllm_rl.models.lora_settings import Lora
from dllm_rl.presets import find_preset, preset_by_size
from dllm_rl.quantization.rollout_policy import quantized_copy, sync_weights
from dllm_rl.quantization.schemes import Float8WeightOnly
from dllm_rl.recipe import Recipe
from dllm_rl.rng import row_seeds
from dllm_rl.step.update import train_step
from dllm_rl.tasks.datasets import task_from_dataset
from dllm_rl.testing.policy_contract import equals_fresh_copy
from dllm_rl.training.dry_run.duration import stage_seconds
from dllm_rl.training.dry_run.memory import PlannedStep, num_weights, step_memory
from dllm_rl.training.make_step import make_step
from dllm_rl.training.policies import make_optimizer
from dllm_rl.training.rehearsal import as_trained, made_up_samples
from dllm_rl.types.groups import starts_group

GB = 1e9
GENERATIONS = 6  # of the step's prompt, as in the presets
# Measured peaks above this many times the plan are worth a report: the plan counts no workspaces of kernels and no
# rounding of the allocator, which together were below a fifth where they were measured (benchmarks/README.md).
PLAN_FACTOR = 1.2
MADE_UP = 0.1  # value of the adapters' second matrices after a made-up update; they begin at 0


def step_section(subject: Subject) -> Finding:
    """Take one training step of adapters on made-up rewards, with the settings of `grpo` for a model of this size."""
    policy = subject.policy
    recipe = step_recipe(subject)
    prompts = subject.prompts.rows(torch.zeros(GENERATIONS, dtype=torch.long))
    seeds = row_seeds(subject.generator("step"), GENERATIONS)
    prompts = replace(prompts, seeds=seeds)
    with as_trained(policy, recipe.lora) as learner:
        accelerator = make_accelerator(device=policy.device)
        context = make_step(recipe, accelerator=accelerator, policy=learner, rollout_policy=learner)
        optimizer = make_optimizer(recipe, learner)
        is_cuda = policy.device.type == "cuda"
        if is_cuda:
            torch.cuda.reset_peak_memory_stats(policy.device)
        rollout, rollout_seconds = timed(policy, lambda: recipe.sampler(learner, prompts, subject.generator("step")))
        samples = made_up_samples(context, rollout)
        result, update_seconds = timed(policy, lambda: train_step(context, samples, 0, optimizer))
        planned = PlannedStep(recipe, learner, prompts.tokens.shape[1])
        memory, seconds = step_memory(planned).peak, stage_seconds(planned)
    peak = torch.cuda.max_memory_allocated(policy.device) if is_cuda else None
    norm = result.metrics["grad_norm"]
    numbers = {
        "grad_norm": norm,
        "rows": GENERATIONS,
        "row_tokens": planned.row_tokens,
        "rollout_seconds": rollout_seconds,
        "update_seconds": update_seconds,
        "planned_rollout_seconds": seconds["rollout"],
        "planned_update_seconds": seconds["scoring"] + seconds["update"],
        "peak_gb": None if peak is None else peak / GB,
        "planned_peak_gb": memory / GB,
    }
    assert recipe.lora is not None, "the step trains adapters"
    line = f"adapters of rank {recipe.lora.r}, {GENERATIONS} completions: gradient norm {norm:.3g}; "
    line += f"{rollout_seconds:.2g} s for the rollout, {update_seconds:.2g} s for scoring and update"
    if peak is not None:
        line += f" (plan for an H100: {seconds['rollout']:.2g} s and {numbers['planned_update_seconds']:.2g} s); "
        line += f"peak memory {peak / GB:.1f} GB (plan: {memory / GB:.1f} GB)"
    if not norm > 0:
        advice = "rewards that differ gave no gradient: do not train with this model; report it"
        return Finding("wrong", line, advice, "no gradient", numbers)
    if peak is not None and peak > PLAN_FACTOR * memory:
        advice = "a step takes more memory than the plan says: leave room when you read --dry_run, and report it"
        return Finding("look", line, advice, "memory", numbers)
    return Finding("ok", line, numbers=numbers)


def step_recipe(subject: Subject) -> Recipe:
    """Return the settings of the step: those of `grpo` for the model's size, with one prompt."""
    policy = subject.policy
    task = task_from_dataset([{"prompt": QUESTIONS[0]}], reward_funcs=_no_reward, name="doctor")
    sampler = subject.sampler
    fields: dict[str, Any] = {"num_generations": GENERATIONS, "micro_batch_size": GENERATIONS, "train_batch_size": 1}
    preset = preset_by_size(policy.spec.attention, num_weights(policy.module))
    settings = {} if preset is None else find_preset(preset, "doctor")[0]
    fields |= {name: settings[name] for name in ("learning_rate", "max_grad_norm") if name in settings}
    return Recipe(
        name="doctor",
        model=policy,
        task=task,
        validation_task=task,
        eval_task=task,
        sampler=sampler,
        eval_sampler=sampler.greedy(),
        likelihood=default_likelihood(policy.spec, policy.spec.block_size, sampler),
        lora=settings.get("lora", Lora()),
        **fields,
    )


def _no_reward(completions: list[str], **columns: Any) -> list[float]:
    return [0.0 for _ in completions]  # not called: the advantages are made up


@torch.no_grad()
def made_up_update(learner: Policy, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Change the adapters as an update does, so far that codes of quantized weights change."""
    for name, parameter in learner.module.named_parameters():
        if ".lora_B." in name:
            parameter.fill_(MADE_UP)
    if optimizer is not None:
        for parameter in trainable_parameters(learner.module):
            parameter.grad = torch.full_like(parameter, MADE_UP)
        optimizer.step()
    learner.weights_version += 1


def sync_section(subject: Subject) -> Finding:
    """Change the adapters, sync a quantized copy, and compare it with a new copy."""
    policy = subject.policy
    scheme = (subject.schemes or [None])[0] or Float8WeightOnly()
    prompts = subject.prompts.rows(starts_group(subject.prompts.group).nonzero()[:, 0])
    tokens, mask = prompts.tokens.to(policy.device), prompts.attention_mask.to(policy.device)
    with torch.no_grad(), as_trained(policy, step_recipe(subject).lora) as learner:
        copy, copy_seconds = timed(policy, lambda: quantized_copy(learner, scheme))
        before = copy.logits(tokens, mask)
        made_up_update(learner)
        metrics, seconds = timed(policy, lambda: sync_weights(learner, copy))
        is_changed = not torch.equal(copy.logits(tokens, mask), before)
        is_fresh = equals_fresh_copy(learner, copy, scheme, tokens, mask)
    name = type(scheme).__name__
    numbers = {"scheme": name, "seconds": seconds, "copy_seconds": copy_seconds, "equals_fresh_copy": is_fresh}
    numbers |= {"changes_logits": is_changed, "codes_changed": metrics.get("quantization/codes_changed")}
    line = f"{name}: {seconds:.2g} s per sync (a new copy: {copy_seconds:.2g} s); "
    if is_fresh and is_changed:
        return Finding("ok", f"{line}the same bits as a new copy", numbers=numbers)
    line += "the copy differs from a new one" if is_changed else "the update did not reach the copy"
    advice = "rollouts would be of old weights: do not train with quantized rollouts of this model; report it"
    return Finding("wrong", line, advice, "not synced", numbers)


def resume_section(subject: Subject) -> Finding:
    """Save adapters and optimizer after an update, load both, and compare every bit."""
    policy = subject.policy
    recipe = step_recipe(subject)
    prompts = subject.prompts.rows(torch.tensor([0]))
    row = prompts.tokens.to(policy.device), prompts.attention_mask.to(policy.device)
    with as_trained(policy, recipe.lora) as learner, TemporaryDirectory() as directory:
        optimizer = make_optimizer(recipe, learner)
        made_up_update(learner, optimizer)
        state = TrainingState.first({}, learner)
        content = checkpoint.Checkpoint(policy=learner, optimizer=optimizer, state=state, merged=False)
        folder, save_seconds = timed(policy, lambda: checkpoint.save(Path(directory), content, keep_last=1))
        checkpoint.check(folder)
        loaded = with_new_layers(policy)
        load_adapter(loaded, folder / "adapter")
        loaded.weights_version = learner.weights_version
        loaded_optimizer = make_optimizer(recipe, loaded)
        checkpoint.load_optimizer(folder, loaded, loaded_optimizer)
        differing = [
            what
            for what, (a, b) in {
                "adapters": (adapter_state(learner), adapter_state(loaded)),
                "optimizer": (moments(optimizer), moments(loaded_optimizer)),
                "logits": tuple({"": each.logits(*row).detach()} for each in (learner, loaded)),
            }.items()
            if a.keys() != b.keys() or not all(torch.equal(a[name], b[name]) for name in a)
        ]
    numbers = {"seconds": save_seconds, "differing": differing}
    line = f"adapters and optimizer saved in {save_seconds:.2g} s; "
    if not differing:
        return Finding("ok", f"{line}loaded again, weights, moments and logits have the same bits", numbers=numbers)
    advice = "a resumed run would not continue where it stopped: report it"
    return Finding("wrong", f"{line}loaded again, these differ: {', '.join(differing)}", advice, "resume", numbers)


def moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return every tensor of an optimizer's state, by the number of its weight and its name."""
    states = optimizer.state_dict()["state"]
    return {f"{number} {name}": x for number, state in states.items() for name, x in state.items()}
