"""What connects to other programs: TRL's trainer, lm-evaluation-harness, the HTTP server and its client engine, vLLM,
Ray's workers, and laboratories behind an `Oracle`.

No training step needs it, and nothing below the commands imports it. A run starts Ray's workers by their name,
`RAY_WORKERS` of `training/late_rollouts/schedule.py`.
"""
