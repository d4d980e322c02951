"""A server of the library's samplers (`dllm-rl serve`), and the rollout engine that uses one."""
