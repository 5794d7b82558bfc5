"""Both turns of MT-Bench answered by a contender: temperatures by category, the second turn behind its own first answer.

Answers are kept by content, so that judging them again generates nothing. What becomes of them is in `mt_bench`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from prmd.artifacts import io
from prmd.benchmarks.mt_bench_data import MtBenchQuestion
from prmd.config.evaluation import EvaluationConfig
from prmd.inference.cache import JsonTable
from prmd.inference.candidates import ContenderModels
from prmd.inference.generation import GeneratedResponse, generate
from prmd.models.tokenization import Tokens, render
from prmd.pairs import Message

TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
TEMPERATURE_OF_OTHERS = 0.7


def generate_answers(
    config: EvaluationConfig,
    models: ContenderModels,
    questions: Sequence[MtBenchQuestion],
    *,
    of_reference: bool = False,
) -> list[tuple[GeneratedResponse, GeneratedResponse]]:
    """Both answers to every question, from the cache or new: the contender's own, or the reference's."""
    asked: list[list[Message]] = [[{"role": "user", "content": q.turns[0]}] for q in questions]
    first = _answer(config, models, questions, asked, of_reference)
    follow_up = [
        [
            *messages,
            {"role": "assistant", "content": answer.text},
            {"role": "user", "content": question.turns[1]},
        ]
        for messages, answer, question in zip(asked, first, questions, strict=True)
    ]
    second = _answer(config, models, questions, follow_up, of_reference)
    return list(zip(first, second, strict=True))


def _answer(
    config: EvaluationConfig,
    models: ContenderModels,
    questions: Sequence[MtBenchQuestion],
    conversations: Sequence[Sequence[Message]],
    of_reference: bool,
) -> list[GeneratedResponse]:
    """One response to each conversation; those of equal temperature are generated together."""
    contender = models.reference if of_reference else models.contender
    tokens = [
        tuple(render(models.tokenizer, messages, add_generation_prompt=True)) for messages in conversations
    ]
    heats = [TEMPERATURES.get(question.category, TEMPERATURE_OF_OTHERS) for question in questions]
    limit, seed = config.benchmarks.mt_bench.max_new_tokens, config.shared.seed
    found: dict[int, GeneratedResponse] = {}
    for heat in sorted(set(heats)):
        indices = [i for i, own in enumerate(heats) if own == heat]
        prompts = [tokens[i] for i in indices]
        key = io.fingerprint(["mt_bench", contender.fingerprint, heat, limit, seed])
        table = JsonTable(config.paths.cache("samples", key))
        with _model(models, table, prompts, of_reference) as model:
            responses = generate(
                model,
                models.tokenizer,
                prompts,
                samples_per_prompt=1,
                max_new_tokens=limit,
                seed=seed,
                batch_size=config.generation.batch_size,
                description=f"{contender.method}: MT-Bench at temperature {heat:g}",
                temperature=heat,
                table=table,
            )
        found.update({i: samples[0] for i, samples in zip(indices, responses, strict=True)})
    return [found[i] for i in range(len(questions))]


@contextmanager
def _model(
    models: ContenderModels, table: JsonTable, prompts: Sequence[Tokens], of_reference: bool
) -> Iterator[nn.Module | None]:
    """Who answers; None where everything is in the table, so that nothing is loaded."""
    if table.holds(prompts):
        yield None
    elif of_reference:
        with models.as_reference() as model:
            yield model
    else:
        yield models.policy
