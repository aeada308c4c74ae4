"""Export the chosen checkpoint as a Diffusers model: data/model."""

from sdtrain.export import export_model
from sdtrain.params.load import load_params
from stages import paths, run


def main() -> None:
    params = load_params(paths.PARAMS)
    export_model(params.export, base=paths.BASE, checkpoints=paths.CHECKPOINTS, out=paths.MODEL)


if __name__ == "__main__":
    run(main)
