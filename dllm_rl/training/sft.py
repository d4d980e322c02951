"""Supervised fine-tuning: a model and rows to learn, by the masked-diffusion loss or the causal one."""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dllm_rl.distributed import from_main, machine, reduce_metrics, sum_gradients
from dllm_rl.files import write_json
from dllm_rl.models.base import Policy
from dllm_rl.models.lora import add_lora, load_adapter
from dllm_rl.rng import generator_for
from dllm_rl.tasks.datasets import in_memory, part_of
from dllm_rl.training import checkpoint, plots
from dllm_rl.training.finish import Summary
from dllm_rl.training.folder import clear_folder, open_folder
from dllm_rl.training.grpo import HELD_OUT
from dllm_rl.training.log import RunLog
from dllm_rl.training.run import (
    launch,
    make_optimizer,
    make_policy,
    open_log,
    opened,
    told_of,
)
from dllm_rl.training.saving import attempt, with_settings
from dllm_rl.training.sft_recipe import SFT
from dllm_rl.training.stop import Stop, how_to_continue, leaving_nothing_behind
from dllm_rl.training.supervised import (
    Example,
    Layout,
    check_packing,
    lay_out,
    pack,
    read_examples,
    show,
    weighted_loss,
)
from dllm_rl.training.warmup import draw_levels

VIEWS = 4  # masks that a diffusion model's held-out loss takes of each row


def sft(model: str | Policy | Callable[..., Policy], dataset: Any, **settings: Any) -> Summary:
    """Fine-tune a model on rows; returns what its summary.json holds, with the trained `policy` as an attribute.

        sft("GSAI-ML/LLaDA-8B-Base", rows, max_length=512, completion_length=256, lora=lora_r16)

    settings  fields of SFT.
    """
    name = Path(model).name.lower() if isinstance(model, str) else "sft"
    return fine_tune(SFT(**{"name": name, "model": model, "dataset": dataset} | settings))


@dataclass
class State:
    """What a run of SFT owns: `saved` and `whole` are steps, `folder` the newest checkpoint."""

    recipe: SFT
    accelerator: Accelerator
    log: RunLog
    policy: Policy
    optimizer: torch.optim.Optimizer
    begun: float
    seconds: float = 0.0
    before: float = math.nan
    whole: int = 0
    saved: int = -1
    folder: str = ""


@leaving_nothing_behind
def fine_tune(recipe: SFT) -> Summary:
    """Run a recipe of SFT. Raises ValueError, before any work, on one that cannot run."""
    accelerator, stop, peers = launch(recipe)
    recipe = read_datasets(recipe)
    folder, notes = from_main(partial(open_folder, recipe), accelerator)
    policy = _policy(recipe, accelerator, folder)
    training = read_examples(recipe, policy, recipe.dataset, "dataset", say=notes.append)
    held_out = read_examples(recipe, policy, recipe.eval_dataset, "eval_dataset", say=notes.append)
    run = _begin(recipe, accelerator, policy, folder, notes)
    if peers is not None:
        peers.follow(run.log)
    if not folder:
        with run.log.stage("evaluation"):
            run.before = held_out_loss(recipe, policy, held_out, accelerator)
        save(run, 0)
    run.log.say(f"before SFT: held-out loss {run.before:.4f} nats on {len(held_out)} rows")
    progress = run.log.view("training", recipe.num_steps, curve="loss", completed=run.whole)
    stop.last_words, stop.overdue, run.log.entered = None, partial(save_at_once, run, stop), ""

    for step in range(run.whole, recipe.num_steps):
        metrics = take_step(run, training, step)
        if recipe.eval_steps and (step + 1) % recipe.eval_steps == 0:
            with run.log.stage("evaluation"):
                metrics["eval/loss"] = held_out_loss(recipe, policy, held_out, accelerator)
        run.log.write(step, metrics)
        progress(metrics, show=(step + 1) % recipe.logging_steps == 0 or step + 1 == recipe.num_steps)
        run.whole, signum = step + 1, stop.agreed(accelerator)
        if signum or run.whole % recipe.save_steps == 0 or run.whole == recipe.num_steps:
            save(run, run.whole)
        if signum:
            stop.leave(f"interrupted after step {run.whole}; {how_to_continue(recipe)}")
        run.log.entered = ""
    stop.leave_at_once(f"stopped after the last step, before the summary; {how_to_continue(recipe)}")
    return _end(run, held_out)


def read_datasets(recipe: SFT) -> SFT:
    """The recipe with its rows in memory: files read, the last rows held out where no others are given."""
    rows = _rows(recipe.dataset)
    if not len(rows):
        raise ValueError("dataset is empty: give at least two rows")
    if recipe.eval_dataset is not None:
        return replace(recipe, dataset=rows, eval_dataset=_rows(recipe.eval_dataset))
    if len(rows) < 2:
        raise ValueError("dataset has 1 row, and one is to be held out; give eval_dataset")
    kept = len(rows) - min(HELD_OUT, len(rows) // 10 or 1)
    return replace(recipe, dataset=part_of(rows, 0, kept), eval_dataset=part_of(rows, kept, len(rows)))


def _rows(dataset: Any) -> Any:
    if not isinstance(dataset, str):
        return in_memory(dataset)
    rows = []
    for number, line in enumerate(Path(dataset).read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{dataset}: line {number} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{dataset}: line {number} is no JSON object")
        rows.append(row)
    return rows


def _policy(recipe: SFT, accelerator: Accelerator, folder: Path | None) -> Policy:
    """The recipe's model, or as a checkpoint left it; adapters stand on the recipe's model."""
    if folder and recipe.lora is None:
        dtype = getattr(torch, checkpoint.read_state(folder)["dtype"])
        policy = opened(recipe, folder, dtype, accelerator.device)
    else:
        policy = make_policy(recipe, accelerator.device)
        if folder:
            load_adapter(policy, folder / "adapter")
        elif recipe.lora is not None:
            add_lora(policy, recipe.lora())
    if recipe.packing:
        check_packing(policy)
    return policy


def _begin(recipe: SFT, accelerator: Accelerator, policy: Policy, folder: Path | None, notes: Sequence[str]) -> State:
    """The run with its files open, at its first step or as a checkpoint left it."""
    state: dict[str, Any] = checkpoint.read_state(folder) if folder else {"step": 0}
    optimizer = make_optimizer(recipe, policy)
    from_main(partial(clear_folder, recipe), accelerator)
    log = open_log(recipe, accelerator, state["step"], [*notes, *told_of(recipe, folder)])
    run = State(recipe, accelerator, log, policy, optimizer, begun=time.perf_counter())
    if folder:
        policy.version, log.seconds = state["version"], state["stages"]
        checkpoint.load_optimizer(folder, policy, optimizer)
        run.seconds, run.before, run.whole = state["seconds"], state["eval_before"]["loss"], state["step"]
        run.folder = str(folder)
    return run


def rows_of_step(count: int, size: int, seed: int, step: int) -> list[int]:
    """The examples of a step, over all processes: every epoch is a shuffle of them all, and steps take them in turn."""
    places = range(step * size, (step + 1) * size)
    orders = {
        epoch: torch.randperm(count, generator=generator_for(seed, "sft order", epoch)).tolist()
        for epoch in {place // count for place in places}
    }
    return [orders[place // count][place % count] for place in places]


def take_step(run: State, examples: Sequence[Example], step: int) -> dict[str, float]:
    """One update of the weights. Raises FloatingPointError on a gradient that is not finite, before it is applied."""
    recipe, policy, accelerator = run.recipe, run.policy, run.accelerator
    with run.log.stage("gradients"):
        run.optimizer.zero_grad(set_to_none=True)
        chosen = [examples[i] for i in rows_of_step(len(examples), recipe.train_batch_size, recipe.seed, step)]
        loss, padding = add_gradients(recipe, policy, chosen, accelerator, "sft masks", step)
        sum_gradients(policy.module, accelerator)
        trained = [p for p in policy.module.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
        shares = {"loss": (loss, torch.ones_like(loss)), "grad_norm": (norm, torch.ones_like(norm))}
        metrics = reduce_metrics(shares, accelerator) | reduce_metrics({"frac_padding": padding}, accelerator)
    if not math.isfinite(metrics["grad_norm"]):
        raise FloatingPointError(f"gradient norm is {metrics['grad_norm']} at step {step}; the update was not applied")
    with run.log.stage("update"):
        rate = recipe.learning_rate * recipe.lr_schedule(step, recipe.schedule_steps)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        run.optimizer.step()
        policy.version += 1
    epoch = (step + 1) * recipe.train_batch_size / len(examples)
    return metrics | {"learning_rate": rate, "epoch": epoch}


def add_gradients(
    recipe: SFT, policy: Policy, chosen: Sequence[Example], accelerator: Accelerator, *key: object
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Add this process's share of the loss's gradient; returns that share, and (padding, places) of its rows.

    chosen  the examples of all processes; their masks follow from (seed, *key), whatever the layout.
    """
    loss, places = torch.zeros((), device=policy.device), 0
    parts, total, filled = _parts(recipe, policy, chosen, accelerator, recipe.micro_batch_size, *key)
    for part in parts:
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=recipe.bf16):
            share = weighted_loss(policy, part, packed=recipe.packing) / total
        if share.requires_grad:  # else nothing was hidden
            share.backward()
        loss += share.detach()
        places += part.segment.numel()
    return loss, (torch.tensor(float(places - filled)), torch.tensor(float(places)))


def _parts(
    recipe: SFT, policy: Policy, examples: Sequence[Example], accelerator: Accelerator, size: int | None, *key: object
) -> tuple[Iterator[Layout], int, int]:
    """This process's examples with their masks, laid out in rows, `size` rows at a time; what divides the loss; how
    many tokens they have."""
    causal = policy.spec.attention == "causal"
    longest = max(int(one.learned.sum()) for one in examples)
    levels, uniforms = draw_levels(generator_for(recipe.seed, *key), len(examples), longest)
    shown, total = show(examples, levels, uniforms, causal=causal)
    mine = shown[accelerator.process_index :: accelerator.num_processes]
    lengths = [len(one.tokens) for one in mine]
    rows = pack(lengths, recipe.max_length) if recipe.packing else [[i] for i in range(len(mine))]
    size = size or max(1, len(rows))
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
    layouts = (lay_out(mine, chunk, pad_id=policy.pad_id, device=policy.device) for chunk in chunks)
    return layouts, total, sum(lengths)


@torch.no_grad()
def held_out_loss(recipe: SFT, policy: Policy, examples: Sequence[Example], accelerator: Accelerator) -> float:
    """The loss over all examples, nats: the same masks at every call, VIEWS of each row for a diffusion model."""
    views = 1 if policy.spec.attention == "causal" else VIEWS
    parts, total, _ = _parts(recipe, policy, [*examples] * views, accelerator, recipe.eval_batch_size, "sft held-out")
    loss = torch.zeros((), dtype=torch.float64)
    with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=recipe.bf16):
        for part in parts:
            loss += weighted_loss(policy, part, packed=recipe.packing).double().cpu()
    return reduce_metrics({"loss": (loss / total, torch.ones_like(loss))}, accelerator)["loss"]


def save(run: State, step: int) -> None:
    """Checkpoint after `step` steps, by the main process. Raises OSError where it cannot be written and on_save_error
    is not 'continue'."""
    if folder := from_main(partial(write_checkpoint, run, step), run.accelerator):
        run.folder = str(folder)


def write_checkpoint(run: State, step: int) -> Path | None:
    """Returns the checkpoint, or None where it could not be written and the run is to go on."""
    state = {"seconds": run.seconds + time.perf_counter() - run.begun, "eval_before": {"loss": run.before}}
    held = (run.log, run.policy, run.optimizer)
    write = with_settings(run.recipe, run.accelerator, step, state, held=held)
    folder = attempt(run.recipe, run.log, write)
    run.saved = step if folder else run.saved
    return folder


def save_at_once(run: State, stop: Stop) -> None:
    """When a stop is overdue: save the state after the last whole step, and end the process; not once the update has
    begun, where the state is neither that step's nor the next's."""
    if run.log.entered not in ("", "gradients"):
        return
    stop.disarm()
    if run.accelerator.is_main_process and run.whole != run.saved:
        write_checkpoint(run, run.whole)
    stop.leave(f"stopped in the step after step {run.whole}, which is saved; {how_to_continue(run.recipe)}")


def _end(run: State, held_out: Sequence[Example]) -> Summary:
    """The held-out loss again, summary.json, the picture, and a line of what happened."""
    recipe, log, directory = run.recipe, run.log, Path(run.recipe.directory)
    with log.stage("evaluation"):
        after = held_out_loss(recipe, run.policy, held_out, run.accelerator)
    log.close()
    summary = {
        "eval_before": {"loss": run.before},
        "eval_after": {"loss": after},
        "eval_rows": len(held_out),
        "seconds": run.seconds + time.perf_counter() - run.begun,
        "stages": {name: round(spent, 3) for name, spent in log.seconds.items()},
        "seed": recipe.seed,
        "num_processes": run.accelerator.num_processes,
        "checkpoint": run.folder,
        "machine": machine(run.accelerator),
        "recipe": recipe.settings(),
    }
    if run.accelerator.is_main_process:
        write_json(directory / "summary.json", summary)
        picture = plots.plot(directory) if recipe.num_steps else None
        log.say(
            f"\n{recipe.name}, seed {recipe.seed}: held-out loss {run.before:.4f}  ->  {after:.4f} nats on "
            f"{len(held_out)} rows, after {recipe.num_steps} steps in {summary['seconds']:.0f} s.\n"
            f"Checkpoint: {run.folder}\nPicture:    {picture}\nNumbers:    {directory / 'summary.json'}\n"
            f"RL from it: python RECIPE.py --model {run.folder} --warmup_steps 0"
        )
    run.accelerator.wait_for_everyone()
    run.policy.module.zero_grad(set_to_none=True)
    return Summary(summary, run.policy)
