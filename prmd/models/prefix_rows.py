"""Prefix-shared rows: each prompt is processed once for all its responses, and padding is next to none.

A row is `prompt | response 1 | response 2 | ...`. Positions of every response continue from the prompt, and a response
attends to the prompt and to itself only, so the results are those of separate conversations. Where a model cannot take
such a mask exactly, `share_prompt=False` gives each response a row of its own; everything else stays the same.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prmd.models.tokenization import PrefixRow

PADDING = -1

MOST_PADDING = 0.05
"""Share of padding that a scoring batch may hold."""


def plan_scoring(
    rows: Sequence[PrefixRow], *, tokens_per_batch: int, share_prompt: bool = True
) -> list[list[int]]:
    """Indices of rows of like length in groups, the longest first.

    A group holds at most `tokens_per_batch` tokens with its padding, of which at most `MOST_PADDING` are padding, or one
    row: a few rows of very different length are not worth a common batch.
    """
    width = [row.shared_length if share_prompt else row.longest for row in rows]
    sequences = [1 if share_prompt else len(row.responses) for row in rows]
    groups: list[list[int]] = []
    held = dense = 0  # sequences of the last group, and its tokens without what it pads
    for index in sorted(range(len(rows)), key=lambda i: (-width[i], i)):
        padded = (held + sequences[index]) * width[groups[-1][0]] if groups else 0
        own = sequences[index] * width[index]
        if groups and padded <= min(tokens_per_batch, (dense + own) / (1 - MOST_PADDING)):
            groups[-1].append(index)
            held, dense = held + sequences[index], dense + own
        else:
            groups.append([index])
            held, dense = sequences[index], own
    return groups


def collate_rows(rows: Sequence[PrefixRow], *, pad_id: int, share_prompt: bool = True) -> dict[str, Tensor]:
    """Tensors of one batch. B sequences of L tokens, S responses in row order, N response tokens.

    Returns:
        input_ids, position_ids [B, L]; segment_ids [B, L]: 0 prompt, 1.. response, -1 padding;
        predict_index [N]: flat position (into B*L) whose hidden state predicts a response token;
        target_ids [N]: that token; sequence_index [N]: its response, 0..S-1; last_index [S]: flat position of the
        last token of each response.
    """
    sequences: list[tuple[PrefixRow, tuple[tuple[int, ...], ...]]] = []
    for row in rows:
        sequences += (
            [(row, row.responses)] if share_prompt else [(row, (response,)) for response in row.responses]
        )
    width = max(len(row.prompt_ids) + sum(map(len, responses)) for row, responses in sequences)
    input_ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    position_ids = torch.zeros_like(input_ids)
    segment_ids = torch.full_like(input_ids, PADDING)
    predict: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    last: list[int] = []
    for b, (row, responses) in enumerate(sequences):
        start, prompt = b * width, len(row.prompt_ids)
        tokens = list(row.prompt_ids)
        positions = list(range(prompt))
        segments = [0] * prompt
        for s, response in enumerate(responses, start=1):
            begin = start + len(tokens)
            predict += [start + prompt - 1, *range(begin, begin + len(response) - 1)]
            targets += response
            owner += [len(last)] * len(response)
            last.append(begin + len(response) - 1)
            tokens += response
            positions += range(prompt, prompt + len(response))
            segments += [s] * len(response)
        input_ids[b, : len(tokens)] = torch.tensor(tokens)
        position_ids[b, : len(tokens)] = torch.tensor(positions)
        segment_ids[b, : len(tokens)] = torch.tensor(segments)
    flat = {"predict_index": predict, "target_ids": targets, "sequence_index": owner, "last_index": last}
    tensors = {name: torch.tensor(values, dtype=torch.long) for name, values in flat.items()}
    return {"input_ids": input_ids, "position_ids": position_ids, "segment_ids": segment_ids, **tensors}


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch whose tensors are on `device`, without waiting for what that is busy with; other values stay as they are."""

    def moved(tensor: Tensor) -> Tensor:
        if device.type != "cuda" or tensor.device.type != "cpu":
            return tensor.to(device)
        return tensor.pin_memory().to(device, non_blocking=True)  # from other memory the copy would wait

    return {name: moved(value) if isinstance(value, Tensor) else value for name, value in batch.items()}


def is_shared(*, input_ids: Tensor, last_index: Tensor) -> bool:
    """Whether some row of a batch holds more than one response, by shapes alone: every row holds at least one.

    Args:
        input_ids, last_index: as `collate_rows` gives them.
    """
    return len(last_index) > len(input_ids)


def attention_mask(segment_ids: Tensor, *, shared: bool | None = None) -> Tensor:
    """Boolean mask for `sdpa`, True where a query may look (`attention.block_mask` is the same for `flex_attention`).

    A token looks at itself, at earlier prompt tokens and at earlier tokens of its own response. Padding looks at
    itself alone, so that no softmax row is empty.

    Args:
        segment_ids: [B, L] as `collate_rows` gives them.
        shared: what `is_shared` says; None: looked up in `segment_ids`, which waits for their device.

    Returns:
        [B, 1, L, L] if some row holds more than one response, else the usual [B, L].
    """
    if not (segment_ids.max() > 1 if shared is None else shared):
        return (segment_ids != PADDING).long()
    position = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    allowed = may_look(
        query=position[:, None],
        key=position[None, :],
        query_segment=segment_ids[:, :, None],
        key_segment=segment_ids[:, None, :],
    )
    return allowed[:, None]


def may_look(*, query: Tensor, key: Tensor, query_segment: Tensor, key_segment: Tensor) -> Tensor:
    """Whether the token at `query` looks at the one at `key`, see `attention_mask`.

    Args:
        query: places in the row, from 0.
        query_segment: their segment ids; all four broadcast together.
    """
    own = (key_segment == 0) | (key_segment == query_segment)
    return (query == key) | ((query > key) & own & (key_segment != PADDING))


def padding_share(batch: dict[str, Tensor]) -> tuple[int, Tensor]:
    """Tokens processed and, as a 0-d tensor on the batch's device, tokens of them that are padding."""
    segment_ids = batch["segment_ids"]
    return segment_ids.numel(), (segment_ids == PADDING).sum()
