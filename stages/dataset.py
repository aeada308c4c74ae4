"""Read, check and split the captioned images: data/dataset."""

from sdtrain.dataset import build_dataset
from sdtrain.params.machine import load_trainable_params
from stages import paths, run


def main() -> None:
    params = load_trainable_params(paths.PARAMS)
    build_dataset(params.dataset, params.seed, out=paths.DATASET, metrics=paths.DATASET_METRICS)


if __name__ == "__main__":
    run(main)
