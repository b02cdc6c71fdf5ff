"""What features know of labels: nearest neighbours and a linear probe."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

MAX_SIMILARITIES = 2**25  # entries of the [queries, references] matrix that exist at once: 128 MiB


def knn_top1(features: np.ndarray, labels: np.ndarray, *, reference: tuple[np.ndarray, np.ndarray] | None = None,
             k: int = 20, temperature: float = 0.07) -> float:
    """Accuracy of the weighted k-nearest-neighbour classifier on cosine similarity, in [0, 1].

    Each of the k most similar references votes for its label with weight exp(similarity / temperature), as in DINO's
    evaluation (Caron et al. 2021, arXiv 2104.14294; Wu et al. 2018, arXiv 1805.01978). k is cut to the references
    there are.

    Args:
      features: `[N, d]` float.
      labels: `[N]` integers >= 0.
      reference: (features `[M, d]`, labels `[M]`) that vote; None is leave-one-out: all `features` but the one asked.
      k: number of voters.
      temperature: of the votes.

    Raises:
      ValueError: features and labels do not fit each other, or nothing is there to vote.
    """
    leave_one_out = reference is None
    voters, voter_labels = (features, labels) if reference is None else reference
    _check_labelled("features", features, labels)
    _check_labelled("reference", voters, voter_labels)
    k = min(k, len(voters) - leave_one_out)
    if k < 1:
        raise ValueError(f"kNN has no reference to compare with: {len(voters)} references, k = {k}")
    classes = int(np.max(voter_labels)) + 1
    voters, voter_labels = _unit(voters), jnp.asarray(voter_labels, jnp.int32)
    block = max(1, MAX_SIMILARITIES // len(voters))
    correct = 0
    for start in range(0, len(features), block):
        rows = slice(start, start + block)
        own = jnp.arange(start, start + len(features[rows])) if leave_one_out else None
        nearest, at = _nearest(_unit(features[rows]), own, voters, k=k)
        predicted = _winners(nearest, voter_labels[at], temperature=temperature, classes=classes)
        correct += int(np.sum(np.asarray(predicted) == np.asarray(labels[rows])))
    return correct / len(features)


@functools.partial(jax.jit, static_argnames="k")
def _nearest(queries: jax.Array, own: jax.Array | None, voters: jax.Array, *, k: int) -> tuple[jax.Array, jax.Array]:
    """Similarity and number of each query's k nearest voters, nearest first: `[Q, d], [Q], [M, d] -> [Q, k] x2`.

    `own` is each query's own number among the voters, which is left out; None where it is none of them. A program of
    its own: XLA on a CPU sorts all similarities, ten times as slowly, where it also works on with those it wants.
    """
    similarity = jnp.matmul(queries, voters.T, precision=jax.lax.Precision.HIGHEST)
    if own is not None:
        similarity = jnp.where(jnp.arange(len(voters))[None] == own[:, None], -jnp.inf, similarity)
    nearest, at = jax.lax.top_k(similarity, k)
    return nearest, at


@functools.partial(jax.jit, static_argnames=("temperature", "classes"))
def _winners(nearest: jax.Array, labels: jax.Array, *, temperature: float, classes: int) -> jax.Array:
    """The label that each query's voters elect: `[Q, k] x2 -> [Q]`."""
    # Weights relative to the nearest voter's: the same winner, and nothing overflows at a low temperature.
    weights = jnp.exp((nearest - nearest[:, :1]) / temperature)
    votes = jnp.zeros((len(nearest), classes)).at[jnp.arange(len(nearest))[:, None], labels].add(weights)
    return jnp.argmax(votes, axis=-1)


def linear_probe_top1(train_features: np.ndarray, train_labels: np.ndarray, test_features: np.ndarray,
                      test_labels: np.ndarray, *, l2: float = 1e-3) -> float:
    """Test accuracy of a linear classifier fitted by ridge regression to one-hot labels, in [0, 1].

    Minimises mean |x W + b - onehot|^2 + l2 |W|^2 in closed form, float64, with every feature scaled to zero mean and
    unit variance over the training set.

    Args:
      train_features: `[N, d]` float.
      train_labels: `[N]` integers >= 0.
      test_features: `[M, d]` float.
      test_labels: `[M]` integers >= 0.
      l2: weight of the penalty.

    Raises:
      ValueError: features and labels do not fit each other.
    """
    _check_labelled("train", train_features, train_labels)
    _check_labelled("test", test_features, test_labels)
    x = np.asarray(train_features, np.float64)
    mean, std = x.mean(0), np.maximum(x.std(0), 1e-6)
    x = (x - mean) / std
    share = np.bincount(train_labels) / len(x)
    class_sums = np.zeros((len(share), x.shape[1]))
    np.add.at(class_sums, train_labels, x)
    # x is centred, so the bias is the mean one-hot label and drops out of the normal equations.
    weights = np.linalg.solve(x.T @ x / len(x) + l2 * np.eye(x.shape[1]), class_sums.T / len(x))
    scores = (np.asarray(test_features, np.float64) - mean) / std @ weights + share
    return float(np.mean(scores.argmax(-1) == np.asarray(test_labels)))


def _unit(features: np.ndarray) -> jax.Array:
    x = jnp.asarray(features, jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _check_labelled(name: str, features: np.ndarray, labels: np.ndarray) -> None:
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(features):
        raise ValueError(f"{name}: features must be [N, d] and labels [N] with N > 0, "
                         f"not {features.shape} and {labels.shape}")
