"""`params.yaml`, typed. Every field is declared, bounded and documented here, and nowhere else.

`load_params` is the only reader of the file. It refuses every fault in one message, before any
model loads. Code holds no second default: all keys must be present.
"""

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import ErrorDetails

from sdtrain.errors import InputError

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Text = Annotated[str, StringConstraints(min_length=1)]
HubRepo = Annotated[str, StringConstraints(pattern=r"^[\w.-]+/[\w.-]+$")]


class Section(BaseModel):
    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class BaseParams(Section):
    """The base model: where its frozen parts and the UNet's first weights come from."""

    source: Literal["local", "hub"]
    """`local`: a Diffusers folder at `path`. `hub`: the repository `repo` at `revision`."""
    path: Text
    """Folder of the base model; DVC watches it, so it must exist even where `source` is `hub`."""
    repo: HubRepo | None
    """Hub repository, `owner/name`, in the Diffusers layout, with safetensors."""
    revision: Text | None
    """Branch, tag or commit; null is the newest. The commit it stood for is recorded."""
    vae_repo: HubRepo | None
    """Take the VAE from this hub repository instead (its root, or its `vae/`)."""
    vae_revision: Text | None
    """Branch, tag or commit of `vae_repo`."""
    text_encoder_repo: HubRepo | None
    """Take text encoder and tokenizer from this hub repository (`text_encoder/`, `tokenizer/`) instead."""
    text_encoder_revision: Text | None
    """Branch, tag or commit of `text_encoder_repo`."""
    unet_config: dict[str, Any] | None
    """Settings of Diffusers' UNet2DConditionModel: train a UNet of this structure from scratch."""


class DatasetParams(Section):
    """Captioned pictures, and which of them are held out."""

    source: Literal["generated", "hub", "imagefolder", "webdataset", "parquet"]
    """`generated`: scenes of coloured shapes. The others are read with Hugging Face Datasets."""
    path: Text
    """Folder (or one file) of the pictures; DVC watches it, so it must exist whatever `source` is."""
    repo: HubRepo | None
    """Hub data set, `owner/name`."""
    revision: Text | None
    """Branch, tag or commit of `repo`; null is the newest. The commit it stood for is recorded."""
    split: Text
    """Split of the hub data set to read."""
    image_column: Text
    """Column that holds the picture (`jpg`, `png`, … in WebDataset tars; `image` in an image folder)."""
    caption_column: Text
    """Column that holds the caption (`txt` in WebDataset tars)."""
    max_train_samples: PositiveInt | None
    """Stop at this many training pictures, taken in an order drawn from `seed`; null takes all."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)]
    """Share of the pictures held out, chosen by a hash of their pixels: copies stay on one side."""
    alpha_background: Annotated[str, StringConstraints(pattern=r"^#[0-9a-fA-F]{6}$")]
    """Colour behind transparent pictures, `#rrggbb`."""
    num_workers: NonNegativeInt
    """Threads that decode and check pictures; 0 works in the main thread."""
    num_scenes: PositiveInt
    """`generated` only: how many scenes to draw."""
    new_fraction: Annotated[float, Field(ge=0, le=1)]
    """`generated` only: share of the scenes that show a concept the built-in base has never seen."""


class PrecomputeParams(Section):
    """The cache of VAE posteriors and CLIP token ids."""

    resolution: PositiveInt
    """Pictures are resized (shorter side) and cropped to this square, in px; a multiple of the VAE's factor."""
    center_crop: bool
    """true crops the middle; false crops where a draw from (`seed`, picture) says, once for all epochs."""
    random_flip: bool
    """Also cache the mirror's own encoding; `train` draws one of the two at every visit."""
    batch_size: PositiveInt
    """Pictures per VAE call. Changes speed and memory only."""


class TrainParams(Section):
    """UNet training."""

    lr: Annotated[float, Field(gt=0)]
    """Learning rate of AdamW, at the scheduler's top."""
    max_steps: PositiveInt | None
    """Optimizer steps; give this or `max_epochs`."""
    max_epochs: PositiveInt | None
    """Passes over the training pictures; give this or `max_steps`."""
    batch_size: PositiveInt
    """Effective batch: pictures per optimizer step, whatever the number of processes."""
    micro_batch_size: PositiveInt
    """Pictures per forward pass and process; accumulation follows from it and `batch_size`."""
    precision: Literal["fp32", "bf16", "fp16"]
    """Forward and backward pass; weights, optimizer and EMA stay in fp32."""
    weight_decay: Annotated[float, Field(ge=0)]
    """AdamW's decoupled weight decay."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)]
    """AdamW's β₁."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)]
    """AdamW's β₂."""
    adam_epsilon: Annotated[float, Field(gt=0)]
    """AdamW's ε."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None
    """Clip the gradient's global L2 norm to this; null doesn't clip."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
    """Diffusers' schedule of the learning rate over the run."""
    lr_num_cycles: PositiveInt
    """`cosine_with_restarts` only: how often the cosine starts anew."""
    lr_power: Annotated[float, Field(gt=0)]
    """`polynomial` only: its exponent; 1 is linear."""
    lr_warmup_steps: NonNegativeInt
    """Optimizer steps of linear warm-up; `constant` has none."""
    gradient_checkpointing: bool
    """Recompute activations in the backward pass: less memory, about a third slower."""
    prediction_type: Literal["epsilon", "v_prediction"]
    """What the UNet predicts: the noise, or the velocity (Salimans & Ho 2022)."""
    caption_dropout: Annotated[float, Field(ge=0, lt=1)]
    """Share of visits that see the empty caption, which classifier-free guidance needs."""
    use_ema: bool
    """Keep an exponential moving average of the weights, too."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)]
    """The EMA's decay at its longest; it warms up as min((1+n)/(10+n), ema_decay)."""
    log_every_n_steps: PositiveInt
    """Optimizer steps between rows of loss, learning rate and speed."""


class ValidationParams(Section):
    """The held-out loss and the pictures during training."""

    every_n_steps: PositiveInt
    """Optimizer steps between validations; the last step always validates, and step 0 gives the base's loss."""
    num_timesteps: PositiveInt
    """Timesteps at which each held-out picture is noised, in the middle of as many equal bins."""
    max_samples: PositiveInt
    """Held-out pictures used at each validation."""
    batch_size: PositiveInt
    """Noised latents per UNet call. Changes speed and memory only."""
    prompts: list[Text]
    """Prompts drawn into TensorBoard at each validation after step 0, the same noise each time; may be empty."""
    num_inference_steps: PositiveInt
    """DPM-Solver++ steps of these pictures."""
    guidance_scale: Annotated[float, Field(ge=0)]
    """Classifier-free guidance of these pictures; 1 or less is none."""


class ExportParams(Section):
    """Which weights become the Diffusers model."""

    checkpoint: Literal["best", "last"]
    """`best` by held-out loss, or the `last`."""
    weights: Literal["ema", "raw"]
    """The moving average, or the weights the optimizer worked on."""
    dtype: Literal["fp32", "fp16"]
    """Number format of the exported safetensors."""


class SampleParams(Section):
    """The grid of pictures, base beside trained."""

    prompts: Annotated[list[Text], Field(min_length=1)]
    """One row of the grid each."""
    negative_prompt: str
    """What guidance steers away from; the empty text is the usual one."""
    images_per_prompt: PositiveInt
    """Pictures per prompt and model."""
    num_inference_steps: PositiveInt
    """DPM-Solver++ steps."""
    guidance_scale: Annotated[float, Field(ge=0)]
    """Classifier-free guidance; 1 or less is none."""
    batch_size: PositiveInt
    """Pictures drawn at once. Changes speed and memory only."""


class EvaluateParams(Section):
    """Numbers on held-out data."""

    num_timesteps: PositiveInt
    """Timesteps at which each held-out picture is noised, in the middle of as many equal bins."""
    max_samples: PositiveInt
    """Held-out pictures used for the loss."""
    num_prompts: PositiveInt
    """`generated` only: prompts of each kind (new and known concepts) whose pictures are measured."""
    num_inference_steps: PositiveInt
    """DPM-Solver++ steps of these pictures."""
    guidance_scale: Annotated[float, Field(ge=0)]
    """Classifier-free guidance of these pictures; 1 or less is none."""
    batch_size: PositiveInt
    """Latents per UNet call. Changes speed and memory only."""
    num_bootstrap: Annotated[int, Field(ge=100)]
    """Bootstrap resamples behind the 95 % confidence intervals."""


class Params(Section):
    """The whole of params.yaml."""

    seed: Annotated[int, Field(ge=0, lt=2**32)]
    """Every draw of the pipeline is a function of this, its purpose and its place."""
    base: BaseParams
    dataset: DatasetParams
    precompute: PrecomputeParams
    train: TrainParams
    validation: ValidationParams
    export: ExportParams
    sample: SampleParams
    evaluate: EvaluateParams


def load_params(path: Path) -> Params:
    """Read and check a params file.

    Raises:
        InputError: one message that names every fault: key, value, what is wrong, nearest name.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Yaml12Loader)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; run from the project's root") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    return check_params(tree, name=str(path))


def check_params(tree: object, name: str = "params.yaml") -> Params:
    """Type and check a tree of params as YAML gives it; raises as `load_params`."""
    if not isinstance(tree, dict):
        raise InputError(f"{name}: expected a mapping of sections, got {type(tree).__name__}")
    params, details = None, []
    try:
        params = Params.model_validate(tree)
    except ValidationError as error:
        details = error.errors()
    view = _View(tree, faulty={tuple(map(str, detail["loc"])) for detail in details})
    faults = [_describe(detail) for detail in details] + [fault for rule in _RULES if (fault := view.ask(rule))]
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise InputError("\n".join([f"{name} has {count}:", *(f"  {fault}" for fault in faults)]))
    assert params is not None, "no fault, so the params are valid"
    return params


class _View:
    """A params tree by attribute, of which only sound fields can be read."""

    class Faulty(Exception):
        """The field is missing or faulty itself."""

    def __init__(self, tree: dict, faulty: set[tuple[str, ...]], place: tuple[str, ...] = ()) -> None:
        self._tree, self._faulty, self._place = tree, faulty, place

    def __getattr__(self, key: str) -> Any:
        place = (*self._place, key)
        if key not in self._tree or place in self._faulty:
            raise _View.Faulty
        value = self._tree[key]
        return _View(value, self._faulty, place) if isinstance(value, dict) and len(place) == 1 else value

    def ask(self, rule: "_Rule") -> str | None:
        """The fault that a rule finds; None where it finds none, or needs a field that is faulty itself."""
        try:
            return rule(self)
        except _View.Faulty:
            return None


_Rule = Callable[[_View], str | None]


def _hub_needs_repo(section: str) -> _Rule:
    def rule(p: _View) -> str | None:
        if getattr(p, section).source == "hub" and getattr(p, section).repo is None:
            return f"{section}.repo = None: {section}.source = 'hub' needs a repository, owner/name"

    return rule


def _source_reads_it(section: str, field: str, unread: str | None, *sources: str) -> _Rule:
    """`field` must be `unread` unless the section's source is one of `sources`, which read it."""

    def rule(p: _View) -> str | None:
        source, value = getattr(p, section).source, getattr(getattr(p, section), field)
        if source not in sources and value != unread:
            default = "null" if unread is None else unread
            return (
                f"{section}.{field} = {value!r}: {section}.source = {source!r} doesn't read it; "
                f"set {section}.source: {sources[0]}, or {section}.{field}: {default}"
            )

    return rule


def _lr_setting_has_effect(field: str, neutral: float, scheduler: str) -> _Rule:
    def rule(p: _View) -> str | None:
        value = getattr(p.train, field)
        if p.train.lr_scheduler != scheduler and value != neutral:
            return f"train.{field} = {value}: only train.lr_scheduler = {scheduler!r} uses it; set it to {neutral}"

    return rule


def _polynomial_falls(p: _View) -> str | None:
    if p.train.lr_scheduler == "polynomial" and p.train.lr <= 1e-7:
        return f"train.lr = {p.train.lr}: train.lr_scheduler = 'polynomial' falls to 1e-7; take a larger lr"


def _revision_needs_repo(part: str) -> _Rule:
    def rule(p: _View) -> str | None:
        revision = getattr(p.base, f"{part}_revision")
        if revision is not None and getattr(p.base, f"{part}_repo") is None:
            return f"base.{part}_revision = {revision!r}: has no effect without base.{part}_repo"

    return rule


def _steps_or_epochs(p: _View) -> str | None:
    steps, epochs = p.train.max_steps, p.train.max_epochs
    if (steps is None) == (epochs is None):
        return f"train.max_steps = {steps}, train.max_epochs = {epochs}: give exactly one, and null for the other"


def _micro_batch_divides(p: _View) -> str | None:
    micro, whole = p.train.micro_batch_size, p.train.batch_size
    if whole % micro:
        return f"train.micro_batch_size = {micro}: must divide train.batch_size = {whole}"


def _constant_has_no_warmup(p: _View) -> str | None:
    if p.train.lr_warmup_steps and p.train.lr_scheduler == "constant":
        return (
            f"train.lr_warmup_steps = {p.train.lr_warmup_steps}: train.lr_scheduler = 'constant' has no warm-up; "
            "use 'constant_with_warmup', or 0"
        )


def _warmup_ends(p: _View) -> str | None:
    warmup, steps = p.train.lr_warmup_steps, p.train.max_steps
    if steps is not None and warmup >= steps:
        return f"train.lr_warmup_steps = {warmup}: must be below train.max_steps = {steps}"


def _export_has_weights(p: _View) -> str | None:
    if p.export.weights == "ema" and not p.train.use_ema:
        return "export.weights = 'ema': train.use_ema = False keeps no EMA; use 'raw', or train.use_ema: true"


def _captions_survive_the_flip(p: _View) -> str | None:
    if p.dataset.source == "generated" and p.precompute.random_flip:
        return (
            "precompute.random_flip = True: the captions of dataset.source = 'generated' say left and right, "
            "which a mirror makes false; use false"
        )


_RULES: tuple[_Rule, ...] = (
    _hub_needs_repo("base"), _hub_needs_repo("dataset"),
    _source_reads_it("base", "repo", None, "hub"), _source_reads_it("base", "revision", None, "hub"),
    _source_reads_it("base", "path", "data/builtin", "local"),
    _source_reads_it("dataset", "repo", None, "hub"), _source_reads_it("dataset", "revision", None, "hub"),
    _source_reads_it("dataset", "path", "data/images", "imagefolder", "webdataset", "parquet"),
    _revision_needs_repo("vae"), _revision_needs_repo("text_encoder"), _steps_or_epochs, _micro_batch_divides,
    _lr_setting_has_effect("lr_num_cycles", 1, "cosine_with_restarts"),
    _lr_setting_has_effect("lr_power", 1.0, "polynomial"), _polynomial_falls,
    _constant_has_no_warmup, _warmup_ends, _export_has_weights, _captions_survive_the_flip,
)  # fmt: skip


def _describe(detail: ErrorDetails) -> str:
    """One fault in one line: `train.lrr = 0.1: unknown key; nearest is train.lr`."""
    location = [str(part) for part in detail["loc"]]
    key, value = ".".join(location), detail["input"]
    if detail["type"] == "missing":
        return f"{key}: missing; the shipped params.yaml shows every key"
    if detail["type"] == "extra_forbidden":
        return f"{key} = {value!r}: unknown key; {_nearest_key(location)}"
    if detail["type"] == "literal_error":
        allowed = re.findall(r"'([^']*)'", detail["ctx"]["expected"])
        near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.4)
        hint = f"; nearest is {near[0]!r}" if near else ""
        return f"{key} = {value!r}: must be one of {', '.join(map(repr, allowed))}{hint}"
    return f"{key} = {value!r}: {detail['msg'][0].lower()}{detail['msg'][1:]}"


def _nearest_key(location: list[str]) -> str:
    *parents, name = location
    sections = {key: info.annotation.model_fields for key, info in Params.model_fields.items() if key != "seed"}
    siblings = list(sections[parents[0]]) if parents else list(Params.model_fields)
    near = difflib.get_close_matches(name, siblings, n=1)
    elsewhere = [f"{key}.{name}" for key, fields in sections.items() if name in fields]
    if near:
        return f"nearest is {'.'.join([*parents, near[0]])}"
    if elsewhere:
        return f"nearest is {', '.join(elsewhere)}"
    return f"there are {', '.join(siblings)}"


class _Yaml12Loader(yaml.SafeLoader):
    """PyYAML with YAML 1.2's core schema, as DVC writes it: `1e-05` is a float, `no` is a string.

    A key given twice is refused instead of the last one winning silently.
    """

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Yaml12Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_Yaml12Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))
