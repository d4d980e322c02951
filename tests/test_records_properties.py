"""Every record of the library, with several values of each setting: frozen, checked, pasted, stored and sent."""

import dataclasses
import inspect
import json
import pickle
import typing
from collections.abc import Callable

import pytest

import dllm_rl
from dllm_rl import records
from dllm_rl.algorithms.correctors import ais_lambda
from dllm_rl.records import Record, annotations_of, from_json, make_record, required_settings, to_json, union_members
from dllm_rl.settings import Settings

PUBLIC = {name: getattr(dllm_rl, name) for name in dllm_rl.__all__}  # imports the modules of all records


# The methods by name, with the base that fields name: all but the wrappers of a user's function, and the engine that a
# run makes of its recipe.
BASES = {
    record: base
    for base in Record.__subclasses__()
    if base.__module__.startswith("dllm_rl.") and not issubclass(base, Settings)
    for record in records.subclasses(base).values()
    if not record.__name__.startswith("Function") and record.__name__ != "RolloutCopy"
}
RECORDS = {record.__name__: record for record in BASES}
NUMBERS = (0, 1, 2, 3, 16, -1, 0.05, 0.25, 0.5, 0.9, 1.5, 2.5)


def candidates(annotation):
    """Values that a field of the type may have; the constructor refuses those out of range."""
    for kind in union_members(annotation):
        origin = typing.get_origin(kind)
        if kind is bool:
            yield from (True, False)
        elif kind in (int, float):
            yield from map(kind, NUMBERS)
        elif kind is str:
            yield from ("int8", "int3", "a b'c")
        elif origin is typing.Literal:
            yield from typing.get_args(kind)
        elif origin is tuple:
            (item, *_) = typing.get_args(kind)
            values = [*candidates(item)]
            yield from ((), tuple(values[:1]), tuple(values[1:3]))
        elif origin is Callable:
            yield ais_lambda
        elif isinstance(kind, type) and issubclass(kind, Record):
            yield from (
                simple(record)
                for record, base in BASES.items()
                if base is kind and "parts" not in annotations_of(record)
            )
        elif kind is type(None):
            yield None


def simple(record, **settings):
    """A record with these settings, and the last acceptable value of each that is required."""
    for name, annotation in required_settings(record).items():
        accepted = [value for value in candidates(annotation) if problem(record, name, value) is None]
        settings.setdefault(name, accepted[-1])
    return record(**settings)


def samples(record):
    """Records with several values of each setting."""
    made = [simple(record)]
    for name, annotation in annotations_of(record).items():
        for value in candidates(annotation):
            try:
                made.append(simple(record, **{name: value}))
            except ValueError:
                continue
    return made


def problem(record, name, value):
    """The constructor's complaint about this setting, if any."""
    field = record.__dataclass_fields__[name]
    try:
        records.fit(name, annotations_of(record)[name], value, field.metadata.get("bound"))
    except ValueError as error:
        return error
    return None


def test_there_are_records_of_every_kind():
    assert len(RECORDS) > 60
    assert {"TIS", "PPOClip", "Unmask", "Trajectory", "Confidence", "BlockCache", "Lora", "AdamW", "K3"} <= set(RECORDS)


@pytest.mark.repeated(every=3)
@pytest.mark.parametrize("name", sorted(RECORDS))
def test_a_record_is_frozen_pasted_stored_and_sent(name):
    record = RECORDS[name]
    made = samples(record)
    assert len(made) > sum(bool(list(candidates(kind))) for kind in annotations_of(record).values()), "values of each"
    namespace = RECORDS | {"ais_lambda": ais_lambda}
    for one in made:
        settings = {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}
        copies = [record(**settings), one.replace(), dataclasses.replace(one), pickle.loads(pickle.dumps(one))]
        copies.append(eval(repr(one), dict(namespace)))
        copies.append(from_json(BASES[record], json.loads(json.dumps(to_json(one))), "setting"))
        for copy in copies:
            assert copy == one and hash(copy) == hash(one) and repr(copy) == repr(one)
        for setting in settings:
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(one, setting, settings[setting])
    different = {repr(one): one for one in made}
    assert len(set(made)) == len(different), "equal if and only if written alike"


@pytest.mark.repeated(every=4)
@pytest.mark.parametrize("name", sorted(RECORDS))
def test_a_record_takes_keywords_of_the_right_type_only(name):
    record = RECORDS[name]
    kinds = {p.kind for p in inspect.signature(record).parameters.values()}
    assert kinds <= {inspect.Parameter.KEYWORD_ONLY}
    with pytest.raises(ValueError):
        record(unknown_setting=1)
    (first, *_) = samples(record)
    for setting, annotation in annotations_of(record).items():
        if annotation is typing.Any:
            continue
        with pytest.raises(ValueError, match=rf"^{setting}="):
            first.replace(**{setting: object()})


def test_a_class_attribute_is_no_setting():
    assert "inputs" not in annotations_of(dllm_rl.PPOClip)
    for record in RECORDS.values():
        assert list(annotations_of(record)) == [field.name for field in dataclasses.fields(record)]
    with pytest.raises(ValueError, match=r"inputs=.* is not a setting of PPOClip"):
        make_record(dllm_rl.PPOClip, {"inputs": []})
