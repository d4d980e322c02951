"""`--device` and `--dtype`: the same for every command with a model."""

import pytest
import torch
from simulated_cuda import SimulatedCuda

from dllm_rl.cli import options
from dllm_rl.cli.main import main
from dllm_rl.device import find_device
from dllm_rl.models.tiny import tiny_llama

COMMANDS = {
    "sample": ["1=", "--max_new_tokens", "2", "--json"],
    "evaluate": ["--task", "sudoku", "--limit", "1", "--num_steps", "1", "--json"],
    "doctor": ["--num_prompts", "1", "--num_steps", "1", "--quantization", "none", "--json"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16}
    tiny_llama(characters="1234.=", causal=False, **sizes).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def opened(monkeypatch):
    """Device and dtype of the policies that a command opens."""
    found, open_policy = [], options.open_policy

    def spy(*args, **kwargs):
        policy = open_policy(*args, **kwargs)
        found.append((policy.device.type, next(policy.module.parameters()).dtype))
        return policy

    for room in ("main", "evaluate"):
        monkeypatch.setattr(f"dllm_rl.cli.{room}.open_policy", spy)
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_device_and_dtype(command, model, opened, capsys):
    with SimulatedCuda():
        for more in ([], ["--device", "cpu", "--dtype", "bfloat16"], ["--device", "cuda:0", "--dtype", "auto"]):
            assert main([command, model, *COMMANDS[command], *more]) == 0, capsys.readouterr().err
    assert main([command, model, *COMMANDS[command]]) == 0
    full = torch.float32
    assert opened == [("cuda", full), ("cpu", torch.bfloat16), ("cuda", full), ("cpu", full)]
    capsys.readouterr()
    assert main([command, model, *COMMANDS[command], "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "error: device='cuda' is not on this machine, which has cpu\n"


def test_a_device_is_one_that_the_machine_has():
    assert find_device() == find_device("cpu") == torch.device("cpu")
    with SimulatedCuda():
        assert find_device().type == "cuda" and find_device("cuda:0") == torch.device("cuda", 0)
        for name in ("cuda:1", "cuda:", "cuda:x", "tpu", "cpu:1"):
            with pytest.raises(ValueError, match=f"device='{name}' is not on this machine, which has cpu and cuda"):
                find_device(name)
