"""Golden losses: ten full-precision steps on the CPU, which a refactoring must reproduce.

`python -m tests.integration.test_golden` rewrites them, after a change that is meant to move them;
CHANGELOG.md then says why.
"""

import json
import tempfile
from pathlib import Path

import pytest

from tests.conftest import CONSISTENT, EVERYTHING_LIT, HINTED, ROOT, merged, shrunk_tree

GOLDEN = ROOT / "tests" / "golden" / "losses.json"
STEPS = {"max_steps": 10, "lr_warmup_steps": 2, "log_every_n_steps": 1, "lr": 1.0e-4, "caption_dropout": 0.1}
RUNS = {
    "epsilon": STEPS,
    "everything": {
        **STEPS,
        "prediction_type": "v_prediction",
        "snr_gamma": 5.0,
        "zero_terminal_snr": True,
        "noise_offset": 0.1,
        "input_perturbation": 0.1,
        "timestep_sampling": "stratified",
        "ema_schedule": "power_function",
        "ema_decay": None,
        "ema_sigma_rel": 0.1,
        "micro_batch_size": 4,
        "lr_scheduler": "polynomial",
        "lr_scaling": "sqrt",
        "lr_reference_batch_size": 2,
    },
}
HINTED_RUNS = {"controlnet": {**STEPS, "caption_dropout": 0.5}}
"""On the workspace `hinted`."""
RELIT_RUNS = {"ic_light": STEPS}
"""On the workspace `relit`, with light by map and a learned φ."""
COLUMNS = ("loss", "grad_norm", "param_norm_clip", "lr")
VALIDATION = {"every_n_steps": 10, "num_timesteps": 2, "max_samples": 4}


def numbers_of(run) -> dict[str, list[float]]:
    validation = run.validation_curve
    return {
        **{name: run.train_curve[name].tolist() for name in COLUMNS},
        "validation": [*validation.loss_raw.tolist(), *validation.loss_ema.tolist()],
    }


@pytest.mark.parametrize("name", [*RUNS, *HINTED_RUNS, *RELIT_RUNS])
def test_ten_steps_give_the_golden_losses(workspace, hinted, relit, tmp_path, name):
    """On another CPU the sums round differently; this still detects any change of the arithmetic.

    The cache keeps float16, so a sum that rounds differently there can move one image's latents by 1e-3.
    """
    place, train = {
        **{name: (workspace, train) for name, train in RUNS.items()},
        **{name: (hinted, train) for name, train in HINTED_RUNS.items()},
        **{name: (relit, train) for name, train in RELIT_RUNS.items()},
    }[name]
    changes = CONSISTENT if name in RELIT_RUNS else {}
    numbers = numbers_of(place.train(tmp_path, **merged(changes, {"train": train, "validation": VALIDATION})))
    golden = json.loads(GOLDEN.read_text())[name]
    for column in golden:
        assert numbers[column] == pytest.approx(golden[column], rel=1e-5 if name in RUNS else 1e-4), column


if __name__ == "__main__":
    from sdtrain.params.load import check_params
    from tests.integration.conftest import Workspace

    found = {}
    for runs, changes, own in ((RUNS, None, {}), (HINTED_RUNS, HINTED, {}), (RELIT_RUNS, EVERYTHING_LIT, CONSISTENT)):
        with tempfile.TemporaryDirectory() as folder:
            place = Workspace(Path(folder), lambda **changes: check_params(shrunk_tree(**changes)), ROOT, changes)
            for name, train in runs.items():
                settings = merged(own, {"train": train, "validation": VALIDATION})
                found[name] = numbers_of(place.train(Path(folder) / name, **settings))
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
