"""Logistic regression on hashed character n-grams: a text in, a number in (0, 1) out, fitted in seconds without a model.

Features are the 2- to 5-character pieces of each word, weighted by how rare they are and scaled to length one; pieces of
words survive spellings that whole words do not. What it is fitted to is decided by its caller.
"""

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import minimize
from scipy.special import expit

NGRAM_LENGTHS = range(2, 6)
BUCKETS = 2**18
RIDGE = 0.03
"""Weight of the squared norm per text; of .003 to 3 the one that ranked held-out texts best."""
_WORD = re.compile(r"[\w'*@$!#]+")


def ngrams(text: str) -> Counter[int]:
    """How often each bucket of n-grams occurs; every word is framed by spaces."""
    found: Counter[int] = Counter()
    for word in _WORD.findall(text.casefold().replace("’", "'")):
        framed = f" {word} "
        for n in NGRAM_LENGTHS:
            for start in range(len(framed) - n + 1):
                found[zlib.crc32(framed[start : start + n].encode("utf-8", "surrogatepass")) % BUCKETS] += 1
    return found


def count_matrix(texts: Iterable[str]) -> sparse.csr_matrix:
    """[n, BUCKETS]: 1 + log of the counts."""
    starts, columns, values = [0], [], []
    for text in texts:
        counts = ngrams(text)
        columns.extend(counts.keys())
        values.extend(1 + np.log(np.fromiter(counts.values(), dtype=np.float64, count=len(counts))))
        starts.append(len(columns))
    return sparse.csr_matrix((values, columns, starts), shape=(len(starts) - 1, BUCKETS))


@dataclass(frozen=True)
class NgramRegression:
    """A fitted regression.

    Attributes:
        rarity: weight of each bucket, [BUCKETS].
        weights: [BUCKETS].
        intercept: log-odds of a text whose pieces say nothing.
    """

    rarity: np.ndarray
    weights: np.ndarray
    intercept: float

    def predict(self, texts: Sequence[str]) -> np.ndarray:
        """Predicted value of each text, [n] in (0, 1); 0 for a text without a word."""
        features = _scaled(count_matrix(texts), self.rarity)
        values = expit(features @ self.weights + self.intercept)
        return np.where(np.diff(features.indptr) > 0, values, 0.0)


def fit_ngram_regression(texts: Sequence[str], targets: np.ndarray) -> NgramRegression:
    """Minimise the cross-entropy to soft targets plus a ridge.

    ``mean_i [log(1 + exp(z_i)) - t_i z_i] + RIDGE / (2 n) ||w||^2,  z = x w + b``

    Args:
        texts: n texts.
        targets: [n] in [0, 1].

    Raises:
        ValueError: no texts, or targets of another length or outside [0, 1].
    """
    wanted = np.asarray(targets, dtype=np.float64)
    if len(texts) == 0 or wanted.shape != (len(texts),) or wanted.min() < 0 or wanted.max() > 1:
        raise ValueError(f"ngram regression: {len(texts)} texts need as many targets in [0, 1]")
    counts = count_matrix(texts)
    seen = np.bincount(counts.indices, minlength=BUCKETS)
    rarity = np.log((1 + len(texts)) / (1 + seen)) + 1
    features = _scaled(counts, rarity)
    transposed, n = features.T.tocsr(), len(texts)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weights, intercept = parameters[:-1], parameters[-1]
        z = features @ weights + intercept
        residual = (expit(z) - wanted) / n
        value = np.mean(np.logaddexp(0, z) - wanted * z) + RIDGE / (2 * n) * weights @ weights
        return value, np.append(transposed @ residual + RIDGE / n * weights, residual.sum())

    found = minimize(loss, np.zeros(BUCKETS + 1), jac=True, method="L-BFGS-B", options={"maxiter": 300}).x
    return NgramRegression(rarity, found[:-1], float(found[-1]))


def _scaled(counts: sparse.csr_matrix, rarity: np.ndarray) -> sparse.csr_matrix:
    """Counts times rarity, every row of Euclidean length one (an empty row stays empty)."""
    values = counts.data * rarity[counts.indices]
    rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    lengths = np.sqrt(np.bincount(rows, weights=values**2, minlength=counts.shape[0]))
    return sparse.csr_matrix((values / lengths[rows], counts.indices, counts.indptr), shape=counts.shape)
