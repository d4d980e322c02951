"""Benchmarks: each prints a table, and writes JSON with --json. Numbers and what they were measured on: README.md."""

import dllm_rl  # noqa: F401  # first, so that its filter keeps other libraries' start-up messages off the screen
