"""`dllm-rl lm-eval`: the command of lm-evaluation-harness, with `--model dllm_rl` as an additional model."""

import inspect
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from dllm_rl.cli.options import open_policy
from dllm_rl.config import CHOICES
from dllm_rl.evaluation.lm_eval import HarnessModel
from dllm_rl.samplers import sampler_for
from dllm_rl.samplers.by_name import READERS, read_rank, required_rank

from lm_eval.__main__ import cli_evaluate  # isort: skip - after HarnessModel, whose import says what to install if lm_eval is missing
from lm_eval.api.registry import register_model  # isort: skip


@register_model("dllm_rl")
class CommandLineModel(HarnessModel):
    """Model of `--model dllm_rl --model_args pretrained=FOLDER,NAME=VALUE,...`.

    The harness calls it with the names in --model_args, and adds batch_size, max_batch_size and device.

    Args:
        pretrained: Folder of a checkpoint or of a run, or a model id on the Hugging Face Hub.
        likelihood: Name of an estimator; its settings are given as likelihood.NAME=VALUE. None (default): causal for a
            causal model, else elbo.
        dtype: dtype of the weights; "auto" (default): as stored.
        device: Device of the weights. None (default): the accelerator, if there is one.
        batch_size, greedy, seed: As in `HarnessModel`.
        options: Settings of the sampler, with rank, commit and cache as in `dllm-rl sample`; and likelihood.NAME.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        likelihood: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        greedy: bool = True,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if not str(batch_size).isdecimal() or not int(batch_size):
            raise ValueError(f"batch_size={batch_size!r} must be a whole number of at least 1")
        model_options = Namespace(
            model=str(pretrained), maker=None, dtype=dtype, device=device, verify_checkpoint="full"
        )
        policy = open_policy(model_options)
        likelihood = likelihood or ("causal" if policy.spec.attention == "causal" else "elbo")
        estimators = CHOICES["likelihood"]
        if likelihood not in estimators:
            raise ValueError(f"likelihood={likelihood!r} is not one of {', '.join(estimators)}")
        likelihood_settings: dict[str, Any] = {}
        sampler_settings: dict[str, Any] = {
            "temperature": 0.0
        }  # as in `dllm-rl evaluate`; autoregress's default is 1.0
        options.pop("max_batch_size", None)  # the harness always passes it; it is for automatic batch sizes
        for name, value in options.items():
            if name.startswith("likelihood."):
                likelihood_settings[name.removeprefix("likelihood.")] = value
            else:
                sampler_settings[name] = READERS[name](str(value)) if name in READERS else value
        if "commit" in options and (rank := required_rank(str(options["commit"]))):
            sampler_settings.setdefault("rank", read_rank(rank))
        sampler = sampler_for(policy)
        check_settings(sampler.__name__, inspect.signature(sampler).bind_partial, sampler_settings)
        check_settings(likelihood, inspect.signature(estimators[likelihood]).bind, likelihood_settings)
        super().__init__(
            policy,
            sampler=partial(sampler, **sampler_settings),
            likelihood=estimators[likelihood](**likelihood_settings),
            batch_size=int(batch_size),
            greedy=greedy,
            seed=seed,
        )


def check_settings(name: str, bind: Callable[..., Any], settings: Mapping[str, Any]) -> None:
    """Raise ValueError if the settings do not fit the parameters of `bind`, the signature of `name`."""
    try:
        bind(**settings)
    except TypeError as error:
        raise ValueError(f"model_args: {name} {error}") from None


def harness_command(arguments: Sequence[str]) -> None:
    """Run lm-evaluation-harness with the arguments of its command line."""
    sys.argv[1:] = arguments  # the harness reads them from sys.argv
    cli_evaluate()
