"""Compare the trained model with its base on held-out data: metrics/evaluate.json."""

from sdtrain.evaluate import EvaluateFiles, evaluate_model
from sdtrain.ground.gpus import lease_gpus
from sdtrain.ground.processes import joined
from sdtrain.params.load import load_params
from sdtrain.params.machine import launch_numbers
from stages import paths, run
from stages.launch import launch


def main() -> None:
    params = load_params(paths.PARAMS)
    lease_gpus(launch_numbers()[0])
    launch("stages.evaluate", one_machine=True)
    files = EvaluateFiles(
        base=paths.BASE,
        checkpoints=paths.CHECKPOINTS,
        model=paths.MODEL,
        dataset=paths.DATASET,
        latents=paths.LATENTS,
        features=paths.FEATURES,
        metrics=paths.EVALUATE_METRICS,
        image_sets=paths.IMAGE_SET_METRICS,
        values=paths.VALUES,
        loss_table=paths.LOSS_TABLE,
        accuracy_table=paths.ACCURACY_TABLE,
        relighting_table=paths.RELIGHTING_TABLE,
        pictures=paths.EVALUATION,
    )
    with joined() as processes:
        evaluate_model(params.evaluate, params.method, params.seed, files, processes)


if __name__ == "__main__":
    run(main)
