"""Log-probs of masked completions: the chunked head against full logits, on the same model in one run.

plain    logits of every position (B, T, V), fp32 log-softmax, gather; its graph for the backward.
chunked  the head on scored positions only, in chunks; in the backward each chunk is made once and dropped.

python -m benchmarks.scoring [--device cuda] [--preset small] [--dtype bfloat16] [--smoke] [--json FILE]
"""

import argparse

import torch

from benchmarks.measure import in_fresh_process, machine, seconds_and_peak, speed_up, table, write_json
from benchmarks.presets import PRESETS, make
from dllm_rl.likelihoods.estimators import OneStep
from dllm_rl.likelihoods.views import View


def plain(policy, rollout, masked, scored) -> torch.Tensor:
    """log p (B, T) from full logits."""
    logits = policy.logits(rollout.tokens.masked_fill(masked, policy.spec.mask_id), rollout.attention_mask).float()
    logits[..., list(rollout.sampling_params.suppress)] = -torch.inf
    logps = logits.log_softmax(-1).gather(-1, rollout.tokens[..., None])[..., 0]
    return torch.where(scored, logps, 0)


def arm(name: str, task: str, preset: str, device: str, dtype: str, repeats: int) -> dict:
    """Seconds, MiB and a fingerprint of the result, for one way of doing one task."""
    policy, rollout = make(PRESETS[preset], device, getattr(torch, dtype))
    noise = OneStep(prompt_mask=0.0).draw_views(rollout, torch.Generator().manual_seed(0))
    masked, scored = noise.masked[0], noise.coefficients[0] != 0
    view = View(masked, scored)
    vector = torch.linspace(-1, 1, scored.numel(), device=device).view(scored.shape) * scored
    parameters = list(policy.module.parameters())

    def score() -> None:
        with torch.no_grad():
            logps = plain(policy, rollout, masked, scored) if name == "plain" else view.logprobs(policy, rollout)
            found.append(logps.sum().item())

    def update() -> None:
        for parameter in parameters:
            parameter.grad.zero_()
        if name == "plain":
            plain(policy, rollout, masked, scored).backward(vector)
        else:
            view.backward(policy, rollout, vector)
        found.append(sum(p.grad.double().norm().item() ** 2 for p in parameters) ** 0.5)

    for parameter in parameters:  # gradients exist before the clock starts: both ways need them
        parameter.grad = torch.zeros_like(parameter).zero_()  # written to, so that its pages are there
    found: list[float] = []
    measured = seconds_and_peak(score if task == "score" else update, device, repeats=repeats)
    return {"task": task, "arm": name, **measured, "result": found[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--preset", default="small", choices=PRESETS)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--json", help="file for the numbers")
    options = parser.parse_args()
    preset, repeats = ("smoke", 1) if options.smoke else (options.preset, options.repeats)
    common = {"preset": preset, "device": options.device, "dtype": options.dtype, "repeats": repeats}
    pairs = [(task, name) for task in ("score", "update") for name in ("plain", "chunked")]
    rows = [in_fresh_process(arm, name=name, task=task, **common) for task, name in pairs]
    for first, second in (rows[:2], rows[2:]):
        apart = abs(first["result"] - second["result"]) / abs(first["result"])
        assert apart <= (1e-4 if options.dtype == "float32" else 2e-2), f"the arms disagree: {first}, {second}"
        second["memory_share"] = round(second["peak_mib"] / max(first["peak_mib"], 1e-9), 3)
        second["speed_up"] = speed_up(first, second, options.device)
        first["memory_share"], first["speed_up"] = 1.0, 1.0
    print(table(rows))
    write_json(options.json, {"benchmark": "scoring", **common, "machine": machine(options.device), "rows": rows})


if __name__ == "__main__":
    main()
