"""What features of a step store in a checkpoint, and the check of a value model."""

from collections.abc import Sequence
from pathlib import Path

from dllm_rl.algorithms.values import ValueModel
from dllm_rl.models.base import Policy
from dllm_rl.step.features import StepFeature


def state_file(feature: StepFeature) -> str:
    """Return the name of a feature's file in a checkpoint."""
    return f"{type(feature).__name__}.state"


def load_states(features: Sequence[StepFeature], folder: Path) -> None:
    """Load the states of the features that a checkpoint has. A feature that the run had not begins anew.

    Raises:
        ValueError: A file is damaged, or its feature has other settings.
    """
    for feature in features:
        path = folder / state_file(feature)
        if path.exists():
            try:
                feature.load_state(path.read_bytes())
            except ValueError as error:
                raise ValueError(f"{path} cannot be loaded: {error}; or take an earlier checkpoint") from None


def check_value_model(value_model: ValueModel | None, policy: Policy) -> None:
    """Raise ValueError if a recipe has a value model, and its model rewrites tokens at every step."""
    if value_model is not None and policy.spec.attention == "encoder_decoder":
        raise ValueError(
            f"value_model gives each token the advantage of the step that wrote it, and {policy.spec.name!r} writes "
            "every token at every step; use value_model=None"
        )
