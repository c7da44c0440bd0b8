"""How prompts and answers become token ids, found out from a tokenizer: its chat template, or what
it puts around a text itself.

    T5                      [prompt][EOS]          [answer][EOS]
    GPT-2, adds nothing     [prompt] [BOS]         [answer][EOS]
    OPT, adds BOS           [BOS][prompt]          [ answer][EOS]
    a chat template         [its words, the prompt as the user's turn]  [answer][its turn's end]
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from harness.errors import ConfigError, reason_of
from harness.model.batch import padding_id

# In the place of what is said: no template changes it, no tokenizer's special token is in it.
ASKED = "PROMPTSTANDSHERE"
ANSWERED = "ANSWERSTANDSHERE"
# Some templates tell the day: the same prompt must be the same tomorrow. The day is Llama 3's own.
DAY = "26 Jul 2024"
# Before a template: transformers hands it no function of ours in the place of its own.
_SAME_DAY = f"{{%- macro strftime_now(form) -%}}{DAY}{{%- endmacro -%}}"


class Worded(NamedTuple):
    """Token ids of texts, and the texts that were cut."""

    ids: list[list[int]]
    cut: list[str]


class Wording:
    """What a tokenizer makes of prompts and answers; `chat`: by its template, where it has one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: bool = True):
        self.tokenizer = tokenizer
        self.chat = chat

    @cached_property
    def template(self) -> tuple[str, str] | None:
        """What a chat template writes before and behind a prompt; None: there is none."""
        if not self.chat or not self.tokenizer.chat_template:
            return None
        said = _rendered(self.tokenizer, [("user", ASKED)], add_generation_prompt=True)
        return said[: said.index(ASKED)], said[said.index(ASKED) + len(ASKED) :]

    @cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """The token ids that the tokenizer itself puts before and behind a text."""
        whole = self.tokenizer("a")["input_ids"]
        bare = self._ids(["a"])[0]
        at = next(place for place in range(len(whole)) if whole[place:][: len(bare)] == bare)
        return whole[:at], whole[at + len(bare) :]

    @cached_property
    def begins(self) -> int | None:
        """The token id between a prompt and its answers: BOS, or EOS, where no other token of a
        template or of the tokenizer's own sets them apart.
        """
        if self.template or any(self.around):
            return None
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    @cached_property
    def joint(self) -> str:
        """What stands between a prompt and the answer that goes on from it: a space, where the
        tokenizer does not add one to every text.
        """
        before, behind = self.around
        if self.template or behind or not before:
            return ""
        twice = self.tokenizer.decode([*self._ids(["a"])[0], *self._ids(["a"])[0]])
        return "" if " " in twice else " "

    def prompts(self, texts: Sequence[str], limit: int) -> Worded:
        """Returns the token ids of prompts, their words cut at `limit` (what a template adds is not
        counted). A prompt of no words has what BOS or template gives.
        """
        before, behind = self.around
        room = limit if self.template else limit - len(before) - len(behind)
        rows = self._ids(texts)
        cut = [text for text, row in zip(texts, rows, strict=True) if len(row) > room]
        if self.template is None:
            ids = [[*before, *row[:room], *behind] if row else list(before) for row in rows]
            return Worded(ids, cut)
        short = [
            text if len(row) <= room else self.tokenizer.decode(row[:room])
            for text, row in zip(texts, rows, strict=True)
        ]
        head, tail = self.template
        return Worded(self._ids([f"{head}{text}{tail}" for text in short]), cut)

    def answers(self, texts: Sequence[str], behind_prompt: Sequence[bool], limit: int) -> Worded:
        """Returns the token ids of answers with their end, also where they are cut at `limit`.
        `behind_prompt`: which of them go on from words.
        """
        joined = [
            self.joint * behind + text for text, behind in zip(texts, behind_prompt, strict=True)
        ]
        rows = self._ids(joined)
        cut = [text for text, row in zip(texts, rows, strict=True) if len(row) >= limit]
        return Worded([[*row[: limit - 1], self.tokenizer.eos_token_id] for row in rows], cut)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def end_turns(tokenizer: PreTrainedTokenizerBase, chat: str, name: str) -> None:
    """Makes the token that ends the assistant's turn the tokenizer's EOS, where it has a chat
    template and `chat` is not none: then the template is taken away. Raises ConfigError.
    """
    if chat == "none":
        tokenizer.chat_template = None
    if not tokenizer.chat_template:
        return
    try:
        said = _rendered(tokenizer, [("user", ASKED), ("assistant", ANSWERED)])
        if said.count(ASKED) != 1 or said.count(ANSWERED) != 1:
            raise ValueError("it does not show what is said once")
        Wording(tokenizer).template  # noqa: B018  # fails here, if it does
    except Exception as error:  # a template is a program of others
        raise ConfigError(
            f"prompts.chat: the chat template of {name!r} cannot be used ({reason_of(error)}): "
            "set prompts.chat=none, or mend the template"
        ) from error
    behind = said.rpartition(ANSWERED)[2]
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
    ends = [token for token in ids if token in tokenizer.added_tokens_decoder]
    if ends:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])


def refuse_endless(tokenizer: PreTrainedTokenizerBase, name: str, key: str) -> None:
    """Raises ConfigError for a tokenizer without a token that ends a text."""
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{key}: the tokenizer of {name!r} names no token that ends a text: give it an "
            "eos_token in its tokenizer_config.json"
        )


def refuse_unknown(tokenizer: PreTrainedTokenizerBase, known: int, name: str, key: str) -> None:
    """Raises ConfigError for a token that stands around every text, or in the place of none, and
    is not among the `known` ones of the model.
    """
    wording = Wording(tokenizer)
    said = [*wording.prompts(["a"], 99).ids[0], *wording.answers(["a"], [True], 99).ids[0]]
    unknown = [token for token in (*said, padding_id(tokenizer)) if token >= known]
    if unknown:
        token = tokenizer.convert_ids_to_tokens(unknown[0])
        raise ConfigError(
            f"{key}: the tokenizer of {name!r} uses {token!r}, its token {unknown[0]}, and the "
            f"model has {known}: take the model's own tokenizer"
        )


def _rendered(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]], **asked: Any
) -> str:
    chat = [{"role": role, "content": words} for role, words in turns]
    template = _SAME_DAY + tokenizer.get_chat_template()
    fixed: dict[str, Any] = {
        "chat_template": template,
        "date_string": DAY,
        "enable_thinking": False,
    }
    return str(tokenizer.apply_chat_template(chat, tokenize=False, **fixed, **asked))
