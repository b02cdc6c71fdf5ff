"""Batches of codes for a generator: their order, their views, and what stands in the place of a damaged record."""

import numpy as np
import pytest

from vqrae_jax.data import (
    BadImages,
    CodesRecord,
    CodesSource,
    codes,
    codes_eval_batches,
    codes_train_batches,
    fingerprint,
    open_parts,
    open_source,
    resize_and_center_crop,
    ten_crops,
    transforms,
)

RECORDS, VIEWS = 30, 3
DESCRIPTION = codes.Description(
    data="embedded", source={"images": RECORDS, "digests": []}, num_classes=7, tokenizer="", weights="ema",
    codebook_size=2**17, grid=(2, 3), image_size=32, views=VIEWS, batch_size=4, shard_size=16, recipe={})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Record i has the label i mod 7; its codes are 1000 i + 10 view + position, more than uint16 holds; two shards."""
    folder = tmp_path_factory.mktemp("codes")
    begun = codes.begin(folder, DESCRIPTION)
    grids = np.arange(6).reshape(2, 3) + 10 * np.arange(VIEWS)[:, None, None]
    records = [CodesRecord((4000 * i + grids).astype(begun.dtype), i % 7, f"image {i}", "é" * i)
               for i in range(RECORDS)]
    for number, shard in enumerate(begun.shards(folder)):
        codes.write_shard(shard, records[16 * number:16 * (number + 1)])
    codes.end(folder, begun)
    return folder


def training(source, **changes):
    options = {"batch_size": 8, "seed": 3, "threads": 1, "workers": 0, "bad_images": BadImages(None), "max_bad": 0.01}
    return codes_train_batches(source, **(options | changes))


def take(batches, count):
    made = [next(batches) for _ in range(count)]
    batches.close()
    return made


def joined(batches, name="codes"):
    return np.concatenate([batch[name] for batch in batches])


def test_a_folder_of_codes_is_a_source(folder):
    source = open_source(f"codes:{folder}", training=True, of="codes")
    assert isinstance(source, CodesSource) and (len(source), source.num_classes) == (RECORDS, 7)
    record = source[29]
    assert record.codes.dtype == np.uint32 and record.codes.shape == (VIEWS, 2, 3)
    assert record.codes[2].tolist() == [[116020, 116021, 116022], [116023, 116024, 116025]]
    assert record[1:] == (1, "image 29", "é" * 29)
    assert source.name(29) == f"{folder}/codes-00001-of-00002.array_record/13"
    assert fingerprint(source)["images"] == RECORDS
    training, held_out = open_parts(f"codes:{folder}", holdout=0.2, of="codes")
    names = [part[i].name for part in (training, held_out) for i in range(len(part))]
    assert len(held_out) and sorted(names) == sorted(f"image {i}" for i in range(RECORDS))
    with pytest.raises(ValueError, match="unknown data 'folder:/x': give codes:DIR"):
        open_source("folder:/x", training=True, of="codes")


def test_training_sees_every_record_once_an_epoch_and_all_its_views(folder):
    batches = take(training(CodesSource(folder), batch_size=10, read_caption=lambda text: {"length": len(text)}), 30)
    for batch in batches:
        assert batch["codes"].dtype == batch["label"].dtype == np.int32 and batch["codes"].shape == (10, 2, 3)
        index, view = np.divmod(batch["codes"][:, 0, 0], 4000)
        assert np.isin(view, [0, 10, 20]).all()
        np.testing.assert_array_equal(batch["label"], index % 7)
        np.testing.assert_array_equal(batch["length"], index)
    order = joined(batches)[:, 0, 0] // 4000
    epochs = order.reshape(10, RECORDS)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(RECORDS), (10, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 10
    views = joined(batches)[:, 0, 0] % 4000 // 10
    assert all(len(set(views[order == i])) > 1 for i in range(RECORDS))
    assert 80 < np.bincount(views, minlength=VIEWS).min()


def test_a_batch_is_a_function_of_its_number(folder):
    source = CodesSource(folder)
    expected = joined(take(training(source), 9))
    batches = training(source, threads=0)
    [next(batches) for _ in range(5)]
    state = batches.get_state()
    again = training(source, threads=2)
    again.set_state(state)
    np.testing.assert_array_equal(joined(take(again, 4)), expected[40:])
    shards = [take(training(source, batch_size=4, shard_index=i, shard_count=2), 9) for i in range(2)]
    both = [half for pair in zip(*shards, strict=True) for half in pair]
    np.testing.assert_array_equal(joined(both), expected)
    assert (joined(take(training(source, seed=4), 9)) != expected).any()


def test_evaluation_sees_the_first_view_in_order(folder):
    batches = list(codes_eval_batches(CodesSource(folder), grid=(2, 3), batch_size=8, threads=1, max_bad=0.01,
                                      bad_images=BadImages(None), read_caption=lambda text: {"length": len(text)}))
    assert joined(batches, "valid").tolist() == [True] * RECORDS + [False] * 2
    assert joined(batches, "index").tolist() == [*range(RECORDS), -1, -1]
    assert joined(batches)[:, 0, 0].tolist() == [*range(0, 4000 * RECORDS, 4000), 0, 0]
    assert joined(batches, "length").tolist() == [*range(RECORDS), 0, 0]
    assert joined(batches, "label")[-3:].tolist() == [1, -1, -1]


def test_a_damaged_record_costs_only_itself(folder, monkeypatch):
    read = CodesSource.read
    monkeypatch.setattr(CodesSource, "read", lambda self, index: b"\x0a\x01" if index == 5 else read(self, index))
    bad_images = BadImages(None)
    batches = take(training(CodesSource(folder), bad_images=bad_images), 8)
    assert 5 not in joined(batches)[:, 0, 0] // 4000
    [(name, reason)] = bad_images.names().items()
    assert name.endswith("codes-00000-of-00002.array_record/5") and f"{name} is damaged" in reason


def test_two_views_are_the_centre_and_its_mirror_image():
    image = np.random.default_rng(0).integers(0, 256, (24, 22, 3), dtype=np.uint8)
    centre, mirrored = transforms.VIEWS[2].make(image, size=20)
    np.testing.assert_array_equal(centre, resize_and_center_crop(image, size=20))
    np.testing.assert_array_equal(mirrored, centre[:, ::-1])


def test_ten_crops_are_the_centre_the_corners_and_their_mirror_images():
    image = np.zeros((24, 22, 3), np.uint8)  # cropped to 22, a tenth more than 20
    image[..., 0], image[..., 1] = np.arange(24)[:, None], np.arange(22)
    crops = ten_crops(image, size=20)
    assert crops.shape == (10, 20, 20, 3)
    corners = [(1, 1), (0, 0), (0, 2), (2, 0), (2, 2)]
    assert crops[:5, 0, 0, :2].tolist() == [[1 + top, left] for top, left in corners]
    np.testing.assert_array_equal(crops[5:], crops[:5, :, ::-1])
