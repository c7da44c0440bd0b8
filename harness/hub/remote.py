"""The file in an exported folder by which transformers finds our classes when its user allows it
(`trust_remote_code=True`); harness itself never does.
"""

from __future__ import annotations

from pathlib import Path

NAME = "vl_harness"
AUTO_MAP = {
    "AutoConfig": f"{NAME}.VLMConfig",
    "AutoModelForImageTextToText": f"{NAME}.VLMForImageTextToText",
}
CODE = '''"""The classes of this model, from the package vl-harness (imported as harness)."""

try:
    from harness.hub import VLMConfig, VLMForImageTextToText, VLMProcessor  # noqa: F401
except ImportError as error:
    raise ImportError(
        "this model needs the package vl-harness: install it as README.md says"
    ) from error
'''


def write_remote_code(folder: Path) -> None:
    (folder / f"{NAME}.py").write_text(CODE)
