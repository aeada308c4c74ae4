"""The values behind the metrics, image by image: `metrics/values.parquet`.

A metric's number hides which images it is the mean of. With the single values two runs can be compared image by image,
at any later time, and over training seeds. One row per value:

- `metric`: as in `metrics/*.json`, where `<metric>_<model>` is the mean of the values.
- `model`: `base`, `trained`, or what else was measured.
- `item`: the held-out image's id, or the prompt's kind and number; the same in every run on the same data.
- `text`: its caption or prompt.
- `timestep`: of losses; null of all others. Every item has the same timesteps.
- `value`: float32; 1 and 0 where a metric is a share.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdtrain.ground.errors import InputError
from sdtrain.ground.files import write_bytes

if TYPE_CHECKING:
    import pandas as pd

_TYPES = {
    "metric": "string", "model": "string", "item": "string", "text": "string", "timestep": "Int32", "value": "float32",
}  # fmt: skip


class Values:
    """Collects values, and writes them."""

    def __init__(self) -> None:
        self._columns: dict[str, list] = {name: [] for name in _TYPES}

    def add(
        self,
        metric: str,
        model: str,
        values: np.ndarray,
        items: Sequence[str],
        texts: Sequence[str],
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Add one metric of one model: values [items], or with timesteps [items, timesteps]."""
        assert values.shape == (len(items), *([] if timesteps is None else [len(timesteps)])), values.shape
        assert len(texts) == len(items), (len(texts), len(items))
        repeats, num = (1 if timesteps is None else len(timesteps)), values.size
        row = {
            "metric": [metric] * num,
            "model": [model] * num,
            "item": [item for item in items for _ in range(repeats)],
            "text": [text for text in texts for _ in range(repeats)],
            "timestep": [None] * num if timesteps is None else [int(t) for _ in items for t in timesteps],
            "value": values.reshape(-1).tolist(),
        }
        for name, found in row.items():
            self._columns[name] += found

    def write(self, path: Path) -> None:
        """Write the table, completely or not at all; the same values give the same bytes."""
        import pandas as pd

        buffer = io.BytesIO()
        pd.DataFrame(self._columns).astype(_TYPES).to_parquet(buffer, index=False, compression="zstd")
        write_bytes(path, buffer.getvalue())


def read_values(data: bytes, name: str) -> "pd.DataFrame":
    """The table of `Values.write`.

    Args:
        data: the file's content.
        name: of the file, for messages.

    Raises:
        InputError: it isn't such a table.
    """
    import pandas as pd
    import pyarrow as pa

    try:
        table = pd.read_parquet(io.BytesIO(data))
        return table[list(_TYPES)].astype(_TYPES)
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"{name}: isn't a table of values: {error}; run `dvc repro evaluate`") from None
