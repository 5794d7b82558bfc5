"""What sampled responses take of a card's memory beside the weights, and how many prompts are therefore sampled at once.

Counted from the configuration alone, so that a dry run and a sampling give the same number. What a training takes is
planned in `training.memory`.
"""

from dataclasses import dataclass
from typing import Any

import torch

SEQUENCES_WITHOUT_CARD = 32
"""Responses sampled at once on a CPU, which larger batches do not make faster and which has no memory of its own to fill."""
MOST_SEQUENCES = 1024
"""More are never sampled at once: a tensor of 2^31 elements, from where on some kernels count wrongly, stays out of reach."""


@dataclass(frozen=True)
class SamplingBytes:
    """Bytes beside the weights.

    Attributes:
        cached: keys and values of one token in all layers.
        logits: of the next token of one sequence: as the model gives them, in float32, and with noise.
        read: of one prompt token in a layer while prompts are read: what goes through its MLP, and hidden states.
    """

    cached: int
    logits: int
    read: int

    def of_prompt(self, length: int, *, samples: int, new_tokens: int) -> int:
        """The most that one prompt takes: while it is read, or at the last token of all its samples.

        Args:
            length: its tokens, or those of the longest prompt of its batch.
        """
        reading = length * (self.cached + self.read)
        return max(reading, samples * ((length + new_tokens) * self.cached + self.logits))

    def prompts_in(self, free: int, length: int, *, samples: int, new_tokens: int) -> int:
        """Prompts sampled at once within so many bytes, one at least; arguments as of `of_prompt`."""
        fitting = free // self.of_prompt(length, samples=samples, new_tokens=new_tokens)
        return max(1, min(fitting, MOST_SEQUENCES // samples))


def sampling_bytes(model_config: Any, dtype: torch.dtype) -> SamplingBytes:
    """Count from a transformers configuration.

    Raises:
        AttributeError: the family has no attention heads that could be counted.
    """
    config = model_config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return SamplingBytes(
        cached=2 * config.num_hidden_layers * heads * width * dtype.itemsize,
        logits=config.vocab_size * (dtype.itemsize + 2 * torch.float32.itemsize),
        read=(3 * inner + 8 * config.hidden_size) * dtype.itemsize,
    )
