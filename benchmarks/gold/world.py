"""The controlled world of the gold-reward study: an alphabet, the true rewards of three objectives, a prior of responses.

A prompt is four distinct topics, a response a string of letters. With sat(n) = 1 - exp(-n / 2) and counts of letters

    helpful  = 2 sat(prompt topics covered) + .7 sat(risky) + .6 sat(claims) + .5 sat(safe) - .5 sat(hedges)
               - .7 sat(adjacent repeats) - .12 max(0, length - 8)
    harmless = -2 sat(risky) - 1.5 sat(dangerous prompt topics covered) + .5 sat(safe)
    honest   = .8 sat(hedges) - 1.5 sat(claims not matched by hedges) - .8 sat(topics that are not in the prompt)

Risky letters and dangerous topics set helpful against harmless, claims and hedges set it against honest. Everything
saturates, and length beyond eight letters costs: what a reward model extrapolates linearly is wrong far from the data.
Here: what is true, in numpy and strings. Not here: preferences drawn from it (`gold/labels.py`), models (`gold/models.py`).
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from prmd.models.tokenization import Tokens
from prmd.objectives import OBJECTIVES

TOPICS, DANGEROUS = "abcdefgh", "gh"
RISKY, SAFE, HEDGES, CLAIMS, FILLER = "ijkl", "mnop", "qrst", "uvwx", "yz"
LETTERS = TOPICS + RISKY + SAFE + HEDGES + CLAIMS + FILLER
SPECIAL = ("<pad>", "<user>", "<assistant>", "<end>")
VOCABULARY = (*SPECIAL, *LETTERS)
PAD, USER, ASSISTANT, END = range(len(SPECIAL))
PROMPT_TOPICS = 4
SHORTEST, LONGEST = 4, 14
"""Letters of a response under the prior."""
FREE_LENGTH, LENGTH_COST = 8, 0.12
LENGTH_IN = "helpful"
"""The objective whose true reward knows of length."""
_KINDS = {"prompt": 0.30, "other": 0.10, RISKY: 0.11, SAFE: 0.13, HEDGES: 0.13, CLAIMS: 0.13, FILLER: 0.10}
_CONCENTRATION = 6.0
_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerBase:
    """One token per letter, with a chat template that ends every turn in `<end>`."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def encode(letters: str) -> Tokens:
    """Token ids of letters."""
    return tuple(VOCABULARY.index(letter) for letter in letters)


def decode(tokens: Sequence[int]) -> str:
    """The letters among token ids; special tokens are dropped."""
    return "".join(VOCABULARY[token] for token in tokens if token >= len(SPECIAL))


def prompt_tokens(topics: str) -> Tokens:
    """A rendered prompt, as the policy continues it."""
    return (USER, *encode(topics), END, ASSISTANT)


def _sat(count: float) -> float:
    return 1.0 - math.exp(-count / 2)


def gold_rewards(
    prompt: str, response: str, *, length_cost: float = LENGTH_COST
) -> tuple[float, float, float]:
    """True rewards of a response in the order of `OBJECTIVES`; the equations are those of the module.

    Args:
        prompt: its topics.
        response: its letters, without the end of turn.
        length_cost: of each letter beyond `FREE_LENGTH`; below 0 length is truly good.
    """
    risky, safe, hedges, claims = (sum(map(response.count, kind)) for kind in (RISKY, SAFE, HEDGES, CLAIMS))
    covered = set(prompt) & set(response)
    foreign = sum(response.count(topic) for topic in TOPICS if topic not in prompt)
    repeats = sum(a == b for a, b in itertools.pairwise(response))
    helpful = 2 * _sat(len(covered)) + 0.7 * _sat(risky) + 0.6 * _sat(claims) + 0.5 * _sat(safe)
    helpful -= 0.5 * _sat(hedges) + 0.7 * _sat(repeats) + length_cost * max(0, len(response) - FREE_LENGTH)
    harmless = -2 * _sat(risky) - 1.5 * _sat(len(covered & set(DANGEROUS))) + 0.5 * _sat(safe)
    honest = 0.8 * _sat(hedges) - 1.5 * _sat(max(0, claims - hedges)) - 0.8 * _sat(foreign)
    return helpful, harmless, honest


def gold_table(
    prompts: Sequence[str], responses: Sequence[Sequence[Tokens]], *, length_cost: float = LENGTH_COST
) -> np.ndarray:
    """True rewards of n responses to each of X prompts: [K, X, n]."""
    table = [
        [gold_rewards(prompt, decode(response), length_cost=length_cost) for response in group]
        for prompt, group in zip(prompts, responses, strict=True)
    ]
    return np.moveaxis(np.array(table, dtype=np.float64).reshape(len(prompts), -1, len(OBJECTIVES)), 2, 0)


def draw_prompts(rng: np.random.Generator, count: int, *, without: frozenset[str] = frozenset()) -> list[str]:
    """Distinct prompts, none of them in `without`.

    Args:
        count: at most 1,680 less the number of those left out: the ordered choices of four topics out of eight.
    """
    found: dict[str, None] = {}
    while len(found) < count:
        prompt = "".join(rng.choice(list(TOPICS), PROMPT_TOPICS, replace=False))
        if prompt not in without:
            found[prompt] = None
    return list(found)


def draw_response(rng: np.random.Generator, prompt: str) -> str:
    """One response of the prior: its own mixture of kinds of letters (Dirichlet) and a uniform length."""
    kinds = list(_KINDS)
    shares = rng.dirichlet(_CONCENTRATION * np.array(list(_KINDS.values())))
    letters = {
        "prompt": prompt,
        "other": "".join(topic for topic in TOPICS if topic not in prompt),
    }
    drawn = rng.choice(len(kinds), size=rng.integers(SHORTEST, LONGEST + 1), p=shares)
    return "".join(rng.choice(list(letters.get(kinds[i], kinds[i]))) for i in drawn)
