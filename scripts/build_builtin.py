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
TEXT_ENCODER = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "projection_dim": 128,
}
UNET = {
    "sample_size": scenes.SIZE_PX // 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (64, 96),
    "layers_per_block": 1,
    "cross_attention_dim": TEXT_ENCODER["hidden_size"],
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}
SCHEDULER = {  # Stable Diffusion 1.5's
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "clip_sample": False,
    "prediction_type": "epsilon",
}
VAE_STEPS, VAE_DECAY_STEPS, VAE_BATCH, VAE_LR, VAE_KL = 3000, 7000, 8, 0.02, 1e-8
TEXT_STEPS, TEXT_BATCH, TEXT_LR = 800, 128, 1e-3
UNET_STEPS, UNET_BATCH, UNET_LR = 2000, 32, 0.02


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
    """Muon (Jordan et al. 2024) on every kernel as a matrix, AdamW on the rest.

    After 400 steps of the VAE, one run each: 23.6 dB; AdamW alone 16.6 dB at best, of three settings.
    """

    def __init__(self, module, lr: float, adam_lr: float = 2e-3, exclude: tuple = ()):
        kernels = [
            p
            for p in module.parameters()
            if p.ndim >= 2 and p.shape[0] > 4 and p[0].numel() > 4 and not any(p is q for q in exclude)
        ]
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
        vae.quant_conv.bias[VAE["latent_channels"] :] = -6  # a posterior that starts narrow learns sooner
    average = Average(vae)
    optimizer = MuonAndAdam(vae, VAE_LR)
    started = time.time()
    for step in range(VAE_STEPS):
        pixels = to_pixels(images[rng.integers(0, len(images), VAE_BATCH)])
        posterior = vae.encode(pixels).latent_dist
        loss = F.mse_loss(vae.decode(posterior.sample()).sample, pixels) + VAE_KL * posterior.kl().mean()
        loss.backward()
        optimizer.step(cosine(step, VAE_DECAY_STEPS))  # ends early: the average has settled
        average.update()
        if (step + 1) % 500 == 0:
            raw = {k: v.clone() for k, v in vae.state_dict().items()}
            vae.load_state_dict(average.shadow)
            with torch.no_grad():
                posterior = vae.encode(held_out).latent_dist
                score = psnr_db(vae.decode(posterior.mean).sample, held_out)
            print(
                f"vae {step + 1}: loss {loss:.5f} held-out {score:.2f} dB, latents std {posterior.mean.std():.3f}, "
                f"noise {posterior.std.mean():.4f}, {time.time() - started:.0f} s",
                flush=True,
            )
            vae.save_pretrained(BUILD / "vae")
            vae.load_state_dict(raw)
    vae.load_state_dict(average.shadow)
    with torch.no_grad():
        std = vae.encode(to_pixels(world[:2048])).latent_dist.mean.std()
    vae.register_to_config(scaling_factor=round(1 / float(std), 5))
    save(vae, average, "vae", steps=VAE_STEPS, batch=VAE_BATCH, psnr_db=score, seconds=time.time() - started)


def build_tokenizer():
    """A CLIPTokenizer whose byte-level BPE has one token for every word of the world."""
    from collections import Counter
    from itertools import pairwise

    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    text = " ".join([*scenes.COLORS, *scenes.SHAPES, *scenes.RADII_PX, *scenes.ANCHORS_PX, *scenes.STYLES])
    words = {word: [*word[:-1], word[-1] + "</w>"] for word in sorted({*text.split(), "a", "an", "on", "background"})}
    merges = []
    while pairs := Counter(pair for symbols in words.values() for pair in pairwise(symbols)):
        left, right = max(sorted(pairs), key=pairs.get)
        merges.append((left, right))
        for word, symbols in words.items():
            merged, place = [], 0
            while place < len(symbols):
                joins = symbols[place : place + 2] == [left, right]
                merged.append(left + right if joins else symbols[place])
                place += 2 if joins else 1
            words[word] = merged
    alphabet = sorted(bytes_to_unicode().values())
    tokens = [
        *alphabet,
        *(c + "</w>" for c in alphabet),
        *(a + b for a, b in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_ENCODER["max_position_embeddings"])


def build_text_encoder() -> None:
    """Captions to what they say: every colour, shape, ... has an orthonormal code; a caption's is their sum.

    Trained against pictures, as CLIP is, the encoder put new colours between the known ones as RGB
    does, and the UNet drew them unseen (59 % right). Orthonormal codes leave nothing to interpolate.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = build_tokenizer()
    rng = np.random.default_rng([SEED, 3])
    torch.manual_seed(SEED)
    config = CLIPTextConfig(
        **TEXT_ENCODER,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    text_encoder = CLIPTextModel(config)
    width = TEXT_ENCODER["hidden_size"]
    values = {
        "color": scenes.COLORS, "shape": scenes.SHAPES, "style": scenes.STYLES, "size": scenes.RADII_PX,
        "position": scenes.ANCHORS_PX, "background": scenes.COLORS,
    }  # fmt: skip
    names = [f"{field} {value}" for field, kinds in values.items() for value in kinds]
    codes = torch.linalg.qr(torch.randn(width, width)).Q[: len(names)]
    code_of = dict(zip(names, codes, strict=True))
    projection = torch.nn.Linear(width, width)
    both = torch.nn.ModuleList([text_encoder, projection])
    average = Average(text_encoder, decay=0.99)
    optimizer = torch.optim.AdamW(both.parameters(), lr=TEXT_LR, weight_decay=0.01)
    started = time.time()
    for step in range(TEXT_STEPS):
        drawn = [scenes.draw_scene(rng, new=bool(rng.random() < 0.5)) for _ in range(TEXT_BATCH)]
        leave_out = ["size", "position", "background"]
        omitted = [() if rng.random() < 2 / 3 else (str(rng.choice(leave_out)),) for _ in drawn]
        captions = [scenes.caption(scene, omit) for scene, omit in zip(drawn, omitted, strict=True)]
        expected = torch.stack([
            sum(code_of[f"{field} {getattr(scene, field)}"] for field in values if field not in omit)
            for scene, omit in zip(drawn, omitted, strict=True)
        ])  # fmt: skip
        # 77 positions in one of eight steps, so that all are trained; 24 hold any caption.
        length = tokenizer.model_max_length if step % 8 == 0 else 24
        tokens = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        told = projection(text_encoder(tokens.input_ids).pooler_output)
        loss = (told - expected).square().sum(dim=1).mean()
        for group in optimizer.param_groups:
            group["lr"] = TEXT_LR * cosine(step, TEXT_STEPS)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        average.update()
        if (step + 1) % 100 == 0:
            told_values, said = told @ codes.T > 0.5, expected @ codes.T > 0.5
            exact = (told_values == said).all(dim=1).float().mean()
            print(f"text {step + 1}: loss {loss:.4f}, exact {exact:.3f}, {time.time() - started:.0f} s", flush=True)
    save(text_encoder, average, "text_encoder", steps=TEXT_STEPS, exact=float(exact), seconds=time.time() - started)
    tokenizer.save_pretrained(BUILD / "tokenizer")


def build_unet() -> None:
    """DDPM training on KNOWN concepts only."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    from sdtrain.ground.diffusion import add_noise

    vae = AutoencoderKL.from_pretrained(BUILD / "vae").requires_grad_(False)
    text_encoder = CLIPTextModel.from_pretrained(BUILD / "text_encoder").requires_grad_(False).eval()
    tokenizer = CLIPTokenizer.from_pretrained(BUILD / "tokenizer")
    rng = np.random.default_rng([SEED, 4])
    images, drawn = render_world(10000, rng, new_share=0.0)
    with torch.no_grad():
        posteriors = [vae.encode(to_pixels(images[i : i + 100])).latent_dist for i in range(0, len(images), 100)]
    mean, std = (torch.cat([getattr(p, name) for p in posteriors]) for name in ("mean", "std"))
    torch.manual_seed(SEED)
    unet = UNet2DConditionModel(**UNET)
    alphas_cumprod = DDPMScheduler(**SCHEDULER).alphas_cumprod
    average = Average(unet, decay=0.997)
    optimizer = MuonAndAdam(unet, UNET_LR)
    started, losses = time.time(), []
    for step in range(UNET_STEPS):
        rows = rng.integers(0, len(images), UNET_BATCH)
        captions = ["" if rng.random() < 0.1 else scenes.draw_caption(drawn[row], rng) for row in rows]
        ids = tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids
        latents = (mean[rows] + std[rows] * torch.randn_like(std[rows])) * vae.config.scaling_factor
        noise, timesteps = torch.randn_like(latents), torch.randint(0, len(alphas_cumprod), (UNET_BATCH,))
        noisy_latents = add_noise(latents, noise, timesteps, alphas_cumprod)
        loss = F.mse_loss(unet(noisy_latents, timesteps, text_encoder(ids).last_hidden_state).sample, noise)
        loss.backward()
        optimizer.step(cosine(step, UNET_STEPS))
        average.update()
        losses.append(loss.item())
        if (step + 1) % 250 == 0:
            print(f"unet {step + 1}: loss {np.mean(losses[-250:]):.4f}, {time.time() - started:.0f} s", flush=True)
            raw = {k: v.clone() for k, v in unet.state_dict().items()}
            save(unet, average, "unet", steps=step + 1, loss=np.mean(losses[-250:]), seconds=time.time() - started)
            unet.load_state_dict(raw)


def build_assemble() -> None:
    """Write data/builtin in fp16, load it as the pipeline does, and measure it."""
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    from sdtrain.models.pipelines import generate, load_pipeline

    out = ROOT / "data" / "builtin"
    vae = AutoencoderKL.from_pretrained(BUILD / "vae")
    StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=CLIPTextModel.from_pretrained(BUILD / "text_encoder").half(),
        tokenizer=CLIPTokenizer.from_pretrained(BUILD / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(BUILD / "unet").half(),
        scheduler=DDPMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(out)
    for path in out.glob("*/config.json"):  # saved with the path of the machine that built it
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n")
    pipeline = load_pipeline(out)
    held_out = to_pixels(render_world(256, np.random.default_rng([SEED, 2]))[0])
    with torch.no_grad():
        posterior = pipeline.vae.encode(held_out).latent_dist
        scores = {"vae_psnr_db": round(psnr_db(pipeline.vae.decode(posterior.mean).sample, held_out), 2)}
    rng = np.random.default_rng([SEED, 5])
    wanted = [scenes.draw_scene(rng, new=False) for _ in range(200)]
    images = generate(
        pipeline,
        [scenes.caption(s) for s in wanted],
        list(range(200)),
        num_inference_steps=25,
        guidance_scale=4.0,
        batch_size=100,
    )
    shown = [scenes.measure(image) for image in images]
    for field in ("color", "shape", "size", "position", "background"):
        right = [s is not None and getattr(s, field) == getattr(w, field) for s, w in zip(shown, wanted, strict=True)]
        scores[f"known_{field}_accuracy"] = float(np.mean(right))
    facts = {part: json.loads((BUILD / f"{part}.json").read_text()) for part in ("vae", "text_encoder", "unet")}
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 1e6
    print(json.dumps({"built": facts, "measured": scores, "megabytes": round(size, 2)}, indent=2))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("THREADS", "2")))
    globals()[f"build_{sys.argv[1]}"]()
