"""Arithmetic of the learning rate."""


def scaled_lr(lr: float, scaling: str, batch_size: int, reference_batch_size: int | None) -> float:
    """The learning rate for an effective batch: `lr` holds at the reference, and grows with the batch or its root.

    Args:
        scaling: `none`, `sqrt` or `linear`.
    """
    if scaling == "none":
        return lr
    ratio = batch_size / reference_batch_size
    return lr * (ratio if scaling == "linear" else ratio**0.5)
