"""The tasks of a sweep: every combination of the values, checked before anything runs."""

import copy
import hashlib
import itertools
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from sdtrain.ground.errors import InputError
from sdtrain.params.load import check_params, load_tree, parse_yaml
from sdtrain.params.schema import Params

Value = None | bool | int | float | str | list

_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
_HALF_RANGE = re.compile(r"(?=.*\d)-?[\d.]*\.\.-?[\d.]*")
_NAME = re.compile(r"[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+)*(?<!\.lock)")
"""What git allows in a ref everywhere, and no shell needs quoted."""
_MAX_SHOWN = 32
"""Longest value that stands in a name as it is."""


@dataclass(frozen=True)
class Task:
    """One experiment.

    Args:
        name: the experiment's name.
        overrides: `key=value` as `dvc exp run --set-param` reads it.
        params: all params that it must run with.
    """

    name: str
    overrides: tuple[str, ...]
    params: Params


def plan_tasks(assignments: list[str], params_file: Path, prefix: str | None = None) -> list[Task]:
    """The tasks of `key=value,value…` assignments: their product, the last key's values following each other.

    Values are written as in the params file; `a..b` are the whole numbers from a to b, both included.

    Raises:
        InputError: an assignment can't be read, a combination isn't valid params, or two are the same.
    """
    axes: dict[str, list[Value]] = {}
    for assignment in assignments:
        key, values = parse_assignment(assignment)
        if key in axes:
            raise InputError(f"{assignment}: {key} is given twice; give all its values at once: {key}=…,…")
        axes[key] = values
    base = load_tree(params_file)
    if prefix is not None and (not _NAME.fullmatch(prefix) or prefix.startswith("-")):
        raise InputError(f"--name {prefix!r}: can't begin an experiment's name; use letters, digits, '_', '-' and '.'")
    tasks = []
    for chosen in itertools.product(*axes.values()):
        values = dict(zip(axes, chosen, strict=True))
        overrides = tuple(f"{key}={_hydra(value)}" for key, value in values.items())
        name = "-".join([*([prefix] if prefix else []), _name(values)])
        tasks.append(Task(name, overrides, _overridden(base, values, f"{params_file} with {' '.join(overrides)}")))
    _refuse_twins(tasks)
    return tasks


def parse_assignment(text: str) -> tuple[str, list[Value]]:
    """Key and values of `key=value,value…`; commas within brackets or quotes separate nothing.

    Raises:
        InputError: it has no key or an empty value, a range ends before it begins or lacks an end, or a value is a
            mapping.
    """
    key, equals, rest = text.partition("=")
    if not re.fullmatch(r"\w+(\.\w+)*", key) or not equals:
        raise InputError(f"{text!r}: expected key=value,value…, e.g. train.lr=1e-4,2e-4 or train.seed=0..4")
    values: list[Value] = []
    for part in _split(rest):
        if not part:
            raise InputError(f"{text!r}: a value is empty; write null, or '' for an empty text")
        if match := _RANGE.fullmatch(part):
            first, last = int(match[1]), int(match[2])
            if last < first:
                raise InputError(f"{text!r}: the range {part} ends before it begins; write {last}..{first}")
            values += range(first, last + 1)
            continue
        if _HALF_RANGE.fullmatch(part):
            raise InputError(f"{text!r}: {part} isn't a range; write both ends as whole numbers, e.g. 0..4")
        value = parse_yaml(part, name=f"{key}={part}")
        if isinstance(value, dict):
            raise InputError(
                f"{text!r}: {part} is a mapping; give its keys one by one, e.g. {key}.{next(iter(value))}=…"
            )
        values.append(value)
    return key, values


def _split(text: str) -> list[str]:
    parts, depth, quote, escaped = [""], 0, "", False
    for char in text:
        if quote:
            ends, escaped = char == quote and not escaped, char == "\\" and quote == '"' and not escaped
            quote = "" if ends else quote
        elif char in "'\"" and (not parts[-1].strip() or depth):  # within a word it is an apostrophe
            quote = char
        elif char in "[{":
            depth += 1
        elif char in "]}":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += char
    return [part.strip() for part in parts]


def _overridden(base: object, values: dict[str, Value], name: str) -> Params:
    """Checked params with these values; DVC sets only keys that the file has."""
    tree, absent = copy.deepcopy(base), []
    for key, value in values.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise InputError(f"{name}: {key}: {'.'.join(parents)} has no keys of its own")
        if last not in node:
            absent.append(key)
        node[last] = value
    params = check_params(tree, name=name)
    if absent:
        raise InputError(
            f"{name}: {absent[0]} isn't in the file, and DVC sets only what is; add it there, with any value"
        )
    return params


def _refuse_twins(tasks: list[Task]) -> None:
    seen: dict[str, Task] = {}
    for task in tasks:
        for same in (task.params.model_dump_json(), task.name):
            twin = seen.setdefault(same, task)
            if twin is not task:
                raise InputError(
                    f"{' '.join(twin.overrides)} and {' '.join(task.overrides)} are the same task; leave one out"
                )


def _name(values: dict[str, Value]) -> str:
    """E.g. `lr-0.0001-seed-3`; of keys that end alike, the whole."""
    ends = Counter(key.rpartition(".")[2] for key in values)
    words = []
    for key, value in values.items():
        end = key.rpartition(".")[2]
        words += [end if ends[end] == 1 else key.replace(".", "-"), _word(value)]
    return "-".join(words)


def _word(value: Value) -> str:
    """The value as a part of a name; what doesn't fit is shortened, and told apart by a hash."""
    text = value if isinstance(value, str) else json.dumps(value)
    if _NAME.fullmatch(text) and len(text) <= _MAX_SHOWN:
        return text
    start = re.sub(r"[^A-Za-z0-9_]+", "-", text)[: _MAX_SHOWN // 2].strip("-")
    digest = hashlib.sha256(text.encode()).hexdigest()[:6]
    return f"{start}-{digest}" if start else digest


def _hydra(value: Value) -> str:
    """The value in Hydra's grammar, which DVC reads: texts in quotes, so that none is taken for something else."""
    if isinstance(value, list):
        return f"[{','.join(map(_hydra, value))}]"
    if isinstance(value, str):
        if "${" in value:
            raise InputError(f"{value!r}: DVC would resolve ${{…}} in a value; put it into the params file instead")
        escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
        trailing = re.search(r"\\*$", escaped)
        return f"'{escaped}{trailing[0] if trailing else ''}'"
    return json.dumps(value)
