"""IC-Light for Diffusers: redraws a foreground under another light (Zhang et al. 2025).

The file needs torch, Diffusers, NumPy and Pillow, and nothing else of sdtrain. Saved as `ic_light.py`:

    from ic_light import IcLightPipeline

    pipeline = IcLightPipeline.from_pretrained("folder")
    grey = Image.new("RGB", image.size, (127, 127, 127))
    foreground = Image.composite(image, grey, mask)  # the object on grey; the mask is white where it is
    picture = pipeline(["left light a red vase"], [foreground], guidance_scale=2).images[0]

The UNet sees the foreground's latents, and the background's if it has 12 input channels, beside the noisy ones. With a
light encoder, an environment map becomes tokens beside the text's, with a cross-attention of their own: decoupled as
IP-Adapter's (Ye et al. 2023), but by the text's own projections.
"""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from PIL import Image
from torch import Tensor, nn

_NOISY_CHANNELS = 4


def widen_conv_in(unet: UNet2DConditionModel, in_channels: int) -> None:
    """Let the first convolution see `in_channels` instead of 4; the new ones have zero weights.

    So the output stays what it was, whatever they show; to the bit, unless the convolution adds in another order.

    Raises:
        ValueError: the UNet has neither 4 input channels nor `in_channels`.
    """
    old = unet.conv_in
    if old.in_channels == in_channels:
        return
    if old.in_channels != _NOISY_CHANNELS:
        raise ValueError(f"only a UNet with 4 input channels can be widened to {in_channels}, not {old.in_channels}")
    new = nn.Conv2d(in_channels, old.out_channels, old.kernel_size, old.stride, old.padding).to(old.weight)
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, :_NOISY_CHANNELS] = old.weight
        new.bias.copy_(old.bias)
    unet.conv_in = new.requires_grad_(old.weight.requires_grad)
    unet.register_to_config(in_channels=in_channels)


class LightEncoder(ModelMixin, ConfigMixin):
    """Tokens [B, num_tokens, dim] of environment maps [B, H, W, 3]: linear radiance, 0 or more, of any brightness.

    The last layer starts at zero, and so do the tokens.
    """

    @register_to_config
    def __init__(self, light_size: tuple[int, int], num_tokens: int, dim: int, hidden: int = 128) -> None:
        super().__init__()
        height, width = light_size
        last = nn.Linear(hidden, num_tokens * dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(
            nn.Linear(2 * height * width * 3, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), last
        )

    def forward(self, light: Tensor) -> Tensor:
        expected = (*self.config.light_size, 3)
        if tuple(light.shape[1:]) != expected:
            raise ValueError(f"light maps must be [B, {', '.join(map(str, expected))}], these are {list(light.shape)}")
        radiance = light.float().flatten(1)
        shares = radiance / radiance.mean(dim=1, keepdim=True).clamp(min=1e-6)  # where it comes from, however bright
        inputs = torch.cat([torch.log1p(radiance), shares], dim=1).to(self.layers[0].weight.dtype)
        return self.layers(inputs).unflatten(1, (self.config.num_tokens, self.config.dim))


class LightAttnProcessor:
    """Cross-attention to the text, plus attention to the last `num_tokens` states, those of the light.

    In one softmax with the text, tokens would take weight from it even at zero. Apart from it, zero tokens have zero
    values, because the projections have no bias: the result is the text's to the bit.
    """

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        assert attention_mask is None, "a mask of the text isn't supported"
        query = self._heads(attn, attn.to_q(hidden_states))
        text, light = encoder_hidden_states.tensor_split([-self.num_tokens], dim=1)
        attended = self._attend(attn, query, text) + self._attend(attn, query, light)
        return attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))

    def _attend(self, attn: Attention, query: Tensor, states: Tensor) -> Tensor:
        states = states.contiguous()  # a slice may be multiplied in another order than the text alone
        key, value = self._heads(attn, attn.to_k(states)), self._heads(attn, attn.to_v(states))
        return F.scaled_dot_product_attention(query, key, value)

    @staticmethod
    def _heads(attn: Attention, states: Tensor) -> Tensor:
        return states.unflatten(2, (attn.heads, -1)).transpose(1, 2)


def add_light_tokens(unet: UNet2DConditionModel, num_tokens: int) -> None:
    """From now on the last `num_tokens` of the UNet's `encoder_hidden_states` are the light's: they must be there.

    Raises:
        ValueError: the UNet's cross-attention isn't that of Stable Diffusion 1.x.
    """
    for name, attn in unet.named_modules():
        if isinstance(attn, Attention) and attn.is_cross_attention:
            if any(part is not None for part in (attn.added_kv_proj_dim, attn.to_k.bias, attn.to_v.bias)):
                raise ValueError(f"light tokens need cross-attention as in Stable Diffusion 1.x, which {name} isn't")
            attn.set_processor(LightAttnProcessor(num_tokens))


class IcLightPipeline(StableDiffusionPipeline):
    """Stable Diffusion whose UNet also sees a foreground, and a background or an environment map."""

    model_cpu_offload_seq = "text_encoder->image_encoder->light_encoder->unet->vae"
    _optional_components = [*StableDiffusionPipeline._optional_components, "light_encoder"]  # noqa: RUF012

    def __init__(
        self,
        vae,
        text_encoder,
        tokenizer,
        unet,
        scheduler,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        light_encoder: LightEncoder | None = None,
        requires_safety_checker: bool = False,
    ) -> None:
        safety = (safety_checker, feature_extractor, image_encoder, requires_safety_checker)
        super().__init__(vae, text_encoder, tokenizer, unet, scheduler, *safety)
        if unet.config.in_channels not in (8, 12):
            raise ValueError(f"IC-Light's UNet has 8 or 12 input channels, this one {unet.config.in_channels}")
        self.register_modules(light_encoder=light_encoder)
        if light_encoder is not None:  # recorded as Diffusers' own, or its download would look for a file of the module
            self.register_to_config(light_encoder=("diffusers", LightEncoder.__name__))
            add_light_tokens(unet, light_encoder.config.num_tokens)

    @classmethod
    def load_config(cls, *args, **kwargs):
        """`model_index.json`, where the light encoder is this file's, under whatever name the file was imported."""
        config = super().load_config(*args, **kwargs)
        if isinstance(config, dict) and config.get("light_encoder", [None])[0]:
            config["light_encoder"] = [__name__, LightEncoder.__name__]
        return config

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None,
        foreground: list[Image.Image] | Tensor,
        background: list[Image.Image] | Tensor | None = None,
        light: Tensor | np.ndarray | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        **kwargs,
    ):
        """One image per prompt and foreground, of the foreground's size.

        Args:
            foreground: RGB images on grey 127; or the VAE's unscaled latents, [B, 4, h, w].
            background: the same, without grey; if the UNet has 12 input channels.
            light: environment maps [B, H, W, 3] of linear radiance; if there is a light encoder.
            kwargs: `StableDiffusionPipeline`'s other arguments.

        Raises:
            ValueError: an input is missing, of another size, or one that this model doesn't take.
        """
        takes = {"background": self.unet.config.in_channels == 12, "light": self.light_encoder is not None}
        for name, given in (("background", background), ("light", light)):
            if takes[name] != (given is not None):
                raise ValueError(f"this model needs `{name}`" if takes[name] else f"this model takes no `{name}`")
        conditions = [self._latents(given) for given in (foreground, background) if given is not None]
        tokens = None if light is None else self._tokens(light)
        prompts = kwargs.get("prompt_embeds", ()) if prompt is None else prompt
        counts = [1 if isinstance(prompts, str) else len(prompts), *map(len, conditions)]
        counts += [] if tokens is None else [len(tokens)]
        sizes = [tuple(latents.shape[1:]) for latents in conditions]
        if len(set(counts)) > 1 or len(set(sizes)) > 1:
            raise ValueError(f"one of each per prompt, of one size: there are {counts}, and their latents are {sizes}")
        images_per_prompt = kwargs.get("num_images_per_prompt") or 1
        seen = torch.cat(conditions, dim=1).repeat_interleave(images_per_prompt, dim=0)
        tokens = None if tokens is None else tokens.repeat_interleave(images_per_prompt, dim=0)

        def add_conditions(unet: nn.Module, args: tuple, given: dict) -> tuple[tuple, dict]:
            sample, repeats = args[0], len(args[0]) // len(seen)  # 2 with guidance: its halves see the same
            if tokens is not None:
                states = (given["encoder_hidden_states"], tokens.repeat(repeats, 1, 1))
                given["encoder_hidden_states"] = torch.cat(states, dim=1)
            return (torch.cat([sample, seen.repeat(repeats, 1, 1, 1)], dim=1), *args[1:]), given

        if isinstance(foreground, Tensor):
            height, width = (side * self.vae_scale_factor for side in foreground.shape[2:])
        else:
            width, height = foreground[0].size
        if tokens is not None:  # again: e.g. attention slicing sets other processors, which know no light
            add_light_tokens(self.unet, self.light_encoder.config.num_tokens)
        hook = self.unet.register_forward_pre_hook(add_conditions, with_kwargs=True)
        try:
            return super().__call__(prompt, height=height, width=width, generator=generator, **kwargs)
        finally:
            hook.remove()

    def prepare_latents(self, batch_size, num_channels_latents, *args, **kwargs) -> Tensor:
        """Noise for the noisy channels only, as for the base; stock code draws all that the UNet takes in."""
        return super().prepare_latents(batch_size, _NOISY_CHANNELS, *args, **kwargs)

    def _latents(self, images: list[Image.Image] | Tensor) -> Tensor:
        """Scaled latents [B, 4, h, w] of unscaled ones, or of images: pixel / 127 - 1, so that grey is 0 to the bit."""
        if not isinstance(images, Tensor):
            if any("A" in image.getbands() for image in images):
                raise ValueError("an image has an alpha channel; put it on the grey (127, 127, 127) first")
            pixels = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) for image in images])
            pixels = torch.from_numpy(pixels / np.float32(127) - 1).movedim(-1, 1).contiguous()
            images = self.vae.encode(pixels.to(self._execution_device, self.vae.dtype)).latent_dist.mode()
        return images.to(self._execution_device, self.unet.dtype) * self.vae.config.scaling_factor

    def _tokens(self, light: Tensor | np.ndarray) -> Tensor:
        light = torch.as_tensor(light, dtype=torch.float32, device=self._execution_device)
        if not bool((light.isfinite() & (light >= 0)).all()):
            raise ValueError("a light map has negative, infinite or undefined values")
        return self.light_encoder(light).to(self.unet.dtype)
