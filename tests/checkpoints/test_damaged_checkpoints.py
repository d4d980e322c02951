"""Damage to a checkpoint is named and skipped, never loaded."""

import json
import os
import resource
import shutil
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from refusals import refuses
from repetitions import slow
from run_outputs import assert_same_weights, metrics_of
from tiny_recipe import SIZES, tiny_recipe

from dllm_rl import load_policy, manifest, tiny_masked_lm
from dllm_rl.checkpoints import checkpoint
from dllm_rl.checkpoints.state import TrainingState
from dllm_rl.cli.main import main
from dllm_rl.models.load import load_weights
from dllm_rl.training.policies import make_optimizer
from dllm_rl.training.trainer import train

pytestmark = pytest.mark.usefixtures("no_rehearsal")

SMALL = partial(tiny_masked_lm, **(SIZES | {"hidden_size": 8, "num_layers": 1, "intermediate_size": 8}))
STATE = TrainingState(step=7, version=0, dtype="float32", recipe={})


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of three steps with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dllm_rl.training.start.rehearse", lambda *_: None)
        train(recipe(folder))
    return folder


@pytest.fixture(scope="module")
def load_optimizer(finished):
    """What a resume does with a checkpoint's optimizer.pt, once its bytes are those of the manifest."""
    policy = load_policy(finished / "checkpoints" / "step-000003")
    policy.weights_version = 3
    optimizer = make_optimizer(recipe(finished), policy)
    return partial(checkpoint.load_optimizer, policy=policy, optimizer=optimizer)


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def recipe(folder, **changes):
    common = {"model": SMALL, "num_steps": 3, "save_steps": 1, "save_total_limit": 9, "learning_rate": 5e-3}
    return tiny_recipe(folder, **{**common, **changes})


def flip(path: Path, at: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def from_another_step(path: Path) -> None:
    shutil.copyfile(path.parents[1] / "step-000001" / path.name, path)


FILES = ("model.safetensors", "optimizer.pt", "state.json", "config.json", "tokenizer.json")


@pytest.mark.parametrize("name", [*FILES, manifest.NAME])
@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink, from_another_step])
def test_latest_skips_what_is_damaged_and_names_it(run, name, damage):
    before, newest = (run / "checkpoints" / f"step-00000{n}" for n in (2, 3))
    content = (newest / name).read_bytes()
    damage(newest / name)
    if (newest / name).is_file() and (newest / name).read_bytes() == content:  # the same in both steps
        return
    said = []
    assert checkpoint.locate("latest", run / "checkpoints", say=said.append) == before
    assert len(said) == 1 and str(newest) in said[0] and name in said[0], said
    refuses(name.replace(".", r"\."), lambda: checkpoint.locate(str(newest), run / "checkpoints"))


def test_a_run_goes_on_from_the_one_before(run, finished, capsys):
    flip(run / "checkpoints" / "step-000003" / "model.safetensors")
    flip(run / "checkpoints" / "step-000002" / "optimizer.pt")
    again = train(recipe(run, resume_from_checkpoint="latest"))
    out = capsys.readouterr().out
    assert "skipped" in out and "step-000003: model.safetensors is damaged" in out.replace("\n", "")
    assert_same_weights(again, json.loads((finished / "summary.json").read_text()))
    assert metrics_of(run) == metrics_of(finished)
    checkpoint.check(run / "checkpoints" / "step-000003")


def test_with_nothing_whole_the_run_stops_and_says_so(run):
    for _, folder in checkpoint.list_checkpoints(run / "checkpoints"):
        truncate(folder / "optimizer.pt")
    with pytest.raises(ValueError, match=r"no checkpoint is whole .*step-000003: optimizer\.pt is damaged"):
        train(recipe(run, resume_from_checkpoint="latest"))


def test_a_folder_under_another_steps_name_is_refused(run):
    shutil.rmtree(run / "checkpoints" / "step-000003")
    shutil.copytree(run / "checkpoints" / "step-000001", run / "checkpoints" / "step-000003")
    with pytest.raises(ValueError, match=r"step is 1 in manifest\.json, but 3 in its name"):
        checkpoint.check(run / "checkpoints" / "step-000003")


def test_a_state_of_another_step_than_the_manifests_is_refused(run):
    folder = run / "checkpoints" / "step-000003"
    from_another_step(folder / "state.json")
    manifest.write(folder, step=3, processes=1, versions={})
    refuses(r"step is 1 in state\.json, but 3 elsewhere", lambda: checkpoint.check(folder))


def test_a_file_that_the_manifest_does_not_know_is_refused(run):
    folder = run / "checkpoints" / "step-000003"
    (folder / "model.safetensors.index.json").write_text("{}")
    refuses(r"model\.safetensors\.index\.json is not in manifest\.json", lambda: checkpoint.check(folder))


def test_an_unknown_format_asks_for_an_upgrade(run, monkeypatch):
    monkeypatch.setattr(manifest, "FORMAT", 2)
    manifest.write(run / "checkpoints" / "step-000003", step=3, processes=1, versions={})
    monkeypatch.undo()
    refuses("format=2 is newer than 1; upgrade", lambda: checkpoint.check(run / "checkpoints" / "step-000003"))


def test_the_manifest_says_what_wrote_it(run):
    found = manifest.verify(run / "checkpoints" / "step-000003")
    assert found["step"] == 3 and found["processes"] == 1 and found["versions"]["torch"] == version("torch")
    assert set(found["files"]) == {*FILES, "tokenizer_config.json"}
    assert (run / "checkpoints" / "latest").read_text() == "step-000003\n"


def test_a_resume_reads_every_byte_of_large_files(run, monkeypatch):
    monkeypatch.setattr(manifest, "HEAD", 64)
    newest = run / "checkpoints" / "step-000003"
    signed(newest)
    flip(newest / "model.safetensors", at=(newest / "model.safetensors").stat().st_size - 3)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: its SHA-256 differs"):
        train(recipe(run, resume_from_checkpoint=str(newest)))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json", "tokenizer.json"])
@pytest.mark.repeated
def test_a_flipped_byte_is_never_loaded(run, name, capsys):
    """By `load_policy` and all that goes through it: no command answers with weights that nobody trained."""
    newest = run / "checkpoints" / "step-000003"
    flip(newest / name)
    said = rf"{name} is damaged: its SHA-256 differs".replace(".", r"\.")
    for check in ("full", "quick"):  # of small files a quick check reads every byte
        with pytest.raises(ValueError, match=said):
            load_policy(newest, verify_checkpoint=check)
    refuses(said, lambda: load_weights(SMALL(), newest))
    refuses(said, lambda: train(recipe(run.parent / "next", model=str(newest))))
    assert not (run.parent / "next" / "checkpoints").exists()
    for command in (["sample", str(newest), "1"], ["evaluate", str(newest), "--task", "sudoku", "--limit", "1"]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert f"{name} is damaged" in error and error.count("\n") == 1


def test_of_a_run_the_commands_take_the_newest_that_is_whole(run, capsys):
    flip(run / "checkpoints" / "step-000003" / "model.safetensors")
    assert main(["sample", str(run), "1", "--max_new_tokens", "1"]) == 0
    assert "step-000003: model.safetensors is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [["sample"], *map(slow, (["evaluate", "--task", "sudoku", "--limit", "1"], ["doctor"]))]
)
def test_a_quick_check_may_be_asked_for(run, command, monkeypatch, capsys):
    newest = run / "checkpoints" / "step-000003"
    monkeypatch.setattr(manifest, "HEAD", 64)
    signed(newest)
    flip(newest / "optimizer.pt", at=(newest / "optimizer.pt").stat().st_size - 3)
    name, *options = command
    small = [] if name == "evaluate" else ["--max_new_tokens", "1"]
    small += ["--task", "sudoku", "--num_prompts", "1", "--quantization", "none"] if name == "doctor" else []
    for model in (newest, run / "only"):
        if model != newest:  # a run whose one checkpoint is damaged
            shutil.copytree(newest, model / "checkpoints" / newest.name)
        texts = ["1"] if name == "sample" else []
        assert main([name, str(model), *texts, *options, *small]) == 2
        assert main([name, str(model), *texts, *options, *small, "--verify_checkpoint", "quick"]) == 0


def test_a_folder_without_a_manifest_is_opened_as_anyones(run):
    newest = run / "checkpoints" / "step-000003"
    (newest / manifest.NAME).unlink()
    load_policy(newest)


def signed(folder: Path) -> None:
    """A manifest of what is there now: who can write a checkpoint can sign it."""
    manifest.write(folder, step=3, processes=1, versions={})


def changed_group(held, **fields):
    return held | {"param_groups": [held["param_groups"][0] | fields]}


def changed_moment(held, **fields):
    return held | {"state": held["state"] | {0: held["state"][0] | fields}}


def test_settings_are_the_recipes_and_not_the_files(run, finished):
    newest = run / "checkpoints" / "step-000002"
    shutil.rmtree(run / "checkpoints" / "step-000003")
    strange = {"lr": 1e300, "weight_decay": 1e300, "eps": -1.0, "betas": (-1.0, 9.0)}
    held = changed_group(torch.load(newest / "optimizer.pt"), **strange)
    del held["param_groups"][0]["foreach"]  # one that is missing is the optimizer's own
    torch.save(held, newest / "optimizer.pt")
    manifest.write(newest, step=2, processes=1, versions={})
    again = train(recipe(run, resume_from_checkpoint="latest"))
    assert_same_weights(again, json.loads((finished / "summary.json").read_text()))


def test_a_pickle_of_code_is_not_run(run, load_optimizer, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    newest = run / "checkpoints" / "step-000003"
    torch.save(changed_moment(torch.load(newest / "optimizer.pt"), exp_avg=Evil()), newest / "optimizer.pt")
    refuses(r"optimizer\.pt is damaged: Weights only load failed", lambda: load_optimizer(newest))
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("content", [b"", b"(", b"PK\x03\x04", b"\x80\x02}q\x00.", b"\x80\x02cposix\nsystem\n."])
def test_an_optimizer_that_is_something_else_is_refused(run, load_optimizer, content):
    newest = run / "checkpoints" / "step-000003"
    (newest / "optimizer.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"optimizer\.pt is damaged") as said:
        load_optimizer(newest)
    assert "\n" not in str(said.value)


def test_a_limit_on_file_sizes_is_not_called_a_full_disk(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    policy = SMALL()
    optimizer = torch.optim.AdamW(policy.module.parameters())
    content = checkpoint.Checkpoint(policy=policy, optimizer=optimizer, state=STATE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=r"MB are free, which is enough\. Look for .* limit on file sizes") as said:
            checkpoint.save(tmp_path, content, keep_last=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "missing" not in str(said.value) and "\n" not in str(said.value)


def test_without_a_manifest_it_is_refused(run, capsys):
    folder = run / "checkpoints" / "step-000003"
    (folder / manifest.NAME).unlink()
    with pytest.raises(ValueError, match=r"^[^\n]*step-000003: manifest\.json is missing$"):
        train(recipe(run, resume_from_checkpoint=str(folder)))
    assert main(["verify", str(folder)]) == 1
    assert "step-000003: manifest.json is missing" in capsys.readouterr().out


class TestWithAManifestOfTheDamage:
    """What a manifest cannot tell, for it was written after the damage."""

    @pytest.fixture
    def newest(self, run) -> Path:
        return run / "checkpoints" / "step-000003"

    def resume(self, newest: Path) -> None:
        manifest.write(newest, step=3, processes=1, versions={})
        train(recipe(newest.parents[1], resume_from_checkpoint=str(newest)))

    @pytest.mark.parametrize(
        ("name", "found"),
        [
            ("model.safetensors", "damaged, or not the model that its config.json describes"),
            ("optimizer.pt", "optimizer.pt is damaged"),
            ("state.json", "state.json is damaged"),
        ],
    )
    def test_a_truncated_file_is_refused(self, newest, name, found):
        truncate(newest / name)
        refuses(f"step-000003: {found}", lambda: self.resume(newest))

    def test_an_emptied_optimizer_is_refused(self, newest):
        moments = torch.load(newest / "optimizer.pt")
        torch.save(moments | {"state": {}}, newest / "optimizer.pt")
        refuses(r"optimizer\.pt holds no moments of .* after 3 updates", lambda: self.resume(newest))

    def test_moments_that_are_not_finite_are_refused(self, newest):
        moments = torch.load(newest / "optimizer.pt")
        moments["state"][0]["exp_avg"].fill_(float("nan"))
        torch.save(moments, newest / "optimizer.pt")
        refuses(r"optimizer\.pt is damaged: exp_avg of .* is not finite; resume from an", lambda: self.resume(newest))


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    from dllm_rl.algorithms.optimizers import AdamW

    policy = SMALL()
    optimizer = AdamW()(policy.module.named_parameters(), 1e-3)
    with torch.no_grad():
        next(policy.module.parameters())[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"step 7 was not saved: .* is not finite"):
        checkpoint.save(tmp_path, checkpoint.Checkpoint(policy=policy, optimizer=optimizer, state=STATE), keep_last=2)
    assert not list(tmp_path.iterdir())
