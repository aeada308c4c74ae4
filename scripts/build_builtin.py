"""Build the tiny base model of data/builtin/ from nothing: a real, small Stable Diffusion, in one command.

    python scripts/build_builtin.py                     # everything, from an emptied .build/
    python scripts/build_builtin.py unet assemble       # for development: these parts, on what .build/ holds

The parts, in their order, with the minutes that each took on 2 shared cores of an AMD EPYC (AVX-512), no GPU:

    vae           18   AutoencoderKL, 8x down, 4 latent channels, on scenes and collages; 3,000 steps
    text_encoder   4   CLIPTokenizer and CLIPTextModel. Captions are regressed onto what they say: the sum of fixed
                       codes, one orthonormal code for every colour, shape, ... (no images, no contrast); 800 steps
    unet          15   UNet2DConditionModel, as DDPM on that VAE's latents of KNOWN concepts only; 2,000 steps
    assemble       3   all of it in fp16 in the Diffusers layout: the candidate, `.build/builtin/`. Candidate and
                       data/builtin are then measured alike; both are printed and go to `.build/report.json`

A part's folder appears in `.build/` when the part has ended, not before. A UNet knows which VAE and text
encoder it was trained on, and isn't assembled with others. data/builtin/ is only read; to ship a candidate:

    cp -r .build/builtin/. data/builtin/

Every seed and hyperparameter is below. The number of threads is among them: sums are split by it, so it
decides how they round, and with 1 instead of 2 VAE and text encoder differ after 20 steps. Another kind of CPU
or other versions than those of constraints.txt may round otherwise too. data/builtin/README.md has what was measured.
"""

import argparse
import json
import math
import os
import platform
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin cost 3x the time beside other work

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from sdtrain.data import scenes  # noqa: E402
from sdtrain.ground.diffusion import add_noise, mid_bin_timesteps  # noqa: E402
from sdtrain.ground.errors import InputError  # noqa: E402
from sdtrain.ground.files import new_folder, read_json, sha256_file, write_json  # noqa: E402

BUILD = ROOT / ".build"
SHIPPED = ROOT / "data" / "builtin"
SEED = 20261121
NUM_THREADS = 2

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
VAE_SCENES, VAE_COLLAGES, UNET_SCENES = 12000, 3000, 10000
VAE_STEPS, VAE_DECAY_STEPS, VAE_BATCH, VAE_LR, VAE_KL = 3000, 7000, 8, 0.02, 1e-8
TEXT_STEPS, TEXT_BATCH, TEXT_LR = 800, 128, 1e-3
UNET_STEPS, UNET_BATCH, UNET_LR = 2000, 32, 0.02
TRAINED = ("vae", "text_encoder", "unet")
NEEDS = {"vae": (), "text_encoder": (), "unet": ("vae", "text_encoder"), "assemble": TRAINED}
"""Part: the parts that it takes from `.build/`."""
FIELDS = ("color", "shape", "style", "size", "position", "background")
HELD_OUT, PROMPTS, READ_CAPTIONS = 256, 200, 2000
"""What a model is measured on: scenes for VAE and UNet, prompts of each kind, captions."""


def values_of_fields() -> dict[str, list[str]]:
    """Field of a scene: every value that a caption can give it."""
    kinds = (scenes.COLORS, scenes.SHAPES, scenes.STYLES, scenes.RADII_PX, scenes.ANCHORS_PX, scenes.COLORS)
    return {field: list(values) for field, values in zip(FIELDS, kinds, strict=True)}


def render_world(num: int, rng: np.random.Generator, new_share: float = 0.5) -> tuple[np.ndarray, list[scenes.Scene]]:
    """`num` scenes as uint8 [num, 64, 64, 3], and what they show."""
    drawn = [scenes.draw_scene(rng, new=bool(rng.random() < new_share)) for _ in range(num)]
    return np.stack([np.asarray(scenes.render(scene, scenes.place(scene, rng))) for scene in drawn]), drawn


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


def held_out_pixels() -> torch.Tensor:
    return to_pixels(render_world(HELD_OUT, np.random.default_rng([SEED, 2]))[0])


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


def save_average(module, average: Average, folder: Path) -> None:
    module.load_state_dict(average.shadow)
    module.save_pretrained(folder)


def hashes_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that a model is made of, by its path in `folder`; the README isn't."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "README.md"]
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}


def trained_on() -> dict[str, dict[str, str]]:
    """The hashes of the VAE's and the text encoder's files that `.build/` holds."""
    return {part: hashes_of(BUILD / part / part) for part in ("vae", "text_encoder")}


def build_vae(folder: Path) -> dict:
    from diffusers import AutoencoderKL

    rng = np.random.default_rng([SEED, 1])
    world, _ = render_world(VAE_SCENES, rng)
    images = np.concatenate([world, np.stack([render_collage(rng) for _ in range(VAE_COLLAGES)])])
    held_out = held_out_pixels()
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
        optimizer.step(cosine(step, VAE_DECAY_STEPS))  # ends at 61 % of the peak rate: the average has settled
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
            vae.load_state_dict(raw)
    vae.load_state_dict(average.shadow)
    with torch.no_grad():
        std = vae.encode(to_pixels(world[:2048])).latent_dist.mean.std()
    vae.register_to_config(scaling_factor=round(1 / float(std), 5))
    save_average(vae, average, folder / "vae")
    return {"steps": VAE_STEPS, "batch": VAE_BATCH, "scaling_factor": vae.config.scaling_factor}


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


def draw_captions(rng: np.random.Generator, num: int) -> tuple[list[str], list[list[str]]]:
    """Captions, one of three with a field left out, and what each says, as `field value`."""
    drawn = [scenes.draw_scene(rng, new=bool(rng.random() < 0.5)) for _ in range(num)]
    leave_out = ["size", "position", "background"]
    omitted = [() if rng.random() < 2 / 3 else (str(rng.choice(leave_out)),) for _ in drawn]
    both = list(zip(drawn, omitted, strict=True))
    said = [[f"{field} {getattr(scene, field)}" for field in FIELDS if field not in omit] for scene, omit in both]
    return [scenes.caption(scene, omit) for scene, omit in both], said


def build_text_encoder(folder: Path) -> dict:
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
    names = [f"{field} {value}" for field, values in values_of_fields().items() for value in values]
    codes = torch.linalg.qr(torch.randn(width, width)).Q[: len(names)]
    code_of = dict(zip(names, codes, strict=True))
    projection = torch.nn.Linear(width, width)
    both = torch.nn.ModuleList([text_encoder, projection])
    average = Average(text_encoder, decay=0.99)
    optimizer = torch.optim.AdamW(both.parameters(), lr=TEXT_LR, weight_decay=0.01)
    started = time.time()
    for step in range(TEXT_STEPS):
        captions, said = draw_captions(rng, TEXT_BATCH)
        expected = torch.stack([sum(code_of[name] for name in names_said) for names_said in said])
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
            exact = ((told @ codes.T > 0.5) == (expected @ codes.T > 0.5)).all(dim=1).float().mean()
            print(f"text {step + 1}: loss {loss:.4f}, exact {exact:.3f}, {time.time() - started:.0f} s", flush=True)
    save_average(text_encoder, average, folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    return {"steps": TEXT_STEPS, "batch": TEXT_BATCH}


def build_unet(folder: Path) -> dict:
    """DDPM training on KNOWN concepts only."""
    from diffusers import DDPMScheduler, UNet2DConditionModel

    from sdtrain.models.parts import load_text_encoder, load_tokenizer, load_vae

    on, vae = trained_on(), load_vae(BUILD / "vae")
    text_encoder, tokenizer = load_text_encoder(BUILD / "text_encoder"), load_tokenizer(BUILD / "text_encoder")
    rng = np.random.default_rng([SEED, 4])
    images, drawn = render_world(UNET_SCENES, rng, new_share=0.0)
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
    save_average(unet, average, folder / "unet")
    return {"steps": UNET_STEPS, "batch": UNET_BATCH, "loss": float(np.mean(losses[-250:])), "trained_on": on}


def assemble(out: Path) -> None:
    """Write the candidate's pipeline to `out`, in fp16.

    Raises:
        InputError: the UNet was trained on another VAE or text encoder than those in `.build/`.
    """
    from diffusers import DDPMScheduler, StableDiffusionPipeline

    from sdtrain.models.parts import load_text_encoder, load_tokenizer, load_unet, load_vae

    knows, there = read_json(BUILD / "unet" / "built.json")["trained_on"], trained_on()
    for part in there:
        if knows[part] != there[part]:
            raise InputError(f"{BUILD / 'unet'} was trained on another {part} than {BUILD / part}: build unet again")
    StableDiffusionPipeline(
        vae=load_vae(BUILD / "vae").half(),
        text_encoder=load_text_encoder(BUILD / "text_encoder").half(),
        tokenizer=load_tokenizer(BUILD / "text_encoder"),
        unet=load_unet(BUILD / "unet" / "unet").half(),
        scheduler=DDPMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(out)
    for path in out.glob("*/config.json"):  # saved with the path of the machine that built it
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n")


def measure_model(folder: Path) -> dict[str, float]:
    """What a pipeline in the Diffusers layout can do, loaded as the stages do; the same questions to each.

    The UNet's loss is on its own VAE's latents: between two VAEs it says less than the accuracies do.
    """
    from sdtrain.models.pipelines import load_pipeline

    pipeline = load_pipeline(folder).to("cpu")
    with torch.no_grad():
        return (
            {"vae_psnr_db": measure_vae(pipeline), "text_exact_reading": measure_text_encoder(pipeline)}
            | {"unet_held_out_loss": measure_unet(pipeline)}
            | measure_prompts(pipeline, "known")
            | measure_prompts(pipeline, "new")
        )


def measure_vae(pipeline) -> float:
    """PSNR in dB of held-out scenes, half of them with new concepts."""
    pixels = held_out_pixels()
    return psnr_db(pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mean).sample, pixels)


def measure_text_encoder(pipeline) -> float:
    """Share of captions of which a linear map reads all that they say, and no more.

    Least squares fits the map on as many other captions: the one of the training isn't shipped.
    """
    from sdtrain.models.parts import tokenize

    names = [f"{field} {value}" for field, values in values_of_fields().items() for value in values]
    captions, said = draw_captions(np.random.default_rng([SEED, 6]), 2 * READ_CAPTIONS)
    truth = torch.tensor([[name in names_said for name in names] for names_said in said]).float()
    chunks = (captions[i : i + 100] for i in range(0, len(captions), 100))
    told = torch.cat([pipeline.text_encoder(tokenize(pipeline.tokenizer, chunk)).pooler_output for chunk in chunks])
    told = torch.cat([told, torch.ones(len(told), 1)], dim=1)
    fit, test = slice(READ_CAPTIONS), slice(READ_CAPTIONS, None)
    weights = torch.linalg.lstsq(told[fit].double(), truth[fit].double()).solution
    return float(((told[test].double() @ weights > 0.5) == truth[test].bool()).all(dim=1).double().mean())


def measure_unet(pipeline) -> float:
    """Mean squared error of ε on held-out scenes of known concepts, each at 8 timesteps with fixed noise."""
    from sdtrain.models.parts import tokenize

    images, drawn = render_world(HELD_OUT, np.random.default_rng([SEED, 7]), new_share=0.0)
    latents = pipeline.vae.encode(to_pixels(images)).latent_dist.mean * pipeline.vae.config.scaling_factor
    ids = tokenize(pipeline.tokenizer, [scenes.caption(scene) for scene in drawn])
    encoder_hidden_states = pipeline.text_encoder(ids).last_hidden_state
    alphas_cumprod, generator, losses = pipeline.scheduler.alphas_cumprod, torch.Generator().manual_seed(SEED), []
    for timestep in mid_bin_timesteps(8, len(alphas_cumprod)):
        noise, timesteps = torch.randn(latents.shape, generator=generator), timestep.repeat(len(latents))
        noisy_latents = add_noise(latents, noise, timesteps, alphas_cumprod)
        losses.append(F.mse_loss(pipeline.unet(noisy_latents, timesteps, encoder_hidden_states).sample, noise))
    return float(torch.stack(losses).mean())


def measure_prompts(pipeline, kind: str) -> dict[str, float]:
    """Share of pictures that show what their prompt says, by field.

    Of prompts with `new` concepts only those count whose colour, shape or style is new: the UNet has
    never seen them, so that 0 is right, and the default job has something to teach.
    """
    from sdtrain.models.pipelines import generate

    rng = np.random.default_rng([SEED, 5])
    wanted = [scenes.draw_scene(rng, new=kind == "new", known_background=kind == "new") for _ in range(PROMPTS)]
    prompts = [scenes.caption(scene) for scene in wanted]
    options = {"num_inference_steps": 25, "guidance_scale": 4.0, "batch_size": 100}
    shown = [scenes.measure(image) for image in generate(pipeline, prompts, list(range(PROMPTS)), **options)]
    accuracies = {}
    for field in FIELDS if kind == "known" else scenes.NEW:
        asked = [
            (getattr(found, field, None), getattr(scene, field))
            for found, scene in zip(shown, wanted, strict=True)
            if kind == "known" or getattr(scene, field) in scenes.NEW[field]
        ]
        if asked:
            accuracies[f"{kind}_{field}_accuracy"] = float(np.mean([found == said for found, said in asked]))
    return accuracies


def compare_with_shipped(candidate: Path) -> None:
    """Measure candidate and shipped model, print both, and write `.build/report.json`."""
    folders = {"shipped": SHIPPED, "candidate": candidate}
    measured = {name: measure_model(folder) for name, folder in folders.items()}
    hashes = {name: hashes_of(folder) for name, folder in folders.items()}
    files = {
        file: {name: hashes[name].get(file) for name in folders}
        | {"identical": hashes["shipped"].get(file) == hashes["candidate"].get(file)}
        for file in sorted(hashes["shipped"] | hashes["candidate"])
    }
    report = {
        "seed": SEED,
        "num_threads": torch.get_num_threads(),
        "cpu": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "versions": {name: version(name) for name in ("torch", "numpy", "pillow", "diffusers", "transformers")},
        "built": {part: read_json(BUILD / part / "built.json") for part in TRAINED},
        "measured": measured,
        "files": files,
    }
    write_json(BUILD / "report.json", report)
    print(f"\n{'':28}{'shipped':>10}{'candidate':>11}{'difference':>12}")
    for name, shipped in measured["shipped"].items():
        new = measured["candidate"][name]
        print(f"{name:28}{shipped:10.4f}{new:11.4f}{new - shipped:+12.4f}")
    print()
    for file, row in files.items():
        print(f"{'identical' if row['identical'] else 'different'}  {file}")


def build_part(part: str) -> None:
    """Build one part in `.build/`: its folder takes its place when it has ended well, with what it took."""
    started = time.time()
    if part == "assemble":
        with new_folder(BUILD / "builtin") as folder:
            assemble(folder)
            (BUILD / "report.json").unlink(missing_ok=True)  # of the candidate that this one replaces
        compare_with_shipped(BUILD / "builtin")
    else:
        build = {"vae": build_vae, "text_encoder": build_text_encoder, "unet": build_unet}[part]
        with new_folder(BUILD / part) as folder:
            facts = build(folder)
            write_json(folder / "built.json", facts | {"minutes": round((time.time() - started) / 60, 1)})
    print(f"{part}: {(time.time() - started) / 60:.1f} minutes", flush=True)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(NEEDS)}; none named: all")
    named = parser.parse_args(arguments).parts
    if unknown := set(named) - set(NEEDS):  # argparse's `choices` refuses that none is named
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(NEEDS)}")
    torch.set_num_threads(NUM_THREADS)
    torch.use_deterministic_algorithms(True)
    if not named and BUILD.exists():
        shutil.rmtree(BUILD)
    parts = [part for part in NEEDS if part in named or not named]
    for part in parts:
        for needed in NEEDS[part]:
            if needed not in parts and not (BUILD / needed).exists():
                raise InputError(f"{part} needs {BUILD / needed}, which isn't there: name {needed} as well")
    for part in parts:
        build_part(part)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(str(error))
