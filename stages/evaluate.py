"""Compare the trained model with its base on held-out data: metrics/evaluate.json."""

from sdtrain.evaluate import evaluate_model
from sdtrain.params.load import load_params
from stages import paths, run


def main() -> None:
    params = load_params(paths.PARAMS)
    evaluate_model(
        params.evaluate,
        params.method,
        params.seed,
        base=paths.BASE,
        model=paths.MODEL,
        dataset=paths.DATASET,
        latents=paths.LATENTS,
        metrics=paths.EVALUATE_METRICS,
        loss_table=paths.LOSS_TABLE,
        accuracy_table=paths.ACCURACY_TABLE,
        relighting_table=paths.RELIGHTING_TABLE,
    )


if __name__ == "__main__":
    run(main)
