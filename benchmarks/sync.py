"""Cost of refreshing a quantized rollout copy, against the step that makes it necessary; memory of the copy.

step   sample by unmasking in two steps, score the two views, backward through both, AdamW: one RL step without rewards.
sync   quantize every layer of the learner afresh into the rollout's storage, copy the rest.

python -m benchmarks.sync [--device cuda] [--preset tiny] [--dtype bfloat16] [--schemes NAME ...] [--smoke]
                          [--json FILE]
"""

import argparse

import torch

from benchmarks.measure import machine, seconds_and_peak, table, write_json
from benchmarks.presets import PRESETS, make
from dllm_rl.likelihoods.estimators import Trajectory
from dllm_rl.likelihoods.views import each_view
from dllm_rl.quantization import schemes as quantize
from dllm_rl.quantization.rollout_policy import quantized_copy, sync_weights
from dllm_rl.records import subclasses
from dllm_rl.samplers.rules import MaxProb
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.types.rollouts import Prompts

ELSEWHERE = ("FunctionScheme", "FakeQuantize", "Float8ByGPU", "Float8Dynamic", "Int4Packed")
ANYWHERE = [name for name in subclasses(quantize.Scheme) if name not in ELSEWHERE]

SYNCS = 5  # in a row, as one takes little more than the clock's resolution


def arm(scheme: str, preset: str, device: str, dtype: str, repeats: int) -> dict:
    """Seconds of a step and of a sync, their ratio, and MiB of the copy, for one scheme."""
    shape = PRESETS[preset]
    policy, rollout = make(shape, device, getattr(torch, dtype))
    rollout_policy = quantized_copy(policy, None if scheme == "none" else getattr(quantize, scheme)())
    prompts = Prompts.from_ids(rollout.tokens[:, : shape.prompt_length].tolist(), pad_id=policy.pad_id)
    noise = Trajectory().draw_views(rollout, torch.Generator())
    optimizer = torch.optim.AdamW(policy.module.parameters(), lr=1e-6)

    def step() -> None:
        generator = torch.Generator().manual_seed(0)
        length = shape.completion_length
        Unmask(max_new_tokens=length, diffusion_steps=2, temperature=1.0, rank=MaxProb())(
            rollout_policy, prompts, generator
        )
        Trajectory().view_logprobs(policy, rollout, noise)
        for view, weight in zip(each_view(noise), noise.coefficients, strict=True):
            view.backward(policy, rollout, weight / weight.sum())
        optimizer.step()
        optimizer.zero_grad()

    step()
    stepped = seconds_and_peak(step, device, repeats=max(1, repeats // 3))

    def sync() -> None:
        for _ in range(SYNCS):
            sync_weights(policy, rollout_policy)

    synced = seconds_and_peak(sync, device, repeats=repeats)
    report = rollout_policy.quantization_report
    clock = "seconds" if torch.device(device).type == "cuda" else "cpu_seconds"
    return {
        "scheme": scheme,
        "layers": len(report.quantized),
        "step_ms": round(1e3 * stepped[clock], 1),
        "sync_ms": round(1e3 * synced[clock] / SYNCS, 2),
        "sync / step": f"{synced[clock] / SYNCS / stepped[clock]:.2%}",
        "sync_peak_mib": synced["peak_mib"],
        "learner_mib": round(report.bytes_before / 2**20, 1),
        "copy_mib": round(report.bytes_after / 2**20, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--preset", default="tiny", choices=PRESETS)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--schemes", nargs="*", default=["none", *ANYWHERE], help="names in quantization.schemes, or none"
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    if given.smoke:
        given.preset, given.repeats, given.schemes = "smoke", 2, ["none", "Int8WeightOnly", "FakeQuantize"]
    common = {"preset": given.preset, "device": given.device, "dtype": given.dtype, "repeats": given.repeats}
    rows = [arm(scheme, **common) for scheme in given.schemes]
    print(table(rows))
    write_json(given.json, {"benchmark": "sync", **common, **machine(given.device), "rows": rows})


if __name__ == "__main__":
    main()
