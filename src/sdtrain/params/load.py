"""Reads params.yaml as YAML 1.2, and reports all faults in one message, before any model loads."""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, get_args

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from sdtrain.ground.errors import InputError
from sdtrain.params.rules import RULES
from sdtrain.params.schema import Params, Section
from sdtrain.params.view import View

_KINDS = ("literal[", "list[")
"""How pydantic's locations name the kinds of a field that has several."""
_KEY = "[key]"
"""How they end for a key of a mapping that isn't allowed."""


def load_params(path: Path) -> Params:
    """Read and check a params file.

    Raises:
        InputError: one message that names every fault: key, value, what is wrong, nearest name.
    """
    return check_params(load_tree(path), name=str(path))


def load_tree(path: Path) -> object:
    """Read a params file as a YAML tree, without checking it.

    Raises:
        InputError: it isn't there, or isn't YAML.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), name=str(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; run the command from the project's root") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None


def parse_yaml(text: str, name: str) -> object:
    """Parse YAML as params files are read; an `InputError` begins with `name`."""
    try:
        return yaml.load(text, Loader=_Yaml12Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{name}: not valid YAML: {error}") from None


def check_params(tree: object, name: str = "params.yaml", schema: type[Params] = Params) -> Params:
    """Parse and check a params tree as loaded from YAML; raises as `load_params`."""
    if not isinstance(tree, dict):
        raise InputError(f"{name}: expected a mapping of sections, got {type(tree).__name__}")
    params, details = None, []
    try:
        params = schema.model_validate(tree)
    except ValidationError as error:
        details = [detail for detail in error.errors() if not _is_of_another_kind(detail)]
    view = View(tree, faulty={tuple(_location(detail, schema)[0][:2]) for detail in details})
    faults = [_describe(detail, schema) for detail in details] + [fault for rule in RULES if (fault := view.ask(rule))]
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise InputError("\n".join([f"{name} has {count}:", *(f"  {fault}" for fault in faults)]))
    assert params is not None, "no fault, so the params are valid"
    return params


def _describe(detail: ErrorDetails, schema: type[Params]) -> str:
    """One fault in one line: `train.lrr = 0.1: unknown key; nearest is train.lr`."""
    (location, tag), value = _location(detail, schema), detail["input"]
    if detail["type"].startswith("union_tag"):
        location.append("name")
        if detail["type"] == "union_tag_invalid":
            return _wrong_choice(".".join(location), value["name"], list(_models_by_tag(schema, location[0])))
    key = ".".join(location)
    if detail["type"] in ("missing", "union_tag_not_found"):
        return f"{key}: missing; the shipped params.yaml and the recipes show every key"
    if detail["type"] == "extra_forbidden":
        return f"{key} = {value!r}: unknown key; {_nearest_key(location, tag, schema)}"
    if detail["type"] == "literal_error":
        return _wrong_choice(key, value, re.findall(r"'([^']*)'", detail["ctx"]["expected"]))
    return f"{key} = {value!r}: {detail['msg'][0].lower()}{detail['msg'][1:]}"


def _location(detail: ErrorDetails, schema: type[Params]) -> tuple[list[str], str]:
    """The keys that lead to a fault, and the kind of its section (see `_models_by_tag`)."""
    location = [str(part) for part in detail["loc"] if part != _KEY and not str(part).startswith(_KINDS)]
    has_kind = len(location) > 1 and len(_models_by_tag(schema, location[0])) > 1
    return location, location.pop(1) if has_kind else ""


def _is_of_another_kind(detail: ErrorDetails) -> bool:
    """Whether it says that a word isn't a list or a list not a word, of a field that may be both."""
    kind = next((str(part) for part in detail["loc"] if str(part).startswith(_KINDS)), "")
    is_list = isinstance(detail["input"], list)
    return (kind.startswith("literal") and is_list) or (detail["type"] == "list_type" and kind != "")


def _wrong_choice(key: str, value: object, allowed: list[str]) -> str:
    near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.4)
    hint = f"; nearest is {near[0]!r}" if near else ""
    return f"{key} = {value!r}: must be one of {', '.join(map(repr, allowed))}{hint}"


def _models_by_tag(schema: type[Params], section: str) -> dict[str, type[Section]]:
    """The models of a section: one, without a tag, or those of a union by their `name`."""
    if section not in schema.model_fields:
        return {}
    models = list(_models_in(schema.model_fields[section].annotation))
    if len(models) < 2:
        return dict.fromkeys([""], *models) if models else {}
    return {get_args(model.model_fields["name"].annotation)[0]: model for model in models}


def _models_in(annotation: object) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    else:
        for argument in get_args(annotation):
            yield from _models_in(argument)


def _nearest_key(location: list[str], tag: str, schema: type[Params]) -> str:
    *parents, name = location
    sections = {key: _models_by_tag(schema, key) for key in schema.model_fields}
    siblings = list(sections[parents[0]][tag].model_fields) if parents else list(schema.model_fields)
    kinds = [kind for kind, model in sections[parents[0]].items() if name in model.model_fields] if parents else []
    near = difflib.get_close_matches(name, siblings, n=1)
    owners = {
        key: [model for model in models.values() if name in model.model_fields] for key, models in sections.items()
    }
    elsewhere = [f"{key}.{name}" for key, found in owners.items() if found and [key] != parents]
    if kinds:
        return f"only {parents[0]}.name = {' or '.join(map(repr, kinds))} has it"
    if near:
        return f"nearest is {'.'.join([*parents, near[0]])}"
    if elsewhere:
        return f"nearest is {', '.join(elsewhere)}"
    return f"there are {', '.join(siblings)}"


class _Yaml12Loader(yaml.SafeLoader):
    """PyYAML with YAML 1.2's core schema, as DVC writes it: `1e-05` is a float, `no` is a string.

    A key given twice is refused instead of the last one winning silently.
    """

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Yaml12Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_Yaml12Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))
