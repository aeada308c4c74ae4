"""What `test_shared_work.py` runs in several processes, without torchrun, which ends them all with the first."""

import json
import os
import signal
import sys
from pathlib import Path

from sdtrain.ground.errors import DiskFullError, InputError
from sdtrain.ground.processes import Processes, joined


def ordered(processes: Processes) -> list:
    """Seven batches, then two, then none; each with the process that computed it."""
    return [list(processes.map(lambda batch: [batch * batch, processes.index], range(num))) for num in (7, 2, 0)]


def two_bad_batches(processes: Processes) -> None:
    """In the second round of three."""

    def compute(batch: int) -> None:
        assert batch < 6, "the round after the faulty one"
        if batch in (4, 5):
            raise InputError(f"batch {batch} is bad")

    list(processes.map(compute, range(9)))


def fault_before_the_first_batch(processes: Processes) -> None:
    if processes.index == 2:
        raise DiskFullError("a file", None, None, None)
    list(processes.map(str, range(3)))


def fault_of_the_main_one_at_its_end(processes: Processes) -> None:
    list(processes.map(str, range(3)))
    if processes.is_main:
        raise InputError("can't be written")


def bug(processes: Processes) -> None:
    list(processes.map(lambda batch: {0: 0, 1: 1}[batch], range(3)))


def killed(processes: Processes) -> None:
    if processes.index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    list(processes.map(str, range(3)))


SCENES = (ordered, two_bad_batches, fault_before_the_first_batch, fault_of_the_main_one_at_its_end, bug, killed)


def main(out: Path, ports: list[str]) -> None:
    """Write what each scene gives or raises in each process to `<scene>-<rank>.json`; each scene has its own port."""
    for scene, port in zip(SCENES, ports, strict=True):
        os.environ["MASTER_PORT"] = port
        try:
            with joined() as processes:
                print(f"{scene.__name__} in {processes.index}", flush=True)
                found = {"returned": scene(processes)}
        except BaseException as error:
            found = {"raised": type(error).__name__, "message": str(error)}
        (out / f"{scene.__name__}-{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
