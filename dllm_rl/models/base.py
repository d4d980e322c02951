"""The interface of a policy, the settings of a model family, the encoders and heads in which families differ, and how
the rows of a batch share forwards.

In this package, "stock" means from the transformers library, as opposed to code that comes with a checkpoint.
docs/papers.md explains the tag [paper].
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dllm_rl.models.cache import ColumnCache, default_cache
from dllm_rl.models.lora_settings import Lora

Module = Any  # transformers' or custom; nn.Module would type every member as Tensor | Module
Tokenizer = Any  # transformers' or custom: `make_policy` lists what it needs
Attention = Literal["full", "block_causal", "causal", "encoder_decoder"]
Tokens = Int[Tensor, "B T"]
# A mask with two axes is False on padding; its S columns are those of the cache and then the T new ones. A mask with
# four axes replaces the family's attention mask.
Mask = Bool[Tensor, "B S"] | Bool[Tensor, "B 1 T S"] | Float[Tensor, "B 1 T S"]
States = Float[Tensor, "B T D"]

# The keyword of transformers' forwards for the keys and values of earlier columns, which transformers 5.24 renamed.
CACHE = "cache" if tuple(map(int, version("transformers").split(".")[:2])) >= (5, 24) else "past_key_values"

ESM_VISIBLE = 1 - 0.15 * 0.8  # share of tokens that ESM-2 saw in its training
LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BERT_LINEARS = ("query", "key", "value", "dense", "Wqkv", "Wo", "Wi")
# The fixed cost of a forward (Python, kernel launches, reading weights), as a number of positions. An H200 takes the
# same time for 600 positions of an 8B model as for one. A CPU takes the same time for 100 positions as for one with a
# model of width 96, and for 10 positions with width 512.
FORWARD_COST = {"cpu": 128, "cuda": 1024}


def position_ids(attention_mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Return each token's index in the row's unpadded tokens, from 0. Left padding has index 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def shift_states(states: States, attention_mask: Bool[Tensor, "B T"]) -> States:
    """Return at each t the state at t-1, for families whose state at t-1 predicts the token at t.

    A row's first token keeps its state: it is never sampled, so nothing needs to predict it.
    """
    has_predecessor = torch.cat([torch.zeros_like(attention_mask[:, :1]), attention_mask[:, :-1]], dim=1)
    return torch.where(has_predecessor[..., None], states.roll(1, dims=1), states)


def encode_base(
    module: Module,
    tokens: Tokens,
    attention_mask: Mask,
    positions: Tokens,
    *,
    cache: ColumnCache | None = None,
) -> States:
    """Return the final hidden states of a stock module's backbone.

    `cache` has the keys and values of earlier columns, to which the module appends those of `tokens`.
    """
    inputs = {"attention_mask": attention_mask, "position_ids": positions, "use_cache": cache is not None}
    if cache is not None:
        inputs[CACHE] = cache
    return module.base_model(input_ids=tokens, **inputs).last_hidden_state


def encode_roberta(
    module: Module, tokens: Tokens, attention_mask: Mask, positions: Tokens, **cache_kwargs: Any
) -> States:
    """Encode with RoBERTa, which counts positions from pad_token_id + 1.

    `cache_kwargs` has `cache` of `encode_base`.
    """
    return encode_base(module, tokens, attention_mask, positions + module.config.pad_token_id + 1, **cache_kwargs)


def encode_esm(module: Module, tokens: Tokens, attention_mask: Mask, positions: Tokens, **cache_kwargs: Any) -> States:
    """Encode with ESM, which counts positions as RoBERTa does, and may scale embeddings by the share of visible tokens.

    transformers divides by that share, which is 0 in a row of masks alone; their embeddings are 0 here at any scale.
    """
    config = module.config
    if not config.token_dropout:
        return encode_roberta(module, tokens, attention_mask, positions, **cache_kwargs)
    if attention_mask.dim() > 2:
        raise ValueError(
            f"{type(module).__name__} with token_dropout=True scales a whole row: it needs one text per row"
        )
    is_mask = tokens == config.mask_token_id
    num_visible = (attention_mask & ~is_mask).sum(-1).clamp(min=1)
    scale = ESM_VISIBLE * attention_mask.sum(-1) / num_visible
    embeddings = module.get_input_embeddings()(tokens).masked_fill(is_mask[..., None], 0)
    embeddings = module.base_model.embeddings(
        inputs_embeds=(embeddings * scale[:, None, None]).to(embeddings.dtype),
        attention_mask=attention_mask,
        position_ids=positions + config.pad_token_id + 1,
    )
    inputs = {"attention_mask": attention_mask, "position_ids": positions}
    return module.base_model(inputs_embeds=embeddings, **inputs).last_hidden_state


def block_ranks(spec: "FamilySpec", tokens: Tokens, positions: Tokens) -> tuple[Tokens, Tokens]:
    """Return each token's rank as a key and its rank as a query. A query sees a key if rank_key <= rank_query.

    The rank is the index of the token's block. With `causal_context`, it is the token's position, with one exception: a
    key in a block with a mask token has the block's first position as its rank, so that the full block sees it.
    """
    assert spec.block_size is not None, "a block-causal family has a block size"
    block = positions // spec.block_size
    if not spec.causal_context or spec.mask_id is None:
        return block, block
    masks_in_block = torch.zeros_like(block).scatter_add(1, block, tokens.eq(spec.mask_id).long())
    has_no_mask = masks_in_block.gather(1, block) == 0
    return torch.where(has_no_mask, positions, block * spec.block_size), positions


def block_causal_mask(attention_mask: Bool[Tensor, "B T"], key: Tokens, query: Tokens) -> Bool[Tensor, "B 1 T T"]:
    """Return the mask in which query q sees key k if k is not padding and rank_k <= rank_q (`block_ranks`)."""
    return (attention_mask[:, None, :] & (key[:, None, :] <= query[:, :, None]))[:, None]


def encode_block_causal(
    module: Module, tokens: Tokens, attention_mask: Mask, positions: Tokens, *, spec: "FamilySpec", **cache_kwargs: Any
) -> States:
    """Encode under the block-causal mask, or under `attention_mask` if it has four axes.

    `cache_kwargs` has `cache` of `encode_base`.
    """
    if attention_mask.dim() == 2:  # caches and packed forwards pass the complete mask, with four axes
        attention_mask = block_causal_mask(attention_mask, *block_ranks(spec, tokens, positions))
    return encode_base(module, tokens, attention_mask, positions, **cache_kwargs)


def linear_head(module: Module, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
    """Project hidden states to the vocabulary."""
    return module.get_output_embeddings()(hidden)


def mlm_head(module: Module, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
    """Compute logits with a BERT-type head, which transforms the states before it projects them.

    Raise ValueError if the module has none of the known ones.
    """
    if hasattr(module, "decoder"):  # ModernBERT
        return module.decoder(module.head(hidden))
    for name in ("cls", "lm_head", "predictions"):  # BERT, RoBERTa, ALBERT
        if hasattr(module, name):
            return getattr(module, name)(hidden)
    raise ValueError(
        f"{type(module).__name__} has none of the output layers decoder, cls, lm_head and predictions; pass "
        "make_policy a FamilySpec with its encode and head"
    )


@dataclass(frozen=True)
class CheckpointFiles:
    """How a family's checkpoints are recognized, and how their files become a module of a class of transformers.

    Args:
        architectures: Values of the config's `architectures` that belong to the family; `*` for any text. The first
            family that matches is used: a registered one, then the published ones in the order of `FAMILIES`.
        config_test: Further test of the config's fields, for families that share an architecture.
        stock_model: Function of the config's fields -> (class of transformers, its config). None (default): the
            checkpoint's class is one of transformers.
        tensor_names: Pairs (name in the checkpoint, name in that class) that differ; `*` for a number.
        fused_qkv: The checkpoint's module whose weight has query, key and value rows in this order, if any.
        ignored_tensors: Patterns of the checkpoint's unused tensors.
        mask_vocabulary: Size of the vocabulary in which the family's `mask_id` is the mask. In others it is a token.
        mask_names: Texts of the mask, for a tokenizer without a mask token.
        end_tokens: Further tokens that end a completion, if the tokenizer has them.
        original_config: Fields of the config.json to save. None (default): those of the module's config.
        folder: Folder of the checkpoint. None (default): the spec is of no single checkpoint.
    """

    architectures: tuple[str, ...] = ()
    config_test: Callable[[dict], bool] = lambda config: True
    stock_model: Callable[[dict], tuple] | None = None
    tensor_names: tuple[tuple[str, str], ...] = ()
    fused_qkv: str | None = None
    ignored_tensors: tuple[str, ...] = ()
    mask_vocabulary: int | None = None
    mask_names: tuple[str, ...] = ()
    end_tokens: tuple[str, ...] = ()
    original_config: dict | None = field(default=None, compare=False, repr=False)
    folder: str | None = field(default=None, compare=False, repr=False)

    def match(self, config: dict) -> bool:
        """Return whether a checkpoint with these config fields is of the family."""
        name = (config.get("architectures") or [""])[0]
        return any(fnmatchcase(name, pattern) for pattern in self.architectures) and self.config_test(config)

    def of_stock_class(self) -> "CheckpointFiles":
        """Return the files of a checkpoint in the layout of its class of transformers."""
        return replace(self, stock_model=None, tensor_names=(), fused_qkv=None)


@dataclass(frozen=True)
class FamilySpec:
    """Facts and functions of one family of checkpoints.

    Pass it to `make_policy` for a custom module, or to `register_family` for checkpoints of a new architecture; only
    these need `files`. A checkpoint's class must be one of transformers, or be converted to one by
    `files.stock_model`.

    Args:
        name: Name of the family.
        attention: "full", "causal", "block_causal" (blocks of `block_size` tokens, counted from a row's first token) or
            "encoder_decoder" (a decoder that denoises blocks of random tokens and reads an encoder's cache).
        shift: Whether the state at t - 1 predicts token t. The library shifts the states. Default: False.
        block_size: Positions of a block. None (default): no blocks.
        mask_id: Id of the mask token. None (default): the model has none. For a checkpoint it holds only if the
            vocabulary has `files.mask_vocabulary` tokens, and config and tokenizer name no mask.
        eos_ids: Ids that end a completion.
        max_length: Longest sequence in tokens. None (default): any.
        vocab_size: Number of logits. None (default): that of the module's config.
        encode: Function (module, tokens (B, T), attention_mask, positions (B, T)) -> last hidden states (B, T, D). The
            mask is (B, T), False on padding; a block-causal module also gets (B, 1, T, T), which it uses unchanged.
        head: Function (module, hidden states of any leading shape) -> logits.
        new_cache: Function of the module -> an empty cache (`models.cache.ColumnCache`) of the columns that ran.
            `encode` gets it as the keyword `cache`, appends the columns of `tokens` to it, and attends to all of them;
            the mask is then additive (B, 1, T, S), for the S columns of the cache with the new ones, or, in
            autoregressive sampling, boolean (B, S). Default: transformers' keys and values; for a module without a
            config of transformers, no columns are stored, and `encode` gets no `cache`.
        lora_targets: Names of the linear layers that get adapters.
        files: How checkpoints of the family are recognized and read. Default: the family has no checkpoints.

    Raises:
        ValueError: The attention is not one of these, a number is not a whole one, or "block_causal" has no
            `block_size`, which only a checkpoint's config could then give.
    """

    name: str
    attention: Attention
    shift: bool = False
    block_size: int | None = None
    causal_context: bool = False  # "block_causal": attention within a block without mask tokens is causal
    is_also_causal: bool = False  # the weights also work as an autoregressive model (`as_causal`)
    mask_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    max_length: int | None = None
    vocab_size: int | None = None
    encode: Callable = encode_base
    head: Callable = linear_head
    new_cache: Callable[[Module], ColumnCache] = default_cache
    lora_targets: tuple[str, ...] = LLAMA_LINEARS
    float32_rope: bool = False  # rotary embeddings are applied in fp32 for every dtype of weights
    files: CheckpointFiles = CheckpointFiles()

    def __post_init__(self) -> None:
        of_spec = f"of the spec {self.name!r}"
        if self.attention not in get_args(Attention):
            known = ", ".join(get_args(Attention))
            raise ValueError(f"attention={self.attention!r} {of_spec} is not one of {known}; use one of these")
        if not isinstance(self.eos_ids, tuple | list):
            raise ValueError(f"eos_ids={self.eos_ids!r} {of_spec} is not a tuple of ids; write ({self.eos_ids!r},)")
        numbers = {f"eos_ids[{i}]": (token, 0) for i, token in enumerate(self.eos_ids)} | {"mask_id": (self.mask_id, 0)}
        numbers |= {name: (getattr(self, name), 1) for name in ("block_size", "max_length", "vocab_size")}
        for name, (value, least) in numbers.items():
            if value is not None and (type(value) is not int or value < least):
                raise ValueError(f"{name}={value!r} {of_spec} must be a whole number of at least {least}; correct it")
        if self.attention == "block_causal" and self.block_size is None and not self.files.architectures:
            raise ValueError(f"block_size=None {of_spec}: 'block_causal' attention needs the positions of a block")
        object.__setattr__(self, "eos_ids", tuple(self.eos_ids))


@runtime_checkable
class Head(Protocol):
    """The members of a policy that score a token: hidden states -> logits."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def head(self, hidden: Tensor) -> Tensor: ...


@runtime_checkable
class Policy(Head, Protocol):
    """A model, its tokenizer, and the members that samplers, estimators, quantization and the training loop use.

    `load_policy` and `make_policy` return one. A custom class needs every member; `check_policy` tests it.
    """

    module: Module
    spec: FamilySpec
    tokenizer: Tokenizer
    weights_version: int  # number of weight updates so far
    float32_head: bool  # compute logits of a model in 16 bits (or under autocast) in fp32
    gradient_checkpointing: bool  # run blocks twice: less memory
    lora: Lora | None  # the adapters that are trained instead of the weights
    quantization: Any  # scheme of a quantized copy, or None
    quantization_report: Any  # of a quantized copy

    @property
    def pad_id(self) -> int: ...
    def encode(self, tokens: Tensor, attention_mask: Tensor, positions: Tensor, **cache_kwargs: Any) -> Tensor: ...
    def hidden(self, tokens: Tensor, attention_mask: Tensor) -> Tensor: ...
    def logits(self, tokens: Tensor, attention_mask: Tensor, positions: Tensor | None = None) -> Tensor: ...
    def to(self, device: torch.device | str) -> "Policy": ...
    def save_pretrained(self, directory: str | Path, *, stock: bool = ...) -> None: ...
    def reference(self) -> "Policy": ...


def trainable_parameters(module: Module) -> list[nn.Parameter]:
    """Return the parameters that are trained."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


# Asked here, because torch.compile does not trace the operator.
_HAS_BF16_PRODUCTS = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def has_bf16_products() -> bool:
    """Return whether this machine's CPU multiplies in bf16.

    Otherwise torch emulates bf16, and some products take 60 times as long as in fp32.
    """
    return _HAS_BF16_PRODUCTS


def is_finite(tensor: Tensor) -> bool:
    """Return whether all of a tensor's numbers are finite, without a copy."""
    # If any number is NaN, minimum and maximum are NaN.
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())


def frozen_names(module: Module) -> list[str]:
    """Return the names of the weights that are not trained."""
    return [name for name, parameter in module.named_parameters() if not parameter.requires_grad]


@contextmanager
def in_eval_mode(module: Module) -> Iterator[None]:
    """In this context, let no layer of the module drop anything. Afterwards each layer has the mode that it had."""
    layers: list[Any] = [module]
    for layer in layers:  # faster than `modules()`, which takes as long as the launches of a compiled forward
        layers += layer._modules.values() if layer is not None else ()
    training = [layer for layer in layers if layer is not None and layer.training]
    for layer in training:
        layer.training = False
    try:
        yield
    finally:
        for layer in training:
            layer.training = True


def gather_if_sharded(tensor: Tensor) -> Tensor:
    """Return the full tensor. For a sharded tensor this is a collective: every process must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@contextmanager
def join_uneven_forwards(policy: Any, *, backward: bool = False) -> Iterator[None]:
    """In this context, let processes run different numbers of forwards of a sharded policy.

    A process without remaining rows joins the others' forwards with dummy rows. All processes must enter and leave the
    context together. For an unsharded policy nothing happens.

    Args:
        policy: Policy, sharded or not.
        backward: True if every forward is followed by its backward. False if no forward needs gradients.
    """
    shards = getattr(policy.module, "sharding", None)
    if shards is None:
        yield
        return
    for head in shards.heads:
        head.unshard()  # once, not for every chunk
        head.set_requires_gradient_sync(False)
        head.set_reshard_after_backward(False)
    # Each forward first tells the other processes that it runs.
    announce = shards.backbone.register_forward_pre_hook(lambda *_: shards.anyone(True) and None, prepend=True)
    try:
        yield
    finally:
        announce.remove()
    token = torch.zeros(1, 1, dtype=torch.long, device=policy.device)  # a dummy row, whose gradients are zero
    with torch.set_grad_enabled(backward):
        # A sharded forward is a collective. This process has no forwards left, and joins those of the other processes,
        # which need its shards of the weights.
        while shards.anyone(False):
            states = policy.hidden(token, token == 0)
            if backward:
                states.backward(torch.zeros_like(states))
        for head in shards.heads:
            head.set_requires_gradient_sync(True)
            head.set_reshard_after_backward(True)
        if backward:  # one collective sums the heads' gradients of all chunks
            weight = next(policy.module.parameters())
            leaf = torch.zeros(1, policy.module.config.hidden_size, dtype=weight.dtype, device=policy.device)
            logits = policy.head(leaf.requires_grad_())
            logits.backward(torch.zeros_like(logits))
    for head in shards.heads:
        head.reshard()


def copied(policy: Policy) -> Policy:
    """Return a copy of the policy with a copy of its module. The copies share the tokenizer and the spec."""
    policy_copy = copy.copy(policy)
    policy_copy.module = copy.deepcopy(policy.module)
    return policy_copy


def with_new_layers(policy: Policy) -> Policy:
    """Return a copy of the policy whose module has new layers with the same tensors: what is added to its layers
    changes only the copy.
    """
    tensors: dict[int, Any] = {id(t): t for t in (*policy.module.parameters(), *policy.module.buffers())}
    policy_copy = copy.copy(policy)
    policy_copy.module = copy.deepcopy(policy.module, tensors)
    return policy_copy


@dataclass(frozen=True)
class Bucket:
    """Rows of similar length.

    Args:
        rows: Indices into the batch, in ascending order, on the CPU.
        start: First column that is not padding in every row.
    """

    rows: Int[Tensor, " R"]
    start: int


def length_buckets(
    starts: Int[Tensor, " B"], columns: int, device: torch.device | str, *, forwards: int = 1
) -> list[Bucket]:
    """Divide rows into buckets with the least total cost, and return the bucket of the longest rows first.

    The rows of a bucket run together, without their common padding. Buckets depend only on the batch's padding, so that
    sampling and scoring use the same shapes. The cost of a bucket is rows * columns + forwards * FORWARD_COST.

    Args:
        starts: First column of each row that is not padding, on the CPU.
        columns: Number of columns of the batch.
        device: Device of the model.
        forwards: Number of model calls per bucket; with a cache it is the number of steps.
    """
    # The minimum is exact, by dynamic programming over the distinct starts. Attention's quadratic cost is not counted.
    unique_starts, counts = starts.unique(return_counts=True)  # in ascending order: the longest rows first
    distinct = unique_starts.tolist()
    rows_before = [0, *counts.cumsum(0).tolist()]
    fixed_cost = forwards * FORWARD_COST.get(torch.device(device).type, FORWARD_COST["cuda"])
    least_cost = [0]  # least_cost[n]: least total cost of the rows with the first n distinct starts
    last_begin = [0]  # last_begin[n]: index of the distinct start at which the last of their buckets begins
    for end in range(1, len(distinct) + 1):
        costs = []
        for begin in range(end):
            rows = rows_before[end] - rows_before[begin]
            costs.append(least_cost[begin] + rows * (columns - distinct[begin]) + fixed_cost)
        least_cost.append(min(costs))
        last_begin.append(costs.index(least_cost[-1]))
    buckets = []
    end = len(distinct)
    while end:  # backwards from the shortest rows
        start = distinct[last_begin[end]]
        buckets.append(Bucket(((starts >= start) & (starts <= distinct[end - 1])).nonzero()[:, 0], start))
        end = last_begin[end]
    # A single bucket has all columns, so that its shapes are those of a batch without buckets.
    return buckets[::-1] if len(buckets) > 1 else [Bucket(torch.arange(len(starts)), 0)]
