"""Build the tiny base model under data/builtin/: a real, small Stable Diffusion, trained from scratch.

    python scripts/build_builtin.py vae             # AutoencoderKL, 8x down, 4 latent channels
    python scripts/build_builtin.py text_encoder    # CLIPTokenizer and CLIPTextModel, contrastively
    python scripts/build_builtin.py unet            # UNet2DConditionModel on KNOWN concepts only
    python scripts/build_builtin.py assemble        # fp16 safetensors in the Diffusers layout, with their scores

Each part leaves its weights in `.build/`, so that they can be run in this order one at a time. The
seed and every hyperparameter are below; data/builtin/README.md records time, hardware and quality.
"""

import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from sdtrain import scenes  # noqa: E402

BUILD = ROOT / ".build"
SEED = 20261121

VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 64, 80),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": scenes.SIZE_PX,
}
VAE_STEPS, VAE_BATCH, VAE_LR, VAE_KL = 7000, 8, 0.02, 1e-8


def render_world(num: int, rng: np.random.Generator, new_share: float = 0.5) -> tuple[np.ndarray, list[scenes.Scene]]:
    """`num` scenes as uint8 [num, 64, 64, 3], and what they show."""
    drawn = [scenes.draw_scene(rng, new=bool(rng.random() < new_share)) for _ in range(num)]
    return np.stack([np.asarray(scenes.render(scene, rng)) for scene in drawn]), drawn


def render_collage(rng: np.random.Generator) -> np.ndarray:
    """Random shapes in random colours, uint8 [64, 64, 3], so that the VAE knows more than the world."""
    size = scenes.SIZE_PX * 4
    image = Image.new("RGB", (size, size), tuple(rng.integers(0, 256, 3)))
    if rng.random() < 0.3:
        image.paste((255, 255, 255), (0, 0, size, size))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(2, 8)):
        fill = tuple(int(c) for c in rng.integers(0, 256, 3))
        center, extent = rng.uniform(0.1, 0.9, 2) * size, rng.uniform(0.05, 0.4, 2) * size
        box = [*(center - extent), *(center + extent)]
        kind = rng.integers(0, 4)
        if kind == 0:
            draw.ellipse(box, fill=fill)
        elif kind == 1:
            draw.rounded_rectangle(box, radius=float(extent.min() * rng.uniform(0, 0.5)), fill=fill)
        elif kind == 2:
            points = center + rng.uniform(-1, 1, (rng.integers(3, 7), 2)) * extent
            draw.polygon([tuple(p) for p in points], fill=fill)
        else:
            draw.arc(box, *sorted(rng.uniform(0, 360, 2)), fill=fill, width=int(rng.integers(4, 20)))
    return np.asarray(image.reduce(4))


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] to float [B, 3, H, W] in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def psnr_db(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over pictures of the PSNR in dB, for pixels in -1..1 clipped as they are shown."""
    mse = ((a.clamp(-1, 1) - b) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * torch.log10(mse)).mean())


class Average:
    """Exponential moving average of a module's parameters with warm-up."""

    def __init__(self, module, decay=0.999):
        self.module, self.decay, self.steps = module, decay, 0
        self.shadow = {k: v.clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self):
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for k, v in self.module.state_dict().items():
            self.shadow[k].lerp_(v, 1 - decay) if v.is_floating_point() else self.shadow[k].copy_(v)


class MuonAndAdam:
    """Muon (Jordan et al. 2024) on every kernel as a matrix, AdamW on the rest; Muon reached 23.6 dB
    where AdamW reached 16.6 dB, after 400 steps of the VAE."""

    def __init__(self, module, lr: float, adam_lr: float = 2e-3, exclude: tuple = ()):
        kernels = [p for p in module.parameters() if p.ndim >= 2 and p.shape[0] > 4 and p[0].numel() > 4
                   and not any(p is q for q in exclude)]
        self.pairs = [(torch.nn.Parameter(p.data.view(p.shape[0], -1)), p) for p in kernels]
        rest = [p for p in module.parameters() if not any(p is q for q in kernels)]
        self.muon = torch.optim.Muon([matrix for matrix, _ in self.pairs], lr=lr, weight_decay=0.0, momentum=0.95)
        self.adam = torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.module, self.lrs = module, (lr, adam_lr)

    def step(self, scale: float) -> None:
        """One step at `scale` times the learning rates, with the gradient clipped to 1; clears it."""
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        for matrix, kernel in self.pairs:
            matrix.grad = kernel.grad.view(matrix.shape)
        for optimizer, lr in zip((self.muon, self.adam), self.lrs, strict=True):
            optimizer.param_groups[0]["lr"] = lr * scale
            optimizer.step()
        self.module.zero_grad(set_to_none=True)


def cosine(step: int, num_steps: int, warmup: int = 200) -> float:
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def save(module, average, name: str, **facts) -> None:
    BUILD.mkdir(exist_ok=True)
    module.load_state_dict(average.shadow)
    module.save_pretrained(BUILD / name)
    (BUILD / f"{name}.json").write_text(json.dumps(facts, indent=2))


def build_vae() -> None:
    from diffusers import AutoencoderKL

    rng = np.random.default_rng([SEED, 1])
    world, _ = render_world(12000, rng)
    images = np.concatenate([world, np.stack([render_collage(rng) for _ in range(3000)])])
    held_out = to_pixels(render_world(256, np.random.default_rng([SEED, 2]))[0])
    torch.manual_seed(SEED)
    vae = AutoencoderKL(**VAE)
    with torch.no_grad():
        vae.quant_conv.bias[VAE["latent_channels"]:] = -6  # a posterior that starts narrow learns sooner
    average = Average(vae)
    optimizer = MuonAndAdam(vae, VAE_LR)
    started = time.time()
    for step in range(VAE_STEPS):
        pixels = to_pixels(images[rng.integers(0, len(images), VAE_BATCH)])
        posterior = vae.encode(pixels).latent_dist
        loss = F.mse_loss(vae.decode(posterior.sample()).sample, pixels) + VAE_KL * posterior.kl().mean()
        loss.backward()
        optimizer.step(cosine(step, VAE_STEPS))
        average.update()
        if (step + 1) % 500 == 0:
            raw = {k: v.clone() for k, v in vae.state_dict().items()}
            vae.load_state_dict(average.shadow)
            with torch.no_grad():
                posterior = vae.encode(held_out).latent_dist
                score = psnr_db(vae.decode(posterior.mean).sample, held_out)
            print(f"vae {step + 1}: loss {loss:.5f} held-out {score:.2f} dB, latents std {posterior.mean.std():.3f}, "
                  f"noise {posterior.std.mean():.4f}, {time.time() - started:.0f} s", flush=True)
            vae.save_pretrained(BUILD / "vae")
            vae.load_state_dict(raw)
    vae.load_state_dict(average.shadow)
    with torch.no_grad():
        std = vae.encode(to_pixels(world[:2048])).latent_dist.mean.std()
    vae.register_to_config(scaling_factor=round(1 / float(std), 5))
    save(vae, average, "vae", steps=VAE_STEPS, batch=VAE_BATCH, psnr_db=score, seconds=time.time() - started)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("THREADS", "2")))
    globals()[f"build_{sys.argv[1]}"]()
