"""By what two images are told to be the same, or near copies of one another: hashes of one image, and their distance.

Exact: SHA-256 of the bytes, and of the upright decoded pixels, which a re-saved PNG keeps. Near: pHash (Zauner,
"Implementation and benchmarking of perceptual image hash functions", 2010): which of the lowest 8 x 8 frequencies of
the grey image at 32 x 32 are above their median, 64 bits that resizing, recompression and brightness hardly change. It
only proposes; `pixel_distance` of the decoded images decides. Below SMALL pixels a side the 64 bits say next to
nothing: there only equal pixels count as copies in a certificate, and where one image is asked for, a thumbnail of
8 x 8 grey pixels proposes. A crop or a rotation is not found, a mirror image is, as the asker hashes both.

All of it is computed in whole numbers, so that every processor gives the same hashes and the same answers.

What proposes a pair, and why two limits: in a search of all with all each further bit multiplies the comparisons, and
MOST_BITS are enough; it is measured on 651 photos of Caltech-101 and changed copies of them: within 6 bits are all that
were compressed again (JPEG quality 90 and 30), 98.8 % of those of half the size, 99.2 % of those made 256 x 256, 98.5 %
of those a fifth brighter, and 9 pairs of the photos themselves. One image that is asked for is compared with each other
image once, so it is looked for within MOST_BITS_ASKED.
"""

import hashlib
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.ingestion.duplicates.hamming import num_bits
from pipeline.ingestion.images import PreparedImage, decode_image, image_size, rgb_pixels
from pipeline.ingestion.pixels.colour import UNCHANGED
from pipeline.shards.decoding import ImageFault

LOSSLESS = ("png", "npy")  # of an image that was re-encoded, extensions that say its pixels came through unchanged
SMALL = 64  # pixels of the shorter side, below which an image has too few frequencies for a perceptual hash
SIDE = 32  # pixels, at which images are compared
MOST_BITS = 6  # of 64 in which perceptual hashes differ, searching all with all
MOST_BITS_ASKED = 10  # the same for one image that is asked for
MOST_SMALL_THUMBNAIL = 6.0  # grey levels in which the thumbnails of small ones differ, on average
MOST_DISTANCE = 12.0  # grey levels in which near copies differ at SIDE x SIDE, root mean square
MOST_SMALL_DISTANCE = 9.0  # the same of small images, which are alike sooner
MOST_THUMBNAIL = 1.33 * MOST_DISTANCE + 1  # grey levels, root mean square, of thumbnails: see `thumbnails_are_alike`
COSINE_SCALE = 1 << 12
DEAD_ZONE = 32 * COSINE_SCALE**2  # of a frequency: two grey levels, more than JPEG of quality 90 adds
HASHES = np.dtype(
    [
        ("sha256", "<u8", (4,)),  # of the bytes
        ("pixels", "<u8", (4,)),  # SHA-256 of the decoded pixels and their shape; zeros where they do not decode
        ("perceptual", "<u8"),
        ("thumbnail", "u1", (64,)),
        ("side", "<u4"),  # pixels of the shorter side; 0 where the bytes do not decode
    ]
)


class Likeness(NamedTuple):
    """`hashes` is one element of `HASHES`; `shown` the image at SIDE x SIDE, (SIDE, SIDE, 3) float32 in 0..255."""

    hashes: np.ndarray
    shown: np.ndarray


def likeness(content: bytes) -> Likeness:
    """Of the bytes of an image file; where they do not decode, their SHA-256 alone says what they are."""
    sha256 = hashlib.sha256(content)
    try:
        pixels = _pixels(content)
    except ImageFault:
        hashes = np.zeros((), HASHES)
        hashes["sha256"] = words(sha256)
        return Likeness(hashes, np.zeros((SIDE, SIDE, 3), np.float32))
    return Likeness(hashes_of_pixels(pixels, sha256.digest()), shown_pixels(pixels).astype(np.float32))


def hashes_of_prepared(image: PreparedImage, sha256: bytes) -> np.ndarray:
    """One element of `HASHES`, the same as of its stored bytes, without decoding them where they show `pixels`."""
    if image.extension not in LOSSLESS and not all(change in UNCHANGED for change in image.changes):
        return likeness(image.content).hashes
    return hashes_of_pixels(rgb_pixels(image.pixels), sha256)


def hashes_of_pixels(pixels: Image.Image | np.ndarray, sha256: bytes) -> np.ndarray:
    """One element of `HASHES` of decoded, upright pixels: RGB, or what has no RGB. `sha256` is that of the bytes."""
    hashes = np.zeros((), HASHES)
    hashes["sha256"] = np.frombuffer(sha256, "<u8")
    hashes["pixels"] = words(_digest(pixels))
    hashes["side"] = min(image_size(pixels))
    grey = _small_grey(pixels)
    hashes["perceptual"] = perceptual_hash(np.asarray(grey))
    hashes["thumbnail"] = np.asarray(grey.reduce(SIDE // 8)).reshape(64)
    return hashes


def mirrored(image: Likeness) -> Likeness:
    """What of the left-right mirror image a near copy would have; its bytes and pixels are nobody's."""
    hashes, shown = np.zeros((), HASHES), np.ascontiguousarray(image.shown[:, ::-1])
    hashes["perceptual"] = perceptual_hash(np.asarray(Image.fromarray(shown.astype(np.uint8)).convert("L")))
    hashes["thumbnail"] = image.hashes["thumbnail"].reshape(8, 8)[:, ::-1].reshape(64)
    hashes["side"] = image.hashes["side"]
    return Likeness(hashes, shown)


def words(digest: "hashlib._Hash") -> np.ndarray:
    """(4,) uint64: the 256 bits of a digest."""
    return np.frombuffer(digest.digest(), "<u8")


def perceptual_hash(grey: np.ndarray) -> np.uint64:
    """64 bits of a grey image (SIDE, SIDE) uint8; bit 8 r + c: is frequency (r, c) above the median of all?

    Above by more than DEAD_ZONE: most frequencies of a drawing are next to nothing, and which of those is the larger
    is noise. The constant term is left out of the median, and its bit is 0: brightness must not tell images apart.
    """
    frequencies = (_COSINES @ grey.astype(np.int64) @ _COSINES.T).reshape(64)
    bits = frequencies > np.partition(frequencies[1:], 31)[31] + DEAD_ZONE  # the median of 63
    bits[0] = False
    return np.uint64(np.packbits(bits).view(">u8")[0])


def root_mean_square(differences: np.ndarray) -> np.ndarray:
    """(...) float64 of (..., values) whole numbers, their mean taken off: brightness tells nothing apart. Up to 33,000
    values of -255 to 255 are added up without overflow."""
    values, count = differences.astype(np.int32), differences.shape[-1]
    squares = np.einsum("...i,...i->...", values, values).astype(np.int64)
    return np.sqrt((count * squares - values.sum(axis=-1, dtype=np.int64) ** 2).astype(np.float64)) / count


def thumbnails_are_alike(ones: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(N,) bool of (N, 64) uint8: may the images be near copies? A mean over 4 x 4 of 32 x 32 pixels only lessens a
    difference, and so does taking its own mean off; grey weighs a channel with at most 0.59, not a third, which makes
    of a distance at most the root of 1.76 times."""
    return root_mean_square(ones.astype(np.int16) - others.astype(np.int16)) <= MOST_THUMBNAIL


def candidates(hashes: np.ndarray, image: np.ndarray) -> np.ndarray:
    """(N,) bool: which of (N,) `HASHES` may be near copies of `image`, one element of them, and are to be looked at."""
    if image["side"] == 0:
        return np.zeros(len(hashes), bool)
    differences = 64 * (hashes["thumbnail"].astype(np.int32) - image["thumbnail"])
    means = differences.sum(axis=1, keepdims=True) // 64  # whatever the brightness
    differing = np.abs(differences - means).sum(axis=1)
    small = np.minimum(hashes["side"], image["side"]) < SMALL
    near = np.where(
        small, differing <= 64 * 64 * MOST_SMALL_THUMBNAIL,
        num_bits(hashes["perceptual"] ^ image["perceptual"]) <= MOST_BITS_ASKED,
    )  # fmt: skip
    return near & (hashes["side"] > 0)


def pixel_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Root mean square difference in grey levels of two images (SIDE, SIDE, 3), their mean brightness made equal."""
    return float(root_mean_square((one.astype(np.int32) - other.astype(np.int32)).reshape(-1)))


def are_near_copies(one: Likeness, other: Likeness) -> bool:
    """Whether the pixels confirm it. An image without content (one colour) is nobody's copy by likeness alone."""
    if min(root_mean_square(image.shown.reshape(-1)) for image in (one, other)) < 1:
        return False
    small = min(int(one.hashes["side"]), int(other.hashes["side"])) < SMALL
    return pixel_distance(one.shown, other.shown) <= (MOST_SMALL_DISTANCE if small else MOST_DISTANCE)


def _pixels(content: bytes) -> Image.Image | np.ndarray:
    try:
        return decode_image(content, "rgb").pixels
    except ImageFault as fault:
        if fault.reason != "unsupported_mode":
            raise
        return decode_image(content, "keep").pixels


def viewable_pixels(content: bytes) -> Image.Image:
    """The bytes of an image file as RGB that a person can look at; ImageFault where they do not decode."""
    return _viewable(_pixels(content)).convert("RGB")


def _digest(pixels: Image.Image | np.ndarray) -> "hashlib._Hash":
    if isinstance(pixels, Image.Image) and pixels.mode == "RGB":
        digest = hashlib.sha256(f"|u1 {(pixels.height, pixels.width, 3)} ".encode())  # as of its array
        digest.update(pixels.tobytes())
        return digest
    values = np.ascontiguousarray(pixels)
    return hashlib.sha256(f"{values.dtype.str} {values.shape} ".encode() + values.tobytes())


def shown_pixels(pixels: Image.Image | np.ndarray) -> np.ndarray:
    """(SIDE, SIDE, 3) uint8 of decoded pixels."""
    pixels = _viewable(pixels)
    return np.asarray(pixels.convert("RGB").resize((SIDE, SIDE), _filter(pixels)))


def _small_grey(pixels: Image.Image | np.ndarray) -> Image.Image:
    """(SIDE, SIDE) grey. Made grey first and shrunk by whole pixels, three times as fast as `shown_pixels`."""
    grey = _viewable(pixels).convert("L")
    factor = min(grey.size) // (2 * SIDE)
    grey = grey.reduce(factor) if factor > 1 else grey
    return grey.resize((SIDE, SIDE), _filter(grey))


def _viewable(pixels: Image.Image | np.ndarray) -> Image.Image:
    """RGB as it is; anything else: the mean of its channels, stretched over the grey levels."""
    if isinstance(pixels, Image.Image) and pixels.mode == "RGB":
        return pixels
    values = np.asarray(pixels, np.float32)
    values = values.mean(axis=2) if values.ndim == 3 else values
    low, high = float(values.min()), float(values.max())
    grey = (values - low) * (255 / (high - low)) if high > low else np.zeros_like(values)
    return Image.fromarray(grey.round().astype(np.uint8))


def _filter(pixels: Image.Image) -> Image.Resampling:
    return Image.Resampling.BOX if min(pixels.size) >= SIDE else Image.Resampling.BICUBIC


# (8, SIDE), whole numbers; before rounding none is nearer than 0.02 to a half, so processors agree
_COSINES = np.round(COSINE_SCALE * np.cos(np.pi * np.outer(np.arange(8), 2 * np.arange(SIDE) + 1) / (2 * SIDE))).astype(
    np.int64
)
