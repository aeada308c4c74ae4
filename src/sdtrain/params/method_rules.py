"""Checks of what a method needs: its start, its conditions, the images drawn under them, and how it is exported."""

from sdtrain.ground.layout import ADAPTER_FILE, CONTROLNET_FILE
from sdtrain.params.relighting_rules import RELIGHTING_RULES
from sdtrain.params.view import Rule, View, has_effect

_CONTROLNET_WORDS = ("shuffle", "instant_id", "instantid")
"""In a ControlNet's file name these change how ComfyUI and A1111's extension read it."""
_EXAMPLES = {"hint": "outline"}
"""The generated worlds' column of a condition, where that isn't the condition's own name."""
_DERIVED = {"hint": "canny", "foreground": "degraded", "mask": "alpha"}
"""How a condition is computed."""


def conditions_of(p: View) -> set[str]:
    """What the method needs besides the caption; of a method outside the package nothing."""
    if p.method.name == "controlnet":
        return {"hint"}
    if p.method.name != "ic_light":
        return set()
    return {
        "foreground",
        *(["background"] if p.method.variant == "fbc" else []),
        *(["light"] if p.method.light == "map" else []),
        *(["mask"] if p.method.consistency_weight else []),
        *(["light_1", "relit_1", "relit_2"] if p.method.consistency_latents == "own" else []),
    }


def _usable_conditions(p: View) -> set[str]:
    """And what it can make use of: a mask puts the foreground on grey."""
    return conditions_of(p) | ({"mask"} if p.method.name == "ic_light" else set())


def sees_no_conditions(p: View) -> tuple[str, str] | None:
    """A `Condition`: the method sees captions only."""
    if not conditions_of(p):
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
    if p.method.name == "ic_light" and p.export.single_file:
        return (
            "export.single_file = True: programs take a single file for a plain Stable Diffusion; IC-Light's own "
            "files, which ComfyUI loads, are always exported; set it to false"
        )
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
    name, needed = p.method.name, conditions_of(p)
    columns, derived = p.dataset.condition_columns, p.precompute.derived_conditions
    if twice := sorted(columns.keys() & derived.keys()):
        return (
            f"dataset.condition_columns.{twice[0]} = {columns[twice[0]]!r}, precompute.derived_conditions.{twice[0]} = "
            f"{derived[twice[0]]!r}: give one of them"
        )
    for key, given in (("dataset.condition_columns", columns), ("precompute.derived_conditions", derived)):
        if unused := sorted(given.keys() - _usable_conditions(p)):
            return f"{key}.{unused[0]} = {given[unused[0]]!r}: method.name = {name!r} sees no {unused[0]}; leave it out"
    if missing := sorted(needed - columns.keys() - derived.keys()):
        column = _EXAMPLES.get(missing[0], missing[0]) if p.dataset.source == "generated" else "COLUMN"
        way = f", or to precompute.derived_conditions, {{{missing[0]}: {_DERIVED.get(missing[0])}}}"
        return (
            f"method.name = {name!r}: needs a {missing[0]} for each image; add it to dataset.condition_columns, "
            f"{{{missing[0]}: {column}}}{way if missing[0] in _DERIVED else ''}"
        )


def _derived_conditions_are_sound(p: View) -> str | None:
    columns, made_of = p.dataset.condition_columns, {"foreground": "mask", "mask": "foreground"}
    if made_of.keys() <= p.precompute.derived_conditions.keys():
        return (
            f"precompute.derived_conditions = {p.precompute.derived_conditions}: foreground and mask are each made of "
            "the other; add the mask to dataset.condition_columns, {mask: COLUMN}, and leave it out here"
        )
    for name, way in p.precompute.derived_conditions.items():
        key = f"precompute.derived_conditions.{name} = {way!r}"
        if way != _DERIVED[name]:
            return f"{key}: a {name} is computed by {_DERIVED[name]!r}"
        needed = made_of.get(name)
        if needed is not None and needed not in columns:
            return f"{key}: is made of each image's {needed}; add it to dataset.condition_columns, {{{needed}: COLUMN}}"


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
    conditions = conditions_of(p)
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
        prompts, conditions = getattr(p, section).prompts, conditions_of(p)
        if conditions and prompts:
            return (
                f"{section}.prompts: method.name = {p.method.name!r} draws held-out images' captions with their "
                f"conditions; set it to [], and {section}.num_held_out to a number"
            )

    return rule


METHOD_RULES: tuple[Rule, ...] = (
    has_effect("base.controlnet_repo", _starts_from_unet), _new_unet_trains, _start_is_there,
    _method_has_its_conditions, _derived_conditions_are_sound, _condition_columns_are_sound,
    _grid_has_rows, _prompts_in_words("sample"), _prompts_in_words("validation"),
    has_effect("sample.num_held_out", sees_no_conditions), has_effect("validation.num_held_out", sees_no_conditions),
    has_effect("export.merged", _not_lora), _dora_is_merged, _single_file_is_full, _name_is_free, *RELIGHTING_RULES,
)  # fmt: skip
