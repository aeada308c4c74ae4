"""The model card: rendered from real files for each layout of data/model, and read back as its readers would."""

import ast
import builtins
import json
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import get_args

import pytest
from dvc.utils.hydra import apply_overrides
from dvc.utils.serialize import load_yaml  # PyYAML would read 1e-08 as a string
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode
from PIL import Image

from sdtrain import cli
from sdtrain.card import write_card
from sdtrain.ground.errors import InputError
from sdtrain.ground.markdown import code_block, code_span, one_line
from sdtrain.ground.samples import DrawnImage, Samples
from sdtrain.params.load import load_params
from sdtrain.params.schema import MethodParams

COMMIT = "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"
HUB = {"repo": "stable-diffusion-v1-5/stable-diffusion-v1-5", "revision": None, "commit": COMMIT}
PARTS = ["scheduler", "tokenizer", "text_encoder", "vae", "unet"]
LOCAL = [{"path": "data/builtin", "parts": PARTS}]
FROM_HUB = [{**HUB, "parts": PARTS}]
ASSEMBLED = [
    {**HUB, "parts": ["scheduler", "unet"]},
    {"repo": "acme/vae", "revision": "main", "commit": "b" * 40, "parts": ["vae"]},
    {"repo": "acme/text", "revision": None, "commit": "c" * 40, "parts": ["tokenizer", "text_encoder"]},
]
FROM_SCRATCH = [
    {"path": "data/builtin", "parts": PARTS[:-1]},
    {"unet_config": {"layers_per_block": 1}, "seed": 7, "parts": ["unet"]},
]
LORA = {
    "name": "lora", "rank": 16, "alpha": 8.0, "target_modules": ["to_q", "to_v"], "dropout": 0.0,
    "use_rslora": False, "use_dora": False, "init": "kaiming",
}  # fmt: skip
EXPORT = {
    "checkpoint": "best", "weights": "ema", "dtype": "fp16", "name": "sdtrain", "merged": False, "single_file": False,
}  # fmt: skip
FINGERPRINT = "0123456789ab"
CAPTIONS = ["a large red circle on a blue background", "a large green star on a gray background"]
RELIT_COLUMNS = "metric,model,value,ci_low,ci_high,num"
RELIT_VALUES = {
    "light_direction_accuracy": (0.25, 0.9, 0.28125, 1.0),
    "light_direction_error_deg": (88.0, 14.96, 90.0, 2.5),
    "albedo_error": (0.7, 0.2, 0.4567, 0.123),
    "albedo_chroma_error": (0.5, 0.1, 0.3, 0.05),
    "color_accuracy": (0.5, 0.96875, 0.75, 1.0),
    "foreground_iou": (0.4, 0.97, 1.0, 0.99),
    "linearity_error": (0.9, 0.3, 1.0, 0.21),
    "light_sensitivity": (0.05, 0.28, 0.0, 0.32),
}
RELIT_ROWS = [
    (metric, model, value, value / 2, value * 1.01, 40 if metric in ("linearity_error", "light_sensitivity") else 160)
    for metric, values in RELIT_VALUES.items()
    for model, value in zip(("base", "trained", "copy", "vae"), values, strict=True)
]
HOSTILE = (
    "a `x` ``` <b>|<img src=x> [l](u) ![i](u) *e* _e_ # h $(rm) 'q' \"d\" \\ &amp; www.a.b @me\n\n---\n```\n# heading\n"
)


class Project:
    """The inputs of the stage, fabricated in a folder; each argument replaces one part of them."""

    def __init__(self, folder: Path, make_params) -> None:
        self.folder, self.make_params = folder, make_params
        self.base, self.model, self.samples, self.out = (folder / n for n in ("base", "model", "samples", "card"))
        self.metrics, self.image_sets = folder / "evaluate.json", folder / "image_sets.json"
        self.accuracies, self.relighting = folder / "prompt_accuracy.csv", folder / "relighting.csv"

    def build(
        self, *, files: dict[str, int], sources=LOCAL, unet=(64, 128), generated=True, export=None, made=None, **changes
    ):
        """Write all inputs.

        Args:
            files: of `model`, with their sizes in MiB.
            made: changes of the params, by section, which must be sound.
            changes: of the recorded params, by section; `method` replaces it, `seed` too.
        """
        self.sources = sources
        made = made or {}
        generated = generated and made.get("dataset", {}).get("source", "generated") == "generated"
        self.params = self.make_params(**(made or ({} if generated else {"dataset": {"source": "imagefolder"}})))
        for name, mib in files.items():
            (self.model / name).parent.mkdir(parents=True, exist_ok=True)
            (self.model / name).write_bytes(b"\0" * (mib << 20))
        root = Path(__file__).resolve().parents[2]
        if "model_index.json" in files:  # as an IC-Light's export has it
            shutil.copyfile(root / "src" / "sdtrain" / "models" / "ic_light.py", self.model / "ic_light.py")
        recorded = self.params.model_dump()
        for section, value in changes.items():
            recorded[section] = value if section in ("method", "seed") else {**recorded[section], **value}
        self.config = {
            "step": 750, "num_steps": 1000, "num_train": 2000, "num_validation": 230,
            "validation_loss": {"raw": 0.04, "ema": 0.036}, "ema_step": 750,
            "fingerprint": FINGERPRINT, "identity": {"base": "…"}, "resumed_from": None,
            "params": recorded, "export": {**EXPORT, **(export or {})},
        }  # fmt: skip
        self.write(self.model / "training_config.json", self.config)
        manifest = {"format_version": 1, "sources": sources, "files": {}}
        self.write(self.base / "manifest.json", manifest)
        config = {"block_out_channels": [unet[0], 96], "cross_attention_dim": unet[1], "_class_name": "…"}
        self.write(self.base / "unet" / "config.json", config)
        self.samples.mkdir(exist_ok=True)
        self.draw_grid(self.params.sample.prompts if self.params.sample.num_held_out is None else CAPTIONS)
        numbers = json.loads((root / "metrics" / "evaluate.json").read_text())
        table = (root / "metrics" / "prompt_accuracy.csv").read_text()
        relit = generated and self.params.method.name == "ic_light"
        if not generated or relit:
            numbers = {name: value for name, value in numbers.items() if "held_out" in name or "_gap_" in name}
            table = table.splitlines()[0] + "\n"
        rows = RELIT_ROWS if relit else []
        numbers |= {f"{metric}_{model}": value for metric, model, value, *_ in rows}
        self.write(self.metrics, numbers)
        drawn = json.loads((root / "metrics" / "image_sets.json").read_text())
        self.write(self.image_sets, drawn if generated and not relit else {})  # as without an encoder
        self.accuracies.write_text(table)
        lines = [RELIT_COLUMNS, *(",".join(map(str, row)) for row in rows)]
        self.relighting.write_text("".join(f"{line}\n" for line in lines))
        return self

    def draw_grid(self, texts: list[str], *checkpoints: str) -> None:
        """As the stage `sample` saves it."""
        Image.new("RGB", (4, 4), "red").save(self.samples / "grid.png")
        drawn = [
            DrawnImage(file="…", prompt=row, text=text, item=None, light=None, model=model, seed=0, guidance_scale=4.0)
            for model in ("base", "trained", *checkpoints)
            for row, text in enumerate(texts)
        ]
        Samples(drawn=drawn, given=[]).write(self.samples)

    @staticmethod
    def write(path: Path, tree: object) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(tree))

    def card(self, **sample) -> str:
        """Write the card, and return its text."""
        write_card(
            self.params.sample.model_copy(update=sample), self.params.evaluate, self.params.seed, self.base, self.model,
            self.samples, self.metrics, self.image_sets, self.accuracies, self.relighting, self.out,
        )  # fmt: skip
        assert sorted(path.name for path in self.out.iterdir()) == ["README.md", "grid.png"]
        assert (self.out / "grid.png").read_bytes() == (self.samples / "grid.png").read_bytes()
        return (self.out / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def project(tmp_path, make_params) -> Project:
    return Project(tmp_path, make_params)


CONTROLNET = {"name": "controlnet", "start": "unet"}
PIPELINE = {"model_index.json": 0, "unet/diffusion_pytorch_model.safetensors": 3, "vae/model.safetensors": 1}
MERGED = {f"merged/{name}": size for name, size in PIPELINE.items()}
ADAPTER = {"pytorch_lora_weights.safetensors": 2, "sdtrain.safetensors": 2}
OFFSETS = {**PIPELINE, "sdtrain.safetensors": 3, "sdtrain-original.safetensors": 3}
IC_LIGHT = {
    "name": "ic_light", "variant": "fc", "light": "words", "light_size": None, "num_light_tokens": None,
    "consistency_weight": 0.0, "phi": None, "consistency_latents": None,
}  # fmt: skip
MAP = {"light": "map", "light_size": [1, 5], "num_light_tokens": 3}
RELEASED = [{**HUB, "parts": PARTS}, {"path": "models/iclight_sd15_fc.safetensors", "parts": ["unet_offset"]}]


def ic_light(*, lit=True, **method) -> dict:
    """The project of an IC-Light with these settings, of generated scenes or of one's own images."""
    method = {**IC_LIGHT, **method}
    seen = ["foreground", *(["background"] if method["variant"] == "fbc" else [])]
    seen += ["light"] if method["light"] == "map" else []
    columns = {name: name if lit else f"{name}/*.{'npy' if name == 'light' else 'png'}" for name in seen}
    world = {"world": "lit_by_map" if method["light"] == "map" else "lit", "new_fraction": 0.0}
    dataset = {**(world if lit else {"source": "imagefolder"}), "condition_columns": columns}
    sample = {"prompts": [], "num_held_out": 2}
    return {"files": OFFSETS, "method": method, "made": {"dataset": dataset, "method": method, "sample": sample}}


CASES = {
    "finetune": {"files": PIPELINE},
    "finetune, one file": {"files": {**PIPELINE, "sdtrain.safetensors": 5}, "unet": (320, 768), "sources": FROM_HUB},
    "finetune, v": {
        "files": {**PIPELINE, "sdtrain.safetensors": 5},
        "unet": (320, 768),
        "train": {"prediction_type": "v_prediction", "zero_terminal_snr": True},
    },
    "from scratch": {"files": PIPELINE, "sources": FROM_SCRATCH},
    "own images": {"files": PIPELINE, "generated": False},
    "lora": {"files": ADAPTER, "method": LORA, "sources": FROM_HUB, "unet": (320, 768)},
    "lora, local base": {"files": ADAPTER, "method": LORA},
    "lora, base of three": {"files": ADAPTER, "method": LORA, "sources": ASSEMBLED},
    "lora, from scratch": {"files": ADAPTER, "method": LORA, "sources": FROM_SCRATCH},
    "lora, merged, one file, v": {
        "files": {**ADAPTER, **MERGED, "sdtrain-merged.safetensors": 5},
        "method": LORA,
        "sources": FROM_HUB,
        "unet": (320, 768),
        "train": {"prediction_type": "v_prediction"},
    },
    "dora": {
        "files": {**MERGED, "sdtrain-merged.safetensors": 5},
        "method": {**LORA, "use_dora": True},
        "sources": FROM_HUB,
    },
    "ic-light": ic_light(),
    "ic-light, SD 1.5, v": {
        **ic_light(lit=False),
        "unet": (320, 768),
        "sources": RELEASED,
        "train": {"prediction_type": "v_prediction"},
    },
    "ic-light, background": ic_light(variant="fbc"),
    "ic-light, map": ic_light(**MAP),
    "ic-light, all": {**ic_light(lit=False, variant="fbc", **MAP), "unet": (320, 768), "sources": RELEASED},
}


@pytest.fixture(params=CASES)
def case(request, project) -> Project:
    return project.build(**CASES[request.param])


def parse(card: str) -> tuple[dict, SyntaxTreeNode]:
    """The front matter, and the body as GitHub's and the hub's readers parse it."""
    read = ModelCard(card)
    markdown = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    return read.data.to_dict(), SyntaxTreeNode(markdown.parse(read.text))


def blocks(card: str, language: str) -> list[str]:
    return [node.content for node in parse(card)[1].walk() if node.type == "fence" and node.info == language]


def spans(card: str) -> list[str]:
    return [node.content for node in parse(card)[1].walk() if node.type == "code_inline"]


def shape(card: str) -> list[str]:
    return [node.type for node in parse(card)[1].walk()]


def flat(card: str) -> str:
    """The card on one line, to look for sentences."""
    return " ".join(card.split())


def argument(snippet: str, function: str) -> list:
    """The literal arguments, positional or by name, of the first call of a function."""
    for node in ast.walk(ast.parse(snippet)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(function):
            values = (*node.args, *(keyword.value for keyword in node.keywords))
            return [value.value for value in values if isinstance(value, ast.Constant)]
    raise AssertionError(f"{function} isn't called")


def restore_params(command: str, folder: Path) -> Path:
    """Run the card's command that writes params.yaml, in a folder."""
    command = command.replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(command, shell=True, check=True, cwd=folder)
    return folder / "params.yaml"


# Every layout


def test_every_snippet_is_python_that_compiles_and_uses_only_what_it_imports(case):
    for snippet in blocks(case.card(), "python"):
        names = {node.id for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Name)}
        bound = {
            alias.asname or alias.name for n in ast.walk(ast.parse(snippet)) if hasattr(n, "names") for alias in n.names
        }
        bound |= {
            n.id for n in ast.walk(ast.parse(snippet)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        }
        bound |= {n.arg for n in ast.walk(ast.parse(snippet)) if isinstance(n, ast.arg)}
        bound |= {n.name for n in ast.walk(ast.parse(snippet)) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        assert names <= bound | set(dir(builtins))


def test_every_shell_line_parses_and_starts_with_a_command_of_ours(case):
    lines = [line for block in blocks(case.card(), "sh") for line in block.splitlines()]
    assert {shlex.split(line)[0] for line in lines} <= {"sdtrain", "dvc", "python"}
    assert len(lines) >= 2


def test_the_card_has_one_image_one_title_and_no_html_or_link(case):
    kinds = shape(case.card())
    assert kinds.count("image") == 1
    assert not {"html_block", "html_inline", "link"} & set(kinds)
    titles = [node for node in parse(case.card())[1].walk() if node.type == "heading" and node.tag == "h1"]
    assert len(titles) == 1


def test_the_front_matter_is_of_the_hub_and_sets_no_licence(case):
    head, _ = parse(case.card())
    name = case.config["params"]["method"]["name"]
    assert head["library_name"] == "diffusers"
    assert head["pipeline_tag"] == ("image-to-image" if name == "ic_light" else "text-to-image")
    assert head["tags"] == ["stable-diffusion", "sdtrain", name, *(["relighting"] if name == "ic_light" else [])]
    assert "license" not in head


def test_the_front_matter_has_the_trained_models_metrics(case):
    """As the hub reads them: every number of the trained model, its interval's bounds not among them."""
    head, _ = parse(case.card())
    (index,) = head["model-index"]
    (result,) = index["results"]
    dataset = case.config["params"]["dataset"]
    images = one_line(dataset["repo"]) if dataset["repo"] else dataset["source"]
    assert index["name"] == case.config["export"]["name"]
    assert result["task"] == {"type": head["pipeline_tag"]}
    assert result["dataset"] == {"type": images, "name": f"held-out images ({images})"}
    numbers = json.loads(case.metrics.read_text()) | json.loads(case.image_sets.read_text())
    found = {f"{metric['type']}_trained": metric["value"] for metric in result["metrics"]}
    assert found == {name: value for name, value in numbers.items() if name.endswith("_trained")}
    assert found["held_out_loss_trained"] > 0
    assert ModelCard(case.card()).data.eval_results


def test_the_card_is_the_same_each_time(case):
    assert case.card() == case.card()


def test_the_shown_commands_restore_the_recorded_params_and_pin_the_base(case, tmp_path):
    """JSON is YAML: what the first prints is a params file that says the same, and that DVC can edit."""
    restore, run = blocks(case.card(), "sh")[-1].splitlines()
    params = restore_params(restore, tmp_path)
    assert load_yaml(params) == {**case.config["params"], "export": case.config["export"]}
    command, overrides = shlex.split(run)[:3], shlex.split(run)[4::2]
    assert command == ["dvc", "exp", "run"]
    apply_overrides(str(params), overrides)
    pinned = load_yaml(params)["base"]
    sources = [source for source in case.sources if source["parts"] != ["unet_offset"]]
    for source, key in zip(sources, ("revision", "vae_revision", "text_encoder_revision"), strict=False):
        assert pinned[key] == source.get("commit")


def test_restored_params_are_read_by_the_params_loader(project, tmp_path):
    """With floats such as 1e-08, which YAML 1.1 reads as text."""
    project.build(files=PIPELINE, train={"lr": 1e-05})
    restored = load_params(restore_params(blocks(project.card(), "sh")[-1].splitlines()[0], tmp_path))
    assert restored.train.lr == 1e-05
    assert restored.sample == project.params.sample


# What is said


def test_grid_prompts_stand_as_rows(project):
    prompts = ["first", "second", "third"]
    card = project.build(files=PIPELINE).card(prompts=prompts, images_per_prompt=3, negative_prompt="blurry")
    (rows,) = (node for node in parse(card)[1].walk() if node.type == "ordered_list")
    assert [node.content for node in rows.walk() if node.type == "code_inline"] == prompts
    assert "3 per prompt, seeds 0 to 2;" in card
    assert "negative prompt `blurry`" in card
    assert "one image per prompt, seed 0;" in project.card(images_per_prompt=1)
    assert "negative prompt" not in project.card(negative_prompt="")


@pytest.mark.parametrize(
    ("name", "shown", "sentence"),
    [
        ("finetune", "base, trained, last, best-2",
         "From left to right: the base, the trained model, the checkpoint `last` and the checkpoint `best-2`, with the "
         "same prompts and seeds: one image per prompt, seed 0;"),
        ("ic-light, SD 1.5, v", "conditions, held-out image, base, trained, last, best-2",
         "the held-out image itself, the base, the trained model, the checkpoint `last` and the checkpoint `best-2`, "
         "with the same prompts"),
        ("ic-light", "foreground, base, then truth beside trained, last and best-2 under four lights",
         "the truth beside the trained model, the checkpoint `last` and the checkpoint `best-2`. One image each"),
    ],
)  # fmt: skip
def test_checkpoints_in_the_grid_are_named(project, name, shown, sentence):
    project.build(**CASES[name]).draw_grid(CAPTIONS, "last", "best-2")
    card = project.card()
    assert f"![Grid of images: {shown}](grid.png)" in card
    assert sentence in flat(card)


def table(card: str) -> list[list[str]]:
    lines = [line for line in card.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_metrics_stand_beside_each_other_with_interval_and_n(project):
    card = project.build(files=PIPELINE).card()
    assert shape(card).count("table") == 1
    rows = table(card)
    timesteps = project.params.evaluate.num_timesteps
    assert rows[2] == ["held-out loss, lower is better", "0.1389", "0.03541", f"225 images × {timesteps} timesteps"]
    assert rows[3] == ["its gain, base − trained", "", "0.1035 (0.09084 to 0.1162)", "225 images"]
    assert rows[4] == ["held-out loss without captions", "0.1123", "0.05935", "225 images"]
    gap = ["its rise with another image's caption", "0.1061", "0.1399 (0.1316 to 0.1485)", "225 images"]
    assert rows[9] == gap
    assert rows[6] == ["loss of as many training images", "0.1299", "0.0336", "225 images"]
    assert rows[10] == ["color, new concepts", "0.0 % (0.0 % to 3.8 %)", "95.8 % (89.8 % to 98.4 %)", "96"]
    assert len(rows) == 2 + 8 + 12 + 10
    assert "don't show that training helped" not in card


def test_drawn_images_stand_beside_what_real_ones_get(project):
    card = project.build(files=PIPELINE).card()
    rows = table(card)[-10:]
    assert rows[0] == [
        "CLIPScore, higher is better; real images 79.28", "59.15", "77.21 (76.47 to 77.93)", "320 images",
    ]  # fmt: skip
    assert rows[3] == [
        "Fréchet distance, lower is better; real images 1.401 (1.053 to 1.749)", "2.943", "1.508 (1.151 to 1.865)",
        "160 images",
    ]  # fmt: skip
    assert rows[-1][0] == "share of near copies of training images, about 0.05 by chance"
    assert "judged by the image encoder builtin_clip; what another says, or of other images, can't be compared." in card
    assert "What real images get in the trained model's place stands in the first column" in card


def test_only_what_was_measured_of_drawn_images_is_said(project):
    """A few images, judged by an encoder that is no CLIP; then no encoder at all."""
    project.build(files=PIPELINE)
    num_rows = len(table(project.card())) - 10
    share = {"base": 0.1, "trained": 0.2, "trained_ci_low": 0.15, "trained_ci_high": 0.25}
    drawn = {f"near_copy_share_dinov2_small_{name}": value for name, value in share.items()}
    project.write(project.image_sets, {"num_drawn_images": 60, **drawn})
    card = project.card()
    label = "share of near copies of training images, about 0.05 by chance"
    assert table(card)[num_rows:] == [[label, "0.1", "0.2 (0.15 to 0.25)", "60 images"]]
    assert "by the image encoder dinov2_small;" in card
    assert "What real images get" not in card
    project.write(project.image_sets, {})
    card = project.card()
    assert len(table(card)) == num_rows
    assert "image encoder" not in card


@pytest.mark.parametrize(
    "left_out", ["clip_score_builtin_clip_base", "mind_builtin_clip_floor_ci_low", "num_set_images", "num_drawn_images"]
)
def test_half_of_what_an_encoder_said_is_an_error(project, left_out):
    numbers = json.loads(project.build(files=PIPELINE).image_sets.read_text())
    del numbers[left_out]
    project.write(project.image_sets, numbers)
    with pytest.raises(InputError, match=rf"image_sets\.json: has \w+_trained and no {left_out}; run `dvc repro eval"):
        project.card()


@pytest.mark.parametrize("name", ["ic-light", "ic-light, map"])
def test_relighting_is_measured_in_words_with_units_interval_and_n(project, name):
    card = project.build(**CASES[name]).card()
    assert table(card)[8:] == [
        ["direction of the light, right within 45°", "25.0 % (12.5 % to 25.2 %)", "90.0 % (45.0 % to 90.9 %)", "160"],
        ["error of this direction, lower is better", "88.0° (44.0° to 88.9°)", "15.0° (7.5° to 15.1°)", "160"],
        ["relative error of the object's albedo, lower is better", "0.7 (0.35 to 0.707)", "0.2 (0.1 to 0.202)", "160"],
        ["the same at the best exposure, lower is better", "0.5 (0.25 to 0.505)", "0.1 (0.05 to 0.101)", "160"],
        ["object has its named colour", "50.0 % (25.0 % to 50.5 %)", "96.9 % (48.4 % to 97.8 %)", "160"],
        ["object is where it should be, intersection over union", "40.0 % (20.0 % to 40.4 %)",
         "97.0 % (48.5 % to 98.0 %)", "160"],
        ["error of adding two lights up, lower is better", "0.9 (0.45 to 0.909)", "0.3 (0.15 to 0.303)", "40"],
        ["difference between these two lights", "0.05 (0.025 to 0.0505)", "0.28 (0.14 to 0.283)", "40"],
    ]  # fmt: skip
    assert "what their prompt says" not in card


def test_relighting_stands_beside_what_a_copy_and_the_vae_have(project):
    """And linearity beside sensitivity, without which a model that ignores light would look as if it added up."""
    card = flat(project.build(**CASES["ic-light"]).card())
    assert (
        "a copy of the foreground as it is given has the direction right in 28.1 %, an albedo error of 0.457, and in "
        "adding up an error of 1 at a difference of 0; the truth, encoded and decoded by the VAE, which no model that "
        "draws through this VAE can be expected to beat, has the direction right in 100.0 %, an albedo error of 0.123, "
        "and in adding up an error of 0.21 at a difference of 0.32."
    ) in card
    assert "read the error together with the difference: a model that ignores the light has 1 and 0." in card
    steps, scale = project.params.evaluate.num_inference_steps, project.params.evaluate.guidance_scale
    assert f"in no data set ({steps} steps, guidance scale {scale:g}); lights are added up" in card


@pytest.mark.parametrize("left_out", ["light_sensitivity_trained", "linearity_error_vae", "albedo_error_copy"])
def test_a_relighting_metric_stands_with_all_others_or_not_at_all(project, left_out):
    numbers = json.loads(project.build(**CASES["ic-light"]).metrics.read_text())
    del numbers[left_out]
    project.write(project.metrics, numbers)
    with pytest.raises(InputError, match=rf"evaluate\.json: has no {left_out}; run `dvc repro evaluate`"):
        project.card()


def test_own_images_are_not_measured_for_relighting(project):
    card = project.build(**CASES["ic-light, all"]).card()
    assert len(table(card)) == 8
    assert "VAE, which" not in card


def test_own_images_have_the_held_out_loss_alone(project):
    card = project.build(files=PIPELINE, generated=False).card()
    assert len(table(card)) == 8
    assert "prompt says" not in card
    assert "2,000 captioned images (source `imagefolder`), 64 px" in card


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dataset": {"test_fraction": 0.1}, "validation": {"max_samples": 96}},
         "It was measured on 225 test images; the checkpoint was chosen on 96 others."),
        ({"dataset": {"test_fraction": 0.1}, "validation": {"max_samples": 5000}},
         "It was measured on 225 test images; the checkpoint was chosen on 230 others."),
        ({"dataset": {"test_fraction": 0.1}, "export": {"checkpoint": "last"}}, "It was measured on 225 test images."),
        ({"validation": {"max_samples": 96}},
         "The checkpoint was chosen on 96 of these 225 images, which favours it a little."),
        ({"validation": {"max_samples": 5000}},
         "The checkpoint was chosen on 225 of these 225 images, which favours it a little."),
    ],
)  # fmt: skip
def test_the_card_says_if_the_checkpoint_was_chosen_on_the_images_of_its_loss(project, changes, sentence):
    noise = "at fixed timesteps and with fixed noise."
    assert f"{noise} {sentence} Its rise" in flat(project.build(files=PIPELINE, **changes).card())


def test_the_last_checkpoint_was_not_chosen(project):
    assert "chosen on" not in project.build(files=PIPELINE, export={"checkpoint": "last"}).card()


def test_a_gain_that_may_be_none_is_called_so(project):
    project.build(files=PIPELINE, generated=False)
    numbers = json.loads(project.metrics.read_text())
    project.write(project.metrics, {**numbers, "held_out_loss_gain_ci_low": -0.01})
    assert "don't show that training helped" in project.card()


def test_a_metric_of_a_later_version_is_shown(project):
    project.build(files=PIPELINE, generated=False)
    numbers = json.loads(project.metrics.read_text())
    project.write(project.metrics, {**numbers, "clip_score_base": 20.0, "clip_score_trained": 25.5})
    assert table(project.card())[-1] == ["clip score", "20", "25.5", ""]


def test_training_is_described(project):
    train = {
        "lr": 1e-4, "lr_scaling": "sqrt", "lr_reference_batch_size": 2, "batch_size": 8, "lr_warmup_steps": 50,
        "snr_gamma": 5.0, "noise_offset": 0.05, "input_perturbation": 0.1, "caption_dropout": 0.1,
    }  # fmt: skip
    dataset = {"source": "hub", "repo": "acme/pictures", "revision": "v1"}
    project.build(files=ADAPTER, method=LORA, train=train, dataset=dataset, sources=FROM_HUB, seed=3)
    project.config["resumed_from"] = {"run": "ffff", "step": 500, "kind": "state", "differences": "x"}
    project.write(project.model / "training_config.json", project.config)
    card = project.card()
    assert '- method: `lora`, `rank` `16`, `alpha` `8.0`, `target_modules` `["to_q", "to_v"]`' in card
    assert "- steps: 750 of 1,000, the best by held-out loss, 3.0 passes over the images" in card
    assert "- weights: moving average (EMA), exported as `fp16`" in card
    assert "- images: 2,000 captioned images of `acme/pictures`, revision `v1`, 64 px" in card
    assert "- effective batch: 8" in card
    assert "- learning rate: 0.0002, `cosine` after 50 steps of warm-up; `adamw`, `fp32`" in card
    assert (
        "- objective: prediction type `epsilon`, min-SNR γ 5, noise offset 0.05, input perturbation 0.1, 10 % of the "
        "captions dropped"
    ) in card
    assert "- seed: 0, of the data 3" in card
    assert "- branched from step 500 of run `ffff`" in card
    assert f"This is run `{FINGERPRINT}` of sdtrain" in card
    assert parse(card)[0]["datasets"] == ["acme/pictures"]


@pytest.mark.parametrize(
    ("name", "title", "sentence"),
    [
        ("finetune", "# Fine-tuned Stable Diffusion: `sdtrain`", "All weights of the UNet were fine-tuned."),
        ("from scratch", "# Stable Diffusion, its UNet trained from scratch: `sdtrain`", "A UNet was trained from"),
        ("lora", "# LoRA for Stable Diffusion: `sdtrain`", "A LoRA (low-rank adapter) of the UNet was trained."),
        ("dora", "# Stable Diffusion with a merged DoRA: `sdtrain`", "A DoRA (weight-decomposed low-rank adapter)"),
        ("ic-light", "# IC-Light for Stable Diffusion: `sdtrain`",
         "with all its weights, that sees a foreground and draws the foreground's object under another light, told by "
         "the prompt's first words. VAE and text encoder are the base's."),
        ("ic-light, all", "# IC-Light for Stable Diffusion: `sdtrain`",
         "sees a foreground and a background and draws the foreground's object under another light, told by an "
         "environment map beside the prompt. The training started from the weights of another IC-Light. VAE"),
    ],
)  # fmt: skip
def test_each_method_has_its_words(project, name, title, sentence):
    card = project.build(**CASES[name]).card()
    assert title in card.splitlines()
    assert sentence in card


@pytest.mark.parametrize(
    ("name", "relation"),
    [("finetune, one file", "finetune"), ("lora", "adapter"), ("dora", "finetune"), ("ic-light, all", "finetune")],
)
def test_a_base_from_the_hub_is_named(project, name, relation):
    card = project.build(**CASES[name]).card()
    head, _ = parse(card)
    assert head["base_model"] == HUB["repo"]
    assert head.get("base_model_relation") == relation
    assert f"`{HUB['repo']}` at commit `{COMMIT}`" in card
    assert f"dvc exp run -S base.revision={COMMIT}" in card


@pytest.mark.parametrize("name", ["finetune", "from scratch", "lora, local base"])
def test_a_base_of_ones_own_is_none_of_the_hub(project, name):
    card = project.build(**CASES[name]).card()
    assert not {"base_model", "base_model_relation"} & set(parse(card)[0])
    assert "local folder `data/builtin`" in card
    assert ("`unet`: random weights, seed 7" in card) == (name == "from scratch")
    assert blocks(card, "sh")[-1].splitlines()[-1] == "dvc exp run"


def test_every_source_of_the_base_is_pinned(project):
    command = blocks(project.build(**CASES["lora, base of three"]).card(), "sh")[-1].splitlines()[-1]
    assert shlex.split(command)[3:] == [
        "-S", f"base.revision={COMMIT}", "-S", f"base.vae_revision={'b' * 40}",
        "-S", f"base.text_encoder_revision={'c' * 40}",
    ]  # fmt: skip


# How to use it


def test_a_pipeline_is_loaded_from_its_folder(project):
    (snippet,) = blocks(project.build(**CASES["finetune"]).card(), "python")
    assert argument(snippet, "StableDiffusionPipeline.from_pretrained") == [project.model.as_posix()]


def test_sizes_are_of_the_files(project):
    card = project.build(**CASES["lora, merged, one file, v"]).card()
    for part in (
        "(`pytorch_lora_weights.safetensors`, 2.0 MiB)", "merged into it (4.0 MiB)",
        "`sdtrain.safetensors` (2.0 MiB)", "`sdtrain-merged.safetensors` (5.0 MiB)",
    ):  # fmt: skip
        assert part in card
    shutil.rmtree(project.model)
    files = {**PIPELINE, **MERGED, "merged/unet/more.safetensors": 3}
    card = project.build(files=files).card()
    assert "the whole model (4.0 MiB)" in card
    assert "merged into it (7.0 MiB)" in card


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("lora", [HUB["repo"], COMMIT]),
        ("lora, local base", ["data/builtin"]),
        ("lora, base of three", None),
        ("lora, from scratch", None),
    ],
)
def test_a_lora_is_loaded_on_the_base_it_was_trained_on(project, name, base):
    """A base from several sources is complete in the project's folder only."""
    (snippet,) = blocks(project.build(**CASES[name]).card(), "python")
    assert argument(snippet, "from_pretrained") == (base or [project.base.as_posix()])
    assert argument(snippet, "load_lora_weights") == [project.model.as_posix(), "pytorch_lora_weights.safetensors"]
    assert "height=64, width=64," in snippet


def test_what_a_lora_cannot_carry_is_set_on_the_scheduler(project):
    train = {"prediction_type": "v_prediction", "zero_terminal_snr": True}
    (snippet,) = blocks(project.build(files=ADAPTER, method=LORA, train=train).card(), "python")
    call = next(node for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call) and len(node.keywords) == 3)
    assert {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords} == {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }


def test_the_pipelines_snippet_draws_from_fp16_files(project, root, monkeypatch, tmp_path):
    """The built-in base's: stock loading leaves text encoder and UNet in different formats."""
    shutil.copytree(root / "data" / "builtin", project.model)
    (snippet,) = blocks(project.build(files={}).card(num_inference_steps=2), "python")
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    assert Image.open("image.png").size == (64, 64)


def test_the_loras_snippet_draws(project, root, monkeypatch, tmp_path):
    peft = pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    base = root / "data" / "builtin"
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = peft.get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(project.model, unet_lora_layers=layers)
    train = {"prediction_type": "v_prediction", "zero_terminal_snr": True}
    project.build(files={}, method=LORA, sources=[{"path": str(base), "parts": PARTS}], train=train)
    (snippet,) = blocks(project.card(num_inference_steps=2), "python")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(snippet, names)
    assert Image.open("image.png").size == (64, 64)
    assert names["pipeline"].get_active_adapters() == ["default_0"]
    config = names["pipeline"].scheduler.config
    assert (config.prediction_type, config.rescale_betas_zero_snr) == ("v_prediction", True)


def test_instructions_are_for_the_files_that_are_there(project):
    for name, expected in {
        "finetune": [],
        "finetune, one file": ["models/checkpoints/", "models/Stable-diffusion/"],
        "lora": ["models/loras/", "models/Lora/", "<lora:sdtrain:1>"],
        "dora": ["models/checkpoints/", "models/Stable-diffusion/"],
    }.items():
        shutil.rmtree(project.model, ignore_errors=True)
        card = project.build(**CASES[name]).card()
        places = (
            "models/checkpoints/",
            "models/Stable-diffusion/",
            "models/loras/",
            "models/Lora/",
            "<lora:sdtrain:1>",
        )
        assert [place for place in places if place in spans(card)] == expected, name


def test_merged_and_adapter_are_told_apart(project):
    card = project.build(**CASES["lora, merged, one file, v"]).card()
    adapter, merged = (next(line for line in card.splitlines() if line.startswith(f"- `{n}`"))
                       for n in ("sdtrain.safetensors", "sdtrain-merged.safetensors"))  # fmt: skip
    assert "models/loras/" in adapter
    assert "models/checkpoints/" in merged
    folders = [argument(snippet, "from_pretrained")[0] for snippet in blocks(card, "python")]
    assert folders == [HUB["repo"], f"{project.model.as_posix()}/merged"]


def test_dora_is_loaded_merged(project):
    card = project.build(**CASES["dora"]).card()
    (snippet,) = blocks(card, "python")
    assert argument(snippet, "from_pretrained") == [f"{project.model.as_posix()}/merged"]
    assert "load_lora_weights" not in card


def test_v_prediction_says_what_to_set_elsewhere(project):
    card = flat(project.build(**CASES["finetune, v"]).card())
    assert "ModelSamplingDiscrete before the sampler, with sampling `v_prediction` and zsnr `true`" in card
    assert "under `params` of `model`, and put it beside the model, as `sdtrain.yaml`; in its settings" in card
    assert "“Noise schedule for sampling” to “Zero Terminal SNR”" in card
    shutil.rmtree(project.model)
    card = flat(project.build(**CASES["lora, merged, one file, v"]).card())
    assert "zsnr `false`" in card
    assert "beside the base's checkpoint (with its name) and beside the model, as `sdtrain-merged.yaml`." in card
    assert "Zero Terminal SNR" not in card
    shutil.rmtree(project.model)
    assert "ModelSamplingDiscrete" not in project.build(**CASES["lora"]).card()


def test_params_that_changed_after_the_training_are_not_passed_for_the_records(project):
    note = "above were made with params that were changed after the training"
    assert note not in project.build(files=PIPELINE).card()
    assert f"The grid {note}" in project.card(prompts=["another"])
    project.build(files=PIPELINE, evaluate={"num_timesteps": 3}, sample={"guidance_scales": [2.0]})
    assert f"The grid and metrics {note}" in project.card()


def test_sizes_that_other_programs_do_not_know_are_named(project):
    files = {**PIPELINE, "sdtrain.safetensors": 5}
    assert "This UNet has 64 and 128: don't expect them to load it." in project.build(files=files).card()
    assert "don't expect" not in project.build(files=files, unet=(320, 768)).card()


@pytest.mark.parametrize("prompt", ["a cat", "-a 'cat'", "-cat", "--out", HOSTILE, '$(reboot) `reboot` "$HOME"'])
def test_the_command_draws_the_first_prompt(project, monkeypatch, prompt):
    card = project.build(files=PIPELINE).card(prompts=[prompt], negative_prompt=prompt, guidance_scales=[4.5, 2.0])
    given = []
    monkeypatch.setattr("sdtrain.cli.generate._generate", given.append)
    (command, *rest), _ = (shlex.split(block) for block in blocks(card, "sh"))
    assert command == "sdtrain"
    cli.main(rest)
    (options,) = given
    assert (options.prompt, options.negative_prompt) == ([one_line(prompt)], one_line(prompt))
    assert options.model == project.model
    assert (options.steps, options.guidance_scale) == (project.params.sample.num_inference_steps, 4.5)


# Text from outside


def test_hostile_text_everywhere_changes_no_structure(project):
    """Prompts, paths, repositories and the method's settings, all at once."""

    def build(text: str) -> str:
        shutil.rmtree(project.model, ignore_errors=True)
        sources = [
            {"repo": text, "revision": None, "commit": text, "parts": ["unet", text]},
            {"path": text, "parts": ["vae"]},
        ]
        project.build(
            files={**ADAPTER, "sdtrain-merged.safetensors": 1},
            sources=sources,
            method={**LORA, "target_modules": [text]},
            dataset={"source": "hub", "repo": "acme/images", "revision": text},
            unet=(320, 768),
        )
        project.config["params"]["train"]["prediction_type"] = "v_prediction"
        project.config["fingerprint"] = text
        project.config["resumed_from"] = {"run": text, "step": 1}
        project.write(project.model / "training_config.json", project.config)
        return project.card(prompts=[text, text], negative_prompt=text)

    tame, hostile = build("§"), build(HOSTILE)
    assert shape(hostile) == shape(tame)
    plain = [[node.content for node in parse(card)[1].walk() if node.type == "text"] for card in (tame, hostile)]
    assert plain[0] == plain[1]
    assert len([span for span in spans(tame) if "§" in span]) == 11
    setting = json.dumps([HOSTILE], ensure_ascii=False)
    for before, after in zip(spans(tame), spans(hostile), strict=True):
        assert after == one_line(setting if before == '["§"]' else before.replace("§", HOSTILE))
    head, _ = parse(hostile)
    assert head["base_model"] == one_line(HOSTILE)
    (snippet,) = blocks(hostile, "python")
    assert argument(snippet, "pipeline")[:2] == [HOSTILE, HOSTILE]
    ours, restore = blocks(hostile, "sh")
    assert one_line(HOSTILE) in shlex.split(ours)
    assert f"base.revision={HOSTILE}" in shlex.split(restore)


TEXTS = st.text(
    st.one_of(
        st.sampled_from(list("`~*_[]()<>!#|\\$&@:-+=\"' \t\n\r\x00\x0b\x85\u2028\u202e\ud800ab")), st.characters()
    )
)


def encodable(text: str) -> str:
    """Without lone surrogates: a manifest is UTF-8."""
    return text.encode("utf-8", "replace").decode()


def in_markdown(markdown: str) -> list:
    return list(SyntaxTreeNode(MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown)).walk())


@given(TEXTS)
@example("")
@example(" ")
@example("`")
@example("``` x ```")
@example(" a ")
@example("a\r\n\r\n# b")
def test_a_code_span_shows_its_text_verbatim(text):
    for place in ("{}", "- {}", "1. {}", "a {}, b", "# {}", "> {}"):
        nodes = in_markdown(place.format(code_span(text)))
        shown = [node.content for node in nodes if node.type == "code_inline"]
        assert shown == ([one_line(text)] if one_line(text) else [])
        allowed = {"root", "paragraph", "inline", "text", "code_inline", "bullet_list", "ordered_list", "list_item",
                   "heading", "blockquote"}  # fmt: skip
        assert {node.type for node in nodes} <= allowed
        assert [node.type for node in nodes].count("heading") == place.startswith("#")
    code_span(text).encode()


@given(TEXTS)
def test_one_line_keeps_what_can_be_shown(text):
    assert len(one_line(text).splitlines()) <= 1
    assert one_line(one_line(text)) == one_line(text)
    if text.isprintable():
        assert one_line(text) == text


@given(TEXTS.map(lambda text: text.replace("\r", "\n").replace("\x00", "")))
@example("```\n# heading")
@example("~~~\n````\n```")
def test_a_code_block_shows_its_code_verbatim(code):
    nodes = in_markdown(f"{code_block('sh', code)}\n\nafter")
    assert [node.type for node in nodes] == ["root", "fence", "paragraph", "inline", "text"]
    assert nodes[1].content == f"{code}\n"


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(prompt="a", name="\x85")
@given(prompt=TEXTS.filter(bool), name=TEXTS.filter(bool).map(encodable))
def test_any_prompt_and_repository_keep_the_cards_structure(project, prompt, name):
    if not project.model.exists():
        project.build(files={"pytorch_lora_weights.safetensors": 0}, method=LORA)

    def build(prompt: str, name: str) -> str:
        sources = [{"repo": name, "commit": COMMIT, "parts": PARTS}]
        project.write(project.base / "manifest.json", {"format_version": 1, "sources": sources, "files": {}})
        return project.card(prompts=[prompt], negative_prompt=prompt)

    tame, wild = build("x", "x"), build(prompt, name)
    empty = not one_line(prompt) or not one_line(name)
    assert empty or shape(wild) == shape(tame)
    (snippet,) = blocks(wild, "python")
    assert argument(snippet, "pipeline")[:2] == [prompt, prompt]
    assert argument(snippet, "from_pretrained") == [name, COMMIT]
    assert parse(wild)[0].get("base_model") == one_line(name)
    command = shlex.split(blocks(wild, "sh")[0])
    assert command[:4] == ["sdtrain", "generate", "--model", project.model.as_posix()]
    assert one_line(prompt) in command or f"--prompt={one_line(prompt)}" in command


# Bad input


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda p: (p.model / "training_config.json").unlink(),
         r"model/training_config\.json: no such file; run `dvc repro export`"),
        (lambda p: (p.model / "training_config.json").write_text("{"),
         r"model/training_config\.json: not valid JSON: .*; run `dvc repro export`"),
        (lambda p: p.write(p.model / "training_config.json", {**p.config, "step": "many"}),
         r"model/training_config\.json: step: .*; run `dvc repro export`"),
        (lambda p: p.write(p.model / "training_config.json", {**p.config, "params": {"seed": 0}}),
         r"model/training_config\.json: params\.base: Field required; run `dvc repro export`"),
        (lambda p: (p.model / "model_index.json").unlink(),
         r"model: has no model_index\.json, pytorch_lora_weights\.safetensors, diffusion_pytorch_model\.safetensors or "
         r"merged/; run `dvc repro export`"),
        (lambda p: p.metrics.unlink(), r"evaluate\.json: no such file; run `dvc repro evaluate`"),
        (lambda p: p.metrics.write_text("[]"), r"evaluate\.json: Input should be .*dict.*; run `dvc repro evaluate`"),
        (lambda p: p.metrics.write_text("{"), r"evaluate\.json: not valid JSON.*; run `dvc repro evaluate`"),
        (lambda p: p.metrics.write_text('{"held_out_loss_base": NaN}'),
         r"evaluate\.json: held_out_loss_base: .*finite.*; run `dvc repro evaluate`"),
        (lambda p: p.write(p.metrics, {"a | b": 1.0}), r"evaluate\.json: a \| b.*; run `dvc repro evaluate`"),
        (lambda p: p.write(p.metrics, {}),
         r"evaluate\.json: has no held_out_loss_base; run `dvc repro evaluate`"),
        (lambda p: p.accuracies.unlink(),
         r"prompt_accuracy\.csv: can't be read: No such file.*; run `dvc repro evaluate`"),
        (lambda p: p.accuracies.write_text("prompts,attribute\nnew,color\n"),
         r"prompt_accuracy\.csv: 0\.model: .*; run `dvc repro evaluate`"),
        (lambda p: p.accuracies.write_bytes(b"\xff\xfe"), r"prompt_accuracy\.csv: not a CSV file.*dvc repro evaluate`"),
        (lambda p: p.accuracies.write_text("prompts,attribute,model,accuracy,ci_low,ci_high,num\n"),
         r"evaluate\.json: has new_color_accuracy_base, which the table of accuracies hasn't; run `dvc repro"),
        (lambda p: p.relighting.unlink(),
         r"relighting\.csv: can't be read: No such file.*; run `dvc repro evaluate`"),
        (lambda p: p.relighting.write_text("metric,model\nalbedo_error,base\n"),
         r"relighting\.csv: 0\.ci_low: .*; run `dvc repro evaluate`"),
        (lambda p: p.relighting.write_text(f"{RELIT_COLUMNS}\nalbedo_error,base,0.1,0.1,nan,5\n"),
         r"relighting\.csv: 0\.ci_high: .*finite.*; run `dvc repro evaluate`"),
        (lambda p: p.relighting.write_text(f"{RELIT_COLUMNS}\nalbedo_error,base,0.1,0.1,0.2,5\n"),
         r"evaluate\.json: has no light_direction_accuracy_base; run `dvc repro evaluate`"),
        (lambda p: p.write(p.metrics, json.loads(p.metrics.read_text())
                           | {f"{name}_{model}": 0.5 for name in RELIT_VALUES
                              for model in ("base", "trained", "copy", "vae")}),
         r"evaluate\.json: has light_direction_accuracy_base, which the table of relighting hasn't; run `dvc repro"),
        (lambda p: (p.samples / "grid.png").unlink(),
         r"samples/grid\.png: can't be read: No such file or directory; run `dvc repro sample`"),
        (lambda p: (p.samples / "grid.png").write_text("GIF"), r"grid\.png: not a PNG image; run `dvc repro sample`"),
        (lambda p: (p.samples / "samples.json").unlink(), r"samples\.json: no such file; run `dvc repro sample`"),
        (lambda p: shutil.rmtree(p.base), r"base has no manifest\.json; run `dvc repro base`"),
        (lambda p: p.write(p.base / "manifest.json", {"format_version": 1, "sources": [{"parts": []}], "files": {}}),
         r"base/manifest\.json: 0: .*must have repo and commit, or path, or seed; run `dvc repro base`"),
        (lambda p: (p.base / "unet" / "config.json").unlink(),
         r"unet/config\.json: no such file; run `dvc repro base`"),
    ],
)  # fmt: skip
def test_bad_input_names_the_file_and_the_stage_and_leaves_the_old_card(project, break_it, message):
    project.build(files=PIPELINE).card()
    before = {path.name: path.read_bytes() for path in project.out.iterdir()}
    break_it(project)
    with pytest.raises(InputError, match=message):
        project.card()
    assert {path.name: path.read_bytes() for path in project.out.iterdir()} == before
    assert not list(project.folder.glob("*.partial"))


def test_the_stage_starts_without_torch():
    code = "import sys, stages.card; sys.exit(bool({'torch', 'diffusers', 'datasets', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2]).returncode == 0


def test_shipped_params_make_a_card(project, root):
    """Of every recipe that is shipped, too."""
    for path in (root / "params.yaml", *sorted((root / "recipes").glob("*.yaml"))):
        shutil.rmtree(project.model, ignore_errors=True)
        project.build(files=PIPELINE)
        project.params = load_params(path)
        project.config["params"] = project.params.model_dump()
        project.write(project.model / "training_config.json", project.config)
        rows = project.params.sample.prompts or ["what the grid says", "of its rows"]
        project.draw_grid(rows)
        card = project.card()
        assert [row for row in rows if row in spans(card)] == rows


def test_every_method_has_its_words(project):
    for section in get_args(get_args(MethodParams)[0]):
        (name,) = get_args(section.model_fields["name"].annotation)
        methods = {"lora": LORA, "controlnet": CONTROLNET, "ic_light": IC_LIGHT}
        project.build(files=PIPELINE, method=methods.get(name, {"name": name}))
        assert project.card()


def test_a_controlnet_is_loaded_with_its_base_and_a_hint(project):
    files = {"diffusion_pytorch_model.safetensors": 3, "sdtrain.safetensors": 3}
    project.build(files=files, method=CONTROLNET)
    project.params = project.make_params(
        method=CONTROLNET,
        dataset={"condition_columns": {"hint": "outline"}},
        sample={"prompts": [], "num_held_out": 2},
    )
    project.draw_grid(["an old house", "a tree"])
    card = project.card()
    assert "ControlNetModel.from_pretrained" in card
    assert "StableDiffusionControlNetPipeline.from_pretrained(" in card
    assert "image=load_image('hint.png')," in card
    assert "'an old house'," in card
    assert "--hint hint.png" in card
    assert "`models/controlnet/`" in card
    assert "of which the base sees the captions alone" in card
    assert [row for row in ("an old house", "a tree") if row in spans(card)] == ["an old house", "a tree"]


# IC-Light


@pytest.mark.parametrize(
    ("name", "columns", "sentences"),
    [
        ("ic-light", "foreground, base, then truth beside trained under four lights", [
            "The trained model sees the foreground, under another light. The base sees the prompts alone.",
            "told by a prompt's first words, such as `left light`, which the rows leave out. From left to right: the "
            "foreground; the base under light from the left; then for light from the left, right, top and bottom the "
            "truth beside the trained model. One image each, seed 0 in the first row and one more in each row below; "
            "DPM-Solver++, 2 steps",
        ]),
        ("ic-light, background", "foreground, base, then truth beside trained under four lights",
         ["under another light, and the background under the light to draw, which isn't shown."]),
        ("ic-light, map", "foreground, base, then truth beside trained under four lights",
         ["The base sees the prompts alone. The light is told by a map. From left"]),
        ("ic-light, SD 1.5, v", "conditions, held-out image, base, trained", [
            "The trained model sees the foreground. The base is the IC-Light that the training started from: it sees "
            "the foreground. From left to right: the conditions, the held-out image itself, the base, and the trained "
            "model, with the same prompts and seeds: one image per prompt, seed 0;",
        ]),
        ("ic-light, all", "conditions, held-out image, base, trained", [
            "sees the foreground, the background and a light map. The base is the IC-Light that the training started "
            "from: it sees the foreground and the background, but no light map.",
        ]),
    ],
)  # fmt: skip
def test_a_grid_of_relit_images_is_described(project, name, columns, sentences):
    card = project.build(**CASES[name]).card()
    assert f"![Grid of images: {columns}](grid.png)" in card
    assert [sentence for sentence in sentences if sentence not in flat(card)] == []
    (rows,) = (node for node in parse(card)[1].walk() if node.type == "ordered_list")
    assert [node.content for node in rows.walk() if node.type == "code_inline"] == CAPTIONS


def test_lit_scenes_are_called_so(project):
    card = project.build(**CASES["ic-light"]).card()
    assert "- images: 2,000 generated images of coloured domes, each dome under two of eight lights, 64 px" in card


def test_the_pipeline_that_diffusers_lacks_is_in_the_card(project):
    card = project.build(**CASES["ic-light"]).card()
    nodes = list(parse(card)[1].children)
    (place,) = (n for n, node in enumerate(nodes) if node.type == "paragraph"
                and node.children[0].content.startswith("`ic_light.py`, a file of sdtrain"))  # fmt: skip
    assert nodes[place + 1].content == (project.model / "ic_light.py").read_text()
    assert "from ic_light import IcLightPipeline" in blocks(card, "python")[0]
    (project.model / "ic_light.py").unlink()
    with pytest.raises(InputError, match=r"ic_light.py: can't be read: .*; run `dvc repro export`"):
        project.card()


@pytest.mark.parametrize("method", [{}, {"variant": "fbc", **MAP}], ids=["foreground and words", "all"])
def test_the_snippet_draws_with_the_file_in_the_card(project, root, monkeypatch, tmp_path, method):
    """The image that sdtrain draws of the same files."""
    import numpy as np
    import torch

    from sdtrain.data.conditions import read_condition
    from sdtrain.models import ic_light as model
    from sdtrain.models.parts import load_parts
    from sdtrain.models.pipelines import build_ic_light_pipeline, generate

    parts, seen = load_parts(root / "data" / "builtin"), ["foreground"]
    torch.manual_seed(0)
    if method:
        seen += ["background", "light"]
        encoder = model.LightEncoder((1, 5), 3, parts.unet.config.cross_attention_dim)
        torch.nn.init.normal_(encoder.layers[-1].weight)
        parts.others["light_encoder"] = encoder
    model.widen_conv_in(parts.unet, 12 if method else 8)
    torch.nn.init.normal_(parts.unet.conv_in.weight[:, 4:].data, std=0.1)
    pipeline = build_ic_light_pipeline(parts, parts.scheduler)
    pipeline.save_pretrained(project.model)
    shutil.copyfile(root / "src" / "sdtrain" / "models" / "ic_light.py", project.model / "ic_light.py")
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    mask = np.where(np.arange(64) < 40, 255, 0).astype(np.uint8)[None, :, None].repeat(64, axis=0)
    Image.fromarray(np.concatenate([noise[0], mask], axis=2)).save("foreground.png")
    Image.fromarray(noise[1]).save("background.png")
    np.save("light.npy", rng.random((1, 5, 3), dtype=np.float32))

    project.build(**{**ic_light(**method), "files": {}})
    snippet, shipped = blocks(project.card(num_inference_steps=2), "python")
    monkeypatch.setitem(sys.modules, "ic_light", types.ModuleType("ic_light"))
    exec(shipped, vars(sys.modules["ic_light"]))
    names = {}
    exec(snippet, names)
    assert type(names["pipeline"]).__module__ == "ic_light"

    given = {name: read_condition(name, Path(f"{name}.{'npy' if name == 'light' else 'png'}"), 64) for name in seen}
    given |= {"light": torch.as_tensor(given["light"])} if method else {}
    prompt = CAPTIONS[0] if method else f"left light {CAPTIONS[0]}"
    conditions = {name: [value] for name, value in given.items()}
    scale = project.params.sample.guidance_scales[0]
    (drawn,) = generate(
        pipeline, [prompt], [0], conditions=conditions, num_inference_steps=2, guidance_scale=scale, batch_size=1
    )
    assert Image.open("image.png").size == (64, 64)
    levels = np.subtract(drawn, Image.open("image.png"), dtype=int)
    assert abs(levels).max() <= 1  # sums may round otherwise


@pytest.mark.parametrize(
    ("name", "conditions"),
    [
        ("ic-light", {"foreground": "foreground.png"}),
        ("ic-light, background", {"foreground": "foreground.png", "background": "background.png"}),
        ("ic-light, map", {"foreground": "foreground.png", "light": "light.npy"}),
        ("ic-light, all", {"foreground": "foreground.png", "background": "background.png", "light": "light.npy"}),
    ],
)
def test_every_condition_is_asked_for(project, monkeypatch, name, conditions):
    """By the command and by the snippet; lit scenes told by words have these in front of the grid's captions."""
    card = project.build(**CASES[name]).card()
    given = []
    monkeypatch.setattr("sdtrain.cli.generate._generate", given.append)
    cli.main(shlex.split(blocks(card, "sh")[0])[1:])
    (options,) = given
    expected = {name: [Path(conditions[name])] if name in conditions else None
                for name in ("hint", "foreground", "background", "light")}  # fmt: skip
    assert {name: getattr(options, name) for name in expected} == expected
    prompt = CAPTIONS[0] if "light" in conditions else f"left light {CAPTIONS[0]}"
    snippet = blocks(card, "python")[0]
    assert options.prompt == [prompt]
    assert argument(snippet, "pipeline")[0] == prompt
    calls = [node for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call)]
    (call,) = (node for node in calls if ast.unparse(node.func) == "pipeline")
    assert [keyword.arg for keyword in call.keywords][: len(conditions)] == list(conditions)
    assert [file for file in spans(card) if file in conditions.values()] == list(conditions.values())


@pytest.mark.parametrize(("size", "reduced"), [([1, 5], False), ([32, 32], True)])
def test_a_light_maps_array_is_described(project, size, reduced):
    card = project.build(**ic_light(lit=False, **{**MAP, "light_size": size})).card()
    assert f"linear, not negative, an array of `[{size[0]}, {size[1]}, 3]`, height, width and RGB" in card
    assert ("to which a larger map must be reduced by means over areas" in card) == reduced
    assert "whose columns light from" not in card
    shutil.rmtree(project.model)
    card = project.build(**CASES["ic-light, map"]).card()
    assert "an environment map, whose columns light from the left, right, top, bottom and front: linear" in card


@pytest.mark.parametrize(
    ("name", "demo", "released"),
    [
        ("ic-light", "gradio_demo.py", "models/iclight_sd15_fc.safetensors"),
        ("ic-light, background", "gradio_demo_bg.py", "models/iclight_sd15_fbc.safetensors"),
    ],
)
def test_offsets_are_for_the_programs_that_add_them(project, name, demo, released):
    card = project.build(**CASES[name]).card()
    ours, original = (next(line for line in card.splitlines() if line.startswith(f"- `sdtrain{n}.safetensors`"))
                      for n in ("", "-original"))  # fmt: skip
    assert f"Diffusers' keys: for the public IC-Light's demo `{demo}` in place of `{released}`" in ours
    assert "ComfyUI-IC-Light (kijai's) in `models/unet/`" in ours
    assert "original keys: for ComfyUI-IC-Light-Native in `models/unet/` or `models/diffusion_models/`" in original
    assert "these programs add it to a Stable Diffusion 1.5, best to that base." in card
    assert not {"models/checkpoints/", "models/Stable-diffusion/"} & set(spans(card))
    assert "These programs expect the sizes of Stable Diffusion 1.x (320 channels, text width 768)." in card
    assert "A1111" not in card


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("ic-light", None),
        ("ic-light, map", "the prompt and the foreground"),
        ("ic-light, all", "the prompt, the foreground and the background"),
    ],
)
def test_offsets_are_said_to_lack_the_light_encoder(project, name, seen):
    card = project.build(**CASES[name]).card()
    assert ("lack the light encoder" in card) == (seen is not None)
    assert seen is None or f"there the model sees {seen} only, and no light map." in card


@pytest.mark.parametrize("zero", [False, True])
def test_offsets_that_predict_v_say_so(project, zero):
    train = {"prediction_type": "v_prediction", "zero_terminal_snr": zero}
    card = project.build(**{**CASES["ic-light, SD 1.5, v"], "train": train}).card()
    assert ("on a schedule with zero terminal SNR. These programs don't see this" in card) == zero
    assert f"sampling `v_prediction` and zsnr `{json.dumps(zero)}`." in card
    assert "- The demo: let it load its scheduler from this model's folder `scheduler/`." in card
    assert "A1111" not in card


def test_the_offset_that_training_started_from_is_a_source(project):
    card = project.build(**CASES["ic-light, all"]).card()
    assert "- `unet_offset`: local file `models/iclight_sd15_fc.safetensors`" in card
    assert "with the same images and the file of `base.unet_offset`:" in card
    assert blocks(card, "sh")[-1].splitlines()[-1] == f"dvc exp run -S base.revision={COMMIT}"
    shutil.rmtree(project.model)
    assert "unet_offset" not in project.build(**CASES["ic-light"]).card()


def test_an_offset_beside_a_base_does_not_hide_where_the_base_is(project):
    (snippet,) = blocks(project.build(**{**CASES["lora"], "sources": RELEASED}).card(), "python")
    assert argument(snippet, "from_pretrained") == [HUB["repo"], COMMIT]
