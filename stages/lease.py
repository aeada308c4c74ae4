"""Takes the GPUs that a stage needs, before anything asks CUDA."""

from pathlib import Path

from sdtrain.ground.gpus import lease_gpus
from sdtrain.params.load import load_params
from sdtrain.params.machine import check_machine, launch_numbers
from sdtrain.params.schema import Params


def load_params_and_lease(path: Path) -> Params:
    """Read and check a params file, lease a GPU for each process here, and check that the params can train on these.

    In this order: a wrong param is told before the wait for a GPU, and the last check may start CUDA, after which a
    lease would come too late.

    Raises:
        InputError: names every fault of the file, or of the machine; or there are too few GPUs.
    """
    params = load_params(path)
    lease_gpus(launch_numbers()[0])
    check_machine(params.train)
    return params
