"""What connects to other programs: TRL's trainer, lm-evaluation-harness, the HTTP server and its client engine, vLLM.

No training step needs it, and nothing below the commands imports it.
"""
