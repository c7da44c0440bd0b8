"""Trains small vision-language models and proves that their answers come from the image."""

__version__ = "0.1.0"
