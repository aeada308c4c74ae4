"""Encode images with the VAE and captions with the tokenizer: data/latents."""

from sdtrain.ground.processes import joined
from sdtrain.precompute import precompute_latents
from stages import paths, run
from stages.launch import launch
from stages.lease import load_params_and_lease


def main() -> None:
    params = load_params_and_lease(paths.PARAMS)
    launch("stages.precompute", one_machine=True)
    with joined() as processes:
        precompute_latents(
            params.precompute,
            params.seed,
            base=paths.BASE,
            dataset=paths.DATASET,
            out=paths.LATENTS,
            metrics=paths.PRECOMPUTE_METRICS,
            processes=processes,
        )


if __name__ == "__main__":
    run(main)
