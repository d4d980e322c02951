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
from dllm_rl.models.base import Policy, trained_of
from dllm_rl.models.lora import add_lora, load_adapter
from dllm_rl.rng import generator_for
from dllm_rl.supervised.examples import (
    Example,
    check_packing,
    lay_out,
    pack,
    prompt_and_answer,
    read_examples,
    show,
    weighted_loss,
)
from dllm_rl.supervised.recipe import SFT
from dllm_rl.tasks.datasets import in_memory, training_and_held_out
from dllm_rl.tasks.rows import load_rows
from dllm_rl.training.denoising import Noise, denoising_loss, lessons
from dllm_rl.training.finish import Summary, conclude
from dllm_rl.training.hooks import after_step, before_first_step, load_best
from dllm_rl.training.policies import build_policy, freeze, make_optimizer, opened
from dllm_rl.training.run import Run
from dllm_rl.training.saving import checkpoint_if_due, make_writer, protect, save, settle
from dllm_rl.training.start import launch, open_log, restore
from dllm_rl.training.validation import check_best_model, interval
from dllm_rl.training.warmup import draw_levels

VIEWS = 4  # masks that a diffusion model's held-out loss takes of each row


def sft(model: str | Policy | Callable[..., Policy], dataset: Any, **settings: Any) -> Summary:
    """Fine-tune a model on rows, as SFT's fields say; returns its summary, with the trained `policy` as an attribute.
    Example: `sft("GSAI-ML/LLaDA-8B-Base", rows, max_length=512, completion_length=256, lora=lora_r16,
    dtype="bfloat16", learning_rate=1e-5, micro_batch_size=2, gradient_checkpointing=True)`: the default learning rate,
    5e-4, is of small models.
    """
    name = Path(model).name.lower() if isinstance(model, str) else "sft"
    return fine_tune(SFT(**{"name": name, "model": model, "dataset": dataset} | settings))


@leaving_nothing_behind
def fine_tune(recipe: SFT) -> Summary:
    """Run a recipe of SFT. Raises ValueError, before any work, on a recipe that cannot run."""
    accelerator, stop, peers = launch(recipe)
    recipe = read_datasets(recipe)  # before the folder: a file that is no JSON leaves none behind
    folder, saved, notes = from_main(partial(open_folder, recipe), accelerator)
    policy = _policy(recipe, accelerator, folder, saved)
    training = read_examples(recipe, policy, recipe.dataset, "dataset", say=notes.append)
    held_out = read_examples(recipe, policy, recipe.eval_dataset, "eval_dataset", say=notes.append)
    views = 1 if policy.spec.attention == "causal" else VIEWS
    every = interval(recipe, len(held_out) * views, 3 * recipe.train_batch_size)  # a backward is about two forwards
    check_best_model(recipe, every)
    optimizer = make_optimizer(recipe, policy)
    log = open_log(recipe, accelerator, peers, saved, notes)
    state = restore(recipe, folder, saved, policy, optimizer, log) if folder else TrainingState.first(recipe, policy)
    run = Run(
        recipe=recipe,
        accelerator=accelerator,
        log=log,
        policy=policy,
        rollout_policy=policy,
        reference=None,
        optimizer=optimizer,
        state=state,
        stop=stop,
        writer=make_writer(recipe, accelerator),
        progress=log.view("training", recipe.num_steps, curve="loss", completed=state.step),
        checkpoint=str(folder or ""),
    )
    if not folder:
        run.state = replace(run.state, eval_before=evaluate_loss(run, held_out))
        save(run)
    before = run.state.eval_before
    log.say(f"before SFT: held-out loss {before['loss']:.4f} nats on {len(held_out)} rows")
    protect(run, peers)
    before_first_step(run)

    for step in range(run.state.step, recipe.num_steps):
        metrics = take_step(run, training, step)
        if every and (step + 1) % every == 0:
            metrics["eval/loss"] = evaluate_loss(run, held_out)["loss"]
        metrics = after_step(run, step, metrics)
        log.write(step, metrics)
        run.progress(metrics, show=(step + 1) % recipe.logging_steps == 0 or step + 1 == recipe.num_steps)
        checkpoint_if_due(run, step, metrics)
        if run.control.stop_reason is not None:
            break
    stop.leave_at_once(f"stopped after the last step, before the summary; {how_to_continue(recipe)}")
    settle(run)
    load_best(run, lambda folder, saved: _policy(recipe, accelerator, folder, saved))
    after = evaluate_loss(run, held_out)
    return conclude(
        run,
        {"eval_before": before, "eval_after": after, "eval_rows": len(held_out)},
        result=f"held-out loss {before['loss']:.4f}  ->  {after['loss']:.4f} nats on {len(held_out)} rows, after "
        f"{run.state.step} steps",
        advice=f"RL from it: {as_written(model=run.checkpoint, sft_warmup_steps=0)} of a recipe or of grpo",
    )


def read_datasets(recipe: SFT) -> SFT:
    """The recipe with its rows in memory; without eval_dataset the last rows are held out."""
    rows = _rows(recipe.dataset)
    if not len(rows):
        raise ValueError("dataset is empty: give at least two rows")
    given = None if recipe.eval_dataset is None else _rows(recipe.eval_dataset)
    training, held_out = training_and_held_out(rows, given, recipe.eval_split)
    return replace(recipe, dataset=training, eval_dataset=held_out)


def _rows(dataset: Any) -> Any:
    return list(dict(load_rows(dataset)).values()) if isinstance(dataset, str) else in_memory(dataset)


def _policy(recipe: SFT, accelerator: Accelerator, folder: Path | None, saved: TrainingState | None) -> Policy:
    """The recipe's model, or as a checkpoint left it; adapters apply to the recipe's model."""
    if folder and saved and recipe.lora is None:
        policy = opened(recipe, folder, getattr(torch, saved.dtype), accelerator.device)
        freeze(recipe, policy, saved.frozen or [])
    else:
        policy = build_policy(recipe, accelerator.device)
        if folder:
            load_adapter(policy, folder / "adapter")
        elif recipe.lora is not None:
            add_lora(policy, recipe.lora())
    if recipe.packing:
        check_packing(policy)
    return policy


def rows_of_step(count: int, size: int, seed: int, step: int) -> list[int]:
    """The examples of a step, over all processes: every epoch shuffles all, and steps take them in turn."""
    chosen: list[int] = []
    for drawn in range(step * size, (step + 1) * size):
        epoch, place = divmod(drawn, count)
        if place == 0 or not chosen:
            order = torch.randperm(count, generator=generator_for(seed, "sft order", epoch)).tolist()
        chosen.append(order[place])
    return chosen


def take_step(run: Run[SFT], examples: Sequence[Example], step: int) -> dict[str, float]:
    """One update of the weights. Raises FloatingPointError on a gradient that is not finite, before it is applied."""
    recipe = run.recipe
    policy = run.policy
    accelerator = run.accelerator
    with run.log.stage("gradients"):
        run.optimizer.zero_grad(set_to_none=True)
        chosen = [examples[i] for i in rows_of_step(len(examples), recipe.train_batch_size, recipe.seed, step)]
        loss, padding = add_gradients(recipe, policy, chosen, accelerator, "sft masks", step)
        sum_gradients(policy.module, accelerator)
        trained = trained_of(policy.module)
        norm = torch.nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
        shares = {"loss": (loss, torch.ones_like(loss)), "grad_norm": (norm, torch.ones_like(norm))}
        metrics = reduce_metrics(shares, accelerator) | reduce_metrics({"frac_padding": padding}, accelerator)
    if not math.isfinite(metrics["grad_norm"]):
        raise FloatingPointError(f"gradient norm is {metrics['grad_norm']} at step {step}; the update was not applied")
    with run.log.stage("update"):
        rate = recipe.learning_rate * recipe.lr_schedule(step, recipe.schedule_steps)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        policy.weights_version += (
            1  # before the weights change: an error in between must not leave them the old version
        )
        run.optimizer.step()
    epoch = (step + 1) * recipe.train_batch_size / len(examples)
    return metrics | {"learning_rate": rate, "epoch": epoch}


def add_gradients(
    recipe: SFT, policy: Policy, chosen: Sequence[Example], accelerator: Accelerator, *key: object
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Add this process's share of the gradient over `chosen`, of all processes; its loss, (padding, places)."""
    loss = torch.zeros((), device=policy.device)
    places = 0
    # Masks depend on (seed, *key), not on the layout.
    parts, total, filled = _parts(recipe, policy, chosen, accelerator, recipe.micro_batch_size, *key)
    for part in parts:
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=recipe.bf16):
            share = part.loss() / total
        if share.requires_grad:  # else nothing was hidden
            share.backward()
        loss += share.detach()
        places += part.places
    return loss, (torch.tensor(float(places - filled)), torch.tensor(float(places)))


class Part(NamedTuple):
    """Rows that go through the model together: the sum of their losses, nats, and their places with padding."""

    loss: Callable[[], torch.Tensor]
    places: int


def _parts(
    recipe: SFT, policy: Policy, examples: Sequence[Example], accelerator: Accelerator, size: int | None, *key: object
) -> tuple[Iterator[Part], int, int]:
    """This process's examples under their noise, `size` rows at a time; the loss's divisor; the number of tokens."""
    generator = generator_for(recipe.seed, *key)
    if policy.spec.attention == "encoder_decoder":
        return _canvases(policy, examples, accelerator, size, generator)
    longest = max(int(one.learned.sum()) for one in examples)
    drawn = draw_levels(generator, len(examples), longest)
    # Of all processes: each divides by the same total.
    shown, total = show(policy, examples, *drawn, corruption=recipe.corruption)
    mine = shown[accelerator.process_index :: accelerator.num_processes]
    lengths = [len(one.tokens) for one in mine]
    rows = pack(lengths, recipe.max_length) if recipe.packing else [[i] for i in range(len(mine))]
    size = size or max(1, len(rows))

    def part(start: int) -> Part:
        layout = lay_out(mine, rows[start : start + size], pad_id=policy.pad_id, device=policy.device)
        return Part(partial(weighted_loss, policy, layout, packed=recipe.packing), layout.segment.numel())

    # A generator: only the part in use is on the device.
    return map(part, range(0, len(rows), size)), total, sum(lengths)


def _canvases(
    policy: Policy, examples: Sequence[Example], accelerator: Accelerator, size: int | None, generator: torch.Generator
) -> tuple[Iterator[Part], int, int]:
    """`_parts` of a model whose noise is random tokens: a canvas of each example, behind what precedes it."""
    assert policy.spec.block_size is not None, "`check_spec` asks for it"
    noise = Noise(
        *draw_levels(generator, len(examples), policy.spec.block_size),
        *torch.rand(2, len(examples), generator=generator),
    )
    pairs = [prompt_and_answer(policy, one) for one in examples]
    mine = lessons(policy, pairs, noise)[accelerator.process_index :: accelerator.num_processes]
    lengths = [len(one.context) + len(one.target) for one in mine]
    size = size or max(1, len(mine))

    def part(start: int) -> Part:
        batch, widths = mine[start : start + size], lengths[start : start + size]
        return Part(partial(denoising_loss, policy, batch), len(batch) * max(widths))

    return map(part, range(0, len(mine), size)), len(examples), sum(lengths)


@torch.no_grad()
def held_out_loss(recipe: SFT, policy: Policy, examples: Sequence[Example], accelerator: Accelerator) -> float:
    """The loss over all examples, nats: the same masks at every call, VIEWS per row for a diffusion model."""
    views = 1 if policy.spec.attention == "causal" else VIEWS
    parts, total, _ = _parts(recipe, policy, [*examples] * views, accelerator, recipe.eval_batch_size, "sft held-out")
    loss = torch.zeros((), dtype=torch.float64)  # fp64: the sum hardly depends on the batches
    with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=recipe.bf16):
        for part in parts:
            loss += part.loss().double().cpu()
    return reduce_metrics({"loss": (loss / total, torch.ones_like(loss))}, accelerator)["loss"]


def evaluate_loss(run: Run[SFT], examples: Sequence[Example]) -> dict[str, float]:
    with run.log.stage("evaluation"):
        return {"loss": held_out_loss(run.recipe, run.policy, examples, run.accelerator)}
