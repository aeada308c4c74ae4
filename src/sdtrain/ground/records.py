"""Records that a stage wrote as JSON, checked when they are read."""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from sdtrain.ground.errors import InputError
from sdtrain.ground.files import read_json

T = TypeVar("T")


def read_record(path: Path, kind: type[T], stage: str) -> T:
    """Read a JSON file of this type.

    Args:
        stage: the one that writes the file.

    Raises:
        InputError: it is missing or broken.
    """
    try:
        tree = read_json(path)
    except InputError as fault:
        raise InputError(f"{fault}; run `dvc repro {stage}`") from None
    return check_record(tree, kind, str(path), stage)


def check_record(tree: Any, kind: type[T], name: str, stage: str) -> T:
    """Check that what was read from a file of this name has this type; raises as `read_record`."""
    try:
        return TypeAdapter(kind).validate_python(tree)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise InputError(f"{name}: {place}{': ' if place else ''}{fault['msg']}; run `dvc repro {stage}`") from None
