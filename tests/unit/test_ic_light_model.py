"""IC-Light's model: it starts as the base to the bit, sees its conditions, and is saved and loaded whole."""

import ast
import copy
import importlib.util
import logging
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from sdtrain.ground.errors import InputError
from sdtrain.methods.method import enable_gradient_checkpointing
from sdtrain.models import ic_light
from sdtrain.models.ic_light import IcLightPipeline, LightEncoder, add_light_tokens, widen_conv_in
from sdtrain.models.parts import load_parts, parts_of
from sdtrain.models.pipelines import build_ic_light_pipeline, build_pipeline
from sdtrain.models.sd1 import SD1
from sdtrain.models.trained import load_model, load_relit
from tests.conftest import ROOT

BUILTIN = ROOT / "data" / "builtin"
PROMPTS = ["left light a red circle", "a blue star"]
FEW = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


NOISY, TEXT, TIMESTEPS = random(3, 4, 8, 8), random(3, 77, 128, seed=1), torch.tensor([10, 500, 900])
LATENTS = 3 * random(2, 4, 8, 8, seed=2)
LIGHT = 100 * random(3, 1, 5, 3, seed=3).abs()


@pytest.fixture(scope="module")
def base() -> UNet2DConditionModel:
    return load_parts(BUILTIN).unet


@pytest.fixture(scope="module")
def stock() -> StableDiffusionPipeline:
    parts = load_parts(BUILTIN)
    return build_pipeline(parts, parts.scheduler)


def widened(base: UNet2DConditionModel, in_channels: int) -> UNet2DConditionModel:
    unet = copy.deepcopy(base)
    widen_conv_in(unet, in_channels)
    return unet


def make_pipeline(in_channels: int = 8, light: bool = False, trained: bool = True) -> IcLightPipeline:
    """On the built-in base; `trained`: with random weights where it starts at zero."""
    parts = load_parts(BUILTIN)
    widen_conv_in(parts.unet, in_channels)
    if light:
        torch.manual_seed(0)
        parts.others["light_encoder"] = LightEncoder((1, 5), num_tokens=3, dim=128).requires_grad_(False).eval()
    if trained:
        parts.unet.conv_in.weight[:, 4:] = 0.1 * random(64, in_channels - 4, 3, 3, seed=4)
        if light:
            parts.others["light_encoder"].layers[-1].weight.copy_(0.05 * random(384, 128, seed=5))
    return build_ic_light_pipeline(parts, parts.scheduler)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@torch.no_grad()
def predict(unet: UNet2DConditionModel, sample: Tensor = NOISY, text: Tensor = TEXT) -> Tensor:
    return unet(sample, TIMESTEPS, text).sample


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def seen_by_unet(pipeline: IcLightPipeline, *args, **kwargs) -> tuple[Tensor, Tensor]:
    """Sample and text states of the UNet's first call."""
    calls = []
    unet = pipeline.unet
    forward = unet.forward
    unet.forward = lambda sample, t, **given: (calls.append((sample, given)), forward(sample, t, **given))[1]
    try:
        pipeline(*args, **FEW, **kwargs)
    finally:
        del unet.forward
    return calls[0][0], calls[0][1]["encoder_hidden_states"]


@pytest.mark.parametrize("in_channels", [8, 12])
def test_it_starts_as_the_base_to_the_bit_whatever_the_conditions(base, in_channels):
    conditions = 1000 * random(3, in_channels - 4, 8, 8, seed=6)
    unet, sample = widened(base, in_channels), torch.cat([NOISY, conditions], dim=1)
    assert torch.equal(predict(unet, sample), predict(base))
    add_light_tokens(unet, 3)
    tokens = LightEncoder((1, 5), num_tokens=3, dim=128)(LIGHT)
    assert torch.equal(predict(unet, sample, torch.cat([TEXT, tokens], dim=1)), predict(base))
    unet.conv_in.weight[:, -1] = 0.01
    assert error(predict(unet, sample, torch.cat([TEXT, tokens], dim=1)), predict(base)) > 0.01


def test_zero_tokens_within_the_texts_attention_would_not_be_the_base(stock):
    """Why light tokens have an attention of their own."""
    text, _ = stock.encode_prompt([*PROMPTS, ""], "cpu", 1, False)
    appended = torch.cat([text, torch.zeros(3, 3, 128)], dim=1)
    assert error(predict(stock.unet, text=appended), predict(stock.unet, text=text)) > 0.01


def test_light_is_attended_apart_and_added_before_the_output_layer(base):
    unet = copy.deepcopy(base)
    add_light_tokens(unet, 2)
    attn = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    pixels, light = random(3, 16, 96, seed=7), random(3, 2, 128, seed=8)

    def attended(states: Tensor) -> Tensor:
        split = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (attn.to_k(states), attn.to_v(states)))
        key, value = split
        query = attn.to_q(pixels).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1)
        return (weights @ value).transpose(1, 2).flatten(2)

    expected = attn.to_out[0](attended(TEXT) + attended(light))
    found = attn(pixels, encoder_hidden_states=torch.cat([TEXT, light], dim=1))
    torch.testing.assert_close(found, expected)
    kinds = {name: type(processor).__name__ for name, processor in unet.attn_processors.items()}
    assert {kind for name, kind in kinds.items() if ".attn1." in name} == {"AttnProcessor2_0"}
    assert {kind for name, kind in kinds.items() if ".attn2." in name} == {"LightAttnProcessor"}


def test_wider_convolution_keeps_the_rest():
    unet = load_parts(BUILTIN).unet.to(torch.bfloat16)
    old = unet.conv_in
    widen_conv_in(unet, 12)
    assert unet.config.in_channels == unet.conv_in.in_channels == 12
    assert torch.equal(unet.conv_in.weight[:, :4], old.weight)
    assert not unet.conv_in.weight[:, 4:].any()
    assert torch.equal(unet.conv_in.bias, old.bias)
    assert unet.conv_in.weight.dtype == torch.bfloat16
    assert not unet.conv_in.weight.requires_grad
    again = unet.conv_in
    widen_conv_in(unet, 12)
    assert unet.conv_in is again
    with pytest.raises(ValueError, match="only a UNet with 4 input channels can be widened to 8, not 12"):
        widen_conv_in(unet, 8)


def test_other_cross_attention_is_refused(base):
    unet = copy.deepcopy(base)
    attn = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    attn.to_v = nn.Linear(128, 96)  # with a bias, zero tokens would have values
    with pytest.raises(ValueError, match=r"Stable Diffusion 1\.x, which mid_block\.attentions\.0.*\.attn2 isn't"):
        add_light_tokens(unet, 3)


def test_stable_diffusion_1_5_on_the_meta_device():
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(SD1.unet)
        encoder = LightEncoder((32, 32), num_tokens=3, dim=768)
        widen_conv_in(unet, 8)
        add_light_tokens(unet, 3)
        text = torch.cat([torch.empty(2, 77, 768), encoder(torch.empty(2, 32, 32, 3))], dim=1)
        assert unet(torch.empty(2, 8, 64, 64), torch.empty(2), text).sample.shape == (2, 4, 64, 64)
    assert unet.conv_in.weight.is_meta
    assert sum(p.numel() for p in encoder.parameters()) == (2 * 3072 + 1) * 128 + 129 * 128 + 129 * 3 * 768


def test_encoder_sees_brightness_of_any_size():
    encoder = LightEncoder((1, 5), num_tokens=2, dim=7)
    assert encoder(LIGHT).shape == (3, 2, 7)
    assert not encoder(LIGHT).any()
    nn.init.normal_(encoder.layers[-1].weight)
    flat = LIGHT.flatten(1)  # rows, columns, then colours
    first = encoder.layers[0](torch.cat([torch.log1p(flat), flat / flat.mean(dim=1, keepdim=True)], dim=1))
    assert torch.equal(encoder(LIGHT), encoder.layers[1:](first).view(3, 2, 7))
    assert error(encoder(1e5 * LIGHT), encoder(2e5 * LIGHT)) > 0.01
    with pytest.raises(ValueError, match=r"light maps must be \[B, 1, 5, 3\], these are \[3, 5, 1, 3\]"):
        encoder(LIGHT.view(3, 5, 1, 3))


def test_zero_tokens_learn_and_checkpointing_changes_nothing(base):
    unet = widened(base, 8)
    add_light_tokens(unet, 3)
    encoder = LightEncoder((1, 5), num_tokens=3, dim=128)
    gradients = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            enable_gradient_checkpointing([unet])
            unet.train()
        text = torch.cat([TEXT, encoder(LIGHT)], dim=1)
        unet(torch.cat([NOISY, NOISY], dim=1), TIMESTEPS, text).sample.square().sum().backward()
        gradients.append(encoder.layers[-1].weight.grad.clone())
        encoder.zero_grad()
    assert gradients[0].norm() > 0
    assert torch.equal(*gradients)


def test_autocast_changes_nothing_about_the_start(base):
    unet = widened(base, 8)
    add_light_tokens(unet, 3)
    encoder = LightEncoder((1, 5), num_tokens=3, dim=128)
    with torch.autocast("cpu", torch.bfloat16):
        found = predict(unet, torch.cat([NOISY, NOISY], dim=1), torch.cat([TEXT, encoder(LIGHT)], dim=1))
        assert torch.equal(found, predict(base))


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("light", [False, True])
def test_untrained_pipeline_draws_what_stock_code_draws(stock, guidance_scale, light):
    pipeline = make_pipeline(light=light, trained=False)
    settings = FEW | {"guidance_scale": guidance_scale, "output_type": "np"}
    expected = stock(PROMPTS, generator=generators(5, 6), **settings).images
    given = {"light": LIGHT[:2]} if light else {}
    found = pipeline(PROMPTS, LATENTS, generator=generators(5, 6), **given, **settings).images
    assert (found == expected).all()


def test_noise_is_stocks(stock):
    pipeline = make_pipeline(12)
    size = (2, stock.unet.config.in_channels, 64, 48, torch.float32, torch.device("cpu"))
    for make in (lambda: generators(1, 2), lambda: generators(3)[0]):
        expected = stock.prepare_latents(*size, make())
        assert expected.shape == (2, 4, 8, 6)
        sample, _ = seen_by_unet(pipeline, PROMPTS, *2 * [LATENTS[..., :6]], generator=make())
        assert torch.equal(sample[:, :4], torch.cat([expected, expected]))


def test_unet_sees_scaled_conditions_in_both_halves_of_guidance():
    pipeline = make_pipeline(12, light=True)
    grey = [Image.new("RGB", (64, 48), (127, 127, 127))] * 2
    coloured = [Image.new("RGB", (64, 48), color) for color in ((0, 51, 255), (255, 255, 255))]
    sample, states = seen_by_unet(pipeline, PROMPTS, grey, coloured, LIGHT[:2], generator=generators(0, 1))

    vae, scale = pipeline.vae, pipeline.vae.config.scaling_factor
    zero = vae.encode(torch.zeros(2, 3, 48, 64)).latent_dist.mode() * scale
    colours = torch.tensor([[-1, 51 / 127 - 1, 128 / 127], [128 / 127] * 3])[:, :, None, None].expand(2, 3, 48, 64)
    background = vae.encode(colours).latent_dist.mode() * scale
    assert torch.equal(sample[:, 4:8], torch.cat([zero, zero]))
    assert error(sample[:, 8:], torch.cat([background, background])) < 1e-5
    tokens = pipeline.light_encoder(LIGHT[:2])
    assert states.shape == (4, 80, 128)
    assert torch.equal(states[:, 77:], torch.cat([tokens, tokens]))


def test_latents_and_images_are_the_same_condition():
    pipeline = make_pipeline()
    images = [Image.new("RGB", (64, 64), (200, 127, 30)), Image.new("RGB", (64, 64), (254, 0, 127))]
    pixels = torch.tensor([(200, 127, 30), (254, 0, 127)]) / 127 - 1
    latents = pipeline.vae.encode(pixels[:, :, None, None].expand(2, 3, 64, 64)).latent_dist.mode()
    drawn = [pipeline(PROMPTS, given, generator=generators(0, 1), **FEW).images for given in (images, latents)]
    torch.testing.assert_close(*drawn)


@pytest.mark.parametrize("given", ["foreground", "background", "light"])
def test_images_follow_their_own_conditions_alone(given):
    pipeline = make_pipeline(12, light=True)
    conditions = {"foreground": LATENTS, "background": LATENTS.flip(0), "light": LIGHT[:2]}

    def draw(rows: slice, **changes) -> Tensor:
        chosen = {name: rest[rows] for name, rest in (conditions | changes).items()}
        return pipeline(PROMPTS[rows], generator=generators(7, 8)[rows], **chosen, **FEW).images

    both = draw(slice(2))
    assert error(both[:1], draw(slice(1))) < 1e-5
    assert error(both[1:], draw(slice(1, 2))) < 1e-5
    other = conditions[given].clone()
    other[1] *= 3
    changed = draw(slice(2), **{given: other})
    assert error(changed[:1], both[:1]) < 1e-5
    assert error(changed[1:], both[1:]) > 1e-3


def test_several_images_per_prompt():
    pipeline = make_pipeline(light=True)
    given = {"num_images_per_prompt": 2, "generator": generators(0, 1, 0, 1)}
    sample, states = seen_by_unet(pipeline, PROMPTS, LATENTS, light=LIGHT[:2], **given)
    order = [0, 0, 1, 1] * 2
    assert torch.equal(sample[:, 4:], (LATENTS * pipeline.vae.config.scaling_factor)[order])
    assert torch.equal(states[:, 77:], pipeline.light_encoder(LIGHT[:2])[order])


def test_stocks_other_arguments_pass():
    pipeline = make_pipeline()
    steps = []

    def note(_, step, timestep, tensors):
        steps.append(tensors["latents"].shape)
        return tensors

    embeds = random(1, 77, 128, seed=9)
    (image,) = pipeline(
        None,
        LATENTS[:1],
        prompt_embeds=embeds,
        negative_prompt_embeds=-embeds,
        latents=NOISY[:1],
        callback_on_step_end=note,
        num_inference_steps=2,
        return_dict=False,
    )[0]
    assert steps == [(1, 4, 8, 8)] * 2
    assert image.size == (64, 64)


REFUSED = {
    "needs `background`": (12, False, {}),
    "takes no `background`": (8, False, {"background": LATENTS}),
    "needs `light`": (8, True, {}),
    "takes no `light`": (8, False, {"light": LIGHT[:2]}),
    r"there are \[2, 3\]": (8, False, {"foreground": NOISY}),
    r"there are \[2, 2, 3\]": (8, True, {"light": LIGHT}),
    r"\(4, 8, 8\), \(4, 8, 4\)": (12, False, {"background": LATENTS[..., :4]}),
    "has an alpha channel": (8, False, {"foreground": [Image.new("RGBA", (64, 64))] * 2}),
    "divisible by 8": (8, False, {"foreground": [Image.new("RGB", (64, 60))] * 2}),
    r"\[B, 1, 5, 3\], these are \[2, 3, 5, 1\]": (8, True, {"light": LIGHT[:2].mT.permute(0, 2, 3, 1)}),
    "negative, infinite or undefined": (8, True, {"light": -LIGHT[:2]}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_wrong_inputs_are_refused(reason):
    in_channels, light, changes = REFUSED[reason]
    with pytest.raises(ValueError, match=reason):
        make_pipeline(in_channels, light)(PROMPTS, **{"foreground": LATENTS, **changes}, **FEW)


def test_failure_leaves_the_unet_as_it_was():
    pipeline = make_pipeline()

    def fail(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline(PROMPTS, LATENTS, callback_on_step_end=fail, **FEW)
    sample = torch.cat([NOISY, NOISY], dim=1)
    assert predict(pipeline.unet, sample).shape == NOISY.shape  # not 12 channels
    assert not pipeline.unet._forward_pre_hooks


def test_a_base_is_no_ic_light(stock):
    with pytest.raises(ValueError, match="8 or 12 input channels, this one 4"):
        IcLightPipeline(**stock.components)


def load_from_text(monkeypatch) -> type:
    """The class from the file's text under another name, as somebody who copied it has it."""
    spec = importlib.util.spec_from_file_location("copied_ic_light", ic_light.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.delitem(sys.modules, "sdtrain.models.ic_light")
    return module.IcLightPipeline


@pytest.mark.parametrize("light", [False, True])
@pytest.mark.parametrize("in_channels", [8, 12])
def test_saved_folder_draws_the_same(tmp_path, monkeypatch, caplog, in_channels, light):
    pipeline = make_pipeline(in_channels, light)
    given = {"background": LATENTS.flip(0)} if in_channels == 12 else {}
    given |= {"light": LIGHT[:2]} if light else {}

    def draw(drawer: DiffusionPipeline) -> Tensor:
        drawer.set_progress_bar_config(disable=True)
        return drawer(PROMPTS, LATENTS, generator=generators(0, 1), **given, **FEW).images

    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    pipeline.save_pretrained(tmp_path)
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors"}
    expected = draw(pipeline)
    loaded = load_relit(tmp_path, BUILTIN)
    assert ("light_encoder" in parts_of(loaded).others) == light
    assert torch.equal(draw(loaded), expected)
    assert torch.equal(draw(load_model(tmp_path, BUILTIN).to("cpu")), expected)
    assert torch.equal(draw(load_from_text(monkeypatch).from_pretrained(tmp_path)), expected)
    assert not caplog.records
    with pytest.raises(AttributeError, match="IcLightPipeline"):
        DiffusionPipeline.from_pretrained(tmp_path)


def test_another_model_is_not_taken_for_ic_light():
    with pytest.raises(InputError, match="not an IC-Light, but a StableDiffusionPipeline"):
        load_relit(BUILTIN, BUILTIN)


def test_the_file_stands_on_its_own():
    tree = ast.parse(Path(ic_light.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    found = {name.split(".")[0] for node in imports for name in imported(node)}
    assert found == {"numpy", "torch", "diffusers", "PIL"}


def imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else ["." * node.level + node.module]
