"""Supervised fine-tuning: a model learns rows by the masked-diffusion loss or the causal loss."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from dllm_rl.checkpoints.run_folder import open_folder
from dllm_rl.checkpoints.state import TrainingState
from dllm_rl.distributed.collectives import from_main, reduce_metrics, sum_gradients
from dllm_rl.distributed.stop import as_written, how_to_continue, leaving_nothing_behind
from dllm_rl.models.base import Policy, trainable_parameters
from dllm_rl.models.lora import add_lora, load_adapter
from dllm_rl.rng import generator_for
from dllm_rl.supervised.examples import (
    Example,
    add_noise,
    check_packing,
    lay_out,
    pack,
    prompt_and_answer,
    read_examples,
    weighted_loss,
)
from dllm_rl.supervised.sft import SFT
from dllm_rl.tasks.datasets import in_memory, training_and_held_out
from dllm_rl.tasks.rows import load_rows
from dllm_rl.training.denoising import Noise, denoising_examples, denoising_loss
from dllm_rl.training.finish import write_summary
from dllm_rl.training.hooks import before_first_step, end_step, load_best
from dllm_rl.training.policies import build_policy, freeze, load_from_run_folder, make_optimizer
from dllm_rl.training.run import Run
from dllm_rl.training.saving import install_emergency_saves, make_writer, save, wait_for_checkpoint
from dllm_rl.training.start import launch, open_log, restore
from dllm_rl.training.summary import Summary
from dllm_rl.training.validation import check_evaluations, evaluation_interval
from dllm_rl.training.warmup import draw_levels

EVAL_VIEWS = 4  # masks per row in the held-out loss of a diffusion model


def sft(model: str | Policy | Callable[..., Policy], dataset: Any, **settings: Any) -> Summary:
    """Fine-tune a model on rows and return the run's summary, with the trained policy as its attribute `policy`.

    `settings` are fields of `SFT`. Set the learning rate: the default, 5e-4, suits small models.
    """
    name = Path(model).name.lower() if isinstance(model, str | Path) else "sft"
    return fine_tune(SFT(**{"name": name, "model": model, "dataset": dataset} | settings))


@leaving_nothing_behind
def fine_tune(recipe: SFT) -> Summary:
    """Run a recipe of SFT and return the run's summary. Raises ValueError, before any training, if it cannot run."""
    accelerator, stop, peers = launch(recipe)
    recipe = read_datasets(recipe)  # before the folder is created, so that a malformed file leaves no folder
    folder, saved_state, notes = from_main(partial(open_folder, recipe), accelerator)
    policy = _load_policy(recipe, accelerator, folder, saved_state)
    training = read_examples(recipe, policy, recipe.dataset, "dataset", say=notes.append)
    held_out = read_examples(recipe, policy, recipe.eval_dataset, "eval_dataset", say=notes.append)
    views_per_row = 1 if policy.spec.attention == "causal" else EVAL_VIEWS
    forwards_per_step = 3 * recipe.train_batch_size  # a backward counts as two forwards
    eval_interval = evaluation_interval(recipe, len(held_out) * views_per_row, forwards_per_step)
    check_evaluations(recipe, eval_interval)
    optimizer = make_optimizer(recipe, policy)
    log = open_log(recipe, accelerator, peers, saved_state, notes)
    state = (
        restore(recipe, folder, saved_state, policy, optimizer, log) if folder else TrainingState.first(recipe, policy)
    )
    run = Run(
        recipe=recipe,
        accelerator=accelerator,
        log=log,
        policy=policy,
        rollout_policy=policy,
        optimizer=optimizer,
        state=state,
        stop=stop,
        writer=make_writer(recipe, accelerator),
        progress=log.view("training", recipe.num_steps, curve="loss", completed=state.logged_steps),
        checkpoint=str(folder or ""),
    )
    if not folder:
        run.state = replace(run.state, eval_before=evaluate_loss(run, held_out))
        save(run)
    eval_before = run.state.eval_before
    log.say(f"before SFT: held-out loss {eval_before['loss']:.4f} nats on {len(held_out)} rows")
    install_emergency_saves(run, peers)
    before_first_step(run)

    def evaluate(step: int) -> dict[str, float]:
        is_due = eval_interval and (step + 1) % eval_interval == 0
        return {"eval/loss": evaluate_loss(run, held_out)["loss"]} if is_due else {}

    for step in range(run.state.logged_steps, recipe.num_steps):
        metrics = run.state.unlogged  # set if a resumed run's last step was updated, but not evaluated and logged
        if metrics is None:
            metrics = take_step(run, training, step)
        end_step(run, step, metrics, evaluate)
        if run.control.stop_reason is not None:
            break
    stop.leave_at_once(f"stopped after the last step, before the summary; {how_to_continue(recipe)}")
    wait_for_checkpoint(run)
    load_best(run, lambda folder, saved_state: _load_policy(recipe, accelerator, folder, saved_state))
    eval_after = evaluate_loss(run, held_out)
    return write_summary(
        run,
        {"eval_before": eval_before, "eval_after": eval_after, "eval_rows": len(held_out)},
        result=f"held-out loss {eval_before['loss']:.4f}  ->  {eval_after['loss']:.4f} nats on {len(held_out)} rows, "
        f"after {run.state.step} steps",
        advice=f"RL from it: {as_written(model=run.checkpoint, sft_warmup_steps=0)} of a recipe or of grpo",
    )


def read_datasets(recipe: SFT) -> SFT:
    """Return the recipe with its rows in memory. Without eval_dataset, the last rows are held out."""
    rows = _rows(recipe.dataset)
    if not len(rows):
        raise ValueError("dataset is empty: give at least two rows")
    eval_rows = None if recipe.eval_dataset is None else _rows(recipe.eval_dataset)
    training, held_out = training_and_held_out(rows, eval_rows, recipe.eval_split)
    return replace(recipe, dataset=training, eval_dataset=held_out)


def _rows(dataset: Any) -> Any:
    """Return the rows of a data set, or of the file at a path."""
    return list(dict(load_rows(dataset)).values()) if isinstance(dataset, str) else in_memory(dataset)


def _load_policy(
    recipe: SFT, accelerator: Accelerator, folder: Path | None, saved_state: TrainingState | None
) -> Policy:
    """Load the learner: from the checkpoint in `folder` if there is one, else from the recipe. Adapters are applied to
    the recipe's model.
    """
    if folder and saved_state and recipe.lora is None:
        policy = load_from_run_folder(recipe, folder, getattr(torch, saved_state.dtype), accelerator.device)
        freeze(recipe, policy, saved_state.frozen or [])
    else:
        policy = build_policy(recipe, accelerator.device)
        if folder:
            load_adapter(policy, folder / "adapter")
        elif recipe.lora is not None:
            add_lora(policy, recipe.lora)
    if recipe.packing:
        check_packing(policy)
    return policy


def rows_of_step(count: int, size: int, seed: int, step: int) -> list[int]:
    """Return the indices of a step's examples, over all processes. Each epoch shuffles all examples; steps take them in
    that order.
    """
    indices: list[int] = []
    for position in range(step * size, (step + 1) * size):
        epoch, index_in_epoch = divmod(position, count)
        if index_in_epoch == 0 or not indices:
            order = torch.randperm(count, generator=generator_for(seed, "sft order", epoch)).tolist()
        indices.append(order[index_in_epoch])
    return indices


def take_step(run: Run[SFT], examples: Sequence[Example], step: int) -> dict[str, float]:
    """Update the weights once and return the step's metrics. Raises FloatingPointError if the gradient is not finite;
    it is not applied then.
    """
    recipe = run.recipe
    policy = run.policy
    accelerator = run.accelerator
    with run.log.stage("gradients"):
        run.optimizer.zero_grad(set_to_none=True)
        batch = [examples[i] for i in rows_of_step(len(examples), recipe.train_batch_size, recipe.seed, step)]
        loss, padding = add_gradients(recipe, policy, batch, accelerator, "sft masks", step)
        sum_gradients(policy.module, accelerator)
        trained = trainable_parameters(policy.module)
        norm = torch.nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
        sums_and_counts = {"loss": (loss, torch.ones_like(loss)), "grad_norm": (norm, torch.ones_like(norm))}
        metrics = reduce_metrics(sums_and_counts, accelerator) | reduce_metrics({"frac_padding": padding}, accelerator)
    if not math.isfinite(metrics["grad_norm"]):
        raise FloatingPointError(f"gradient norm is {metrics['grad_norm']} at step {step}; the update was not applied")
    with run.log.stage("update"):
        learning_rate = recipe.learning_rate * recipe.lr_schedule(step, recipe.schedule_steps)
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate
        # Before the weights change: if the optimizer step fails halfway, they must not have the old version.
        policy.weights_version += 1
        run.optimizer.step()
    epoch = (step + 1) * recipe.train_batch_size / len(examples)
    return metrics | {"learning_rate": learning_rate, "epoch": epoch}


def add_gradients(
    recipe: SFT, policy: Policy, batch: Sequence[Example], accelerator: Accelerator, *key: object
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Add the gradient of this process's share of a batch to the parameters; return its loss, and the numbers of
    padding and of all positions.
    """
    loss = torch.zeros((), device=policy.device)
    num_positions = 0
    # Masks depend on (seed, *key), not on how the batch is split.
    micro_batches, total, num_tokens = _micro_batches(recipe, policy, batch, accelerator, recipe.micro_batch_size, *key)
    for micro_batch in micro_batches:
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=recipe.bf16):
            micro_loss = micro_batch.loss() / total
        if micro_loss.requires_grad:  # it does not if no token was masked
            micro_loss.backward()
        loss += micro_loss.detach()
        num_positions += micro_batch.num_positions
    return loss, (torch.tensor(float(num_positions - num_tokens)), torch.tensor(float(num_positions)))


class MicroBatch(NamedTuple):
    """Rows of one forward: a function that returns the sum of their losses in nats, and their number of positions,
    including padding.
    """

    loss: Callable[[], torch.Tensor]
    num_positions: int


def _micro_batches(
    recipe: SFT, policy: Policy, examples: Sequence[Example], accelerator: Accelerator, size: int | None, *key: object
) -> tuple[Iterator[MicroBatch], int, int]:
    """Return this process's examples with their noise as micro-batches of `size` rows, the divisor of the loss over all
    processes, and the number of tokens.
    """
    generator = generator_for(recipe.seed, *key)
    if policy.spec.attention == "encoder_decoder":
        return _canvas_batches(policy, examples, accelerator, size, generator)
    longest = max(int(item.learned.sum()) for item in examples)
    levels_and_noise = draw_levels(generator, len(examples), longest)
    # Noise of the examples of all processes, so that every process divides by the same total.
    noisy_examples, total = add_noise(policy, examples, *levels_and_noise, corruption=recipe.corruption)
    local_examples = noisy_examples[accelerator.process_index :: accelerator.num_processes]
    lengths = [len(item.tokens) for item in local_examples]
    rows = pack(lengths, recipe.max_length) if recipe.packing else [[i] for i in range(len(local_examples))]
    size = size or max(1, len(rows))

    def make_micro_batch(start: int) -> MicroBatch:
        layout = lay_out(local_examples, rows[start : start + size], pad_id=policy.pad_id, device=policy.device)
        return MicroBatch(partial(weighted_loss, policy, layout, packed=recipe.packing), layout.segment.numel())

    # Lazy, so that only the micro-batch in use is on the device.
    return map(make_micro_batch, range(0, len(rows), size)), total, sum(lengths)


def _canvas_batches(
    policy: Policy, examples: Sequence[Example], accelerator: Accelerator, size: int | None, generator: torch.Generator
) -> tuple[Iterator[MicroBatch], int, int]:
    """Return `_micro_batches` for a model whose noise is random tokens: one canvas of each example,
    after its context.
    """
    assert policy.spec.block_size is not None, "`check_spec` requires it"
    noise = Noise(
        *draw_levels(generator, len(examples), policy.spec.block_size),
        *torch.rand(2, len(examples), generator=generator),
    )
    pairs = [prompt_and_answer(policy, item) for item in examples]
    local_examples = denoising_examples(policy, pairs, noise)[accelerator.process_index :: accelerator.num_processes]
    lengths = [len(item.context) + len(item.target) for item in local_examples]
    size = size or max(1, len(local_examples))

    def make_micro_batch(start: int) -> MicroBatch:
        batch, widths = local_examples[start : start + size], lengths[start : start + size]
        return MicroBatch(partial(denoising_loss, policy, batch), len(batch) * max(widths))

    return map(make_micro_batch, range(0, len(local_examples), size)), len(examples), sum(lengths)


@torch.no_grad()
def held_out_loss(recipe: SFT, policy: Policy, examples: Sequence[Example], accelerator: Accelerator) -> float:
    """Return the loss over all examples, in nats. Every call uses the same masks, EVAL_VIEWS per row for a diffusion
    model.
    """
    views_per_row = 1 if policy.spec.attention == "causal" else EVAL_VIEWS
    micro_batches, total, _ = _micro_batches(
        recipe, policy, [*examples] * views_per_row, accelerator, recipe.eval_batch_size, "sft held-out"
    )
    loss = torch.zeros((), dtype=torch.float64)  # fp64, so that the sum hardly depends on the batches
    with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=recipe.bf16):
        for micro_batch in micro_batches:
            loss += micro_batch.loss().double().cpu()
    return reduce_metrics({"loss": (loss / total, torch.ones_like(loss))}, accelerator)["loss"]


def evaluate_loss(run: Run[SFT], examples: Sequence[Example]) -> dict[str, float]:
    """Return the held-out loss by name."""
    with run.log.stage("evaluation"):
        return {"loss": held_out_loss(run.recipe, run.policy, examples, run.accelerator)}
