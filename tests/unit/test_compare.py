"""Runs read from git and disk, grouped into recipes, and the verdicts on these, down to what the command prints."""

import argparse
import copy
import importlib.util
import itertools
import json
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from sdtrain.cli import compare as command
from sdtrain.ground.errors import InputError
from sdtrain.ground.files import sha256_json
from sdtrain.ground.statistics import holm, recipe_difference, welch_difference
from sdtrain.ground.values import Values, read_values
from sdtrain.tools.compare import compare
from sdtrain.tools.compare.recipes import group_runs, origin_of
from sdtrain.tools.compare.runs import Run, read_experiments, read_run
from sdtrain.tools.compare.text import as_json, rows, sentences

LOSS = "held_out_loss_trained"
NUM_ITEMS = 40
PARAMS = {"seed": 0, "dataset": {"num_scenes": 9, "num_workers": 2}, "train": {"lr": 1e-3, "seed": 0, "note": {}}}
CODE = "src/sdtrain/training"


def lock_of(params: dict, code: str = "c0de00", **changes: str) -> dict:
    """A dvc.lock of five stages, as DVC writes it; `changes` replace hashes, by `stage:path`."""
    params = copy.deepcopy(params)
    train, seed = params["train"], params["seed"]
    dataset = f"d{params['dataset']['num_scenes']}"
    model = f"m{train['lr']}{train.get('seed')}{code}"
    stages = {
        "dataset": ({}, {"dataset.num_scenes": params["dataset"]["num_scenes"], "seed": seed}, {"data/set": dataset}),
        "train": ({"data/set": dataset, CODE: code}, {"train": train, "seed": seed}, {"data/kept": model}),
        "export": ({"data/kept": model}, {"export": {"dtype": "fp32"}}, {"data/model": model}),
        "evaluate": ({"data/set": dataset, "data/model": model}, {"seed": seed}, {"metrics/evaluate.json": "e"}),
        "sample": ({"data/model": model}, {"sample": params.get("sample", {})}, {"data/samples": "s"}),
    }
    return {
        "schema": "2.0",
        "stages": {
            name: {
                "deps": [
                    {"path": path, "hash": "md5", "md5": changes.get(f"{name}:{path}", digest)}
                    for path, digest in deps.items()
                ],
                "params": {"params.yaml": used},
                "outs": [{"path": path, "hash": "md5", "md5": digest} for path, digest in outs.items()],
            }
            for name, (deps, used, outs) in stages.items()
        },
    }


def files_of(params: dict, losses: np.ndarray | None, loss: float, code: str = "c0de00") -> dict[str, bytes]:
    """The files that a run leaves; without `losses` [items] it is one older than the table."""
    files = {
        "params.yaml": yaml.safe_dump(params).encode(),
        "dvc.lock": yaml.safe_dump(lock_of(params, code)).encode(),
        "metrics/evaluate.json": json.dumps({LOSS: loss, "num_held_out": NUM_ITEMS, "note": "text"}).encode(),
        "metrics/train.json": json.dumps({"best_validation_loss": 2 * loss}).encode(),
    }
    return files if losses is None else files | {"metrics/values.parquet": table_of(losses)}


def table_of(losses: np.ndarray) -> bytes:
    """Two timesteps, around the items' losses."""
    items, values = [f"image {n}" for n in range(len(losses))], Values()
    by_timestep = np.stack([losses - 0.5, losses + 0.5], axis=1)
    values.add("held_out_loss", "trained", by_timestep, items, items, [100, 900])
    values.add("held_out_loss", "base", by_timestep + 9, items, items, [100, 900])
    with tempfile.TemporaryDirectory() as folder:
        values.write(Path(folder) / "values.parquet")
        return (Path(folder) / "values.parquet").read_bytes()


@pytest.fixture
def make_run() -> Callable[..., Run]:
    """A function that makes a run of a training seed, whose loss is that of the recipe and of its seed."""

    def make(seed: int, loss: float = 1.0, code: str = "c0de00", name: str = "", items: bool = True, **train) -> Run:
        params = copy.deepcopy(PARAMS)
        params["train"] |= {"seed": seed, **train}
        rng = np.random.default_rng(seed)
        losses = loss + 0.01 * rng.standard_normal() + np.linspace(-0.3, 0.3, NUM_ITEMS)
        values = read_values(table_of(losses), "t") if items else None
        name = name or f"lr-{params['train']['lr']}-seed-{seed}"
        return Run(name, False, params, lock_of(params, code), {LOSS: float(losses.mean())}, values, {})

    return make


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A repository with HEAD, and a function that adds experiments to it."""
    monkeypatch.chdir(tmp_path)
    git("init", "--quiet")
    Path(".dvc").mkdir()
    for path, content in files_of(PARAMS, np.full(NUM_ITEMS, 1.0), 1.0).items():
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_bytes(content)
    git("add", "-A")
    git("commit", "--quiet", "-m", "head")
    return tmp_path


def git(*arguments: str) -> str:
    names = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *names, *arguments], capture_output=True, text=True, check=True).stdout.strip()


def add_experiment(name: str, files: dict[str, bytes | None]) -> None:
    """A commit beside HEAD with these files changed, or removed, under the ref that DVC gives it."""
    head = git("rev-parse", "HEAD")
    for path, content in files.items():
        Path(path).unlink() if content is None else Path(path).write_bytes(content)
    git("add", "-A")
    made = git("commit-tree", "-p", head, "-m", name, git("write-tree"))
    git("update-ref", f"refs/exps/{head[:2]}/{head[2:]}/{name}", made)
    git("reset", "--quiet", "--hard")


def trained(lr: float, seed: int, loss: float) -> dict[str, bytes]:
    params = PARAMS | {"train": PARAMS["train"] | {"lr": lr, "seed": seed}}
    return files_of(params, loss + np.linspace(-0.3, 0.3, NUM_ITEMS), loss)


# Reading.


def test_a_run_is_read_from_git_and_from_disk(project):
    add_experiment("fast", trained(2e-3, 3, 0.5))
    run = read_run(project, "fast")
    assert run.params["train"]["lr"] == 2e-3
    assert run.numbers == {LOSS: 0.5, "num_held_out": NUM_ITEMS, "best_validation_loss": 1.0}
    assert len(run.values) == 4 * NUM_ITEMS
    assert not run.is_head
    assert read_run(project, "HEAD").is_head
    (project / "metrics" / "evaluate.json").write_text(json.dumps({LOSS: 7}))
    assert read_run(project, "workspace").numbers[LOSS] == 7
    assert read_run(project, "HEAD").numbers[LOSS] == 1


def test_experiments_of_head_come_with_it_and_unreadable_ones_are_named(project):
    add_experiment("fast", trained(2e-3, 3, 0.5))
    add_experiment("broken", {"metrics/evaluate.json": None})
    runs, faults = read_experiments(project)
    assert [run.name for run in runs] == ["HEAD", "fast"]
    assert len(faults) == 1
    assert "broken has no metrics/evaluate.json; run `dvc repro`, then `git add`" in faults[0]


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("dvc.lock", None, "workspace has no dvc.lock; run `dvc repro`$"),
        ("params.yaml", None, "workspace has no params.yaml"),
        ("metrics/evaluate.json", "{", "metrics/evaluate.json of workspace: not valid JSON"),
        ("metrics/evaluate.json", "[]", "^metrics/evaluate.json of workspace: expected a mapping, got list"),
        ("dvc.lock", "a: [", "dvc.lock of workspace: not valid YAML"),
        ("metrics/values.parquet", "text", "metrics/values.parquet of workspace: isn't a table"),
    ],
)
def test_a_missing_or_broken_file_is_named(project, path, content, message):
    (project / path).unlink()
    if content is not None:
        (project / path).write_text(content)
    with pytest.raises(InputError, match=message):
        read_run(project, "workspace")


# Recipes.


def test_runs_that_differ_in_the_seed_of_training_alone_are_replicates(make_run):
    runs = [make_run(0), make_run(1), make_run(2, lr=2e-3), make_run(0, code="c0de01")]
    recipes, notes = group_runs(runs)
    assert [list(recipe.runs) for recipe in recipes] == [[0, 1], [2], [0]]
    assert [recipe.name for recipe in recipes] == [
        f"train.lr 0.001, code {CODE} c0de00",
        f"train.lr 0.002, code {CODE} c0de00",
        f"train.lr 0.001, code {CODE} c0de01",
    ]
    assert notes == []


def test_the_same_recipe_and_seed_twice_is_one_replicate(make_run):
    first, same, other = make_run(0, name="first"), make_run(0, name="same"), make_run(0, 2.0, name="other")
    (recipe,), notes = group_runs([first, same, other])
    assert recipe.runs == {0: first}
    assert recipe.repeats == [same, other]
    assert notes == [
        "same repeats first, the same recipe and seed, with the same metrics; only first counts",
        "other repeats first, the same recipe and seed, with other metrics; only first counts",
    ]


def test_what_changes_no_metric_makes_no_other_recipe(make_run):
    """Params of stages that the metrics don't come from, and of none at all."""
    run, other = make_run(0), make_run(1)
    other.params["dataset"]["num_workers"] = 0
    other.lock["stages"]["sample"]["params"]["params.yaml"] = {"sample": {"prompts": ["x"]}}
    assert len(group_runs([run, other])[0]) == 1


def test_data_is_named_where_nothing_else_explains_it(make_run):
    """A data set that other scenes explain isn't; one from a moving source is."""
    run, fewer, moved = make_run(0), make_run(0), make_run(0)
    params = PARAMS | {"dataset": {"num_scenes": 5, "num_workers": 2}}
    fewer = replace(fewer, params=params, lock=lock_of(params))
    assert [recipe.name for recipe in group_runs([run, fewer])[0]] == ["dataset.num_scenes 9", "dataset.num_scenes 5"]
    moved = replace(moved, lock=json.loads(json.dumps(moved.lock).replace('"d9"', '"0therSet"')))
    assert [recipe.name for recipe in group_runs([run, moved])[0]] == ["data/set d9", "data/set 0therS"]


def test_code_of_several_places_is_named_once(make_run):
    """A folder's change is that of a file in it, too."""
    run, other = make_run(0), make_run(0, code="c0de01")
    for one, digest in ((run, "aa"), (other, "bb")):
        for path in ("src/sdtrain/training/step.py", "stages/train.py"):
            one.lock["stages"]["train"]["deps"].append({"path": path, "hash": "md5", "md5": digest})
    names = [recipe.name for recipe in group_runs([run, other])[0]]
    assert names == [f"code {sha256_json([code, digest])[:6]}" for code, digest in (("c0de00", "aa"), ("c0de01", "bb"))]


def test_recipes_that_differ_in_too_much_to_say_are_named_after_a_run(make_run):
    run, other = make_run(0, name="short", note="x"), make_run(0, name="long", note="x" * 200)
    assert [recipe.name for recipe in group_runs([run, other])[0]] == ["as short", "as long"]


def test_a_param_that_a_recipe_has_not_is_said(make_run):
    recipes, _ = group_runs([make_run(0), make_run(0, extra=None)])
    assert [recipe.name for recipe in recipes] == ["no train.extra", "train.extra null"]


def test_runs_older_than_the_seed_of_training_have_the_seed_of_everything(make_run):
    params = copy.deepcopy(PARAMS) | {"seed": 4}
    del params["train"]["seed"]
    old = replace(make_run(0), params=params, lock=lock_of(params))
    origin, seed = origin_of(old)
    assert seed == 4
    assert set(origin.inputs) == {"data/set", CODE}


@pytest.mark.parametrize("change", ["evaluate:data/model", "evaluate:data/set"])
def test_metrics_of_an_older_state_are_refused(make_run, change):
    run = make_run(0)
    run = replace(run, lock=lock_of(run.params, **{change: "older"}))
    with pytest.raises(InputError, match=rf"not all stages ran on the same {change.split(':')[1]}.*`dvc repro`"):
        origin_of(run)


def test_a_run_of_no_one_state_is_left_out_and_said(make_run):
    run, broken = make_run(0), make_run(1)
    broken = replace(broken, lock=lock_of(broken.params, **{"evaluate:data/model": "older"}))
    found = compare([run, broken], LOSS)
    assert [list(ranked.recipe.runs) for ranked in found.ranked] == [[0]]
    assert found.notes[0].startswith("left out: lr-0.001-seed-1: by dvc.lock not all stages")
    with pytest.raises(InputError, match="no run can be compared\nleft out: lr-0.001-seed-1"):
        compare([broken], LOSS)


def test_stages_that_ran_with_different_params_are_refused(make_run):
    run = make_run(0)
    run.lock["stages"]["evaluate"]["params"]["params.yaml"]["seed"] = 1
    with pytest.raises(InputError, match="not all stages ran on the same seed"):
        origin_of(run)


def test_params_that_were_changed_since_are_said(make_run):
    run = make_run(0)
    run.params["train"]["lr"] = 5e-3
    (recipe,), (note,) = group_runs([run])
    assert "params.yaml has train.lr = 0.005, but the metrics were made with 0.001" in note
    assert recipe.origin.params["train.lr"] == 1e-3


# Verdicts.


def recipes_of(make_run: Callable[..., Run], losses: dict[float, float], num_seeds: int = 4, **changes) -> list[Run]:
    return [
        make_run(10 * place + seed, loss, lr=lr, **changes)
        for place, (lr, loss) in enumerate(losses.items())
        for seed in range(num_seeds)
    ]


def test_the_verdict_is_that_of_the_statistics_over_seeds_and_items(make_run):
    runs = recipes_of(make_run, {1e-3: 1.0, 2e-3: 0.9})
    found = compare(runs, LOSS, baseline=runs[0].name)
    assert [ranked.recipe.name for ranked in found.ranked] == ["train.lr 0.002", "train.lr 0.001"]
    assert found.reference is found.ranked[1]
    matrices = [
        np.array([np.linspace(-0.3, 0.3, NUM_ITEMS) + run.numbers[LOSS] for run in runs[part]])
        for part in (slice(4, 8), slice(4))
    ]
    expected = recipe_difference(*matrices)
    verdict = found.ranked[0].verdict
    assert (verdict.word, verdict.over_images) == ("better", True)
    assert vars(verdict.difference) == pytest.approx(vars(expected), rel=1e-3)
    assert verdict.p_adjusted == verdict.difference.p


def test_order_of_runs_is_of_no_matter(make_run):
    runs = recipes_of(make_run, {1e-3: 1.0, 2e-3: 0.95, 3e-3: 0.9})
    assert as_json(compare(runs[::-1], LOSS)) == as_json(compare(runs, LOSS))


def test_a_metric_without_single_values_is_compared_over_seeds(make_run):
    runs = recipes_of(make_run, {1e-3: 1.0, 2e-3: 0.9}, items=False)
    found = compare(runs, LOSS, baseline=runs[0].name)
    values = [np.array([run.numbers[LOSS] for run in part]) for part in (runs[4:], runs[:4])]
    assert found.ranked[0].verdict.difference == welch_difference(*values)
    assert not found.ranked[0].verdict.over_images
    assert any("on these same images" in line for line in sentences(found))


def test_with_the_best_as_reference_all_pairs_are_adjusted_for(make_run):
    parts = [recipes_of(make_run, {lr: loss}) for lr, loss in ((1e-3, 1.0), (2e-3, 0.97), (3e-3, 0.971))]
    p_values = {}
    for first, second in itertools.combinations(parts, 2):
        (better, worse) = compare(first + second, LOSS).ranked
        p_values[frozenset({better.recipe.name, worse.recipe.name})] = worse.verdict.difference.p
    adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    found = compare([run for part in parts for run in part], LOSS)
    best, *others = found.ranked
    assert (found.reference, found.is_best, found.num_comparisons) == (best, True, 3)
    for ranked in others:
        assert ranked.verdict.p_adjusted == adjusted[frozenset({best.recipe.name, ranked.recipe.name})]
    assert others[-1].verdict.p_adjusted > others[-1].verdict.difference.p


def test_those_that_cannot_be_told_from_the_best_are_named_together(make_run):
    found = compare(recipes_of(make_run, {1e-3: 1.0, 2e-3: 0.5, 3e-3: 0.501, 4e-3: 0.502}, num_seeds=3), LOSS)
    first, second, *_ = sentences(found)
    best, *alike, worst = (ranked.recipe.name for ranked in found.ranked)
    assert first == f"The best, {best}, can't be told from 2 others: {'; '.join(alike)}."
    assert worst == "train.lr 0.001"
    assert second.startswith(f"{best} is better than {worst} (difference -0.5")
    assert sentences(found)[-1] == "p is adjusted for 6 comparisons, of all pairs of recipes; intervals aren't."


def test_head_with_several_seeds_is_the_reference_and_with_one_it_is_not(make_run):
    runs = recipes_of(make_run, {1e-3: 1.0, 2e-3: 0.9})
    assert compare([replace(runs[0], is_head=True), *runs[1:]], LOSS).reference.recipe.name == "train.lr 0.001"
    alone = replace(make_run(77, 0.1, lr=9e-3), is_head=True)
    assert compare([alone, *runs], LOSS).reference.recipe.name == "train.lr 0.002"
    assert compare([alone, runs[0]], LOSS).reference.recipe.name == "train.lr 0.009"


def test_higher_is_better_where_it_is(make_run):
    runs = [
        replace(run, numbers={"new_color_accuracy_trained": run.numbers[LOSS]}, values=None)
        for run in recipes_of(make_run, {1e-3: 0.5, 2e-3: 0.9})
    ]
    found = compare(runs, "new_color_accuracy_trained", baseline=runs[0].name)
    assert [ranked.recipe.name for ranked in found.ranked] == ["train.lr 0.002", "train.lr 0.001"]
    assert found.ranked[0].verdict.word == "better"


def test_one_seed_gives_no_verdict_but_a_yardstick(make_run):
    runs = [*recipes_of(make_run, {1e-3: 1.0}), make_run(50, 0.5, lr=2e-3)]
    found = compare(runs, LOSS)
    single = found.ranked[0]
    assert (single.verdict.word, single.verdict.reason, single.sd, single.interval) == (
        "no verdict", "one seed", None, None,
    )  # fmt: skip
    sd = np.std([run.numbers[LOSS] for run in runs[:4]], ddof=1)
    (sentence,) = sentences(found)
    assert sentence == (
        "train.lr 0.002 has one seed: no verdict on the recipe; as a yardstick, the 4 seeds of train.lr 0.001 have an "
        f"sd of {sd:.2g}. Run several values of train.seed."
    )


def test_two_single_runs_are_compared_as_checkpoints_only(make_run):
    """Every image differs by the same amount, so the interval over images is that."""
    first, second = make_run(0, 1.0), make_run(0, 0.5, lr=2e-3)
    found = compare([first, second], LOSS)
    assert [ranked.verdict and ranked.verdict.reason for ranked in found.ranked] == [None, "one seed"]
    pair = found.checkpoints
    assert (pair.mean, pair.ci_low, pair.ci_high) == pytest.approx((-0.5, -0.5, -0.5))
    assert pair.num_images == NUM_ITEMS
    assert sentences(found) == [
        "train.lr 0.002; train.lr 0.001 have one seed: no verdict on the recipes. Run several values of train.seed.",
        "These two checkpoints, lr-0.002-seed-0 minus lr-0.001-seed-0: -0.5, 95 % over 40 images -0.5 to -0.5. Other "
        "seeds of the same recipes differ as well.",
    ]
    assert compare([first, second, make_run(1)], LOSS).checkpoints is None


def test_other_images_give_no_verdict_while_the_rest_is_ranked(make_run):
    runs = recipes_of(make_run, {1e-3: 1.0, 2e-3: 0.9, 3e-3: 0.8})
    moved = [
        replace(run, values=run.values.assign(item="new " + run.values["item"])) if run.params["train"]["lr"] == 3e-3
        else run
        for run in runs
    ]  # fmt: skip
    found = compare(moved, LOSS, baseline=runs[0].name)
    assert [ranked.verdict and (ranked.verdict.reason or ranked.verdict.word) for ranked in found.ranked] == [
        "other images", "better", None,
    ]  # fmt: skip
    assert "train.lr 0.003 and train.lr 0.001 have no values of the same images: no verdict." in sentences(found)
    assert found.num_comparisons == 1


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_a_run_reported_on_test_images_does_not_compare_with_one_on_validation_images(make_run, num_seeds):
    """More seeds are only asked for where they would help."""
    on_validation, on_test = [make_run(seed) for seed in range(num_seeds)], []
    for seed in range(num_seeds):
        run = make_run(seed, name=f"test-{seed}")
        lock = json.loads(json.dumps(run.lock).replace('"d9"', '"d8"'))
        lock["stages"]["dataset"]["params"]["params.yaml"]["dataset.test_fraction"] = 0.1
        on_test.append(replace(run, lock=lock, values=run.values.assign(item="test " + run.values["item"])))
    [sentence] = sentences(compare([*on_validation, *on_test], LOSS))
    names = {"dataset.test_fraction 0.1", "no dataset.test_fraction"}
    assert {*sentence.removesuffix(" have no values of the same images: no verdict.").split(" and ")} == names


@pytest.mark.parametrize("column", ["text", "timestep"])
def test_the_same_names_of_other_questions_are_other_images(make_run, column):
    runs = recipes_of(make_run, {1e-3: 1.0, 2e-3: 0.9})
    changed = [
        replace(run, values=run.values.assign(**{column: run.values[column] + ("!" if column == "text" else 1)}))
        for run in runs[4:]
    ]
    assert compare([*runs[:4], *changed], LOSS).ranked[-1].verdict.reason == "other images"


@pytest.mark.parametrize(
    ("image_sets", "reason"), [([7, 7], None), ([7, 8], "other images"), ([7, None], "other images")]
)
@pytest.mark.parametrize("metric", ["mind_clip_trained", "clip_score_clip_trained"])
def test_what_an_encoder_says_compares_only_with_the_same_images_and_encoder(make_run, metric, image_sets, reason):
    """A run that doesn't say what its set was is compared with none."""
    runs = recipes_of(make_run, {1e-3: 1.0, 2e-3: 0.9})
    sets = [image_sets[0]] * (len(runs) // 2) + [image_sets[1]] * (len(runs) // 2)
    runs = [
        replace(
            run,
            numbers={metric: run.numbers[LOSS], "num_drawn_images": 200}
            | ({} if found is None else {"image_set": found}),
        )
        for run, found in zip(runs, sets, strict=True)
    ]
    [verdict] = [found.verdict for found in compare(runs, metric, baseline=runs[0].name).ranked if found.verdict]
    assert verdict.reason == reason
    assert (verdict.difference is None) == (reason is not None)


@pytest.mark.parametrize(("metric", "num_drawn", "reason", "num_images"), [
    ("mind_clip_trained", 199, "few images", 99), ("mind_clip_trained", 200, None, 100),
    ("clip_score_clip_trained", 199, None, 199),
])  # fmt: skip
def test_sets_of_few_images_get_no_verdict(make_run, metric, num_drawn, reason, num_images):
    """A mean over images has its interval whatever their number."""
    numbers = {"num_drawn_images": num_drawn, "num_set_images": num_drawn // 2, "image_set": 7}
    runs = [
        replace(run, numbers={metric: run.numbers[LOSS], **numbers})
        for run in recipes_of(make_run, {1e-3: 1.0, 2e-3: 0.9})
    ]
    found = compare(runs, metric, baseline=runs[0].name)
    [verdict] = [ranked.verdict for ranked in found.ranked if ranked.verdict]
    assert (verdict.reason, found.num_images) == (reason, num_images)
    assert ("were measured on too few images" in " ".join(sentences(found))) == (reason is not None)


def test_a_run_that_diverged_comes_last_without_a_verdict(make_run):
    runs = recipes_of(make_run, {1e-3: 1.0, 2e-3: 0.9})
    runs[4] = replace(runs[4], numbers={LOSS: float("nan")})
    found = compare(runs, LOSS)
    assert [ranked.recipe.name for ranked in found.ranked] == ["train.lr 0.001", "train.lr 0.002"]
    assert found.ranked[1].verdict.reason == "not finite"
    assert json.loads(json.dumps(as_json(found), allow_nan=False))["recipes"][1]["mean"] is None


def test_runs_without_the_metric_are_left_out_and_said(make_run):
    runs = recipes_of(make_run, {1e-3: 1.0, 2e-3: 0.9})
    found = compare([*runs, replace(make_run(99, name="old"), numbers={})], LOSS)
    assert found.notes == [f"left out: old has no {LOSS}"]
    assert len(found.ranked) == 2


@pytest.mark.parametrize(
    "metric", ["held_out_los_trained", "num_held_out", "held_out_loss_base", "known_shape_accuracy_trained"]
)
def test_a_metric_that_ranks_nothing_is_refused(make_run, metric):
    run = make_run(0)
    run.numbers.update(num_held_out=3, held_out_loss_base=2.0)
    with pytest.raises(InputError, match=rf"metric = '{metric}': must be one .*: {LOSS}"):
        compare([run], metric)


def test_an_unknown_baseline_is_refused(make_run):
    with pytest.raises(InputError, match=r"baseline = 'x': must be one of the runs .*: lr-0\.001-seed-0$"):
        compare([make_run(0)], LOSS, baseline="x")


# The command.


@pytest.fixture
def swept(project):
    """Three rates, three seeds each; HEAD is one of them."""
    for lr, loss in ((1e-3, 1.0), (2e-3, 0.9), (4e-3, 0.91)):
        for seed in range(3):
            if (lr, seed) != (1e-3, 0):
                add_experiment(f"lr-{lr}-seed-{seed}", trained(lr, seed, loss + 0.02 * (seed - 1) * (lr != 1e-3)))
    return project


def printed(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    call(*arguments)
    return capsys.readouterr().out


def call(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers(required=True))
    options = parser.parse_args(["compare", *arguments])
    options.run(options)


def test_the_command_ranks_heads_experiments(swept, capsys):
    lines = printed(capsys).splitlines()
    assert lines[0] == f"{LOSS}, lower is better, N = 40 images; the reference is the recipe of HEAD"
    table = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines[1:5]]
    assert table[1][:3] == ["train.lr 0.002", "3", "0.9"]
    assert [row[-1] for row in table[1:]] == ["better", "better", "(reference)"]
    assert lines[5].startswith("train.lr 0.002 is better than train.lr 0.001 (difference -0.1, 95 % ")
    assert lines[5].endswith("; 3 and 3 seeds).")
    assert lines[-1] == "p is adjusted for 2 comparisons, with the reference; intervals aren't."


def test_heads_replicates_are_the_yardstick_of_single_runs(swept, capsys):
    """HEAD is seed 0 of its recipe, and two experiments are further seeds of it."""
    out = printed(capsys, "lr-0.002-seed-0", "lr-0.004-seed-0")
    sd = compare(read_experiments(swept)[0], LOSS).reference.sd
    assert f"no verdict on the recipes; as a yardstick, the 3 seeds of HEAD's recipe have an sd of {sd:.2g}." in out
    assert len(json.loads(printed(capsys, "lr-0.002-seed-0", "lr-0.004-seed-0", "--json"))["yardstick"]) == 3
    assert json.loads(printed(capsys, "--json"))["yardstick"] is None


def test_the_command_names_those_that_cannot_be_told_from_the_best(swept, capsys):
    experiments = [f"lr-{lr}-seed-{seed}" for lr in (2e-3, 4e-3) for seed in range(3)]
    out = printed(capsys, *experiments)
    assert "train.lr 0.004 can't be told from train.lr 0.002 (difference +0.01, 95 % " in out
    assert out.splitlines()[0].endswith("; the reference is the best")


def test_what_is_wrong_with_a_run_stands_below_the_verdicts(project, capsys):
    """Its validations say that training did harm, whatever the metric says of it."""
    curves = {
        "metrics/validation.csv": b"step,loss_raw\n0,0.5\n10,0.9\n20,0.8\n30,0.7\n",
        "metrics/train.csv": b"step,lr\n10,0.2\n20,0.2\n30,0.2\n",
    }
    params = copy.deepcopy(PARAMS)
    params["train"]["lr"] = 0.2
    add_experiment("harmed", files_of(params, np.full(NUM_ITEMS, 0.5), 0.5) | curves)
    last = printed(capsys, "HEAD", "harmed").splitlines()[-1]
    assert last.startswith("WARNING: harmed: training never lowered the held-out loss, 0.50000 before it and 0.70000")
    tree = json.loads(printed(capsys, "HEAD", "harmed", "--json"))
    assert list(tree["faults"]) == ["harmed"]


def test_a_second_metric_is_refused(swept, capsys):
    with pytest.raises(SystemExit):
        call("--metric", LOSS, "--metric", "best_validation_loss")
    assert "--metric is given twice; ranks are by one metric, `sdtrain report` shows several" in capsys.readouterr().err


def test_another_folder_than_the_projects_is_refused(swept, monkeypatch):
    monkeypatch.chdir("metrics")
    with pytest.raises(InputError, match=r"metrics isn't a DVC project; run the command from the project's root"):
        call()


def test_the_loss_of_training_images_ranks_nothing(make_run):
    """The lowest has who learned them by heart."""
    run = make_run(0)
    run.numbers["train_loss_trained"] = 0.1
    with pytest.raises(InputError, match=r"metric = 'train_loss_trained': must be one that tells which run is better"):
        compare([run], "train_loss_trained")


def test_the_command_takes_a_baseline_that_is_not_among_the_revisions(swept, capsys):
    out = printed(capsys, "lr-0.001-seed-1", "lr-0.001-seed-2", "--baseline", "lr-0.004-seed-0")
    assert "train.lr 0.004 has one seed: no verdict on the recipe; as a yardstick, the 2 seeds of" in out


def test_json_has_what_the_table_says(swept, capsys):
    tree = json.loads(printed(capsys, "--json"))
    assert (tree["metric"], tree["better"], tree["reference"]) == (LOSS, "lower", "train.lr 0.001")
    first = tree["recipes"][0]
    assert [run["name"] for run in first["runs"]] == [f"lr-0.002-seed-{seed}" for seed in range(3)]
    assert [run["value"] for run in first["runs"]] == pytest.approx([0.88, 0.9, 0.92])
    assert first["mean"] == pytest.approx(0.9)
    assert first["verdict"]["difference"] == pytest.approx(-0.1)
    assert first["verdict"]["word"] == "better"
    assert tree["recipes"][2]["verdict"] is None
    comparison = compare(read_experiments(swept)[0], LOSS)
    assert tree == json.loads(json.dumps(as_json(comparison)))
    assert [row[-1] for row in rows(comparison)] == ["better", "better", "(reference)"]


def test_an_unknown_revision_is_refused_with_the_nearest_ones(swept):
    with pytest.raises(InputError, match=r"^lr-0\.002-seed-9: no experiment, .* nearest is lr-0\.002-seed-"):
        call("lr-0.002-seed-9")


def test_without_a_readable_run_every_fault_is_said(project):
    git("rm", "--quiet", "dvc.lock")
    git("commit", "--quiet", "-m", "unlocked")
    with pytest.raises(InputError, match=r"no run to compare; run `dvc exp run`\nleft out: HEAD has no dvc\.lock"):
        call()


def test_markup_in_a_name_is_shown_as_it_is(project, capsys):
    params = PARAMS | {"train": PARAMS["train"] | {"note": "[red]x[/red]"}}
    add_experiment("odd", files_of(params, None, 1.0))
    assert "train.note [red]x[/red]" in printed(capsys)


# How often verdicts are wrong.


def load_script():
    path = Path(__file__).resolve().parents[2] / "scripts" / "verdict_levels.py"
    spec = importlib.util.spec_from_file_location("verdict_levels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_levels_and_power_of_recipes_beside_those_of_checkpoints(make_run):
    """In these runs a seed moves all images alike: two checkpoints always differ, whatever their recipe."""
    runs = recipes_of(make_run, {1e-3: 1.0}, num_seeds=10) + recipes_of(make_run, {2e-3: 1.2}, num_seeds=5)
    _, _, same, other = load_script().levels(runs, LOSS).splitlines()
    name, num_seeds, difference, level, checkpoints = (cell.strip() for cell in same.strip("|").split("|"))
    assert (name, num_seeds, difference, checkpoints) == ("train.lr 0.001", "10", "the same recipe", "100.0%")
    assert float(level.rstrip("%")) <= 10
    assert other.startswith("| train.lr 0.002 | 5 | +0.2 | 100.0% | 100.0% |")


def test_levels_need_ten_seeds_and_single_values(make_run):
    runs = recipes_of(make_run, {1e-3: 1.0}, num_seeds=10)
    with pytest.raises(InputError, match="the recipe has 9 seeds, and no recipe has more; 10 are needed"):
        load_script().levels(runs[1:], LOSS)
    with pytest.raises(InputError, match="no values of the same images"):
        load_script().levels([replace(run, values=None) for run in runs], LOSS)
