"""Check custom correctors, engines, estimators, orders and policies against the contracts that training relies on."""

from dllm_rl.testing.engine_contract import check_engine
from dllm_rl.testing.method_contracts import check_corrector, check_estimator, loss_of, make_batch, make_stats
from dllm_rl.testing.policy_contract import check_policy
from dllm_rl.testing.sampling_contracts import Shares, check_order, weighted_shares
from dllm_rl.testing.tiny_checkpoint import tiny_checkpoint

__all__ = [
    "Shares",
    "check_corrector",
    "check_engine",
    "check_estimator",
    "check_order",
    "check_policy",
    "loss_of",
    "make_batch",
    "make_stats",
    "tiny_checkpoint",
    "weighted_shares",
]
