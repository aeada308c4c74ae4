"""Checks across params: each rule finds one fault, or none.

A rule reads the tree through a `View`, so it can be checked even if other fields are faulty, and one
message can name every fault.
"""

from sdtrain.ground.schedules import scaled_lr
from sdtrain.params.method_rules import METHOD_RULES, conditions_of
from sdtrain.params.schema import BUILTIN_CLIP
from sdtrain.params.view import Rule, View, has_effect, source_reads_it


def _hub_needs_repo(section: str) -> Rule:
    def rule(p: View) -> str | None:
        if getattr(p, section).source == "hub" and getattr(p, section).repo is None:
            return f"{section}.repo = None: {section}.source = 'hub' needs a repository, owner/name"

    return rule


def _generated(p: View) -> tuple[str, str] | None:
    if p.dataset.source == "generated":
        return "dataset.source = 'generated', whose images are opaque squares", "dataset.source to imagefolder"


def _nothing_drawn(p: View) -> tuple[str, str] | None:
    features, path = p.evaluate.features, p.evaluate.features_path
    knows_own = features == "hub" or (features == "local" and path != BUILTIN_CLIP)
    if p.dataset.source != "generated" and not knows_own:
        told = f"evaluate.features = {features!r}" + (f" of {path}" if features == "local" else "")
        return f"{told} and dataset.source = {p.dataset.source!r}, where nothing is drawn", "evaluate.features to hub"


def _features_need_repo(p: View) -> str | None:
    if p.evaluate.features == "hub" and p.evaluate.features_repo is None:
        return (
            "evaluate.features_repo = None: evaluate.features = 'hub' needs a repository, owner/name, e.g. "
            "facebook/dinov2-small"
        )


def _neighbors_need_features(p: View) -> str | None:
    if p.evaluate.nearest_neighbors and p.evaluate.features == "none":
        return (
            "evaluate.nearest_neighbors = True: evaluate.features = 'none' has nothing to compare images by; set it to "
            "false, or evaluate.features to hub or local"
        )


def _some_is_trained_on(p: View) -> str | None:
    validation, test = p.dataset.validation_fraction, p.dataset.test_fraction
    if validation + test >= 1:
        return (
            f"dataset.validation_fraction = {validation}, dataset.test_fraction = {test}: leave no image to train on; "
            "their sum must be below 1"
        )


def _no_images(p: View) -> tuple[str, str] | None:
    if not p.validation.prompts and p.validation.num_held_out is None:
        if conditions_of(p):
            return "validation.num_held_out = None", "validation.num_held_out to a number"
        return "validation.prompts = []", "add prompts there"


def _no_ema(p: View) -> tuple[str, str] | None:
    if not p.train.use_ema:
        return "train.use_ema = False", "train.use_ema to true"


def _no_guidance(p: View) -> tuple[str, str] | None:
    if p.sample.guidance_scales and max(p.sample.guidance_scales) <= 1:
        return f"sample.guidance_scales = {p.sample.guidance_scales}, which is none", "add a scale above 1 there"


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


def _listed_once(section: str, field: str) -> Rule:
    def rule(p: View) -> str | None:
        values = getattr(getattr(p, section), field)
        if len(set(values)) < len(values):
            return f"{section}.{field} = {values}: lists a value twice"

    return rule


def _checkpoints_are_kept(p: View) -> str | None:
    num = p.train.num_best_checkpoints
    for name in p.sample.checkpoints:
        rank = int(name.removeprefix("best-")) if name.startswith("best-") else 1
        if rank > num:
            return (
                f"sample.checkpoints = {p.sample.checkpoints}: {name} isn't kept with train.num_best_checkpoints = "
                f"{num}; leave it out, or set train.num_best_checkpoints to {rank}"
            )


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


def _captions_survive_the_flip(p: View) -> str | None:
    if p.dataset.source == "generated" and p.precompute.random_flip:
        return (
            "precompute.random_flip = True: the captions of dataset.source = 'generated' say left and right, "
            "which is wrong for a flipped image; use false"
        )


RULES: tuple[Rule, ...] = (
    _hub_needs_repo("base"), _hub_needs_repo("dataset"), _some_is_trained_on, _features_need_repo,
    _neighbors_need_features,
    source_reads_it("evaluate.features_path", "local", source_field="features"),
    source_reads_it("evaluate.features_repo", "hub", source_field="features"),
    source_reads_it("evaluate.features_revision", "hub", source_field="features"),
    source_reads_it("base.repo", "hub"), source_reads_it("base.revision", "hub"),
    source_reads_it("base.path", "local"),
    source_reads_it("dataset.repo", "hub"), source_reads_it("dataset.revision", "hub"),
    source_reads_it("dataset.split", "hub"),
    source_reads_it("dataset.path", "imagefolder", "webdataset", "parquet"),
    source_reads_it("dataset.image_column", "imagefolder", "webdataset", "parquet", "hub"),
    source_reads_it("dataset.caption_column", "imagefolder", "webdataset", "parquet", "hub"),
    source_reads_it("dataset.group_column", "imagefolder", "webdataset", "parquet", "hub"),
    source_reads_it("dataset.world", "generated"), source_reads_it("dataset.num_scenes", "generated"),
    source_reads_it("dataset.new_fraction", "generated"),
    has_effect("dataset.alpha_background", _generated), has_effect("precompute.center_crop", _generated),
    has_effect("evaluate.num_prompts", _nothing_drawn), has_effect("evaluate.num_inference_steps", _nothing_drawn),
    has_effect("evaluate.guidance_scale", _nothing_drawn),
    has_effect("validation.num_inference_steps", _no_images), has_effect("validation.guidance_scale", _no_images),
    has_effect("sample.negative_prompt", _no_guidance), _checkpoints_are_kept,
    _listed_once("sample", "checkpoints"), _listed_once("sample", "guidance_scales"),
    has_effect("train.timestep_sampling", _one_row),
    has_effect("train.ema_schedule", _no_ema), has_effect("train.ema_decay", _no_ema, neutral="null"),
    has_effect("train.ema_inv_gamma", _no_ema), has_effect("train.ema_power", _no_ema),
    has_effect("train.ema_sigma_rel", _no_ema), _patience_can_end,
    _revision_needs_repo("vae"), _revision_needs_repo("text_encoder"), _steps_or_epochs, _micro_batch_divides,
    _lr_setting_has_effect("lr_num_cycles", 1, "cosine_with_restarts"),
    _lr_setting_has_effect("lr_power", 1.0, "polynomial"), _polynomial_falls,
    _reference_batch_is_stated, _step_rules_are_sound, _terminal_noise_needs_velocity, _ema_settings_fit,
    has_effect("train.branch_from", _no_branch), has_effect("train.resume_reset", _no_branch),
    _listed_once("train", "resume_reset"), _listed_once("train", "trackers"),
    _constant_has_no_warmup, _warmup_ends, _export_has_weights, _captions_survive_the_flip,
    _revision_needs_repo("controlnet"), *METHOD_RULES,
)  # fmt: skip
