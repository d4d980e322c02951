"""Every stage of a run at LLaDA-8B's full shapes, on random weights in the published layout and on any device.

Each stage is a process of its own. `own` is its peak of anonymous memory, `mapped` that of file pages (the weights on a
CPU), which the system may drop; `cpu_seconds` is of all its threads. 32 layers take 45 GB of disk.

python -m benchmarks.eight_billion FOLDER [--layers 32] [--stages load,sample] [--json FILE]
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch

from benchmarks.measure import trained
from dllm_rl import Float8WeightOnly, Lora, Unmask, load_policy
from dllm_rl.checkpoints import checkpoint
from dllm_rl.checkpoints.state import TrainingState
from dllm_rl.cli.main import main as command
from dllm_rl.decoding.tokens import text_ids
from dllm_rl.frontend.grpo import grpo_recipe
from dllm_rl.models.base import Policy
from dllm_rl.models.checkpoint.families import find_family
from dllm_rl.models.checkpoint.loading import CONFIGS, build_empty
from dllm_rl.models.checkpoint.tensors import LazyTensor, to_original, write_tensors
from dllm_rl.models.lora import add_lora
from dllm_rl.models.merge import lazy_merged_tensors
from dllm_rl.monitoring.plots import read_metrics
from dllm_rl.quantization.rollout_policy import quantized_copy, sync_weights
from dllm_rl.recipe import Recipe
from dllm_rl.rng import generator_for
from dllm_rl.training.policies import make_optimizer
from dllm_rl.training.trainer import train
from dllm_rl.types.rollouts import SamplingParams

MODEL = "GSAI-ML--LLaDA-8B-Instruct"
SHARD = 2 * 10**9
NEW_TOKENS = 16
ROWS = [{"prompt": f"Count from {n} to {n + 9}: "} for n in range(4)]


class Memory(threading.Thread):
    """The most anonymous and file-backed bytes of this process, in GB, looked at fifty times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = {"RssAnon": 0, "RssFile": 0}
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.02):
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in self.most:
                    self.most[name] = max(self.most[name], int(value.split()[0]) * 1024)


@contextmanager
def timed(into: dict[str, Any], name: str) -> Any:
    begin, work = time.perf_counter(), time.process_time()
    yield
    into[name] = {
        "seconds": round(time.perf_counter() - begin, 2),
        "cpu_seconds": round(time.process_time() - work, 2),
    }


def by_tokens(completions: list[str], **_: Any) -> list[float]:
    """A number from 0 to 1 that differs where the tokens do: `write` gives every id a text of its own."""
    return [crc32(text.encode()) / 2**32 for text in completions]


def recipe(root: Path, **fields: Any) -> Recipe:
    """One prompt, two completions of sixteen tokens in two steps; adapters of rank 128 on a bf16 base."""
    settings: dict[str, Any] = {
        "dtype": "bfloat16",
        "lora": Lora(r=128, alpha=256.0),
        "gradient_checkpointing": True,
        "train_batch_size": 1,
        "num_generations": 2,
        "num_steps": 2,
        "lr_schedule_steps": 2,
        "evaluation": {"batch_size": 2},
        "saves": {"total_limit": 1},
        "log": {"report_to": None},
        "output_dir": str(root / "run"),
        "sampler_options": {"diffusion_steps": 2},
    }
    return grpo_recipe(
        str(root / "base"), ROWS, by_tokens, max_new_tokens=NEW_TOKENS, eval_dataset=ROWS[:2], **settings | fields
    )


def tokenizer(size: int) -> Any:
    """Reads single bytes. Writes an id above the bytes' as its number: a model of random weights writes all ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    numbers = {f"\u0120{i}": i for i in range(len(letters), size)}  # \u0120 is a space among bytes
    made = Tokenizer(models.BPE(vocab=letters | numbers, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def write(root: Path, layers: int) -> dict[str, Any]:
    """The checkpoint, shard by shard: random matrices, norms of 1, and a tokenizer."""
    raw = json.loads((CONFIGS / f"{MODEL}.json").read_text()) | {"n_layers": layers}
    module = build_empty(raw)
    generator = torch.Generator().manual_seed(0)

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        tensor = torch.ones(shape, dtype=torch.bfloat16)
        return tensor if len(shape) == 1 else tensor.normal_(std=0.02, generator=generator)

    shapes = to_original(lazy_merged_tensors(module), find_family(raw), module.config)
    state = {name: LazyTensor(each.shape, torch.bfloat16, partial(random, each.shape)) for name, each in shapes.items()}
    folder = root / "base"
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(state, folder, max_shard_size=SHARD)
    (folder / "config.json").write_text(json.dumps(raw))
    tokenizer(module.config.vocab_size).save_pretrained(folder)
    return {"parameters": sum(each.numel() for each in state.values())}


def dry_run(root: Path, layers: int) -> dict[str, Any]:
    plan = train(recipe(root, dry_run=True))["plan"]
    return {"plan": plan.replace(str(root), "FOLDER").splitlines()}


def opened(root: Path, found: dict[str, Any]) -> Policy:
    with timed(found, "load"):
        return load_policy(root / "base", dtype="auto", verify_checkpoint="quick")


def load(root: Path, layers: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    opened(root, found)
    return found


def prompts_of(policy: Policy) -> Any:
    from dllm_rl.decoding.prompts import encode
    from dllm_rl.tasks.base import Problem

    return encode(policy, [Problem(prompt=ROWS[0]["prompt"])])


def sample(root: Path, layers: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    policy = opened(root, found)
    with timed(found, "sample"):
        Unmask(max_new_tokens=8, diffusion_steps=2)(policy, prompts_of(policy), generator_for(0))
    return found


def score(root: Path, layers: int) -> dict[str, Any]:
    """The log-probs of a row's tokens, all behind masks: forward and backward through adapters."""
    from dllm_rl.models.logprobs import token_logprobs

    found: dict[str, Any] = {}
    policy = opened(root, found)
    policy.gradient_checkpointing = True
    add_lora(policy, Lora(r=128, alpha=256.0))
    tokens = torch.tensor([text_ids(policy, ROWS[0]["prompt"])[:NEW_TOKENS]])
    mask_id = policy.spec.mask_id
    assert mask_id is not None, "LLaDA has one"
    masked = torch.full_like(tokens, mask_id)
    with timed(found, "forward"):
        states = policy.hidden(masked, torch.ones_like(tokens, dtype=torch.bool))
        logps = token_logprobs(policy, states[0], tokens[0], SamplingParams(suppress=(mask_id,)))
    with timed(found, "backward"):
        logps.sum().backward()
    optimizer = make_optimizer(recipe(root), policy)
    with timed(found, "clip and AdamW"):
        torch.nn.utils.clip_grad_norm_([p for p in policy.module.parameters() if p.requires_grad], 1.0)
        optimizer.step()
    return found


def sync(root: Path, layers: int) -> dict[str, Any]:
    """An FP8 copy, and its refresh."""
    found: dict[str, Any] = {}
    policy = opened(root, found)
    add_lora(policy, Lora(r=128, alpha=256.0))
    with timed(found, "copy"):
        rollout_policy = quantized_copy(policy, Float8WeightOnly())
    with timed(found, "sync"):
        sync_weights(policy, rollout_policy)
    return found


def save(root: Path, layers: int) -> dict[str, Any]:
    """A checkpoint of adapters and moments, and one with merged weights."""
    found: dict[str, Any] = {}
    policy = opened(root, found)
    add_lora(policy, Lora())
    run = recipe(root)
    optimizer = make_optimizer(run, policy)
    for parameter in policy.module.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    state = TrainingState.first(run.settings(), policy)
    for merged in (False, True):
        kind = "merged" if merged else "adapters"
        with timed(found, f"save {kind}"):
            content = checkpoint.Checkpoint(
                policy=policy,
                optimizer=optimizer,
                state=replace(state, step=int(merged)),
                base=str(root / "base"),
                merged=merged,
            )
            folder = checkpoint.save(root / "saves", content, keep_last=1)
        found[f"GB {kind}"] = round(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e9, 3)
    return found


def run(of: Recipe) -> dict[str, Any]:
    summary = train(of)
    last = read_metrics(Path(of.directory))[-1:]
    found = {"stages": summary["stages"], "seconds of the run": round(summary["seconds"], 1)}
    return found | trained(last, of.train_batch_size * of.num_generations)


def update(root: Path, layers: int) -> dict[str, Any]:
    """A run of one step; `resume` takes the other."""
    return run(recipe(root, num_steps=1, overwrite_output_dir=True))


def resume(root: Path, layers: int) -> dict[str, Any]:
    return run(recipe(root, resume_from_checkpoint="latest"))


def evaluate(root: Path, layers: int) -> dict[str, Any]:
    """Two problems by the command line, with the adapters of the run's last checkpoint on their base."""
    adapter = str(newest(root) / "adapter")
    options = ["--limit", "2", "--max_new_tokens", "8", "--diffusion_steps", "2", "--json"]
    return {"status": command(["evaluate", adapter, "--task", "countdown", *options])}


def export(root: Path, layers: int) -> dict[str, Any]:
    """To a folder of stock transformers, and the adapters by peft's own reader."""
    from peft import PeftConfig
    from peft.utils import load_peft_weights
    from transformers import AutoConfig

    found: dict[str, Any] = {}
    policy = load_policy(newest(root), dtype="auto", verify_checkpoint="quick")
    with timed(found, "export"):
        policy.save_pretrained(root / "stock", stock=True)
    adapter = newest(root) / "adapter"
    found["peft"] = {"r": PeftConfig.from_pretrained(str(adapter)).r, "tensors": len(load_peft_weights(str(adapter)))}
    return found | {"stock class": AutoConfig.from_pretrained(root / "stock").architectures}


def newest(root: Path) -> Path:
    return checkpoint.list_checkpoints(root / "run/checkpoints")[-1][1]


STAGES: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    stage.__name__: stage
    for stage in (write, dry_run, load, sample, score, sync, save, update, resume, evaluate, export)
}


def measured(name: str, root: Path, layers: int) -> dict[str, Any]:
    """A stage's result, with its time and memory; for a process of its own."""
    watch = Memory()
    begin = time.perf_counter()
    watch.start()
    found = STAGES[name](root, layers)
    watch.ended.set()
    watch.join()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    took = {"seconds": round(time.perf_counter() - begin, 1), "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1)}
    memory = {"own_gb": watch.most["RssAnon"] / 1e9, "mapped_gb": watch.most["RssFile"] / 1e9}
    return took | {key: round(value, 2) for key, value in memory.items()} | found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where checkpoint and run are written")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--stages", default=",".join(STAGES), help="by commas (default: all, in this order)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--in_process", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    root = arguments.folder.resolve()
    if arguments.in_process:
        print("RESULT" + json.dumps(measured(arguments.in_process, root, arguments.layers)))
        return 0
    found: dict[str, Any] = {"layers": arguments.layers, "threads": torch.get_num_threads(), "stages": {}}
    found["cpu"] = torch.backends.cpu.get_cpu_capability()
    if arguments.json is not None and arguments.json.exists():  # further stages of the same checkpoint
        found["stages"] = json.loads(arguments.json.read_text())["stages"]
    own = [sys.executable, "-m", "benchmarks.eight_billion", str(root), "--layers", str(arguments.layers)]
    failed = 0
    for name in arguments.stages.split(","):
        # Freed memory goes back to the system at once: the peak is of tensors, not of the allocator's heap.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run([*own, "--in_process", name], capture_output=True, text=True, env=environment)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
        if lines:
            found["stages"][name] = json.loads(lines[-1].removeprefix("RESULT"))
        else:
            failed += 1
            found["stages"][name] = {"failed": done.returncode, "error": done.stderr.strip().splitlines()[-3:]}
        shown = {key: value for key, value in found["stages"][name].items() if key != "plan"}
        print(f"{name:9} {json.dumps(shown)}", flush=True)
        if arguments.json is not None:  # after every stage: a long run may be stopped
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
