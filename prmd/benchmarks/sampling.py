"""Responses of a contender to a benchmark's prompts, by the benchmark's own decoding.

They are cached by the contender's weights and the decoding, so that judging again, or with another judge, samples nothing;
after an interruption only what is missing is sampled.
"""

from collections.abc import Sequence

from prmd.artifacts import io
from prmd.inference.cache import JsonTable
from prmd.inference.candidates import ContenderModels
from prmd.inference.generation import GeneratedResponse, generate
from prmd.models.tokenization import Tokens


def sample(
    models: ContenderModels,
    prompts: Sequence[Tokens],
    *,
    description: str,
    samples_per_prompt: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
) -> list[list[GeneratedResponse]]:
    """`samples_per_prompt` responses to each prompt, in order.

    Args:
        prompts: token ids, with the generation prompt where the chat template is used.
        temperature: 0 decodes greedily.
    """
    config, contender = models.config, models.contender
    seed = config.shared.seed
    decoding = [samples_per_prompt, max_new_tokens, temperature, top_p, seed]
    key = io.fingerprint(["benchmark samples", contender.fingerprint, decoding])
    table = JsonTable(config.paths.cache("samples", key))
    return generate(
        None if table.holds(prompts) else models.policy,
        models.tokenizer,
        prompts,
        samples_per_prompt=samples_per_prompt,
        max_new_tokens=max_new_tokens,
        seed=int(io.fingerprint([seed, contender.method])[:8], 16),
        batch_size=config.generation.batch_size,
        description=f"{contender.method}: {description}",
        temperature=temperature,
        top_p=top_p,
        table=table,
    )
