"""Synthetic forgeries: the truth is exact, the twins differ where they may, and the same seed makes the same bytes."""
import hashlib
import json
import sys
from functools import lru_cache
from itertools import combinations

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from recodai_forgery.appearance import KINDS, SynthConfig, draw_shape
from recodai_forgery.copymove import RIM, NoPlace, forge
from recodai_forgery.image import load_image
from recodai_forgery.rle import decode
from recodai_forgery.synth import compose, draw_figure, draw_pair, draw_panel, find_sources, make_tree, overlap, share_sources
from recodai_forgery.types import BadConfig, BadImage, BadTree, config_from_json, config_to_json

SMALL = SynthConfig(longest_min=160, longest_max=400)
PLAIN = SynthConfig(longest_min=160, longest_max=400, post=0, modes=(1, 0, 0))
load = lru_cache(maxsize=None)(load_image)


@pytest.fixture(scope="module")
def sources():
    pytest.importorskip("skimage", reason="sources come with scikit-image: pip install 'recodai_forgery[demo]'")
    return find_sources("skimage")


def parts(mask):
    "Connected components of a plane."
    count, labels = cv2.connectedComponents(mask)
    return [labels == label for label in range(1, count)]


def source_part(plane, box):
    "The part of a plane that fills the source's box."
    inside = np.zeros(plane.shape, bool)
    inside[box[1]:box[3], box[0]:box[2]] = True
    return np.any([part for part in parts(plane) if not (part & ~inside).any()], axis=0)


def grown(mask, pixels):
    return cv2.dilate(mask.astype(np.uint8), np.ones((2 * pixels + 1,) * 2, np.uint8)) > 0


def shrunk(mask, pixels):
    return cv2.erode(mask.astype(np.uint8), np.ones((2 * pixels + 1,) * 2, np.uint8), borderValue=0) > 0


def digests(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


# truth of copies

@pytest.mark.parametrize("number", range(36))
def test_copies_are_the_warped_source_and_nothing_else_changed(sources, number):
    made = forge(load(sources[number % len(sources)]), np.random.default_rng((5, number)), PLAIN)
    assert made.image.shape == made.authentic.shape and made.masks.shape[1:] == made.image.shape[:2] and made.masks.dtype == np.uint8
    assert made.masks.max() == 1 and made.masks.sum(axis=0).max() == 1, "events overlap"
    assert len(made.masks) == len(made.record["events"])
    shape, changed = made.masks.shape[:0:-1], (made.image != made.authentic).any(axis=2)
    copied = np.zeros(made.image.shape[:2], bool)
    for plane, event in zip(made.masks, made.record["events"], strict=True):
        source, truth = source_part(plane, event["source_box"]), np.zeros(plane.shape, bool)
        assert source.any() and not changed[source].any(), "the source was painted over"
        for copy in event["copies"]:
            affine = np.array(copy["affine"])
            assert abs(abs(np.linalg.det(affine[:, :2])) - copy["scale"] ** 2) < 1e-3
            target = cv2.warpAffine(source.astype(np.float32), affine, shape) >= .5
            assert target.any() and not (target & source).any() and not (truth & target).any()
            truth |= target
            expected = cv2.warpAffine(made.authentic, affine, shape, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101)
            expected = np.clip(expected * copy["gain"] + copy["offset"], 0, 255)
            core = shrunk(target, 5) # inside of the soft edge
            error = np.abs(made.image[core] - expected[core])
            exact = copy["move"] in ("translation", "mirror") and copy["gain"] == 1
            most, mean = (0, 0) if exact else (12, 1) # OpenCV 4 interpolates at 1/32 pixel
            assert not error.size or error.max() <= most and error.mean() <= mean
            assert np.abs(made.image[target].astype(int) - made.authentic[target]).mean() > 2, "nobody would see this copy"
        missing, beyond = (truth | source) & (plane == 0), (plane > 0) & ~(truth | source)
        assert beyond.sum() <= .002 * plane.sum() and not (beyond & ~grown(truth, 1)).any() and not (missing & source).any()
        assert not (missing & shrunk(truth, 3)).any(), "the mask is off by more than the soft edge"
        copied |= truth
    assert not (changed & ~grown(copied, RIM)).any(), "twins differ outside of the copies"


@pytest.mark.parametrize("kind", KINDS[1:3])
@pytest.mark.parametrize("number", range(8))
def test_compound_copies_lie_in_the_panels_they_should(sources, kind, number):
    images = [load(sources[(number + step) % len(sources)]) for step in range(3)]
    made = compose(images, np.random.default_rng((6, number)), PLAIN, kind, .03)
    changed = (made.image != made.authentic).any(axis=2)
    assert changed.any() and not (changed & ~grown(made.masks.any(axis=0), RIM)).any() and made.masks.sum(axis=0).max() == 1
    for plane, event in zip(made.masks, made.record["events"], strict=True):
        homes = []
        for part in parts(plane):
            (inside,) = [index for index, (x0, y0, x1, y1) in enumerate(made.record["panels"]) if part[y0:y1, x0:x1].sum() == part.sum()]
            homes.append((inside, bool((part & source_part(plane, event["source_box"])).any())))
        source, copies = ({panel for panel, is_source in homes if is_source == wanted} for wanted in (True, False))
        assert len(source) == 1 and copies and (source == copies if kind == "compound_inside" else not source & copies)
        assert not {*source, *copies} & set(made.record["plots"])


@pytest.mark.parametrize("number", range(12))
def test_reused_panels_show_the_same_and_their_twin_does_not(sources, number):
    images = [load(sources[index]) for index in (number % len(sources), (number + 3) % len(sources), (number + 7) % len(sources))]
    made = compose(images, np.random.default_rng((7, number)), PLAIN, "compound_pair")
    assert made.record["hard_negative"] and made.masks.sum(axis=0).max() == 1
    for plane, event in zip(made.masks, made.record["events"], strict=True):
        (copy,), (x0, y0, x1, y1) = event["copies"], event["source_box"]
        box = np.zeros(plane.shape, np.float32)
        box[y0:y1, x0:x1] = 1
        target = cv2.warpAffine(box, np.array(copy["affine"]), plane.shape[::-1]) >= .5
        wrong = (target | (box > 0)) ^ (plane > 0)
        assert not (wrong & shrunk(plane > 0, 2)).any() and not (wrong & ~grown(plane > 0, 2)).any()
        core, differences = shrunk(target, 3), []
        for figure in (made.image, made.authentic): # letters and bars lie over both: the median does not see them
            moved = np.clip(cv2.warpAffine(figure, np.array(copy["affine"]), plane.shape[::-1], flags=cv2.INTER_LINEAR) * copy["gain"], 0, 255)
            differences.append(np.abs(moved - figure)[core].mean())
        assert differences[0] < .7 * differences[1], differences


def test_a_copy_that_changes_nothing_is_never_made():
    stripes = np.broadcast_to((np.arange(300) // 2 % 2 * 200).astype(np.uint8)[None, :, None], (240, 300, 3)).copy()
    for number in range(20): # one shift in four lays stripe on stripe
        made = forge(stripes, np.random.default_rng((9, number)), PLAIN)
        changed = np.abs(made.image.astype(int) - made.authentic).mean(axis=2)
        for plane, event in zip(made.masks, made.record["events"], strict=True):
            source = source_part(plane, event["source_box"])
            for copy in event["copies"]:
                target = cv2.warpAffine(source.astype(np.float32), np.array(copy["affine"]), plane.shape[::-1]) >= .5
                assert changed[target].mean() > 3


@pytest.mark.parametrize("number", range(6))
def test_no_panel_shows_what_another_shows_unplanned(sources, number):
    rng, images, used = np.random.default_rng(number), [load(path) for path in sources[number:number + 2]], {}
    one, two, honest = draw_pair(images, ((0, 0, 90, 80), (100, 0, 190, 80)), .5, used, rng)
    panels = [draw_panel(images, (0, 100, 90, 180), used, rng) for _ in range(6)]
    for first, second in combinations([one, two, honest, *panels], 2):
        shared = overlap(first.box, second.box) if first.source == second.source else None
        assert (shared is not None) == (first is one and second is two)


def test_reused_panel_wants_a_disjoint_twin():
    with pytest.raises(NoPlace, match="disjoint"):
        compose([np.random.default_rng(0).integers(0, 255, (12, 12, 3), np.uint8)], np.random.default_rng(0), SMALL, "compound_pair", .1)


boxes = st.tuples(*[st.integers(0, 30)] * 2, *[st.integers(1, 20)] * 2).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))


@settings(max_examples=500, deadline=None)
@given(boxes, boxes)
def test_overlap_is_the_pixels_in_both(one, other):
    frames = np.zeros((2, 60, 60), bool)
    for frame, (x0, y0, x1, y1) in zip(frames, (one, other), strict=True): frame[y0:y1, x0:x1] = True
    both, found = frames.all(axis=0), overlap(one, other)
    if found is None: assert not both.any()
    else: assert both[found[1]:found[3], found[0]:found[2]].all() and both.sum() == (found[2] - found[0]) * (found[3] - found[1])


# laws

def test_figures_follow_the_laws(sources):
    config = SynthConfig(longest_max=300)
    made = [draw_figure(sources, 2, number, config, load) for number in range(150)]
    level = np.interp(np.log([forgery.area for forgery in made]), np.log(config.area), (.05, .25, .5, .75, .95))
    assert abs(level.mean() - .5) < .06 and all(abs(np.mean(level < bound) - bound) < .1 for bound in (.25, .5, .75))
    count = np.array([len(forgery.masks) for forgery in made])
    assert .58 < np.mean(count == 1) < .8 and np.mean(count <= 3) > .97
    kinds = [forgery.record["kind"] for forgery in made]
    assert all(abs(kinds.count(kind) / len(kinds) - share) < .1 for kind, share in zip(KINDS, config.kinds, strict=True))
    moves = {copy["move"] for forgery in made for event in forgery.record["events"] for copy in event["copies"]}
    shapes = {event["shape"] for forgery in made for event in forgery.record["events"]}
    assert moves == {"translation", "rotation", "mirror", "scale", "combination", "panel"}
    assert shapes == {"object", "cluster", "polygon", "ellipse", "rectangle", "panel"}
    assert max(forgery.record["attempts"] for forgery in made) <= 3
    assert all(json.loads(json.dumps(forgery.record)) == forgery.record for forgery in made), "records hold plain values"


def test_sizes_follow_the_law():
    rng, config = np.random.default_rng(0), SynthConfig()
    shapes = np.array([draw_shape(rng, config) for _ in range(4000)])
    assert shapes.min() >= 64 and shapes.max() <= 3888
    assert .28e6 < np.median(shapes.prod(axis=1)) < .38e6
    assert max(shapes.max(axis=1) / shapes.min(axis=1)) < 19


@pytest.mark.parametrize("make", [lambda images, rng, config: forge(images[0], rng, config), compose])
def test_a_strip_of_3888_pixels(sources, make):
    config = SynthConfig(longest_min=3888, aspect_min=18, post=1)
    made = make([load(path) for path in sources[:4]], np.random.default_rng(1), config)
    height, width = sorted(made.image.shape[:2])
    assert width == 3888 and width / height >= 16 and made.masks.any()


def test_twins_go_through_the_same_mill(sources):
    seen = set()
    for number in range(30):
        made = forge(load(sources[number % len(sources)]), np.random.default_rng((8, number)), SynthConfig(longest_max=300, post=2))
        seen |= set(made.record["post"])
        assert made.image.shape == made.authentic.shape == (*made.masks.shape[1:], 3) and max(made.image.shape) <= 300
        assert set(np.unique(made.masks)) == {0, 1} and all(plane.any() for plane in made.masks) and made.masks.sum(axis=0).max() == 1
        far = ~grown(made.masks.any(axis=0), RIM + 24) # blur and the blocks of JPEG carry a change so far
        assert np.array_equal(made.image[far], made.authentic[far])
        for plane, event in zip(made.masks, made.record["events"], strict=True):
            assert len(parts(plane)) >= 1 + len(event["copies"]), "source and copies ran together"
            source = source_part(plane, np.array(event["source_box"]) + (-1, -1, 1, 1))
            for copy in event["copies"]: # recorded transforms are of the finished figure
                target = cv2.warpAffine(source.astype(np.float32), np.array(copy["affine"]), plane.shape[::-1]) >= .5
                assert np.mean(plane[target]) > .7
    assert seen == {"resize", "blur", "noise", "jpeg"}


# trees

def test_the_same_seed_makes_the_same_bytes(sources, tmp_path):
    for name, n, seed in (("one", 6, 3), ("again", 6, 3), ("more", 9, 3), ("other", 6, 4)):
        make_tree("skimage", tmp_path / name, n, seed=seed, config=SMALL)
    one, again, more, other = (digests(tmp_path / name) for name in ("one", "again", "more", "other"))
    assert one == again
    kept = [path for path in one if path.startswith("train_")]
    assert kept and all(more[path] == one[path] for path in kept), "a figure depends on how many others there are"
    assert all(other[path] != one[path] for path in set(kept) & set(other))


@pytest.fixture(scope="module")
def tree(sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("synth") / "tree"
    return folder, make_tree("skimage", folder, 24, seed=0, config=SynthConfig(longest_max=300, modes=(1, 1, 1), leak=.5, test=.25))


def test_a_tree_has_the_competition_s_layout(tree):
    folder, summary = tree
    cases = pd.read_csv(folder / "cases.csv")
    assert (summary["train"], summary["test"]) == (18, 6) and sum(summary["kinds"].values()) == 24
    assert sorted(path.name for path in folder.iterdir()) == ["cases.csv", "sample_submission.csv", "solution.csv", "test_images",
                                                             "train_images", "train_masks"]
    for _, case in cases[cases["split"] == "train"].iterrows():
        images = [Image.open(folder / "train_images" / twin / f"{case['case_id']}.png") for twin in ("authentic", "forged")]
        masks = np.load(folder / "train_masks" / f"{case['case_id']}.npy")
        assert [image.mode for image in images] == [case["mode"], case["forged_mode"]]
        assert images[0].size == images[1].size == (case["width"], case["height"]) == masks.shape[:0:-1]
        assert masks.dtype == np.uint8 and len(masks) == case["events"] == len(json.loads(case["transforms"])) and set(np.unique(masks)) == {0, 1}
        assert abs(masks.any(axis=0).mean() - case["area"]) < 1e-6
    assert set(cases["mode"]) == {"RGB", "RGBA", "L"}
    leaks = cases["mode"] != cases["forged_mode"]
    assert leaks.any() and set(cases["mode"][leaks]) == {"RGBA"} and set(cases["forged_mode"][leaks]) == {"RGB"}


def test_test_figures_are_numbered_blindly_and_answered_by_the_solution(tree):
    folder, _ = tree
    cases, solution, sample = (pd.read_csv(folder / name) for name in ("cases.csv", "solution.csv", "sample_submission.csv"))
    assert list(sample.columns) == ["case_id", "annotation"] and set(sample["annotation"]) == {"authentic"}
    assert list(sample["case_id"]) == list(solution["case_id"]) == sorted(int(path.stem) for path in (folder / "test_images").iterdir())
    answers = solution.set_index("case_id")
    for _, case in cases[cases["split"] == "test"].iterrows():
        forged, authentic = answers.loc[case["test_forged"]], answers.loc[case["test_authentic"]]
        assert authentic["annotation"] == "authentic" and forged["shape"] == authentic["shape"] == f"[{case['height']}, {case['width']}]"
        masks = decode(forged["annotation"], json.loads(forged["shape"]))
        twins = [load_image(folder / "test_images" / f"{int(case[key])}.png").astype(int) for key in ("test_forged", "test_authentic")]
        assert len(masks) == case["events"] and abs(masks.any(axis=0).mean() - case["area"]) < 1e-6
        difference = np.abs(twins[0] - twins[1]).sum(axis=2)
        assert difference[masks.any(axis=0)].mean() > difference[~masks.any(axis=0)].mean()


def test_test_figures_come_from_other_sources(tree):
    cases = pd.read_csv(tree[0] / "cases.csv")
    used = {split: {name for files in rows["source_files"] for name in files.split(";")} for split, rows in cases.groupby("split")}
    assert not used["train"] & used["test"] and list(cases["source_group"]) == list(cases["split"])


def test_few_sources_are_shared_and_said_to_be(sources, tmp_path):
    make_tree(sources[:3], tmp_path, 3, config=SMALL) # the folder exists and is empty: that is fine
    assert set(pd.read_csv(tmp_path / "cases.csv")["source_group"]) == {"shared"}
    assert share_sources(sources, 0, SynthConfig(test=0))["train"] == sources
    assert share_sources(sources, 0, SynthConfig(test=1))["test"] == sources


# refusals

def test_a_folder_with_anything_in_it_is_refused(sources, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(BadTree, match="not an empty folder"): make_tree("skimage", tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_sources_that_show_nothing_are_refused_and_leave_nothing(tmp_path):
    (tmp_path / "flat").mkdir()
    for name in "ab": Image.fromarray(np.full((200, 200, 3), 90, np.uint8)).save(tmp_path / "flat" / f"{name}.png")
    with pytest.raises(NoPlace, match="figure 0"): make_tree(tmp_path / "flat", tmp_path / "out", 1, config=SMALL)
    assert not list((tmp_path / "out").iterdir())


def test_a_damaged_source_is_named(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "broken.png").write_bytes(b"no image")
    with pytest.raises(BadImage, match="broken.png"): make_tree(tmp_path / "in", tmp_path / "out", 1)
    with pytest.raises(BadImage): make_tree(tmp_path / "nowhere", tmp_path / "out", 1)


def test_without_scikit_image_the_remedy_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(BadConfig, match=r"pip install 'recodai_forgery\[demo\]'"): find_sources("skimage")


@pytest.mark.parametrize("options", [
    {"kinds": (1, 1, 1)}, {"kinds": (0, 0, 0, 0)}, {"area": (.1, .05, .2, .3, .35)}, {"area": (.1, .1, .2, .3, .5)}, {"area": (0, .1, .2, .3, .35)},
    {"events": ()}, {"longest_min": 10}, {"longest_min": 500, "longest_max": 400}, {"aspect_min": .5}, {"modes": (1, 0, -1)}, {"leak": 2},
    {"post": -1}, {"test": 1.5}])
def test_options_out_of_bounds_are_refused(options):
    with pytest.raises(BadConfig, match=f"SynthConfig.({'|'.join(options)})"): SynthConfig(**options)


def test_options_survive_json():
    assert config_from_json(SynthConfig, config_to_json(SMALL)) == SMALL


@pytest.mark.slow
def test_real_figures_are_forged_without_a_failure(shared):
    paths = find_sources(shared / "figures")
    attempts = [draw_figure(paths, 9, number, SynthConfig(longest_max=1000)).record["attempts"] for number in range(60)]
    assert max(attempts) <= 5 and np.mean(np.array(attempts) == 1) > .9
