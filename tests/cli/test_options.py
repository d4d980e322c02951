"""`--device` and `--dtype`: the same for every command with a model."""

from argparse import Namespace

import pytest
import torch
from own_module import own_policy, pretrained_policy, shifted_llama
from simulated_cuda import SimulatedCuda

from dllm_rl.cli import options
from dllm_rl.cli.main import main
from dllm_rl.device import find_device
from dllm_rl.models.tiny import tiny_llama

COMMANDS = {
    "sample": ["1=", "--max_new_tokens", "2", "--json"],
    "evaluate": ["--task", "sudoku", "--limit", "1", "--diffusion_steps", "1", "--json"],
    "doctor": ["--task", "sudoku", "--num_prompts", "1", "--diffusion_steps", "1", "--quantization", "none", "--json"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
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

    for room in ("main", "sample", "evaluate_run"):
        monkeypatch.setattr(f"dllm_rl.cli.{room}.open_policy", spy)
    return found


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.repeated(first_only=True)
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


@pytest.mark.repeated(every=3)
@pytest.mark.parametrize(
    "maker", [own_policy, pretrained_policy, shifted_llama], ids=["plain", "with a config", "with another spec"]
)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_opens_a_custom_modules_checkpoint(command, maker, opened, tmp_path, capsys):
    maker(seed=1).save_pretrained(tmp_path)
    options = [*COMMANDS[command], "--make_model", f"own_module:{maker.__name__}"]
    assert main([command, str(tmp_path), *options]) == 0, capsys.readouterr().err
    assert opened == [("cpu", torch.float32)]
    capsys.readouterr()
    assert main([command, str(tmp_path), *COMMANDS[command]]) == 2
    said = capsys.readouterr().err
    assert "--make_model MODULE:FUNCTION" in said
    assert said.startswith("error: ") and said.count("\n") == 1


@pytest.mark.parametrize("command", [*COMMANDS, "serve", "check-trace"])
def test_the_function_that_makes_a_model_has_one_name(command, capsys):
    """`--model` is a folder of weights, where a command has it."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    usage = " ".join(capsys.readouterr().out.split())
    assert "[--make_model MODULE:FUNCTION]" in usage and usage.count("MODULE:FUNCTION") == 2
    assert usage.count("--model ") == 2 * (command == "check-trace")


@pytest.mark.parametrize(("dtype", "kept"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_custom_modules_weights_are_the_checkpoints(tmp_path, dtype, kept):
    own_policy(seed=1).save_pretrained(tmp_path)
    asked = Namespace(model=str(tmp_path), make_model="own_module:own_policy", dtype=dtype, device="cpu")
    asked.verify_checkpoint = "full"
    found = options.open_policy(asked, half_head=True)
    weights, saved = (policy.module.state_dict() for policy in (found, own_policy(seed=1)))
    assert not found.float32_head and all(torch.equal(weights[name], saved[name].to(kept)) for name in saved)
