"""torchrun, but that it ends without a traceback of its own when a process of the stage, which says why, fails."""

import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def main() -> None:
    try:
        run(parse_args(sys.argv[1:]))
    except ChildFailedError:
        sys.exit(1)
    except SignalException as stop:
        sys.exit(128 + stop.sigval)


if __name__ == "__main__":
    main()
