"""A corrector of your own, and its checks (docs/extend-objective.md); on a recipe's command line
`--corrector recipes.examples.own_corrector.Doubt --corrector.width 0.3`.

python -m recipes.examples.own_corrector
"""

from dllm_rl import TIS, Corrector, TokenWeights, option
from dllm_rl.algorithms.correctors import drop_nonfinite
from dllm_rl.testing import check_corrector
from dllm_rl.testing.enumeration import corrects


class Doubt(Corrector):
    """w = exp(-|log p_old - log p_rollout| / width): the more the two disagree on a token, the less it counts."""

    width: float = option(default=0.5, above=0)

    def weights(self, stats):
        log_mismatch, keep, metrics = drop_nonfinite(stats.log_mismatch, stats.mask)  # drops tokens, and counts them
        weights = (-log_mismatch.abs() / self.width).exp()  # 1 where both agree
        mean = (weights * keep).sum().item() / max(1, keep.sum().item())
        return TokenWeights(weights, keep, metrics | {"doubt/mean_weight": mean})


if __name__ == "__main__":
    corrector = Doubt()
    check_corrector(corrector)  # the contract
    print(corrects(TIS()), corrects(corrector))  # does it correct? True False
