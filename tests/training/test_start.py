"""The start of a run: what a launch cannot run is refused, and what a checkpoint left is set again."""

import errno
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import Accelerator
from tiny_recipe import ONE_PUZZLE, tiny_recipe, with_changes
from tokenizers import processors

from dllm_rl.checkpoints.state import TrainingState
from dllm_rl.monitoring.log import RunLog
from dllm_rl.training import start
from dllm_rl.training.policies import make_optimizer, resumed_policy
from dllm_rl.training.sharded_learner import check_processes
from dllm_rl.training.start import open_log, restore
from dllm_rl.training.trainer import train


@pytest.mark.parametrize("changes", [{"train_batch_size": 8}, {"train_batch_size": 2}, {"sft_warmup_steps": 5}])
def test_batches_that_three_processes_cannot_share_are_refused(tmp_path, changes):
    recipe = tiny_recipe(tmp_path, **{"train_batch_size": 6, "sft_warmup_batch_size": 64, **changes})
    said = {8: "train_batch_size=8 .* 3 processes; the nearest are: 6, 9", 2: "the nearest are: 3"}
    with pytest.raises(ValueError, match=said.get(recipe.train_batch_size, r"warmup\.batch_size=64 .*: 63, 66")):
        check_processes(recipe, 3)
    check_processes(with_changes(recipe, train_batch_size=9, sft_warmup_steps=0), 3)


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_an_engine_of_the_launch_is_refused_before_accelerate_asks_for_its_package(tmp_path, monkeypatch, engine):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    monkeypatch.setattr(start, "make_accelerator", lambda **_: pytest.fail("accelerate opens the engine"))
    with pytest.raises(ValueError, match=f"distributed_type={engine} .* use MULTI_GPU, and shard_size=0"):
        start.launch(tiny_recipe(tmp_path))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The recipe of a run of one step, which is in its folder."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("start") / "run", num_steps=1, num_iterations=2, **ONE_PUZZLE)
    train(recipe)
    return recipe


def test_policy_optimizer_and_log_are_set_to_the_checkpoints_and_the_recipe_is_the_runs(trained, tmp_path):
    recipe = trained
    folder = Path(recipe.directory) / "checkpoints" / "step-000001"
    written = TrainingState.read(folder)
    longer = with_changes(recipe, logging_steps=7)
    policy = resumed_policy(longer, folder, written, Accelerator(cpu=True))
    optimizer = make_optimizer(longer, policy)
    log = RunLog(tmp_path, start=1, main=False)
    state = restore(longer, folder, written, written.contents, policy, optimizer, log)
    assert state == replace(written, recipe=longer.settings()) and state.recipe["log"]["init_args"]["steps"] == 7
    assert (state.step, state.version, policy.weights_version) == (1, 1, 1)
    assert {int(moments["step"]) for moments in optimizer.state.values()} == {2}
    assert log.seconds == written.stages and time.perf_counter() - log.begun >= written.seconds > 0

    said = []
    log.say = said.append
    assert (
        written.begin_ids == []
        and restore(longer, folder, written, written.contents, policy, optimizer, log).begin_ids == []
    )
    assert said == []
    bos = processors.TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 2)])
    policy.tokenizer.backend_tokenizer.post_processor = bos
    for before, text in (([], "nothing"), (None, "nothing"), ([0], "<pad>")):
        state = restore(longer, folder, replace(written, begin_ids=before), written.contents, policy, optimizer, log)
        assert state.begin_ids == [2]
        assert said.pop() == f"note: prompts of plain text began with {text} up to step 1; they begin with <eos> now"


def test_a_resume_prints_its_checkpoint_before_the_model_is_loaded(trained, tmp_path, monkeypatch, capsys):
    """Loading may take minutes, and the watch over other processes has begun by then."""
    shutil.copytree(trained.directory, tmp_path / "run")
    recipe = replace(trained, output_dir=str(tmp_path / "run"))
    monkeypatch.setattr(start, "resumed_policy", lambda *_: pytest.fail("\n".join(capsys.readouterr().out.split())))
    with pytest.raises(pytest.fail.Exception, match=r"resuming\nfrom\n.*step-000001"):
        train(replace(recipe, resume_from_checkpoint="latest"))


def test_a_full_disk_stops_the_log(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, report_to=None)
    log = open_log(recipe, Accelerator(cpu=True), None, None, [])

    def full(handle, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(OSError, match=r"metrics\.jsonl: No space left on device; free disk space and resume"):
            log.write(0, {"reward": 0.5})
    log.close()
