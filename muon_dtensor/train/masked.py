"""Masked language modeling: batches whose masks a resumed run repeats, and their loss."""

import zlib
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, TrainerCallback

IGNORED = -100
"""Label of tokens without a loss, in torch and transformers."""


class MaskedBatches(TrainerCallback):  # type: ignore[misc]
    """A collator whose masks depend on the rows and the epoch, so that a resumed run repeats them.

    Batches are loaded ahead of the steps: the random state of a checkpoint is not that of the next
    batch.
    """

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self._mask = DataCollatorForLanguageModeling(tokenizer)
        self._seed, self._epoch = seed, 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._epoch = int(state.epoch or 0)

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        """Return a batch: ids, labels and attention mask, [rows, tokens]."""
        text = repr([self._seed, self._epoch, [list(row["input_ids"]) for row in rows]])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(text.encode()))
            return self._mask(rows)


def masked_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Return the mean loss per masked token of all ranks and accumulated batches.

    Models that ignore `num_items_in_batch`, such as BERT, return the mean of one batch, which the
    Trainer (transformers 5.24) would multiply by the number of ranks.
    """
    total = F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum")
    count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)
