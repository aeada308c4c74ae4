"""Which checkpoints are kept, and when a run stops early."""

from pydantic import BaseModel, ConfigDict, NonNegativeInt


class Candidate(BaseModel):
    """A validated step and its held-out loss (of the EMA where there is one)."""

    model_config = ConfigDict(strict=True, frozen=True)

    step: NonNegativeInt
    loss: float


def ranked(best: list[Candidate], new: Candidate, num: int) -> list[Candidate]:
    """The `num` best of `best` and `new`, by rising loss; of equal losses the earlier step comes first."""
    return sorted([*best, new], key=lambda candidate: candidate.loss)[:num]


def has_stalled(best: list[Candidate], validated_steps: list[int], patience: int | None) -> bool:
    """Whether there have been `patience` validations since the best one; never if `patience` is None."""
    if patience is None or not best:
        return False
    return sum(step > best[0].step for step in validated_steps) >= patience
