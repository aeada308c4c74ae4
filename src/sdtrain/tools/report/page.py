"""The page: HTML that loads nothing."""

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sdtrain.ground.errors import InputError

_HERE = Path(__file__).parent
_VEGA = Path(".dvc/plots/offline.html")
"""The page of `dvc plots`, which has Vega, Vega-Lite and Vega-Embed in a script, and their licences in a comment."""


def render(view: dict[str, Any], data: dict[str, Any], images: dict[str, str], root: Path) -> str:
    """The page as text.

    No script can run but the two that it has by their hashes, and nothing is loaded, whatever captions, params and
    names hold: all of these are escaped as well.

    Args:
        view: the template's variables.
        data: the numbers, kept in the page as JSON.
        images: data URIs by id; of those in `view` that are missing nothing is drawn.
        root: the project's.

    Raises:
        InputError: the project has no Vega.
    """
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["code"] = _with_code
    licences, bundle = _vega(root) if data["charts"] else ("", "")
    script = (_HERE / "report.js").read_text(encoding="utf-8")
    return environment.get_template("report.html.j2").render(
        **view,
        images=images,
        hashes=[_hash(text) for text in (bundle, script)],
        licences=Markup(licences),
        bundle=Markup(bundle),
        script=Markup(script),
        style=Markup((_HERE / "report.css").read_text(encoding="utf-8")),
        data=Markup(_as_json(data)),
    )


def _with_code(text: str) -> Markup:
    """A sentence as HTML, with what stands between backticks as code."""
    parts = [
        Markup("<code>{}</code>" if place % 2 else "{}").format(part) for place, part in enumerate(text.split("`"))
    ]
    return Markup().join(parts)


def _as_json(tree: dict[str, Any]) -> str:
    """JSON that can stand in a script element: without `<`, nothing in it can end that or begin a comment."""
    return json.dumps(tree, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _hash(script: str) -> Markup:
    """As a Content-Security-Policy names an inline script."""
    return Markup(f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'")


def _vega(root: Path) -> tuple[str, str]:
    """A comment with the licences, and the script."""
    try:
        page = (root / _VEGA).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{_VEGA}: can't be read ({error}); charts need it: `git checkout {_VEGA}`") from None
    licences = re.search(r"Copyright .*?-->", page, re.DOTALL)
    script = re.search(r'<script id="vega-bundle">(.*?)</script>', page, re.DOTALL)
    if not licences or not script:
        raise InputError(f"{_VEGA}: has no script with the id vega-bundle; charts need it: `git checkout {_VEGA}`")
    return f"<!--\nThe first script holds Vega, Vega-Lite and Vega-Embed.\n{licences[0]}", script[1]
