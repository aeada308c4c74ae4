"""The work of `precompute`, `sample` and `evaluate` in a folder that has base, data set, checkpoints and model."""

import sys
from pathlib import Path

from sdtrain.evaluate import EvaluateFiles, evaluate_model
from sdtrain.ground.processes import Processes, joined
from sdtrain.params.load import load_params
from sdtrain.precompute import precompute_latents
from sdtrain.sample import SampleFiles, draw_samples


def run_job(place: Path, out: Path, processes: Processes) -> None:
    """Leave in `out` what the three stages leave, by the params of `place`."""
    params, latents = load_params(place / "params.yaml"), out / "latents"
    base, dataset = place / "base", place / "dataset"
    precompute_latents(params.precompute, params.seed, base, dataset, latents, out / "precompute.json", processes)
    ours = {"base": base, "dataset": dataset, "latents": latents}
    ours |= {name: place / name for name in ("checkpoints", "model")}
    draw_samples(params.sample, params.seed, SampleFiles(**ours, out=out / "samples"), processes)
    tables = {f"{name}_table": out / f"{name}.csv" for name in ("loss", "accuracy", "relighting")}
    ours |= {"features": place / "features", "pictures": out / "evaluation"}
    numbers = {"metrics": out / "evaluate.json", "image_sets": out / "image_sets.json"}
    files = EvaluateFiles(**ours, **numbers, values=out / "values.parquet", **tables)
    evaluate_model(params.evaluate, params.method, params.seed, files, processes)


if __name__ == "__main__":
    with joined() as all_processes:
        for name in sys.argv[2:]:
            run_job(Path(name), Path(name) / sys.argv[1], all_processes)
