"""Names inside `data/model`, the folder of exports."""

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
"""The adapter for Diffusers and PEFT, under Diffusers' own name."""
MERGED = "merged"
"""Subfolder with base and adapter as one, a Diffusers folder."""
