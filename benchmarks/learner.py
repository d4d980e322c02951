"""One gradient of the loss with 1, 4 and 16 masks: view by view against a graph through all of them.

plain         scores every view with its graph kept, combines, one backward.
constant      the library's: one forward and backward a view, with the loss's gradient taken once before.
checkpointed  plain, with each view's forward under torch.utils.checkpoint.
trl           the loss of `DiffusionGRPOTrainer`.

python -m benchmarks.learner [--arms plain,constant] [--device cuda] [--preset small] [--masks 1,4,16] [--smoke]
                             [--json FILE]
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import in_fresh_process, machine, seconds_and_peak, speed_up, table, write_json
from benchmarks.presets import PRESETS, make
from dllm_rl.algorithms import losses
from dllm_rl.algorithms.losses import PPOClip
from dllm_rl.likelihoods.estimators import ELBO, LikelihoodEstimator
from dllm_rl.likelihoods.views import each_view
from dllm_rl.models.base import Policy
from dllm_rl.step.update import forward_backward
from dllm_rl.types import Batch


def arm(
    name: str, masks: int, preset: str, device: str, dtype: str, repeats: int, micro_batch_size: int | None
) -> dict:
    """Seconds and MiB of one gradient, and its norm."""
    policy, rollout = make(PRESETS[preset], device, getattr(torch, dtype))
    estimator = ELBO(num_samples=masks)
    noise = estimator.draw_views(rollout, torch.Generator().manual_seed(0))
    scores = estimator.view_logprobs(policy, rollout, noise, micro_batch_size=micro_batch_size)
    old, mask = estimator.combine(scores, noise), rollout.completion_mask
    advantages = torch.linspace(-1, 1, len(mask), device=device)
    ones, count = torch.ones_like(old), int(mask.sum())
    batch = Batch(rollout, noise, advantages, old, scores, ones, mask, None, count, len(mask))
    surrogate = PPOClip()
    loss = partial(losses.policy_loss, surrogate=surrogate, loss_reduction=losses.TokenMean(), beta=0.0, kl=losses.K3())
    parameters = list(policy.module.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter).zero_()  # written to, so that its pages are there
    norms: list[float] = []
    trainer = trl_trainer(policy, estimator, len(mask)) if name == "trl" else None

    def run() -> None:
        for parameter in parameters:
            parameter.grad.zero_()
        if name == "constant":
            forward_backward(policy, batch, scores, loss=loss, likelihood=estimator, micro_batch_size=micro_batch_size)
        elif trainer is not None:
            trainer._compute_loss(policy.module, {"dllm_rl": [([batch], row) for row in range(len(mask))]})
        else:
            through = partial(checkpoint, use_reentrant=False) if name == "checkpointed" else apply
            scored = [through(view.logprobs, policy, rollout) for view in each_view(noise)]
            logps = estimator.combine(torch.stack(scored), noise)
            objective = surrogate(logps - old, advantages, mask)
            (-(objective * mask).sum() / count).backward()
        norms.append(sum(p.grad.double().norm().item() ** 2 for p in parameters) ** 0.5)

    return {"arm": name, "masks": masks, **seconds_and_peak(run, device, repeats=repeats), "gradient_norm": norms[-1]}


def apply(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return function(*arguments)


def trl_trainer(policy: Policy, likelihood: LikelihoodEstimator, rows: int) -> Any:
    """A trainer whose batches have so many rows."""
    from datasets import Dataset
    from trl import GRPOConfig

    import dllm_rl.trl

    prompts = Dataset.from_list([{"prompt": "a"}] * rows)
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            folder,
            max_completion_length=8,
            num_generations=2,
            per_device_train_batch_size=rows,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
        )
        trainer = dllm_rl.trl.DiffusionGRPOTrainer(
            policy, lambda completions, **_: [0.0], args, train_dataset=prompts, likelihood=likelihood
        )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default="plain,constant")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--preset", default="tiny", choices=PRESETS)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--masks", default="1,4,16")
    parser.add_argument("--micro_batch_size", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--json", help="file for the numbers")
    options = parser.parse_args()
    preset, repeats, masks = options.preset, options.repeats, [int(n) for n in options.masks.split(",")]
    if options.smoke:
        preset, repeats, masks = "smoke", 1, [1, 4]
    common = {"preset": preset, "device": options.device, "dtype": options.dtype, "repeats": repeats}
    common["micro_batch_size"] = options.micro_batch_size
    rows = [in_fresh_process(arm, name=name, masks=n, **common) for name in options.arms.split(",") for n in masks]
    for i, row in enumerate(rows):
        first, same = rows[i // len(masks) * len(masks)], rows[i % len(masks)]
        row["memory_against_fewest_masks"] = round(row["peak_mib"] / max(first["peak_mib"], 1e-9), 2)
        row["speed_up"] = speed_up(same, row, options.device)
        apart = abs(row["gradient_norm"] / same["gradient_norm"] - 1)
        assert apart <= (1e-4 if options.dtype == "float32" else 2e-2), f"the arms disagree: {row}, {same}"
    print(table(rows))
    write_json(options.json, {"benchmark": "learner", **common, "machine": machine(options.device), "rows": rows})


if __name__ == "__main__":
    main()
