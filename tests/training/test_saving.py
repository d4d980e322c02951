"""What a run remembers of its saves."""

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from emulated import int3_emulated
from made_run import make_run
from tiny_recipe import SIZES, tiny_recipe

from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.quantization.aligned import aligned_forward
from dllm_rl.quantization.rollout_policy import quantized_copy
from dllm_rl.training import saving


@pytest.mark.parametrize("during", [{}, {"state": "later"}, {"state": "later", "version": 4}])
def test_a_copy_during_which_a_step_ended_is_not_saved(monkeypatch, during):
    """The copy may hold weights of two steps, also where version and state agree again when it is made."""
    policy = SimpleNamespace(weights_version=3, module=torch.nn.Module())
    run = make_run(policy=policy, saved=2)
    state = run.state

    def copied(policy, optimizer):
        if "state" in during:
            run.state = replace(state, step=4, version=during.get("version", 3))
        policy.weights_version = during.get("version", 3)
        return ()

    written = []
    monkeypatch.setattr(saving, "copy_to_host", copied)
    monkeypatch.setattr(saving, "_bind_save", lambda run, state: state)
    monkeypatch.setattr(saving, "_write", lambda run, step, write: written.append((step, write)))
    saving.save_on_peer_loss(run)
    assert written == ([] if during else [(3, state)])


def test_the_copy_of_an_optimizer_is_one_of_the_copied_weights_and_stays_as_it_was():
    policy = tiny_masked_lm(**SIZES)
    optimizer = torch.optim.AdamW(policy.module.parameters())
    optimizer.of_its_class = "kept"

    def step():
        for parameter in policy.module.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    step()
    before = deepcopy(optimizer.state_dict())
    host_policy, copied = saving.copy_to_host(policy, optimizer)
    step()
    assert set(copied.state) == set(host_policy.module.parameters()) and copied.of_its_class == "kept"
    after, now = copied.state_dict(), optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)
    assert not torch.equal(now["state"][0]["exp_avg"], before["state"][0]["exp_avg"])


class Left(BaseException):
    """What a stop raises here to end the run."""


def stopped(monkeypatch, *, version=3, **changes):
    """Whether an overdue stop ended a run after step 3 whose policy has this version, and the steps that it wrote."""
    run = make_run(stop=SimpleNamespace(disarm=lambda: None, leave=leave), **{"saved": 2} | changes)
    if "policy" not in changes:
        run.policy.weights_version = version
    written = []
    monkeypatch.setattr(saving, "write_checkpoint", lambda run: written.append(run.state.step))
    try:
        saving.save_on_overdue_stop(run)
    except Left as left:
        assert str(left) == "stopped in the step after step 3, which is saved; continue with " + (
            "resume_from_checkpoint='latest', output_dir='runs/x'"
        )
        return True, written
    return False, written


def leave(text):
    raise Left(text)


def test_an_overdue_stop_saves_the_last_step_where_weights_are_whole(monkeypatch):
    assert stopped(monkeypatch) == (True, [3])
    assert stopped(monkeypatch, saved=3) == (True, []), "that step is saved already"
    other = SimpleNamespace(is_main_process=False)
    assert stopped(monkeypatch, accelerator=other) == (True, []), "the main process writes"


def test_an_overdue_stop_waits_where_the_weights_are_of_no_step(monkeypatch):
    assert stopped(monkeypatch, version=4) == (False, []), "an update has begun"
    policy = tiny_masked_lm(**SIZES)
    policy.weights_version = 3
    with aligned_forward(policy, quantized_copy(policy, int3_emulated)):
        assert stopped(monkeypatch, policy=policy) == (False, []), "its layers run the rollout's weights"
    assert stopped(monkeypatch, policy=policy) == (True, [3])
    monkeypatch.setattr(saving, "sharding_of", lambda module: "a sharded module's")
    assert stopped(monkeypatch, policy=policy) == (False, []), "no process holds all weights"


def test_before_the_first_stage_of_a_step_a_run_is_between_two_steps(tmp_path):
    """Else the word of another process that this one is lost would name the stage before."""
    log = SimpleNamespace(entered="evaluation")
    stop = SimpleNamespace(last_words="over", agreed=lambda accelerator: 0)
    recipe = tiny_recipe(tmp_path, save_steps=9, num_steps=99)
    run = make_run(recipe=recipe, log=log, stop=stop, policy=SimpleNamespace(weights_version=4))
    saving.install_emergency_saves(run, None)
    assert log.entered == "" and stop.last_words is None
    log.entered = "sync"
    (tmp_path / "metrics.jsonl").touch()
    saving.checkpoint_if_due(run, {})
    assert log.entered == ""


def test_of_a_run_that_saves_adapters_alone_the_last_and_the_best_checkpoint_have_full_weights():
    """The best one only if the run loads it at its end."""

    def merged(step, best_step, loads_best, stop_reason=None):
        recipe = SimpleNamespace(saves_only_adapters=True, num_steps=9, loads_best=loads_best)
        run = SimpleNamespace(recipe=recipe, control=SimpleNamespace(stop_reason=stop_reason))
        return saving.is_merged(run, SimpleNamespace(step=step, best_step=best_step))

    assert merged(4, 4, True) and not merged(4, 4, False) and not merged(4, 2, True)
    assert merged(9, 2, True) and merged(9, 2, False) and merged(4, 2, False, "enough")
