"""Trains small vision-language models and proves that their answers come from the image."""

import os

# Before torch is imported: OpenMP threads that spin while another process is busy make a small step
# 100 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
