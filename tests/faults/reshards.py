"""A learner shared out over N processes goes on in M, from 2 to 4 in two replicas of halves: prints {"N to M": [exit
status, output, whether the end is bit for bit that of N processes, the largest difference of a weight or moment from
that of one process, metrics of the step]}.

And two processes, of which the second is killed while it writes its part of step 2: {"killed": [exit status, output,
steps saved, true or the resumed run's output]}.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "faults"), str(TESTS / "support"), str(TESTS.parent)]

from child import run  # noqa: E402
from run_outputs import metrics_of  # noqa: E402
from scenarios import small_recipe  # noqa: E402

from dllm_rl import load_policy  # noqa: E402
from dllm_rl.checkpoints import checkpoint  # noqa: E402
from dllm_rl.checkpoints.optimizer_shards import Part, write_part  # noqa: E402
from dllm_rl.recipe import Recipe  # noqa: E402

BEFORE, AFTER = (1, 2, 3, 4), (1, 2, 4)


def recipe(directory: Path, processes: int, **changes: Any) -> Recipe:
    """Two steps of a run whose learner is shared out over all processes; two and four save while they train."""
    settings = {
        "num_steps": 2,
        "train_batch_size": 12,
        "sft_warmup_batch_size": 12,
        "num_generations": 2,
        "save_total_limit": 9,
    }
    settings |= {"shard_size": 0, "async_save": processes in (2, 4), "report_to": None, "collective_timeout": 600.0}
    return small_recipe(directory, "plain", **settings | changes)


def state_of(folder: Path) -> dict[str, Tensor]:
    """Weights and moments of a checkpoint, put together."""
    policy = load_policy(folder)
    optimizer = torch.optim.AdamW(policy.module.parameters())
    checkpoint.load_optimizer(folder, policy, optimizer)
    found = dict(policy.module.state_dict())
    for name, parameter in policy.module.named_parameters():
        found |= {f"{kind} of {name}": value for kind, value in optimizer.state[parameter].items()}
    return found


def pairs(root: Path) -> dict[str, list[Any]]:
    for processes in BEFORE:
        code, out = run(recipe(root / f"{processes}", processes), processes=processes)
        if code:
            raise RuntimeError(out)
    found: dict[str, list[Any]] = {}
    alone = state_of(root / "1" / "checkpoints" / "step-000002")
    for after in AFTER:
        folders = {before: root / f"{before} to {after}" for before in BEFORE}
        for before, folder in folders.items():
            step = "checkpoints/step-000001"
            shutil.copytree(root / f"{before}" / step, folder / step)
        again = [
            recipe(folder, after, resume_from_checkpoint="latest", shard_size=2 if (before, after) == (2, 4) else 0)
            for before, folder in folders.items()
        ]
        code, out = run(*again, processes=after)
        for before, folder in folders.items() if code == 0 else ():
            end = state_of(folder / "checkpoints" / "step-000002")
            own = state_of(root / f"{before}" / "checkpoints" / "step-000002")
            same = all(torch.equal(own[name], end[name]) for name in own)
            far = max((alone[name] - end[name]).abs().max().item() for name in alone)
            found[folder.name] = [code, "", same, far, metrics_of(folder)[-1]]
        if code:
            found[f"to {after}"] = [code, out, False, None, {}]
    return found


def killed(root: Path) -> list[Any]:
    def kill(folder: Path, part: Part) -> dict[str, Any]:
        if part.number == 1 and "step-000002" in folder.name:
            os.kill(os.getpid(), signal.SIGKILL)
        return write_part(folder, part)

    directory, settings = root / "killed", {"num_steps": 3, "lr_schedule_steps": 2}
    checkpoint.write_part = kill
    code, out = run(recipe(directory, 2, **settings), processes=2)
    checkpoint.write_part = write_part
    saved = [step for step, _ in checkpoint.list_checkpoints(directory / "checkpoints")]
    resumed, more = run(recipe(directory, 2, resume_from_checkpoint="latest", num_steps=2), processes=2)
    ends = [state_of(root / name / "checkpoints" / "step-000002") for name in ("2", "killed")] if not resumed else []
    same = bool(ends) and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    return [code, out, saved, same or more]


def main(root: Path) -> dict[str, list[Any]]:
    torch.set_num_threads(1)
    return pairs(root) | {"killed": killed(root)}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
