"""Tiny runs of `DiffusionGRPOTrainer`. Import it only where TRL is installed."""

import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig

from dllm_rl import tiny_masked_lm
from dllm_rl.integrations.trl import DiffusionGRPOTrainer

CHARACTERS = "12345678="
# Prompts of several lengths, so that rows have padding.
ROWS = [
    {"prompt": f"{a}{b}="[i % 2 :], "answer": f"{b}{a}"}
    for i, (a, b) in enumerate(zip("12345678", "57218634", strict=True))
]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "key", "value"]}


def reward(completions, **columns):
    """Many values, so that every group has advantages."""
    return [sum(map(ord, text)) % 5 / 5 for text in completions]


def config(directory, **changes):
    settings = {
        "output_dir": str(directory),
        "max_completion_length": 4,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 2,
        "max_grad_norm": 0.0,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "logging_steps": 1,
    }
    return GRPOConfig(**settings | changes)


def tiny(**changes):
    return tiny_masked_lm(**{"characters": CHARACTERS, "hidden_size": 32, "num_layers": 1, "head_std": 0.1} | changes)


def trainer(
    directory,
    *,
    model=None,
    lora=False,
    kind=DiffusionGRPOTrainer,
    settings=None,
    rows=ROWS,
    eval_rows=None,
    **arguments,
):
    """A trainer of a tiny model; `settings` are GRPOConfig's."""
    if lora:
        arguments["peft_config"] = LoraConfig(**LORA)
    data = Dataset.from_list(rows)
    if eval_rows is not None:
        arguments["eval_dataset"] = Dataset.from_list(eval_rows)
    args = config(directory, **settings or {})
    made = kind(tiny() if model is None else model, reward, args, train_dataset=data, **arguments)
    made.remove_callback(PrinterCallback)
    return made


class Watched(DiffusionGRPOTrainer):
    """It keeps the first generation batch, and the weights, losses and gradients of each update."""

    def __init__(self, *arguments, **keywords):
        self.weights, self.losses, self.gradients, self.first = [], [], [], None
        super().__init__(*arguments, **keywords)
        self.add_callback(KeepGradients(self))

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.first = self.first or (output["dllm_rl"][0][0], output["advantages"].clone())
        return output

    def _compute_loss(self, model, inputs):
        if len(self.weights) == self.state.global_step:
            self.weights.append({name: x.clone() for name, x in self._policy.module.state_dict().items()})
            self.losses.append(0.0)
        loss = super()._compute_loss(model, inputs)
        self.losses[-1] += loss.item()
        return loss


class KeepGradients(TrainerCallback):
    def __init__(self, watched):
        self.watched = watched

    def on_pre_optimizer_step(self, args, state, control, **_):
        named = self.watched._policy.module.named_parameters()
        self.watched.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
