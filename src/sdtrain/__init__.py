"""sdtrain: a declarative, reproducible pipeline that fine-tunes Stable Diffusion's UNet."""

__version__ = "0.1.0"
