"""What is said of drawn images by an image encoder's features: verdicts, intervals, CLIPScore."""

import numpy as np
import pytest

from sdtrain.evaluation.image_sets import caption_metrics, image_set_metrics
from sdtrain.evaluation.set_metrics import set_metrics
from sdtrain.ground.values import Values, read_values

METRICS = (
    "mmd_polynomial", "mmd_rbf", "frechet_distance", "mind", "precision", "recall", "density", "coverage",
)  # fmt: skip


def features(seed: int, num: int, mean: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num, 4)) + mean


def test_every_metric_stands_with_models_floor_interval_gain_and_verdict():
    num = 200
    found = image_set_metrics(0, "clip", features(0, num), {"base": features(1, num, 2), "trained": features(2, num)})
    assert found["num_set_images"] == 100
    for metric in METRICS:
        stem = f"{metric}_clip"
        expected = {f"{stem}_base", f"{stem}_trained", f"{stem}_floor", f"{stem}_gain", f"{stem}_differs_from_real"}
        expected |= {f"{stem}_{of}_ci_{end}" for of in ("trained", "floor", "gain") for end in ("low", "high")}
        assert {name for name in found if name.startswith(f"{stem}_")} == expected
        assert found[f"{stem}_trained_ci_low"] <= found[f"{stem}_trained"] <= found[f"{stem}_trained_ci_high"]
        assert found[f"{stem}_floor_ci_low"] <= found[f"{stem}_trained"] <= found[f"{stem}_floor_ci_high"]
        assert found[f"{stem}_differs_from_real"] == 0
    for metric in METRICS[:4]:  # the base is far away
        assert found[f"{metric}_clip_base"] > found[f"{metric}_clip_floor_ci_high"]
        assert found[f"{metric}_clip_gain_ci_high"] < 0
    worse = image_set_metrics(0, "clip", features(0, num), {"base": features(1, num), "trained": features(2, num, 2)})
    assert {worse[f"{metric}_clip_differs_from_real"] for metric in METRICS} == {1}


def test_models_that_draw_the_same_differ_by_nothing():
    drawn = features(1, 60, 0.5)
    found = image_set_metrics(0, "clip", features(0, 60), {"base": drawn, "trained": drawn})
    gains = [value for name, value in found.items() if "_gain" in name]
    assert len(gains) == 3 * len(METRICS)
    assert set(gains) == {0}


def test_intervals_stay_where_a_metric_can_be():
    """Sets of one distribution, whose precision and recall are nearly 1, and sets that hardly meet."""
    for shift in (0.0, 3.0):
        drawn = features(1, 60, shift)
        found = image_set_metrics(0, "clip", features(0, 60), {"base": drawn, "trained": drawn})
        for metric in ("precision", "recall", "coverage"):
            assert 0 <= found[f"{metric}_clip_trained_ci_low"] <= found[f"{metric}_clip_trained"]
            assert found[f"{metric}_clip_trained"] <= found[f"{metric}_clip_trained_ci_high"] <= 1


def test_fewer_than_200_images_get_the_floor_and_no_verdict(capsys):
    drawn = {"base": features(1, 199), "trained": features(2, 199)}
    found = image_set_metrics(0, "clip", features(0, 199), drawn)
    assert "mmd_rbf_clip_floor" in found
    assert [name for name in found if name.endswith("_differs_from_real")] == []
    assert "199 images were drawn: below 200 the floor is too wide" in capsys.readouterr().out


def test_a_handful_of_images_says_nothing(capsys):
    assert image_set_metrics(0, "clip", features(0, 19), {"base": features(1, 19), "trained": features(2, 19)}) == {}
    assert "19 images were drawn, too few" in capsys.readouterr().out


def test_features_too_wide_for_a_frechet_distance_leave_it_out():
    def wide(seed: int) -> np.ndarray:
        return np.random.default_rng(seed).standard_normal((60, 16))

    found = image_set_metrics(0, "dino", wide(0), {"base": wide(1), "trained": wide(2)})
    assert "frechet_distance" not in set_metrics(wide(0), wide(1), 3, 8, 0)  # 60 images are fewer than 5 · 16
    assert [name for name in found if name.startswith("frechet_distance")] == []
    assert "mmd_rbf_dino_trained" in found


def test_clip_scores_by_hand(tmp_path):
    texts = np.array([[1.0, 0.0], [0.0, 2.0]])
    images = {
        "real": texts, "base": np.array([[-1.0, 0.0], [3.0, 0.0]]), "trained": np.array([[1.0, 1.0], [0.0, 1.0]]),
    }  # fmt: skip
    values = Values()
    found = caption_metrics(0, 200, "clip", ["a", "b"], ["red", "blue"], texts, images, values)
    assert (found["clip_score_clip_real"], found["clip_score_clip_base"]) == (100, 0)
    assert found["clip_score_clip_trained"] == pytest.approx((50 * 2**0.5 + 100) / 2)
    assert found["clip_score_clip_trained_ci_low"] < found["clip_score_clip_trained"]
    assert found["clip_score_clip_trained_ci_high"] == pytest.approx(100)
    values.write(tmp_path / "values.parquet")
    table = read_values((tmp_path / "values.parquet").read_bytes(), "values.parquet")
    rows = table[(table.metric == "clip_score_clip") & (table.model == "trained")]
    assert rows.item.tolist() == ["a", "b"]
    assert rows.value.tolist() == pytest.approx([50 * 2**0.5, 100])
