"""The DAG's stages, run as `python -m stages.<name>` from the project's root.

`src/` comes first on the path, so that queued and `--temp` runs import their snapshot's code and
not an installed copy.
"""

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it advises torchvision, which nothing here needs
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))


def run(main: Callable[[], None]) -> None:
    """Run a stage; a fault in the input, or a full disk, prints only its message and exits with 1."""
    from sdtrain.ground.errors import InputError
    from sdtrain.ground.files import disk_full, disk_is_full

    def end_thread(
        failed: threading.ExceptHookArgs,
    ) -> None:  # TensorBoard's writer; the main thread fails, too
        if not disk_is_full(failed.exc_value):
            threading.__excepthook__(failed)

    threading.excepthook = end_thread
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    except Exception as error:
        if not disk_is_full(error):
            raise
        sys.exit(f"error: {disk_full(error)}")
