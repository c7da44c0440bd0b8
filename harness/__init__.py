"""Trains small vision-language models and proves that their answers come from the image."""

import importlib
import os
from typing import Any

# Before torch is imported: OpenMP threads that spin while another process is busy make a small step
# 100 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Gives harness.load; it brings torch, which `import harness` alone must not."""
    if name == "load":
        return importlib.import_module("harness.loading").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
