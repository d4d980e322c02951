"""The runs that faults are put into: three steps of a very small model, a checkpoint after each."""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from run_outputs import metrics_of
from safetensors.torch import load_file
from tiny_recipe import SIZES, tiny_recipe

from dllm_rl import tiny_masked_lm
from dllm_rl.checkpoints import checkpoint
from dllm_rl.models.lora_settings import Lora
from dllm_rl.recipe import Recipe
from dllm_rl.tasks.sudoku import Sudoku

SMALL = SIZES | {"hidden_size": 16, "num_layers": 1, "intermediate_size": 16}
SCENARIOS: dict[str, dict[str, Any]] = {
    "plain": {},
    "beta > 0": {"beta": 0.1},
    "LoRA": {"lora": Lora(r=2), "sft_warmup_steps": 2, "beta": 0.1},
    "two processes": {"beta": 0.1},
}
PROCESSES = {"two processes": 2}


def small_recipe(directory: Path, scenario: str, **changes: Any) -> Recipe:
    settings = {
        "model": partial(tiny_masked_lm, **SMALL),
        "task": Sudoku(split="train", size=32),
        "validation_task": Sudoku(split="validation", size=2),
        "eval_task": Sudoku(split="test", size=2),
        "train_batch_size": 4,
        "sft_warmup_batch_size": 4,
        "num_generations": 2,
        "num_steps": 3,
        "save_steps": 1,
        "learning_rate": 5e-3,
    }
    return tiny_recipe(directory, **settings | SCENARIOS[scenario] | changes)


def outcome(directory: Path) -> tuple[str, list[dict[str, float]]]:
    """What must come out the same whatever happened: the last weights and moments, bit for bit, and the numbers of
    every step."""
    step, folder = checkpoint.list_checkpoints(directory / "checkpoints")[-1]
    tensors = {f"{file.name}: {k}": v for file in folder.rglob("*.safetensors") for k, v in load_file(file).items()}
    for number, moments in torch.load(folder / "optimizer.pt")["state"].items():
        tensors |= {f"{kind} of {number}": value for kind, value in moments.items()}
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].numpy().tobytes())
    return f"{step} {found.hexdigest()}", metrics_of(directory)
