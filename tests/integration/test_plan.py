"""`sdtrain plan` and `sdtrain overfit`, through the command line."""

import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import datasets
import pytest
import yaml
from PIL import Image

from sdtrain.cli import main
from sdtrain.export import export_model
from sdtrain.models.parts import meta_parts
from sdtrain.models.sd1 import SD1
from sdtrain.precompute import precompute_latents
from sdtrain.tools.plan.base import find_base, latent_shape
from sdtrain.tools.plan.disk import disk_items
from sdtrain.tools.plan.images import count_images
from sdtrain.tools.plan.made import find_made
from sdtrain.tools.plan.sizes import folder_bytes
from sdtrain.training.memory import training_costs
from tests.conftest import ROOT, shrunk_tree

BUILTIN = {"path": str(ROOT / "data" / "builtin")}
GIB = 2**30


@pytest.fixture
def command(workspace, tmp_path, monkeypatch, capsys):
    """Run `sdtrain NAME` on the shrunken project with changed params; what it printed."""
    from accelerate.state import AcceleratorState

    monkeypatch.chdir(tmp_path)

    def run(name: str, *options: str, places: dict | None = None, **changes) -> str:
        places = places or {"base": workspace.base, "latents": workspace.latents}
        if name == "plan":
            places = {"dataset": workspace.dataset, **places}
        changes["base"] = {**BUILTIN, **changes.get("base", {})}
        AcceleratorState._reset_state(reset_partial_state=True)
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(shrunk_tree(**changes)))
        main([name, *(f"--{place}={folder}" for place, folder in places.items()), *options])
        return capsys.readouterr().out

    return run


@pytest.fixture
def nothing(tmp_path) -> dict[str, Path]:
    """Places where no stage has written yet."""
    return {name: tmp_path / "data" / name for name in ("base", "dataset", "latents")}


def lines_of(output: str) -> dict[str, str]:
    return {line[:16].strip(): line[17:] for line in output.splitlines()}


def test_the_plan_says_what_the_params_will_do(command, workspace):
    num_train = json.loads((workspace.folder / "dataset.json").read_text())["num_train"]
    train = {"max_steps": None, "max_epochs": 3, "batch_size": 8, "micro_batch_size": 2, "lr": 1e-4}
    scaling = {"lr_scaling": "sqrt", "lr_reference_batch_size": 2}
    plan = lines_of(command("plan", train={**train, **scaling}))
    assert plan["images"].startswith(f"{num_train} to train on, 4 held out")
    assert plan["steps"].startswith(f"{-(-3 * num_train // 8)} of 8 images, 3.0 epochs")
    assert plan["effective batch"] == "8 = 1 processes x 4 micro-batches x 2"
    assert plan["learning rate"].startswith("0.0002 peak, cosine")
    assert plan["trained"].startswith("2,839,268 parameters")
    assert re.match(r"about 0\.\d\d GiB per process, of \d+\.\d\d GiB", plan["memory"])
    assert "starts from scratch: it has no saved state" in plan["resume"]
    assert plan["time"].startswith("not measured")


def test_the_plan_counts_processes(command, monkeypatch):
    monkeypatch.setenv("NPROC", "4")
    with pytest.raises(SystemExit, match="can't be split into micro-batches of 8 on 4 processes"):
        command("plan")
    assert "8 = 4 processes x 1 micro-batches x 2" in command("plan", train={"micro_batch_size": 2})


def test_the_plan_times_steps(command):
    text = lines_of(command("plan", "--time-steps", "2"))["time"]
    assert re.match(r"about \d+\.\d min of training steps, \d+ ms each here \(2 timed\)", text)


def test_the_plan_finds_the_saved_state(command, workspace, tmp_path):
    workspace.train(tmp_path)
    (tmp_path / ".dvc" / "tmp").mkdir(parents=True)
    (tmp_path / "resume").rename(tmp_path / ".dvc" / "tmp" / "resume")
    assert re.search(r"resumes from .*step-00000004", lines_of(command("plan"))["resume"])


def test_before_anything_is_made_the_plan_reads_the_params(command, nothing):
    plan = lines_of(command("plan", places=nothing, dataset={"num_scenes": 1000}))
    assert plan["images"].startswith("900 to train on, 100 held out (about, by dataset.num_scenes")
    assert plan["trained"].startswith("2,839,268 parameters")
    assert plan["resume"] == "unknown until base and latents are there"


def test_a_test_split_is_counted_apart(command, nothing):
    dataset = {"num_scenes": 1000, "test_fraction": 0.2}
    plan = lines_of(command("plan", places=nothing, dataset=dataset, validation={"max_samples": 5000}))
    assert plan["images"].startswith("700 to train on, 100 held out for validation, 200 for test (about, by dataset")
    assert plan["validations"].startswith("3, of 200 noised latents each")  # at two timesteps
    plan = lines_of(command("plan", places=nothing, dataset={**dataset, "max_train_samples": 70}))
    assert plan["images"].startswith("70 to train on, 10 held out for validation, 20 for test (about, by dataset")


def test_steps_are_unknown_only_where_they_hang_on_images_that_are_not_counted(command, nothing, tmp_path):
    dataset = {"source": "imagefolder", "path": str(tmp_path / "none")}
    plan = lines_of(command("plan", places=nothing, dataset=dataset))
    assert plan["images"] == f"unknown (dataset.path = '{tmp_path}/none' isn't there)"
    assert plan["steps"] == "4 of 8 images, epochs unknown until the images are counted (train.max_steps)"
    assert plan["validations"].startswith("3, of up to 8 noised latents each")
    assert plan["disk"].startswith("at least ")
    epochs = lines_of(command("plan", places=nothing, dataset=dataset, train={"max_steps": None, "max_epochs": 3}))
    assert epochs["steps"] == "3 epochs, steps of 8 images unknown until the images are counted (train.max_epochs)"
    assert epochs["validations"].startswith("one every 2 steps, of up to 8")
    assert epochs["memory"] == plan["memory"]


def test_folders_of_other_params_are_named_and_not_counted(command, workspace, tmp_path):
    """After `cp recipes/sd15.yaml params.yaml` the default's base and latents are still in data/."""
    plan = command("plan", precompute={"resolution": 128})
    assert (
        f"out of date      {workspace.latents} was made with precompute.resolution = 64, params.yaml says 128" in plan
    )
    assert lines_of(plan)["images"].endswith(f"(counted in {workspace.dataset})")
    assert "4 x 16 x 16" in lines_of(plan)["disk latents"]

    plan = command("plan", dataset={"num_scenes": 90})
    assert f"out of date      {workspace.dataset} was made from another source" in plan
    assert lines_of(plan)["images"].startswith("81 to train on, 9 held out (about")

    shutil.copytree(ROOT / "data" / "builtin", tmp_path / "other")
    plan = command("plan", base={"path": str(tmp_path / "other")})
    assert f"out of date      {workspace.base} was made with another base.path" in plan
    assert f"(configs of {tmp_path / 'other'})" in lines_of(plan)["base"]
    assert lines_of(plan)["resume"] == "unknown until base and latents are there"


def test_steps_cannot_be_timed_without_something_to_train_on(command, nothing):
    missing = f"{nothing['base']} isn't there; {nothing['latents']} isn't there; run `dvc repro precompute`"
    with pytest.raises(SystemExit, match=re.escape(f"--time-steps: {missing}")):
        command("plan", "--time-steps", "2", places=nothing)
    with pytest.raises(SystemExit, match=r"--time-steps: .*latents was made with precompute.resolution = 64"):
        command("plan", "--time-steps", "2", precompute={"resolution": 128})


def test_one_batch_is_overfitted(command):
    out = command("overfit", "--steps", "80", "--rows", "2")
    share = float(re.search(r"fell to ([\d.]+)% of its first value", out)[1])
    assert share < 5


def test_a_batch_that_cannot_be_overfitted_fails_the_command(command):
    with pytest.raises(SystemExit, match=r"one batch of 2 can't be overfitted.*try another train.lr \(it is 1e-09"):
        command("overfit", "--steps", "3", "--rows", "2", train={"lr": 1e-9})


# ---------------------------------------------------------------- sizes, by hand and against what the stages wrote


def test_the_known_structure_is_that_of_stable_diffusion_1_5():
    parts = meta_parts(SD1, sample_size=64)
    assert [sum(p.numel() for p in part.parameters()) for part in parts.modules()] == [
        859_520_964,
        83_653_863,
        123_060_480,
    ]


def items_of(params, files, dataset: Path) -> dict:
    made = find_made(params, files, dataset)
    base = find_base(params.base, files.base, made.base)
    shape = latent_shape(base.configs, params.precompute.resolution)
    images = count_images(params.dataset, params.seed, files.latents, dataset, made)
    costs = training_costs(base.configs, params.method, params.train, shape)
    return {item.name: item for item in disk_items(params, base, images, costs, shape, made)}


def test_estimates_come_true(workspace, run, make_params, tmp_path):
    """What the plan says before anything is there, against what the stages then write."""
    params = make_params(base=BUILTIN, export={"dtype": "fp16"})
    plan = items_of(params, workspace.files(tmp_path, base=tmp_path / "no", latents=tmp_path / "no"), tmp_path / "no")
    assert not any(item.is_there for item in plan.values())

    export_model(params.export, workspace.base, run.checkpoints, tmp_path / "model")
    workspace.sample(tmp_path / "model", tmp_path, params.sample)
    assert plan["base"].num_bytes == pytest.approx(folder_bytes(workspace.base), rel=0.01)
    assert plan["dataset"].num_bytes == pytest.approx(folder_bytes(workspace.dataset), rel=0.05)
    assert plan["latents"].num_bytes == pytest.approx(folder_bytes(workspace.latents), rel=0.02)
    assert plan["checkpoints"].num_bytes == pytest.approx(folder_bytes(run.checkpoints), rel=0.02)
    assert plan["model"].num_bytes == pytest.approx(folder_bytes(tmp_path / "model"), rel=0.02)
    assert 0 < folder_bytes(tmp_path / "samples") < plan["samples"].num_bytes
    one_checkpoint = folder_bytes(run.checkpoints / "best")
    (one_state,) = map(folder_bytes, run.checkpoints.parent.glob("resume/*/step-00000004"))
    assert plan["states"].num_bytes == pytest.approx(3 * one_state + 3 * one_checkpoint, rel=0.02)

    counted = items_of(params, workspace.files(tmp_path), workspace.dataset)
    assert {name for name, item in counted.items() if item.is_there} == {"base", "dataset", "latents"}
    assert counted["base"].num_bytes == folder_bytes(workspace.base)


def test_flipped_images_and_both_splits_are_in_the_latents(workspace, make_params, tmp_path):
    plain = make_params(base=BUILTIN)
    params = plain.model_copy(update={"precompute": plain.precompute.model_copy(update={"random_flip": True})})
    plan = items_of(params, workspace.files(tmp_path, base=tmp_path / "no", latents=tmp_path / "no"), tmp_path / "no")
    out = tmp_path / "latents"
    precompute_latents(params.precompute, 0, workspace.base, workspace.dataset, out, tmp_path / "precompute.json")
    assert plan["latents"].num_bytes == pytest.approx(folder_bytes(out), rel=0.02)


def test_conditions_of_every_kind_are_in_the_latents(relit, tmp_path):
    """Foreground, background, relit ones, mask and light maps; but for what headers hold besides ids it is exact."""
    params = relit.make_params(base=BUILTIN)
    plan = items_of(params, relit.files(tmp_path, base=tmp_path / "no", latents=tmp_path / "no"), tmp_path / "no")
    files = [path.read_bytes() for path in relit.latents.glob("*.safetensors")]
    num_bytes = sum(len(data) - 8 - int.from_bytes(data[:8], "little") for data in files)
    assert plan["latents"].num_bytes == num_bytes + 60 * 38
    assert plan["latents"].num_bytes == pytest.approx(folder_bytes(relit.latents), rel=0.02)


def test_disk_and_push_add_up(command, nothing):
    plan = lines_of(command("plan", places=nothing))

    def mib(text: str) -> float:
        return float(re.search(r"([\d.]+) MiB", text)[1])

    outs = ["base", "dataset", "latents", "checkpoints", "model", "features", "samples", "evaluation"]
    sent = sum(mib(plan[f"disk {name}"]) for name in outs)
    assert mib(plan["disk DVC cache"]) == pytest.approx(sent, abs=0.1)
    assert mib(plan["dvc push"]) == pytest.approx(sent, abs=0.1)
    assert "states" not in plan["dvc push"].split(";")[0]
    assert mib(plan["disk"]) == pytest.approx(2 * sent + mib(plan["disk states"]), abs=0.1)
    # 60 scenes: means and log-variances of 4 x 8 x 8 in 2 bytes, 77 ids of 8, names of 38; 4 probes of 3 x 64 x 64 x 4
    assert mib(plan["disk latents"]) == pytest.approx((60 * (2 * 256 * 2 + 616 + 38) + 4 * 49_152) / 2**20, abs=0.005)


def test_what_is_there_already_is_not_needed_again(command, workspace):
    plan = lines_of(command("plan"))
    there = 2 * (folder_bytes(workspace.base) + folder_bytes(workspace.dataset) + folder_bytes(workspace.latents))
    assert float(re.search(r"([\d.]+) MiB of it there already", plan["disk"])[1]) == pytest.approx(
        there / 2**20, rel=0.01
    )


# ---------------------------------------------------------------- images on the disk


def png(size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((size, size), 50).convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def write_images(folder: Path, source: str, num: int) -> None:
    folder.mkdir()
    if source == "imagefolder":
        for number in range(num):
            (folder / f"{number}.png").write_bytes(png())
            (folder / f"{number}.txt").write_text(f"image {number}")
    elif source == "parquet":
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        rows = {"image": [{"bytes": png(), "path": None}] * num, "text": [str(n) for n in range(num)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "some.parquet")
    else:
        for shard in range(2):
            with tarfile.open(folder / f"{shard}.tar", "w") as tar:
                for number in range(num // 2):
                    for suffix, data in ((".png", png()), (".txt", b"an image")):
                        member = tarfile.TarInfo(f"{number:03}{suffix}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("source", ["imagefolder", "parquet", "webdataset"])
def test_images_on_the_disk_are_counted_before_any_stage(command, nothing, tmp_path, source):
    write_images(tmp_path / "mine", source, 200)
    dataset = {"source": source, "path": str(tmp_path / "mine")}
    plan = lines_of(command("plan", places=nothing, dataset=dataset))
    assert plan["images"].startswith("180 to train on, 20 held out (about, ")
    assert plan["steps"].startswith("4 of 8 images, 0.2 epochs")
    limited = lines_of(command("plan", places=nothing, dataset={**dataset, "max_train_samples": 90}))
    assert limited["images"].startswith("90 to train on, 10 held out (about, ")
    all_bytes, half = (float(p["disk dataset"].split(" MiB")[0]) for p in (plan, limited))
    assert half == pytest.approx(all_bytes / 2, abs=0.01)


def test_a_split_may_be_empty_by_rounding(command, nothing):
    plan = lines_of(command("plan", places=nothing, dataset={"num_scenes": 1, "validation_fraction": 0.9}))
    assert plan["images"].startswith("0 to train on, 1 held out (about")
    plan = lines_of(command("plan", places=nothing, dataset={"num_scenes": 1, "validation_fraction": 0.1}))
    assert plan["validations"].startswith("3, of 0 noised latents each")


@pytest.mark.parametrize(("source", "name"), [("parquet", "a.parquet"), ("webdataset", "a.tar")])
def test_damaged_files_leave_the_images_unknown(command, nothing, tmp_path, source, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_bytes(b"no such thing" * 100)
    plan = lines_of(command("plan", places=nothing, dataset={"source": source, "path": str(tmp_path / "mine")}))
    assert plan["images"].startswith(f"unknown (dataset.path = '{tmp_path}/mine' can't be read: ")
