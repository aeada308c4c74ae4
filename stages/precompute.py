"""Encode images with the VAE and captions with the tokenizer: data/latents."""

from sdtrain.precompute import precompute_latents
from stages import paths, run
from stages.lease import load_params_and_lease


def main() -> None:
    params = load_params_and_lease(paths.PARAMS, num_gpus=1)
    precompute_latents(
        params.precompute,
        params.seed,
        base=paths.BASE,
        dataset=paths.DATASET,
        out=paths.LATENTS,
        metrics=paths.PRECOMPUTE_METRICS,
    )


if __name__ == "__main__":
    run(main)
