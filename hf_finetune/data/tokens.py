"""Texts as token numbers: tokenised in one pass and kept flat, so that a million texts fit in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_finetune.models.backbone import TextInput

MAX_LENGTH = 512
"""Tokens kept of a text under `max_length: auto`, whatever the backbone takes: attention is quadratic."""
_CHUNK = 1_000


class Tokens:
    """The tokens of a split's texts (or pairs) without padding; `tokens[i]` is one text."""

    def __init__(
        self,
        texts: Sequence[Sequence[str]],
        text_input: TextInput,
        max_length: int | Literal["auto"] = "auto",
    ) -> None:
        self.tokenizer = text_input.tokenizer
        self.max_length = kept_length(text_input, max_length)
        parts: dict[str, list[np.ndarray]] = {}
        lengths: list[int] = []
        cut = 0
        for start in range(0, len(texts[0]), _CHUNK):
            encoded, cut_here = encode(
                self.tokenizer, self.max_length, [each[start : start + _CHUNK] for each in texts]
            )
            cut += cut_here
            lengths += [len(ids) for ids in encoded["input_ids"]]
            for name, lists in encoded.items():
                parts.setdefault(name, []).append(
                    np.concatenate([np.asarray(each, np.int32) for each in lists])
                )
        self.lengths = np.asarray(lengths)
        """Tokens per text."""
        self.cut_share = cut / len(lengths)
        """Share of the texts that were longer than `max_length`."""
        self._ends = np.cumsum(self.lengths)
        self._columns = {name: np.concatenate(chunks) for name, chunks in parts.items()}

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        stop = self._ends[index]
        return {
            name: column[stop - self.lengths[index] : stop].tolist() for name, column in self._columns.items()
        }


def kept_length(text_input: TextInput, max_length: int | Literal["auto"]) -> int:
    """Return how many tokens of a text are kept."""
    return min(text_input.max_length, MAX_LENGTH if max_length == "auto" else max_length)


def encode(
    tokenizer: PreTrainedTokenizerBase, max_length: int, texts: Sequence[Sequence[str]]
) -> tuple[Mapping[str, list[list[int]]], int]:
    """Tokenise a list of texts, or two lists of pairs; return the token lists and how many were cut."""
    encoded = tokenizer(
        *(list(each) for each in texts), truncation=True, max_length=max_length, padding=False
    )
    if encoded.encodings is not None:
        cut = sum(bool(each.overflowing) for each in encoded.encodings)
    else:  # a tokenizer in plain Python does not say
        cut = sum(len(ids) >= max_length for ids in encoded["input_ids"])
    return dict(encoded), cut
