"""Leases on GPUs, so that jobs which run at the same time never share one.

A lease is a shared `flock` on a file named by the device's UUID, in a folder that all users of the machine share. The
kernel frees it when the last process of the job that holds it has ended, however that was. A device is free if an
exclusive lock succeeds; this probe, and its conversion to a shared lock, which isn't atomic, happen under one lock for
the whole machine. So jobs that want several devices get all of them or none, and can't wait for each other.

CUDA reads `CUDA_VISIBLE_DEVICES` once, when it is first asked anything: lease before that.
"""

import fcntl
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sdtrain.ground.errors import InputError

_LEASED = "SDTRAIN_LEASED_GPUS"
"""Names, for a job's worker processes, the UUIDs that it leased."""
_POLL_S = 1.0
_GPU = re.compile(r"GPU (?P<index>\d+): (?P<name>.*) \(UUID: (?P<uuid>\S+)\)")
_SLICE = re.compile(r"\s+MIG (?P<name>\S+)\s.*\(UUID: (?P<uuid>\S+)\)")


@dataclass(frozen=True)
class Gpu:
    """A GPU, or a slice of one.

    Args:
        index: of the GPU, as nvidia-smi counts.
        gpu_uuid: of the whole GPU.
    """

    index: int
    name: str
    uuid: str
    gpu_uuid: str

    @property
    def is_slice(self) -> bool:
        return self.uuid != self.gpu_uuid


def visible_gpus() -> list[Gpu]:
    """The devices that `nvidia-smi -L` lists and `CUDA_VISIBLE_DEVICES` allows, in its order.

    A GPU that is divided (MIG) is listed as its slices. Without nvidia-smi there are no devices.
    """
    gpus = _listed_gpus()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return gpus
    found: list[Gpu] = []
    for entry in visible.split(","):
        chosen = _chosen(entry.strip(), gpus)
        if not chosen:  # CUDA ignores all that follows an entry that it can't resolve
            break
        if set(chosen) & set(found):  # and sees no device at all if one is named twice
            return []
        found += chosen
    return found


def lease_gpus(num: int = 1) -> None:
    """Lease `num` GPUs for this process and all that it starts, and let CUDA see these only; waits until they are free.

    Where there are no GPUs nothing happens. A worker of a launched job shares the job's lease instead; one that was
    launched by hand gets none.

    Raises:
        InputError: more are wanted than there are.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _share_lease()
        return
    gpus = visible_gpus()
    if not gpus:
        return
    usable = gpus if num == 1 else [gpu for gpu in gpus if not gpu.is_slice]
    if num > len(usable):
        raise InputError(
            f"NPROC = {num}: each process needs its own whole GPU, and this job may use {len(usable)} "
            f"(CUDA_VISIBLE_DEVICES = {os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}); lower NPROC"
        )
    leased, holders = _try_lease(num, usable)
    if not leased:
        print(f"waits for {num} of {len(usable)} GPUs; {'; '.join(holders)}", file=sys.stderr, flush=True)
    while not leased:
        time.sleep(_POLL_S)
        leased, _ = _try_lease(num, usable)
    uuids = ",".join(gpu.uuid for gpu in leased)
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ[_LEASED] = uuids
    names = ", ".join(f"GPU {gpu.index} ({gpu.name}, {gpu.uuid})" for gpu in leased)
    print(f"leased {names}", file=sys.stderr, flush=True)


def _listed_gpus() -> list[Gpu]:
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    except OSError:
        return []
    if done.returncode != 0:
        return []
    wholes: list[Gpu] = []
    slices: list[Gpu] = []
    for line in done.stdout.splitlines():
        if match := _GPU.match(line):
            wholes.append(Gpu(int(match["index"]), match["name"], match["uuid"], gpu_uuid=match["uuid"]))
        elif match := _SLICE.match(line):
            whole = wholes[-1]
            slices.append(Gpu(whole.index, f"{whole.name} {match['name']}", match["uuid"], gpu_uuid=whole.uuid))
    divided = {part.gpu_uuid for part in slices}
    return sorted([*(gpu for gpu in wholes if gpu.uuid not in divided), *slices], key=lambda gpu: gpu.index)


def _chosen(entry: str, gpus: list[Gpu]) -> list[Gpu]:
    """The device, or a divided GPU's slices, that an entry of `CUDA_VISIBLE_DEVICES` names: an index, or what only one
    UUID starts with."""
    if entry.startswith("MIG-"):
        named = [gpu for gpu in gpus if gpu.is_slice and gpu.uuid.startswith(entry)]
        return named if len(named) == 1 else []
    if entry.startswith("GPU-"):
        named = [gpu for gpu in gpus if gpu.gpu_uuid.startswith(entry)]
    else:
        number = re.match(r"\+?\d+", entry)  # CUDA reads it by strtoul: what follows the digits is ignored
        named = [gpu for gpu in gpus if number and gpu.index == int(number[0])]
    return named if len({gpu.gpu_uuid for gpu in named}) == 1 else []


def _try_lease(num: int, gpus: list[Gpu]) -> tuple[list[Gpu], list[str]]:
    """Lease the first `num` devices that are free; none if these are fewer. And who holds those that aren't."""
    free: dict[Gpu, int] = {}
    holders: list[str] = []
    with _picking():
        for gpu in gpus:
            descriptor = _open(f"{gpu.uuid}.lock")
            if _lock(descriptor, fcntl.LOCK_EX):
                free[gpu] = descriptor
            else:
                holders.append(f"GPU {gpu.index} is held by {os.pread(descriptor, 4096, 0).decode(errors='replace')}")
                os.close(descriptor)
            if len(free) == num:
                break
        if len(free) < num:
            for descriptor in free.values():
                os.close(descriptor)
            return [], holders
        for descriptor in free.values():
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} in {Path.cwd()}".encode(), 0)
            _hold(descriptor)
    return list(free), holders


def _share_lease() -> None:
    """Hold what the job that launched this process leased, too: workers may outlive their launcher."""
    uuids = os.environ.get(_LEASED)
    if uuids is None:
        return
    with _picking():  # else a probe might be holding it at this moment
        for uuid in uuids.split(","):
            _hold(_open(f"{uuid}.lock"))


def _hold(descriptor: int) -> None:
    """Hold it shared until the last process that inherits it has ended, over `exec` as well."""
    assert _lock(descriptor, fcntl.LOCK_SH), "only a probe locks exclusively, and none runs while we pick"
    os.set_inheritable(descriptor, True)


def _lock(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _picking() -> Iterator[None]:
    descriptor = _open("picking.lock")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _open(name: str) -> int:
    """Open a lock file for reading and writing, whoever made it.

    A file that exists is opened without O_CREAT, which Linux refuses for files of others in a folder like this one
    (fs.protected_regular).
    """
    folder = Path(tempfile.gettempdir()) / "sdtrain-gpus"
    mask = os.umask(0)  # so that all users may write
    try:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o1777)
        while True:
            with suppress(FileNotFoundError):
                return os.open(folder / name, os.O_RDWR | os.O_NOFOLLOW)
            with suppress(FileExistsError):
                return os.open(folder / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError as error:
        raise InputError(
            f"{folder / name}: can't be opened to lease a GPU: {error.strerror}; delete it, or "
            "set TMPDIR to a folder that all users may write to"
        ) from None
    finally:
        os.umask(mask)
