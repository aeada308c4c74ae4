"""Which of the project's own modules a module imports, read from its source."""

import ast
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent.parent
"""The folder that holds the package `sdtrain`."""


def import_closure(files: Iterable[Path], roots: dict[str, Path], skip: Iterable[str] = ()) -> dict[str, Path]:
    """Every module of the packages in `roots` that these files import, directly or not: dotted name to file.

    A package's `__init__.py` counts with each of its modules, because importing them runs it. Imports inside functions
    and under TYPE_CHECKING count too.

    Args:
        roots: top-level packages that are followed, with the folder that holds each.
        skip: patterns of modules that are neither followed nor returned, e.g. `sdtrain.params*`.

    Raises:
        ImportError: an imported module of these packages isn't there, so the answer would be incomplete.
    """
    skip, found, waiting = tuple(skip), {}, list(files)
    while waiting:
        file = waiting.pop()
        for name in _imported(file, roots):
            if name in found or any(fnmatchcase(name, pattern) for pattern in skip):
                continue
            found[name] = _find(name, roots)
            waiting.append(found[name])
    return dict(sorted(found.items()))


def _imported(file: Path, roots: dict[str, Path]) -> set[str]:
    """The modules of `roots` that one file imports, and the packages around them."""
    names = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.split(".")[0] in roots}
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(file, node, roots)
            if module.split(".")[0] in roots:
                inside = {f"{module}.{alias.name}" for alias in node.names}
                names |= {module, *(name for name in inside if _path(name, roots))}
    return {name.rsplit(".", cut)[0] for name in names for cut in range(name.count(".") + 1)}


def _absolute(file: Path, node: ast.ImportFrom, roots: dict[str, Path]) -> str:
    """The module that a `from … import` names, dots at its front resolved."""
    if not node.level:
        return node.module or ""
    for root, folder in roots.items():
        if file.is_relative_to(folder / root):
            package = file.parents[node.level - 1].relative_to(folder)
            return ".".join([*package.parts, *([node.module] if node.module else [])])
    raise ImportError(f"{file}: imports {'.' * node.level}{node.module or ''}, but is in none of {', '.join(roots)}")


def _find(name: str, roots: dict[str, Path]) -> Path:
    path = _path(name, roots)
    if path is None:
        raise ImportError(f"{name}: no such module in {roots[name.split('.')[0]]}")
    return path


def _path(name: str, roots: dict[str, Path]) -> Path | None:
    place = roots[name.split(".")[0]].joinpath(*name.split("."))
    candidates = (place.with_suffix(".py"), place / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)
