"""VQRAE in JAX: a pretrained vision transformer as a tokenizer for understanding and generation."""

from vqrae_jax.tokenizer.inference import Tokenizer, load, load_encoder, read_images

__all__ = ["Tokenizer", "load", "load_encoder", "read_images"]
