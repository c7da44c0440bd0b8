"""Exported models as users of transformers expect them: `import harness.hub`, then AutoModel...,
AutoProcessor and pipelines load an exported folder or its name on the hub.
"""

from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.models.auto import modeling_auto

from harness.hub.modeling import VLMForImageTextToText
from harness.hub.processing import VLMProcessor
from harness.model.vlm import VLMConfig

__all__ = ["VLMConfig", "VLMForImageTextToText", "VLMProcessor"]

AutoModelForImageTextToText.register(VLMConfig, VLMForImageTextToText, exist_ok=True)
AutoProcessor.register(VLMConfig, VLMProcessor, exist_ok=True)
AutoTokenizer.register(VLMConfig, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
# Pipelines look here, and not in what was registered, for the classes that they do not warn of.
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[VLMConfig.model_type] = (
    VLMForImageTextToText.__name__
)
