"""`dllm-rl lm-eval`: the command of lm-evaluation-harness, with `--model dllm_rl` as an additional model."""

import sys
from argparse import Namespace
from typing import Any

import torch

from dllm_rl.cli.options import open_policy, read_methods
from dllm_rl.device import find_device
from dllm_rl.integrations.lm_eval import HarnessModel
from dllm_rl.likelihoods.estimators import LikelihoodEstimator
from dllm_rl.samplers.cache import Cache
from dllm_rl.samplers.rules import Commit, Rank
from dllm_rl.samplers.with_settings import sampler_with

from lm_eval.__main__ import cli_evaluate  # isort: skip - after HarnessModel, whose import says what to install if lm_eval is missing
from lm_eval.api.registry import register_model  # isort: skip


METHODS: dict[str, Any] = {"likelihood": LikelihoodEstimator, "rank": Rank, "commit": Commit, "cache": Cache}
HARNESS_DEVICE = "cuda:0"  # default of the harness's --device, which it passes on machines without a GPU, too
MAX_NEW_TOKENS = 256  # default of the harness's models, if neither --model_args nor the task sets a length


@register_model("dllm_rl")
class CommandLineModel(HarnessModel):
    """Model of `--model dllm_rl --model_args pretrained=FOLDER,NAME=VALUE,...`.

    The harness calls it with the names in --model_args, and adds batch_size, max_batch_size and device.

    Args:
        pretrained: What `load_policy` opens, such as the folder of a checkpoint or of a run, or a hub id.
        make_model: MODULE:FUNCTION that makes the policy of a custom module. None (default): a stock class.
        dtype: dtype of the weights; "auto" (default): as stored.
        device: Device of the weights. None (default): the accelerator, if there is one, as for the harness's default of
            --device on a machine without such a GPU.
        batch_size, greedy, seed: As in `HarnessModel`.
        options: Settings of the sampler, with rank, commit and cache as in `dllm-rl sample`, for example
            commit=Threshold,commit.tau=0.9; and likelihood, the class of an estimator (default: Causal for a causal
            model, else ELBO), with its settings as likelihood.NAME=VALUE.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        make_model: str | None = None,
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
            model=str(pretrained), make_model=make_model, dtype=dtype, device=device, verify_checkpoint="full"
        )
        if device == HARNESS_DEVICE and not torch.cuda.is_available():
            model_options.device = None
            print(f"device={device!r}, the harness's default, is not on this machine: using {find_device()}")
        policy = open_policy(model_options)
        options.setdefault("likelihood", "Causal" if policy.spec.attention == "causal" else "ELBO")
        options.pop("max_batch_size", None)  # the harness always passes it; it is for automatic batch sizes
        fields: dict[str, dict[str, Any]] = {name: {} for name in METHODS}
        passed: dict[str, Any] = {}
        for name, value in options.items():
            method, _, field = name.partition(".")
            if field and method in fields:
                fields[method][field] = value
            else:
                passed[name] = value
        for name, base in METHODS.items():
            given = [str(passed[name])] if name in passed else []
            if methods := read_methods(base, name, given, fields, prefix=""):
                passed[name] = methods[0]
        estimator = passed.pop("likelihood")
        if estimator is None:
            raise ValueError(f"likelihood={options['likelihood']} scores nothing; name an estimator, such as ELBO")
        is_task_length = passed.get("max_new_tokens") is None
        passed["max_new_tokens"] = MAX_NEW_TOKENS if is_task_length else passed["max_new_tokens"]
        super().__init__(
            policy,
            sampler=sampler_with(policy, None, passed),
            is_task_length=is_task_length,
            likelihood=estimator,
            batch_size=int(batch_size),
            greedy=greedy,
            seed=seed,
        )


def harness_command(arguments: Namespace) -> None:
    """Run lm-evaluation-harness with the options of its command line."""
    sys.argv[1:] = arguments.options  # the harness reads them from sys.argv
    cli_evaluate()
