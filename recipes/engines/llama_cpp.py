"""llama.cpp computes the rollouts' logits, through the wheel `xllamacpp`: `pip install -e ".[llamacpp]"`.

    recipe = replace(recipe, rollout_quantization=None, rollout_engine=LlamaCpp(format="Q8_0"))

The learner goes out as a GGUF file, opened again at every sync; the samplers of this library unmask and draw.
"""

import ctypes as c
import tempfile
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dllm_rl import Policy
from dllm_rl.models.rollout_engine import RolloutEngine, with_forward
from dllm_rl.records import option
from recipes.engines.gguf_file import Format, write_gguf

PINNED = "2026.10.11549"  # whose structures are declared below
TOKENS = 256  # of a batch, or one longer row: attention runs over the whole batch, and its mask parts the rows
ROWS = 64
SIZES = ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "other1", "other2", "other3", "n_threads", "n_threads_batch")
ARRAYS = ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")


class ModelParams(c.Structure):
    _fields_ = (("rest", c.c_byte * 256),)  # longer than llama.cpp's, which reads its own part


class ContextParams(c.Structure):
    _fields_ = (*((name, c.c_int32) for name in SIZES), ("rest", c.c_byte * 256))


class Batch(c.Structure):
    _fields_ = (("n_tokens", c.c_int32), *((name, c.c_void_p) for name in ARRAYS))


# Takes what llama.cpp logs and does nothing: a function of C, as one of Python may be gone when the last model closes.
SILENT = c.cast(c.CDLL(None).getpid, c.c_void_p)
PROTOTYPES: dict[str, tuple[Any, ...]] = {  # what comes back, then what goes in
    "log_set": (None, c.c_void_p, c.c_void_p),
    "backend_init": (None,),
    "model_default_params": (ModelParams,),
    "model_load_from_file": (c.c_void_p, c.c_char_p, ModelParams),
    "model_free": (None, c.c_void_p),
    "context_default_params": (ContextParams,),
    "init_from_model": (c.c_void_p, c.c_void_p, ContextParams),
    "free": (None, c.c_void_p),
    "get_memory": (c.c_void_p, c.c_void_p),
    "memory_clear": (None, c.c_void_p, c.c_bool),
    "decode": (c.c_int32, c.c_void_p, Batch),
    "get_logits": (c.POINTER(c.c_float), c.c_void_p),
}


@cache
def library() -> c.CDLL:
    """llama.cpp's functions. Raises ValueError where the wheel is missing or another one: its structures may differ."""
    try:
        found = version("xllamacpp")
    except PackageNotFoundError:
        found = "none"
    spec = find_spec("xllamacpp")
    if found != PINNED or spec is None or spec.origin is None:
        wanted = f"rollout_engine=LlamaCpp() needs xllamacpp {PINNED}, whose C structures it declares"
        raise ValueError(f"{wanted}, and {found} is installed: pip install xllamacpp=={PINNED} gguf")
    (file,) = Path(spec.origin).parent.glob("xllamacpp*.so")
    opened = c.CDLL(str(file))
    for name, (result, *arguments) in PROTOTYPES.items():
        function = getattr(opened, f"llama_{name}")
        function.restype = result
        function.argtypes = arguments
    opened.llama_log_set(SILENT, None)
    opened.llama_backend_init()
    return opened


class LlamaCpp(RolloutEngine):
    """Rollouts by llama.cpp: LLaDA's and Dream's layouts by `Unmask` without a cache, causal ones by `Autoregress`.

    Args:
        format: Format of the blocks' matrices; all else is fp32, as in a quantized copy.
        threads: Threads of llama.cpp. None (default): torch's.
    """

    format: Format = "Q8_0"
    threads: int | None = option(default=None, at_least=1)

    def load(self, learner: Policy) -> Policy:
        opened = Llama(learner, self.format, self.threads or torch.get_num_threads())
        rollout_policy = with_forward(learner, opened.forward)
        rollout_policy.module.llama = opened
        return rollout_policy

    def sync(self, learner: Policy, policy: Policy) -> dict[str, float]:
        policy.module.llama.open(learner)
        policy.weights_version = learner.weights_version
        return {}


class Llama:
    """Owns llama.cpp's model and context of a learner's weights."""

    model: int | None = None  # here, for a `close` after an __init__ that raised
    context: int | None = None

    def __init__(self, policy: Policy, format: Format, threads: int) -> None:
        self.lib = library()
        self.format: Format = format
        self.threads = threads
        self.vocab_size = policy.vocab_size
        self.width = 0  # most tokens of a row in the context
        self.open(policy)

    def open(self, policy: Policy) -> None:
        """The learner's weights as they are now, in place of the earlier ones. Raises what `write_gguf` raises."""
        self.close()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "learner.gguf"
            write_gguf(policy, path, format=self.format)
            # The file stays mapped when its name is gone: no process leaves one behind.
            self.model = self.lib.llama_model_load_from_file(str(path).encode(), self.lib.llama_model_default_params())
        if not self.model:
            raise ValueError(f"llama.cpp cannot open {type(policy.module).__name__} as {self.format}")

    def close(self) -> None:
        if self.context:
            self.lib.llama_free(self.context)
        if self.model:
            self.lib.llama_model_free(self.model)
        self.model = self.context = None

    __del__ = close

    def fit(self, width: int) -> None:
        """Make the context fit rows of `width` tokens."""
        if self.context and width <= self.width:
            return
        if self.context:
            self.lib.llama_free(self.context)
        self.width = max(self.width, -(-width // 64) * 64)
        params = self.lib.llama_context_default_params()
        # As many rows as a batch takes: every one has keys and values of the whole width.
        self.rows = min(ROWS, max(1, TOKENS // width))
        params.n_seq_max = self.rows
        params.n_ctx = self.width * self.rows
        params.n_batch = params.n_ubatch = max(TOKENS, self.width)  # attention that is not causal takes a batch whole
        params.n_threads = params.n_threads_batch = self.threads
        self.context = self.lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise ValueError(f"llama.cpp has no memory for {self.rows} rows of {width} tokens: sample shorter ones")

    def forward(
        self, tokens: Int[Tensor, "B T"], attention_mask: Tensor, positions: Int[Tensor, "B T"]
    ) -> Float[Tensor, "B T V"]:
        """Logits at each token; 0 at padding. Raises ValueError in packed scoring."""
        if attention_mask.dim() != 2:
            raise ValueError("rollout_engine=LlamaCpp() computes whole rows, one text each")
        given = [x.cpu() for x in (tokens, attention_mask, positions)]
        longest = int(given[1].sum(-1).max())
        self.fit(longest)
        parts = [x.split(min(self.rows, max(1, TOKENS // longest))) for x in given]
        return torch.cat([self.batch(*part) for part in zip(*parts, strict=True)]).to(tokens.device)

    def batch(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> Float[Tensor, "b T V"]:
        """`forward` of a few rows, each of which sees its own tokens alone."""
        out = torch.zeros(*tokens.shape, self.vocab_size)
        if memory := self.lib.llama_get_memory(self.context):  # causal architectures keep keys and values
            self.lib.llama_memory_clear(memory, True)
        count = int(mask.sum())
        token, pos, row = (x.int().contiguous().numpy() for x in (tokens[mask], positions[mask], mask.nonzero()[:, 0]))
        pointers = row.ctypes.data + 4 * np.arange(count, dtype=np.uintp)
        held = (token, None, pos, np.ones(count, np.int32), pointers, np.ones(count, np.int8))
        code = self.lib.llama_decode(self.context, Batch(count, *(x if x is None else x.ctypes.data for x in held)))
        if code:
            raise RuntimeError(f"llama_decode ended with {code}")
        found = np.ctypeslib.as_array(self.lib.llama_get_logits(self.context), (count, self.vocab_size))
        out[mask] = torch.from_numpy(found)
        return out
