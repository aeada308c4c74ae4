"""The table of single values behind the metrics."""

import numpy as np
import pandas as pd
import pytest

from sdtrain.ground.errors import InputError
from sdtrain.ground.values import Values, read_values


def test_values_come_back_as_they_were(tmp_path):
    values = Values()
    values.add("held_out_loss", "base", np.array([[0.5, 0.25], [1.0, 2.0]]), ["a", "b"], ["red", "blue"], [250, 750])
    values.add("color_accuracy", "trained", np.array([1.0, 0.0, 1.0]), ["x", "y", "z"], ["one", "two", "<three>"])
    values.write(tmp_path / "metrics" / "values.parquet")
    table = read_values((tmp_path / "metrics" / "values.parquet").read_bytes(), "values.parquet")
    assert table.value.tolist() == [0.5, 0.25, 1.0, 2.0, 1.0, 0.0, 1.0]
    assert table.item.tolist() == ["a", "a", "b", "b", "x", "y", "z"]
    assert table.text.tolist() == ["red", "red", "blue", "blue", "one", "two", "<three>"]
    assert table.timestep.tolist() == [250, 750, 250, 750, pd.NA, pd.NA, pd.NA]
    assert table.metric.tolist() == ["held_out_loss"] * 4 + ["color_accuracy"] * 3
    assert table.model.tolist() == ["base"] * 4 + ["trained"] * 3


def test_no_values_are_a_table_too(tmp_path):
    Values().write(tmp_path / "v.parquet")
    assert len(read_values((tmp_path / "v.parquet").read_bytes(), "v.parquet")) == 0


def test_the_same_values_are_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        values = Values()
        values.add("loss", "base", np.arange(6.0).reshape(2, 3), ["a", "b"], ["x", "y"], [1, 2, 3])
        values.write(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("name", ["broken", "half", "other columns"])
def test_what_is_no_such_table_is_refused(tmp_path, name):
    path = tmp_path / "v.parquet"
    if name == "other columns":
        pd.DataFrame({"value": [1.0]}).to_parquet(path)
    else:
        Values().write(path)
        path.write_bytes(b"no" if name == "broken" else path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"runs/v.parquet: isn't a table of values: .*; run `dvc repro evaluate`"):
        read_values(path.read_bytes(), "runs/v.parquet")
