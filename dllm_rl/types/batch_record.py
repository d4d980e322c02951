"""Records of tensors with one entry per row: moved, merged and split as one, and copied for user code.

Axes: B rows, one per completion; P groups of rows that share a prompt; S prompt positions, T positions (prompt and
completion), V vocabulary. The rows of a group are adjacent, and groups may have different sizes.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from types import FunctionType
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

MovableT = TypeVar("MovableT", bound="Movable")
CopiedT = TypeVar("CopiedT", bound="Copied")
RecordT = TypeVar("RecordT", bound="BatchRecord")


class Copied:
    """Base of the dataclasses of tensors that user code gets as copies (`given_copies`), because it may write into
    them.
    """

    def copied(self: CopiedT) -> CopiedT:
        """Return a copy with tensors of its own."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        copies = {field.name: copy_of(getattr(self, field.name)) for field in fields if field.init}
        return dataclasses.replace(self, **copies)  # type: ignore[type-var]


def copy_of(value: Any) -> Any:
    """Return a copy of a tensor, of a `Copied`, or of a tuple of them; any other value as it is."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Copied):
        return value.copied()
    return tuple(map(copy_of, value)) if type(value) is tuple else value


def given_copies(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a method of a user's class to get copies (`copy_of`) of its arguments."""

    @wraps(method)
    def wrapped(self: Any, *arguments: Any, **keywords: Any) -> Any:
        return method(self, *map(copy_of, arguments), **{name: copy_of(value) for name, value in keywords.items()})

    return wrapped


def decorate_own(kind: type, decorator: Callable[..., Any], *methods: str) -> None:
    """Decorate those of these methods that a class outside of the library defines, or a mixin of it. Call it in
    `__init_subclass__`.
    """
    for name in methods:
        method = getattr(kind, name, None)
        is_own = not getattr(method, "__module__", "dllm_rl.").startswith("dllm_rl.")
        if isinstance(method, FunctionType) and is_own and not hasattr(method, "is_decorated"):
            decorated = decorator(method)
            decorated.is_decorated = True
            setattr(kind, name, decorated)


@dataclass(frozen=True)
class Movable(Copied):
    """Base of the records whose tensors move to a device together, and which are cut to some rows together.

    Attributes:
        ROW_AXIS: Axis of the rows in tensors of more than one axis. A vector has one entry per row.
    """

    ROW_AXIS: ClassVar[int] = 0

    def to(self: MovableT, device: torch.device | str) -> MovableT:
        return self.map(lambda x: x.to(device))

    def map(self: MovableT, f: Callable[[Tensor], Tensor]) -> MovableT:
        """Apply `f` to every tensor, including the tensors of nested records, in the order of the fields."""
        changes: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changes[field.name] = f(value)
            elif isinstance(value, Movable):
                changes[field.name] = value.map(f)
            elif isinstance(value, tuple):  # of records, such as the features of views
                changes[field.name] = tuple(x.map(f) if isinstance(x, Movable) else x for x in value)
        return dataclasses.replace(self, **changes)

    def tensors(self) -> list[Tensor]:
        """Return all tensors in the order of `map`."""
        tensors: list[Tensor] = []

        def collect(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return tensor

        self.map(collect)
        return tensors

    def rows(self: MovableT, keep: Int[Tensor, " R"], columns: slice = slice(None)) -> MovableT:
        """Return the rows with the indices `keep`, in this order, cut to `columns`."""
        before: tuple[Any, ...] = (slice(None),) * self.ROW_AXIS
        return self.map(lambda x: x[keep] if x.dim() == 1 else x[(*before, keep)][(*before, slice(None), columns)])


@dataclass(frozen=True)
class BatchRecord(Movable):
    """A record of per-row data: tensors (B, T) or (B, T, C), vectors (B,), and nested records of the same kind.

    Attributes:
        FILL: Padding value of each field where a row has no token. Fields that are not listed are padded with 0.
        IF_NONE: Value everywhere of a field (B, T) that is None.
        MAY_DIFFER: Fields without rows that may differ between records that are merged; the first one's is taken.
    """

    FILL: ClassVar[dict[str, Any]] = {}
    IF_NONE: ClassVar[dict[str, int | float]] = {}
    MAY_DIFFER: ClassVar[tuple[str, ...]] = ()

    def padded(self: RecordT, columns: int, *, pad_id: int = 0, right: bool = False) -> RecordT:
        """Pad with `columns` columns on the left or right: `tokens` with pad_id, other fields with FILL."""
        fills = {"tokens": pad_id} | self.FILL
        padded_fields: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, BatchRecord):
                padded_fields[field.name] = value.padded(columns, right=right)
            elif isinstance(value, Tensor) and value.dim() > 1:
                no_padding = (0, 0) * (value.dim() - 2)  # of the axes after T
                left_right = (0, columns) if right else (columns, 0)
                padded_fields[field.name] = F.pad(value, (*no_padding, *left_right), value=fills.get(field.name, 0))
        return dataclasses.replace(self, **padded_fields)

    def slots(self) -> list[int]:
        """Return the size C of every tensor (B, T, C), in the order of `map`."""
        return [x.shape[2] for x in self.tensors() if x.dim() == 3]

    def with_slots(self: RecordT, sizes: Iterator[int]) -> RecordT:
        """Pad the last axis of the tensors of `slots` to these sizes."""
        padded_fields: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, BatchRecord):
                padded_fields[field.name] = value.with_slots(sizes)
            elif isinstance(value, Tensor) and value.dim() == 3:
                padded_fields[field.name] = self._pad_last_axis(field.name, next(sizes))
        return dataclasses.replace(self, **padded_fields)

    def _pad_last_axis(self, name: str, size: int) -> Tensor:
        """Return a field (B, T, C) with its last axis padded to `size`."""
        value = getattr(self, name)
        return F.pad(value, (0, size - value.shape[2]), value=self.FILL.get(name, 0))

    @staticmethod
    def merge_records(records: "Sequence[RecordT]", merge_tensors: Callable[[list[Tensor]], Tensor]) -> "RecordT":
        """Merge records of equal width T, field by field; `merge_tensors` merges the tensors of a field.

        A field that is None in any record is None in the result, because a field must have every row. A field of
        IF_NONE has the value that None stands for.

        Raises:
            ValueError: A setting, which holds for all rows of a record, differs.
        """
        merged_fields: dict[str, Any] = {}
        for field in dataclasses.fields(records[0]):
            values = [getattr(record, field.name) for record in records]
            if not any(isinstance(value, Tensor | BatchRecord) for value in values):
                other = next((value for value in values if value != values[0]), values[0])
                if other != values[0] and field.name not in records[0].MAY_DIFFER:
                    raise ValueError(
                        f"{type(records[0]).__name__}.{field.name} is {values[0]} in some rows and {other} in others, "
                        "and must be the same for all rows of a batch: sample and score them separately"
                    )
                continue
            if field.name in records[0].IF_NONE:
                tensor = next(value for value in values if value is not None)
                default = tensor.new_tensor(records[0].IF_NONE[field.name])
                shapes = [record.tensors()[0].shape for record in records]
                values = [
                    default.repeat(shape) if value is None else value
                    for value, shape in zip(values, shapes, strict=True)
                ]
            if any(value is None for value in values):
                merged_fields[field.name] = None
            elif isinstance(values[0], BatchRecord):
                merged_fields[field.name] = BatchRecord.merge_records(values, merge_tensors)
            else:
                if values[0].dim() == 3:
                    size = max(value.shape[2] for value in values)
                    values = [record._pad_last_axis(field.name, size) for record in records]
                merged_fields[field.name] = merge_tensors(values)
        return dataclasses.replace(records[0], **merged_fields)
