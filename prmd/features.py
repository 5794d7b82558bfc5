"""Features of a response's text that labels may follow without being about them: its length, its form, its phrases.

Counts of the final response alone, none of them a judgement. Whether an association with one of them is a bias or the
objective itself only a person knows; `debias.features` of the configuration names those that are held to be a bias. What is
done about them is the maths of `pessimism.debias`.
"""

import re
from collections.abc import Callable, Mapping

CountTokens = Callable[[str], int]
"""Tokens of a text by the model's tokenizer."""

LEAD_CHARACTERS = 160
"""A refusal comes first; the same words further on belong to other matters."""

_LEAD = re.compile(
    r"""
      ^\W*(?:sorry|apologies|unfortunately)\b
    | \bi\s+(?:do\s+|must\s+|sincerely\s+)?apologi[sz]e\b
    | \b(?:i'm|i\s+am)\s+(?:\w+\s+){0,2}
        (?:sorry|afraid|unable|not\s+able|not\s+going\s+to|not\s+allowed|not\s+comfortable|not\s+programmed)\b
    | \bi\s+(?:\w+\s+){0,2}(?:cannot|can't|can\s+not|won't|will\s+not|refuse|decline)\b
    | \bi\s+(?:don't|do\s+not)\s+(?:\w+\s+){0,2}(?:feel\s+comfortable|have\s+the\s+ability|think\s+(?:i|it|that))\b
    | \bas\s+an?\s+(?:\w+\s+){0,2}(?:ai|language\s+model|assistant|chatbot)\b
    | \b(?:i'm|i\s+am)\s+(?:just|only)\s+an?\b
    | \b(?:against|violates?)\s+(?:my|our|the)\s+(?:\w+\s+)?(?:guidelines|policy|policies|programming|principles|terms)\b
    | \b(?:it's|it\s+is|this\s+is|that\s+is)\s+(?:\w+\s+)?(?:not\s+(?:\w+\s+)?(?:appropriate|ethical|acceptable)|inappropriate|unethical)\b
    """,
    re.VERBOSE | re.IGNORECASE,
)


def refuses(response: str) -> bool:
    """Whether the first `LEAD_CHARACTERS` of a response hold a phrase of refusal, in any form of apostrophe."""
    lead = _straight(response.strip()[:LEAD_CHARACTERS])
    return _LEAD.search(lead) is not None


_LIST_ITEM = re.compile(r"^[ \t]*(?:[-*•+]|\d{1,3}[.)])[ \t]+\S", re.MULTILINE)
_FIRST_PERSON = re.compile(r"\b(?:i|i'm|i've|i'd|i'll|me|my|mine|myself)\b", re.IGNORECASE)
_HEDGE = re.compile(
    r"\b(?:may|might|could|perhaps|maybe|possibly|probably|likely|generally|usually|often|sometimes|seems?|appears?|"
    r"i\s+(?:think|believe|guess|suppose)|not\s+sure)\b",
    re.IGNORECASE,
)
_MARKDOWN = re.compile(
    r"^#{1,6}[ \t]+\S|\*\*[^*\n]+\*\*|__[^_\n]+__|`[^`\n]+`|^```|^>[ \t]+\S|^\|.*\|[ \t]*$", re.MULTILINE
)
_EMOJI = re.compile("[\U0001f1e6-\U0001f1ff\U0001f300-\U0001faff\u2600-\u27bf]")


def _straight(text: str) -> str:
    """The text with one form of apostrophe."""
    return text.replace("’", "'").replace("`", "'")


def _count(pattern: re.Pattern[str], text: str) -> float:
    return float(len(pattern.findall(text)))


_OF_TEXT: dict[str, Callable[[str], float]] = {
    "list_items": lambda text: _count(_LIST_ITEM, text),
    "refusal": lambda text: float(refuses(text)),
    "questions": lambda text: float(text.count("?")),
    "digits": lambda text: float(sum(character.isdecimal() for character in text)),
    "first_person": lambda text: _count(_FIRST_PERSON, _straight(text)),
    "hedges": lambda text: _count(_HEDGE, text),
    "markdown": lambda text: _count(_MARKDOWN, text),
    "emoji": lambda text: _count(_EMOJI, text),
}
MEANINGS: Mapping[str, str] = {
    "length": "tokens",
    "list_items": "items of lists",
    "refusal": "phrases of refusal",
    "questions": "question marks",
    "digits": "digits",
    "first_person": "words of the first person",
    "hedges": "hedging words",
    "markdown": "marks of Markdown",
    "emoji": "emoji",
}
"""What the response with more of a feature has more of; every feature, in the order of tables."""


def measure(feature: str, text: str, count_tokens: CountTokens) -> float:
    """phi of one response.

    Args:
        feature: a key of `MEANINGS`.
        count_tokens: for `length`, without control tokens; the white space that templates trim is not counted.
    """
    return float(count_tokens(text.strip())) if feature == "length" else _OF_TEXT[feature](text)
