"""The `dllm-rl` command."""
