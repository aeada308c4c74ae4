"""Which checkpoints are kept, and when a run stops early."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """A validated step, by its held-out loss (of the EMA where there is one)."""

    step: int
    loss: float


def ranked(best: list[Candidate], new: Candidate, num: int) -> list[Candidate]:
    """The `num` best with `new` among them if it is one; by rising loss, of equals the earlier first."""
    return sorted([*best, new], key=lambda candidate: candidate.loss)[:num]


def has_stalled(best: list[Candidate], validated_steps: list[int], patience: int | None) -> bool:
    """Whether `patience` validations (None: any number) have come after the best one."""
    if patience is None or not best:
        return False
    return sum(step > best[0].step for step in validated_steps) >= patience
