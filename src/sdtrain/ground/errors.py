"""Exceptions for faults in the input or the machine; their messages say what to do."""


class InputError(ValueError):
    """A fault in what the user gave: params, data, a model or the environment.

    Stages and the command line print only its message, without a traceback.
    """


class DiskFullError(InputError):
    """A disk or quota was full.

    Args:
        what: names what couldn't be written.
        needs_bytes: its size, where it is known.
        free_bytes: the free space for it, where it is known.
        safe: says what was saved before, where it is known.
    """

    def __init__(self, what: str, needs_bytes: int | None, free_bytes: int | None, safe: str | None) -> None:
        self.what, self.needs_bytes, self.free_bytes, self.safe = what, needs_bytes, free_bytes, safe
        sizes = [f"needs {_size(needs_bytes)}"] if needs_bytes is not None else []
        sizes += [f"{_size(free_bytes)} are free"] if free_bytes is not None else []
        numbers = f" ({', '.join(sizes)})" if sizes else ""
        super().__init__(
            f"no space left on the disk, or in your quota, to write {what}{numbers}; "
            f"{safe or 'nothing that was written before is lost'}; free some space, then run the same command again"
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.2f} MiB"
