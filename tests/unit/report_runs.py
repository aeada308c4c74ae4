"""Made-up runs with all that a report shows: numbers in git, images in DVC's cache, as DVC 3 lays it out."""

import hashlib
import io
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import yaml
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from tests.conftest import ROOT
from tests.unit.test_compare import LOSS, NUM_ITEMS, PARAMS, add_experiment, files_of, git

MARKUP = "<script>alert(1)</script><b>x</b> & \"quotes\" 'too' {{ 7 * 7 }}"
PROMPTS = ("a small circle", "a large star", MARKUP)
STEPS = (5, 10, 20)


def png(shade: int, size: int = 32, prompt: str | None = None) -> bytes:
    """A bright square on a ground of this shade, 0 to 255."""
    image, file, info = Image.new("RGB", (size, size), (shade, 90, 255 - shade)), io.BytesIO(), PngInfo()
    ImageDraw.Draw(image).rectangle((size // 4, size // 4, size // 2, size // 2), (250, 240, shade))
    if prompt is not None:
        info.add_text("prompt", prompt)
    image.save(file, "PNG", pnginfo=info)
    return file.getvalue()


def noise(seed: int, size: int) -> bytes:
    """An image that nothing makes small."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def samples(shade: int, size: int = 32, noisy: bool = False) -> dict[str, bytes]:
    """`data/samples`: the base's images are the same in all runs, trained ones change more from prompt to prompt."""
    files, drawn = {}, []
    for row, text in enumerate(PROMPTS):
        for model in ("base", "trained", "last"):
            for scale in (4.0, 7.5):
                name = f"images/{row:02}-{model}-guidance{scale:g}-seed0.png"
                own = 0 if model == "base" else shade * (row + 1) + (5 if model == "last" else 0)
                files[name] = noise(zlib.crc32(f"{shade} {name}".encode()), size) if noisy else png(own, size)
                entry = {"file": name, "prompt": row, "text": text, "item": None, "light": None}
                drawn.append(entry | {"model": model, "seed": 0, "guidance_scale": scale})
    return files | {"samples.json": json.dumps({"drawn": drawn, "given": []}).encode()}


def validation(shade: int) -> dict[str, bytes]:
    """`plots/validation`."""
    return {f"{n}-x/{step}.png": png(shade + step, prompt=text) for n, text in enumerate(PROMPTS[:2]) for step in STEPS}


def evaluation(shade: int) -> dict[str, bytes]:
    """`data/evaluation`."""
    worst = [{"item": MARKUP, "text": MARKUP, "image": "worst/00.png", "loss_base": 0.4, "loss_trained": 0.3}]
    pair = {"text": MARKUP, "sample": "neighbors/00-sample.png", "train": "neighbors/00-train.png"}
    pairs = [pair | {"item": "image 3", "distance": 0.2, "ratio": 0.8}]
    neighbors = {"features": "tower", "num_samples": 9, "threshold": 0.25, "pairs": pairs}
    return {
        "worst.json": json.dumps(worst).encode(),
        "worst/00.png": png(shade + 60),
        "neighbors.json": json.dumps(neighbors).encode(),
        "neighbors/00-sample.png": png(shade + 61),
        "neighbors/00-train.png": png(shade + 62),
    }


def tables(loss: float, learns: bool = True) -> dict[str, bytes]:
    """`metrics/*.csv`, and the numbers of `evaluate`."""
    curve = [0.1, 0.05, loss / 10] if learns else [0.1, 0.2, 0.3]
    numbers = {
        LOSS: loss, "held_out_loss_base": 1.5, "held_out_loss_gain": 1.5 - loss, "held_out_loss_gain_ci_low": 0.1,
        "held_out_loss_gain_ci_high": 0.9, "num_held_out": NUM_ITEMS,
    }  # fmt: skip
    sets = {
        "mmd_rbf_shapes_base": 3.5, "mmd_rbf_shapes_trained": 2.5, "mmd_rbf_shapes_trained_ci_low": 2.0,
        "mmd_rbf_shapes_trained_ci_high": 3.0, "mmd_rbf_shapes_floor": 0.25, "mmd_rbf_shapes_gain": -1.0,
        "mmd_rbf_shapes_gain_ci_low": -1.5, "mmd_rbf_shapes_gain_ci_high": -0.5, "mmd_rbf_shapes_differs_from_real": 1,
        "clip_score_shapes_trained": 30.5, "clip_score_shapes_real": 31.5, "num_set_images": 80,
        "num_drawn_images": 160,
    }  # fmt: skip
    texts = {
        "metrics/evaluate.json": json.dumps(numbers),
        "metrics/image_sets.json": json.dumps(sets),
        "metrics/train.json": json.dumps({"num_steps": 20, "num_skipped_steps": 0, "best_step": 20}),
        "metrics/validation.csv": "step,loss_raw,loss_ema\n"
        + "".join(f"{step},{value},{value}\n" for step, value in zip((0, 10, 20), curve, strict=True)),
        "metrics/train.csv": "step,loss_smoothed,lr,grad_norm,grad_norm_clip\n10,0.2,0.001,2,1\n20,0.1,0.001,1,1\n",
        "metrics/loss_by_timestep.csv": f"timestep,base,trained\n100,0.4,{loss / 3}\n900,0.1,{loss / 30}\n",
        "metrics/train_speed.csv": "step,samples_per_sec,data_wait,peak_memory_gib,num_processes\n10,8,0.01,0.5,1\n",
        "metrics/prompt_accuracy.csv": "prompts,attribute,model,accuracy,ci_low,ci_high,num\n",
    }
    return {name: text.encode() for name, text in texts.items()}


def store(root: Path, files: dict[str, bytes]) -> str:
    """Put a folder into DVC's cache; its hash."""

    def put(content: bytes, end: str = "") -> str:
        digest = hashlib.md5(content).hexdigest() + end
        place = root / ".dvc" / "cache" / "files" / "md5" / digest[:2] / digest[2:]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
        return digest

    listed = [{"md5": put(content), "relpath": name} for name, content in sorted(files.items())]
    return put(json.dumps(listed).encode(), ".dir")


def run_files(root: Path, params: dict, loss: float, outs: dict[str, dict[str, bytes]], learns: bool = True) -> dict:
    """The files that git has of a run; its outs go to the cache."""
    files = files_of(params, loss + np.linspace(-0.3, 0.3, NUM_ITEMS), loss)
    lock = yaml.safe_load(files["dvc.lock"])
    lock["stages"]["sample"]["outs"] = [
        {"path": path, "hash": "md5", "md5": store(root, found)} for path, found in outs.items()
    ]
    return files | tables(loss, learns) | {"dvc.lock": yaml.safe_dump(lock).encode()}


def outs_of(shade: int) -> dict[str, dict[str, bytes]]:
    trained = {"fingerprint": "f1n9e7", "git_commit": "c" * 40, "device": "NVIDIA H200"}
    config = json.dumps({**trained, "identity": {"libraries": {"torch": "2.13"}}})
    return {
        "data/samples": samples(shade),
        "plots/validation": validation(shade),
        "data/evaluation": evaluation(shade),
        "data/checkpoints": {"best/training_config.json": config.encode()},
    }


def make_project(root: Path) -> None:
    """A repository in the current folder: HEAD; two experiments of another rate; `bad`, of which something is wrong."""
    git("init", "--quiet")
    (root / ".dvc" / "plots").mkdir(parents=True)
    (root / ".dvc" / "config").write_text("")
    (root / ".gitignore").write_text("/.dvc/cache\n/.dvc/tmp\nreport.html\n")
    shutil.copyfile(ROOT / ".dvc" / "plots" / "offline.html", root / ".dvc" / "plots" / "offline.html")
    for path, content in run_files(root, PARAMS, 1.0, outs_of(20)).items():
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_bytes(content)
    git("add", "-A")
    git("commit", "--quiet", "-m", "head")
    for seed in (0, 1):
        add_experiment(f"fast-{seed}", run_files(root, changed(lr=2e-3, seed=seed), 0.6, outs_of(30 + seed)))
    bad = changed(lr=9.0, note={"said": MARKUP}, caption_dropout=1.0)
    add_experiment("bad", run_files(root, bad, 2.0, outs_of(40), learns=False))


def changed(**train: object) -> dict:
    return PARAMS | {"train": PARAMS["train"] | train}
