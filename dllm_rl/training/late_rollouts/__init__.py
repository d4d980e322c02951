"""Asynchronous rollouts: workers make the batches of later steps while the learner trains (`late`).

The batch of step m is sampled with the weights after max(0, m - K) steps, K = max_staleness, whatever the number of
workers and their speed. A batch is one job of one worker, so that all its calls have the same shapes: its bits do not
depend on the worker that makes it. Weights and batches travel as the bytes of a safetensors file; a checkpoint stores
the same bytes.
"""
