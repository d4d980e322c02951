"""What heads in 16 bits add to the difference between the log-probs of two forwards that should agree.

batch shape  the same rows scored all at once and one by one.
padding      the same rows with three columns of padding in front.
rollout      the sampler's own record of an unquantized rollout, and the learner's scoring of it.
cache        the same of the model made causal: token by token with a key-value cache, and in one forward.
int8         the rows scored with the weights in int8, and as they are.

python -m benchmarks.head_precision [--preset small] [--dtype bfloat16] [--smoke] [--json FILE]
"""

import argparse
from dataclasses import replace

import torch

from benchmarks.measure import machine, table, write_json
from benchmarks.presets import PRESETS, make
from dllm_rl.doctor.mismatch import PADDING, pad_left
from dllm_rl.likelihoods.estimators import Causal, OneStep, Trajectory
from dllm_rl.models.policy import make_policy
from dllm_rl.quantization.rollout_policy import quantized_copy
from dllm_rl.quantization.schemes import Int8WeightOnly
from dllm_rl.samplers.autoregress import Autoregress
from dllm_rl.samplers.rules import MaxProb
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.types.rollouts import Prompts

SHARPER = 8  # on the head's weights: logits of a standard deviation of about 4, as a trained model's


def measured(preset: str, dtype: str, *, float32_head: bool) -> list[dict]:
    """Mean and largest |log-ratio|, nats, for one head."""
    shape = replace(PRESETS[preset], vocabulary=min(PRESETS[preset].vocabulary, 16_384), completion_length=32)
    policy, rollout = make(shape, "cpu", getattr(torch, dtype))
    policy.module.lm_head.weight.data *= SHARPER
    policy.float32_head = float32_head
    noise = OneStep(prompt_mask=0.0).draw_views(rollout, torch.Generator())
    whole = OneStep().logprobs(policy, rollout, noise)
    apart = whole - OneStep().logprobs(policy, rollout, noise, micro_batch_size=1)
    rows = [{"between": "batch shape", **sizes(apart[rollout.completion_mask])}]

    wider, padded_noise = pad_left(rollout, noise, policy.pad_id)
    apart = whole - OneStep().logprobs(policy, wider, padded_noise)[:, PADDING:]
    rows.append({"between": "padding", **sizes(apart[rollout.completion_mask])})

    start = slice(shape.prompt_length)
    prompts = Prompts(rollout.tokens[:, start], rollout.attention_mask[:, start], rollout.group)
    options = {"max_new_tokens": shape.completion_length, "diffusion_steps": 4, "temperature": 1.0, "rank": MaxProb()}
    sampled = Unmask(**options)(policy, prompts, torch.Generator().manual_seed(0))
    exact = Trajectory()
    learner = exact.logprobs(policy, sampled, exact.draw_views(sampled, torch.Generator()), micro_batch_size=2)
    rows.append({"between": "rollout", **sizes((learner - sampled.logprobs)[sampled.completion_mask])})
    fewer = quantized_copy(policy, Int8WeightOnly())
    apart = whole - OneStep().logprobs(fewer, rollout, noise)
    rows.append({"between": "int8", **sizes(apart[rollout.completion_mask])})

    policy.module.config.is_causal = True
    causal_policy = make_policy(policy.module, policy.tokenizer)
    causal_policy.float32_head = float32_head
    generator = torch.Generator().manual_seed(0)
    sampled = Autoregress(max_new_tokens=shape.completion_length)(causal_policy, prompts, generator)
    learner = Causal().logprobs(causal_policy, sampled, Causal().draw_views(sampled, torch.Generator()))
    rows.append({"between": "cache", **sizes((learner - sampled.logprobs)[sampled.completion_mask])})
    head = "fp32" if float32_head else dtype
    return [{"dtype": dtype, "head": head, **row} for row in rows]


def sizes(d: torch.Tensor) -> dict[str, float]:
    return {"mean_abs": float(f"{d.abs().mean():.3g}"), "max_abs": float(f"{d.abs().max():.3g}"), "tokens": d.numel()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small", choices=PRESETS)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--json", help="file for the numbers")
    options = parser.parse_args()
    preset = "smoke" if options.smoke else options.preset
    rows = [row for high in (False, True) for row in measured(preset, options.dtype, float32_head=high)]
    print(table(rows))
    write_json(options.json, {"benchmark": "head_precision", "preset": preset, "machine": machine("cpu"), "rows": rows})


if __name__ == "__main__":
    main()
