"""What the processes of test_sharded_learner.py run, and the recipes that one process runs beside them."""

import os
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from emulated import int3_emulated
from layouts import published
from live_bytes import LiveBytes
from tiny_recipe import tiny_recipe, tiny_recipe_ar
from torch.utils._python_dispatch import TorchDispatchMode

from dllm_rl import Aligned, Float8WeightOnly, Lora, load_policy
from dllm_rl.distributed.collectives import make_accelerator, sum_gradients
from dllm_rl.distributed.sharding import shard, sharding_of
from dllm_rl.likelihoods.estimators import Coupled
from dllm_rl.models.base import gather_if_sharded, join_uneven_forwards
from dllm_rl.models.forward.blocks import blocks_of
from dllm_rl.models.logprobs import backward_token_logprobs
from dllm_rl.models.merge import host_copy
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.quantization.rollout_policy import quantized_copy, sync_weights
from dllm_rl.rng import generator_for
from dllm_rl.step.update import update
from dllm_rl.training import trainer
from dllm_rl.training.dry_run.memory import PlannedStep, step_memory
from dllm_rl.training.trainer import train
from dllm_rl.types.rollouts import SamplingParams
from dllm_rl.types.scoring import Batch

EVERY = {"report_to": None, "collective_timeout": 600.0}
FULL = {**EVERY, "likelihood": Coupled(), "num_iterations": 2, "micro_batch_size": 4, "beta": 0.1, "save_steps": 2}
FULL |= {
    "sft_warmup_steps": 2,
    "sft_warmup_batch_size": 8,
    "sft_warmup_eval_steps": 2,
    "sft_warmup_target": 1.0,
    "corrector": Aligned(),
}
LORA = {**EVERY, "lora": Lora(), "num_iterations": 2, "max_num_gen_batches": 2, "num_generations": 2, "save_steps": 2}
PLAIN = {**EVERY, "rollout_quantization": None, "gradient_checkpointing": True}


def recipes(folder, **changes):
    return {
        "full": tiny_recipe(folder / "full", **{"num_steps": 4, **FULL, **changes}),
        "lora": tiny_recipe_ar(folder / "lora", **{"num_steps": 4, **LORA, **changes}),
        "plain": tiny_recipe(folder / "plain", **{"num_steps": 2, **PLAIN, **changes}),
    }


def trained(recipe):
    """A run's summary, and the tokens and log-probs of its rollouts, step by step."""
    seen, collect = [], trainer.collect

    def collected(*arguments):
        found = collect(*arguments)
        rollout = found[0].rollout
        mask = rollout.completion_mask
        seen.append((rollout.tokens[mask], rollout.logprobs[mask]))
        return found

    with mock.patch.object(trainer, "collect", collected):
        return train(recipe), seen


def train_all(folder, size):
    for name, recipe in recipes(Path(folder), shard_size=size).items():
        _, seen = trained(recipe)
        torch.save(seen, Path(folder) / name / f"rollouts-{os.environ['RANK']}.pt")


def resume(folder):
    for name in ("full", "lora"):
        policy = train(recipes(Path(folder), shard_size=0, resume_from_checkpoint="latest")[name]).policy
        assert sharding_of(policy.module) is not None
        assert 0.45 < share_of(policy.module.parameters()) < 0.55


def share_of(tensors):
    """Bytes of sharded tensors that this process holds, of all."""
    tensors = list(tensors)
    return sum(x.to_local().nbytes for x in tensors) / sum(x.nbytes for x in tensors)


class Sent(TorchDispatchMode):
    """Bytes of the whole tensors that collectives gather, and sum over processes."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        place = {"_allgather_base_": 0, "_reduce_scatter_base_": 1}.get(func.__name__.split(".")[0])
        if place is not None:
            self.bytes[func.__name__.split(".")[0]] += args[place].nbytes
        return func(*args, **(kwargs or {}))


def families(folder):
    """Published layouts, stacked experts among them: the rollout's copy, its sync and what is gathered are bit for bit
    those of a whole learner; gradients are, to rounding, with one process doing three of four views."""
    accelerator = make_accelerator(timeout=600)
    rank, count = accelerator.process_index, accelerator.num_processes
    tokens = (torch.arange(8 * 6).reshape(8, 6) % 20 + 4).chunk(4)

    def equal(a, b):
        kinds = [{n: getattr(x, "qdata", x).float() for n, x in each.module.state_dict().items()} for each in (a, b)]
        return kinds[0].keys() == kinds[1].keys() and all(torch.equal(kinds[0][n], kinds[1][n]) for n in kinds[0])

    def run(policy, rows):
        states = policy.hidden(rows, torch.ones_like(rows, dtype=torch.bool)).flatten(0, 1)
        vector = torch.linspace(1, -1, rows.numel())
        backward_token_logprobs(policy, states, rows.flatten(), SamplingParams(), vector)

    for family in ("llada", "dream", "llada_moe", "llada2"):
        source = Path(folder) / f"{family}-{rank}"
        source.mkdir()
        policy, alone = (load_policy(published(source, family)) for _ in range(2))
        shard(policy.module, blocks_of(policy.module), accelerator, size=count)
        for scheme in (Float8WeightOnly(), int3_emulated, None):
            copies = [quantized_copy(p, scheme) for p in (policy, alone)]
            assert equal(*copies)
        for rows in tokens:
            run(alone, rows)
        with join_uneven_forwards(policy, backward=True):
            for rows in tokens[:3] if rank == 0 else tokens[3:]:
                run(policy, rows)
        for ours, theirs in zip(policy.module.parameters(), alone.module.parameters(), strict=True):
            if theirs.grad is not None:
                torch.testing.assert_close(gather_if_sharded(ours.grad), theirs.grad, rtol=1e-4, atol=1e-5)
        for each, rollout in zip((policy, alone), copies, strict=True):
            with torch.no_grad():
                for parameter in each.module.parameters():
                    parameter.mul_(1.25)
            sync_weights(each, rollout)
        assert equal(*copies)
        assert equal(host_copy(policy), alone)


def plan_and_allocator(cases):
    """The plan of a process that holds a shard of the learner, against the allocator's own count of an update, within
    a quarter."""
    import test_memory as plan

    accelerator = make_accelerator(timeout=600)
    for case in cases:
        recipe = replace(
            plan.recipe_of(Path("nowhere"), **plan.CASES[case]),
            shard_size=accelerator.num_processes,
            max_retained_graphs=0,
        )
        policy = plan.made(recipe)
        given = replace(recipe, train_batch_size=recipe.train_batch_size * accelerator.num_processes, model=policy)
        planned = step_memory(PlannedStep(given, policy, plan.PROMPT, accelerator.num_processes))
        shard(policy.module, blocks_of(policy.module), accelerator, size=accelerator.num_processes)
        optimizer = plan.make_optimizer(recipe, policy)
        prompts = plan.Prompts.from_ids(
            [[5 + i] * plan.PROMPT for i in range(2)], pad_id=0, num_generations=4, seeds=range(8)
        )
        with join_uneven_forwards(policy):
            rollout = recipe.sampler(policy, prompts, generator_for(0))
            noise = recipe.likelihood.draw_views(rollout, generator_for(1))
            scores = recipe.likelihood.view_logprobs(policy, rollout, noise)
        old = recipe.likelihood.combine(scores, noise)
        batch = Batch(
            rollout=rollout, views=noise, advantages=torch.linspace(-1, 1, plan.ROWS), old_logprobs=old,
            old_view_logprobs=scores, importance_weights=torch.ones_like(old), loss_mask=rollout.completion_mask,
            reference_logprobs=None,
            num_tokens=plan.ROWS * plan.LENGTH, num_sequences=plan.ROWS,
        )  # fmt: skip
        peaks = []
        for step in range(6):
            state = [x for each in optimizer.state.values() for x in each.values() if x.dim()]
            held = sum(x.to_local().nbytes for x in [*policy.module.parameters(), *state])
            batch = replace(batch, rollout=replace(rollout, weights_version=step))
            optimizer.zero_grad(set_to_none=True)
            batches = [batch] * recipe.num_iterations
            learn = partial(update, policy, optimizer, batches, accelerator, recipe.update_settings(0))
            peaks.append(held + plan.profiled(learn)[0])
        # Gloo's thread frees a gathered layer when its turn comes: the lowest peak has the shortest wait.
        peak = min(peaks[1:])
        update_peak = planned.peaks["update"] - planned.persistent["rollout copy"]  # here the learner itself samples
        assert 0.8 * peak < update_peak < 1.25 * peak, (case, peak, planned)


def uneven(shares):
    """Updates of which each process does its share of four views, against one process that does all: gradients, their
    norm, weights. Bytes sent are those of the formula; memory is what the docs say."""
    sizes = {"hidden_size": 64, "num_layers": 4, "num_attention_heads": 2, "intermediate_size": 128}
    policy, alone = (tiny_masked_lm(characters="1234.=", **sizes) for _ in range(2))
    module, accelerator = policy.module, make_accelerator(timeout=600)
    count, rank, blocks = accelerator.num_processes, accelerator.process_index, blocks_of(module)
    layer = sum(p.nbytes for p in blocks[0].parameters())

    def sent(part, *without):  # rows are filled up to a multiple of the processes
        return sum(-(-len(p) // count) * count * p[0].nbytes for n, p in part.named_parameters() if n not in without)

    body, head, trained_head = sent(module.base_model), sent(module.lm_head), sent(module.lm_head, "bias")
    shard(module, blocks, accelerator, size=count)
    optimizers = [torch.optim.AdamW(p.module.parameters(), lr=1e-3) for p in (policy, alone)]
    views = (torch.arange(8 * 6).reshape(8, 6) % 9).chunk(4)

    def run(which, rows):
        states = which.hidden(rows, torch.ones_like(rows, dtype=torch.bool)).flatten(0, 1)
        backward_token_logprobs(which, states, rows.flatten(), SamplingParams(), torch.linspace(1, -1, rows.numel()))

    for numbers in shares:
        for rows in views[: sum(numbers)]:
            run(alone, rows)
        with Sent() as bytes_of, join_uneven_forwards(policy, backward=True):
            for rows in views[sum(numbers[:rank]) : sum(numbers[: rank + 1])]:
                run(policy, rows)
        passes = max(numbers)
        expected = {"_allgather_base_": 2 * passes * body + head, "_reduce_scatter_base_": passes * body + trained_head}
        assert bytes_of.bytes == expected, (numbers, bytes_of.bytes, expected)
        sum_gradients(module, accelerator)
        for ours, theirs in zip(module.parameters(), alone.module.parameters(), strict=True):
            expected = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
            torch.testing.assert_close(gather_if_sharded(ours.grad), expected, rtol=1e-4, atol=1e-5)
        norms = [gather_if_sharded(torch.nn.utils.clip_grad_norm_(p.module.parameters(), 1.0)) for p in (policy, alone)]
        torch.testing.assert_close(*norms, rtol=1e-5, atol=0)
        gradients = [p.grad for p in module.parameters()]
        for optimizer in optimizers:
            optimizer.step()
    moments = [x for state in optimizers[0].state.values() for x in state.values() if x.dim()]
    share = share_of([*module.parameters(), *gradients, *moments])
    rollout = quantized_copy(policy, None)
    with LiveBytes() as live:
        for tensor in rollout.module.parameters():  # what is written is not new
            live._count(tensor.untyped_storage())
        live.peak = before = live.now
        sync_weights(policy, rollout)
    extra = live.peak - before
    print(f"{count} processes: {share:.3f} of the learner's state each; the sync holds {extra / layer:.2f} layers more")
    assert share < 1.2 / count and extra <= 2 * layer, (share, extra, layer)
