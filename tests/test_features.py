"""Features of a response's text, each on texts counted by hand."""

import pytest

from prmd import features
from prmd.config.shared import DebiasConfig
from prmd.judges import rubrics


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize(
    ("feature", "text", "expected"),
    [
        ("length", "  three short words \n", 3),
        ("list_items", "Do this:\n- one\n* two\n 3. three\n4) four\n-dash 5.5 not", 4),
        ("list_items", "1999 was good. 2. no line of its own", 0),
        ("refusal", "I'm sorry, but I can't help with that.", 1),
        ("refusal", "I’m not able to do that.", 1),
        ("refusal", "Sure, here it is.", 0),
        ("questions", "Why? Really?? No.", 3),
        ("digits", "In 1999, 3.5 of ten", 6),
        ("first_person", "I think my dog likes me, I’m sure. It is in Mississippi.", 4),
        ("hedges", "It may rain; perhaps it seems so. Mayor Mightyson could.", 4),
        ("markdown", "# Title\n**bold** and `code`\n```\n> quote\n| a | b |", 6),
        ("markdown", "2 * 3 * 4 = 24, snake_case, #1", 0),
        ("emoji", "Fine 😀👍 and ☀ → end", 3),
    ],
)
def test_counts(feature: str, text: str, expected: float) -> None:
    assert features.measure(feature, text, words) == expected


def test_the_configuration_names_these_features() -> None:
    with pytest.raises(ValueError) as caught:
        DebiasConfig(features={"helpful": ["colour"]})
    named = [error["ctx"]["expected"] for error in caught.value.errors()]
    assert all(f"'{feature}'" in named[0] for feature in features.MEANINGS)
    assert DebiasConfig(features={"helpful": list(features.MEANINGS)})
    assert named[0].count("'") == 2 * len(features.MEANINGS)


def test_one_owner_of_the_words_of_a_refusal() -> None:
    assert rubrics.refuses is features.refuses
