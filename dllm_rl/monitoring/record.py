"""What a run's line on the screen, `dllm-rl status`, its summary and its picture say about its steps."""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import median

from dllm_rl.monitoring.health import (
    DIRECTION,
    DIRECTION_WINDOW,
    WINDOW,
    Problem,
    health,
    learning_problems,
    mixed_share,
)

ESS = "rollout_corr/ess"
MISMATCH = "rollout_corr/abs_log_ratio_mean"
ROUNDING = 1e-6  # nats; a smaller mismatch, as without a copy, is not shown
NOT_TRAINING = ("time/evaluation", "time/warm-up")  # stages that are not part of the seconds a step


class RunRecord:
    """The steps of a run so far. It keeps only what `line` and `problems` need.

    Args:
        rows: Finite metrics of the steps that are done already, as metrics.jsonl has them. Default: none.
        exact: Whether importance ratios are exact, not estimated. Default: True.
    """

    def __init__(self, rows: Iterable[Mapping[str, float]] = (), *, exact: bool = True) -> None:
        self.exact = exact
        self.rows: list[Mapping[str, float]] = []  # the first WINDOW and the last WINDOW
        self.num_steps = 0
        self.held_out: tuple[int, dict[str, float]] | None = None  # the steps before the newest evaluation; its metrics
        self.directions = deque[float](maxlen=DIRECTION_WINDOW)
        self.first_ess: float | None = None
        self.num_tokens = 0.0
        self.seconds = deque[float](maxlen=WINDOW)
        self.speeds = deque[float](maxlen=WINDOW)  # tokens a second
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, float]) -> None:
        """Add the finite metrics of the next step."""
        self.num_steps = int(row.get("step", self.num_steps)) + 1
        if held_out := {name.removeprefix("eval/"): row[name] for name in row if name.startswith("eval/")}:
            self.held_out = self.num_steps, held_out
        self.directions += [row[DIRECTION]] if DIRECTION in row else []
        self.first_ess = row.get(ESS) if self.first_ess is None else self.first_ess
        seconds = row.get("step_time", 0.0) - math.fsum(row.get(name, 0.0) for name in NOT_TRAINING)
        if seconds > 0:
            self.seconds.append(seconds)
            if "num_tokens" in row:
                self.speeds.append((row["num_tokens"] - self.num_tokens) / seconds)
        self.num_tokens = row.get("num_tokens", self.num_tokens)
        self.rows.append(row)
        del self.rows[WINDOW:-WINDOW]

    @property
    def problems(self) -> list[Problem]:
        """What keeps the run from learning, the worst first."""
        return learning_problems(self.rows)

    def line(self) -> str:
        """Return the last step in a line, which docs/runs.md explains; "" before the first step."""
        if not self.rows:
            return ""
        row = self.rows[-1]
        # The loss of RL does not show progress.
        trained = {"reward": row["reward"]} if "reward" in row else {"loss": row["loss"]} if "loss" in row else {}
        trained |= {name.split("/")[1]: row[name] for name in row if is_reward_function(name)}
        texts = [rewards_text({name: f"{value:.3g}" for name, value in trained.items()})]
        if self.held_out is not None:
            step, held_out = self.held_out
            listed = rewards_text({name: f"{value:.3g}" for name, value in held_out.items()})
            texts.append(f"held-out at {step}: {listed}")
        mixed = mixed_share(row)
        texts += [] if mixed is None else [f"mixed groups {mixed:.2g}"]
        for name, label in {"grad_norm": "grad norm", "completions/clipped_ratio": "cut"}.items():
            texts += [f"{label} {row[name]:.2g}"] if name in row else []
        speed = [f"{median(self.seconds):.2g} s a step"] if self.seconds else []
        speed += [f"{rounded(median(self.speeds))} tokens a second"] if self.speeds else []
        return "  ".join(filter(None, [*texts, ", ".join(speed), *self.verdicts()]))

    def verdicts(self) -> list[str]:
        """Return the size of the mismatch, and what is wrong; "healthy" if WINDOW steps show no problem."""
        row = self.rows[-1]
        is_measured = len(self.directions) == DIRECTION_WINDOW
        direction = math.fsum(self.directions) / DIRECTION_WINDOW if is_measured else 0.0
        # Without a copy or late rollouts, an estimate cancels in the ratio, too.
        is_exact = self.exact or row.get(MISMATCH, math.inf) <= ROUNDING
        found = health(dict(row), direction=direction, first_ess=None if is_exact else self.first_ess)
        word, reason = found or ("", "")
        size = f"mismatch {row[MISMATCH]:.2g} nats" if row.get(MISMATCH, 0.0) > ROUNDING else ""
        texts = [size]
        if word in ("healthy", "backwards"):  # whose reason is not the mismatch
            texts = [f"{size}, ESS {row[ESS]:.4f}" if size and ESS in row else size]
            texts += [f"updates backwards ({reason})"] if word == "backwards" else []
        elif word == "estimated":
            texts = [f"{size}, {reason}" if size else reason]
        elif word:
            texts = [f"{size}, {word} ({reason})" if size else f"mismatch {word} ({reason})"]
        if problems := self.problems:
            texts.append(f"{problems[0].state} ({', '.join(problem.name for problem in problems)})")
        elif word == "healthy" and len(self.rows) >= WINDOW:
            texts.append(word)
        return texts


def is_reward_function(name: str) -> bool:
    """Return whether a metric is a step's mean of a reward function, or of one of its task's metrics."""
    return name.startswith("rewards/") and name.endswith("/mean")


def rewards_text(texts: Mapping[str, str]) -> str:
    """Return the reward and every reward function by name, as "reward 0.5 (share 0.4, first 0.1)". `texts` are their
    numbers by name.

    A single function that is the reward is not named, and whether answers were parsed is left out.
    """
    parts = {name: text for name, text in texts.items() if name not in ("reward", "parsed")}
    listed = ", ".join(f"{name} {text}" for name, text in parts.items())
    if "reward" not in texts:
        return listed
    is_named = list(parts.values()) not in ([], [texts["reward"]])
    return f"reward {texts['reward']}" + f" ({listed})" * is_named


def rounded(value: float) -> str:
    """Return a number of two digits or more as an integer, and a smaller one with two digits."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
