"""Checks across params: each rule finds one fault, or none.

A rule reads the tree through a `View`, so it can be checked even if other fields are faulty, and one
message can name every fault.

A field that has no effect because of other fields must have its neutral value. So no given value is silently ignored,
and changing one key of the shipped params.yaml, such as `dataset.source`, doesn't force changes of others.
"""

import json
from collections.abc import Callable
from typing import Any

from sdtrain.ground.layout import ADAPTER_FILE, CONTROLNET_FILE
from sdtrain.ground.schedules import scaled_lr

NEUTRAL = {
    "base.path": "data/builtin",
    "dataset.path": "data/images",
    "dataset.split": "train",
    "dataset.image_column": "image",
    "dataset.caption_column": "text",
    "dataset.alpha_background": "#ffffff",
    "dataset.condition_columns": {},
    "dataset.world": "shapes",
    "dataset.num_scenes": 2400,
    "dataset.new_fraction": 0.8,
    "precompute.center_crop": True,
    "precompute.derived_conditions": {},
    "train.timestep_sampling": "uniform",
    "train.branch_from": "data/start",
    "train.resume_reset": [],
    "train.ema_schedule": "ramp",
    "train.ema_decay": 0.99,
    "validation.prompts": [],
    "validation.num_inference_steps": 20,
    "validation.guidance_scale": 4.0,
    "export.merged": False,
    "sample.negative_prompt": "",
    "evaluate.num_prompts": 160,
    "evaluate.num_inference_steps": 20,
    "evaluate.guidance_scale": 4.0,
}
"""Values of fields without effect: those of the shipped params.yaml (except for the prompts, which it uses).

Null is neutral, too, for every field that may be null, and the only neutral value of fields not listed here.
"""


_CONTROLNET_WORDS = ("shuffle", "instant_id", "instantid")
"""In a ControlNet's file name these change how ComfyUI and A1111's extension read it."""
CONDITIONS: dict[str, set[str]] = {"finetune": set(), "lora": set(), "controlnet": {"hint"}}
"""What each method sees besides the caption."""


class View:
    """A params tree by attribute; only valid fields can be read."""

    class Faulty(Exception):
        """The field is missing or faulty itself."""

    def __init__(self, tree: dict, faulty: set[tuple[str, ...]], place: tuple[str, ...] = ()) -> None:
        self._tree, self._faulty, self._place = tree, faulty, place

    def __getattr__(self, key: str) -> Any:
        place = (*self._place, key)
        if key not in self._tree or place in self._faulty:
            raise View.Faulty
        value = self._tree[key]
        return View(value, self._faulty, place) if isinstance(value, dict) and len(place) == 1 else value

    def ask(self, rule: "Rule") -> str | None:
        """The fault that a rule finds; None if it finds none, or needs a field that is faulty itself."""
        try:
            return rule(self)
        except View.Faulty:
            return None


Rule = Callable[[View], str | None]


def _hub_needs_repo(section: str) -> Rule:
    def rule(p: View) -> str | None:
        if getattr(p, section).source == "hub" and getattr(p, section).repo is None:
            return f"{section}.repo = None: {section}.source = 'hub' needs a repository, owner/name"

    return rule


def _source_reads_it(key: str, *sources: str) -> Rule:
    """The field must be neutral unless its section's source is one of `sources`, those that read it."""
    section, field = key.split(".")

    def rule(p: View) -> str | None:
        source, value = getattr(p, section).source, getattr(getattr(p, section), field)
        if source not in sources and not _is_neutral(key, value):
            return (
                f"{key} = {value!r}: {section}.source = {source!r} doesn't read it; "
                f"set {section}.source: {sources[0]}, or {key}: {_neutral(key)}"
            )

    return rule


Condition = Callable[[View], tuple[str, str] | None]
"""Returns why a field has no effect, and how to change that; None if it has one."""


def _has_effect(key: str, without: Condition, neutral: str | None = None) -> Rule:
    """The field must be neutral if the condition `without` applies; the message suggests `neutral`."""
    section, field = key.split(".")

    def rule(p: View) -> str | None:
        value, found = getattr(getattr(p, section), field), without(p)
        if found and not _is_neutral(key, value):
            cause, way = found
            return f"{key} = {value!r}: has no effect with {cause}; set it to {neutral or _neutral(key)}, or {way}"

    return rule


def _is_neutral(key: str, value: Any) -> bool:
    return value is None or value == NEUTRAL.get(key)


def _neutral(key: str) -> str:
    """The neutral value as YAML writes it."""
    value = NEUTRAL.get(key)
    return value if isinstance(value, str) and value[:1].isalpha() else json.dumps(value)


def _generated(p: View) -> tuple[str, str] | None:
    if p.dataset.source == "generated":
        return "dataset.source = 'generated', whose images are opaque squares", "dataset.source to imagefolder"


def _not_generated(p: View) -> tuple[str, str] | None:
    if p.dataset.source != "generated":
        return f"dataset.source = {p.dataset.source!r}, which has no images to measure", "dataset.source to generated"


def _no_trackers(p: View) -> tuple[str, str] | None:
    if not p.train.trackers:
        return "train.trackers = []: only trackers show images", "train.trackers to [tensorboard]"


def _no_images(p: View) -> tuple[str, str] | None:
    if p.train.trackers and not p.validation.prompts and p.validation.num_held_out is None:
        if _conditions(p):
            return "validation.num_held_out = None", "validation.num_held_out to a number"
        return "validation.prompts = []", "add prompts there"
    return _no_trackers(p)


def _conditions(p: View) -> set[str]:
    return CONDITIONS.get(p.method.name, set())


def _sees_no_conditions(p: View) -> tuple[str, str] | None:
    if not _conditions(p):
        return f"method.name = {p.method.name!r}, which sees captions only", "use prompts"


def _starts_from_unet(p: View) -> tuple[str, str] | None:
    if p.method.name != "controlnet":
        return f"method.name = {p.method.name!r}", "method.name to controlnet"
    if p.method.start != "base":
        return f"method.start = {p.method.start!r}", "method.start to base"


def _new_unet_trains(p: View) -> str | None:
    if p.base.unet_config is not None and p.method.name in ("lora", "controlnet"):
        return (
            f"base.unet_config = {p.base.unet_config!r}: is a UNet that was never trained, and method.name = "
            f"{p.method.name!r} leaves it so; use method.name: finetune, or null"
        )


def _start_is_there(p: View) -> str | None:
    is_base = p.method.name == "controlnet" and p.method.start == "base"
    if is_base and p.base.source == "hub" and p.base.controlnet_repo is None:
        return (
            "method.start = 'base': with base.source = 'hub' the ControlNet to start from comes from "
            "base.controlnet_repo, which is null; name one there, or set method.start to unet"
        )


def _no_ema(p: View) -> tuple[str, str] | None:
    if not p.train.use_ema:
        return "train.use_ema = False", "train.use_ema to true"


def _no_guidance(p: View) -> tuple[str, str] | None:
    if p.sample.guidance_scale <= 1:
        return f"sample.guidance_scale = {p.sample.guidance_scale}, which is none", "sample.guidance_scale above 1"


def _no_branch(p: View) -> tuple[str, str] | None:
    if p.train.resume != "branch":
        return f"train.resume = {p.train.resume!r}", "train.resume to branch"


def _one_row(p: View) -> tuple[str, str] | None:
    if p.train.batch_size == 1:
        return "train.batch_size = 1, which is one stratum", "raise train.batch_size"


def _lr_setting_has_effect(field: str, neutral: float, scheduler: str) -> Rule:
    def rule(p: View) -> str | None:
        value = getattr(p.train, field)
        if p.train.lr_scheduler != scheduler and value != neutral:
            return f"train.{field} = {value}: only train.lr_scheduler = {scheduler!r} uses it; set it to {neutral}"

    return rule


def _polynomial_falls(p: View) -> str | None:
    if p.train.lr_scheduler == "polynomial" and _reference_batch_is_stated(p) is None:
        lr = scaled_lr(p.train.lr, p.train.lr_scaling, p.train.batch_size, p.train.lr_reference_batch_size)
        if lr <= 1e-7:
            return f"train.lr = {p.train.lr}: train.lr_scheduler = 'polynomial' decays to 1e-7; use a larger lr"


def _reference_batch_is_stated(p: View) -> str | None:
    scaling, reference = p.train.lr_scaling, p.train.lr_reference_batch_size
    if scaling != "none" and reference is None:
        return f"train.lr_reference_batch_size = None: train.lr_scaling = {scaling!r} needs the batch at which lr holds"
    if scaling == "none" and reference is not None:
        return (
            f"train.lr_reference_batch_size = {reference}: has no effect with train.lr_scaling = 'none'; "
            "set it to null, or train.lr_scaling to sqrt or linear"
        )


def _step_rules_are_sound(p: View) -> str | None:
    rules, scheduler = p.train.lr_step_rules, p.train.lr_scheduler
    if scheduler != "piecewise_constant":
        if rules is not None:
            return f"train.lr_step_rules = {rules!r}: only train.lr_scheduler = 'piecewise_constant' uses it; use null"
        return None
    form = "write factor:step pairs with rising steps and a last factor, e.g. '1:500,0.1:800,0.01'"
    if rules is None:
        return f"train.lr_step_rules = None: train.lr_scheduler = 'piecewise_constant' needs them; {form}"
    try:
        *pairs, last = rules.split(",")
        steps = [int(pair.split(":")[1]) for pair in pairs]
        factors = [float(pair.split(":")[0]) for pair in pairs] + [float(last)]
        sound = all(pair.count(":") == 1 for pair in pairs) and all(0 <= factor < float("inf") for factor in factors)
    except (ValueError, IndexError):
        sound = False
    if not sound or steps != sorted(set(steps)) or (steps and steps[0] < 1):
        return f"train.lr_step_rules = {rules!r}: {form}"


def _terminal_noise_needs_velocity(p: View) -> str | None:
    if p.train.zero_terminal_snr and p.train.prediction_type == "epsilon":
        return (
            "train.zero_terminal_snr = True: with train.prediction_type = 'epsilon' the last timestep is pure noise, "
            "and nothing is learned from predicting it; use train.prediction_type: v_prediction"
        )


def _ema_settings_fit(p: View) -> str | None:
    if not p.train.use_ema:
        return None
    wanted = {"ramp": {"ema_decay"}, "warmup": {"ema_decay", "ema_inv_gamma", "ema_power"}}
    schedule = p.train.ema_schedule
    for field in ("ema_decay", "ema_inv_gamma", "ema_power", "ema_sigma_rel"):
        value = getattr(p.train, field)
        if field in wanted.get(schedule, {"ema_sigma_rel"}):
            if value is None:
                return f"train.{field} = None: train.ema_schedule = {schedule!r} needs a number"
        elif value is not None:
            return f"train.{field} = {value}: train.ema_schedule = {schedule!r} doesn't use it; set it to null"


def _listed_once(field: str) -> Rule:
    def rule(p: View) -> str | None:
        values = getattr(p.train, field)
        if len(set(values)) < len(values):
            return f"train.{field} = {values}: lists a value twice"

    return rule


def _revision_needs_repo(part: str) -> Rule:
    def rule(p: View) -> str | None:
        revision = getattr(p.base, f"{part}_revision")
        if revision is not None and getattr(p.base, f"{part}_repo") is None:
            return f"base.{part}_revision = {revision!r}: has no effect without base.{part}_repo"

    return rule


def _steps_or_epochs(p: View) -> str | None:
    steps, epochs = p.train.max_steps, p.train.max_epochs
    if (steps is None) == (epochs is None):
        return f"train.max_steps = {steps}, train.max_epochs = {epochs}: give exactly one, and null for the other"


def _micro_batch_divides(p: View) -> str | None:
    micro, effective = p.train.micro_batch_size, p.train.batch_size
    if effective % micro:
        return f"train.micro_batch_size = {micro}: must divide train.batch_size = {effective}"


def _constant_has_no_warmup(p: View) -> str | None:
    scheduler = p.train.lr_scheduler
    if p.train.lr_warmup_steps and scheduler in ("constant", "piecewise_constant"):
        return (
            f"train.lr_warmup_steps = {p.train.lr_warmup_steps}: train.lr_scheduler = {scheduler!r} has no warm-up; "
            "use 'constant_with_warmup', or 0"
        )


def _warmup_ends(p: View) -> str | None:
    warmup, steps = p.train.lr_warmup_steps, p.train.max_steps
    if steps is not None and warmup >= steps:
        return f"train.lr_warmup_steps = {warmup}: must be below train.max_steps = {steps}"


def _patience_can_end(p: View) -> str | None:
    patience, every, steps = p.train.early_stopping_patience, p.validation.every_n_steps, p.train.max_steps
    if patience is None or steps is None:
        return None
    earliest = (patience + 1) * every  # if the first validation is the best
    if earliest >= steps:
        return (
            f"train.early_stopping_patience = {patience}: has no effect with validation.every_n_steps = {every}, as it "
            f"could stop at step {earliest} at the earliest, and train.max_steps = {steps}; lower one of these, or set "
            "it to null"
        )


def _export_has_weights(p: View) -> str | None:
    if p.export.weights == "ema" and not p.train.use_ema:
        return "export.weights = 'ema': train.use_ema = False keeps no EMA; use 'raw', or train.use_ema: true"


def _not_lora(p: View) -> tuple[str, str] | None:
    if p.method.name != "lora":
        return f"method.name = {p.method.name!r}, which has no adapter to merge", "method.name to lora"


def _dora_is_merged(p: View) -> str | None:
    if p.method.name == "lora" and p.method.use_dora and not p.export.merged:
        return (
            "export.merged = False: with method.use_dora = True only the merged model is exported, because programs "
            "differ in how they read DoRA adapters; set it to true"
        )


def _name_is_free(p: View) -> str | None:
    """Programs and Diffusers read meaning into some files' names."""
    name, method = p.export.name.casefold(), p.method.name
    adapter, taken = ADAPTER_FILE.removesuffix(".safetensors"), CONTROLNET_FILE.removesuffix(".safetensors")
    if method == "lora" and name.endswith(adapter):
        return (
            f"export.name = {p.export.name!r}: Diffusers would take {p.export.name}.safetensors for {ADAPTER_FILE}, "
            "which is written, too; choose another name"
        )
    if method == "controlnet" and name == taken:
        return f"export.name = {p.export.name!r}: {CONTROLNET_FILE} is written, too; choose another name"
    for word in _CONTROLNET_WORDS:
        if method == "controlnet" and word in name:
            return (
                f"export.name = {p.export.name!r}: by {word!r} in its name ComfyUI and A1111 take a ControlNet for "
                "one of another kind; choose another name"
            )


def _single_file_is_full(p: View) -> str | None:
    if p.method.name == "controlnet" and p.export.single_file:
        return (
            "export.single_file = True: is for full models; a ControlNet's own file, which ComfyUI and A1111 load, is "
            "always exported; set it to false"
        )
    if p.method.name == "lora" and p.export.single_file and not p.export.merged:
        return (
            "export.single_file = True: is for full models, and with export.merged = False only the adapter is "
            "exported, whose own file ComfyUI and A1111 load; set it to false, or export.merged to true"
        )


def _method_has_its_conditions(p: View) -> str | None:
    name, needed = p.method.name, _conditions(p)
    columns, derived = p.dataset.condition_columns, p.precompute.derived_conditions
    if twice := sorted(columns.keys() & derived.keys()):
        return (
            f"dataset.condition_columns.{twice[0]} = {columns[twice[0]]!r}, precompute.derived_conditions.{twice[0]} = "
            f"{derived[twice[0]]!r}: give one of them"
        )
    for key, given in (("dataset.condition_columns", columns), ("precompute.derived_conditions", derived)):
        if unused := sorted(given.keys() - needed):
            return f"{key}.{unused[0]} = {given[unused[0]]!r}: method.name = {name!r} sees no {unused[0]}; leave it out"
    if missing := sorted(needed - columns.keys() - derived.keys()):
        column = "outline" if p.dataset.source == "generated" else "COLUMN"
        return (
            f"method.name = {name!r}: needs a {missing[0]} for each image; set dataset.condition_columns to "
            f"{{{missing[0]}: {column}}}, or precompute.derived_conditions to {{{missing[0]}: canny}}"
        )


def _condition_columns_are_sound(p: View) -> str | None:
    for name, column in p.dataset.condition_columns.items():
        if "*" in column and p.dataset.source != "imagefolder":
            return (
                f"dataset.condition_columns.{name} = {column!r}: only an imagefolder has files beside its images; name "
                "a column"
            )
        for key in ("image_column", "caption_column"):
            if column == getattr(p.dataset, key):
                return (
                    f"dataset.condition_columns.{name} = {column!r}: is dataset.{key}, too; name the column that tells "
                    "the model more"
                )


def _grid_has_rows(p: View) -> str | None:
    conditions = _conditions(p)
    if not conditions and not p.sample.prompts:
        return "sample.prompts = []: the grid needs a prompt or more"
    if conditions and p.sample.num_held_out is None:
        return (
            f"sample.num_held_out = None: with method.name = {p.method.name!r} the grid shows held-out captions and "
            "conditions; give their number"
        )


def _prompts_in_words(section: str) -> Rule:
    """Images under conditions take their captions from the held-out images."""

    def rule(p: View) -> str | None:
        prompts, conditions = getattr(p, section).prompts, _conditions(p)
        if conditions and prompts:
            return (
                f"{section}.prompts: method.name = {p.method.name!r} draws held-out images' captions with their "
                f"conditions; set it to [], and {section}.num_held_out to a number"
            )

    return rule


def _captions_survive_the_flip(p: View) -> str | None:
    if p.dataset.source == "generated" and p.precompute.random_flip:
        return (
            "precompute.random_flip = True: the captions of dataset.source = 'generated' say left and right, "
            "which is wrong for a flipped image; use false"
        )


RULES: tuple[Rule, ...] = (
    _hub_needs_repo("base"), _hub_needs_repo("dataset"),
    _source_reads_it("base.repo", "hub"), _source_reads_it("base.revision", "hub"),
    _source_reads_it("base.path", "local"),
    _source_reads_it("dataset.repo", "hub"), _source_reads_it("dataset.revision", "hub"),
    _source_reads_it("dataset.split", "hub"),
    _source_reads_it("dataset.path", "imagefolder", "webdataset", "parquet"),
    _source_reads_it("dataset.image_column", "imagefolder", "webdataset", "parquet", "hub"),
    _source_reads_it("dataset.caption_column", "imagefolder", "webdataset", "parquet", "hub"),
    _source_reads_it("dataset.group_column", "imagefolder", "webdataset", "parquet", "hub"),
    _source_reads_it("dataset.world", "generated"), _source_reads_it("dataset.num_scenes", "generated"),
    _source_reads_it("dataset.new_fraction", "generated"),
    _has_effect("dataset.alpha_background", _generated), _has_effect("precompute.center_crop", _generated),
    _has_effect("evaluate.num_prompts", _not_generated), _has_effect("evaluate.num_inference_steps", _not_generated),
    _has_effect("evaluate.guidance_scale", _not_generated),
    _has_effect("validation.prompts", _no_trackers), _has_effect("validation.num_inference_steps", _no_images),
    _has_effect("validation.guidance_scale", _no_images), _has_effect("sample.negative_prompt", _no_guidance),
    _has_effect("train.timestep_sampling", _one_row),
    _has_effect("train.ema_schedule", _no_ema), _has_effect("train.ema_decay", _no_ema, neutral="null"),
    _has_effect("train.ema_inv_gamma", _no_ema), _has_effect("train.ema_power", _no_ema),
    _has_effect("train.ema_sigma_rel", _no_ema), _patience_can_end,
    _revision_needs_repo("vae"), _revision_needs_repo("text_encoder"), _steps_or_epochs, _micro_batch_divides,
    _lr_setting_has_effect("lr_num_cycles", 1, "cosine_with_restarts"),
    _lr_setting_has_effect("lr_power", 1.0, "polynomial"), _polynomial_falls,
    _reference_batch_is_stated, _step_rules_are_sound, _terminal_noise_needs_velocity, _ema_settings_fit,
    _has_effect("train.branch_from", _no_branch), _has_effect("train.resume_reset", _no_branch),
    _listed_once("resume_reset"), _listed_once("trackers"),
    _constant_has_no_warmup, _warmup_ends, _export_has_weights, _captions_survive_the_flip,
    _has_effect("base.controlnet_repo", _starts_from_unet), _revision_needs_repo("controlnet"),
    _new_unet_trains, _start_is_there, _method_has_its_conditions, _condition_columns_are_sound,
    _grid_has_rows, _prompts_in_words("sample"), _prompts_in_words("validation"),
    _has_effect("sample.num_held_out", _sees_no_conditions),
    _has_effect("validation.num_held_out", _sees_no_conditions), _has_effect("validation.num_held_out", _no_trackers),
    _has_effect("export.merged", _not_lora), _dora_is_merged, _single_file_is_full, _name_is_free,
)  # fmt: skip
