"""Takes the GPUs that a stage needs, before anything asks CUDA."""

from pathlib import Path

from sdtrain.ground.gpus import lease_gpus, visible_gpus
from sdtrain.params.load import load_params
from sdtrain.params.machine import check_machine, launch_numbers
from sdtrain.params.schema import Params


def load_params_and_lease(path: Path, num_gpus: int | None = None) -> Params:
    """Read and check a params file, lease GPUs, and check that the params can train on these.

    In this order: a wrong param is told before the wait for a GPU, and the last check may start CUDA, after which a
    lease would come too late.

    Args:
        num_gpus: None is one for each process here.

    Raises:
        InputError: names every fault of the file, or of the machine; or there are too few GPUs.
    """
    params = load_params(path)
    (num_processes, _), num_visible = launch_numbers(), len(visible_gpus())
    lease_gpus(num_processes if num_gpus is None else num_gpus)
    check_machine(params.train, num_visible or None)
    return params
