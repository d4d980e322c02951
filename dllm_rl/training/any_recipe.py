"""The settings of any run. `Settings` has those that both kinds share."""

from dllm_rl.recipe import Recipe
from dllm_rl.supervised.sft import SFT

AnyRecipe = Recipe | SFT
