"""What the order's part of confidence-ranked unmasking costs: sampling, scoring and update, with and without it.

Processor time of one thread, the arms in turn in one process, the median of `--repeats`.

    python -m benchmarks.order
"""

import argparse
import statistics
import time

import torch

from dllm_rl.likelihoods.estimators import Trajectory
from dllm_rl.likelihoods.views import each_view
from dllm_rl.models.tiny import tiny_llama
from dllm_rl.samplers.rules import Confidence, MaxProb
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.types.rollouts import Prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--diffusion_steps", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    characters = "".join(chr(0x4E00 + i) for i in range(options.vocabulary - 6))
    sizes = {"hidden_size": 256, "num_layers": 6, "num_attention_heads": 4, "intermediate_size": 704, "max_length": 512}
    policy = tiny_llama(characters=characters, causal=False, **sizes)
    prompts = Prompts.from_ids([[5, 6, 7, 8] * 8] * 2, pad_id=policy.pad_id, num_generations=4)
    sampler = Unmask(max_new_tokens=options.length, diffusion_steps=options.diffusion_steps, temperature=1.0)
    seeded = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    sample = lambda rank: sampler.replace(rank=rank)(policy, prompts, seeded())  # noqa: E731
    lawful = sample(Confidence())
    times: dict[str, list[float]] = {}

    def timed(name: str, job: object) -> None:
        start = time.process_time()
        job()  # type: ignore[operator]
        times.setdefault(name, []).append(time.process_time() - start)

    def score(rollout: object, order: bool, *, backward: bool) -> None:
        estimator = Trajectory(include_order=order)
        noise = estimator.draw_views(rollout, seeded())
        if not backward:
            estimator.view_logprobs(policy, rollout, noise)
            return
        for view, weight in zip(each_view(noise), noise.coefficients, strict=True):
            view.backward(policy, rollout, weight)

    for _ in range(options.repeats):
        for rank in (MaxProb(), Confidence()):
            timed(f"sampling, {rank}", lambda rank=rank: sample(rank))
        for order in (False, True):
            timed(f"scoring, {order}", lambda order=order: score(lawful, order, backward=False))
            timed(f"backward, {order}", lambda order=order: score(lawful, order, backward=True))
    policy.module.zero_grad()
    for name, seconds in times.items():
        print(f"{name:24} {statistics.median(seconds):7.3f} s")


if __name__ == "__main__":
    main()
