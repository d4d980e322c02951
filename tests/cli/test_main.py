"""The command as a whole: its help, and what it refuses."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_recipe import SIZES, tiny_recipe

import dllm_rl.cli.main as commands
from dllm_rl import manifest
from dllm_rl.cli.main import main
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.samplers.rules import MaxProb
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.tasks.protocols import TASKS, protocol_names
from dllm_rl.training.trainer import train

pytestmark = pytest.mark.usefixtures("no_rehearsal")


def test_a_word_that_is_no_option_obeys_no_escape_sequence(capsys):
    with pytest.raises(SystemExit) as raised:
        main(["sample", "a", "b", "--\x1b]0;x\x07\u202e"])
    assert raised.value.code == 2
    said = capsys.readouterr().err
    assert "unrecognized arguments: --␛]0;x␇\ufffd" in said and "\x1b" not in said


def test_help_lists_the_tasks_and_protocols_of_the_table(capsys):
    *others, last = TASKS
    for command, strict in (("evaluate", "strict (default)"), ("grade", "strict")):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        assert f"{', '.join(others)} or {last}" in shown and f"{strict}, d1, spg, espo" in shown
        assert protocol_names()[-1] in shown


@pytest.mark.repeated(every=3)
@pytest.mark.parametrize(
    ("words", "status"),
    [("--help", 0), ("evaluate --help", 0), ("evaluat", 2), ("evaluate model --task sudoku --mistyped 1", 2)],
)
def test_help_and_a_mistyped_word_import_no_torch(words, status):
    program = "import sys; from dllm_rl.cli.main import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program, *words.split()], capture_output=True, text=True)
    assert done.returncode == status and done.stdout.endswith("False\n")


@pytest.mark.parametrize(("flags", "half_head"), [([], False), (["--half_head"], True)])
def test_the_head_is_in_fp32_unless_told_otherwise(monkeypatch, flags, half_head):
    seen = []

    def opened(arguments, **options):
        seen.append(options)
        raise ValueError("this is enough")

    monkeypatch.setattr(commands, "open_policy", opened)
    assert main(["doctor", "folder", "--task", "sudoku", "--quantization", "none", *flags]) == 2
    assert seen == [{"half_head": half_head}]


def test_the_doctor_looks_at_what_the_options_say(monkeypatch, tmp_path):
    tiny_masked_lm(**SIZES).save_pretrained(tmp_path)
    seen = {}

    def looked(policy, scheme, **given):
        seen.update(given, scheme=scheme)
        raise ValueError("this is enough")

    monkeypatch.setattr("dllm_rl.doctor.mismatch.diagnose", looked)
    words = "--quantization none --num_prompts 3 --max_new_tokens 8 --diffusion_steps 4 --temperature 0.5 --seed 7"
    assert main(["doctor", str(tmp_path), "--task", "sudoku", *words.split()]) == 2
    assert (seen["scheme"], seen["seed"], seen["prompts"].group.tolist()) == (None, 7, [0, 0, 1, 1, 2, 2])
    assert seen["sampler"] == Unmask(max_new_tokens=8, diffusion_steps=4, temperature=0.5, rank=MaxProb())


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run of one step with a checkpoint before it and one after it."""
    folder = tmp_path_factory.mktemp("made") / "run"
    train(tiny_recipe(folder, num_steps=1, train_batch_size=1, num_generations=2, rollout_quantization=None))
    return folder


@pytest.fixture
def run(made, tmp_path) -> Path:
    """A copy of it, which a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def test_the_command_says_which_are_whole(run, capsys):
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.count("whole") == 2
    state = run / "checkpoints" / "step-000000" / "state.json"
    state.write_text(state.read_text().replace("0", "1", 1))
    assert main(["verify", str(run)]) == 1
    out = capsys.readouterr().out
    assert out.count("whole") == 1 and "step-000000: state.json is damaged: its SHA-256 differs" in out
    assert main(["verify", str(run / "checkpoints" / "step-000001"), "--quick"]) == 0
    assert main(["verify", str(run.parent)]) == 2
    assert "neither a checkpoint nor a run" in capsys.readouterr().err


def test_a_quick_look_leaves_the_rest_of_large_files_unread(run, monkeypatch, capsys):
    newest = run / "checkpoints" / "step-000001"
    monkeypatch.setattr(manifest, "HEAD", 64)
    manifest.write(newest, step=1, processes=1, versions={})
    damaged = bytearray((newest / "optimizer.pt").read_bytes())
    damaged[-3] ^= 1
    (newest / "optimizer.pt").write_bytes(damaged)
    assert main(["verify", str(newest)]) == 1 and "optimizer.pt is damaged" in capsys.readouterr().out
    assert main(["verify", str(newest), "--quick"]) == 0 and capsys.readouterr().out.startswith("whole ")


def test_lm_eval_without_the_harness_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not there
    for name in ("dllm_rl.cli.harness", "dllm_rl.integrations.lm_eval"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert main(["lm-eval", "--model", "dllm_rl", "--tasks", "gsm8k"]) == 2
    assert "pip install -e '.[harness]'" in capsys.readouterr().err


def test_a_run_that_does_not_exist_is_named_with_those_beside_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/first").mkdir(parents=True)
    assert main(["evaluate", "out/frist"]) == 2
    assert "(out/frist does not exist; out has first; the nearest is first)" in capsys.readouterr().err
    (tmp_path / "out/file").write_text("")
    for command in ("status", "stop", "verify", "compare"):
        assert main([command, "out/frist"]) == 2
        said = capsys.readouterr().err
        assert re.match(r"error: out/frist does not exist; give .*; out has first; the nearest is first\n$", said)
        assert main([command, "out/file"]) == 2 and "out/file is not a folder; give " in capsys.readouterr().err
