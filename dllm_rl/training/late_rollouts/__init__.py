"""Late rollouts: workers make the batches of later steps while the learner trains (`rollout_workers`, `max_staleness`).

The batch of step m is sampled with the weights after max(0, m - K) steps, K = max_staleness, whatever the number of
workers and their speed. It is one job of one worker, and so one call with the same shapes: its bits do not depend on
who makes it. Weights, and the batches that come back, travel as the bytes of a safetensors file; a checkpoint holds
the same bytes.
"""
