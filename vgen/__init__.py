"""Generate video with diffusion transformers."""

__version__ = "0.1.0"
