"""Whether the library works with a model: the sections of `dllm-rl doctor MODEL`."""
