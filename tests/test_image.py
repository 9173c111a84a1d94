"""Figure files in bulk: every cut, every turn, every odd mode. The stories are in nbs/03_image.ipynb."""
import io
import struct
import tracemalloc
import warnings
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageFile

from recodai_forgery.image import PALETTE, check_image, find_images, fit_size, image_info, load_image, overlay, resize_image
from recodai_forgery.types import BadImage, BadMask, Event, Region

PICTURE = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (23, 31, 3), dtype=np.uint8), (0, 0), 2)
COLOUR, GREY = Image.fromarray(PICTURE), Image.fromarray(PICTURE[..., 0])
LOSSLESS = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}, "BMP": {}}
FILES = LOSSLESS | {"JPEG": {}, "GIF": {}}


def stored(image, format, **options):
    "The bytes of a file."
    file = io.BytesIO()
    image.copy().save(file, format, **options)
    return file.getvalue()


def write(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_turned_files_stand_upright_and_the_header_agrees(tmp_path, format, orientation):
    to_stored = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: np.transpose(a, (1, 0, 2)),
                 6: np.rot90, 7: lambda a: np.rot90(np.transpose(a, (1, 0, 2)), 2), 8: lambda a: np.rot90(a, -1)}[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = write(tmp_path / "turned", stored(Image.fromarray(np.ascontiguousarray(to_stored(PICTURE))), format, exif=exif,
                                             **({"quality": 95, "subsampling": 0} if format == "JPEG" else LOSSLESS[format])))
    read = load_image(path)
    assert image_info(path).shape == read.shape[:2] == PICTURE.shape[:2]
    assert np.abs(read.astype(int) - PICTURE).max() <= (12 if format == "JPEG" else 0)


def png16(values, transparent=None):
    "A 16-bit grey PNG, written by hand."
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(values, order="<"):
    "An uncompressed grey TIFF of either byte order, written by hand."
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    tags = [(256, values.shape[1]), (257, values.shape[0]), (258, 8 * values.itemsize), (259, 1), (262, 1), (273, 8), (277, 1),
            (278, values.shape[0]), (279, values.nbytes), (339, kind)]
    pixels = values.astype(values.dtype.newbyteorder(order)).tobytes()
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags)
    return ({"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, 8 + len(pixels)) + pixels
            + struct.pack(order + "H", len(tags)) + entries + bytes(4))


DEEP = np.random.default_rng(1).integers(300, 4000, (23, 31))
DEEP_FILES = {"png": png16(DEEP.astype(np.uint16)), "uint16 little": tiff(DEEP.astype(np.uint16)),
              "uint16 big": tiff(DEEP.astype(np.uint16), ">"),
              "int16": tiff((DEEP - 2000).astype(np.int16)), "int32": tiff((DEEP - 2000).astype(np.int32)),
              "int32 big": tiff(DEEP.astype(np.int32), ">"), "float32": tiff((DEEP / 7).astype(np.float32)),
              "float32 big": tiff((DEEP / 7).astype(np.float32), ">"), "wide": tiff((DEEP * 900_000.).astype(np.float32))}


@pytest.mark.parametrize("name", DEEP_FILES)
def test_deep_files_are_stretched_over_their_own_range(tmp_path, name):
    expected = np.rint((DEEP - DEEP.min()) * (255 / (DEEP.max() - DEEP.min())))
    read = load_image(write(tmp_path / "deep", DEEP_FILES[name]))
    assert read.shape == (*DEEP.shape, 3) and (read == read[..., :1]).all()
    assert np.abs(read[..., 0] - expected).max() <= (1 if "float" in name or name == "wide" else 0)
    assert read.min() == 0 and read.max() == 255


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(tmp_path, value):
    values = DEEP.astype(np.float32)
    values[3, 4] = value
    with pytest.raises(BadImage, match="not finite"): load_image(write(tmp_path / "deep.tif", tiff(values)))


def test_flat_deep_picture_is_black(tmp_path):
    assert (load_image(write(tmp_path / "flat", tiff(np.full((4, 5), 777, np.uint16)))) == 0).all()


@pytest.mark.parametrize("format", FILES)
def test_a_file_cut_anywhere_is_refused_or_whole(tmp_path, format):
    data = stored(COLOUR.crop((0, 0, 13, 11)), format, **FILES[format])
    path, refused = tmp_path / "cut", 0
    whole = load_image(write(path, data))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore") # PIL comments some cuts of a TIFF's tags
        for length in range(len(data)):
            write(path, data[:length])
            try: read = load_image(path)
            except BadImage as problem:
                assert str(path) in str(problem)
                refused += 1
                if format in ("PNG", "JPEG", "GIF"):
                    with pytest.raises(BadImage): check_image(path) # the quick look finds it too
            else: assert np.array_equal(read, whole), length # only what lies behind the pixels was lost
    assert refused >= .9 * len(data) or format == "TIFF" and refused >= .9 * whole.nbytes


DAMAGED = [stored(COLOUR, "PNG"), stored(COLOUR.convert("P"), "PNG", transparency=0), DEEP_FILES["png"],
           stored(COLOUR, "JPEG", progressive=True), stored(COLOUR.convert("CMYK"), "JPEG"), stored(COLOUR, "TIFF", compression="tiff_lzw"),
           DEEP_FILES["float32"], stored(COLOUR, "GIF"), stored(COLOUR, "BMP"), stored(COLOUR, "WEBP")]


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.sampled_from(DAMAGED), head=st.booleans(),
       changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6))
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_end_in_an_image_or_bad_image(tmp_path, data, changes, head):
    damaged = bytearray(data)
    for place, value in changes: damaged[int(place * (min(99, len(data) - 1) if head else len(data) - 1))] = value
    path = write(tmp_path / "damaged", bytes(damaged))
    try: read = load_image(path, max_pixels=1 << 20)
    except BadImage: return
    assert read.dtype == np.uint8 and read.shape == (*image_info(path).shape, 3)


@pytest.mark.parametrize("format", FILES)
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_content_decides_not_the_name(tmp_path, format, suffix):
    path = write(tmp_path / f"figure{suffix}", stored(COLOUR, format, **FILES[format]))
    assert image_info(path).format == format
    assert np.array_equal(load_image(path), load_image(write(tmp_path / "figure", path.read_bytes())))


@pytest.mark.parametrize("format", ["PPM", "ICO", "TGA", "PCX"])
def test_other_formats_are_not_even_tried(tmp_path, format):
    with pytest.raises(BadImage, match="is not an image"): load_image(write(tmp_path / "figure.png", stored(COLOUR, format)))


def test_alpha_never_reaches_the_pixels(tmp_path):
    alpha = np.random.default_rng(2).choice([0, 128, 255], PICTURE.shape[:2]).astype(np.uint8)
    other = np.where(alpha[..., None] == 0, 255 - PICTURE, PICTURE) # differs only where nothing shows
    first, second = (load_image(write(tmp_path / name, stored(Image.fromarray(np.dstack([array, alpha])), "PNG")))
                     for name, array in (("a", PICTURE), ("b", other)))
    assert np.array_equal(first, second)
    exact = PICTURE * (alpha[..., None] / 255) + 255 * (1 - alpha[..., None] / 255)
    assert np.abs(first - exact).max() <= 1


@pytest.mark.parametrize("image,options", [
    (GREY, {"transparency": int(PICTURE[0, 0, 0])}), (COLOUR, {"transparency": tuple(int(part) for part in PICTURE[0, 0])}),
    (COLOUR.quantize(4), {"transparency": bytes([0, 0, 0, 0])}), (Image.merge("LA", [GREY, Image.new("L", GREY.size, 0)]), {}),
], ids=["key grey", "key colour", "palette alpha", "LA"])
def test_transparent_keys_show_the_page(tmp_path, image, options):
    read = load_image(write(tmp_path / "key.png", stored(image, "PNG", **options)))
    assert (read[0, 0] == 255).all()


def test_header_is_read_without_decoding(tmp_path, monkeypatch):
    def decode(*_): raise AssertionError("decoded")
    files = [write(tmp_path / format, stored(COLOUR, format, **options)) for format, options in FILES.items()]
    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    for path in files:
        assert check_image(path).shape == PICTURE.shape[:2]
        with pytest.raises(BadImage, match="more than 700"): load_image(path, max_pixels=700)
    with pytest.raises(AssertionError, match="decoded"): load_image(files[0]) # the trap works
    assert image_info(files[0], max_pixels=23 * 31).shape == (23, 31)


def test_python_strings_and_odd_places(tmp_path):
    path = write(tmp_path / "figure; 100 %.png", stored(COLOUR, "PNG"))
    assert np.array_equal(load_image(str(path)), PICTURE)
    link = tmp_path / "broken.png"
    link.symlink_to(tmp_path / "gone.png")
    for call in load_image, image_info, check_image:
        with pytest.raises(BadImage, match="does not exist"): call(link)
    (tmp_path / "folder.png").mkdir()
    assert find_images(tmp_path) == [link, path] # a broken link is a figure that cannot be read, not one that is not there
    with pytest.raises(BadImage, match="nowhere"): find_images([path, tmp_path / "nowhere"])


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 2048))
def test_fit_size_keeps_the_aspect(height, width, longest):
    shape = fit_size((height, width), longest)
    assert max(shape) == longest and min(shape) >= 1
    shorter, scale = min(height, width), longest / max(height, width)
    assert abs(min(shape) - max(1, shorter * scale)) <= .5 + 1e-9


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 90))
def test_resize_gives_the_fitted_size_and_keeps_flat_pictures_flat(height, width, longest):
    resized = resize_image(np.full((height, width, 3), (10, 200, 90), np.uint8), longest)
    assert resized.shape == (*fit_size((height, width), longest), 3) and (resized == (10, 200, 90)).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_overlay_draws_inside_and_around_its_regions(seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    masks = [cv2.GaussianBlur(rng.random((40, 50)), (0, 0), 3) > level for level in rng.uniform(.45, .52, 3)]
    regions = [Region.from_mask(mask) for mask in masks if mask.any()]
    drawn = overlay(image, regions, PALETTE)
    union = np.zeros((40, 50), np.uint8)
    for region in regions: union |= region.full_mask((40, 50)).astype(np.uint8)
    ring = cv2.dilate(union, np.ones((3, 3), np.uint8))
    assert (drawn[ring == 0] == image[ring == 0]).all()
    assert regions == [] or (drawn[union == 1] != image[union == 1]).any()


def test_overlay_colours_events_and_refuses_what_lies_outside():
    image, box = np.full((30, 30, 3), 255, np.uint8), np.ones((5, 5), bool)
    at = lambda x, y: Region((x, y, x + 5, y + 5), box)
    drawn = overlay(image, [Event((at(0, 0), at(25, 25))), at(10, 10)], [(0, 0, 0), (255, 0, 0)])
    assert (drawn[0, 0] == 0).all() and (drawn[29, 29] == 0).all() and (drawn[10, 10] == (255, 0, 0)).all()
    for region in at(26, 0), at(0, 26), at(-1, 0), at(-9, -9), at(40, 40):
        with pytest.raises(BadMask, match="outside"): overlay(image, [region])


def test_overlay_never_makes_masks_of_the_frame():
    image = np.zeros((2000, 2000, 3), np.uint8)
    regions = [Region((20 * i, 20 * i, 20 * i + 15, 20 * i + 15), np.ones((15, 15), bool)) for i in range(90)]
    tracemalloc.start()
    try:
        overlay(image, regions)
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert peak < image.nbytes + 1_000_000 # the copy that is returned, and crops


def test_real_figures(shared):
    figures = find_images([shared / "figures", shared / "bench/dev/train_images/forged"])[::8]
    assert len(figures) > 25
    for path in figures:
        info, image = check_image(path), load_image(path)
        assert image.shape == (*info.shape, 3) and image.max() > image.min()
