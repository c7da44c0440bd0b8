"""Instruction templates: the words around a question, or the whole prompt of a caption.

A config names one of these or gives its own; "none" leaves the prompt out (the question itself
stays for vqa).
"""

from __future__ import annotations

from harness.errors import ConfigError

CAPTION = {
    "none": "",
    "photo": "a photo of",
    "describe": "Describe the image.",
}
VQA = {
    "none": "{question}",
    "question": "Question: {question} Answer:",
    "instruction": "Based on the image, answer the question. Question: {question} Answer:",
}
TEMPLATES = {"caption": CAPTION, "vqa": VQA}


def template(task: str, name: str) -> str:
    """Returns the template of a task by its name, or `name` itself when it is one. Raises
    ConfigError.
    """
    if name in TEMPLATES[task]:
        return TEMPLATES[task][name]
    if task == "vqa" and "{question}" not in name:
        raise ConfigError(
            f"prompts.vqa: {name!r} is neither one of {', '.join(VQA)} nor a template with "
            "{question} in it"
        )
    if task == "caption" and " " not in name:
        raise ConfigError(
            f"prompts.caption: {name!r} is neither one of {', '.join(CAPTION)} nor a sentence"
        )
    return name


def prompt(task: str, name: str, question: str | None) -> str:
    """Returns what the language model reads beside the image."""
    text = template(task, name)
    return text.replace("{question}", (question or "").strip()) if task == "vqa" else text
