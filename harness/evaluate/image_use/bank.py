"""The pictures of the gate, each encoded once: what a context reads when it is given another one.

Batches -> rows of pictures -> image tokens of any of them, for any context. A bridge that reads the
question makes tokens of a picture and a question: then the patches are kept, and the bridge alone
runs again. Legend: I pictures, C contexts, N bridge rows, P patches, Q queries, D width.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from harness.evaluate.predict import ImageTokens
from harness.model.batch import Batch

_SHARE_OF = 300  # pictures, which are plenty for a mean square


@dataclass
class Bank:
    """Image tokens or patches of pictures, one row each, in the order in which they came."""

    model: Any
    row_of: dict[Hashable, int] = field(default_factory=dict)
    _rows: list[Any] = field(default_factory=list)
    _made: Any = None  # the class of the model's image tokens

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def _reads_questions(self) -> bool:
        return bool(getattr(self.model, "question_aware", False))

    def add(self, batch: Batch, tokens: ImageTokens, image_C: Sequence[Hashable]) -> np.ndarray:
        """Returns row_C of the pictures that the contexts have, adding those that are new."""
        new = [c for c, image in enumerate(image_C) if image not in self.row_of]
        self._made = type(tokens)
        rows_NP: Any = tokens.tokens_NQD
        row_of_C = tokens.token_row_of_C
        if new and self._reads_questions:
            rows_NP = self.model.patch_tokens(batch)
            row_of_C = batch.image_of_C
        for c in new:
            if image_C[c] not in self.row_of:
                self.row_of[image_C[c]] = len(self._rows)
                self._rows.append(_copied(rows_NP[int(row_of_C[c])]))
        return np.array([self.row_of[image] for image in image_C])

    def tokens(self, batch: Batch, row_C: np.ndarray) -> ImageTokens:
        """Returns the image tokens of these pictures for the contexts of `batch`."""
        rows = np.unique(row_C)
        shown: Any = [self._rows[row] for row in rows]
        place = torch.from_numpy(np.searchsorted(rows, row_C)).to(batch.image_of_C.device)
        if isinstance(shown[0], torch.Tensor):
            shown = torch.stack(shown).to(batch.image_of_C.device)
        if not self._reads_questions:
            return self._made(shown, place)
        seen = replace(batch, pixels_IHW3=None, features_IPD=shown, image_of_C=place)
        return self.model.bridge_tokens(seen)

    def image_share(self) -> float | None:
        """Returns the share of the image tokens' mean square that differs from picture to picture,
        about what each token is on average: 0 where every picture's are the same.

        None for a single picture, for a bridge that reads the question, and for tokens of a
        published model, which may be several tensors or of other numbers for each picture.
        """
        rows = self._rows[:_SHARE_OF]
        alike = rows and all(
            isinstance(row, torch.Tensor) and row.shape == rows[0].shape for row in rows
        )
        if self._reads_questions or not alike or len(rows) < 2:
            return None
        tokens_IQD = torch.stack(rows).float()
        apart_IQD = tokens_IQD - tokens_IQD.mean(dim=0)
        return float(apart_IQD.pow(2).mean() / tokens_IQD.pow(2).mean().clamp(min=1e-30))


def without_images(batch: Batch) -> Batch:
    """Returns the batch with nothing in place of its images: the bank has them."""
    fields: dict[str, Any] = {"pixels_IHW3": None, "features_IPD": None}
    if hasattr(batch, "pictures"):
        fields["pictures"] = ()
    return replace(batch, **fields)


def _copied(row: Any) -> Any:
    """Returns a row that does not keep the whole batch alive."""
    return row.clone() if isinstance(row, torch.Tensor) else row
