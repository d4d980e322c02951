"""Rollouts compared field by field, also in their parts."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from dllm_rl.types.batch_record import BatchRecord


def fields_of(record: BatchRecord, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The name and value of every field, those of parts as `part.field`; a part that is None is one value."""
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, BatchRecord):
            yield from fields_of(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value
