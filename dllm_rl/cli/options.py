"""The options of every command that opens a model, and the policy that they select."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

    from dllm_rl.manifest import Check
    from dllm_rl.models.base import Policy
    from dllm_rl.records import Record

Method = TypeVar("Method", bound="Record")
# Options whose value is a class's name. Its fields are options too: `--commit Threshold --commit.tau 0.9`.
METHODS = ("rank", "commit", "cache", "quantization")


def split_fields(argv: Sequence[str]) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Split the arguments of a command into argparse's and the texts of METHODS' fields: {"commit": {"tau": "0.9"}}."""
    rest: list[str] = []
    fields: dict[str, dict[str, str]] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        path, equals, text = word.removeprefix("--").partition("=")
        method, _, field = path.partition(".")
        if not word.startswith("--") or method not in METHODS or not field:
            rest.append(word)
            continue
        if not equals:
            if not words:
                raise ValueError(f"{word} needs a value")
            text = words.pop(0)
        fields.setdefault(method, {})[field] = text
    return rest, fields


def read_methods(
    base: "type[Method]",
    option: str,
    names: Sequence[str],
    fields: Mapping[str, Mapping[str, Any]],
    *,
    prefix: str = "--",
) -> "list[Method | None]":
    """Return the methods that an option names, with the fields that other options set; None for "none".

    A field is set in each of the named classes that has it.

    Args:
        base: Base class of the methods.
        option: Name of the option.
        names: Names of the classes, the option's value: classes of the library, or MODULE.NAME, which is imported.
        fields: Values of the fields, or their text, as `split_fields` returns it.
        prefix: Text before an option's name where the user writes it, for error messages.

    Raises:
        ValueError: A class or a field is unknown, or a value is missing or wrong.
    """
    from dllm_rl.config import class_named, read_value  # local: imports torch, which would slow --help
    from dllm_rl.records import annotations_of, make_record, required_settings

    settings = fields.get(option, {})
    if settings and not names:
        raise ValueError(f"{prefix}{option}.{min(settings)} needs {prefix}{option}, the class with this setting")
    classes = [None if name == "none" else class_named(base, name, option) for name in names]
    for field in settings:
        if not any(record is not None and field in annotations_of(record) for record in classes):
            raise ValueError(f"{prefix}{option}.{field} is not a setting of {', '.join(names)}; leave it out")
    methods: list[Any] = []
    for record in classes:
        if record is None:
            methods.append(None)
            continue
        kinds = annotations_of(record)
        own = {field: value for field, value in settings.items() if field in kinds}
        if missing := sorted(required_settings(record).keys() - own.keys()):
            raise ValueError(f"{prefix}{option} {record.__name__} needs {prefix}{option}.{missing[0]}")
        try:
            for field, text in own.items():
                if isinstance(text, str):
                    own[field] = read_value(text, kinds[field], field)
            methods.append(make_record(record, own))
        except ValueError as error:
            raise ValueError(f"{prefix}{option} {record.__name__}: {error}") from None
    return methods


def add_model_options(sub: argparse.ArgumentParser) -> None:
    maker_help = "function that makes the policy of a custom module; the checkpoint's weights are loaded into it"
    add = sub.add_argument
    add("--make_model", metavar="MODULE:FUNCTION", help=maker_help)
    dtypes = ("float32", "bfloat16", "float16", "auto")
    add("--dtype", default="auto", choices=dtypes, help="dtype of the weights (default auto: as stored)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: the accelerator, where there is one)")
    add(
        "--verify_checkpoint",
        default="full",
        choices=("full", "quick"),
        help="check before use; quick: of files over 1 MiB, only the size and the first MiB (default full)",
    )


def checkpoint_of(model: str, *, quick: bool = False) -> str:
    """Return a folder or a hub's id unchanged, and for a run's folder its newest complete checkpoint.

    Raises:
        ValueError: The run has no complete checkpoint.
    """
    folder = Path(model) / "checkpoints"
    if not folder.is_dir():
        return model
    from dllm_rl.checkpoints import checkpoint  # local: imports torch, which would slow --help
    from dllm_rl.screen import escape_controls

    try:
        say = lambda text: print(escape_controls(text), file=sys.stderr)  # noqa: E731
        newest = checkpoint.locate("latest", folder, quick=quick, say=say)
    except ValueError:
        raise ValueError(f"{model}: none of the run's checkpoints is complete; dllm-rl verify says why") from None
    if newest is None:
        raise ValueError(f"{model} is a run's folder without a checkpoint yet; give a checkpoint")
    return str(newest)


def recipe_of(model: str) -> dict[str, Any] | None:
    """Return the recipe stored in a run's newest checkpoint, or in the checkpoint that `model` is, as text and numbers.

    None if `model` is neither a run's folder nor a run's checkpoint.

    Raises:
        ValueError: The run's folder has no complete checkpoint, or the stored state is damaged.
    """
    state = Path(checkpoint_of(model, quick=True)) / "state.json"
    if not state.is_file():
        return None
    from dllm_rl.files import read_json

    recipe: dict[str, Any] | None = read_json(state).get("recipe")
    return recipe


def open_policy(
    arguments: argparse.Namespace,
    model: str | None = None,
    *,
    device: "torch.device | None" = None,
    half_head: bool = False,
) -> "Policy":
    """Load the policy of `model` (default: arguments.model) in --dtype, on `device` (default: --device).

    `arguments.checkpoint` is set to the folder of the loaded checkpoint. Logits are computed in fp32 or
    as the custom policy says, or with `half_head` in 16 bits.
    """
    from dllm_rl.config import import_named
    from dllm_rl.device import find_device
    from dllm_rl.models.base import Policy
    from dllm_rl.models.load import load_policy
    from dllm_rl.training.policies import call_model_function

    device = find_device(arguments.device) if device is None else device
    model = model or arguments.model
    folder = checkpoint_of(model, quick=arguments.verify_checkpoint == "quick")
    arguments.checkpoint = folder
    # checkpoint_of has verified the newest checkpoint of a run.
    check: Check = arguments.verify_checkpoint if folder == model else "quick"
    into: Any = None
    if arguments.make_model is not None:
        into = call_model_function(import_named(arguments.make_model, "--make_model"), 0)
        if not isinstance(into, Policy):
            kind, name = type(into).__name__, arguments.make_model
            raise ValueError(f"--make_model {name!r} makes a {kind}, not a policy; return make_policy(...)")
    policy: Policy = load_policy(folder, into=into, dtype=arguments.dtype, device=device, verify_checkpoint=check)
    if half_head:
        policy.float32_head = False
    return policy
