"""The value head of a run: predict each denoising step's advantage, and learn from it."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dllm_rl.algorithms.values import ValueModel, generalized_advantages
from dllm_rl.distributed.collectives import SumsAndCounts, collective, reduce_metrics, sum_gradients, sum_over
from dllm_rl.likelihoods.views import each_view, row_chunks
from dllm_rl.models.base import join_uneven_forwards
from dllm_rl.models.tensor_bytes import deserialize, serialize
from dllm_rl.rng import generator_for
from dllm_rl.step.context import StepContext, StepFeature
from dllm_rl.step.samples import Samples
from dllm_rl.types import Views

RATE_WIDTH = 64  # a matrix with this number of inputs is trained at `learning_rate`


class ValueHead(StepFeature):
    """The head of `ValueModel()` and its optimizer. Its layers are made at the first batch, which shows the width of
    the hidden states.
    """

    def __init__(self, settings: ValueModel, seed: int) -> None:
        self.settings = settings
        self.seed = seed
        self.saved: dict[str, Tensor] | None = None  # weights and moments of AdamW, from a checkpoint
        self.layers: nn.Sequential | None = None
        self.num_values = 0.0  # number of values in the gradient, since the last `learn`
        self.sums: SumsAndCounts = {}  # for `metrics`, of the last set of views

    def build(self, width: int, device: torch.device) -> nn.Sequential:
        """Make the layers for hidden states of this width, or load them from a checkpoint."""
        size = self.settings.hidden_size
        hidden, last = (nn.utils.skip_init(nn.Linear, *shape, device=device) for shape in ((width, size), (size, 1)))
        weight = torch.empty(size, width)
        hidden.weight.data = nn.init.xavier_uniform_(weight, generator=generator_for(self.seed, "value head")).to(
            device
        )
        for parameter in (hidden.bias, last.weight, last.bias):
            nn.init.zeros_(parameter)
        layers = nn.Sequential(nn.LayerNorm(width, device=device), hidden, nn.GELU(), last)
        rate = self.settings.learning_rate
        groups: list[dict[str, Any]] = [{"params": [p], "lr": rate * rate_scale(p)} for p in layers.parameters()]
        # The advantages of a group add up to 0, and so do gradients of a constant value. With the default eps of 1e-8,
        # AdamW would turn their rounding errors into full steps, different with another number of processes.
        self.optimizer = torch.optim.AdamW(groups, eps=1e-5)
        if self.saved is not None:
            layers.load_state_dict(self._saved_tensors("weights."))
            moments: dict[int, dict[str, Tensor]] = {}
            for name, tensor in self._saved_tensors("moments.").items():
                index, _, key = name.partition(".")
                moments.setdefault(int(index), {})[key] = tensor
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        self.layers = layers
        return layers

    def _saved_tensors(self, prefix: str) -> dict[str, Tensor]:
        assert self.saved is not None
        return {name.removeprefix(prefix): x for name, x in self.saved.items() if name.startswith(prefix)}

    def load_state(self, state: bytes) -> None:
        """Raise ValueError if the state is damaged, or of a head of another size."""
        saved, _ = deserialize(state)
        if "weights.1.weight" not in saved:
            raise ValueError("it has no weights")
        size, saved_size = self.settings.hidden_size, len(saved["weights.1.weight"])
        if size != saved_size:
            raise ValueError(
                f"value_model.hidden_size={size} is not the {saved_size} of the checkpoint; resume with "
                f"hidden_size={saved_size}"
            )
        self.saved = saved

    def state(self) -> bytes | None:
        """Return weights and moments; None before the first batch of a new run."""
        if self.layers is None:
            return None if self.saved is None else serialize(self.saved, {})
        tensors = {f"weights.{name}": x for name, x in self.layers.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"moments.{index}.{name}": x for name, x in moments.items()}
        return serialize(tensors, {})

    @torch.no_grad()
    def token_advantages(self, context: StepContext, samples: Samples, views: Views) -> Float[Tensor, "B T"]:
        """Return the advantage of each scored token.

        It also adds to the layers the gradient of the values' squared error; the target of every step's value is the
        row's advantage. `learn` applies it.

        Raises:
            ValueError: A position is scored at several steps, so that it has several advantages.
        """
        policy, rollout, micro_batch_size = context.policy, samples.rollout, context.settings.micro_batch_size
        advantages = samples.local(samples.advantages, context.accelerator)
        if ((views.coefficients != 0).sum(0) > 1).any():
            raise ValueError(
                "value_model gives each token the advantage of its step, and here a position is scored at several "
                "steps (by an order's probability, or after rewriting): use Trajectory(include_order=False) or another "
                "rank or commit rule, or value_model=None"
            )
        has_reward = samples.local(~samples.rewards.isnan(), context.accelerator)
        is_step = (views.coefficients != 0).any(-1) & has_reward  # a completion without a reward teaches nothing
        values = torch.zeros(is_step.shape, device=advantages.device)
        with join_uneven_forwards(policy):
            for chunk in row_chunks(rollout, views, micro_batch_size):
                rows = chunk.rollout
                for n, view in enumerate(each_view(chunk.views)):
                    has_step = view.scored.any(-1)
                    forward = view.run(policy, rows, rows.completion_mask & has_step[:, None])
                    if forward is not None:
                        row_index = forward.plan.flat_index // rows.tokens.shape[1]
                        target, is_learned = advantages[chunk.rows], has_step & has_reward[chunk.rows]
                        values[n, chunk.rows] = self._predict(forward.states, row_index, target, is_learned)
        num_values = is_step.sum()
        self.num_values += num_values.item()
        errors = torch.where(is_step, values - advantages, 0).double().square().sum()
        squares = torch.where(is_step, advantages, 0).double().square().sum()
        by_step = generalized_advantages(advantages, values, is_step, gae_lambda=self.settings.gae_lambda)
        self.sums = {"value/loss": (errors, num_values), "value/square": (squares, num_values)}
        return ((views.coefficients != 0) * by_step[..., None]).sum(0)

    @torch.enable_grad()
    def _predict(
        self,
        states: Float[Tensor, "K D"],
        row_index: Int[Tensor, " K"],
        target: Float[Tensor, " R"],
        is_learned: Bool[Tensor, " R"],
    ) -> Float[Tensor, " R"]:
        """Return the values of a chunk's rows, detached, and add to the layers the gradient of the squared errors of
        the learned rows.
        """
        layers = self.layers or self.build(states.shape[-1], states.device)
        with torch.autocast(states.device.type, enabled=False):
            at_positions = layers(states.detach().float())[:, 0]
            totals = torch.zeros_like(target).index_add(0, row_index, at_positions)
            counts = torch.zeros_like(target).index_add(0, row_index, torch.ones_like(at_positions))
            values = totals / counts.clamp(min=1)
            torch.where(is_learned, values - target, 0).square().sum().backward()
        return values.detach()

    @collective
    def learn(self, context: StepContext, optimizer: torch.optim.Optimizer) -> None:
        """Take a step of AdamW on the mean squared error of all processes.

        It comes after the learner's update, so that a step that fails leaves both unchanged.
        """
        accelerator = context.accelerator
        counts = torch.tensor([self.num_values, float(self.layers is None)], dtype=torch.double)
        num_values, processes_without_layers = sum_over(counts, accelerator).tolist()
        self.num_values = 0.0
        if self.layers is None or processes_without_layers:  # they have scored no completion yet
            if self.layers is not None:
                self.layers.zero_grad(set_to_none=True)
            return
        sum_gradients(self.layers, accelerator)
        for parameter in self.layers.parameters():
            assert parameter.grad is not None
            parameter.grad /= max(num_values, 1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def metrics(self, context: StepContext) -> dict[str, float]:
        """Return value/loss, the mean squared error of the values, and value/explained_variance: 1 - value/loss / (mean
        square of the advantages), 0 if all values are 0.
        """
        means = reduce_metrics(self.sums, context.accelerator)
        mean_square = means.pop("value/square", 0.0)
        return means | ({"value/explained_variance": 1 - means["value/loss"] / mean_square} if mean_square else {})


def rate_scale(parameter: Tensor) -> float:
    """Return the factor on a parameter's learning rate: RATE_WIDTH / width for a matrix with `width` inputs, else 1.

    A step of AdamW changes a layer's output in proportion to the number of its inputs, so one rate would not fit every
    model (muP, arXiv 2203.03466 [paper]).
    """
    return RATE_WIDTH / parameter.shape[1] if parameter.dim() == 2 else 1.0
