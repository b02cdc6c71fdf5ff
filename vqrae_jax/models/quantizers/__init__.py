"""Quantizers: continuous tokens to discrete codes and back.

All share one interface:

    quantizer(z, train=...) -> Quantized     z [..., width]; nothing in the module changes
    quantizer.lookup(indices)                [...] int32 -> [..., width] float32: exactly the forward pass's z_q
    quantizer.codes()                        [K, e] float32: the codes that are looked up, in code space
    quantizer.num_codes                      K
    quantizer.loss_weights                   {name: weight} of each loss, with the keys of Quantized.losses
    quantizer.next_buffers(stats, rng=...)   {name: array}: its buffers after a training step with these statistics
    quantizer.add_stats(first, second)       the statistics of two micro-batches of one step together
    quantizer.moving_buffers                 names of what next_buffers changes: a weight EMA averages them too

`width` d is the tokens' width, `dim` e the codes'. Where they differ, a linear layer leads into code space and another
one out of it. Search, losses and statistics are float32, and every matmul here asks for full float32 precision: TPUs
and GPUs otherwise round the operands, and the nearest code is decided by small differences.

A new one is a file beside these, which ends in its `QuantizerKind`, and a row in `QUANTIZERS`; or an object, given to
`vqrae_jax.train`.
"""

from vqrae_jax.models.quantizers.base import Quantized, Quantizer, QuantizerKind, with_gradient_of
from vqrae_jax.models.quantizers.codebook import rotate_onto
from vqrae_jax.models.quantizers.ema import EMA, EMAVQ, update_ema_codebook
from vqrae_jax.models.quantizers.fsq import ADAPTER_FSQ, FSQ, FSQ_KIND, AdapterFSQ
from vqrae_jax.models.quantizers.none import NONE, Identity
from vqrae_jax.models.quantizers.own import OWN
from vqrae_jax.models.quantizers.ranked import RANKED, RankedVQ
from vqrae_jax.models.quantizers.search import kmeans, nearest_code
from vqrae_jax.models.quantizers.simvq import SIMVQ, SimVQ

# By the value of `model.quantizer.kind`.
QUANTIZERS: dict[str, QuantizerKind] = {
    "simvq": SIMVQ,
    "ema": EMA,
    "fsq": FSQ_KIND,
    "adapter_fsq": ADAPTER_FSQ,
    "ranked": RANKED,
    "own": OWN,
    "none": NONE,
}

__all__ = [
    "EMAVQ",
    "FSQ",
    "QUANTIZERS",
    "AdapterFSQ",
    "Identity",
    "Quantized",
    "Quantizer",
    "QuantizerKind",
    "RankedVQ",
    "SimVQ",
    "kmeans",
    "nearest_code",
    "rotate_onto",
    "update_ema_codebook",
    "with_gradient_of",
]
