"""Stages whose work several processes share: the same bytes as of one, and one message if any of them fails."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from sdtrain.data.images import decode_rgb, square_pixels
from sdtrain.data.shards import read_dataset
from sdtrain.export import export_model
from sdtrain.ground.processes import ALONE
from sdtrain.models.parts import load_vae
from tests.conftest import EVERYTHING_LIT, ROOT, merged, shrunk_tree
from tests.integration.shared_job import run_job
from tests.integration.sharing import SCENES
from tests.integration.test_processes import free_port
from tests.integration.test_resume import files_of

PYTHONPATH = f"{ROOT / 'src'}{os.pathsep}{ROOT}"
NUM = 3
ODD = {"precompute": {"batch_size": 20}, "sample": {"batch_size": 3}, "evaluate": {"batch_size": 3}}
"""Batches of 20, 20 and 14 training images, one of all that are held out, three of losses, and so on."""


def run_python(*command: object, cwd: Path = ROOT, **environment: object) -> subprocess.CompletedProcess:
    """Its standard error is in `stdout`, too."""
    ours = {"PYTHONPATH": PYTHONPATH, **{name: str(value) for name, value in environment.items()}}
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, **ours},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """What each scene gave or raised, and printed, by process."""
    out = tmp_path_factory.mktemp("scenes")
    ports = [str(free_port()) for _ in SCENES]
    common = {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    common |= {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": str(NUM)}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.integration.sharing", out, *ports],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(NUM)
    ]
    try:
        printed = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    found = {path.stem: json.loads(path.read_text()) for path in out.iterdir()}
    names = [scene.__name__ for scene in SCENES]
    return {name: [found.get(f"{name}-{rank}") for rank in range(NUM)] for name in names}, printed


def test_every_process_gets_all_results_in_order(scenes):
    """Of more batches than processes, of fewer, of none."""
    squares = [[batch * batch, batch % NUM] for batch in range(7)]
    assert scenes[0]["ordered"] == [{"returned": [squares, squares[:2], []]}] * NUM


@pytest.mark.parametrize(
    ("scene", "message"),
    [
        ("two_bad_batches", "batch 4 is bad"),
        ("fault_before_the_first_batch", "no space left on the disk, or in your quota, to write a file"),
        ("fault_of_the_main_one_at_its_end", "can't be written"),
        ("killed", "another process of this stage was killed, or can't be reached any more"),
    ],
)
def test_a_fault_ends_all_and_the_main_process_says_it(scenes, scene, message):
    """That of the earliest batch, as one process would say it."""
    main, *others = scenes[0][scene]
    assert main["raised"] in ("InputError", "DiskFullError")
    assert main["message"].startswith(message)
    if scene == "killed":
        assert others.pop(0) is None
    assert others == [{"raised": "SystemExit", "message": "1"}] * len(others)


def test_a_bug_is_raised_where_it_is(scenes):
    """So that its own traceback is printed, and no other."""
    ended = {"raised": "SystemExit", "message": "1"}
    assert scenes[0]["bug"] == [ended, ended, {"raised": "KeyError", "message": "2"}]


def test_the_main_process_alone_prints(scenes):
    main, *others = scenes[1]
    assert main.splitlines() == [f"{scene.__name__} in 0" for scene in SCENES]
    assert others == [""] * len(others)


@pytest.fixture(scope="module")
def places(workspace, relit, run, tmp_path_factory) -> list[Path]:
    """Scenes under prompts; and lit ones, relit by map, with all conditions cached."""
    found = []
    relit_run = relit.train(tmp_path_factory.mktemp("relit_run"))
    for name, world, trained, changes in (("plain", workspace, run, {}), ("relit", relit, relit_run, EVERYTHING_LIT)):
        place = tmp_path_factory.mktemp(name)
        for part in ("base", "dataset", "features"):
            (place / part).symlink_to(getattr(world, part))
        (place / "checkpoints").symlink_to(trained.checkpoints)
        export_model(world.make_params().export, world.base, trained.checkpoints, place / "model")
        (place / "params.yaml").write_text(yaml.safe_dump(shrunk_tree(**merged(changes, ODD))))
        found.append(place)
    return found


def test_two_processes_leave_the_same_bytes_as_one(places):
    for place in places:
        run_job(place, place / "one", ALONE)
    launcher, job = ("-m", "stages.torchrun", "--standalone", "--nproc-per-node=2"), "tests.integration.shared_job"
    done = run_python(*launcher, "-m", job, "two", *places, OMP_NUM_THREADS=torch.get_num_threads())
    assert done.returncode == 0, done.stdout
    for place in places:
        one, two = (files_of(place / name) for name in ("one", "two"))
        assert {"precompute.json", "samples/grid.png", "evaluate.json", "values.parquet", "loss.csv"} < set(one)
        assert one.keys() == two.keys()
        assert [name for name in one if one[name] != two[name]] == []


@pytest.mark.full
def test_an_image_that_only_the_second_process_sees_ends_the_stage_with_one_message(workspace, tmp_path):
    """The VAE is made to overflow for one image, the first one of the second batch."""
    vae, rows = load_vae(workspace.base), list(read_dataset(workspace.dataset, "train"))
    with torch.inference_mode():
        pixels = [square_pixels(decode_rgb(row["image"]), 64, True, 0, row["id"]) for row in rows]
        peaks = vae.encode(torch.from_numpy(np.stack(pixels))).latent_dist.mean.abs().amax(dim=(1, 2, 3))
    second, first = peaks.sort().values[-2:]
    worst, factor = int(peaks.argmax()), torch.finfo(torch.float16).max / (first * second).sqrt()
    assert worst > 0
    for weights in (vae.quant_conv.weight, vae.quant_conv.bias):
        weights.mul_(factor)
    shutil.copytree(workspace.base, tmp_path / "data" / "base")
    vae.save_pretrained(tmp_path / "data" / "base" / "vae")
    (tmp_path / "data" / "dataset").symlink_to(workspace.dataset)
    tree = shrunk_tree(train={"micro_batch_size": 2}, precompute={"batch_size": worst})
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tree))
    done = run_python("-m", "stages.precompute", cwd=tmp_path, NPROC=2, NNODES=2)
    assert done.returncode == 1
    assert done.stdout.count("error: ") == 1, done.stdout
    assert f"error: the VAE's mean isn't finite for {rows[worst]['id']} (ids in inputs.csv)" in done.stdout
    assert "Traceback" not in done.stdout
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["base", "dataset"]
    assert not (tmp_path / "metrics").exists()
