"""The rollout's quantised copy of a policy: schemes, layers, sync, aligned forward. The one room of torchao."""
