"""Images from disk to batches: sources, transforms, and the Grain pipeline. No accelerator is touched here."""

from vqrae_jax.data.fingerprint import difference, fingerprint
from vqrae_jax.data.pipeline import BadImages, TrainIterator, eval_batches, train_batches
from vqrae_jax.data.sources import (
    SOURCES,
    ArrayRecordSource,
    ArraySource,
    EmbeddedSource,
    FolderSource,
    Record,
    Source,
    SourceKind,
    TfdsSource,
    as_source,
    hold_out,
    open_parts,
    open_source,
    part,
)
from vqrae_jax.data.transforms import decode_image, random_flip, random_resized_crop, resize_and_center_crop

__all__ = [
    "SOURCES",
    "ArrayRecordSource",
    "ArraySource",
    "BadImages",
    "EmbeddedSource",
    "FolderSource",
    "Record",
    "Source",
    "SourceKind",
    "TfdsSource",
    "TrainIterator",
    "as_source",
    "decode_image",
    "difference",
    "eval_batches",
    "fingerprint",
    "hold_out",
    "open_parts",
    "open_source",
    "part",
    "random_flip",
    "random_resized_crop",
    "resize_and_center_crop",
    "train_batches",
]
