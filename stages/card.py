"""Write the model card, with grid, metrics and commands: data/card."""

from sdtrain.card import write_card
from sdtrain.params.load import load_params
from stages import paths, run


def main() -> None:
    params = load_params(paths.PARAMS)
    write_card(
        params.sample,
        params.evaluate,
        params.seed,
        base=paths.BASE,
        model=paths.MODEL,
        samples=paths.SAMPLES,
        metrics=paths.EVALUATE_METRICS,
        image_sets=paths.IMAGE_SET_METRICS,
        accuracy_table=paths.ACCURACY_TABLE,
        relighting_table=paths.RELIGHTING_TABLE,
        out=paths.CARD,
    )


if __name__ == "__main__":
    run(main)
