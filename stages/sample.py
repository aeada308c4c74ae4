"""Draw the grid of base and trained images: data/samples/grid.png."""

from sdtrain.params.load import load_params
from sdtrain.sample import sample_grid
from stages import paths, run


def main() -> None:
    params = load_params(paths.PARAMS)
    sample_grid(
        params.sample,
        params.seed,
        base=paths.BASE,
        dataset=paths.DATASET,
        latents=paths.LATENTS,
        model=paths.MODEL,
        out=paths.SAMPLES,
    )


if __name__ == "__main__":
    run(main)
