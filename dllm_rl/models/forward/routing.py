"""Which experts the tokens of a mixture go to: noted in one forward, and taken again in another's (router replay).

A rollout and a learner that differ in a rounding differ in a whole expert wherever two experts score alike. Replay
takes the choice from the one side; the gate's weights stay the other side's own function of its own scores, at the
experts that are given, and so does their gradient. Source: R3, arXiv 2510.11370 [paper].
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int, Integer, Shaped
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dllm_rl.models.base import Module, Policy

Routes: TypeAlias = tuple[Integer[Tensor, "R W M E"], Bool[Tensor, "R W"]]  # experts, and where they are taken


def mixtures(module: Module) -> list[Any]:
    """The layers that send each token to some of their experts, in the order of the blocks; none in a dense model."""
    return [layer for layer in module.modules() if hasattr(_held(getattr(layer, "experts", None)), "gate_up_proj")]


def _held(experts: Any) -> Any:
    """The module that holds the experts' weights, in stacks or one by one."""
    return getattr(experts, "base_layer", experts)


class Routing(TorchFunctionMode):
    """Forwards inside note the experts that each token takes; with `given` they take those, wherever `where` holds.

    given  (R, W, M, E) ids of experts, for a forward of R rows and W columns and M mixtures of E experts a token.
    where  (R, W); elsewhere a token goes where its own router sends it.

    A stock router ranks its scores (S, experts) by `topk`: that call is what is noted and replaced, so that whatever
    the router makes of its scores stays its own. A block that a backward runs again takes the same experts again.
    A forward of more than W columns is a packed one (`likelihoods.packed`), W clean ones and then the last ones again:
    what is given and noted is of these.
    """

    def __init__(
        self, module: Module, given: Integer[Tensor, "R W M E"] | None = None, where: Bool[Tensor, "R W"] | None = None
    ) -> None:
        super().__init__()
        self.layers, self.given, self.where = mixtures(module), given, where
        self.taken: list[Tensor | None] = [None] * len(self.layers)
        self.layer: int | None = None
        self.hooks: list[list[Any]] = []

    def __enter__(self) -> "Routing":
        hooks = []
        for number, layer in enumerate(self.layers):
            hooks.append(layer.register_forward_pre_hook(partial(self._at, number)))
            hooks.append(layer.register_forward_hook(partial(self._at, None)))
        self.hooks.append(hooks)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.layer = None
        for hook in self.hooks.pop():
            hook.remove()

    def _at(self, number: int | None, *_: Any) -> None:
        self.layer = number

    def __torch_function__(
        self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out, number = func(*args, **(kwargs or {})), self.layer
        if number is None or func not in (torch.topk, Tensor.topk) or not self._ranks_experts(args, number):
            return out
        scores, ids = args[0], out[1]
        if self.given is not None and self.where is not None:
            given, where = (_packed(x, len(ids)).flatten(0, 1) for x in (self.given[:, :, number], self.where))
            ids = torch.where(where[:, None], given.to(ids.dtype), ids)
            out = torch.return_types.topk((scores.gather(-1, ids), ids))
        self.taken[number] = ids
        return out

    def _ranks_experts(self, args: Sequence[Any], number: int) -> bool:
        return bool(args) and args[0].dim() == 2 and args[0].shape[-1] == self.num_experts(number)

    def num_experts(self, number: int) -> int:
        return len(_held(self.layers[number].experts).gate_up_proj)

    def experts(self, rows: int, columns: int | None = None) -> Integer[Tensor, "R W M E"]:
        """What the last forward took, of so many rows and, where it was packed, clean columns; as bytes where ids fit
        in them. Raises ValueError where a router did not choose as stock ones do, or mixtures differ in how many
        experts a token takes."""
        taken = [ids for ids in self.taken if ids is not None]
        if not taken or len(taken) < len(self.layers) or len({ids.shape for ids in taken}) > 1:
            raise ValueError(
                f"router_replay: {len(taken)} of {len(self.layers)} mixtures chose among their experts by one topk of "
                "like size; set router_replay=None"
            )
        narrow = torch.uint8 if max(map(self.num_experts, range(len(taken)))) <= 256 else torch.int16
        experts = torch.stack(taken, dim=1).to(narrow).unflatten(0, (rows, -1))
        if columns is None or experts.shape[1] == columns:
            return experts
        return F.pad(experts[:, columns:], (0, 0, 0, 0, 2 * columns - experts.shape[1], 0))


def _packed(x: Shaped[Tensor, "R W *E"], tokens: int) -> Shaped[Tensor, "R Q *E"]:
    """What is known of a row's columns, for the columns of a forward of so many tokens: nothing of those clean."""
    rows, columns = x.shape[:2]
    if tokens == rows * columns:
        return x
    return torch.cat([torch.zeros_like(x), x[:, 2 * columns - tokens // rows :]], dim=1)


@contextmanager
def routed(policy: Policy, routes: Routes | None, note: Integer[Tensor, "R W M E"] | None) -> Iterator[None]:
    """For the time of one forward of `policy.hidden`, or a packed one: tokens take the experts given, where they are;
    those that they take are written into `note`. Both are of the state that predicts the token there."""
    if routes is None and note is None:
        yield
        return
    with Routing(policy.module, *(() if routes is None else (of_states(policy, x) for x in routes))) as routing:
        yield
    if note is not None:
        note.copy_(of_tokens(policy, routing.experts(*note.shape[:2])))


def of_tokens(policy: Policy, experts: Integer[Tensor, "R W M E"]) -> Integer[Tensor, "R W M E"]:
    """Of the state at each column -> of the state that predicts the token there."""
    return experts.roll(1, dims=1) if policy.spec.shift else experts


def of_states(policy: Policy, x: Tensor) -> Tensor:
    """The reverse, along the second axis; the last column's state predicts nothing, and gets zeros."""
    if not policy.spec.shift:
        return x
    moved = x.roll(-1, dims=1)
    moved[:, -1] = 0
    return moved


def agreement(ours: Integer[Tensor, "S M E"], theirs: Integer[Tensor, "S M E"]) -> Bool[Tensor, "S M E"]:
    """Which of our experts are among theirs."""
    return (ours[..., :, None] == theirs[..., None, :]).any(-1)


def load(experts: Integer[Tensor, "S M E"], num_experts: int) -> Int[Tensor, "M X"]:
    """How many tokens each of `num_experts` experts of each mixture has."""
    by_layer = experts.transpose(0, 1).flatten(1).long()
    return torch.zeros(len(by_layer), num_experts, dtype=torch.long, device=by_layer.device).scatter_add(
        1, by_layer, torch.ones_like(by_layer)
    )
