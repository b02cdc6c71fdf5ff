"""Image transforms on the host: encoded images or uint8 arrays `[H, W, 3]` in, uint8 arrays `[H, W, 3]` out."""

import contextlib
import io
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

_LONGEST_SIDE = 2**18  # what takes a minute to decode is all rows of one pixel
_WHITE = (255, 255, 255, 255)
# A JPEG is decoded at a half, a quarter or an eighth where the crop keeps this many times the resolution of the result.
_SHRUNK_RESOLUTION = 1.25


def decode_image(data: bytes | np.ndarray) -> np.ndarray:
    """Any still image to RGB.

    The EXIF orientation is applied. Transparent images are composited over white. Of 16-bit images the high
    byte is kept, grey as well as colour. Of an animation or a multi-page file the first frame is read.

    Args:
      data: an encoded image, or an uint8 array `[H, W, 3]`, which is returned as it is.

    Returns:
      uint8 `[H, W, 3]`, RGB; colour profiles are not applied.

    Raises:
      ValueError: in one line, when the data are truncated, no image, of a kind whose value range is unknown
        (float or 32-bit), or larger than Pillow's limit against decompression bombs,
        or longer than 2^18 pixels.
    """
    if isinstance(data, np.ndarray):
        _check_array(data)
        return data
    with _opened(data) as image:
        return np.array(_upright_rgb(image))


def _check_array(data: np.ndarray) -> None:
    if data.dtype != np.uint8 or data.ndim != 3 or data.shape[2] != 3 or data.size == 0:
        raise ValueError(f"expected an uint8 array [H, W, 3], got {data.dtype} {list(data.shape)}")


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The image, not decoded yet; whatever fails inside the block is a ValueError of one line."""
    if not data:
        raise ValueError("not a readable image: it is empty")
    # Pillow's decoders raise almost anything on corrupt input: OSError, SyntaxError, struct.error, zlib.error, ...
    try:
        with Image.open(io.BytesIO(data)) as image:
            if max(image.size) > _LONGEST_SIDE:
                raise ValueError(f"{image.width} x {image.height} pixels, a side has more than {_LONGEST_SIDE}")
            yield image
    except Exception as error:
        # The message of UnidentifiedImageError is the repr of our buffer, an address that changes with every run.
        reason = "unknown format" if type(error).__name__ == "UnidentifiedImageError" else " ".join(str(error).split())
        raise ValueError(f"not a readable image: {reason}") from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    ImageOps.exif_transpose(image, in_place=True)
    return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit grey values; save it with 8 or 16 bits")
        # `convert` would clip at 255 instead. Pillow itself keeps the high byte of 16-bit RGB.
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("float grey values; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def random_resized_crop(
    image: bytes | np.ndarray,
    rng: np.random.Generator,
    *,
    size: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """A crop of random area and aspect ratio, resized to a square (Inception, arXiv:1409.4842, as in torchvision).

    Of a JPEG only as many frequencies are decoded as the result can show: at 1/2, 1/4 or 1/8 of its size where the
    crop still has at least 1.25 x `size` pixels a side. The crop is the same. Against full decoding the result differs
    by 38 dB PSNR at the least, 45 dB in the median; an image of 1320 x 990 pixels takes half the time for a crop of
    256, one of 500 x 375 is decoded in full. (Mosaics of ImageNet photographs, crops of 0.08 and of 0.8 to 1.)

    Args:
      image: an encoded image, read as by `decode_image`, or uint8 `[H, W, 3]`.
      rng: five numbers are drawn from it for every attempt.
      size: side of the result.
      scale: range of the crop's share of the image's area; uniform.
      ratio: range of the crop's width / height; log-uniform. Where ten attempts do not fit, the largest centred
        crop with a ratio in this range is taken.

    Returns:
      uint8 `[size, size, 3]`, resampled with an antialiased bicubic filter.

    Raises:
      ValueError: as from `decode_image`.
    """
    if isinstance(image, np.ndarray):
        _check_array(image)
        box = _random_box(image.shape[1], image.shape[0], rng, scale=scale, ratio=ratio)
        return _resized(Image.fromarray(image), size, box)
    with _opened(image) as file:
        if not isinstance(file, JpegImageFile):
            file = _upright_rgb(file)
            return _resized(file, size, _random_box(*file.size, rng, scale=scale, ratio=ratio))
        width, height = file.size
        if file.getexif().get(ExifTags.Base.Orientation, 1) > 4:  # lies on its side
            width, height = height, width
        box = _random_box(width, height, rng, scale=scale, ratio=ratio)
        needed = _SHRUNK_RESOLUTION * size
        shrink = max((by for by in (1, 2, 4, 8) if min(box[2] - box[0], box[3] - box[1]) >= by * needed), default=1)
        if shrink > 1:
            file.draft(None, (file.width // shrink, file.height // shrink))
        # Exact but for a mirrored image whose side is no multiple of `shrink`: there off by a part of a pixel.
        left, top, right, bottom = box
        return _resized(_upright_rgb(file), size, (left / shrink, top / shrink, right / shrink, bottom / shrink))


def _random_box(
    width: int, height: int, rng: np.random.Generator, *, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(height - crop_height + 1))
            left = int(rng.integers(width - crop_width + 1))
            break
    else:
        crop_width = max(1, min(width, round(height * ratio[1])))
        crop_height = max(1, min(height, round(width / ratio[0])))
        top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return left, top, left + crop_width, top + crop_height


def _resized(image: Image.Image, size: int, box: tuple[float, float, float, float]) -> np.ndarray:
    return np.array(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def resize_and_center_crop(image: bytes | np.ndarray, *, size: int) -> np.ndarray:
    """The short side to `size` with an antialiased bicubic filter, then the centre square (torchvision's rounding).

    An image that is `size x size` already comes back with its pixels untouched.

    Args:
      image: an encoded image, read as by `decode_image`, or uint8 `[H, W, 3]`.
      size: side of the result.

    Returns:
      uint8 `[size, size, 3]`.

    Raises:
      ValueError: as from `decode_image`.
    """
    if isinstance(image, np.ndarray):
        _check_array(image)
        return _centre(Image.fromarray(image), size)
    with _opened(image) as file:
        return _centre(_upright_rgb(file), size)


def _centre(image: Image.Image, size: int) -> np.ndarray:
    width, height = image.size
    short = min(height, width)
    resized_height, resized_width = int(size * height / short), int(size * width / short)
    top, left = round((resized_height - size) / 2), round((resized_width - size) / 2)
    if short == size:
        return np.array(image.crop((left, top, left + size, top + size)))
    # Only the pixels of the crop are computed: of a 1 x 10000 image the whole resized one would fill the memory.
    y, x = height / resized_height, width / resized_width
    return _resized(image, size, (left * x, top * y, min((left + size) * x, width), min((top + size) * y, height)))


def ten_crops(image: bytes | np.ndarray, *, size: int) -> np.ndarray:
    """The views that generators are trained on: five crops of an image that is a tenth larger, and their mirror images.

    The image is resized and cropped to a square of int(1.1 size) as by `resize_and_center_crop`; of that come the
    centre, the corners top left, top right, bottom left and bottom right, and the same five mirrored left to right:
    torchvision's TenCrop with the centre first, at the `crop_range` 1.1 of LlamaGen's extract_codes_c2i.py (arXiv
    2406.06525).

    Args:
      image: an encoded image, read as by `decode_image`, or uint8 `[H, W, 3]`.
      size: side of the views.

    Returns:
      uint8 `[10, size, size, 3]`.

    Raises:
      ValueError: as from `decode_image`.
    """
    large = resize_and_center_crop(image, size=int(1.1 * size))
    end = len(large) - size
    middle = round(end / 2)
    corners = ((middle, middle), (0, 0), (0, end), (end, 0), (end, end))
    crops = np.stack([large[top:top + size, left:left + size] for top, left in corners])
    return np.concatenate([crops, crops[:, :, ::-1]])


class Views(NamedTuple):
    """What is made of an image for a generator.

    Attributes:
      crop: how, for a recipe.
      make: `make(image, size=S)` gives uint8 `[views, S, S, 3]`; the first view is the one that evaluation sees.
    """

    crop: str
    make: Callable[..., np.ndarray]


def _mirrored(image: bytes | np.ndarray, *, size: int) -> np.ndarray:
    centre = resize_and_center_crop(image, size=size)
    return np.stack([centre, centre[:, ::-1]])


VIEWS = {  # by their number
    1: Views("centre", lambda image, *, size: resize_and_center_crop(image, size=size)[None]),
    2: Views("centre, and its mirror image", _mirrored),
    10: Views("centre and corners of a square of 1.1 times the size, and their mirror images", ten_crops),
}


def random_flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrors uint8 `[H, W, 3]` left to right with probability 1/2."""
    return image[:, ::-1] if rng.random() < 0.5 else image
