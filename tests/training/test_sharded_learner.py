"""A learner shared out over processes (FSDP2) runs as one that each process holds whole."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import process_grid
import pytest
import torch
from ranks import run_ranks
from refusals import refuses
from run_outputs import assert_same_weights, metrics_of
from sharded import recipes, trained
from tiny_recipe import tiny_recipe

from dllm_rl import Lora, tiny_masked_lm
from dllm_rl.algorithms.optimizers import AdamW8bit
from dllm_rl.monitoring.json_lines import current_rows
from dllm_rl.monitoring.plots import read_metrics
from dllm_rl.training.sharded_learner import check_launch_config, check_module, check_processes
from dllm_rl.training.trainer import train

ROOT = Path(__file__).parents[2]

CLOSE = {"rel": 2e-3, "abs": 2e-5}
MOVED = ("reward", "advantage", "mismatch")  # numbers of a row, whichever process scored it


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The runs of one process: their folder, and by name their summary and rollouts."""
    folder = tmp_path_factory.mktemp("one")
    return folder, {name: trained(recipe) for name, recipe in recipes(folder).items()}


@pytest.mark.slow
def test_a_learner_shared_out_trains_as_a_whole_one(tmp_path, one):
    """Two replicas of halves, in four processes, whose numbers of forwards differ: metrics and weights to fp32
    rounding, rollouts token by token."""
    run_ranks("import sys, sharded; sharded.train_all(sys.argv[1], 2)", 4, tmp_path)
    folder, runs = one
    for name, (alone, seen) in runs.items():
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        for a, b in zip(metrics_of(folder / name), metrics_of(tmp_path / name), strict=True):
            assert a == pytest.approx(b, **CLOSE)
        assert_same_weights(alone, summary, rtol=0, atol=5e-5)
        for when in ("eval_before", "eval_after", "eval_after_quantized"):
            assert alone[when] == summary[when]
        ranks = [torch.load(path) for path in sorted((tmp_path / name).glob("rollouts-*.pt"))]
        for step, (tokens, logprobs) in enumerate(seen):
            theirs = [torch.cat(parts) for parts in zip(*(rank[step] for rank in ranks), strict=True)]
            assert torch.equal(tokens, theirs[0])
            torch.testing.assert_close(logprobs, theirs[1], rtol=0, atol=1e-4)


@pytest.mark.nightly
def test_three_processes_train_as_one(tmp_path):
    """Whole and shared out: rollouts token by token, the rest to fp32 rounding. `process_grid.py` does many more."""
    process_grid.run_all(tmp_path, 3, (1,), "diffusion-full-iterations-all", "ar-lora-dynamic-all")
    runs = {1: "diffusion-full-iterations-group", 0: "ar-lora-dynamic-group"}
    each = "; ".join(f"g.run_all(sys.argv[1], 3, ({size},), {name!r})" for size, name in runs.items())
    run_ranks(f"import sys, process_grid as g; {each}", 3, tmp_path)
    for size, name in runs.items():
        one, three = tmp_path / "1-1" / name.replace("-group", "-all"), tmp_path / f"3-{size}" / name
        apart, _ = process_grid.differences(one, three)
        assert apart.pop("tokens") == 0
        limits = {"loss": 1e-4, "metrics": 2e-3, "gradients": 1e-4, "weights": 2e-5, "log-probs": 2e-5}
        assert all(apart[kind] < limit for kind, limit in limits.items()), (size, name, apart)
        assert sum(json.loads((three / "traveled.json").read_text())) > 0, "some groups are run by another process"
        for alone, main in zip(*(current_rows(run / "completions.jsonl") for run in (one, three)), strict=True):
            numbers = [[math.nan if row[name] is None else row[name] for name in MOVED] for row in (main, alone)]
            assert numbers[0] == pytest.approx(numbers[1], rel=2e-3, abs=1e-4, nan_ok=True)
            assert (main["prompt"], main["completion"]) == (alone["prompt"], alone["completion"])
        waits = [row[f"waiting/{stage}"] for row in read_metrics(three) for stage in ("rollout", "scoring", "update")]
        assert len(waits) == 9 and min(waits) >= 0 and max(waits) > 0
        if "dynamic" in name:
            assert any(row["dynamic_sampling/draws"] > 1 for row in metrics_of(three))
    for row in torch.load(tmp_path / "1-1" / "diffusion-full-iterations-all" / "gradients.pt"):
        assert row.abs().max() > 1e-4, "there is something to compare"


@pytest.mark.nightly
def test_a_run_goes_on_on_another_number_of_processes(tmp_path, one):
    """From one process to halves on two; and from what these have saved back to one."""
    folder, runs = one
    for name in ("full", "lora"):
        shutil.copytree(folder / name, tmp_path / name, ignore=shutil.ignore_patterns("step-000004", "summary.json"))
    run_ranks("import sys, sharded; sharded.resume(sys.argv[1])", 2, tmp_path)
    for name in ("full", "lora"):
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert_same_weights(runs[name][0], summary, rtol=0, atol=5e-5)
        shutil.copytree(folder / name, tmp_path / "alone" / name)
        more = {"num_steps": 5, "lr_schedule_steps": 4, "resume_from_checkpoint": "latest"}
        ends = [train(recipes(where, **more)[name]) for where in (tmp_path, tmp_path / "alone")]
        assert_same_weights(*ends, rtol=0, atol=5e-5)
        for a, b in zip(*(metrics_of(where / name) for where in (tmp_path, tmp_path / "alone")), strict=True):
            assert a == pytest.approx(b, **CLOSE)


@pytest.mark.slow
def test_processes_with_different_numbers_of_forwards_share_gradients_memory_and_bytes():
    """The last update has no forward at all."""
    run_ranks("import sharded; sharded.uneven([[2, 2], [4, 0], [0, 0]])", 2)


@pytest.mark.slow
def test_copies_syncs_and_gradients_of_published_layouts_are_those_of_a_whole_learner(tmp_path):
    run_ranks("import sys, sharded; sharded.families(sys.argv[1])", 2, tmp_path)


@pytest.mark.nightly
def test_the_plan_of_a_shared_out_learner_agrees_with_the_allocator():
    run_ranks("import sharded; sharded.plan_and_allocator(['full, recomputed', 'adapters'])", 2)


def on_slurm(folder, script, *arguments, **programs):
    """Run a script of recipes/accelerate with these programs (bash) beside a `scontrol` and a `.venv`; return exit
    status, lines, and errors. What a script leaves in the background ends when the file `over` is there.
    """
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").write_text("export ACTIVATED=yes\n")
    programs["scontrol"] = '[ "$1" = show ] && echo first && echo second || echo "$@"'
    for name, lines in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{lines}\n")
        (folder / name).chmod(0o755)
    names = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "120007"}
    names |= {"SLURM_JOB_NODELIST": "n", "SLURM_CPUS_PER_TASK": "8", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    command = ["bash", str(ROOT / "recipes/accelerate" / script), *arguments]
    with open(folder / "out", "w+") as out, open(folder / "err", "w+") as err:  # the background would hold pipes open
        try:
            done = subprocess.run(command, env=os.environ | names, cwd=folder, stdout=out, stderr=err, timeout=60)
        finally:
            (folder / "over").touch()
        out.seek(0), err.seek(0)
        return done.returncode, out.read().splitlines(), err.read()


def test_slurm_starts_a_process_a_task_and_queues_the_job_again_after_its_warning(tmp_path):
    """srun runs two tasks; after SIGUSR1 or SIGTERM they end with 138 or 143, else with what they end with."""
    (tmp_path / "task.py").write_text(
        "import os, sys\n"
        "names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')\n"
        "names += ('SRUN_CPUS_PER_TASK', 'ACTIVATED')\n"
        "print(*(os.environ[name] for name in names), *sys.argv[1:])\n"
        "sys.exit(int(sys.argv[2]))\n"
    )
    python = f'exec {sys.executable} "$@"'
    srun = 'shift\nfor i in 0 1; do\nSLURM_PROCID=$((i + 8)) SLURM_LOCALID=$i "$@"; status=$?\ndone\nexit $status'
    for status, again in AGAIN_AFTER.items():
        found = on_slurm(tmp_path / status, "slurm.sh", "../task.py", "--seed", status, srun=srun, python=python)
        said = [f"{i + 8} {i} 16 first 20007 8 yes --seed {status} --resume_from_checkpoint latest" for i in (0, 1)]
        assert found[1] == said + again and found[0] == int(status), found[2]


AGAIN_AFTER = {"138": ["requeue 120007"], "143": ["requeue 120007"], "130": [], "1": [], "75": []}  # 130: stopped
SRUN = 'while [[ $1 == --* ]]; do shift; done\nexec "$@"'
LEARNER = 'until [ "$(wc -l < started)" -eq 2 ]; do /bin/sleep 0.05; done\n'
LEARNER += 'echo "learns on $RAY_ADDRESS $RAY_AUTH_MODE $*"\nexit $2'
HEALTHY_AT_THIRD = 'echo x >> asked; [ "$(wc -l < asked)" -ge 3 ]'


def fake_ray(*, token="true", start="until [ -e over ]; do /bin/sleep 0.05; done", health=HEALTHY_AT_THIRD):
    """A `ray` whose commands do this; `start` is that of all nodes."""
    cases = {"get-auth-token": token, "start": f'echo "$@" >> started\n{start}', "health-check": health}
    return "\n".join(['case "$1" in', *(f"{name})\n{lines}\n;;" for name, lines in cases.items()), "esac"])


def test_slurm_starts_ray_before_the_learner_and_waits_for_it(tmp_path):
    for status, again in AGAIN_AFTER.items():
        folder = tmp_path / status
        programs = {"srun": SRUN, "ray": fake_ray(), "python": LEARNER, "sleep": "exit 0"}
        ended, said, errors = on_slurm(folder, "slurm_ray.sh", "task.py", status, **programs)
        assert said == [f"learns on first:6379 token task.py {status} --resume_from_checkpoint latest", *again], errors
        assert ended == int(status) and len((folder / "asked").read_text().split()) == 3
        head, others = sorted((folder / "started").read_text().splitlines(), key=lambda line: "--head" not in line)
        assert "--head" in head and "--num-gpus=7" in head and others.startswith("start --address=first:6379")


NO_TOKEN = "echo 'Error: No authentication token found. Use ray get-auth-token' >&2; exit 1"
ENDED = "slurm_ray.sh: Ray's head on first has ended or does not answer; its error is above"


@pytest.mark.parametrize(
    ("commands", "last", "asked"),
    [
        ({"token": NO_TOKEN}, "Error: No authentication token found. Use ray get-auth-token", range(1)),
        ({"start": "exit 3", "health": "echo x >> asked; /bin/sleep 0.5; exit 1"}, ENDED, range(1, 30)),
        ({"start": "exit 0", "health": "echo x >> asked; /bin/sleep 0.5; exit 1"}, ENDED, range(1, 30)),
        ({"health": "echo x >> asked; exit 1"}, ENDED, range(30, 31)),
    ],
    ids=["no token", "the head fails", "the head ends", "no answer"],
)
def test_slurm_gives_its_gpus_back_where_ray_does_not_start(tmp_path, commands, last, asked):
    programs = {"srun": SRUN, "ray": fake_ray(**commands), "python": LEARNER, "sleep": "exit 0"}
    ended, said, errors = on_slurm(tmp_path, "slurm_ray.sh", "task.py", "0", **programs)
    assert (ended, said) == (1, []) and errors.splitlines()[-1] == last
    found = (tmp_path / "asked").read_text().split() if (tmp_path / "asked").exists() else []
    assert len(found) in asked and (tmp_path / "started").exists() == bool(found)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shard_size": 3}, "shard_size=3 must divide the 4 processes"),
        (
            {"sft_warmup_steps": 5, "lora": Lora()},
            "warmup.steps=5 with lora cannot be combined with shard_size=2",
        ),
        ({"zero_mismatch": True, "rollout_quantization": None}, "zero_mismatch=True cannot be combined"),
        ({"optim": AdamW8bit()}, "optim=AdamW8bit cannot be combined"),
    ],
)
def test_what_does_not_go_with_a_shared_out_learner_is_refused(tmp_path, change, said):
    recipe = tiny_recipe(tmp_path, **{"shard_size": 2, **change})
    refuses(said, lambda: check_processes(recipe, 4))
    check_processes(replace(recipe, shard_size=1), 4)
    check_processes(replace(recipe, shard_size=0), 1)


def test_a_module_whose_head_is_tied_or_that_is_not_known_is_refused():
    module = tiny_masked_lm(characters="1234.=", hidden_size=16, num_attention_heads=2).module
    check_module(module, 2)
    module.lm_head.decoder.weight = module.get_input_embeddings().weight
    refuses(r"lm_head.decoder.weight of .* is tied to the backbone's embeddings", lambda: check_module(module, 2))
    with pytest.raises(ValueError, match="needs a transformers module with a backbone and a head, not Linear"):
        check_module(torch.nn.Linear(2, 2), 2)


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_an_engine_of_the_launch_is_refused_also_where_accelerate_would_leave_it_out(monkeypatch, engine):
    check_launch_config()
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    refuses(f"distributed_type={engine} .* use MULTI_GPU, and shard_size=0", check_launch_config)
