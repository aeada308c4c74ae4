"""Gather the image encoder that images are compared by: data/features."""

from sdtrain.features import resolve_features
from sdtrain.params.load import load_params
from stages import paths, run


def main() -> None:
    params = load_params(paths.PARAMS)
    resolve_features(params.evaluate, out=paths.FEATURES)


if __name__ == "__main__":
    run(main)
