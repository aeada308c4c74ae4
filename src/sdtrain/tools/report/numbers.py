"""What differs between runs, and how their training went."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from sdtrain.ground.errors import InputError
from sdtrain.tools.compare.faults import settings_of
from sdtrain.tools.compare.recipes import CODE, SEED, varying
from sdtrain.tools.report.metrics import number_text
from sdtrain.tools.report.recorded import CHECKPOINTS, Recorded

_ABSENT = "–"
_MAX_VALUE_CHARS = 80


@dataclass(frozen=True)
class Difference:
    """Something that isn't the same in all runs."""

    name: str
    """A param's dotted key, or a path of code or data."""
    kind: str
    """`param`, `data` or `code`."""
    moves_metrics: bool
    """Whether the metrics follow from it; a param of `sample` decides on images alone."""
    values: list[str]
    """A run each."""


def differences(runs: Sequence[Recorded]) -> list[Difference]:
    """What differs between runs, without what was made from something that does; of one run nothing."""
    found = [settings_of(run.run) for run in runs]
    origins = [origin for _, origin in found if origin]
    used = {SEED, *(key for origin in origins for key in origin.params)}
    keys = dict.fromkeys(key for settings, _ in found for key in settings)
    params = [
        Difference(key, "param", key in used, [_value(settings, key) for settings, _ in found])
        for key in keys
        if any(settings.get(key, _ABSENT) != found[0][0].get(key, _ABSENT) for settings, _ in found)
    ]
    paths = [name for name in (varying(origins) if origins else []) if any(name in origin.inputs for origin in origins)]
    hashes = [origin.inputs if origin else {} for _, origin in found]
    files = [
        Difference(
            path,
            "code" if path.startswith(CODE) else "data",
            True,
            [inputs[path][:7] if path in inputs else _ABSENT for inputs in hashes],
        )
        for path in paths
    ]
    return params + sorted(files, key=lambda difference: difference.kind, reverse=True)


def differences_table(differing: Sequence[Difference], names: Sequence[str]) -> list[list[str]]:
    """Head and rows, lying so that there are more rows than columns; empty if nothing differs."""
    heads = [
        difference.name
        + {"data": " (data)", "code": " (code)"}.get(difference.kind, "")
        + ("" if difference.moves_metrics else " (moves no metric)")
        for difference in differing
    ]
    columns = [["", *names], *([head, *found.values] for head, found in zip(heads, differing, strict=True))]
    if not differing:
        return []
    return columns if len(differing) > len(names) else [list(row) for row in zip(*columns, strict=True)]


def _value(settings: dict[str, Any], key: str) -> str:
    if key not in settings:
        return _ABSENT
    value = settings[key]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_VALUE_CHARS else f"{text[:_MAX_VALUE_CHARS]}…"


def health_of(run: Recorded) -> dict[str, str]:
    """How a run's data and training went, on what and when, by what it is; what isn't recorded is left out."""
    dataset, cache, train = (run.numbers(f"{name}.json") for name in ("dataset", "precompute", "train"))
    speed = run.table("train_speed.csv", ["samples_per_sec", "data_wait", "peak_memory_gib", "num_processes"])
    norms = [
        (row["grad_norm"], row["grad_norm_clip"]) for row in run.table("train.csv", ["grad_norm", "grad_norm_clip"])
    ]
    clipped = [clip < norm for norm, clip in norms if None not in (norm, clip)]
    config = _config(run)
    found: dict[str, str | None] = {
        "images dropped": _of(dataset, "num_dropped", "num_inputs"),
        "images scaled up": _of(cache, "num_upscaled"),
        "captions cut off": _of(cache, "num_truncated_captions"),
        "standard deviation of the latents": _of(cache, "latents_std"),
        "steps": _of(train, "num_steps"),
        "best step": _of(train, "best_step"),
        "skipped steps": _of(train, "num_skipped_steps"),
        "trained parameters": _of(train, "num_parameters"),
        "clipped gradients, of logged steps": f"{100 * sum(clipped) / len(clipped):.0f} %" if clipped else None,
    }
    if speed:
        by_column = {name: [row[name] for row in speed if row[name] is not None] for name in speed[0]}
        found |= {
            "images per second, median": f"{median(by_column['samples_per_sec']):.4g}",
            "time spent waiting for data, median": f"{100 * median(by_column['data_wait']):.2g} %",
            "peak memory": f"{max(by_column['peak_memory_gib']):.3g} GiB",
            "processes": f"{by_column['num_processes'][-1]:.0f}",
        }
    libraries = config.get("identity", {}).get("libraries", {})
    found |= {
        "device": config.get("device"),
        "libraries": ", ".join(f"{name} {version}" for name, version in libraries.items() if version) or None,
        "run": config.get("fingerprint"),
        "trained with the code of commit": (config.get("git_commit") or "")[:10] or None,
        "committed": run.time,
    }
    return {name: text for name, text in found.items() if text is not None}


def _config(run: Recorded) -> dict[str, Any]:
    """What a checkpoint records of its run."""
    for place in ("best", "last"):
        try:
            return run.outs[CHECKPOINTS].json(f"{place}/training_config.json")
        except InputError:
            continue
    return {}


def _of(numbers: dict[str, float], name: str, total: str | None = None) -> str | None:
    if name not in numbers:
        return None
    return number_text(numbers[name]) + (f" of {number_text(numbers[total])}" if total in numbers else "")
