"""What params must fulfil together: each rule finds one fault, or none.

A rule reads the tree through a `View`, so it is asked even while other fields are faulty, and one
message can name every fault.
"""

from collections.abc import Callable
from typing import Any

from sdtrain.schedules import scaled_lr


class View:
    """A params tree by attribute, of which only sound fields can be read."""

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
        """The fault that a rule finds; None where it finds none, or needs a field that is faulty itself."""
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


def _source_reads_it(section: str, field: str, unread: str | None, *sources: str) -> Rule:
    """`field` must be `unread` unless the section's source is one of `sources`, which read it."""

    def rule(p: View) -> str | None:
        source, value = getattr(p, section).source, getattr(getattr(p, section), field)
        if source not in sources and value != unread:
            default = "null" if unread is None else unread
            return (
                f"{section}.{field} = {value!r}: {section}.source = {source!r} doesn't read it; "
                f"set {section}.source: {sources[0]}, or {section}.{field}: {default}"
            )

    return rule


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
            return f"train.lr = {p.train.lr}: train.lr_scheduler = 'polynomial' falls to 1e-7; take a larger lr"


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
            "train.zero_terminal_snr = True: with train.prediction_type = 'epsilon' the last timestep is pure noise "
            "and predicting it teaches nothing; use 'v_prediction'"
        )


def _ema_settings_fit(p: View) -> str | None:
    wanted = {"ramp": {"ema_decay"}, "warmup": {"ema_decay", "ema_inv_gamma", "ema_power"}}
    schedule = p.train.ema_schedule
    for field in ("ema_decay", "ema_inv_gamma", "ema_power", "ema_sigma_rel"):
        value = getattr(p.train, field)
        if field in wanted.get(schedule, {"ema_sigma_rel"}):
            if value is None:
                return f"train.{field} = None: train.ema_schedule = {schedule!r} needs a number"
        elif value is not None:
            return f"train.{field} = {value}: train.ema_schedule = {schedule!r} doesn't use it; set it to null"


def _branch_settings_fit(p: View) -> str | None:
    resume, reset, origin = p.train.resume, p.train.resume_reset, p.train.branch_from
    if resume == "branch":
        return None
    if reset:
        return (
            f"train.resume_reset = {reset}: has no effect with train.resume = {resume!r}; "
            "set train.resume: branch and train.branch_from, or train.resume_reset to []"
        )
    if origin != "data/start":
        return (
            f"train.branch_from = {origin!r}: has no effect with train.resume = {resume!r}; "
            "set train.resume: branch, or train.branch_from: data/start"
        )


def _listed_once(field: str) -> Rule:
    def rule(p: View) -> str | None:
        values = getattr(p.train, field)
        if len(set(values)) < len(values):
            return f"train.{field} = {values}: names one twice"

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
    micro, whole = p.train.micro_batch_size, p.train.batch_size
    if whole % micro:
        return f"train.micro_batch_size = {micro}: must divide train.batch_size = {whole}"


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


def _export_has_weights(p: View) -> str | None:
    if p.export.weights == "ema" and not p.train.use_ema:
        return "export.weights = 'ema': train.use_ema = False keeps no EMA; use 'raw', or train.use_ema: true"


def _captions_survive_the_flip(p: View) -> str | None:
    if p.dataset.source == "generated" and p.precompute.random_flip:
        return (
            "precompute.random_flip = True: the captions of dataset.source = 'generated' say left and right, "
            "which a mirror makes false; use false"
        )


RULES: tuple[Rule, ...] = (
    _hub_needs_repo("base"), _hub_needs_repo("dataset"),
    _source_reads_it("base", "repo", None, "hub"), _source_reads_it("base", "revision", None, "hub"),
    _source_reads_it("base", "path", "data/builtin", "local"),
    _source_reads_it("dataset", "repo", None, "hub"), _source_reads_it("dataset", "revision", None, "hub"),
    _source_reads_it("dataset", "path", "data/images", "imagefolder", "webdataset", "parquet"),
    _revision_needs_repo("vae"), _revision_needs_repo("text_encoder"), _steps_or_epochs, _micro_batch_divides,
    _lr_setting_has_effect("lr_num_cycles", 1, "cosine_with_restarts"),
    _lr_setting_has_effect("lr_power", 1.0, "polynomial"), _polynomial_falls,
    _reference_batch_is_stated, _step_rules_are_sound, _terminal_noise_needs_velocity, _ema_settings_fit,
    _branch_settings_fit, _listed_once("resume_reset"), _listed_once("trackers"),
    _constant_has_no_warmup, _warmup_ends, _export_has_weights, _captions_survive_the_flip,
)  # fmt: skip
