"""The rollout's quantized copy of a policy: schemes, layers, sync, aligned forward.

Only this package imports torchao.
"""
