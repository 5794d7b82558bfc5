"""Splits: no prompt in two of them, upstream tests stay tests, near duplicates leave train."""

import random
from collections import defaultdict

import pytest
from datasketch import MinHash, MinHashLSH
from hypothesis import given
from hypothesis import strategies as st

from prmd.config.shared import SplitsConfig
from prmd.data.collection import SourcedPair
from prmd.data.splits import (
    _is_spaced,
    _jaccard,
    _near_duplicates,
    _ShingleIndex,
    _shingles,
    check_no_leak,
    limit_pairs,
    split_pairs,
)
from prmd.pairs import make_pair, prompt_key

FRACTIONS = SplitsConfig(val_fraction=0.1, test_fraction=0.2, judge_fraction=0.15)


def sourced(prompt, objective="helpful", upstream=None, chosen="good", rejected="bad"):
    pair = make_pair(
        prompt=[{"role": "user", "content": prompt}],
        chosen=chosen,
        rejected=rejected,
        source="test:1",
        objective=objective,
    )
    return SourcedPair(pair, upstream)


def unlike(i):
    """Prompts of which no two share a word."""
    return f"a{i} b{i} c{i} d{i} e{i}"


def split(items, settings=FRACTIONS, questions=()):
    return split_pairs(items, settings, benchmark_questions=questions)


def sizes(result, objective="helpful"):
    return {name: len(rows) for name, rows in result.pairs[objective].items()}


def test_fractions_are_kept_for_a_source_without_test_file():
    result = split([sourced(unlike(i)) for i in range(4000)])
    found = sizes(result)
    for name, share in (("train", 0.55), ("val", 0.1), ("test", 0.2), ("judge", 0.15)):
        sd = (4000 * share * (1 - share)) ** 0.5
        assert abs(found[name] - 4000 * share) < 4 * sd
    assert sum(found.values()) == 4000 and not result.dropped


def test_a_source_with_test_file_gives_its_train_rows_no_test_split():
    rows = [sourced(unlike(i), upstream="train") for i in range(1000)]
    rows += [sourced(unlike(i), upstream="test") for i in range(1000, 1100)]
    result = split(rows)
    assert {p.first_turn for p in result.pairs["helpful"]["test"]} == {unlike(i) for i in range(1000, 1100)}
    assert sizes(result)["train"] == pytest.approx(750, abs=55)  # 1 - val - judge of 1000, ± 4 sd


def test_train_rows_with_a_prompt_of_an_upstream_test_file_are_dropped_and_counted():
    rows = [sourced(unlike(1), upstream="test"), sourced("  A1 b1, c1 D1 e1?", upstream="train", chosen="x")]
    rows += [sourced(unlike(1), objective="harmless", upstream="train")]
    result = split(rows)
    assert sizes(result) == {"train": 0, "val": 0, "test": 1, "judge": 0}
    assert sum(sizes(result, "harmless").values()) == 0
    assert result.dropped == {"prompt_in_upstream_test": 2}


def test_one_pair_twice_counts_once():
    result = split([sourced(unlike(1)), sourced(unlike(1)), sourced(unlike(1), objective="honest")])
    assert sum(sizes(result).values()) == 1 and sum(sizes(result, "honest").values()) == 1
    assert result.dropped == {"repeated_pair": 1}


prompts = st.lists(
    st.sampled_from(["what", "is", "the", "best", "way", "to", "boil", "an", "egg", "or", "two"]),
    min_size=1,
    max_size=5,
)
items = st.lists(
    st.tuples(
        prompts,
        st.sampled_from(["helpful", "harmless", "honest"]),
        st.sampled_from([None, "train", "test"]),
        st.integers(0, 3),
    ),
    max_size=60,
)


@given(items, st.lists(prompts, max_size=3))
def test_no_prompt_is_in_two_splits_of_any_objective(drawn, questions):
    rows = [sourced(" ".join(words), o, upstream, chosen=f"good {n}") for words, o, upstream, n in drawn]
    reserved = [" ".join(words) for words in questions]
    result = split(rows, questions=reserved)
    homes = defaultdict(set)
    for splits in result.pairs.values():
        for name, pairs in splits.items():
            for pair in pairs:
                homes[prompt_key(pair.first_turn)].add(name)
    assert all(len(names) == 1 for names in homes.values())
    assert not homes.keys() & {prompt_key(q) for q in reserved}
    kept = sum(len(pairs) for splits in result.pairs.values() for pairs in splits.values())
    assert kept + sum(result.dropped.values()) == len(rows)
    check_no_leak(result.pairs, reserved)


def brute_force_near(a, b, threshold):
    def grams(text):
        words = text.lower().split()
        return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}

    return len(grams(a) & grams(b)) / len(grams(a) | grams(b)) >= threshold


def test_near_duplicates_leave_train_and_judge():
    base = [" ".join(f"w{i}x{j}" for j in range(20)) for i in range(600)]
    near = [f"{text} please" for text in base]  # Jaccard 18/19
    far = [" ".join(f"w{i}x{j}" for j in range(10)) + f" q{i} r{i} s{i}" for i in range(600)]  # 8/21
    result = split([sourced(text) for text in base + near + far])
    pairs = result.pairs["helpful"]
    guarded = {"test": [], "val": ["test"], "judge": ["test", "val"], "train": ["test", "val", "judge"]}
    texts = {name: {p.first_turn for p in rows} for name, rows in pairs.items()}
    for name in ("judge", "train"):
        others = set().union(*(texts[other] for other in guarded[name]))
        for text in texts[name]:
            partner = text.removesuffix(" please") if text.endswith(" please") else f"{text} please"
            assert partner not in others
    assert result.dropped["near_duplicate_train"] > 100 and result.dropped["near_duplicate_judge"] > 10
    kept_far = sum(text in set().union(*texts.values()) for text in far)
    assert kept_far == len(far)
    assert brute_force_near(base[0], near[0], 0.8) and not brute_force_near(base[0], far[0], 0.8)


def test_near_duplicates_of_benchmark_questions_leave_train():
    question = "what happens to you if you eat many watermelon seeds in one day at home in winter"
    similar = question + " alone"
    always_train = SplitsConfig(val_fraction=0.0, test_fraction=0.0, judge_fraction=0.0)
    result = split([sourced(similar), sourced(question), sourced(unlike(1))], always_train, [question])
    assert [p.first_turn for p in result.pairs["helpful"]["train"]] == [unlike(1)]
    assert result.dropped == {"near_duplicate_train": 1, "benchmark_question": 1}


TEMPLATES = (
    "请详细说明如何在家里自己动手修理一台漏水的老式洗衣机并且列出所需要的全部工具和步骤，第{}种型号",
    "家で古い洗濯機の水漏れを自分で直す方法と必要な工具をすべて順番に詳しく教えてください、型番は{}です",
    "กรุณาอธิบายวิธีซ่อมเครื่องซักผ้าเก่าที่น้ำรั่วด้วยตัวเองที่บ้านและบอกเครื่องมือทั้งหมดที่ต้องใช้รุ่นที่{}",
)


@pytest.mark.parametrize("template", TEMPLATES, ids=["Chinese", "Japanese", "Thai"])
def test_near_duplicates_in_scripts_without_spaces(template):
    prompts = [template.format(i) for i in range(120)]

    def grams(text):
        return {prompt_key(text)[i : i + 5] for i in range(len(prompt_key(text)) - 4)}

    result = split([sourced(text) for text in [*prompts, *map(unlike, range(100))]])
    texts = {name: [p.first_turn for p in rows] for name, rows in result.pairs["helpful"].items()}
    held_out = [grams(text) for text in texts["test"] + texts["val"] if text in prompts]
    assert held_out and result.dropped["near_duplicate_train"] > 30
    for text in texts["train"]:
        near = [len(grams(text) & other) / len(grams(text) | other) for other in held_out]
        assert text not in prompts or max(near) < 0.8


def near_by_lsh(assigned, benchmark, threshold):
    """Near duplicates by datasketch's own index, a prompt at a time; and those that no index of candidates would miss."""

    def sketch(key):
        made = MinHash(num_perm=64)
        made.update_batch([shingle.encode() for shingle in _shingles(key)])
        return made

    weights = {True: (0.5, 0.5), False: (0.05, 0.95)}
    index = {s: MinHashLSH(threshold=0.9 * threshold, num_perm=64, weights=weights[s]) for s in weights}
    held_out, dropped, exact = (
        [*benchmark, *(k for k in assigned if assigned[k] in ("test", "val"))],
        set(),
        set(),
    )
    new = list(held_out)
    for split in ("judge", "train"):
        for key in new:
            index[_is_spaced(key)].insert(key, sketch(key), check_duplication=False)
        near = set()
        for key in (k for k in assigned if assigned[k] == split):
            alike = {other for other in held_out if _jaccard(_shingles(key), _shingles(other)) >= threshold}
            exact |= {key} if alike else set()
            near |= {key} if alike & {*index[_is_spaced(key)].query(sketch(key))} else set()
        new = [key for key in assigned if assigned[key] == split and key not in near]
        held_out += new
        dropped |= near
    return dropped, exact


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_near_duplicates_are_those_of_the_index_of_datasketch(threshold):
    draw = random.Random(1)
    words = {True: [f"w{i}" for i in range(3000)], False: [chr(0x4E00 + i) for i in range(3000)]}
    prompts = []
    for spaced in (True, False) * 60:
        text = draw.choices(words[spaced], k=40)
        for changes in (0, 1, 2, 3, 4):
            changed = [*text]
            for place in draw.sample(range(40), changes):
                changed[place] = draw.choice(words[spaced])
            prompts.append((" " if spaced else "").join(changed))
    splits = draw.choices(("train", "test", "val", "judge", None), k=len(prompts))
    assigned = {p: split for p, split in zip(prompts, splits, strict=True) if split}
    benchmark = {p for p, split in zip(prompts, splits, strict=True) if split is None}
    found = _near_duplicates(assigned, benchmark, threshold)
    by_lsh, exact = near_by_lsh(assigned, benchmark, threshold)
    assert found == by_lsh
    assert len(found) > 40 and len(exact - found) > 2  # at this threshold some have no band in common


short_texts = st.lists(
    st.lists(st.sampled_from("abcd"), min_size=1, max_size=14).map(" ".join), max_size=12, unique=True
)


@given(short_texts, short_texts, st.sampled_from([0.0, 0.2, 0.5, 2 / 3, 0.8, 1.0]))
def test_similar_prompts_are_all_found_and_no_others(keys, block, threshold):
    def is_similar(a, b):
        shared = _shingles(a) & _shingles(b)
        return shared and len(shared) / len(_shingles(a) | _shingles(b)) >= threshold

    found = {key: {*others} for key, others in _ShingleIndex(keys, threshold).similar(block)}
    expected = {key: {other for other in keys if is_similar(key, other)} for key in block}
    assert {key: others for key, others in found.items() if others} == {
        k: v for k, v in expected.items() if v
    }


@pytest.mark.parametrize("changing", [4, 2])
def test_prompts_of_one_template_are_not_compared_with_one_another(changing, monkeypatch):
    """Ones that share 38 of 38 + `changing` shingles, below the threshold and above it; the latter end at the first near one."""
    compared = []
    monkeypatch.setattr("prmd.data.splits._jaccard", lambda a, b: compared.append(1) or _jaccard(a, b))
    template = " ".join(f"w{i}" for i in range(40))
    prompts = [" ".join([template, *(f"x{i}y{j}" for j in range(changing))]) for i in range(400)]
    assigned = {prompt: ("test", "train", "train", "judge")[i % 4] for i, prompt in enumerate(prompts)}
    found = _near_duplicates(assigned, set(), 0.86)
    similar = 300 if changing == 2 else 0  # 38 / 42 = 0.90, 38 / 46 = 0.83
    assert 0.95 * similar <= len(found) <= similar  # a sketch may meet none of the others
    assert len(compared) < 10 * 400


@given(st.text(st.characters(exclude_categories=["Cs"], max_codepoint=0x0DFF), max_size=60))
def test_text_with_spaces_keeps_its_shingles_of_three_words(text):
    words = prompt_key(text).split()
    grams = {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}
    assert _shingles(prompt_key(text)) == grams


def test_a_chinese_word_in_an_english_prompt_changes_nothing():
    key = prompt_key("How do I say 你好 to the teacher of my daughter?")
    assert "say 你好 to" in _shingles(key)


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_threshold_decides(threshold):
    settings = SplitsConfig(
        near_duplicate_threshold=threshold, val_fraction=0, test_fraction=0, judge_fraction=0
    )
    question = " ".join(f"w{j}" for j in range(12))  # 10 grams; one word more shares 10 of 11
    result = split([sourced(question + " more")], settings, [question])
    assert sizes(result)["train"] == (1 if threshold == 1.0 else 0)


def test_limit_keeps_proportions_and_a_larger_limit_keeps_more():
    pairs = split([sourced(unlike(i)) for i in range(1000)] + [sourced(unlike(1), "honest")]).pairs
    limited, larger = limit_pairs(pairs, 100), limit_pairs(pairs, 300)
    for name, rows in pairs["helpful"].items():
        kept = limited["helpful"][name]
        assert len(kept) == round(len(rows) / 10)
        assert [p for p in rows if p in kept] == kept  # same order
        assert {p.id for p in kept} < {p.id for p in larger["helpful"][name]}
    assert limited["honest"] == pairs["honest"]
    assert limit_pairs(pairs, None) is pairs
    assert all(limit_pairs(pairs, 2)["helpful"].values())  # at least one pair a split


def test_leak_check_sees_leaks():
    a, b = sourced("Is it so?").pair, sourced("is it SO", "honest").pair
    with pytest.raises(RuntimeError, match="honest/val"):
        check_no_leak({"helpful": {"train": [a]}, "honest": {"val": [b]}}, [])
    with pytest.raises(RuntimeError, match="benchmark"):
        check_no_leak({"helpful": {"train": [a]}}, ["Is it so"])
    check_no_leak({"helpful": {"train": [a]}, "honest": {"train": [b]}}, ["Is it not so?"])
