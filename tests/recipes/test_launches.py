"""The launches of recipes/accelerate, as Accelerate's own launcher reads them, and those that it would not obey."""

import os
import socket
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from refusals import refuses
from tiny_recipe import tiny_recipe

from dllm_rl import main
from dllm_rl.distributed.collectives import make_accelerator
from dllm_rl.training.sharded_learner import check_launch_config
from dllm_rl.training.trainer import train

FOLDER = Path(__file__).parents[2] / "recipes" / "accelerate"
PROCESSES = {"cpu": 1, "cpu_2": 2, "single_gpu": 1, "multi_gpu": 8, "multi_node": 16}


def launched(*words):
    """The launcher's settings, and what it would add to its processes' environment."""
    with socket.socket() as probe:  # the usual port may be taken by another run on this machine
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [*words, "--main_process_port", str(port), "recipe.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    several = arguments.multi_gpu or arguments.use_fsdp
    made = prepare_multi_gpu_env(arguments) if several else prepare_simple_launcher_cmd_env(arguments)[1]
    return arguments, {name: value for name, value in made.items() if os.environ.get(name) != value}


def test_every_launch_is_listed_and_starts_as_many_processes_without_an_engine(monkeypatch):
    assert {path.stem for path in FOLDER.glob("*.yaml")} == PROCESSES.keys()
    for name, count in PROCESSES.items():
        settings, environment = launched("--config_file", str(FOLDER / f"{name}.yaml"))
        assert settings.num_processes == count and settings.multi_gpu == (count > 1), name
        assert settings.use_cpu == name.startswith("cpu"), name
        assert environment["ACCELERATE_MIXED_PRECISION"] == "no", f"{name}: --bf16 is the recipe's"
        with monkeypatch.context() as patched:
            for key, value in environment.items():
                patched.setenv(key, value)
            check_launch_config()


def test_a_config_with_fsdp_is_refused_also_on_a_cpu(tmp_path, monkeypatch):
    settings = yaml.safe_load((FOLDER / "cpu_2.yaml").read_text()) | {"distributed_type": "FSDP"}
    (tmp_path / "fsdp.yaml").write_text(yaml.safe_dump(settings | {"fsdp_config": {"fsdp_version": 2}}))
    _, environment = launched("--config_file", str(tmp_path / "fsdp.yaml"))
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    refuses("distributed_type=FSDP in the launch's config", check_launch_config)


def test_cpu_processes_that_accelerate_does_not_start_are_missed(monkeypatch):
    """`accelerate launch --cpu --num_processes 2` starts one process, and says nothing."""
    for count in ("1", "2"):
        _, environment = launched("--cpu", "--num_processes", count)
        with monkeypatch.context() as patched:
            for key, value in environment.items():
                patched.setenv(key, value)
            if count == "1":
                assert make_accelerator().num_processes == 1
            else:
                refuses(r"asked for several CPU processes and started one.*cpu_2.yaml", make_accelerator)


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("kind", ["FSDP", "MEGATRON_LM", "MULTI_CPU"])
def test_a_script_that_calls_grpo_says_one_line_under_a_launch_that_cannot_work(
    tmp_path, monkeypatch, capsys, kind, rank
):
    """In one process, and no traceback: the launcher's own is long enough."""
    config = {"use_cpu": True, "num_machines": 1, "num_processes": 2, "mixed_precision": "no"}
    config |= {"compute_environment": "LOCAL_MACHINE", "distributed_type": kind}
    more = {"FSDP": {"fsdp_config": {}}, "MEGATRON_LM": {"megatron_lm_config": {"megatron_lm_tp_degree": 1}}}
    (tmp_path / "launch.yaml").write_text(yaml.safe_dump(config | more.get(kind, {})))
    _, environment = launched("--config_file", str(tmp_path / "launch.yaml"))
    for key, value in environment.items() | {("RANK", rank)}:
        monkeypatch.setenv(key, value)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train(tiny_recipe(tmp_path / "run"))
    assert stopped.value.code == 2 and not (tmp_path / "run").exists()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (rank == "0") and all(line.startswith("error: ") for line in lines)
    monkeypatch.setenv("DLLM_RL_TRACEBACK", "1")
    refuses(r"distributed_type=|Accelerate was asked for several", lambda: train(tiny_recipe(tmp_path / "run")))


def test_a_recipe_so_launched_says_one_line_and_ends_with_status_2(tmp_path, monkeypatch, capsys):
    _, environment = launched("--cpu", "--num_processes", "2")
    capsys.readouterr()  # accelerate has named its defaults
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(sys, "argv", ["recipe.py"])
    with pytest.raises(SystemExit) as stopped:
        main(tiny_recipe(tmp_path / "run"))
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and not any(tmp_path.iterdir())
    assert line.startswith("error: Accelerate was asked for several CPU processes and started one") and "cpu_2" in line
