"""What router replay costs a step of a mixture of experts: sampling, scoring and update, with and without it.

Processor time of one thread, the arms in turn in one process, the least of `--repeats` rounds.

    python -m benchmarks.experts
"""

import argparse
from functools import partial

import torch

from benchmarks.measure import fastest, machine, table, write_json
from dllm_rl.likelihoods.estimators import Trajectory
from dllm_rl.likelihoods.router_replay import with_sampled_experts
from dllm_rl.likelihoods.routing_agreement import routing_counts
from dllm_rl.likelihoods.views import each_view
from dllm_rl.models.tiny import tiny_moe
from dllm_rl.quantization.rollout_policy import quantized_copy
from dllm_rl.quantization.schemes import Float8WeightOnly
from dllm_rl.samplers.rules import MaxProb
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.types import Prompts, Rollout, Views


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--num_experts", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--diffusion_steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    policy = tiny_moe(
        characters="".join(chr(0x4E00 + i) for i in range(2000)),
        hidden_size=options.width,
        moe_intermediate_size=options.width // 2,
        num_experts=options.num_experts,
        num_experts_per_tok=4,
        num_layers=4,
        max_length=512,
    )
    rollout_policy = quantized_copy(policy, Float8WeightOnly())
    prompts = Prompts.from_ids([[5, 6, 7, 8] * 8] * 2, pad_id=policy.pad_id, num_generations=4)
    settings = {
        "max_new_tokens": options.length,
        "diffusion_steps": options.diffusion_steps,
        "temperature": 1.0,
        "rank": MaxProb(),
    }

    def sample(record: bool) -> Rollout:
        rollout_policy.records_experts = record
        return Unmask(**settings)(rollout_policy, prompts, torch.Generator().manual_seed(0))

    estimator, rollout = Trajectory(), sample(True)
    noise = estimator.draw_views(rollout, torch.Generator())
    replay = with_sampled_experts(noise, rollout)

    def update(masks: Views) -> None:
        for view, weight in zip(each_view(masks), masks.coefficients, strict=True):
            view.backward(policy, rollout, weight)

    score = partial(estimator.view_logprobs, policy, rollout)
    best = fastest(
        {
            "rollout": partial(sample, False),
            "rollout, experts noted": partial(sample, True),
            "scoring": partial(score, noise),
            "scoring, R3": partial(score, replay),
            "update": partial(update, noise),
            "update, replayed": partial(update, replay),
            "agreement and load (always on)": partial(routing_counts, policy, rollout_policy, rollout, noise),
        },
        options.repeats,
    )
    step = best["rollout"] + best["scoring"] + best["update"]
    rows = [{"part": name, "s": round(each, 4), "of a step": round(each / step, 3)} for name, each in best.items()]
    assert rollout.experts is not None
    noted = rollout.experts[0, 0].numel() * rollout.experts.element_size()
    print(table(rows), f"\n{noted} bytes a token are noted")
    write_json(options.json, {"machine": machine("cpu"), "options": vars(options), "rows": rows})


if __name__ == "__main__":
    main()
