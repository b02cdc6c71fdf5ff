"""Images from disk to batches: sources, transforms, and the Grain pipeline. No accelerator is touched here."""

from vqrae_jax.data.codes import CodesRecord, CodesSource
from vqrae_jax.data.fingerprint import difference, fingerprint
from vqrae_jax.data.pipeline import (
    BadImages,
    TrainIterator,
    codes_eval_batches,
    codes_train_batches,
    eval_batches,
    train_batches,
    views_batches,
)
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
from vqrae_jax.data.transforms import (
    decode_image,
    random_flip,
    random_resized_crop,
    resize_and_center_crop,
    ten_crops,
)

__all__ = [
    "SOURCES",
    "ArrayRecordSource",
    "ArraySource",
    "BadImages",
    "CodesRecord",
    "CodesSource",
    "EmbeddedSource",
    "FolderSource",
    "Record",
    "Source",
    "SourceKind",
    "TfdsSource",
    "TrainIterator",
    "as_source",
    "codes_eval_batches",
    "codes_train_batches",
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
    "ten_crops",
    "train_batches",
    "views_batches",
]
