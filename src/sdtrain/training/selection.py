"""Which checkpoints are kept, and when a run stops early."""

from pydantic import BaseModel, ConfigDict, NonNegativeInt


class Candidate(BaseModel):
    """A validated step and its held-out loss (of the EMA where there is one)."""

    model_config = ConfigDict(strict=True, frozen=True)

    step: NonNegativeInt
    loss: float


def ranked(best: list[Candidate], new: Candidate, num: int) -> list[Candidate]:
    """The `num` best with `new` among them if it is one; by rising loss, of equals the earlier first."""
    return sorted([*best, new], key=lambda candidate: candidate.loss)[:num]


def has_stalled(best: list[Candidate], validated_steps: list[int], patience: int | None) -> bool:
    """Whether `patience` validations (None: any number) have come after the best one."""
    if patience is None or not best:
        return False
    return sum(step > best[0].step for step in validated_steps) >= patience
