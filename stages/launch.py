"""Starts a stage with several processes, on one machine or more."""

import os
import sys

from sdtrain.ground.errors import InputError
from sdtrain.params.machine import launch_numbers


def launch(module: str, one_machine: bool = False) -> None:
    """Restart this stage under torchrun if `NPROC` or `NNODES` ask for more than one process.

    `NPROC` is the number of processes on this machine, `NNODES` the number of machines. Each machine runs the
    same command with its own `NODE_RANK`, and with the first one's `MASTER_ADDR` and `MASTER_PORT`.

    Args:
        one_machine: leave `NNODES` aside: the stage works on this machine alone, whatever `train` does.

    Raises:
        InputError: one of these is missing, or isn't a number.
    """
    num_processes, num_nodes = launch_numbers()
    num_nodes = 1 if one_machine else num_nodes
    if num_processes * num_nodes == 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    command = [sys.executable, "-m", "stages.torchrun", f"--nproc-per-node={num_processes}"]
    if num_nodes == 1:
        command.append("--standalone")
    else:
        missing = [name for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise InputError(f"NNODES = {num_nodes}: set {', '.join(missing)} too; docs/training.md shows how")
        command += [f"--nnodes={num_nodes}", f"--node-rank={os.environ['NODE_RANK']}"]
        command += [f"--master-addr={os.environ['MASTER_ADDR']}", f"--master-port={os.environ['MASTER_PORT']}"]
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # seconds to save after a signal
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    os.execv(sys.executable, [*command, "-m", module])
