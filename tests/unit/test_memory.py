"""Costs against figures by hand, published ones, and what the real UNet holds on the CPU."""

import math
from contextlib import nullcontext
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch.autograd.graph import saved_tensors_hooks

from sdtrain.methods import lora as lora_module
from sdtrain.models.parts import Configs, read_configs
from sdtrain.params.load import check_params, load_params
from sdtrain.training import memory
from sdtrain.training.memory import Costs, training_costs
from tests.conftest import ROOT, shrunk_tree

SD15 = Configs(
    unet={"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768, "attention_head_dim": 8},
    vae={
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": 4,
        "layers_per_block": 2,
    },
    text_encoder={
        "hidden_size": 768,
        "intermediate_size": 3072,
        "max_position_embeddings": 77,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "vocab_size": 49408,
    },
)
PLAIN = {"micro_batch_size": 1, "optimizer": "adamw", "use_ema": True}


def costs_of(configs: Configs, latent_shape: tuple[int, int, int], **changes) -> Costs:
    params = check_params(shrunk_tree())
    return training_costs(configs, params.method, params.train.model_copy(update={**PLAIN, **changes}), latent_shape)


@pytest.fixture(scope="module")
def sd15() -> Costs:
    return costs_of(SD15, (4, 64, 64))


@pytest.fixture(scope="module")
def tiny(root) -> Configs:
    """The built-in base's, whose latents are [4, 8, 8]."""
    return read_configs(root / "data/builtin")


@pytest.fixture(scope="module")
def activations(tiny):
    """A function from micro-batch size, precision and gradient checkpointing to the tiny UNet's activations_bytes."""

    @cache
    def estimate(micro_batch_size: int, precision: str, gradient_checkpointing: bool) -> int:
        return costs_of(
            tiny,
            (4, 8, 8),
            micro_batch_size=micro_batch_size,
            precision=precision,
            gradient_checkpointing=gradient_checkpointing,
        ).activations_bytes

    return estimate


@pytest.fixture
def cpu_autocast(monkeypatch):
    """Autocast as on the CPU, which casts no norm and no interpolation to fp32."""
    monkeypatch.setattr(memory, "_IN_FP32", frozenset())


def forward(unet: UNet2DConditionModel, batch_size: int, precision: str) -> torch.Tensor:
    latents, states = torch.randn(batch_size, 4, 8, 8), torch.randn(batch_size, 77, unet.config.cross_attention_dim)
    with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
        return unet(latents, torch.zeros(batch_size, dtype=torch.long), states).sample.float()


def test_lasting_bytes_by_hand(sd15):
    assert sd15.num_parameters == 859_520_964
    assert sd15.weights_bytes == sd15.gradients_bytes == sd15.ema_bytes == 3_438_083_856
    assert sd15.optimizer_bytes == 6_876_167_712
    assert sd15.frozen_bytes == 826_857_372
    assert sd15.checkpoint_bytes == 6_876_167_712
    assert sd15.state_bytes == 13_752_335_424
    assert sd15.lasting_bytes == 18_017_276_652
    assert sd15.memory_bytes == sd15.lasting_bytes + max(sd15.activations_bytes, sd15.ema_bytes)


def test_without_ema(tiny):
    without = costs_of(tiny, (4, 8, 8), use_ema=False)
    assert without.ema_bytes == 0
    assert without.checkpoint_bytes == without.weights_bytes
    assert without.state_bytes == without.weights_bytes + without.optimizer_bytes


def test_8bit_moments_are_a_byte_each_and_a_maximum_per_block(tiny):
    unet = UNet2DConditionModel.from_config(tiny.unet)
    sizes = [p.numel() for p in unet.parameters()]
    by_hand = sum(8 * size for size in sizes if size < 4096)
    by_hand += sum(2 * size + 8 * math.ceil(size / 256) for size in sizes if size >= 4096)
    assert costs_of(tiny, (4, 8, 8), optimizer="adamw_8bit").optimizer_bytes == by_hand


def test_no_attention_matrix_is_kept(sd15):
    """The 5 self-attentions at 64x64, each of 8 heads, would keep 5 x 8 x 4096² x 4 bytes = 2.5 GiB."""
    assert 1.6 * 2**30 < sd15.activations_bytes < 2.0 * 2**30


def test_activations_grow_with_the_micro_batch(activations):
    assert activations(32, "fp32", False) == pytest.approx(8 * activations(4, "fp32", False), rel=0.01)
    assert activations(32, "fp32", True) == pytest.approx(8 * activations(4, "fp32", True), rel=0.01)


def test_weights_in_16_bit_come_on_top_of_the_batch(activations, tiny):
    """One copy of all convolutions' and linear layers' weights, whatever the batch; it pays from a larger batch on."""
    copies = (32 * activations(4, "bf16", False) - 4 * activations(32, "bf16", False)) / (32 - 4)
    assert copies == pytest.approx(2 * costs_of(tiny, (4, 8, 8)).num_parameters, rel=0.03)
    assert activations(4, "bf16", False) > activations(4, "fp32", False)
    assert activations(32, "bf16", False) < 0.8 * activations(32, "fp32", False)
    assert activations(4, "fp16", False) == activations(4, "bf16", False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointing_needs_less(activations, precision):
    assert activations(32, precision, True) < 0.35 * activations(32, precision, False)


@pytest.mark.usefixtures("cpu_autocast")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_autograd_really_saves(tiny, precision):
    """Every storage that the real forward pass saves, once, without the weights themselves."""
    unet = UNet2DConditionModel.from_config(tiny.unet)
    weights = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model_pred = forward(unet, 8, precision)
    assert model_pred.grad_fn is not None  # keeps the saved tensors, so that no address is given twice
    real = sum(num_bytes for address, num_bytes in saved.items() if address not in weights)
    estimate = costs_of(tiny, (4, 8, 8), micro_batch_size=8, precision=precision).activations_bytes
    assert real < estimate < 1.1 * real


@pytest.mark.usefixtures("cpu_autocast")
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_a_real_pass_holds_at_its_peak(tiny, precision, gradient_checkpointing):
    unet = UNet2DConditionModel.from_config(tiny.unet)
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    for p in unet.parameters():
        p.grad = torch.zeros_like(p)
    lasting = [tensor for p in unet.parameters() for tensor in (p, p.grad)]
    with memory._LiveBytes(lasting) as real:
        F.mse_loss(forward(unet, 8, precision), torch.zeros(8, 4, 8, 8)).backward()
    estimate = costs_of(
        tiny, (4, 8, 8), micro_batch_size=8, precision=precision, gradient_checkpointing=gradient_checkpointing
    )
    assert estimate.activations_bytes == pytest.approx(real.peak, rel=0.02)


@pytest.mark.usefixtures("cpu_autocast")
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_autocast_keeps_no_copy_of_frozen_weights(tiny, gradient_checkpointing):
    """Of a LoRA's base it makes one for each use; those that the backward pass needs stay until then."""
    lora = load_params(ROOT / "recipes" / "lora.yaml").method
    train = check_params(shrunk_tree()).train.model_copy(
        update={**PLAIN, "micro_batch_size": 8, "precision": "bf16", "gradient_checkpointing": gradient_checkpointing}
    )
    estimate = training_costs(tiny, lora, train, (4, 8, 8)).activations_bytes
    unet = UNet2DConditionModel.from_config(tiny.unet).requires_grad_(False)
    unet.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=list(lora_module._CONV)))
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    for p in unet.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    lasting = [tensor for p in unet.parameters() for tensor in (p, p.grad) if tensor is not None]
    with memory._LiveBytes(lasting) as real:
        F.mse_loss(forward(unet, 8, "bf16"), torch.zeros(8, 4, 8, 8)).backward()
    assert estimate == pytest.approx(real.peak, rel=0.03)


def test_estimating_draws_no_random_numbers(tiny):
    before = torch.get_rng_state()
    costs_of(tiny, (4, 8, 8), gradient_checkpointing=True)
    assert torch.equal(torch.get_rng_state(), before)
