"""Splitting pairs by their first human turn, so that no prompt is in two splits of any objective.

Everything here is decided by hashes of text: no random state, the same split on every machine. Making pairs is in
`collection`, writing them in `prepare`.
"""

import math
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from datasketch import MinHash, MinHashLSH
from numpy.typing import NDArray

from prmd.config.shared import SplitsConfig
from prmd.data.collection import SourcedPair
from prmd.objectives import OBJECTIVES, SPLITS
from prmd.pairs import PreferencePair, hash_share, prompt_key
from prmd.runtime import progress

SplitPairs = dict[str, dict[str, list[PreferencePair]]]
"""objective -> split -> pairs."""

_PERMUTATIONS = 64
_BLOCK = 4096
"""Prompts that are looked up at once."""
_ROUNDING = 1e-9
_SHINGLE_WORDS = 3
_SHINGLE_CHARACTERS = 5
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf"  # Thai, Lao, Burmese, Khmer, Tai
    "\u3040-\u312f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua4cf\uf900-\ufaff\U00020000-\U0003ffff]"  # kana, Han, Yi
)
"""Letters of scripts that set no space between words."""


@dataclass(frozen=True)
class SplitResult:
    """The pairs of every objective and split, and how many were left out for which reason, together and by objective."""

    pairs: SplitPairs
    dropped: Counter[str]
    left_out: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def drop(self, objective: str, reason: str, count: int = 1) -> None:
        self.dropped[reason] += count
        self.left_out[objective][reason] += count


def split_pairs(
    sourced: Sequence[SourcedPair],
    settings: SplitsConfig,
    *,
    benchmark_questions: Iterable[str],
    objectives: Sequence[str] = OBJECTIVES,
) -> SplitResult:
    """Give every pair its split.

    A prompt of an upstream test file is a test prompt, and rows of upstream train files that share it are dropped. Other
    prompts are hashed to [0, 1): val, judge or train for sources that come with a test file, test too for the others.
    Prompts of train, and of judge, that nearly repeat one of a split they must not have seen are dropped.

    Args:
        sourced: the pairs of all objectives of an approach.
        settings: fractions and the near-duplicate threshold (Jaccard similarity of word 3-grams; of character 5-grams
            for prompts in scripts without spaces).
        benchmark_questions: prompts that may occur nowhere.
        objectives: of the approach.

    Returns:
        A result in which each objective has every split, some perhaps empty.
    """
    benchmark = {prompt_key(question) for question in benchmark_questions}
    keys = [item.pair.prompt_key for item in sourced]
    keyed = list(zip(keys, sourced, strict=True))
    upstream_test = {key for key, item in keyed if item.upstream_split == "test"}
    unsplit = {key for key, item in keyed if item.upstream_split is None}
    assigned = {key: _assign(key, settings, upstream_test, unsplit) for key in {*keys} - benchmark}
    near = _near_duplicates(assigned, benchmark, settings.near_duplicate_threshold)
    result = SplitResult({o: {s: [] for s in SPLITS} for o in objectives}, Counter())
    seen: set[str] = set()
    for key, item in keyed:
        split, objective = assigned.get(key), item.pair.objective
        if split is None:
            result.drop(objective, "benchmark_question")
        elif key in upstream_test and item.upstream_split != "test":
            result.drop(objective, "prompt_in_upstream_test")
        elif key in near:
            result.drop(objective, f"near_duplicate_{split}")
        elif item.pair.id in seen:
            result.drop(objective, "repeated_pair")
        else:
            seen.add(item.pair.id)
            result.pairs[item.pair.objective][split].append(item.pair)
    return result


def _assign(key: str, settings: SplitsConfig, upstream_test: set[str], unsplit: set[str]) -> str:
    """The split of a prompt, before near duplicates leave it."""
    share = hash_share("split", key) - settings.test_fraction
    if key in upstream_test or (share < 0 and key in unsplit):
        return "test"
    if 0 <= share < settings.val_fraction:
        return "val"
    return "judge" if 0 <= share - settings.val_fraction < settings.judge_fraction else "train"


def _near_duplicates(assigned: Mapping[str, str], benchmark: set[str], threshold: float) -> set[str]:
    """Keys of judge that nearly repeat test, val or the benchmark, and keys of train that nearly repeat any of these.

    The exact Jaccard similarity of the shingles decides, among prompts of the same kind of script whose MinHash sketches have
    a band in common (`_Sketches`): data that was split by earlier versions is split the same way again.
    """
    by_kind = {spaced: defaultdict[str, list[str]](list) for spaced in (True, False)}
    for key in benchmark:
        by_kind[_is_spaced(key)]["held out"].append(key)
    for key, split in assigned.items():
        by_kind[_is_spaced(key)]["held out" if split in ("test", "val") else split].append(key)
    dropped: set[str] = set()
    for spaced, prompts in by_kind.items():
        sketches = _Sketches(threshold, spaced)
        held_out = [_ShingleIndex(prompts["held out"], threshold)]
        near = _nearly_in(held_out, prompts["judge"], sketches, "judge")
        held_out.append(_ShingleIndex([key for key in prompts["judge"] if key not in near], threshold))
        dropped |= near | _nearly_in(held_out, prompts["train"], sketches, "train")
    return dropped


def _nearly_in(
    indices: Sequence["_ShingleIndex"], keys: Sequence[str], sketches: "_Sketches", split: str
) -> set[str]:
    """Those of `keys` with a near duplicate in one of the indices."""
    near = set()
    for start in progress(
        range(0, len(keys), _BLOCK), -(-len(keys) // _BLOCK), f"near duplicates in {split}"
    ):
        block = keys[start : start + _BLOCK]
        for index in indices:
            for key, others in index.similar(block):
                if any(sketches.meet(key, other) for other in others):
                    near.add(key)
    return near


class _ShingleIndex:
    """Prompts by their shingles, to find the similar ones without comparing with all.

    Of a prompt a with n shingles, one with m shingles and a similarity of at least t has t / (1 + t) (n + m) or more. So it has one
    of any n - t / (1 + t) (n + m) + 1 of them; the rarest ones are looked up. Prompts of one template share all others.
    """

    def __init__(self, keys: Sequence[str], threshold: float) -> None:
        hashes, counts = _hashes(keys)
        owners, lengths = np.repeat(np.arange(len(keys), dtype=np.int32), counts), np.repeat(counts, counts)
        order = np.lexsort((lengths, hashes))
        self.keys, self.threshold = keys, threshold
        self.hashes, self.owners, self.lengths = hashes[order], owners[order], lengths[order]
        self.all_lengths = np.unique(counts)

    def similar(self, block: Sequence[str]) -> Iterator[tuple[str, Iterator[str]]]:
        """For prompts that may have similar ones: the prompt and those that are, some perhaps repeated."""
        hashes, counts = _hashes(block)
        first, last = np.empty((2, len(hashes)), np.intp)
        order = np.argsort(
            hashes
        )  # looked up in order, neighbors are in the processor's cache: six times as fast
        for found, side in ((first, "left"), (last, "right")):
            found[order] = np.searchsorted(self.hashes, hashes[order], side)
        starts = np.cumsum(counts) - counts
        known = np.add.reduceat((first < last).astype(int), starts)
        for row in np.flatnonzero((known > 0) & (known >= self.threshold * counts - _ROUNDING)):
            own = slice(starts[row], starts[row] + counts[row])
            yield block[row], self._similar_to(block[row], first[own], last[own])

    def _similar_to(self, key: str, first: NDArray[np.intp], last: NDArray[np.intp]) -> Iterator[str]:
        shingles, t = _shingles(key), self.threshold
        n = len(shingles)
        lengths = self.all_lengths[
            (self.all_lengths >= t * n - _ROUNDING) & (t * self.all_lengths <= n + _ROUNDING)
        ]
        for m in lengths:
            places = [
                (i + np.searchsorted(self.lengths[i:j], [m, m + 1])) for i, j in zip(first, last, strict=True)
            ]
            shared = max(1, math.ceil(t / (1 + t) * (n + m) - _ROUNDING))
            for i, j in sorted(places, key=lambda place: place[1] - place[0])[: n - shared + 1]:
                for owner in self.owners[i:j]:
                    if _jaccard(shingles, _shingles(self.keys[owner])) >= t:
                        yield self.keys[owner]


def _hashes(keys: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Hashes of the shingles of all prompts, one prompt after another, and how many each has."""
    hashes, counts = array("q"), array("q")
    for key in keys:
        shingles = _shingles(key)
        hashes.extend(map(hash, shingles))
        counts.append(len(shingles))
    return np.array(hashes, np.int64), np.array(counts, np.int64)


class _Sketches:
    """MinHash sketches cut into bands; one pair in four at the threshold has none in common, one in a hundred of other scripts."""

    def __init__(self, threshold: float, spaced: bool) -> None:
        weights = (0.5, 0.5) if spaced else (0.05, 0.95)  # of a candidate too many and of one missed
        lsh = MinHashLSH(threshold=min(0.9 * threshold, 0.95), num_perm=_PERMUTATIONS, weights=weights)
        self.shape = (lsh.b, lsh.r)
        self.bands = lru_cache(_BLOCK)(self._bands)

    def meet(self, key: str, other: str) -> bool:
        """Whether two prompts have a band in common."""
        return bool((self.bands(key) == self.bands(other)).all(axis=1).any())

    def _bands(self, key: str) -> NDArray[np.unsignedinteger[Any]]:
        sketch = MinHash(num_perm=_PERMUTATIONS)
        sketch.update_batch([shingle.encode("utf-8", "surrogatepass") for shingle in _shingles(key)])
        return sketch.hashvalues[: self.shape[0] * self.shape[1]].reshape(self.shape)


def _is_spaced(key: str) -> bool:
    """Whether at least half of the letters are of scripts that set spaces between words."""
    return key.isascii() or 2 * len(_UNSPACED.findall(key)) <= len(key.replace(" ", ""))


def _shingles(key: str) -> frozenset[str]:
    """Word 3-grams of a prompt, or character 5-grams where its script sets no spaces; a shorter prompt is one shingle.

    By words alone a Chinese sentence would be one shingle, unlike any other.
    """
    if not _is_spaced(key):
        count = max(1, len(key) - _SHINGLE_CHARACTERS + 1)
        return frozenset(key[i : i + _SHINGLE_CHARACTERS] for i in range(count))
    words = key.split()
    count = max(1, len(words) - _SHINGLE_WORDS + 1)
    return frozenset(" ".join(words[i : i + _SHINGLE_WORDS]) for i in range(count))


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b)


def limit_pairs(pairs: SplitPairs, limit: int | None) -> SplitPairs:
    """Keep about `limit` pairs per objective, each split shrunk by the same factor.

    Of every split the pairs with the smallest hash of their id are kept, at least one; a larger limit keeps a superset.
    """
    if limit is None:
        return pairs
    limited: SplitPairs = {}
    for objective, splits in pairs.items():
        share = min(1.0, limit / max(1, sum(map(len, splits.values()))))
        limited[objective] = {
            split: _smallest_hashes(rows, max(1, round(share * len(rows)))) for split, rows in splits.items()
        }
    return limited


def _smallest_hashes(rows: Sequence[PreferencePair], count: int) -> list[PreferencePair]:
    kept = {p.id for p in sorted(rows, key=lambda p: hash_share("limit", p.id))[:count]}
    return [pair for pair in rows if pair.id in kept]


def check_no_leak(pairs: SplitPairs, benchmark_questions: Iterable[str]) -> None:
    """Verify, from the pairs alone, that no prompt is in two splits of any objectives and no benchmark question in one.

    Raises:
        RuntimeError: the splitting is wrong (a mistake of ours, not of the data).
    """
    benchmark = {prompt_key(question) for question in benchmark_questions}
    home: dict[str, str] = {}
    for objective, splits in pairs.items():
        for split, rows in splits.items():
            for pair in rows:
                key = pair.prompt_key
                if home.setdefault(key, split) != split or key in benchmark:
                    raise RuntimeError(
                        f"{pair.id} ({objective}/{split}): its prompt is in {home[key]} or the benchmark too"
                    )
