"""params.yaml: what loads, and how faults are reported."""

from pathlib import Path
from typing import Annotated, Literal, get_args

import pytest
import yaml
from pydantic import Field, SerializeAsAny

from sdtrain.ground.errors import InputError
from sdtrain.ground.schedules import scaled_lr
from sdtrain.params.load import check_params, load_params
from sdtrain.params.rules import RULES
from sdtrain.params.schema import ConditionName, DatasetParams, FinetuneParams, Params, Section
from sdtrain.params.view import NEUTRAL, View
from sdtrain.training.optimizer import peak_lr
from tests.conftest import BY_MAP, lit

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "params.yaml"
CONTROLNET = {
    "method": {"name": "controlnet", "start": "unet"},
    "dataset__condition_columns": {"hint": "outline"},
    "validation__prompts": [],
    "validation__num_held_out": 4,
    "sample__prompts": [],
    "sample__num_held_out": 8,
}
LORA = load_params(ROOT / "recipes" / "lora.yaml").method.model_dump()
CONSISTENT = {**BY_MAP, "consistency_weight": 0.1, "phi": "mlp", "consistency_latents": "shared"}
ALL_RELIT = "foreground light mask light_1 relit_1 relit_2"


def relit(conditions: str = "foreground", **method: object) -> dict:
    """Changes that make it IC-Light's in a lit world, with these conditions and these settings of the method."""
    sections = lit(conditions, **method)
    given = {f"dataset__{key}": value for key, value in sections["dataset"].items()}
    given |= {f"sample__{key}": value for key, value in sections["sample"].items()}
    return {**given, "method": sections["method"], "validation__prompts": []}


def changed(**changes) -> dict:
    """The shipped tree with `section__key=value` changes; `...` deletes the key."""
    tree = load_params(SHIPPED).model_dump()
    for name, value in changes.items():
        *section, key = name.split("__")
        parent = tree[section[0]] if section else tree
        if value is ...:
            del parent[key]
        else:
            parent[key] = value
    return tree


def message(tree: object) -> str:
    with pytest.raises(InputError) as caught:
        check_params(tree)
    return str(caught.value)


def load_text(tmp_path: Path, old: str, new: str) -> Params:
    """The shipped file, read back after one replacement in its text."""
    text = SHIPPED.read_text(encoding="utf-8")
    assert text.count(old) == 1, old
    path = tmp_path / "params.yaml"
    path.write_text(text.replace(old, new), encoding="utf-8")
    return load_params(path)


@pytest.mark.parametrize("path", [SHIPPED, *sorted((ROOT / "recipes").glob("*.yaml"))], ids=lambda path: path.name)
def test_shipped_params_load(path):
    params = load_params(path)
    assert params.model_dump() == yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-05", 1e-5), ("1.0e-4", 1e-4), ("1e5", 1e5), ("3", 3.0), ("+.5", 0.5), ("2.", 2.0), ("1E+2", 100.0)],
)
def test_numbers_arrive_as_floats(tmp_path, text, value):
    lr = load_text(tmp_path, "lr: 2.0e-3", f"lr: {text}").train.lr
    assert lr == value
    assert isinstance(lr, float)


@pytest.mark.parametrize("word", ["no", "on", "yes", "off", "1_000", "2026-11-21", "12:30"])
def test_words_stay_strings(tmp_path, word):
    assert load_text(tmp_path, "negative_prompt: ''", f"negative_prompt: {word}").sample.negative_prompt == word


def test_yaml_1_1_booleans_are_not_booleans(tmp_path):
    with pytest.raises(InputError, match=r"train\.use_ema = 'yes': input should be a valid boolean"):
        load_text(tmp_path, "use_ema: true", "use_ema: yes")


@pytest.mark.parametrize(
    ("old", "new"), [("seed: 0\n\n", "seed: 0\nseed: 1\n\n"), ("  use_ema: true", "  lr: 1.0\n  use_ema: true")]
)
def test_key_given_twice_is_refused(tmp_path, old, new):
    with pytest.raises(InputError, match=r"key '(seed|lr)' is given twice"):
        load_text(tmp_path, old, new)


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"seed: [1", "not valid YAML"), (b"seed: \xff", "not valid YAML"), (b"", "got NoneType"), (b"- 1", "got list")],
)
def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path, data, words):
    path = tmp_path / "odd.yaml"
    path.write_bytes(data)
    with pytest.raises(InputError, match=rf"odd\.yaml: .*{words}"):
        load_params(path)


def test_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml: no such file; run the command from the project's root"):
        load_params(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("train__learning_rate", "there are seed, lr, lr_scaling"),
        ("train__max_step", "nearest is train.max_steps"),
        ("train__random_flip", "nearest is precompute.random_flip"),
        ("valiation", "nearest is validation"),
        ("resolution", "nearest is precompute.resolution"),
    ],
)
def test_unknown_key_names_the_nearest(key, hint):
    assert f"{key.replace('__', '.')} = 7: unknown key; {hint}" in message(changed(**{key: 7}))


def test_unknown_choice_names_all_and_the_nearest():
    text = message(changed(train__precision="bf32"))
    assert "train.precision = 'bf32': must be one of 'fp32', 'bf16', 'fp16'; nearest is '" in text


def test_every_fault_comes_in_one_message():
    tree = changed(
        seed=-1,
        train__lr=0,
        train__lrr=0.5,
        train__batch_size=...,
        train__use_ema="yes",
        validation__prompts=["fine", ""],
        dataset__alpha_background="white",
        export__dtype="fp64",
        evaluate__guidance_scale=float("inf"),
        sample=...,
        precompute__random_flip=True,
    )
    head, *faults = message(tree).split("\n")
    assert head == "params.yaml has 11 faults:"
    for fault in (
        "seed = -1: input should be greater than or equal to 0",
        "train.lr = 0: input should be greater than 0",
        "train.lrr = 0.5: unknown key; nearest is train.lr",
        "train.batch_size: missing; the shipped params.yaml and the recipes show every key",
        "train.use_ema = 'yes': input should be a valid boolean",
        "validation.prompts.1 = '': string should have at least 1 character",
        "dataset.alpha_background = 'white': string should match pattern",
        "export.dtype = 'fp64': must be one of 'fp32', 'fp16'",
        "evaluate.guidance_scale = inf: input should be a finite number",
        "sample: missing",
        "precompute.random_flip = True: the captions of dataset.source = 'generated'",
    ):
        assert sum(line.startswith(f"  {fault}") for line in faults) == 1, fault


IMAGEFOLDER = {"dataset__source": "imagefolder"}
NO_FEATURES = {"evaluate__features": "none", "evaluate__nearest_neighbors": False}
NO_EMA = {"train__use_ema": False, "export__weights": "raw"}
RULE_CASES = [
    ({"export__merged": True}, "export.merged = True: has no effect with method.name = 'finetune', which has no adapt"),
    ({"method": {**LORA, "use_dora": True}}, "export.merged = False: with method.use_dora = True only the merged"),
    ({"method": LORA, "export__single_file": True}, "export.single_file = True: is for full models, and with export."),
    (
        {"method": LORA, "export__name": "pytorch_lora_weights"},
        "export.name = 'pytorch_lora_weights': Diffusers would take",
    ),
    ({"base__source": "hub"}, "base.repo = None: base.source = 'hub' needs a repository, owner/name"),
    ({"dataset__source": "hub"}, "dataset.repo = None: dataset.source = 'hub' needs a repository, owner/name"),
    ({"base__repo": "a/b"}, "base.repo = 'a/b': base.source = 'local' doesn't read it; set base.source: hub"),
    ({"base__revision": "v1"}, "base.revision = 'v1': base.source = 'local' doesn't read it; set base.source: hub"),
    (
        {"base__source": "hub", "base__repo": "a/b", "base__path": "/models/mine"},
        "base.path = '/models/mine': base.source = 'hub' doesn't read it; set base.source: local, or base.path: data/",
    ),
    (
        {"dataset__validation_fraction": 0.6, "dataset__test_fraction": 0.4},
        "dataset.validation_fraction = 0.6, dataset.test_fraction = 0.4: leave no image to train on; their sum must be",
    ),
    ({"dataset__repo": "a/b"}, "dataset.repo = 'a/b': dataset.source = 'generated' doesn't read it"),
    ({"dataset__revision": "v1"}, "dataset.revision = 'v1': dataset.source = 'generated' doesn't read it"),
    (
        {"dataset__path": "/images"},
        "dataset.path = '/images': dataset.source = 'generated' doesn't read it; set dataset.source: imagefolder",
    ),
    ({"train__lr_num_cycles": 3}, "train.lr_num_cycles = 3: only train.lr_scheduler = 'cosine_with_restarts' uses it"),
    ({"train__lr_power": 2}, "train.lr_power = 2: only train.lr_scheduler = 'polynomial' uses it"),
    (
        {"train__lr_scheduler": "polynomial", "train__lr": 1e-7},
        "train.lr = 1e-07: train.lr_scheduler = 'polynomial' decays to 1e-7",
    ),
    ({"train__lr_scaling": "sqrt"}, "train.lr_reference_batch_size = None: train.lr_scaling = 'sqrt' needs the batch"),
    (
        {"train__lr_reference_batch_size": 8},
        "train.lr_reference_batch_size = 8: has no effect with train.lr_scaling = 'none'",
    ),
    ({"train__lr_step_rules": "1:5,0.1"}, "train.lr_step_rules = '1:5,0.1': only train.lr_scheduler = 'piecewise_con"),
    (
        {"train__lr_scheduler": "piecewise_constant", "train__lr_warmup_steps": 0},
        "train.lr_step_rules = None: train.lr_scheduler = 'piecewise_constant' needs them; write factor:step pairs",
    ),
    *(
        (
            {"train__lr_scheduler": "piecewise_constant", "train__lr_warmup_steps": 0, "train__lr_step_rules": rules},
            f"train.lr_step_rules = '{rules}': write factor:step pairs with rising steps and a last factor",
        )
        for rules in (
            "1:5",
            "1:9,0.5:5,0.1",
            "1:5:6,0.1",
            "1:0,0.1",
            "a:5,0.1",
            "1:x,0.1",
            "-1:5,0.1",
            "1:5,0.1:5,1",
            "nan",
        )
    ),
    (
        {"train__lr_scheduler": "piecewise_constant", "train__lr_step_rules": "1:5,0.1"},
        "train.lr_warmup_steps = 50: train.lr_scheduler = 'piecewise_constant' has no warm-up",
    ),
    (
        {"train__zero_terminal_snr": True},
        "train.zero_terminal_snr = True: with train.prediction_type = 'epsilon' the last timestep is pure noise",
    ),
    ({"train__ema_decay": None}, "train.ema_decay = None: train.ema_schedule = 'ramp' needs a number"),
    ({"train__ema_power": 0.7}, "train.ema_power = 0.7: train.ema_schedule = 'ramp' doesn't use it; set it to null"),
    (
        {"train__ema_schedule": "warmup", "train__ema_power": 0.7},
        "train.ema_inv_gamma = None: train.ema_schedule = 'warmup' needs a number",
    ),
    (
        {"train__ema_schedule": "power_function", "train__ema_sigma_rel": 0.1},
        "train.ema_decay = 0.99: train.ema_schedule = 'power_function' doesn't use it; set it to null",
    ),
    (
        {"train__resume_reset": ["lr"]},
        "train.resume_reset = ['lr']: has no effect with train.resume = 'auto'",
    ),
    (
        {"train__resume": "branch", "train__resume_reset": ["lr", "lr"]},
        "train.resume_reset = ['lr', 'lr']: lists a value twice",
    ),
    (
        {"train__branch_from": "a/path"},
        "train.branch_from = 'a/path': has no effect with train.resume = 'auto'; set it to data/start, or train",
    ),
    (
        {**CONTROLNET, "dataset__condition_columns": {}},
        "method.name = 'controlnet': needs a hint for each image; add it to dataset.condition_columns, {hint: outline}"
        ", or to precompute.derived_conditions, {hint: canny}",
    ),
    (
        {**CONTROLNET, "precompute__derived_conditions": {"hint": "canny"}},
        "dataset.condition_columns.hint = 'outline', precompute.derived_conditions.hint = 'canny': give one of them",
    ),
    (
        {"dataset__condition_columns": {"hint": "outline"}},
        "dataset.condition_columns.hint = 'outline': method.name = 'finetune' sees no hint; leave it out",
    ),
    (
        {**CONTROLNET, "dataset__condition_columns": {"hint": "hints/*.png"}},
        "dataset.condition_columns.hint = 'hints/*.png': only an imagefolder has files beside its images; name a colu",
    ),
    (
        {**CONTROLNET, **IMAGEFOLDER, "dataset__condition_columns": {"hint": "image"}},
        "dataset.condition_columns.hint = 'image': is dataset.image_column, too; name the column that tells",
    ),
    ({"sample__prompts": []}, "sample.prompts = []: the grid needs a prompt or more"),
    (
        {**CONTROLNET, "sample__num_held_out": None},
        "sample.num_held_out = None: with method.name = 'controlnet' the grid shows held-out captions and conditions",
    ),
    (
        {**CONTROLNET, "sample__prompts": ["a cat"]},
        "sample.prompts: method.name = 'controlnet' draws held-out images' captions with their conditions; set it to",
    ),
    (
        {**CONTROLNET, "validation__prompts": ["a cat"]},
        "validation.prompts: method.name = 'controlnet' draws held-out images' captions with their conditions; set it",
    ),
    (
        {"sample__num_held_out": 8},
        "sample.num_held_out = 8: has no effect with method.name = 'finetune', which sees captions only; set it to nu",
    ),
    (
        {"validation__num_held_out": 8},
        "validation.num_held_out = 8: has no effect with method.name = 'finetune', which sees captions only; set it to",
    ),
    (
        {**CONTROLNET, "validation__num_held_out": None, "validation__num_inference_steps": 9},
        "validation.num_inference_steps = 9: has no effect with validation.num_held_out = None; set it to 20",
    ),
    (
        {"base__controlnet_repo": "owner/name"},
        "base.controlnet_repo = 'owner/name': has no effect with method.name = 'finetune'; set it to null, or method.",
    ),
    (
        {**CONTROLNET, "base__controlnet_repo": "owner/name"},
        "base.controlnet_repo = 'owner/name': has no effect with method.start = 'unet'; set it to null, or method.sta",
    ),
    (
        {
            **CONTROLNET,
            "method": {"name": "controlnet", "start": "base"},
            "base__source": "hub",
            "base__repo": "owner/name",
        },
        "method.start = 'base': with base.source = 'hub' the ControlNet to start from comes from base.controlnet_repo",
    ),
    (
        {**CONTROLNET, "base__unet_config": {"layers_per_block": 1}},
        "base.unet_config = {'layers_per_block': 1}: is a UNet that was never trained, and method.name = 'controlnet'",
    ),
    (
        {"base__controlnet_revision": "v1"},
        "base.controlnet_revision = 'v1': has no effect without base.controlnet_repo",
    ),
    (
        {"dataset__group_column": "object"},
        "dataset.group_column = 'object': dataset.source = 'generated' doesn't read it",
    ),
    (
        {**IMAGEFOLDER, "dataset__world": "free_shapes"},
        "dataset.world = 'free_shapes': dataset.source = 'imagefolder' do",
    ),
    (
        {**CONTROLNET, "export__single_file": True},
        "export.single_file = True: is for full models; a ControlNet's own file, which ComfyUI and A1111 load, is alw",
    ),
    (
        {**CONTROLNET, "export__name": "diffusion_pytorch_model"},
        "export.name = 'diffusion_pytorch_model': diffusion_pytorch_model.safetensors is written, too; choose another",
    ),
    (
        {**CONTROLNET, "export__name": "my-Shuffle"},
        "export.name = 'my-Shuffle': by 'shuffle' in its name ComfyUI and A1111 take a ControlNet for one of another",
    ),
    (
        {"base__unet_offset": "iclight_sd15_fc.safetensors"},
        "base.unet_offset = 'iclight_sd15_fc.safetensors': has no effect with method.name = 'finetune'; set it to "
        "data/offset, or method.name to ic_light",
    ),
    (
        relit("foreground light", **{**BY_MAP, "light_size": None}),
        "method.light_size = None: method.light = 'map' needs it",
    ),
    (
        relit("foreground light", **{**BY_MAP, "num_light_tokens": None}),
        "method.num_light_tokens = None: method.light = 'map' needs it",
    ),
    (
        relit(light_size=[1, 5]),
        "method.light_size = [1, 5]: has no effect with method.light = 'words'; set it to null",
    ),
    (relit(num_light_tokens=3), "method.num_light_tokens = 3: has no effect with method.light = 'words'; set it to n"),
    (
        relit("foreground mask", consistency_weight=0.1, phi="mlp", consistency_latents="shared"),
        "method.consistency_weight = 0.1: splits the light map at random, and method.light = 'words' has none; set it "
        "to 0, or method.light to map",
    ),
    (
        relit("foreground light mask", **{**CONSISTENT, "phi": None}),
        "method.phi = None: method.consistency_weight = 0.1 needs it",
    ),
    (
        relit("foreground light mask", **{**CONSISTENT, "consistency_latents": None}),
        "method.consistency_latents = None: method.consistency_weight = 0.1 needs it",
    ),
    (relit(phi="mlp"), "method.phi = 'mlp': has no effect with method.consistency_weight = 0; set it to null"),
    (
        relit("foreground light", **BY_MAP, consistency_latents="shared"),
        "method.consistency_latents = 'shared': has no effect with method.consistency_weight = 0; set it to null",
    ),
    *(
        (
            relit(ALL_RELIT, **{**CONSISTENT, "phi": phi, "consistency_latents": "own"}),
            f"method.phi = '{phi}': with method.consistency_latents = 'own' the three predictions have the same target"
            ", so there is no closed form and nothing to add; use mlp, or shared",
        )
        for phi in ("fixed", "pixel")
    ),
    *(
        (
            {**relit(), "dataset__world": world},
            f"dataset.world = '{world}': method.name = 'ic_light' needs 'lit' or 'lit_by_map', and only that method d",
        )
        for world in ("shapes", "free_shapes")
    ),
    ({"dataset__world": "lit"}, "dataset.world = 'lit': method.name = 'ic_light' needs 'lit' or 'lit_by_map', and on"),
    (
        {**CONTROLNET, "dataset__world": "lit_by_map"},
        "dataset.world = 'lit_by_map': method.name = 'ic_light' needs 'lit' or 'lit_by_map', and only that method does",
    ),
    (
        {**relit(), "dataset__world": "lit_by_map"},
        "dataset.world = 'lit_by_map': with method.light = 'words' the light is told by captions; use lit",
    ),
    (
        {**relit("foreground light", **BY_MAP), "dataset__world": "lit"},
        "dataset.world = 'lit': with method.light = 'map' the light is told by maps; use lit_by_map",
    ),
    (
        {**relit(), "sample__images_per_prompt": 2},
        "sample.images_per_prompt = 2: the grid of lit scenes has one image under each light; set it to 1",
    ),
    (
        {**relit(), "dataset__new_fraction": 0.5},
        "dataset.new_fraction = 0.5: lit scenes show known concepts only; set it to 0.0",
    ),
    (
        relit(""),
        "method.name = 'ic_light': needs a foreground for each image; add it to dataset.condition_columns, "
        "{foreground: foreground}, or to precompute.derived_conditions, {foreground: degraded}",
    ),
    (
        relit(variant="fbc"),
        "method.name = 'ic_light': needs a background for each image; add it to dataset.condition_columns, "
        "{background: background}",
    ),
    (
        relit(**BY_MAP),
        "method.name = 'ic_light': needs a light for each image; add it to dataset.condition_columns, {light: light}",
    ),
    (
        relit("foreground light", **CONSISTENT),
        "method.name = 'ic_light': needs a mask for each image; add it to dataset.condition_columns, {mask: mask}, or "
        "to precompute.derived_conditions, {mask: alpha}",
    ),
    *(
        (
            relit(ALL_RELIT.replace(f" {name}", ""), **{**CONSISTENT, "consistency_latents": "own"}),
            f"method.name = 'ic_light': needs a {name} for each image; add it to dataset.condition_columns, {{{name}: ",
        )
        for name in ("light_1", "relit_1", "relit_2")
    ),
    (
        {**relit(""), "dataset__source": "parquet", "dataset__world": "shapes", "dataset__new_fraction": 0.8},
        "method.name = 'ic_light': needs a foreground for each image; add it to dataset.condition_columns, "
        "{foreground: COLUMN}, or to precompute.derived_conditions, {foreground: degraded}",
    ),
    *(
        (
            relit(f"foreground {name}"),
            f"dataset.condition_columns.{name} = '{name}': method.name = 'ic_light' sees no {name}; leave it out",
        )
        for name in ("background", "light", "light_1", "relit_1", "relit_2")
    ),
    (
        {**relit(), "precompute__derived_conditions": {"hint": "canny"}},
        "precompute.derived_conditions.hint = 'canny': method.name = 'ic_light' sees no hint; leave it out",
    ),
    (
        {**relit("foreground mask"), "precompute__derived_conditions": {"mask": "alpha"}},
        "dataset.condition_columns.mask = 'mask', precompute.derived_conditions.mask = 'alpha': give one of them",
    ),
    (
        {
            **CONTROLNET,
            "dataset__condition_columns": {},
            "precompute__derived_conditions": {"hint": "degraded"},
        },
        "precompute.derived_conditions.hint = 'degraded': a hint is computed by 'canny'",
    ),
    (
        {**relit(), "precompute__derived_conditions": {"mask": "canny"}},
        "precompute.derived_conditions.mask = 'canny': a mask is computed by 'alpha'",
    ),
    (
        {**relit("mask"), "precompute__derived_conditions": {"foreground": "alpha"}},
        "precompute.derived_conditions.foreground = 'alpha': a foreground is computed by 'degraded'",
    ),
    (
        {**relit(""), "precompute__derived_conditions": {"foreground": "degraded"}},
        "precompute.derived_conditions.foreground = 'degraded': is made of each image's mask; add it to "
        "dataset.condition_columns, {mask: COLUMN}",
    ),
    (
        {**relit(""), "precompute__derived_conditions": {"mask": "alpha", "foreground": "degraded"}},
        "precompute.derived_conditions = {'mask': 'alpha', 'foreground': 'degraded'}: foreground and mask are each "
        "made of the other; add the mask to dataset.condition_columns, {mask: COLUMN}, and leave it out here",
    ),
    (
        {**relit("foreground light", **BY_MAP), "method__light_size": [32, 32]},
        "method.light_size = [32, 32]: the maps of dataset.world = 'lit_by_map' are [1, 5]",
    ),
    (
        {
            **relit("foreground light", **BY_MAP),
            **{"dataset__source": "imagefolder", "dataset__world": "shapes", "dataset__new_fraction": 0.8},
            "method__light_size": [64, 128],
        },
        "method.light_size = [64, 128]: larger maps are reduced to [32, 32]; set it to that",
    ),
    (
        relit("foreground background light mask", **{**CONSISTENT, "variant": "fbc"}),
        "method.consistency_weight = 0.1: asks for parts of the light, and with method.variant = 'fbc' the background",
    ),
    (
        {
            **relit(),
            **{"dataset__source": "imagefolder", "dataset__world": "shapes", "dataset__new_fraction": 0.8},
            "precompute__random_flip": True,
        },
        "precompute.random_flip = True: with method.light = 'words' captions tell the side of the light",
    ),
    (
        {**relit(), "sample__num_held_out": None},
        "sample.num_held_out = None: with method.name = 'ic_light' the grid shows held-out captions and conditions; gi",
    ),
    (
        {**relit(), "export__single_file": True},
        "export.single_file = True: programs take a single file for a plain Stable Diffusion; IC-Light's own files, wh",
    ),
    ({"train__trackers": ["wandb", "wandb"]}, "train.trackers = ['wandb', 'wandb']: lists a value twice"),
    ({"base__vae_revision": "main"}, "base.vae_revision = 'main': has no effect without base.vae_repo"),
    ({"base__text_encoder_revision": "v1"}, "base.text_encoder_revision = 'v1': has no effect without base.text_enc"),
    (
        {"train__max_steps": 800, "train__max_epochs": 3},
        "train.max_steps = 800, train.max_epochs = 3: give exactly one",
    ),
    ({"train__max_steps": None}, "train.max_steps = None, train.max_epochs = None: give exactly one"),
    ({"train__micro_batch_size": 12}, "train.micro_batch_size = 12: must divide train.batch_size = 32"),
    ({"train__micro_batch_size": 64}, "train.micro_batch_size = 64: must divide train.batch_size = 32"),
    ({"train__lr_scheduler": "constant"}, "train.lr_warmup_steps = 50: train.lr_scheduler = 'constant' has no warm-up"),
    (
        {"train__max_steps": 800, "train__lr_warmup_steps": 800},
        "train.lr_warmup_steps = 800: must be below train.max_steps = 800",
    ),
    ({"train__use_ema": False}, "export.weights = 'ema': train.use_ema = False keeps no EMA; use 'raw'"),
    ({"precompute__random_flip": True}, "precompute.random_flip = True: the captions of dataset.source = 'generated'"),
    (
        {"dataset__split": "test"},
        "dataset.split = 'test': dataset.source = 'generated' doesn't read it; set dataset.source: hub, or "
        "dataset.split: train",
    ),
    ({**IMAGEFOLDER, "dataset__split": "test"}, "dataset.split = 'test': dataset.source = 'imagefolder' doesn't read"),
    (
        {"dataset__image_column": "png"},
        "dataset.image_column = 'png': dataset.source = 'generated' doesn't read it; set dataset.source: imagefolder, "
        "or dataset.image_column: image",
    ),
    (
        {"dataset__caption_column": "txt"},
        "dataset.caption_column = 'txt': dataset.source = 'generated' doesn't read it",
    ),
    (
        {**IMAGEFOLDER, "dataset__num_scenes": 100},
        "dataset.num_scenes = 100: dataset.source = 'imagefolder' doesn't read it; set dataset.source: generated, or "
        "dataset.num_scenes: 2400",
    ),
    ({**IMAGEFOLDER, "dataset__new_fraction": 0.5}, "dataset.new_fraction = 0.5: dataset.source = 'imagefolder' does"),
    (
        {"dataset__alpha_background": "#000000"},
        "dataset.alpha_background = '#000000': has no effect with dataset.source = 'generated', whose images are "
        'opaque squares; set it to "#ffffff", or dataset.source to imagefolder',
    ),
    ({"precompute__center_crop": False}, "precompute.center_crop = False: has no effect with dataset.source = 'gener"),
    (
        {**IMAGEFOLDER, **NO_FEATURES, "evaluate__num_prompts": 40},
        "evaluate.num_prompts = 40: has no effect with evaluate.features = 'none' and dataset.source = 'imagefolder', "
        "where nothing is drawn; set it to 160, or evaluate.features to hub",
    ),
    (
        {**IMAGEFOLDER, "evaluate__num_prompts": 40},
        "evaluate.num_prompts = 40: has no effect with evaluate.features = 'local' of data/builtin_clip and dataset.so",
    ),
    (
        {**IMAGEFOLDER, **NO_FEATURES, "evaluate__num_inference_steps": 25},
        "evaluate.num_inference_steps = 25: has no effect with evaluate.features = 'none' and dataset.source = 'image",
    ),
    (
        {**IMAGEFOLDER, **NO_FEATURES, "evaluate__guidance_scale": 7.5},
        "evaluate.guidance_scale = 7.5: has no effect with evaluate.features = 'none' and dataset.source = 'imagef",
    ),
    (
        {"evaluate__features": "none"},
        "evaluate.nearest_neighbors = True: evaluate.features = 'none' has nothing to compare images by; set it to "
        "false, or evaluate.features to hub or local",
    ),
    (
        {"evaluate__features": "hub"},
        "evaluate.features_repo = None: evaluate.features = 'hub' needs a repository, owner/name, e.g. facebook/dinov2",
    ),
    (
        {"evaluate__features_repo": "facebook/dinov2-small"},
        "evaluate.features_repo = 'facebook/dinov2-small': evaluate.features = 'local' doesn't read it; set "
        "evaluate.features: hub, or evaluate.features_repo: null",
    ),
    (
        {**NO_FEATURES, "evaluate__features_revision": "main"},
        "evaluate.features_revision = 'main': evaluate.features = 'none' doesn't read it; set evaluate.features: hub",
    ),
    (
        {**NO_FEATURES, "evaluate__features_path": "clip"},
        "evaluate.features_path = 'clip': evaluate.features = 'none' doesn't read it; set evaluate.features: local, or "
        "evaluate.features_path: data/builtin_clip",
    ),
    (
        {"validation__prompts": [], "validation__num_inference_steps": 9},
        "validation.num_inference_steps = 9: has no effect with validation.prompts = []; set it to 20, or add prompts",
    ),
    (
        {"validation__prompts": [], "validation__guidance_scale": 7.5},
        "validation.guidance_scale = 7.5: has no effect with validation.prompts = []; set it to 4.0",
    ),
    (
        {"sample__guidance_scales": [1.0, 0.5], "sample__negative_prompt": "blurry"},
        "sample.negative_prompt = 'blurry': has no effect with sample.guidance_scales = [1.0, 0.5], which is none; set "
        'it to "", or add a scale above 1 there',
    ),
    (
        {"sample__guidance_scales": [4.0, 1.5, 4.0]},
        "sample.guidance_scales = [4.0, 1.5, 4.0]: lists a value twice",
    ),
    ({"sample__checkpoints": ["last", "last"]}, "sample.checkpoints = ['last', 'last']: lists a value twice"),
    (
        {"sample__checkpoints": ["best", "best-3"], "train__num_best_checkpoints": 2},
        "sample.checkpoints = ['best', 'best-3']: best-3 isn't kept with train.num_best_checkpoints = 2; leave it out, "
        "or set train.num_best_checkpoints to 3",
    ),
    (
        {"train__timestep_sampling": "stratified", "train__batch_size": 1, "train__micro_batch_size": 1},
        "train.timestep_sampling = 'stratified': has no effect with train.batch_size = 1, which is one stratum; set it "
        "to uniform",
    ),
    (
        {**NO_EMA, "train__ema_schedule": "warmup"},
        "train.ema_schedule = 'warmup': has no effect with train.use_ema = F",
    ),
    (
        {**NO_EMA, "train__ema_decay": 0.9},
        "train.ema_decay = 0.9: has no effect with train.use_ema = False; set it to null, or train.use_ema to true",
    ),
    ({**NO_EMA, "train__ema_inv_gamma": 1.0}, "train.ema_inv_gamma = 1.0: has no effect with train.use_ema = False"),
    ({**NO_EMA, "train__ema_power": 0.7}, "train.ema_power = 0.7: has no effect with train.use_ema = False"),
    ({**NO_EMA, "train__ema_sigma_rel": 0.1}, "train.ema_sigma_rel = 0.1: has no effect with train.use_ema = False"),
    (
        {"train__early_stopping_patience": 3},
        "train.early_stopping_patience = 3: has no effect with validation.every_n_steps = 250, as it could stop at "
        "step 1000 at the earliest, and train.max_steps = 1000; lower one of these, or set it to null",
    ),
]


@pytest.mark.parametrize(("changes", "fault"), RULE_CASES)
def test_cross_field_rule(changes, fault):
    head, *faults = message(changed(**changes)).split("\n")
    assert head == "params.yaml has 1 fault:"
    assert len(faults) == 1
    assert faults[0].startswith(f"  {fault}")


@pytest.mark.parametrize(("changes", "fault"), RULE_CASES)
def test_cross_field_rule_is_reported_beside_other_faults(changes, fault):
    sections = [
        name for name in ("sample", "evaluate", "validation", "export", "precompute") if f"{name}." not in fault
    ]
    missing, odd = [name for name in sections if not any(key.startswith(name) for key in changes)][:2]
    others = {missing: ..., odd: 3, "train__adam_epsilon": "high", "base__unknown": 1}
    text = message(changed(**changes, **others))
    assert "params.yaml has 5 faults:" in text
    assert f"\n  {fault}" in text


def test_every_rule_has_a_case():
    views = [View(changed(**changes), faulty=set()) for changes, _ in RULE_CASES]
    assert [rule for rule in RULES if not any(view.ask(rule) for view in views)] == []


@pytest.mark.parametrize(
    "changes",
    [
        {"base__source": "hub", "base__repo": "owner/name"},
        {"base__vae_revision": "main", "base__vae_repo": "owner/name"},
        {"train__max_steps": None, "train__max_epochs": 1, "train__lr_warmup_steps": 800},
        {"train__micro_batch_size": 1},
        {"train__lr_scheduler": "cosine_with_restarts", "train__lr_num_cycles": 3},
        {"train__lr_scheduler": "polynomial", "train__lr_power": 2.0},
        {"dataset__source": "parquet", "dataset__path": "/images"},
        {"train__lr_scheduler": "constant", "train__lr_warmup_steps": 0},
        {"train__lr_warmup_steps": 799},
        {"train__use_ema": False, "export__weights": "raw"},
        {"precompute__random_flip": True, "dataset__source": "imagefolder"},
        {"train__lr_scaling": "sqrt", "train__lr_reference_batch_size": 8},
        {
            "train__lr_scheduler": "piecewise_constant",
            "train__lr_warmup_steps": 0,
            "train__lr_step_rules": "1:500,0.1:800,0.01",
        },
        {"train__zero_terminal_snr": True, "train__prediction_type": "v_prediction"},
        {"train__ema_schedule": "warmup", "train__ema_inv_gamma": 1.0, "train__ema_power": 0.75},
        {"train__ema_schedule": "power_function", "train__ema_sigma_rel": 0.1, "train__ema_decay": None},
        {"train__resume": "branch", "train__branch_from": "a/path", "train__resume_reset": ["optimizer", "lr"]},
        {"train__trackers": []},
        {"validation__prompts": []},
        {"validation__num_inference_steps": 9, "validation__guidance_scale": 7.5},
        {"dataset__source": "hub", "dataset__repo": "a/b", "dataset__split": "test", "dataset__caption_column": "said"},
        {"dataset__source": "webdataset", "dataset__image_column": "png", "dataset__caption_column": "txt"},
        {"dataset__source": "imagefolder", "dataset__image_column": "photo", "dataset__alpha_background": "#000000"},
        {"dataset__source": "parquet", "precompute__center_crop": False},
        {"dataset__num_scenes": 100, "dataset__new_fraction": 0.5, "dataset__max_train_samples": 50},
        {"evaluate__num_prompts": 40, "evaluate__num_inference_steps": 25, "evaluate__guidance_scale": 7.5},
        {"sample__negative_prompt": "blurry"},
        {"sample__guidance_scales": [1.0]},
        {"sample__guidance_scales": [1.0, 4.0], "sample__negative_prompt": "blurry"},
        {"sample__checkpoints": ["best", "best-12", "last"], "train__num_best_checkpoints": 12},
        {"sample__checkpoints": []},
        {"train__timestep_sampling": "stratified", "train__batch_size": 2, "train__micro_batch_size": 1},
        {"train__timestep_sampling": "uniform", "train__batch_size": 1, "train__micro_batch_size": 1},
        {"train__use_ema": False, "export__weights": "raw", "train__ema_decay": None},
        relit(),
        {**relit("foreground mask"), "base__unet_offset": "iclight_sd15_fc.safetensors"},
        {**relit(), "precompute__derived_conditions": {"mask": "alpha"}},
        relit("foreground background", variant="fbc"),
        relit("foreground light", **BY_MAP),
        *(relit("foreground light mask", **{**CONSISTENT, "phi": phi}) for phi in ("fixed", "mlp", "pixel")),
        {
            **relit("foreground light", **CONSISTENT),
            "precompute__derived_conditions": {"mask": "alpha"},
        },
        relit(ALL_RELIT, **{**CONSISTENT, "consistency_latents": "own"}),
        {
            **relit("mask"),
            "dataset__source": "imagefolder",
            "dataset__world": "shapes",
            "dataset__new_fraction": 0.8,
            "dataset__condition_columns": {"mask": "masks/*.png"},
            "precompute__derived_conditions": {"foreground": "degraded"},
            "sample__images_per_prompt": 2,
        },
        {"train__early_stopping_patience": 2},
        {
            "train__early_stopping_patience": 99,
            "train__max_steps": None,
            "train__max_epochs": 9,
        },
    ],
)
def test_what_the_rules_allow(changes):
    assert check_params(changed(**changes)).model_dump() == changed(**changes)


def test_the_shipped_params_hold_the_neutral_values():
    """So that one key can be switched without touching those that it leaves without effect."""
    shipped = load_params(SHIPPED).model_dump()
    held = {key: shipped[key.split(".")[0]][key.split(".")[1]] for key in NEUTRAL}
    assert held == NEUTRAL


SOURCES = get_args(DatasetParams.model_fields["source"].annotation)
LIT = {"dataset.world", "dataset.num_scenes", "dataset.new_fraction", "evaluate.guidance_scale"}
FROM_LIT = {"hub": {"dataset.repo", *LIT}, "imagefolder": LIT, "webdataset": LIT, "parquet": LIT}
MUST_FOLLOW = {
    "params.yaml": {"hub": {"dataset.repo"}},
    "lora.yaml": {"hub": {"dataset.repo"}},
    "sd15-lora.yaml": {"hub": {"dataset.repo"}},
    "sd15-controlnet.yaml": {"hub": {"dataset.repo"}},
    "images.yaml": {"hub": {"dataset.repo"}, "generated": {"precompute.random_flip"}},
    "controlnet.yaml": {
        "hub": {"dataset.repo", "dataset.world", "dataset.num_scenes", "dataset.new_fraction"},
        **{
            source: {"dataset.world", "dataset.num_scenes", "dataset.new_fraction"}
            for source in ("imagefolder", "webdataset", "parquet")
        },
    },
    "relight.yaml": FROM_LIT,
    "relight-by-map.yaml": FROM_LIT,
    "sd15-ic-light.yaml": {
        "generated": {
            *("dataset.world", "dataset.new_fraction", "dataset.condition_columns.mask"),
            "sample.images_per_prompt",
        },
        "hub": {"dataset.repo", "dataset.condition_columns.mask"},
        "webdataset": {"dataset.condition_columns.mask"},
        "parquet": {"dataset.condition_columns.mask"},
    },
    "scratch.yaml": {
        "hub": {"dataset.repo", "dataset.num_scenes"},
        **{source: {"dataset.num_scenes"} for source in ("imagefolder", "webdataset", "parquet")},
    },
    "sd15.yaml": {
        "generated": {"dataset.repo", "precompute.random_flip"},
        **{source: {"dataset.repo"} for source in ("imagefolder", "webdataset", "parquet")},
    },
}
"""Keys that must change with `dataset.source`, by the file and the source that it is switched to."""


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("path", [SHIPPED, *sorted((ROOT / "recipes").glob("*.yaml"))], ids=lambda path: path.name)
def test_switching_the_source_alone(path, source):
    tree = load_params(path).model_dump()
    tree["dataset"]["source"] = source
    expected = MUST_FOLLOW[path.name].get(source, set())
    if not expected:
        assert check_params(tree).dataset.source == source
        return
    faults = message(tree).split("\n")[1:]
    assert {fault.split(" = ")[0].strip() for fault in faults} == expected
    assert len(faults) == len(expected)


@pytest.mark.parametrize("value", ["32", None, 0, 2.5, True])
def test_a_rule_is_silent_about_a_field_that_is_faulty_itself(value):
    head, fault = message(changed(train__batch_size=value)).split("\n")
    assert head == "params.yaml has 1 fault:"
    assert fault.startswith(f"  train.batch_size = {value!r}: input should be ")


@pytest.mark.parametrize(
    "key", ["seed", "train__batch_size", "train__lr", "train__max_grad_norm", "dataset__num_workers"]
)
@pytest.mark.parametrize("value", [True, "1", "1e-4", [1]])
def test_only_numbers_are_numbers(key, value):
    assert f"  {key.replace('__', '.')} = {value!r}: input should be a valid " in message(changed(**{key: value}))


def test_params_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_params(SHIPPED).train.lr = 1.0


def test_every_field_and_section_is_described():
    def fields(section: type[Section], place: str = ""):
        assert section.__doc__, section
        for key, info in section.model_fields.items():
            if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
                yield from fields(info.annotation, f"{key}.")
            else:
                yield f"{place}{key}", info.description

    described = dict(fields(Params))
    assert {"seed", "base.path", "train.lr", "evaluate.num_bootstrap"} <= set(described)
    assert [key for key, description in described.items() if not description] == []


@pytest.mark.parametrize(("scaling", "lr"), [("none", 1e-4), ("sqrt", 4e-4), ("linear", 16e-4)])
def test_lr_scaling(scaling, lr):
    """At sixteen times the reference batch: as it is, times 4, times 16."""
    reference = None if scaling == "none" else 2
    assert scaled_lr(1e-4, scaling, 32, reference) == pytest.approx(lr)
    tree = changed(
        train__lr=1e-4, train__batch_size=32, train__lr_scaling=scaling, train__lr_reference_batch_size=reference
    )
    assert peak_lr(check_params(tree).train) == pytest.approx(lr)


def test_every_schedule_of_diffusers_can_be_chosen():
    from diffusers.optimization import SchedulerType

    from sdtrain.params.schema import TrainParams

    chosen = get_args(TrainParams.model_fields["lr_scheduler"].annotation)
    assert set(chosen) == {schedule.value for schedule in SchedulerType}


def test_a_faulty_item_of_a_list_is_named():
    assert "train.resume_reset.0 = 'rate': must be one of 'lr', 'scheduler', 'optimizer'" in message(
        changed(train__resume_reset=["rate"])
    )


@pytest.mark.parametrize("targets", ["attention", "linear", "conv", ["to_q"], ["attn2.to_k", "conv_in"]])
def test_target_modules_are_a_set_or_a_list(targets):
    params = check_params(changed(method={**LORA, "target_modules": targets}))
    assert params.method.target_modules == targets
    assert params.model_dump()["method"]["target_modules"] == targets


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        ("atention", "= 'atention': must be one of 'attention', 'linear', 'conv'; nearest is 'attention'"),
        ([], "= []: list should have at least 1 item after validation, not 0"),
        (["to_q", ""], ".1 = '': string should have at least 1 character"),
        ([3], ".0 = 3: input should be a valid string"),
        (3, "= 3: must be one of 'attention', 'linear', 'conv'"),
        (None, "= None: must be one of"),
    ],
)
def test_faulty_target_modules_are_one_fault(targets, says):
    head, fault = message(changed(method={**LORA, "target_modules": targets})).split("\n")
    assert head == "params.yaml has 1 fault:"
    assert says in fault
    assert fault.startswith("  method.target_modules")


def test_rules_are_silent_about_a_methods_faulty_field():
    """Its place in pydantic's errors has the method's name in it."""
    head, fault = message(changed(method={**LORA, "use_dora": 1})).split("\n")
    assert (head, fault) == ("params.yaml has 1 fault:", "  method.use_dora = 1: input should be a valid boolean")


class OtherParams(Section):
    name: Literal["other"]
    rank: int


class TwoMethods(Params):
    """As the params will be once there is a second method."""

    method: SerializeAsAny[Annotated[FinetuneParams | OtherParams, Field(discriminator="name")]]


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ({"name": "other", "rank": "4"}, "method.rank = '4': input should be a valid integer"),
        ({"name": "other"}, "method.rank: missing"),
        ({"name": "other", "rank": 4, "ranc": 4}, "method.ranc = 4: unknown key; nearest is method.rank"),
        ({"name": "finetune", "rank": 4}, "method.rank = 4: unknown key; only method.name = 'other' has it"),
        ({"name": "othr", "rank": 4}, "method.name = 'othr': must be one of 'finetune', 'other'; nearest is 'other'"),
        ({"rank": 4}, "method.name: missing"),
    ],
)
def test_a_method_is_told_by_its_name_and_has_its_own_keys(method, says):
    tree = {**changed(train__lrr=1.0), "method": method}
    with pytest.raises(InputError) as caught:
        check_params(tree, schema=TwoMethods)
    assert f"  {says}" in str(caught.value)
    assert "train.lrr = 1.0: unknown key; nearest is train.lr" in str(caught.value)


def test_each_method_of_the_union_is_accepted():
    tree = {**changed(), "method": {"name": "other", "rank": 4}}
    assert check_params(tree, schema=TwoMethods).model_dump() == tree


def test_a_condition_that_does_not_exist_is_named():
    text = message(changed(**{**CONTROLNET, "dataset__condition_columns": {"hnit": "outline"}}))
    names = ", ".join(map(repr, get_args(ConditionName)))
    assert f"\n  dataset.condition_columns.hnit = 'hnit': must be one of {names}; nearest is 'hint'" in text


@pytest.mark.parametrize(
    ("derived", "says"),
    [
        ({"light": "canny"}, "light = 'light': must be one of 'hint', 'foreground', 'mask'; nearest is 'hint'"),
        ({"hint": "cany"}, "hint = 'cany': must be one of 'canny', 'degraded', 'alpha'; nearest is 'canny'"),
    ],
)
def test_a_faulty_derived_condition_is_one_fault(derived, says):
    head, fault = message(
        changed(**{**CONTROLNET, "dataset__condition_columns": {}, "precompute__derived_conditions": derived})
    ).split("\n")
    assert (head, fault) == ("params.yaml has 1 fault:", f"  precompute.derived_conditions.{says}")
