"""Supervised fine-tuning: a model learns rows by the masked-diffusion loss or the causal loss."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dllm_rl.checkpoints.resume import contents_of
from dllm_rl.checkpoints.run_folder import in_own_folder, open_folder
from dllm_rl.checkpoints.state import TrainingState
from dllm_rl.decoding.vocabulary import begin_ids
from dllm_rl.distributed.collectives import from_main
from dllm_rl.distributed.stop import as_written, leaving_nothing_behind
from dllm_rl.groups import TRL_FLAT, check_flat, nested, with_groups
from dllm_rl.identity import rows_in_order
from dllm_rl.models.base import Policy
from dllm_rl.models.checkpoint.adapters import load_adapter
from dllm_rl.models.lora import add_lora
from dllm_rl.rng import generator_for
from dllm_rl.supervised.examples import Example, read_examples
from dllm_rl.supervised.sft import SFT
from dllm_rl.supervised.trainer import SupervisedTrainer
from dllm_rl.tasks.datasets import Source, in_memory, num_in_training, training_and_held_out
from dllm_rl.tasks.rows import load_rows
from dllm_rl.tasks.user_code import children_end
from dllm_rl.training.finish import has_custom_module, write_summary
from dllm_rl.training.hooks import before_first_step, load_best, take_steps
from dllm_rl.training.hub import check_hub
from dllm_rl.training.policies import (
    build_policy,
    check_base,
    check_low_bit,
    digest_of_base,
    freeze,
    load_from_run_folder,
    make_optimizer,
)
from dllm_rl.training.run import Run
from dllm_rl.training.saving import install_emergency_saves, make_writer, save
from dllm_rl.training.start import check_same_recipe, launch, open_log, restore
from dllm_rl.training.summary import Summary
from dllm_rl.training.validation import evaluation_interval

EVAL_VIEWS = 4  # masks per row in the held-out loss of a diffusion model


def sft(model: str | Policy | Callable[..., Policy], dataset: Any, **settings: Any) -> Summary:
    """Fine-tune a model on rows and return the run's summary, with the trained policy as its attribute `policy`.

    `settings` are fields of `SFT`, or TRL's flat names, such as `save_steps`. Set the learning rate: the default,
    5e-4, suits small models.
    """
    for flat in settings.keys() & TRL_FLAT:
        check_flat(SFT, flat, settings[flat])
    name = Path(model).name.lower() if isinstance(model, str | Path) else "sft"
    return fine_tune(
        SFT(**{"name": name, "model": model, "dataset": dataset} | with_groups(SFT, nested(SFT, settings), {}))
    )


@in_own_folder
@leaving_nothing_behind
@children_end()
def fine_tune(recipe: SFT) -> Summary:
    """Run a recipe of SFT and return the run's summary. Raises ValueError, before any training, if it cannot run."""
    check_hub(recipe.saves.push_to_hub)
    accelerator, stop, peers = launch(recipe)
    # Before the folder is created, so that a malformed file leaves no folder.
    is_split = recipe.eval_dataset is None
    rows, held_out_rows = read_datasets(recipe.dataset, recipe.eval_dataset, recipe.eval_split)
    recipe = replace(recipe, dataset=rows, eval_dataset=held_out_rows)
    check_same_recipe(recipe, accelerator)
    folder, saved_state, notes = from_main(partial(open_folder, recipe), accelerator)
    policy, base = _load_policy(recipe, accelerator, folder, saved_state)
    contents = contents_of(recipe)
    training = read_examples(recipe, policy, rows, Source("dataset"), say=notes.append)
    source = Source("dataset", len(rows) * (held_out_rows is not rows)) if is_split else Source("eval_dataset")
    held_out = read_examples(recipe, policy, held_out_rows, source, say=notes.append)
    is_held_out = num_in_training(*map(rows_in_order, (rows, held_out_rows))) < len(held_out_rows)
    loss_name = "held-out loss" if is_held_out else "loss of training rows"
    held_out_views = [*held_out] * (1 if policy.spec.attention == "causal" else EVAL_VIEWS)
    eval_interval = evaluation_interval(
        recipe.evaluation.steps,
        recipe.num_steps,
        recipe.evaluated_metrics,
        eval_forwards=len(held_out_views),
        step_forwards=3 * recipe.train_batch_size,  # a backward counts as two forwards
    )
    optimizer = make_optimizer(recipe, policy)

    def count_update(*_: object) -> None:
        policy.weights_version += 1

    # Before the weights change: if the optimizer step fails halfway, they must not have the old version.
    optimizer.register_step_pre_hook(count_update)
    log = open_log(recipe, accelerator, peers, saved_state, notes)
    state = (
        restore(recipe, folder, saved_state, contents, policy, optimizer, log)
        if folder
        else TrainingState.first(recipe.settings(), policy, base=base, contents=contents, begin_ids=begin_ids(policy))
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
        writer=make_writer(policy, in_thread=recipe.saves.in_background, timeout=recipe.limits.collective_timeout),
        progress=log.view("training", recipe.num_steps, completed=state.logged_steps),
        checkpoint=str(folder or ""),
    )

    def evaluate() -> dict[str, float]:
        generator = generator_for(recipe.seed, "sft held-out")  # the same masks in every evaluation
        with log.stage("evaluation"):
            trainer = make_trainer(run)
            return {"loss": trainer.loss(held_out_views, generator, micro_batch_size=recipe.evaluation_batch_size)}

    if not folder:
        run.state = replace(run.state, eval_before=evaluate())
        save(run)
    eval_before = run.state.eval_before
    log.say(f"before SFT: {loss_name} {eval_before['loss']:.4f} nats on {len(held_out)} rows")
    install_emergency_saves(run, peers)
    before_first_step(run)

    def evaluate_if_due(step: int) -> dict[str, float]:
        is_due = eval_interval and (step + 1) % eval_interval == 0
        return {"eval/loss": evaluate()["loss"]} if is_due else {}

    take_steps(run, partial(take_step, run, training), evaluate_if_due)
    load_best(run, lambda folder, saved_state: _load_policy(recipe, accelerator, folder, saved_state)[0])
    eval_after = evaluate()
    start = as_written(**{"model": run.checkpoint, "warmup.steps": 0})
    if has_custom_module(run):
        start = f"load_policy({run.checkpoint!r}, into=policy) in the function that is the model"
    return write_summary(
        run,
        {"eval_before": eval_before, "eval_after": eval_after, "eval_rows": len(held_out)},
        result=f"{loss_name} {eval_before['loss']:.4f} -> {eval_after['loss']:.4f} nats on {len(held_out)} rows, "
        f"after {run.state.step} steps",
        advice=f"RL from it: {start} of a recipe or of grpo",
    )


def read_datasets(dataset: Any, eval_dataset: Any, eval_split: float | None) -> tuple[Any, Any]:
    """Return the rows of training and the held-out rows, in memory: of data sets, or of the files at these paths.
    Without eval_dataset, the last rows of dataset are held out.
    """
    return training_and_held_out(_rows(dataset), None if eval_dataset is None else _rows(eval_dataset), eval_split)


def _rows(dataset: Any) -> Any:
    return list(dict(load_rows(dataset)).values()) if isinstance(dataset, str) else in_memory(dataset)


def _load_policy(
    recipe: SFT, accelerator: Accelerator, folder: Path | None, saved_state: TrainingState | None
) -> tuple[Policy, str | None]:
    """Load the learner: from the checkpoint in `folder` if there is one, else from the recipe. Adapters are applied to
    the recipe's model, whose digest is returned too.
    """
    base = None
    if folder and saved_state and recipe.lora is None:
        policy = load_from_run_folder(recipe, folder, getattr(torch, saved_state.dtype), accelerator.device)
        freeze(recipe.model, policy, saved_state.frozen or [])
    else:
        policy = build_policy(recipe, accelerator.device)
        check_low_bit(recipe, policy)
        if folder and saved_state:
            check_base(recipe, policy, saved_state, accelerator)
            load_adapter(policy, folder / "adapter")
        else:
            base = digest_of_base(recipe, policy, accelerator)
            if recipe.lora is not None:
                add_lora(policy, recipe.lora)
    return policy, base


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


def make_trainer(run: Run[SFT]) -> SupervisedTrainer:
    """Return the trainer of the run's policy."""
    recipe = run.recipe
    return SupervisedTrainer(
        policy=run.policy,
        processes=run.accelerator,
        micro_batch_size=recipe.micro_batch_size,
        bf16=recipe.bf16,
        max_grad_norm=recipe.max_grad_norm,
        stage=run.log.stage,
    )


def take_step(run: Run[SFT], examples: Sequence[Example], step: int) -> dict[str, float]:
    """Update the weights once and return the step's metrics."""
    recipe = run.recipe
    learning_rate = recipe.learning_rate * recipe.lr_schedule(step, recipe.lr_schedule_steps or recipe.num_steps)
    indices = rows_of_step(len(examples), recipe.train_batch_size, recipe.seed, step)
    metrics = make_trainer(run).step(
        run.optimizer,
        [examples[i] for i in indices],
        generator_for(recipe.seed, "sft masks", step),
        learning_rate=learning_rate,
        place=f"step {step}",
    )
    epoch = (step + 1) * recipe.train_batch_size / len(examples)
    return metrics | {"learning_rate": learning_rate, "epoch": epoch}
