"""Settings of replay: train on earlier right answers again."""

from dllm_rl.records import Record, option


class Replay(Record):
    """Keep right answers, and train on them again after each step's update, under fresh random masks.

    Use it as `replay` if rewards can be verified. GRPO uses a completion once, and rollouts are most of its time; a
    right answer stays right, and supervised updates on it cost no rollout. An answer is kept as tokens without
    log-probs: no ratio is needed, and it does not matter which weights or which quantized copy wrote it. The same text,
    sampled again, is one more answer. With `num_iterations=0` there is no policy gradient, and the run is expert
    iteration (RAFT).

    It logs replay/size (answers in the store), replay/loss (nats per token, of the last update), replay/updates,
    replay/visits (trainings per answer in this step) and replay/age (mean age, in steps, of the answers trained on).

    Args:
        min_reward: Reward from which an answer counts as right: usually the largest that the task gives.
        num_updates: Largest number of updates per step, at least 1. Default: 8.
        batch_size: Answers per update, over all processes, at least 1. Default: 64.
        max_replays: Largest number of trainings on an answer per step, at least 1. A small store then gets fewer
            updates. Without such a limit, a model that writes few right answers learns to write only these.
            Default: 4.
        capacity: Largest number of answers in the store, at least 1; the oldest leave first. Default: 16384.
        learning_rate: Learning rate of the replay updates, above 0, with the run's schedule. None (default): the run's.

    Source: RAFT, arXiv 2304.06767 and 2504.11343; ReST-EM, arXiv 2312.06585. The random masks are those of LLaDA's SFT
    loss, and `max_replays` is [ours].
    """

    min_reward: float = option()
    num_updates: int = option(default=8, at_least=1)
    batch_size: int = option(default=64, at_least=1)
    max_replays: int = option(default=4, at_least=1)
    capacity: int = option(default=16384, at_least=1)
    learning_rate: float | None = option(default=None, above=0)
