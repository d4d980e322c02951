"""Does a soft clip do better than PPO's, where a rollout serves four updates? The task: two digits in reverse order.

python -m recipes.examples.paired_study tune     each loss's width, on seeds and held-out rows that the study lacks
python -m recipes.examples.paired_study run      the missing runs of the study, then its tables
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

from dllm_rl import PPOClip, grpo_recipe, tiny_masked_lm
from dllm_rl.algorithms.losses import exp_ratio
from recipes.studies.paired import Contrast, Study, main, tune, which


def soft_clip(log_ratio, advantages, mask, *, width):
    change = exp_ratio(log_ratio) - 1
    return (1 + change / (1 + change.abs() / width)) * advantages[:, None]


def right(completions, answer, **columns):
    """Return the share of right digits: the reward, and the metric that the study compares."""
    return [sum(map(str.__eq__, *pair)) / 2 for pair in zip(completions, answer, strict=True)]


rows = [{"prompt": f"{a}{b}=", "answer": f"{b}{a}"} for a in "12345678" for b in "12345678"]
Random(0).shuffle(rows)
model = partial(
    tiny_masked_lm, characters="12345678=", hidden_size=32, num_layers=2, num_attention_heads=2
)  # takes the seed
settings = {"max_new_tokens": 2, "num_iterations": 4, "train_batch_size": 16, "learning_rate": 1e-3}
base = grpo_recipe(model, rows[:32], right, eval_dataset=rows[32:48], **settings)
PPO = {f"PPO {width}": {"loss": PPOClip(epsilon=width)} for width in (0.1, 0.4)}
SOFT = {f"soft {width}": {"loss": partial(soft_clip, width=width)} for width in (0.1, 0.4)}

study = Study(
    name="paired-study",
    base=base,
    arms={"PPO 0.1": PPO["PPO 0.1"], "soft 0.1": SOFT["soft 0.1"], "one update": {"num_iterations": 1}},
    against={"soft 0.1": "PPO 0.1", "one update": "PPO 0.1"},  # whose seeds an arm is compared with
    metrics={"ratio": "ratio/mean"},  # a column of the table: the mean over the steps of a run
    seeds=7,
    num_steps=40,
    contrasts=(  # the claims, written before the runs
        Contrast("the soft clip ends above PPO's", arm="soft 0.1", against="PPO 0.1"),
        Contrast("four updates end above one", arm="PPO 0.1", against="one update"),
    ),
    metric="right",  # of the evaluation on held-out rows
)
trials = replace(
    study,
    base=grpo_recipe(model, rows[:32], right, eval_dataset=rows[48:], **settings),  # other held-out rows
    arms=PPO | SOFT,  # as many trials for the one as for the other
    against={},
    contrasts=(),
)

if __name__ == "__main__":
    if which(("run", "tune")) == "tune":
        tune(trials, Path("runs/paired-study-tuning"))
    else:
        main(study, __doc__, stored=Path("paired_study.json"))
