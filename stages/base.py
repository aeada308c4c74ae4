"""Gather the base model: data/base."""

from sdtrain.base import resolve_base
from sdtrain.params.machine import load_trainable_params
from stages import paths, run


def main() -> None:
    params = load_trainable_params(paths.PARAMS)
    resolve_base(params.base, params.seed, out=paths.BASE)


if __name__ == "__main__":
    run(main)
