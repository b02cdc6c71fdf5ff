"""Images from disk to batches: sources, transforms, and the Grain pipeline. No accelerator is touched here."""

from vqrae_jax.data.pipeline import BadImages, TrainIterator, eval_batches, train_batches
from vqrae_jax.data.sources import ArrayRecordSource, EmbeddedSource, FolderSource, Record, Source, TfdsSource
from vqrae_jax.data.transforms import decode_image, random_flip, random_resized_crop, resize_and_center_crop

__all__ = [
    "ArrayRecordSource",
    "BadImages",
    "EmbeddedSource",
    "FolderSource",
    "Record",
    "Source",
    "TfdsSource",
    "TrainIterator",
    "decode_image",
    "eval_batches",
    "random_flip",
    "random_resized_crop",
    "resize_and_center_crop",
    "train_batches",
]
