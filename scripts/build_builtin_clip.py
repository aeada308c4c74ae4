"""Train the judge of the generated worlds, data/builtin_clip/, from nothing: a real, small CLIP, in one command.

    python scripts/build_builtin_clip.py

Images and captions are of both worlds of `sdtrain.data` with all their concepts, drawn anew with a seed of their own.
No weights of data/builtin are taken over: whoever judges a model must not be a part of it. Only its tokenizer is the
same, and its VAE encodes and decodes some of the images, so that what every latent model loses counts as no fault.

The loss is CLIP's (Radford et al. 2021) with two more kinds of negatives, as NegCLIP's has (Yuksekgonul et al. 2023):
captions with one wrong word, since other images' captions rarely differ in the shape or the place alone; and spoilt
images, blurred, cut in half or without the object, since no caption speaks of such faults, so that nothing else would
make the features show them. Captions that happen to be true of another image of the batch are no negatives of it.
Besides, a linear head for each field, thrown away afterwards, must read it from the features: without them, three
trainings of 600 to 900 steps, alike otherwise but for details, hardly learned where an object is.

Candidate (`.build/builtin_clip/`) and data/builtin_clip are then measured alike; both are printed and go to
`.build/builtin_clip.json`. It takes about 10 minutes of one core of an AMD EPYC (AVX-512), no GPU. data/builtin_clip/
is only read; to ship a candidate:

    cp -r .build/builtin_clip/. data/builtin_clip/

Every seed and hyperparameter is below; the number of threads is one of them, since sums are split by it.
"""

import argparse
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin cost 3x the time beside other work

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from sdtrain.data import lit_scenes, scenes  # noqa: E402
from sdtrain.ground.errors import InputError  # noqa: E402
from sdtrain.ground.files import new_folder, sha256_file, write_json  # noqa: E402

BUILD = ROOT / ".build"
SHIPPED = ROOT / "data" / "builtin_clip"
BASE = ROOT / "data" / "builtin"
SEED = 20261128
NUM_THREADS = 1

PROJECTION_DIM = 32
VISION = {
    "image_size": scenes.SIZE_PX,
    "patch_size": 16,
    "hidden_size": 88,
    "intermediate_size": 144,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
    "projection_dim": PROJECTION_DIM,
}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
    "projection_dim": PROJECTION_DIM,
    "max_position_embeddings": 24,  # the longest caption has 20 tokens
}
SHAPES, FREE_SHAPES, LIT, ROUND_TRIPS = 20000, 4000, 5000, 3000
"""Images of each kind, and how many of them also went through the VAE."""
STEPS, WARMUP_STEPS, BATCH, SPOILT, MUON_LR, ADAM_LR = 3000, 100, 96, 32, 0.02, 2e-3
POSITION_SCALE = 2.0
"""Of the patches' first position codes: after 150 steps of a classifier 96 % of places were right, with 0.5 71 %."""
MAX_LOGIT_SCALE = math.log(100)
FEATURE_SCALE = 1 / 8
"""Of the image features at the end, whose root mean square then is 0.8, so that the metrics have readable values."""
MAX_NOISE = 0.03
"""Greatest standard deviation of the noise on pixels in -1..1."""
BLUR_PX = (0.7, 2.5)
"""Radii of spoilt copies."""
VALUES = {
    "color": list(scenes.COLORS),
    "shape": list(scenes.SHAPES),
    "style": list(scenes.STYLES),
    "size": list(scenes.RADII_PX),
    "position": list(scenes.ANCHORS_PX),
    "background": list(scenes.COLORS),
}
"""Field of a scene: every value that a caption can give it."""
FIELDS = tuple(VALUES)
RETRIEVAL, FIT, SET = 256, 2000, 320
"""What a model is measured on: scenes for retrieval, for fitting a linear map (as many more test it), and in a set."""
NEIGHBOURS, PROJECTIONS = 5, 256


@dataclass(frozen=True)
class Example:
    """An image and what is true of it; `truth` has every field, and the light's name in the lit world."""

    image: np.ndarray
    """uint8 [64, 64, 3]."""
    empty: np.ndarray
    """The same without its object."""
    kind: str
    scene: scenes.Scene
    light: str | None = None

    @property
    def truth(self) -> dict[str, str | None]:
        return {field: getattr(self.scene, field) for field in FIELDS} | {"light": self.light}

    def draw_words(self, rng: np.random.Generator) -> "Words":
        """A caption such as the world's."""
        omit: tuple[str, ...] = ()
        if self.kind == "free_shapes" or (self.kind == "shapes" and rng.random() < 0.2):
            omit = ("size", "position")
        elif rng.random() < 1 / 3:
            omit = (str(rng.choice(["size", "position", "background"])),)
        return Words(self.scene, omit, self.light if rng.random() < 0.5 else None)


@dataclass(frozen=True)
class Words:
    """A caption: a scene's, without the fields of `omit`, and under a light, where it has one."""

    scene: scenes.Scene
    omit: tuple[str, ...] = ()
    light: str | None = None

    @property
    def text(self) -> str:
        text = scenes.caption(self.scene, self.omit)
        return text if self.light is None else f"{self.light} light {text}"

    @property
    def said(self) -> dict[str, str]:
        """What it says, by field."""
        said = {field: getattr(self.scene, field) for field in FIELDS if field not in self.omit}
        return said if self.light is None else said | {"light": self.light}

    def with_wrong(self, field: str, rng: np.random.Generator) -> "Words":
        """The same with another value of that field, or of the light."""
        if field == "light":
            return replace(self, light=str(rng.choice([name for name in lit_scenes.NAMED if name != self.light])))
        taken = {getattr(self.scene, field)}
        if field in ("color", "background"):
            taken = {self.scene.color, self.scene.background}
        other = str(rng.choice([value for value in VALUES[field] if value not in taken]))
        return replace(self, scene=replace(self.scene, **{field: other}))


def draw_flat(world: str, rng: np.random.Generator) -> Example:
    """A scene of `shapes` or `free_shapes`, half of them with new concepts."""
    scene, placement, _ = scenes.draw_example(world, 0.5, rng)
    image = np.asarray(scenes.render(scene, placement))
    return Example(image, np.broadcast_to(np.uint8(scenes.COLORS[scene.background]), image.shape), world, scene)


def draw_lit(rng: np.random.Generator) -> Example:
    """A scene of the lit world, which has known concepts only, under a light that captions name."""
    drawn = lit_scenes.draw_lit(int(rng.integers(2**31)), 0)
    image, empty = (np.asarray(draw(drawn.lit, drawn.light)) for draw in (lit_scenes.render, lit_scenes.wall))
    return Example(image, empty, "lit", drawn.lit.scene, drawn.light_name)


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 [B, 64, 64, 3] to float [B, 3, 64, 64] in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


@torch.inference_mode()
def round_trip(images: np.ndarray) -> np.ndarray:
    """Images after the built-in base's VAE, uint8 [N, 64, 64, 3]."""
    from sdtrain.models.parts import load_vae

    vae, trips = load_vae(BASE), []
    for start in range(0, len(images), 50):
        pixels = vae.decode(vae.encode(to_pixels(images[start : start + 50])).latent_dist.mean).sample
        trips.append(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(trips)


def blur(image: np.ndarray, radius_px: float) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius_px)))


def spoil(image: np.ndarray, empty: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image blurred, without what is on one side of a line through its middle half, or without the object."""
    kind = rng.random()
    if kind < 0.5:  # half of them: the fault that is the hardest to see
        return blur(image, rng.uniform(*BLUR_PX))
    if kind < 0.75:
        return empty
    object_px = np.argwhere(np.abs(image.astype(int) - empty).max(axis=2) > 30)
    ys, xs = np.mgrid[: scenes.SIZE_PX, : scenes.SIZE_PX]
    angle = rng.uniform(0, 2 * math.pi)
    along = ys * math.sin(angle) + xs * math.cos(angle)
    cut = np.quantile(along[tuple(object_px.T)], rng.uniform(0.3, 0.7)) if len(object_px) else 0.0
    return np.where((along > cut)[:, :, None], empty, image)


def new_model() -> tuple[torch.nn.Module, object]:
    """The untrained CLIP and its tokenizer."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer", model_max_length=TEXT["max_position_embeddings"])
    text = TEXT | {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(text_config=text, vision_config=VISION, projection_dim=PROJECTION_DIM)
    model = CLIPModel(config)
    positions = model.vision_model.embeddings.position_embedding.weight
    with torch.no_grad():
        positions[1:] = POSITION_SCALE * grid_positions(
            VISION["image_size"] // VISION["patch_size"], positions.shape[1]
        )
    return model, tokenizer


def grid_positions(side: int, width: int) -> Tensor:
    """Sines and cosines of the row and the column of each patch, [side², width] (Beyer et al. 2022)."""
    angles = torch.arange(side)[:, None] * 10.0 ** -torch.linspace(0, 1, width // 4)
    codes = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = codes[:, None].expand(side, side, -1), codes[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)


def is_true(said: list[dict], truths: list[dict]) -> Tensor:
    """Which caption is true of which image, bool [len(said), len(truths)]."""
    names = (*FIELDS, "light")
    words = np.array([[says.get(name, "") for name in names] for says in said])[:, None]
    shown = np.array([[truth[name] or "unlit" for name in names] for truth in truths])
    return torch.from_numpy(((words == "") | (words == shown)).all(axis=2))


def contrastive_loss(similarity: Tensor, true: Tensor, num: int) -> Tensor:
    """CLIP's loss of a batch, with wrong captions and spoilt images as further negatives.

    Args:
        similarity: scaled cosines of captions and images [C, I]. The first `num` of each belong together, in their
            order; the other captions are wrong ones, the other images spoilt copies, of which no caption is true.
        true: which caption is true of which of the first images, bool [C, num]; a pair that is true by chance counts
            neither way.
    """
    own = torch.arange(num)
    by_chance = true.clone()
    by_chance[own, own] = False
    whole = similarity[:, :num].masked_fill(by_chance, -math.inf)
    of_captions = F.cross_entropy(torch.cat([whole[:num], similarity[:num, num:]], dim=1), own)
    return (of_captions + F.cross_entropy(whole.T, own)) / 2


def train(folder: Path) -> dict:
    """Train the model and write it to `folder`, in fp16."""
    rng = np.random.default_rng([SEED, 1])
    bank = [draw_flat("shapes", rng) for _ in range(SHAPES)]
    bank += [draw_flat("free_shapes", rng) for _ in range(FREE_SHAPES)] + [draw_lit(rng) for _ in range(LIT)]
    bank = [bank[row] for row in rng.permutation(len(bank))]
    trips = round_trip(np.stack(images_of(bank[:ROUND_TRIPS])))
    torch.manual_seed(SEED)
    model, tokenizer = new_model()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embedding" not in name]
    heads = torch.nn.ModuleDict({field: torch.nn.Linear(PROJECTION_DIM, len(VALUES[field])) for field in FIELDS})
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)] + list(heads.parameters())
    muon = torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.0)
    adam = torch.optim.AdamW(rest, lr=ADAM_LR, betas=(0.9, 0.99), weight_decay=0.0)
    started, losses = time.time(), []
    for step in range(STEPS):
        rows = rng.choice(len(bank), BATCH, replace=False)
        drawn = [bank[row] for row in rows]
        images = [trips[row] if row < ROUND_TRIPS and rng.random() < 0.5 else bank[row].image for row in rows]
        images += [spoil(images[i], drawn[i].empty, rng) for i in range(SPOILT)]
        pixels = to_pixels(np.stack(images))
        pixels = pixels + torch.rand(len(pixels), 1, 1, 1) * MAX_NOISE * torch.randn_like(pixels)
        words = [example.draw_words(rng) for example in drawn]
        words += [right.with_wrong(str(rng.choice(list(right.said))), rng) for right in words]
        ids = tokenizer([caption.text for caption in words], padding=True, return_tensors="pt").input_ids
        image_embeds = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        text_embeds = model.text_projection(model.text_model(input_ids=ids).pooler_output)
        cosines = F.normalize(text_embeds) @ F.normalize(image_embeds).T
        true = is_true([caption.said for caption in words], [example.truth for example in drawn])
        loss = contrastive_loss(model.logit_scale.exp() * cosines, true, BATCH)
        for field, head in heads.items():
            shown = torch.tensor([VALUES[field].index(example.truth[field]) for example in drawn])
            loss = loss + F.cross_entropy(head(image_embeds[:BATCH]), shown) / len(heads)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale = min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        for optimizer, lr in ((muon, MUON_LR), (adam, ADAM_LR)):
            optimizer.param_groups[0]["lr"] = lr * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f"{step + 1}: loss {np.mean(losses[-100:]):.4f}, {time.time() - started:.0f} s", flush=True)
    save(model, tokenizer, folder)
    return {"steps": STEPS, "batch": BATCH, "loss": float(np.mean(losses[-100:]))}


def save(model: torch.nn.Module, tokenizer: object, folder: Path) -> None:
    """Write a CLIP in the layout of Transformers, in fp16, its image features scaled; no cosine sees that."""
    from transformers import CLIPImageProcessorPil

    model.half()
    with torch.no_grad():
        model.visual_projection.weight.mul_(FEATURE_SCALE)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = scenes.SIZE_PX
    CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(folder)


@dataclass(frozen=True)
class Judge:
    """A CLIP folder as `evaluate` loads it."""

    images: Callable[[list[np.ndarray]], np.ndarray]
    """Images, uint8 [64, 64, 3], to features [N, d]."""
    captions: Callable[[list[str]], np.ndarray]


def load_judge(folder: Path) -> Judge:
    from sdtrain.evaluation.clip_score import load_caption_features
    from sdtrain.evaluation.features import load_features

    device = torch.device("cpu")
    images, captions = load_features(folder, "builtin_clip", device), load_caption_features(folder, device)
    return Judge(
        lambda arrays: images.extract([Image.fromarray(array) for array in arrays], 64),
        lambda texts: captions.extract(texts, 64),
    )


def measure(folder: Path) -> dict[str, float]:
    """What a CLIP in the layout of Transformers can tell, by name; the same questions to each."""
    judge, rng = load_judge(folder), np.random.default_rng([SEED, 2])
    flat = [draw_flat("shapes", rng) for _ in range(RETRIEVAL)]
    lit = [draw_lit(rng) for _ in range(RETRIEVAL)]
    return (
        {"retrieval_shapes": measure_retrieval(judge, flat), "retrieval_lit": measure_retrieval(judge, lit)}
        | measure_captions(judge, flat)
        | measure_probe(judge)
        | measure_scores(judge, flat)
        | measure_sets(judge)
    )


def captions_of(examples: list[Example]) -> list[str]:
    """Their complete captions."""
    return [Words(example.scene, light=example.light).text for example in examples]


def measure_retrieval(judge: Judge, examples: list[Example]) -> float:
    """Share of images whose nearest caption, of all images' complete ones, is their own."""
    captions = captions_of(examples)
    images, texts = judge.images(images_of(examples)), judge.captions(captions)
    nearest = (images @ (texts / np.linalg.norm(texts, axis=1, keepdims=True)).T).argmax(axis=1)
    return float(np.mean([captions[i] == captions[j] for i, j in enumerate(nearest)]))


def measure_captions(judge: Judge, examples: list[Example]) -> dict[str, float]:
    """Area under the ROC curve by which CLIPScore tells right captions from those with one wrong word, by field."""
    from sdtrain.evaluation.clip_score import clip_score

    images, rng = judge.images(images_of(examples)), np.random.default_rng([SEED, 3])
    right = clip_score(images, judge.captions(captions_of(examples)))
    areas = {}
    for field in FIELDS:
        captions = [Words(example.scene).with_wrong(field, rng).text for example in examples]
        scores = clip_score(images, judge.captions(captions))
        higher, equal = right[:, None] > scores, right[:, None] == scores
        areas[f"auc_{field}"] = float((higher + equal / 2).mean())
    return areas


def measure_probe(judge: Judge) -> dict[str, float]:
    """Accuracy, on as many other scenes, of a linear map from features to each field, fitted by least squares."""
    rng = np.random.default_rng([SEED, 4])
    examples = [draw_flat("shapes", rng) for _ in range(2 * FIT)]
    features = judge.images(images_of(examples)).astype(np.float64)
    features = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    accuracies = {}
    for field in FIELDS:
        values, codes = np.unique([getattr(example.scene, field) for example in examples], return_inverse=True)
        weights = np.linalg.lstsq(features[:FIT], np.eye(len(values))[codes[:FIT]], rcond=None)[0]
        accuracies[f"probe_{field}"] = float(((features[FIT:] @ weights).argmax(axis=1) == codes[FIT:]).mean())
    return accuracies


def images_of(examples: list[Example]) -> list[np.ndarray]:
    return [example.image for example in examples]


def blurred(examples: list[Example], radius_px: float) -> list[np.ndarray]:
    return [blur(image, radius_px) for image in images_of(examples)]


def without_object(examples: list[Example], share: float) -> list[np.ndarray]:
    """The images, that share of them without the object."""
    return [e.empty if i < share * len(examples) else e.image for i, e in enumerate(examples)]


DRAWN: dict[str, Callable[[list[Example]], list[np.ndarray]]] = {
    "real": images_of,
    "vae": lambda examples: list(round_trip(np.stack(images_of(examples)))),
    "blur_0.5": lambda examples: blurred(examples, 0.5),
    "blur_1": lambda examples: blurred(examples, 1),
    "blur_2": lambda examples: blurred(examples, 2),
    "hue": lambda examples: [np.roll(image, 1, axis=2) for image in images_of(examples)],
    "empty_0.1": lambda examples: without_object(examples, 0.1),
    "empty_0.5": lambda examples: without_object(examples, 0.5),
}
"""What a model might draw in the place of real images, by name."""


def measure_scores(judge: Judge, examples: list[Example]) -> dict[str, float]:
    """Mean CLIPScore of right captions with images as they are and as a bad model might draw them."""
    from sdtrain.evaluation.clip_score import clip_score

    texts = judge.captions(captions_of(examples))
    return {
        f"clip_score_{name}": float(clip_score(judge.images(draw(examples)), texts).mean())
        for name, draw in DRAWN.items()
    }


def measure_sets(judge: Judge) -> dict[str, float]:
    """The metrics of `sdtrain.evaluation.set_metrics` between real images and others, as they are and spoilt."""
    from sdtrain.evaluation.set_metrics import set_metrics

    rng = np.random.default_rng([SEED, 5])
    real, other = ([draw_flat("shapes", rng) for _ in range(SET)] for _ in range(2))
    features, measured = judge.images(images_of(real)), {}
    for name, draw in DRAWN.items():
        values = set_metrics(features, judge.images(draw(other)), NEIGHBOURS, PROJECTIONS, SEED)
        measured |= {f"{metric}_{name}": value for metric, value in values.items()}
    return measured


def hashes_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a model, by its name; the README isn't one."""
    return {path.name: sha256_file(path) for path in sorted(folder.glob("*")) if path.name != "README.md"}


def report(candidate: Path, built: dict) -> None:
    """Measure the candidate and the shipped model, print both, and write `.build/builtin_clip.json`."""
    folders = {"shipped": SHIPPED, "candidate": candidate}
    measured = {name: measure(folder) for name, folder in folders.items()}
    facts = {
        "seed": SEED,
        "num_threads": torch.get_num_threads(),
        "cpu": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "versions": {name: version(name) for name in ("torch", "numpy", "pillow", "transformers")},
        "built": built,
        "measured": measured,
        "files": {name: hashes_of(folder) for name, folder in folders.items()},
    }
    write_json(BUILD / "builtin_clip.json", facts)
    print(f"\n{'':28}{'shipped':>10}{'candidate':>11}{'difference':>12}")
    for name, shipped in measured["shipped"].items():
        new = measured["candidate"][name]
        print(f"{name:28}{shipped:10.4f}{new:11.4f}{new - shipped:+12.4f}")
    same = facts["files"]["shipped"] == facts["files"]["candidate"]
    print(f"\nThe files are {'the same to the bit' if same else 'different'}.")


def main(arguments: list[str]) -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    torch.set_num_threads(NUM_THREADS)
    torch.use_deterministic_algorithms(True)
    started = time.time()
    with new_folder(BUILD / "builtin_clip") as folder:
        built = train(folder)
    report(BUILD / "builtin_clip", built | {"minutes": round((time.time() - started) / 60, 1)})


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(str(error))
