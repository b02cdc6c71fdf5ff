"""The search of accelerators against float64, on ten million tokens.

    python -m tests.exact_search [TOKENS]

takes about five minutes of a CPU's core and prints a table: of how many tokens the index is another than that of the
least float64 score, and what exact rational arithmetic says of these: that both codes are equally near, that ours is
nearer, or that it is farther, which must not be. Also the mean number of codes that the bfloat16 scores left to be
compared, and how many blocks of tokens were searched again in float32. Ends with an error if any code is farther.
"""

import sys
from collections.abc import Callable
from fractions import Fraction

import jax
import numpy as np

from vqrae_jax.models.quantizers import search

SHAPES = [(4, 64, 0.75), (16, 256, 0.22), (64, 1024, 0.0285), (256, 4096, 0.0012), (1536, 16384, 0.0003)]  # e, K, share
KINDS = ("random", "clustered", "duplicated", "near-tied", "huge-norm")
METRICS = ("euclidean", "cosine")
REFERENCE = 2**24  # float64 scores at once


def draw(kind: str, tokens: int, dim: int, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and codes, `[tokens, dim]` and `[size, dim]` float32."""
    z, codes = (rng.standard_normal((count, dim), np.float32) for count in (tokens, size))
    if kind == "clustered":  # a common mean, and clusters that lie farther from each other than they are wide
        centres = 5 + 3 * rng.standard_normal((16, dim), np.float32)
        z, codes = (x + centres[rng.integers(0, 16, len(x))] for x in (z, codes))
    elif kind == "duplicated":
        codes = codes[rng.integers(0, size // 4, size)]
        z[::2] = codes[rng.integers(0, size, len(z[::2]))]
    elif kind == "near-tied":
        half, every = size // 2, np.arange(size // 2)
        codes[half:2 * half] = codes[:half]  # twins that differ by one bit of one coordinate
        coordinate = rng.integers(0, dim, half)
        codes[half + every, coordinate] = np.nextafter(codes[every, coordinate], np.float32(np.inf))
        chosen = codes[rng.integers(0, size, (2, tokens))]  # half of the tokens lie between two codes
        z[::2] = ((chosen[0] + chosen[1]) / 2)[::2]
        z[1::4] = chosen[0, 1::4] + 1e-3 * z[1::4]
    elif kind == "huge-norm":
        z, codes = (1e6 * x * 10 ** rng.uniform(0, 4, (len(x), 1)) for x in (z, codes))
    return z.astype(np.float32), codes.astype(np.float32)


def float64_search(z: np.ndarray, codes: np.ndarray, metric: str) -> np.ndarray:
    """The index of the least float64 score."""
    codes = codes.astype(np.float64)
    if metric == "cosine":
        codes = codes / np.linalg.norm(codes, axis=1, keepdims=True)
    offsets = (codes**2).sum(1) / 2 if metric == "euclidean" else 0
    return np.concatenate([(offsets - block.astype(np.float64) @ codes.T).argmin(1)
                           for block in np.array_split(z, len(z) * len(codes) // REFERENCE + 1)])


def farther(z: np.ndarray, a: np.ndarray, b: np.ndarray, metric: str) -> int:
    """1 if code a is farther from z than b, 0 if both are equally far, and else -1; without rounding."""
    token, one, other = ([Fraction(float(x)) for x in row] for row in (z, a, b))
    dot = lambda x, y: sum((p * q for p, q in zip(x, y, strict=True)), Fraction(0))
    if metric == "cosine":
        of_a, of_b = (dot(token, x) * abs(dot(token, x)) * dot(y, y) for x, y in ((one, other), (other, one)))
        return (of_b > of_a) - (of_b < of_a)
    difference = dot(one, one) - dot(other, other) - 2 * (dot(token, one) - dot(token, other))
    return (difference > 0) - (difference < 0)


def counted(seen: list[tuple[int, float]]) -> Callable[..., jax.Array]:
    """`search_exactly`, which tells `seen` of every block how many codes are left at most, and on average."""
    most = search._most

    def tell(bits):
        left = jax.lax.population_count(bits).sum(-1)
        note = lambda most, mean: seen.append((int(most), float(mean)))
        jax.debug.callback(note, left.max(), left.mean(), ordered=True)
        return most(bits)

    search._most = tell
    return jax.jit(search.search_exactly, static_argnames=("metric", "block_tokens"))


def main(tokens: int) -> None:
    """Draws, searches, compares and prints."""
    seen: list[tuple[int, float]] = []
    find, wrong = counted(seen), 0
    print("| codes | metric | tokens | another index than float64's | of these equally near | nearer | farther "
          "| codes left, mean | most | blocks searched again |\n|---|---|---|---|---|---|---|---|---|---|")
    for kind in KINDS:
        for metric in METRICS:
            seen.clear()
            total, verdicts, rng = 0, [], np.random.default_rng(0)
            for dim, size, share in SHAPES:
                z, codes = draw(kind, max(round(share * tokens / len(KINDS) / len(METRICS)), 1), dim, size, rng)
                found = np.asarray(find(z, codes, metric=metric, block_tokens=min(2**24 // size, 4096)))
                best = float64_search(z, codes, metric)
                total += len(z)
                verdicts += [farther(z[i], codes[found[i]], codes[best[i]], metric)
                             for i in np.flatnonzero(found != best)]
            jax.effects_barrier()
            first, last = seen[::2], seen[1::2]  # of every block: before and after it may be searched again
            print(f"| {kind} | {metric} | {total:,} | {len(verdicts)} "
                  f"| {verdicts.count(0)} | {verdicts.count(-1)} | {verdicts.count(1)} "
                  f"| {np.mean([mean for _, mean in first]):.2f} | {max(most for most, _ in last)} "
                  f"| {sum(most > search.FEW for most, _ in first)} of {len(first)} |", flush=True)
            wrong += verdicts.count(1)
    if wrong:
        sys.exit(f"{wrong} tokens got a code that is not the nearest")


if __name__ == "__main__":
    main(int(float(sys.argv[1])) if len(sys.argv) > 1 else 10**7)
