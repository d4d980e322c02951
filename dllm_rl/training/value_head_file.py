"""The value head of a run, new or from a checkpoint."""

from pathlib import Path

from dllm_rl.models.base import Policy
from dllm_rl.models.tensor_bytes import deserialize
from dllm_rl.recipe import Recipe
from dllm_rl.step.value_head import FILE, ValueHead


def make_value_head(recipe: Recipe, folder: Path | None) -> ValueHead | None:
    """Return the value head that a run continues with: from a checkpoint, or new. None without a value model.

    Raises:
        ValueError: The checkpoint's file is damaged.
    """
    if recipe.value_model is None:
        return None
    if folder is None or not (folder / FILE).exists():  # a new run, or one that began without a value model
        return ValueHead(recipe.value_model, recipe.seed)
    try:
        saved, _ = deserialize((folder / FILE).read_bytes())
        if "weights.1.weight" not in saved:
            raise ValueError("it has no weights")
    except ValueError as error:
        raise ValueError(f"{folder}: {FILE} is damaged: {error}; take an earlier checkpoint") from None
    size, saved_size = recipe.value_model.hidden_size, len(saved["weights.1.weight"])
    if size != saved_size:
        raise ValueError(
            f"value_model.hidden_size={size} is not the {saved_size} of {folder}; resume with hidden_size={saved_size}"
        )
    return ValueHead(recipe.value_model, recipe.seed, saved)


def check_value_model(recipe: Recipe, policy: Policy) -> None:
    """Raise ValueError if the recipe has a value model, and its model rewrites tokens at every step."""
    if recipe.value_model is not None and policy.spec.attention == "encoder_decoder":
        raise ValueError(
            f"value_model gives each token the advantage of the step that wrote it, and {policy.spec.name!r} writes "
            "every token at every step; use value_model=None"
        )
