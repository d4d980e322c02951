"""`python whole_steps.py BACKEND RULES FAMILY_OR_SCHEME...`: compiled steps against the same steps uncompiled.

In a process of its own, because torch cannot trace the tests' type checks. Prints a line for each case: what differs,
and how many graphs two rollouts took. BACKEND "own" compiles as `compile_step` does; a GPU is taken if there is one."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from layouts import checkpoint
from rollouts import fields_of
from torch._dynamo.utils import counters

from dllm_rl import Prompts, load_policy
from dllm_rl.models.tiny import tiny_llama
from dllm_rl.quantization import schemes
from dllm_rl.quantization.rollout_policy import quantized_copy, sync_weights
from dllm_rl.samplers import Unmask, whole_step
from dllm_rl.samplers.cache import BlockCache, DualCache
from dllm_rl.samplers.rules import Confidence, LateSchedule, LeftToRight, MaxProb, PlackettLuce, RandomOrder, Threshold

IDS = [[3, 4, 5], [6, 7, 8, 9, 10, 11, 12], [13]]
SIZES = {
    "characters": "1234.=abcdefgh",
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
RULES = {
    "confidence": {"rank": Confidence()},
    "greedy": {"temperature": 0.0},
    "max_prob": {"rank": MaxProb(), "commit": Threshold(tau=0.9)},
    "random": {"rank": RandomOrder(), "top_k": 5},
    "left_to_right": {"rank": LeftToRight()},
    "plackett_luce": {"rank": PlackettLuce(temperature=0.5), "commit": LateSchedule()},
}


def differing(one, other):
    """The fields in which two rollouts differ by more than rounding."""
    both = ({name: x for name, x in fields_of(each) if isinstance(x, torch.Tensor)} for each in (one, other))
    ours, theirs = both
    found = sorted(ours.keys() ^ theirs.keys())
    for name in ours.keys() & theirs.keys():
        if not torch.allclose(theirs[name].double(), ours[name].double(), rtol=0, atol=1e-4):
            found.append(name)
    return found


def sampled(policy, cache, seed=0, **given):
    options = {"max_new_tokens": 24, "temperature": 1.0, "diffusion_steps": 12, **given}
    options = {"block_size": policy.spec.block_size or 8, **options}
    prompts = Prompts.from_ids(IDS, pad_id=policy.pad_id, num_generations=2)
    generator = torch.Generator().manual_seed(seed)
    return Unmask(cache=cache, **options)(policy, prompts, generator)


def caches_of(policy):
    return [None, BlockCache() if policy.spec.attention == "block_causal" else DualCache(refresh=3)]


def main(backend, rules, names):
    own = whole_step.compiled()
    static = {"dynamic": False, "fullgraph": True}
    compiled = own if backend == "own" else torch.compile(whole_step._step, backend=backend, **static)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in names:
        if name in vars(schemes) or name == "bf16":
            policy = tiny_llama(**SIZES, causal=False, head_std=0.3).to(device)
            scheme = None if name == "bf16" else getattr(schemes, name)()
            copy = quantized_copy(policy, scheme, dtype=torch.bfloat16 if name == "bf16" else None)
        else:
            with tempfile.TemporaryDirectory() as folder:
                copy = policy = load_policy(checkpoint(Path(folder), name)).to(device)
        for cache in caches_of(copy):
            for rule in rules.split(","):
                torch.compiler.reset()
                before = counters["stats"]["unique_graphs"]
                wrong = []
                for seed in range(2):
                    found = []
                    for step in (whole_step._step, compiled):
                        whole_step.compiled = lambda step=step: step
                        found.append(sampled(copy, cache, seed, compile_step=True, **RULES[rule]))
                    wrong += differing(*found)
                    with torch.no_grad():
                        for parameter in policy.module.parameters():
                            parameter.mul_(1.1 if seed == 0 else 1 / 1.1)  # larger weights would round more
                    policy.weights_version += 1
                    if copy is not policy:
                        sync_weights(policy, copy)
                graphs = counters["stats"]["unique_graphs"] - before
                print(name, cache and cache.kind, rule, "differs in", wrong, "graphs", graphs)


def check(backend, rules, *names):
    """Run `main`: nothing differs, and with synced weights and other seeds a second rollout adds no graph."""
    command = [sys.executable, __file__, backend, ",".join(rules), *names]
    with tempfile.TemporaryDirectory() as folder:  # code of another instruction set writes past its buffers
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(rules) * len(names)
    most = {"None": 1, "dual": 2, "block": 2}
    for line in lines:
        assert "differs in []" in line and 1 <= int(line.split()[-1]) <= most[line.split()[1]], line


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
