"""The settings that a training step reads: `Recipe` adds those of a run."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from dllm_rl.algorithms.advantages import Advantages, GroupRelative
from dllm_rl.algorithms.correctors import Corrector, NoCorrection
from dllm_rl.algorithms.losses import K3, KL, Loss, LossReduction, PPOClip, TokenMean, policy_loss
from dllm_rl.algorithms.prompt_sources import PromptSource, UniformPrompts
from dllm_rl.groups import Late
from dllm_rl.likelihoods.estimators import LikelihoodEstimator
from dllm_rl.models.rollout_engine import RolloutEngine
from dllm_rl.records import option
from dllm_rl.samplers.sampler import Sampler
from dllm_rl.settings import Settings
from dllm_rl.tasks.base import Task

MEASURE_STEPS = 5  # steps from one measurement to the next of the metrics that take forwards of their own


@dataclass(frozen=True, kw_only=True)
class UpdateSettings:
    """Settings of the updates of one step.

    Args:
        loss: Function (detached log-probs, batch) -> loss, metrics, gradient.
        likelihood: Estimator of the log-probs.
        learning_rate: Learning rate of the step.
        max_grad_norm: Norm to which gradients are clipped. Default: 1.
        micro_batch_size: Rows per forward (`likelihoods.views.row_chunks`). None (default): all.
        max_staleness: Largest number of steps by which the rollout's weights may be older. Default: 0.
        measure: Whether to measure `update_direction` after the updates. Default: False.
    """

    loss: Callable  # detached log-probs, batch -> loss, metrics, gradient
    likelihood: LikelihoodEstimator
    learning_rate: float
    max_grad_norm: float = 1.0
    micro_batch_size: int | None = None
    max_staleness: int = 0
    measure: bool = False


class StepSettings(Settings):
    """The settings of a training step.

    A setting is here if the step reads it, and in `Recipe` if only the run around the step does.
    """

    task: Task = option(help="problems to train on")
    sampler: Sampler = option(help="rollout sampler: Unmask, Autoregress, Renoise")
    likelihood: LikelihoodEstimator = option(
        help="estimator of the completions' log-probs: Trajectory, Causal, ELBO ..."
    )
    prompt_source: PromptSource = option(default=UniformPrompts(), help="how each step chooses its prompts")
    corrector: Corrector = option(
        default=NoCorrection(), help="correction of the mismatch between rollout and learner: TIS, MIS, AIS ..."
    )
    sampling_support: Literal["per_policy", "unfiltered", "rollout"] = option(
        default="per_policy",
        help="with top_k or top_p: normalize log-probs over each policy's own tokens, all, or the rollout's",
    )
    advantages: Advantages = option(
        default=GroupRelative(), help="advantages (B,) of rewards (B,) in groups: GroupRelative, LeaveOneOut, Decoupled"
    )
    loss: Loss | None = option(
        default=None, help="policy-gradient objective; None: the corrector's, if it has one, else PPOClip"
    )
    loss_reduction: LossReduction | None = option(
        default=None, help="how the loss averages over tokens; None: the corrector's, if it has one, else TokenMean"
    )
    rollout_engine: RolloutEngine | None = option(
        default=None, help="external engine that makes the rollouts; None: this process"
    )
    late: Late | None = option(
        default=None, help="rollouts that workers make while the learner trains; None: the learner makes them"
    )
    num_generations: int = option(default=8, help="completions per prompt (G)", at_least=1)
    rollout_batch_size: int | None = option(default=None, help="completions per sampler call; None: all", at_least=1)
    micro_batch_size: int | None = option(
        default=None,
        help="rows per forward of scoring and update; completions that the model reads alike, as under OneStep, share "
        "a row; None: all",
        at_least=1,
    )
    max_retained_graphs: int | None = option(
        default=None,
        help="scoring forwards whose autograd graphs an update may reuse: faster, more memory; None: one, and more "
        "while all graphs have at most 256 MiB",
        at_least=0,
    )
    old_logprobs: Literal["recompute", "rollout"] = option(
        default="recompute",
        help="denominator of the ratios: the learner's log-probs before the update, or the rollout's (bypass)",
    )
    num_mismatch_groups: int = option(
        default=2, help="groups without advantage scored per step, to measure the mismatch", at_least=1
    )
    max_prompt_length: int | None = option(
        default=None,
        help="tokens; a longer training prompt is replaced by the next that fits; None: the model's limit, an error",
        at_least=1,
    )
    max_num_gen_batches: int = option(
        default=1,
        help="draws of prompts per step: groups of equal rewards are redrawn (DAPO); 1: no redraw",
        at_least=1,
    )
    num_iterations: int = option(
        default=1, help="policy-gradient updates per rollout; 0: none, only those of `replay`", at_least=0
    )
    resample_masks: bool = option(
        default=True, help="draw new masks, or steps, for each update of num_iterations; False: one set for all"
    )
    beta: float = option(
        default=0.0, help="weight of the KL term to the policy that RL started from; 0: no term", at_least=0
    )
    kl: KL = option(default=K3(), help="per-token estimator of the KL term: K1, K2 or K3")
    entropy_coeff: float = option(default=0.0, help="weight of the entropy bonus; 0: no bonus", at_least=0)
    torch_compile: bool = option(
        default=False, help="compile the forwards of the policy that samples; speeds up bf16 and FP8 on a GPU"
    )
    shard_size: int = option(
        default=1, help="processes that share the learner's weights (FSDP2); 0: all; 1: no sharding", at_least=0
    )

    @property
    def max_staleness(self) -> int:
        """Steps by which the rollouts' weights are older than the learner's."""
        return 0 if self.late is None else self.late.max_staleness

    @property
    def trains_all_groups(self) -> bool:
        """Whether a group of equal rewards is trained too. `StepContext.trains_all_groups` also asks the features."""
        return bool(self.beta or self.entropy_coeff)

    @property
    def samples_in_process(self) -> bool:
        """Whether the log-probs of rollouts come from this process, so that they must be finite."""
        return self.rollout_engine is None

    @property
    def compiles_rollouts(self) -> bool:
        """Whether rollouts run in compiled graphs."""
        return self.torch_compile or getattr(self.sampler, "compile_step", False)

    @property
    def is_sharded(self) -> bool:
        """Whether processes share the learner's weights (FSDP2). A sharded learner runs each backward before the next
        forward, so that it retains no graphs, and autocast caches none of its weights in bf16, which would be all.
        """
        return self.shard_size != 1

    @property
    def num_mask_sets(self) -> int:
        """Number of sets of masks that score a rollout.

        The metrics `rollout_corr/*`, `trained/*` and `ais/*` use the first set.
        """
        is_drawn = self.likelihood.is_random or self.likelihood.variance_growth is not None
        return max(1, self.num_iterations) if self.resample_masks and is_drawn else 1

    @property
    def num_scored_mask_sets(self) -> int:
        """Number of sets of masks whose log-probs are computed before the first update: not those of the later updates
        if nothing reads them.
        """
        is_read = self.resolved_loss.reads_ratio or self.corrector != NoCorrection() or self.beta
        return self.num_mask_sets if is_read else 1

    @property
    def resolved_loss_reduction(self) -> LossReduction:
        """The reduction in effect: the recipe's function, else the corrector's, else `TokenMean`."""
        return self.loss_reduction or self.corrector.loss_reduction or TokenMean()

    @property
    def resolved_loss(self) -> Loss:
        """The objective in effect: the recipe's function, else the corrector's, else PPO's clipped ratio."""
        return self.loss or self.corrector.loss or PPOClip()

    @property
    def policy_loss(self) -> Callable:
        """Function (log-probs (B, T), batch) -> loss, metrics, gradient: `losses.policy_loss` with this recipe's terms.

        The defaults are PPOClip with epsilon 0.2, an equal weight for every token of the batch, no KL term and no
        entropy bonus.
        """
        return partial(
            policy_loss,
            surrogate=self.resolved_loss,
            loss_reduction=self.resolved_loss_reduction,
            beta=self.beta,
            kl=self.kl,
            entropy=self.entropy_coeff,
        )

    @property
    def max_new_tokens(self) -> int:
        """Length of a completion in tokens, that of the sampler."""
        return self.sampler.max_new_tokens

    def update_settings(self, step: int) -> UpdateSettings:
        """Return the settings of the updates of a step, counted from 0."""
        return UpdateSettings(
            loss=self.policy_loss,
            likelihood=self.likelihood,
            learning_rate=self.learning_rate * self.lr_schedule(step, self.lr_schedule_steps or self.num_steps),
            max_grad_norm=self.max_grad_norm,
            micro_batch_size=self.micro_batch_size,
            max_staleness=self.max_staleness,
            # Not with an aligned forward: the extra forward of the measurement would quantize the updated weights, and
            # the next `quantization/codes_changed` would count no change.
            measure=(step + 1) % MEASURE_STEPS == 0 and not self.corrector.align_forward,
        )
