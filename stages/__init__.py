"""The DAG's stages, run as `python -m stages.<name>` from the project's root.

`src/` goes first on the path, so that queued and `--temp` runs import their snapshot's code and
never an installed copy.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it advises torchvision, which nothing here needs
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))


def run(main: Callable[[], None]) -> None:
    """Run a stage; a fault in the input prints its message alone and exits with 1."""
    from sdtrain.errors import InputError

    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
