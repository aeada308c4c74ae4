"""The adapter: what it is, and the files that hold it."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from sdtrain.ground.errors import InputError
from sdtrain.ground.layout import ADAPTER_FILE
from sdtrain.methods.lora import Lora, build
from sdtrain.methods.method import trained_parameters
from sdtrain.models.parts import Parts, load_parts, meta_parts
from sdtrain.models.pipelines import build_pipeline
from sdtrain.models.sd1 import SD1
from sdtrain.params.load import load_params
from sdtrain.params.schema import ExportParams, LoraParams
from tests.conftest import ROOT

BASE = ROOT / "data" / "builtin"
RECIPE = load_params(ROOT / "recipes" / "lora.yaml")
KEYS = ROOT / "tests" / "golden" / "kohya_keys.txt"
EVERY_KIND = {
    "attention": {"target_modules": "attention"},
    "linear, gaussian": {"target_modules": "linear", "init": "gaussian"},
    "conv": {},
    "conv, alpha": {"rank": 3, "alpha": 0.5},
    "conv, rsLoRA": {"rank": 8, "alpha": 8, "use_rslora": True},
    "conv, DoRA": {"rank": 4, "use_dora": True},
    "list": {"target_modules": ["attn2.to_k", "conv_in", "conv_out", "time_embedding.linear_1"]},
}


def section(**changes) -> LoraParams:
    return LoraParams.model_validate({**RECIPE.method.model_dump(), **changes})


def export_params(**changes) -> ExportParams:
    return RECIPE.export.model_copy(update=changes)


@pytest.fixture(scope="module")
def parts() -> Parts:
    return load_parts(BASE)


def predict(unet: torch.nn.Module) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 8, 8, generator=rng), torch.randn(2, 77, 64, generator=rng)
    width = unet.config.cross_attention_dim
    with torch.no_grad():
        return unet.eval()(latents, torch.tensor([10, 900]), text[..., :1].expand(-1, -1, width)).sample


def adapted(**changes) -> Lora:
    """A method whose adapter isn't zero any more."""
    torch.manual_seed(0)
    method = build(section(**changes), load_parts(BASE))
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(method).values():
            parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.05)
    return method


def pipeline_of_base() -> StableDiffusionPipeline:
    parts = load_parts(BASE)
    return build_pipeline(parts, parts.scheduler)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_at_step_0_it_is_the_base_to_the_bit(kind):
    parts = load_parts(BASE)
    expected = predict(parts.unet)
    method = build(section(**EVERY_KIND[kind]), parts)
    assert torch.equal(predict(method.trained), expected)
    assert relative(predict(adapted(**EVERY_KIND[kind]).trained), expected) > 0.001


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_only_the_adapter_trains_in_fp32(kind):
    method = build(section(**EVERY_KIND[kind]), load_parts(BASE))
    weights = trained_parameters(method)
    assert weights
    assert {name.split(".")[-3] for name in weights} <= {"lora_A", "lora_B", "lora_magnitude_vector"}
    assert {parameter.dtype for parameter in weights.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("targets", "num_modules", "num_weights"),
    [
        ("attention", 128, 3_188_736),
        ("linear", 192, 6_782_976),
        ("conv", 278, 16_813_056),
        (["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"], 64, 1_591_296),
    ],
)
def test_its_size_on_stable_diffusion_1_5(targets, num_modules, num_weights):
    method = build(section(target_modules=targets), meta_parts(SD1, sample_size=64))
    weights = trained_parameters(method)
    assert len(weights) == 2 * num_modules
    assert sum(parameter.numel() for parameter in weights.values()) == num_weights


def test_init_has_the_standard_deviation_that_its_name_promises():
    for init, expected in (("gaussian", 1 / 16), ("kaiming", (3 * 64) ** -0.5)):
        unet = build(section(target_modules=["attn1.to_q"], init=init), load_parts(BASE)).trained
        name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
        down = unet.get_submodule(name).lora_A["default"].weight
        assert down.shape == (16, 64)
        assert down.std().item() == pytest.approx(expected, rel=0.1)


def test_dropout_acts_in_training_only():
    method = adapted(dropout=0.5)
    expected = predict(method.trained)
    assert torch.equal(predict(method.trained), expected)
    latents, text = torch.ones(1, 4, 8, 8), torch.ones(1, 77, method.trained.config.cross_attention_dim)
    one, two = (method.trained.train()(latents, 10, text).sample for _ in range(2))
    assert not torch.equal(one, two)


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (["to_q", "to_x"], "the base's UNet has no module 'to_x'; use attention, linear, conv, or the ends of names"),
        (["o_q"], "the base's UNet has no module 'o_q'"),
        (
            ["to_q", "norm1"],
            "is a LayerNorm, and only Linear and Conv2d layers get an adapter; instead of 'norm1' name",
        ),
        (["attn2"], "attn2 is a Attention, and only Linear and Conv2d layers get an adapter"),
    ],
)
def test_modules_that_get_no_adapter_are_refused(targets, says):
    with pytest.raises(InputError) as caught:
        build(section(target_modules=targets), load_parts(BASE))
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"method.target_modules = {targets!r}: ")


def test_a_set_needs_no_more_than_what_the_unet_has():
    """SD 1.5's last block has no downsampler, and a UNet with equal widths no `conv_shortcut`; PEFT adapts what is."""
    parts = meta_parts(SD1, sample_size=64)
    names = {name for name, _ in parts.unet.named_modules()}
    assert "down_blocks.3.downsamplers.0.conv" not in names
    build(section(target_modules="conv"), parts)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_what_is_saved_is_loaded_to_the_bit(kind, tmp_path):
    method = adapted(**EVERY_KIND[kind])
    method.save(tmp_path)
    again = build(section(**EVERY_KIND[kind]), load_parts(BASE))
    again.load(tmp_path)
    ours, theirs = trained_parameters(method), trained_parameters(again)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(parameter.requires_grad for parameter in theirs.values())


@pytest.mark.parametrize("changes", [{"rank": 8}, {"target_modules": "linear"}, {"use_dora": True}])
def test_an_adapter_of_another_structure_is_refused(changes, tmp_path):
    adapted().save(tmp_path)
    before = build(section(**changes), load_parts(BASE))
    expected = predict(before.trained)
    with pytest.raises(InputError, match=r"its adapter doesn't match the base and the section method: \d+ tensors dif"):
        before.load(tmp_path)
    assert torch.equal(predict(before.trained), expected)


@pytest.mark.full
def test_equal_weights_are_equal_files(tmp_path):
    """PEFT holds sets and safetensors a hash map, whose order is another in every process."""
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.unit.test_adapter import adapted, export_params, BASE
method = adapted()
method.save(Path(sys.argv[1]) / "saved")
list(method.export(Path(sys.argv[1]), None, export_params(), BASE))
"""
    hashes = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT / "src")}
        subprocess.run([sys.executable, "-c", script, folder], check=True, env=environment)
        files = sorted(folder.rglob("*.safetensors"))
        assert [file.name for file in files] == [ADAPTER_FILE, ADAPTER_FILE, "sdtrain-lora.safetensors"]
        hashes.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert hashes[0] == hashes[1]


def loaded(folder: Path, name: str = ADAPTER_FILE) -> torch.Tensor:
    """What the base predicts with an adapter's file, loaded as anyone does."""
    pipeline = pipeline_of_base()
    pipeline.load_lora_weights(folder, weight_name=name)
    return predict(pipeline.unet)


def weights_of(method: Lora) -> dict[str, torch.Tensor]:
    return get_peft_model_state_dict(method.trained)


STOCK = [  # (the adapter, whether with metadata, what loading does)
    ({"target_modules": "attention"}, False, 0.0),
    ({}, False, 0.01),
    ({}, True, 0.01),
    ({"use_dora": True, "rank": 4}, False, RuntimeError),
]


@pytest.mark.parametrize(("changes", "with_metadata", "ends"), STOCK)
def test_why_diffusers_converter_is_not_used(changes, with_metadata, ends, tmp_path):
    """It renames the attention's layers only, and the loader reads a file with both spellings as though it had one."""
    method = adapted(**changes)
    metadata = method.trained.peft_config["default"].to_dict() if with_metadata else None
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=convert_state_dict_to_diffusers(weights_of(method)),
        unet_lora_adapter_metadata=metadata,
    )
    if ends is RuntimeError:
        with pytest.raises(RuntimeError):
            loaded(tmp_path)
        return
    difference = relative(loaded(tmp_path), predict(method.trained))
    assert difference == 0 if ends == 0 else difference > ends


@pytest.mark.parametrize("changes", [{"alpha": 4, "rank": 8}, {"alpha": 8, "rank": 8, "use_rslora": True}])
def test_why_the_metadata_is_saved(changes, tmp_path):
    """Without it α is taken for the rank."""
    method = adapted(**changes)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=weights_of(method))
    assert relative(loaded(tmp_path), predict(method.trained)) > 0.01


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_load_lora_weights_gives_the_trained_output_to_the_bit(kind, tmp_path):
    method = adapted(**EVERY_KIND[kind])
    method.save(tmp_path)
    assert torch.equal(loaded(tmp_path), predict(method.trained))


@pytest.mark.parametrize("kind", [kind for kind in EVERY_KIND if "DoRA" not in kind])
def test_the_file_for_uis_gives_the_trained_output(kind, tmp_path):
    """Through Diffusers' reader of kohya's layout."""
    method = adapted(**EVERY_KIND[kind])
    forms = list(method.export(tmp_path, load_parts(BASE).scheduler, export_params(name="mine"), BASE))
    assert [form.path.name for form in forms] == [ADAPTER_FILE, "mine.safetensors"]
    difference = relative(loaded(tmp_path, "mine.safetensors"), predict(method.trained))
    assert difference == 0 if "rsLoRA" not in kind else 0 <= difference < 1e-6


def test_the_file_for_uis_has_kohyas_keys_and_the_true_alpha(tmp_path):
    method = adapted(rank=8, alpha=2)
    list(method.export(tmp_path, None, export_params(name="mine"), BASE))
    tensors = load_file(tmp_path / "mine.safetensors")
    assert sorted(tensors) == KEYS.read_text().split()
    assert {tensors[name].item() for name in tensors if name.endswith(".alpha")} == {2.0}
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    layer, key = method.trained.get_submodule(name), f"lora_unet_{name.replace('.', '_')}"
    assert torch.equal(tensors[f"{key}.lora_down.weight"], layer.lora_A["default"].weight)
    assert torch.equal(tensors[f"{key}.lora_up.weight"], layer.lora_B["default"].weight)


def test_why_diffusers_kohya_converter_is_not_used():
    """It says that alpha is the rank, whatever it is."""
    method = adapted(target_modules="attention", rank=8, alpha=2)
    named = {f"unet.{name}": tensor for name, tensor in weights_of(method).items()}
    converted = convert_state_dict_to_kohya(named)
    assert {tensor.item() for name, tensor in converted.items() if name.endswith(".alpha")} == {8}


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_merged_it_is_a_full_model_with_the_same_output(kind, tmp_path):
    method = adapted(**EVERY_KIND[kind])
    expected, before = predict(method.trained), {n: p.clone() for n, p in method.trained.named_parameters()}
    params = export_params(merged=True)
    (form, *_) = list(method.export(tmp_path, load_parts(BASE).scheduler, params, BASE))[::-1]
    assert form.path == tmp_path / "merged"
    unet = form.load().unet
    assert unet.state_dict().keys() == load_parts(BASE).unet.state_dict().keys()
    assert 0 < relative(predict(unet), expected) < 1e-5
    assert torch.equal(predict(method.trained), expected), "the method's own weights are as they were"
    assert all(torch.equal(before[name], p) for name, p in method.trained.named_parameters())


def test_dora_is_exported_merged_only(tmp_path):
    method = adapted(use_dora=True, rank=4)
    params = export_params(merged=True, name="mine")
    assert [form.path.name for form in method.export(tmp_path, method._parts.scheduler, params, BASE)] == ["merged"]
    assert not list(tmp_path.glob("*.safetensors"))


def test_in_fp16_the_files_are_half_as_large_and_alpha_stays_exact(tmp_path):
    method = adapted(rank=8, alpha=8, use_rslora=True)
    sizes = {}
    for dtype in ("fp32", "fp16"):
        (tmp_path / dtype).mkdir()
        list(method.export(tmp_path / dtype, None, export_params(name="mine", dtype=dtype), BASE))
        sizes[dtype] = (tmp_path / dtype / "mine.safetensors").stat().st_size
        tensors = load_file(tmp_path / dtype / "mine.safetensors")
        (alpha,) = {tensor.item() for name, tensor in tensors.items() if name.endswith(".alpha")}
        assert alpha == pytest.approx(8 * 8**0.5, rel=1e-7)
    assert sizes["fp16"] < 0.6 * sizes["fp32"]
    assert {p.dtype for p in method.trained.parameters()} == {torch.float32}
    assert relative(loaded(tmp_path / "fp16", "mine.safetensors"), predict(method.trained)) < 1e-3


def test_a_file_without_the_adapter_is_named(tmp_path):
    method = adapted()
    save_file({"unet.conv_in.lora_A.weight": torch.zeros(1)}, tmp_path / ADAPTER_FILE)
    with pytest.raises(InputError, match=r"pytorch_lora_weights.safetensors: its adapter doesn't match the base"):
        method.load(tmp_path)
