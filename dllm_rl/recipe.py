"""All settings of an experiment, in one flat frozen record, `Recipe`. Write a variant as `replace(base, ...)`."""

from typing import Any, ClassVar, Literal

from dllm_rl.algorithms.losses import takes_drawn_steps
from dllm_rl.algorithms.optimizers import AdamW, Optimizer
from dllm_rl.algorithms.replay import Replay
from dllm_rl.groups import Teacher, Warmup
from dllm_rl.likelihoods.estimators import EXACT
from dllm_rl.models.lora import check_mergeable
from dllm_rl.quantization.schemes import Scheme
from dllm_rl.records import describe, option, to_json
from dllm_rl.samplers.sampler import Sampler
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.samplers.whole_step import check_fixed_shapes
from dllm_rl.settings import documented
from dllm_rl.step.settings import StepSettings
from dllm_rl.tasks.base import Task


class Recipe(StepSettings):
    """The settings of reinforcement learning."""

    EVALUATION_BATCH: ClassVar[int] = 256

    validation_task: Task = option(
        help="problems of the evaluations between steps, and that decide when the warm-up ends"
    )
    eval_task: Task = option(help="held-out problems, evaluated only before and after RL")

    eval_sampler: Sampler = option(help="sampler of evaluations, usually greedy")
    replay: Replay | None = option(
        default=None,
        help="train again on earlier right answers after each step's update; None: no answer is used twice",
    )
    rollout_quantization: Scheme | None = option(
        default=None, help="quantization of the policy that samples, e.g. Float8Dynamic; None: not quantized"
    )

    num_steps: int = option(default=180, help="RL steps", at_least=0)
    optim: Optimizer = option(default=AdamW(), help="optimizer, with its betas and decay: AdamW, AdamW8bit")

    teacher: Teacher | None = option(default=None, help="on-policy distillation from a teacher; None: no teacher")
    zero_mismatch: bool = option(
        default=False, help="compute batch-invariantly; stop if a log-prob of rollout and learner differs in any bit"
    )

    warmup: Warmup = option(default=Warmup(), help="supervised steps on solutions before RL; without steps: none")

    dry_run: Literal[False, True, "A100", "H100", "H200"] = option(
        default=False,
        help="print the settings and the estimated memory and time without loading weights, and exit; with the name of "
        "a GPU for that one",
    )

    def check(self) -> None:
        super().check()
        if self.rollout_engine is not None and (self.rollout_quantization is not None or self.corrector.align_forward):
            problem = f"rollout_engine={describe(self.rollout_engine)} makes no quantized copy"
            raise ValueError(
                f"{problem}: use rollout_quantization=None, and a corrector that does not align the forward; dllm-rl "
                "serve --quantization quantizes on the server"
            )
        if self.lora is not None and self.corrector.align_forward and self.rollout_quantization is not None:
            check_mergeable(self.lora)  # the aligned forward quantizes merged weights
        for sampler in self._compiled_samplers:
            check_fixed_shapes(sampler.cache, sampler.commit)

    def conflicts(self) -> list[tuple[bool, str]]:
        is_quantized = self.rollout_quantization is not None
        conflicts = [
            *super().conflicts(),
            (
                self.loads_best and self.shard_size != 1,
                f"saves.best.load_at_end=True loads full weights, and shard_size={self.shard_size} shards them: set it "
                "to False, and take the folder that summary.json names as best_checkpoint",
            ),
            (
                self.rollout_engine is not None
                and not self.rollout_engine.gives_logits
                and not self.likelihood.exact_ratios,
                f"rollout_engine={describe(self.rollout_engine)} records the log-probs of the tokens that it samples, "
                f"and likelihood={self.likelihood.name!r} scores others: use Causal() for an autoregressive model",
            ),
            (
                self.loss is not None and self.corrector.loss is not None,
                f"loss={describe(self.loss)} and the corrector's loss {describe(self.corrector.loss)} are two "
                "objectives: use loss=None (--loss none), or a corrector without a loss",
            ),
            (
                not self.num_iterations and self.replay is None,
                "num_iterations=0 trains on nothing without replay: set replay=Replay(min_reward=...), or use "
                "num_iterations=1",
            ),
            (
                not self.num_iterations and bool(self.beta or self.entropy_coeff),
                "num_iterations=0 has no policy gradient, to which beta and entropy_coeff belong: leave "
                "them out, or use num_iterations=1",
            ),
            (
                self.replay is not None and self.teacher is not None,
                "replay keeps answers by their reward, and with a teacher the reward is not the task's: leave one out",
            ),
            (
                self.old_logprobs == "rollout" and not self.corrector.only_masks,
                "old_logprobs='rollout' divides by the rollout's probabilities, which corrects the mismatch, and a "
                "corrector's weights would correct it a second time: use a corrector that only drops, such as "
                "NoCorrection() or Reject(), or old_logprobs='recompute'",
            ),
            (
                self.zero_mismatch and self.has_separate_rollout_policy and not self.corrector.align_forward,
                "zero_mismatch=True needs rollout_quantization=None and no engine, or a corrector that aligns forwards",
            ),
            (
                self.zero_mismatch and not is_quantized and not self.likelihood.exact_for_sampler,
                f"zero_mismatch=True with likelihood={self.likelihood.name!r} would compare the learner's log-probs "
                f"with themselves: that estimator does not replay the sampler; use {EXACT}, or zero_mismatch=False",
            ),
            (
                self.zero_mismatch and self.sampling_support == "unfiltered",
                "zero_mismatch=True cannot be combined with sampling_support='unfiltered': its rollout log-probs are "
                "rounded sums of two recorded numbers, not bit for bit the learner's; use 'per_policy' or 'rollout'",
            ),
        ]
        growth = self.likelihood.variance_growth
        if growth is not None:
            every_step = f"likelihood.variance_growth={growth:g} scores some of a row's steps, and"
            conflicts += [
                (
                    not takes_drawn_steps(self.resolved_loss),
                    f"{every_step} loss={describe(self.resolved_loss)} needs all tokens of a row: use PPOClip, CISPO "
                    "or GSPO, or likelihood.variance_growth=None",
                ),
                (
                    not self.corrector.takes_drawn_steps,
                    f"{every_step} corrector={describe(self.corrector)} needs all tokens of a row: use TIS, MIS or "
                    "IcePop with their defaults or AIS(pool='geometric'), or likelihood.variance_growth=None",
                ),
            ]
        if self.base_quantization is not None:
            conflicts += self.low_bit_conflicts(f"base_quantization={self.base_quantization!r}")
        return conflicts + self._compile_conflicts() + self._async_conflicts() + self._teacher_conflicts()

    def low_bit_conflicts(self, base: str) -> list[tuple[bool, str]]:
        """Return the conflicts with bitsandbytes weights, whose origin the messages call `base`."""
        no_copy = f"cannot be combined with {base}, whose weights have no copy on the host; use"
        return [
            *super().low_bit_conflicts(base),
            (self.saves.in_background, f"saves.in_background=True {no_copy} saves.in_background=False"),
            (self.late is not None, f"late={self.late} {no_copy} late=None"),
            (
                self.warmup.steps > 0,
                f"warmup.steps={self.warmup.steps} trains all weights, and {base} freezes them: warm up in a "
                "run without it, and take its checkpoint",
            ),
        ]

    @property
    def _compiled_samplers(self) -> list[Unmask]:
        samplers = (self.sampler, self.eval_sampler)
        return [sampler for sampler in samplers if isinstance(sampler, Unmask) and sampler.compile_step]

    def _compile_conflicts(self) -> list[tuple[bool, str]]:
        setting = "torch_compile" if self.torch_compile else "compile_step"
        compiles = self.torch_compile or bool(self._compiled_samplers)
        remedy = f", or set {setting}=False"
        return [
            (
                compiles and self.rollout_engine is not None,
                f"{setting}=True compiles forwards of this process, which a rollout_engine replaces: leave "
                f"rollout_engine out{remedy}",
            ),
            (
                compiles and self.zero_mismatch,
                f"{setting}=True rounds differently from the eager learner, which zero_mismatch forbids: leave one of "
                f"them out{remedy}",
            ),
            (
                self.torch_compile and bool(self._compiled_samplers),
                "torch_compile=True compiles forwards, and the sampler's compile_step=True compiles full steps: leave "
                f"one of them out{remedy}",
            ),
        ]

    def _async_conflicts(self) -> list[tuple[bool, str]]:
        if self.late is None:
            return []
        workers, is_late = f"late.workers={self.late.workers}", self.late.max_staleness > 0
        staleness = f"late.max_staleness={self.late.max_staleness}"
        return [
            (
                is_late and self.zero_mismatch,
                f"zero_mismatch=True stops if rollout and learner differ, as they do with {staleness}: leave one out",
            ),
            (
                is_late and self.teacher is not None and not self.likelihood.exact_for_sampler,
                f"teacher with {staleness} and likelihood={self.likelihood.name!r}: a worker scores the groups whose "
                f"rewards differ, and the teacher changes the rewards afterwards: use {EXACT}, or late.max_staleness=0",
            ),
            (
                self.prompt_source.uses_history,
                f"{workers} draw prompts before earlier rewards are available, which "
                f"prompt_source={describe(self.prompt_source)} reads: use UniformPrompts, or late=None",
            ),
            (
                self.rollout_engine is not None and self.rollout_engine.is_exclusive,
                f"{workers} load the rollout_engine a second time, and it serves one process: leave one out",
            ),
            (
                getattr(self.task, "graded_once", False),
                f"{workers} grade with copies of the task and repeat a batch that fails, and an Oracle "
                "(graded_once) knows no copy's calls: use late=None",
            ),
            (
                "hidden" in getattr(getattr(self.sampler, "rank", None), "reads", ()),
                f"{workers} sample with copies of the sampler's rank, which reads hidden: weights of "
                "its own that training changes do not reach them; use late=None",
            ),
            (
                self.torch_compile,
                f"{workers} do not compile their forwards, as torch_compile=True asks: leave one out",
            ),
        ]

    def _teacher_conflicts(self) -> list[tuple[bool, str]]:
        has_teacher = self.teacher is not None
        return [
            (
                has_teacher and self.advantages.takes_component_rewards,
                f"advantages={describe(self.advantages)} takes the task's component rewards, and the teacher's "
                "reward is not one of them: use GroupRelative, or leave the teacher out",
            ),
            (
                has_teacher and self.max_num_gen_batches > 1,
                f"max_num_gen_batches={self.max_num_gen_batches} redraws groups of equal rewards, and with a "
                "teacher rewards always differ: use 1, or leave the teacher out",
            ),
        ]

    @property
    def needs_reference_policy(self) -> bool:
        """Whether a run stores the policy that RL started from, for the KL term or as a teacher."""
        return bool(self.beta) or (self.teacher is not None and self.teacher.is_reference)

    @property
    def has_separate_rollout_policy(self) -> bool:
        """Whether a policy other than the learner samples: a quantized copy, or an external engine."""
        return self.rollout_quantization is not None or self.rollout_engine is not None

    def settings(self) -> dict[str, Any]:
        """Return the recipe for JSON, with the loss and the reduction in effect."""
        return super().settings() | {
            "loss": to_json(self.resolved_loss),
            "loss_reduction": to_json(self.resolved_loss_reduction),
        }


Recipe.__doc__ = documented(Recipe)
