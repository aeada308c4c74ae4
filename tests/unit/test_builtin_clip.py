"""The generated worlds' own CLIP: what the shipped folder can tell, and that the script builds such a folder."""

import importlib.util
import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sdtrain.data import scenes
from sdtrain.evaluation.clip_score import clip_score, load_caption_features
from sdtrain.evaluation.features import load_features
from sdtrain.ground.files import read_json
from tests.conftest import ROOT

SHIPPED = ROOT / "data" / "builtin_clip"
SHRUNK = {
    "SHAPES": 40, "FREE_SHAPES": 10, "LIT": 10, "ROUND_TRIPS": 10, "STEPS": 2, "WARMUP_STEPS": 1, "BATCH": 8,
    "SPOILT": 4, "RETRIEVAL": 8, "FIT": 40, "SET": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def builder():
    """The script as a module; what it sets in the process is put back."""
    spec = importlib.util.spec_from_file_location("build_builtin_clip", ROOT / "scripts" / "build_builtin_clip.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    num_threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng():
        yield module
    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(deterministic)
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def judge(builder):
    return builder.load_judge(SHIPPED)


TORCHMETRICS = {"own": [78.870255, 73.544189, 77.960663, 83.114754], "next": [13.292916, 0.0, 0.0, 0.0]}
"""What `clip_score` of torchmetrics 1.9.0 gives with the shipped folder in float32, run once: of four scenes with their
own captions and with each other's. Its CLIPModel returned `pooler_output`, as that version expects of Transformers."""


def fresh(builder, num: int) -> list:
    """Scenes that the script never draws."""
    rng = np.random.default_rng(7)
    return [builder.draw_flat("shapes", rng) for _ in range(num)]


# ---------------------------------------------------------------- the shipped folder


def test_its_clip_scores_are_those_of_torchmetrics():
    rng = np.random.default_rng(0)
    drawn = [scenes.draw_scene(rng, new=bool(number % 2)) for number in range(4)]
    captions = [scenes.caption(scene) for scene in drawn]
    cpu = torch.device("cpu")
    embeds = load_features(SHIPPED, "own", cpu).extract(
        [scenes.render(scene, scenes.place(scene, rng)) for scene in drawn], 4
    )
    texts = load_caption_features(SHIPPED, cpu).extract(captions, 4)
    for name, order in (("own", [0, 1, 2, 3]), ("next", [1, 2, 3, 0])):
        assert clip_score(embeds, texts[order]) == pytest.approx(TORCHMETRICS[name], rel=1e-5)


def test_it_is_small_and_in_half_precision():
    sizes = {
        name: sum(p.stat().st_size for p in (ROOT / "data" / name).rglob("*") if p.is_file())
        for name in ("builtin", "builtin_clip")
    }
    assert sizes["builtin_clip"] <= 750_000
    assert sum(sizes.values()) <= 10 * 2**20
    assert {weight.dtype for weight in load_file(SHIPPED / "model.safetensors").values()} == {torch.float16}


def test_its_tokenizer_is_the_base_models():
    ours, base = (
        json.loads((folder / "tokenizer.json").read_text()) for folder in (SHIPPED, ROOT / "data/builtin/tokenizer")
    )
    assert ours["model"] == base["model"]


def test_it_finds_the_caption_of_scenes_that_it_has_never_seen(builder, judge):
    assert builder.measure_retrieval(judge, fresh(builder, 64)) >= 0.9


@pytest.mark.parametrize("field", ["color", "shape", "style", "size", "position", "background"])
def test_a_caption_with_one_wrong_word_scores_lower(builder, judge, field):
    examples, rng = fresh(builder, 64), np.random.default_rng(8)
    images = judge.images([example.image for example in examples])
    words = [builder.Words(example.scene) for example in examples]
    right = clip_score(images, judge.captions([caption.text for caption in words]))
    wrong = clip_score(images, judge.captions([caption.with_wrong(field, rng).text for caption in words]))
    assert np.mean(right > wrong) >= 0.95


def test_clip_score_sees_what_is_wrong_and_hardly_what_the_vae_loses(builder, judge):
    means = builder.measure_scores(judge, fresh(builder, 48))
    lost = {name.removeprefix("clip_score_"): means["clip_score_real"] - mean for name, mean in means.items()}
    assert lost["blur_2"] > lost["blur_1"] > abs(lost["vae"])
    assert lost["empty_0.5"] > lost["empty_0.1"] > abs(lost["vae"])
    assert min(lost["hue"], lost["empty_0.5"]) > 10


def test_set_metrics_grow_with_what_is_wrong(builder, judge, monkeypatch):
    monkeypatch.setattr(builder, "SET", 160)  # the least for a Fréchet distance
    monkeypatch.setattr(builder, "DRAWN", {name: draw for name, draw in builder.DRAWN.items() if name != "vae"})
    found = builder.measure_sets(judge)
    for metric in ("mmd_rbf", "mmd_polynomial", "frechet_distance", "mind"):
        value = {name: found[f"{metric}_{name}"] for name in builder.DRAWN}
        assert value["real"] < value["blur_1"] < value["blur_2"], metric
        assert value["real"] < value["empty_0.1"] < value["empty_0.5"], metric
        assert value["real"] < value["hue"], metric
    for share in ("density", "coverage"):
        assert found[f"{share}_real"] > max(found[f"{share}_empty_0.5"], found[f"{share}_hue"]), share


# ---------------------------------------------------------------- the script


def test_the_script_builds_the_shipped_files_and_measures_both_alike(builder, tmp_path, monkeypatch, capsys):
    for name, value in SHRUNK.items():
        assert hasattr(builder, name)
        monkeypatch.setattr(builder, name, value)
    monkeypatch.setattr(builder, "BUILD", tmp_path / ".build")
    before = builder.hashes_of(SHIPPED)
    builder.main([])
    built, report = tmp_path / ".build" / "builtin_clip", read_json(tmp_path / ".build" / "builtin_clip.json")
    hashes = builder.hashes_of(built)
    assert hashes.keys() == before.keys()
    assert {name for name in hashes if hashes[name] != before[name]} == {"model.safetensors"}
    assert builder.hashes_of(SHIPPED) == before
    measured = report["measured"]
    assert measured["shipped"].keys() == measured["candidate"].keys()
    assert measured["shipped"]["retrieval_shapes"] > 0.9 > 0.5 > measured["candidate"]["retrieval_shapes"]
    assert "The files are different." in capsys.readouterr().out


def test_the_same_training_gives_the_same_bits(builder, tmp_path, monkeypatch):
    for name, value in SHRUNK.items():
        monkeypatch.setattr(builder, name, value)
    for name in ("first", "second"):
        torch.manual_seed(len(name))  # the state before is no seed of it
        builder.train(tmp_path / name)
    assert builder.hashes_of(tmp_path / "first") == builder.hashes_of(tmp_path / "second")


def test_the_loss_by_hand(builder):
    """Caption 0 is true of image 1 as well, which is no negative of it; the wrong caption 2 and the copy 2 are."""
    similarity = torch.tensor([[2.0, 5.0, 0.0], [1.0, 3.0, -math.inf], [1.5, -math.inf, 9.0]])
    true = torch.tensor([[True, True], [False, True], [False, False]])
    of_captions = [math.log(1 + math.exp(0 - 2)), math.log(1 + math.exp(1 - 3))]
    of_images = [math.log(1 + math.exp(1 - 2) + math.exp(1.5 - 2)), 0]
    expected = (sum(of_captions) + sum(of_images)) / 4
    assert float(builder.contrastive_loss(similarity, true, 2)) == pytest.approx(expected)


def test_a_caption_is_true_of_every_image_that_shows_what_it_says(builder):
    example = fresh(builder, 1)[0]
    whole, truth = builder.Words(example.scene), example.truth
    other = replace(example, scene=whole.with_wrong("size", np.random.default_rng(0)).scene).truth
    captions = [replace(whole, omit=("size",)), whole, replace(whole, omit=("size",), light="left")]
    expected = [[True, True, True], [True, False, True], [False, False, True]]
    found = builder.is_true([caption.said for caption in captions], [truth, other, truth | {"light": "left"}])
    assert found.tolist() == expected


def test_captions_say_what_is_true_and_wrong_ones_one_thing_that_is_not(builder):
    rng = np.random.default_rng(0)
    lit, free = [builder.draw_lit(rng) for _ in range(30)], [builder.draw_flat("free_shapes", rng) for _ in range(30)]
    for example in [*lit, *free, *fresh(builder, 30)]:
        words = example.draw_words(rng)
        text, said = words.text, words.said
        assert builder.is_true([said], [example.truth]).all()
        assert all(value in text for name, value in said.items() if name != "style")
        assert ("outlined" in text) == (said["style"] == "outlined")
        assert (" light " in text) == ("light" in said)
        assert example.kind != "free_shapes" or not {"size", "position"} & said.keys()
        for field in said:
            wrong = words.with_wrong(field, rng).said
            assert {name for name in wrong.keys() | said.keys() if wrong.get(name) != said.get(name)} == {field}
            assert wrong["color"] != wrong.get("background")


def test_spoilt_copies_lose_the_object_or_its_edges_and_keep_the_background(builder):
    rng, seen = np.random.default_rng(0), set()
    for example in fresh(builder, 60):
        spoilt = builder.spoil(example.image, example.empty, rng)
        assert (spoilt[:2, :2] == example.empty[:2, :2]).all()
        object_px = (example.image != example.empty).any(axis=2)
        kept = (spoilt[object_px] == example.image[object_px]).all(axis=1).mean()
        gone = (spoilt[object_px] == example.empty[object_px]).all(axis=1).mean()
        if gone == 1:
            seen.add("empty")
        elif gone > 0.2:
            seen.add("cut")
            assert gone + kept == pytest.approx(1)
            assert 0.2 < kept < 0.8
        else:
            seen.add("blur")
            assert kept < 0.9
    assert seen == {"empty", "cut", "blur"}
