"""The codec against the recorded answers of the official one, and on every small shape."""
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from recodai_forgery.rle import decode, decode_regions, decode_runs, encode, runs
from recodai_forgery.types import BadAnnotation, BadMask, Region

SIDES = st.one_of(st.just(1), st.integers(1, 64))
MASKS = st.tuples(SIDES, SIDES).flatmap(lambda shape: arrays.arrays(np.uint8, shape, elements=st.integers(0, 1)))
many = settings(max_examples=500, deadline=None)


def golden(shared, name): return [json.loads(line) for line in (shared / "golden" / name).open()]


def test_encode_is_the_official_encoder(shared):
    rows = golden(shared, "encode.jsonl")
    assert len(rows) == 600
    for row in rows:
        masks = np.array([[[int(pixel) for pixel in line] for line in mask] for mask in row["masks"]], np.uint8)
        assert encode(masks) == row["annotation"]
        assert (decode(row["annotation"], masks.shape[1:], strict=False) == masks).all()


def test_lenient_decode_counts_the_official_pixels(shared):
    for row in golden(shared, "decode_edge.jsonl"):
        if "pixels" not in row["official"]: continue
        assert decode(row["rle"], tuple(row["shape"]), strict=False).sum() == row["official"]["pixels"], row


def test_strict_decode_refuses_whatever_is_odd(shared):
    fine = {"[1,3]", "[1,2,3,2]", "[1,20]", "[20,1]", "[1, 2]", "[1,2] ", "authentic"}
    rows = golden(shared, "decode_edge.jsonl")
    assert fine < {row["rle"] for row in rows}
    for row in rows:
        shape = tuple(row["shape"])
        if row["rle"] in fine:
            if row["rle"] != "authentic": assert decode(row["rle"], shape).sum() == row["official"]["pixels"]
            continue
        with pytest.raises(BadAnnotation, match="instance 1: .*; "): decode(row["rle"], shape)
        with pytest.raises(BadAnnotation, match="instance 2: .*; "): decode("[1, 1];" + row["rle"], shape)


def naive(mask: np.ndarray) -> list[int]:
    "The definition, pixel by pixel: down the columns, counted from 1."
    found, before = [], 0
    for number, pixel in enumerate(mask.T.reshape(-1).tolist(), start=1):
        if pixel and not before: found += [number, 0]
        if pixel: found[-1] += 1
        before = pixel
    return found


@many
@given(MASKS)
def test_encode_is_the_definition_and_decode_its_inverse(mask):
    annotation = encode([mask])
    assert json.loads(annotation) == naive(mask)
    assert encode([mask.astype(bool)]) == encode([mask * 255]) == encode([mask.astype(np.int64) * 7]) == encode([np.asfortranarray(mask)]) == annotation
    assert (decode(annotation, mask.shape, strict=bool(mask.any()))[0] == mask).all()


@many
@given(MASKS, st.integers(0, 5), st.integers(0, 5), st.integers(0, 5), st.integers(0, 5))
def test_a_crop_in_its_frame_gives_the_string_of_the_full_mask(mask, top, bottom, left, right):
    if not mask.any(): return
    full = np.pad(mask, ((top, bottom), (left, right)))
    region = Region((left, top, left + mask.shape[1], top + mask.shape[0]), mask)
    assert encode([region], full.shape) == encode([full])
    back, = decode_regions(encode([full]), full.shape)
    assert (back.full_mask(full.shape) == full).all() and back.mask.any(axis=0)[[0, -1]].all() and back.mask.any(axis=1)[[0, -1]].all()


@many
@given(st.lists(st.integers(-5, 45), max_size=8), st.integers(1, 6), st.integers(1, 6))
def test_strict_accepts_exactly_what_encode_could_write(values, height, width):
    "Whatever strict accepts survives a round trip through masks; whatever it refuses breaks one of the rules."
    text, pairs = json.dumps(values), list(zip(values[::2], values[1::2], strict=False))
    try: instance, = decode_runs(text, (height, width))
    except BadAnnotation:
        ends = [0] + [start + length - 1 for start, length in pairs]
        right = len(values) % 2 == 0 and values and all(start >= 1 and length >= 1 for start, length in pairs) \
            and all(start > end for (start, _), end in zip(pairs, ends, strict=False)) and ends[-1] <= height * width
        assert not right, text
    else:
        assert (instance + [1, 0]).ravel().tolist() == values
        assert decode(text, (height, width)).sum() == instance[:, 1].sum() == decode(text, (height, width), strict=False).sum()


def test_large_starts_and_many_runs():
    comb = np.zeros((1024, 1024), np.uint8)
    comb[::2] = 1
    assert json.loads(encode([comb])) == naive(comb)
    high = Region((0, 13_800_000 - 1, 1, 13_800_000), np.ones((1, 1), bool))
    assert encode([high], (13_800_000, 1)) == "[13800000, 1]"


def test_what_cannot_be_encoded_is_refused():
    for mask in (np.zeros((2, 2), float), np.zeros(4, np.uint8), np.zeros((1, 2, 2), np.uint8)):
        with pytest.raises(BadMask): runs(mask)
    with pytest.raises(BadMask, match="outside"): encode([Region((0, 0, 3, 3), np.ones((3, 3)))], (2, 9))
    with pytest.raises(BadMask, match="not known"): encode([Region((0, 0, 3, 3), np.ones((3, 3)))])
