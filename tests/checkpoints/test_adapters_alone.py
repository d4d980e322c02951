"""Checkpoints of adapters alone: they open with their base, resume, and say when it is gone."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_recipe import with_changes

from dllm_rl import Unmask, load_policy, manifest
from dllm_rl.checkpoints import checkpoint, run_folder
from dllm_rl.cli.main import main
from dllm_rl.models.checkpoint.loading import read_config
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.tiny import tiny_llama
from dllm_rl.training.trainer import train
from recipes.sudoku_unique import recipe_of

base_recipe = recipe_of("llada")

pytestmark = pytest.mark.usefixtures("no_rehearsal")


GREEDY = Unmask(max_new_tokens=16, diffusion_steps=1)


def recipe(directory: Path, base: Path, **fields):
    few = {"train_batch_size": 2, "num_generations": 4, "sft_warmup_steps": 0, "eval_steps": 0, "num_steps": 2}
    few |= {"sampler": replace(base_recipe.sampler, diffusion_steps=4), "eval_sampler": GREEDY}
    few |= {"save_steps": 1, "save_total_limit": 9, "output_dir": str(directory), "report_to": None}
    few |= {"lora": Lora(r=2), "eval_task": replace(base_recipe.validation_task, size=4)}
    few |= {"validation_task": few["eval_task"]}
    return with_changes(base_recipe, model=str(base), **few | fields)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two steps, with every checkpoint."""
    root = tmp_path_factory.mktemp("alone")
    characters = base_recipe.model.keywords["characters"]
    policy = tiny_llama(
        causal=False, hidden_size=32, num_layers=1, num_attention_heads=2, intermediate_size=32, characters=characters
    )
    policy.save_pretrained(root / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dllm_rl.training.start.rehearse", lambda *_: None)
        train(recipe(root / "run", root / "base", dtype="bfloat16"))
    return root


def weights_of(folder: Path, **options) -> dict[str, torch.Tensor]:
    return load_policy(folder, **options).module.state_dict()


def test_only_the_last_checkpoint_holds_merged_weights(run):
    folders = dict(checkpoint.list_checkpoints(run / "run/checkpoints"))
    assert [(folders[n] / "model.safetensors").exists() for n in (0, 1, 2)] == [False, False, True]
    assert all((folders[n] / "adapter/adapter_model.safetensors").exists() for n in (0, 1, 2))
    assert read_config(folders[1]) == read_config(run / "base")


def test_adapters_open_as_the_merged_weights_do(run):
    last = run / "run/checkpoints/step-000002"
    base = weights_of(run / "base", dtype="bfloat16")
    merged = weights_of(last, dtype="auto")
    for dtype in ("auto", "float32"):  # merged in the run's dtype, whatever they are opened in
        alone = weights_of(last / "adapter", dtype=dtype)
        assert alone.keys() == merged.keys()
        assert all(torch.equal(alone[name].float(), merged[name].float()) for name in merged)
    assert next(iter(weights_of(last / "adapter", dtype="auto").values())).dtype == torch.bfloat16
    assert any(not torch.equal(merged[name], base[name]) for name in merged)


def test_the_commands_take_a_checkpoint_of_adapters(run, capsys):
    assert main(["sample", str(run / "run/checkpoints/step-000001"), "12", "--json", "--no_live"]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "bfloat16"


def test_a_resume_goes_on_from_adapters_and_leaves_merged_weights_unread(run, tmp_path, monkeypatch):
    copy = shutil.copytree(run / "run", tmp_path / "run")
    shutil.rmtree(copy / "checkpoints/step-000002")
    resumed = recipe(copy, run / "base", dtype="bfloat16", resume_from_checkpoint="latest")
    train(resumed)
    again, before = (weights_of(r / "checkpoints/step-000002", dtype="auto") for r in (copy, run / "run"))
    assert all(torch.equal(again[name], before[name]) for name in before)
    # A byte in the middle of the merged weights is nothing that the next resume reads.
    file = copy / "checkpoints/step-000002/model.safetensors"
    read = []
    digest = manifest.digest
    monkeypatch.setattr(manifest, "HEAD", 64)
    monkeypatch.setattr(
        manifest, "digest", lambda path, limit=None: (read.append((path.name, limit)), digest(path, limit=limit))[1]
    )
    entries = json.loads((file.parent / manifest.NAME).read_text())
    for name, entry in entries["files"].items():
        entry["head"] = digest(file.parent / name, limit=64)
    entries.pop("sha256")
    (file.parent / manifest.NAME).write_text(json.dumps(entries | {"sha256": manifest._own_digest(entries)}))
    run_folder.open_folder(resumed)
    assert ("model.safetensors", None) not in read and ("optimizer.pt", None) in read


def test_a_base_that_is_gone_is_named_in_one_line(run, tmp_path, capsys):
    long = (
        tmp_path / "a folder with a long name, as clusters have them" / "and one in it"
    )  # the screen has 380 characters
    copy = shutil.copytree(run / "run/checkpoints/step-000001/adapter", long / "adapter")
    config = json.loads((copy / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((run / "base").resolve())
    for base, words in (
        (str(tmp_path / "moved"), "is missing; put it back, name another folder or hub id in adapter_config.json"),
        (None, "names no base"),
        ([1], "names no base"),
    ):
        (copy / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        with pytest.raises(ValueError, match=words) as error:
            load_policy(copy)
        assert "\n" not in str(error.value)
        assert main(["sample", str(copy), "12"]) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(ValueError, match="quantization='nf4' needs a base without adapters"):
        load_policy(run / "run/checkpoints/step-000001", quantization="nf4")


def test_after_a_warm_up_the_base_is_the_runs_own(run, tmp_path):
    train(recipe(tmp_path / "run", run / "base", sft_warmup_steps=1, num_steps=1))
    moved = (tmp_path / "run").rename(tmp_path / "elsewhere")
    last = moved / "checkpoints/step-000001"
    merged, alone = weights_of(last), weights_of(last / "adapter")
    assert all(torch.equal(alone[name], merged[name]) for name in merged)
    reference = weights_of(moved / "reference")
    assert any(not torch.equal(reference[name], tensor) for name, tensor in weights_of(run / "base").items())


def test_the_recipe_is_compared_before_the_bytes_are_read(run, monkeypatch):
    changed = recipe(run / "run", run / "base", dtype="bfloat16", resume_from_checkpoint="latest", seed=1)
    asked = []
    check = checkpoint.check
    monkeypatch.setattr(checkpoint, "check", lambda folder, **given: (asked.append(given), check(folder, **given)))
    with pytest.raises(ValueError, match="seed=1"):
        run_folder.open_folder(changed)
    assert [given["quick"] for given in asked] == [True]


def test_room_is_counted_by_what_is_written(run):
    policy = load_policy(run / "base")
    files = (run / "base/model.safetensors").stat().st_size
    assert 0 <= files - checkpoint.weights_size(policy.module) < 5000  # the header
