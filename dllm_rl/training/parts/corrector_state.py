"""What a corrector keeps from update to update, in the checkpoints of a run."""

import json

from dllm_rl.step.context import StepContext, StepFeature


class CorrectorState(StepFeature):
    """Stores `StepContext.corrector_state`, which the step keeps."""

    def state(self, context: StepContext) -> bytes | None:
        name = type(context.settings.corrector).__name__
        kept = context.corrector_state
        return json.dumps({"corrector": name, "state": kept}).encode() if kept else None

    def load_state(self, context: StepContext, state: bytes) -> None:
        stored = json.loads(state)
        if stored["corrector"] == type(context.settings.corrector).__name__:  # a resume may change it
            context.corrector_state = stored["state"]
