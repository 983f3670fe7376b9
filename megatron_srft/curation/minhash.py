"""Near-duplicates among texts: MinHash signatures and banding find candidates, exact Jaccard decides.

    J(A, B) = |A and B| / |A or B|                 of the sets of word n-grams ("shingles")
    P(min over A of h = min over B of h) = J       for a random h, so a signature of P minima estimates J

Signatures are cut into b bands of r minima; texts with an equal band are candidates, which a pair becomes with
probability 1 - (1 - J^r)^b (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, section 3.4). Everything is
seeded, so the same rows give the same result.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence

import numpy as np

PRIME = 2**31 - 1
"""h(x) = (a x + b) mod PRIME; with a, b, x below it the product fits into 64 bits."""

MISS = 0.01
"""Greatest probability with which a pair that is just at the threshold may fail to become a candidate."""

WORD = re.compile(r"\w+")


def shingles(text: str, size: int) -> np.ndarray:
    """[distinct n-grams] uint64, sorted: a hash of each run of `size` words, case and punctuation apart.

    A text with fewer words is one n-gram; one without words has none.
    """
    words = WORD.findall(text.lower())
    runs = {" ".join(words[start : start + size]) for start in range(max(len(words) - size, 0) + 1)} if words else set()
    digests = [hashlib.blake2b(run.encode(), digest_size=8).digest() for run in runs]
    return np.sort(np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64))


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Jaccard similarity of two sets from `shingles`; 0 when one is empty."""
    common = len(np.intersect1d(first, second, assume_unique=True))
    return common / (len(first) + len(second) - common) if common else 0.0


def signatures(sets: Sequence[np.ndarray], permutations: int, seed: int) -> np.ndarray:
    """[texts, permutations] uint32; a row of PRIME for an empty set."""
    numbers = np.random.default_rng(seed)
    a = numbers.integers(1, PRIME, size=(permutations, 1), dtype=np.uint64)
    b = numbers.integers(0, PRIME, size=(permutations, 1), dtype=np.uint64)
    out = np.full((len(sets), permutations), PRIME, np.uint32)
    for row, values in enumerate(sets):
        if len(values):
            out[row] = ((a * (values % PRIME) + b) % PRIME).min(axis=1)
    return out


def banding(threshold: float, permutations: int) -> tuple[int, int]:
    """(bands, minima per band): the longest bands that lose a pair at the threshold with probability MISS at most.

    Bands of one minimum where none are that good.
    """
    good = [r for r in range(1, permutations + 1) if (1 - threshold**r) ** (permutations // r) <= MISS]
    rows = max(good, default=1)
    return permutations // rows, rows


def buckets(signature: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """[texts, bands] int64: a number that two texts share exactly if they agree in that band; -1 for nobody else."""
    out = np.full((len(signature), bands), -1, np.int64)
    for band in range(bands):
        keys = np.ascontiguousarray(signature[:, band * rows : (band + 1) * rows])
        _, inverse, counts = np.unique(
            keys.view(np.dtype((np.void, keys.itemsize * rows))).ravel(), return_inverse=True, return_counts=True
        )
        out[:, band] = np.where(counts[inverse] > 1, inverse * bands + band, -1)
    return out


def repeats(
    sets: Sequence[np.ndarray], threshold: float, permutations: int, seed: int, fixed: int = 0
) -> Iterator[list[tuple[int, float]]]:
    """For each text in order, the earlier kept texts that it repeats, with the similarity; [] means it is kept itself.

    A text is compared with kept ones only: of a chain of texts that drift apart, the far ones stay, and of many that
    are alike only one is ever compared. Empty sets repeat nothing.

    Args:
        sets: from `shingles`.
        threshold: of the similarity, in (0, 1].
        fixed: the first so many texts are kept whatever they repeat.
    """
    bands, rows = banding(threshold, permutations)
    numbers = buckets(signatures(sets, permutations, seed), bands, rows)
    index: dict[int, list[int]] = {}
    for text, values in enumerate(sets):
        own = [int(number) for number in numbers[text] if number >= 0 and len(values)]
        candidates = sorted({other for number in own for other in index.get(number, ())}) if text >= fixed else []
        found = [
            (other, similarity) for other in candidates if (similarity := jaccard(sets[other], values)) >= threshold
        ]
        if not found:
            for number in own:
                index.setdefault(number, []).append(text)
        yield found
