"""What a run returns."""

from collections.abc import Mapping
from typing import Any

from dllm_rl.models.base import Policy


class Summary(dict[str, Any]):
    """The content of summary.json. The attribute `policy` is the trained policy; files and comparisons ignore it."""

    def __init__(self, numbers: Mapping[str, Any], policy: Policy | None = None) -> None:
        super().__init__(numbers)
        self._policy = policy

    @property
    def policy(self) -> Policy:
        """Return the policy after the last step, with its adapters.

        Raises:
            ValueError: The run was a dry run, which trains no policy.
        """
        if self._policy is None:
            raise ValueError("dry_run=True trains no policy; run without it")
        return self._policy
