"""A tree broken in every way, properties of splits, masks and batches, and workers. The stories are in nbs/04_cases.ipynb and nbs/04_data.ipynb."""
import gc
import json
import pickle
import shutil
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from scipy import ndimage

from recodai_forgery import data
from recodai_forgery.cases import (
    FOLDERS,
    audit,
    components,
    fold_cases,
    format_audit,
    index_tree,
    read_masks,
    split_cases,
    with_groups,
)
from recodai_forgery.data import AspectBatchSampler, ForgeryDataset, Reading, make_loader, resize_region
from recodai_forgery.image import fit_size
from recodai_forgery.types import BadConfig, BadImage, BadMask, BadTree, Case, Region, tight_box

SHAPES = [(40, 60), (70, 30), (50, 50)]


def build(root, n=6):
    "A tree of n twins and two supplemental figures: dark squares on noise, one plane an event, two squares a plane."
    rng = np.random.default_rng(0)
    for name in "train_images/authentic", "train_images/forged", "train_masks", "supplemental_images", "supplemental_masks":
        (root / name).mkdir(parents=True)
    for number in range(n + 2):
        shape, train = SHAPES[number % 3], number < n
        picture, masks = rng.integers(200, 256, (*shape, 3), dtype=np.uint8), np.zeros((1 + number % 2, *shape), np.uint8)
        for event, mask in enumerate(masks): mask[2:12, 2 + 14 * event:12 + 14 * event] = mask[-12:-2, 2 + 14 * event:12 + 14 * event] = 1
        if train: Image.fromarray(picture).save(root / f"train_images/authentic/{number}.png")
        picture[masks.any(axis=0)] = 20
        Image.fromarray(picture).save(root / ("train_images/forged" if train else "supplemental_images") / f"{number}.png")
        np.save(root / ("train_masks" if train else "supplemental_masks") / f"{number}.npy", masks)
    return root


@pytest.fixture(scope="session")
def built(tmp_path_factory): return build(tmp_path_factory.mktemp("data") / "tree")


@pytest.fixture
def tree(built, tmp_path): return Path(shutil.copytree(built, tmp_path / "tree"))


def resave(change): return lambda path: np.save(path, change(np.load(path)))


def cut(path): path.write_bytes(path.read_bytes()[:-30])


MASK, FIGURE = "train_masks/3.npy", "train_images/forged/3.png"
BREAKS = { # what is done, to which file, which file is blamed, the cause
    "orphan mask": (lambda path: path.unlink(), FIGURE, MASK, "mask of no figure"),
    "orphan figure": (lambda path: path.unlink(), MASK, FIGURE, "has no mask"),
    "other shape": (resave(lambda m: m[:, :-1]), MASK, MASK, "its figure has"),
    "two dimensions": (resave(lambda m: m[0]), MASK, MASK, "without the axis of events"),
    "four dimensions": (resave(lambda m: m[None]), MASK, MASK, "has shape"),
    "bool": (resave(lambda m: m > 0), MASK, MASK, "holds bool"),
    "float": (resave(lambda m: m.astype(float)), MASK, MASK, "holds float64"),
    "0 and 255": (resave(lambda m: m * 255), MASK, MASK, "value 255"),
    "labels": (resave(lambda m: m * np.array([1, 2], np.uint8)[:, None, None]), MASK, MASK, "plane 1 holds the value 2"),
    "empty plane": (resave(lambda m: m * np.array([1, 0], np.uint8)[:, None, None]), MASK, MASK, "plane 1 is empty"),
    "no plane": (resave(lambda m: m[:0]), MASK, MASK, "has shape (0"),
    "objects": (lambda path: np.save(path, np.array([{}, 1], object)), MASK, MASK, "cannot be read"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps(1)), MASK, MASK, "cannot be read"),
    "archive": (lambda path: path.write_bytes(b"PK\3\4 no archive either"), MASK, MASK, "cannot be read"),
    "mask cut": (cut, MASK, MASK, "cannot be read"),
    "mask empty": (lambda path: path.write_bytes(b""), MASK, MASK, "cannot be read"),
    "figure cut": (cut, FIGURE, FIGURE, "cannot be read"),
    "figure empty": (lambda path: path.write_bytes(b""), FIGURE, FIGURE, "is empty"),
    "figure is text": (lambda path: path.write_text("forged"), FIGURE, FIGURE, "not an image"),
    "authentic cut": (cut, "train_images/authentic/3.png", "train_images/authentic/3.png", "cannot be read"),
    "broken link": (lambda path: (path.unlink(), path.symlink_to("nowhere.png")), FIGURE, FIGURE, "does not exist"),
    "no masks folder": (shutil.rmtree, "supplemental_masks", "supplemental_masks", "is missing"),
    "no figures folder": (shutil.rmtree, "supplemental_images", "supplemental_images", "is missing"),
    "other file": (lambda path: path.write_text("x"), "train_images/authentic/Thumbs.db", "train_images/authentic/Thumbs.db", "is none of"),
    "folder": (lambda path: path.mkdir(), "train_images/authentic/9.png", "train_images/authentic/9.png", "is none of"),
    "other mask file": (lambda path: path.write_text("x"), "train_masks/3.png", "train_masks/3.png", "is none of .npy"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_one_fault_names_its_file_and_spares_the_others(tree, name):
    before = index_tree(tree)
    assert before.faults == () and len(before.cases) == 14
    change, target, blamed, cause = BREAKS[name]
    change(tree / target)
    after = index_tree(tree)
    assert [fault.path for fault in after.faults] == [tree / blamed] and cause in after.faults[0].cause and after.faults[0].remedy
    lost = {case.key for case in before.cases} - {case.key for case in after.cases}
    new = name in ("other file", "folder", "other mask file")
    assert lost == (set() if new else {("supplemental", "6"), ("supplemental", "7")} if "folder" in name else
                    {("authentic" if "authentic" in name else "forged", "3")})
    with pytest.raises(BadTree, match="1 faults"): index_tree(tree, strict=True)
    assert str(after.faults[0]) in format_audit(audit(after))


def test_one_id_twice_in_a_folder_is_refused_but_not_in_two_splits(tree):
    shutil.copy(tree / "supplemental_images/6.png", tree / "train_images/authentic/6.png") # the id of a supplemental figure
    Image.open(tree / FIGURE).save(tree / "train_images/forged/3.jpg")
    found = index_tree(tree)
    assert [fault.path.name for fault in found.faults] == ["3.jpg", "3.png"] and all("id 3" in fault.cause for fault in found.faults)
    assert ("forged", "3") not in {case.key for case in found.cases} and audit(found)["ids_in_two_splits"] == ["6"]


def test_forged_area_counts_a_pixel_once(tree):
    before = audit(index_tree(tree))
    resave(lambda masks: np.concatenate([masks, masks]))(tree / MASK) # the same events once more
    after = audit(index_tree(tree))
    assert after["forged_area_percent"] == before["forged_area_percent"] and after["planes"] != before["planes"]


def test_all_faults_come_at_once(tree):
    for name in "orphan mask", "authentic cut", "other file": BREAKS[name][0](tree / BREAKS[name][1])
    np.save(tree / "train_masks/1.npy", np.zeros((1, 3, 3)))
    with pytest.raises(BadTree) as problem: index_tree(tree, strict=True)
    for name in "3.npy", "authentic/3.png", "Thumbs.db", "1.npy": assert name in str(problem.value)


def test_any_part_of_a_tree_will_do(tree):
    for split, folders in FOLDERS.items():
        part = tree.parent / split
        for name in filter(None, folders):
            if (tree / name).is_dir(): shutil.copytree(tree / name, part / name)
        if split == "test": shutil.copytree(tree / "supplemental_images", part / "test_images")
        found = index_tree(str(part), strict=True)
        assert {case.split for case in found.cases} == {split}
        json.dumps(audit(found)); format_audit(audit(found))
    for hidden in ".DS_Store", "._3.png": (tree / "train_images/forged" / hidden).write_text("x")
    assert index_tree(tree).faults == ()
    (tree / "bare/test_images").mkdir(parents=True)
    assert "holds no figure" in index_tree(tree / "bare").faults[0].cause
    for nothing in tree / "train_masks", tree / "nowhere":
        with pytest.raises(BadTree, match="no part"): index_tree(nothing)


def test_index_decodes_no_figure(built, monkeypatch):
    def decode(*_): raise AssertionError("decoded")
    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    audit(index_tree(built))
    with pytest.raises(AssertionError, match="decoded"): ForgeryDataset(index_tree(built).cases)[0] # the trap works


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 140), st.integers(0, 255)), min_size=1, max_size=5), length=st.integers(0, 300))
@pytest.mark.filterwarnings("ignore")
def test_damaged_mask_files_are_refused_or_sound(tmp_path, changes, length):
    path = tmp_path / "mask.npy"
    np.save(path, np.ones((2, 5, 7), np.uint8))
    damaged = bytearray(path.read_bytes())
    for place, value in changes: damaged[place] = value
    path.write_bytes(damaged[:length])
    try: masks = read_masks(path)
    except BadMask as problem: assert str(path) in str(problem)
    else: assert masks.ndim == 3 and masks.dtype == np.uint8 and set(np.unique(masks)) <= {0, 1}


def test_a_tree_is_looked_at_without_torch():
    code = "import sys; sys.modules['torch'] = sys.modules['torchvision'] = None; import recodai_forgery.cases"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- the split

CASES = st.builds(
    lambda events, authentic: [Case(split, str(number), Path("x.png"), Path("x.npy") if planes else None, (9, 9), events=planes)
                               for number, count in enumerate(events)
                               for split, planes in ([("forged", count)] + [("authentic", 0)] * authentic[number % len(authentic)])],
    st.lists(st.integers(1, 5), min_size=12, max_size=150), st.lists(st.integers(0, 1), min_size=1, max_size=20))


@settings(max_examples=150, deadline=None)
@given(CASES, st.sampled_from([.1, .2, .25, .5]), st.integers(0, 1000), st.randoms(use_true_random=False))
def test_split_tears_no_group_and_keeps_the_proportions(cases, fraction, seed, random):
    try: train, validation = split_cases(cases, fraction, seed)
    except BadConfig: assert fraction * len(cases) < 2; return
    assert sorted(train + validation, key=lambda case: case.key) == sorted(cases, key=lambda case: case.key)
    assert not {case.group for case in train} & {case.group for case in validation}
    for kind in "authentic", "forged":
        wanted = fraction * sum(case.split == kind for case in cases)
        assert abs(sum(case.split == kind for case in validation) - wanted) <= 2
    shuffled = list(cases); random.shuffle(shuffled)
    assert {case.key for case in split_cases(shuffled, fraction, seed)[1]} == {case.key for case in validation}


@settings(max_examples=80, deadline=None)
@given(CASES, st.integers(2, 6), st.integers(0, 1000))
def test_folds_hold_out_every_case_once(cases, k, seed):
    folds = fold_cases(cases, k, seed)
    assert Counter(case.key for _, held_out in folds for case in held_out) == Counter(case.key for case in cases)
    for train, held_out in folds:
        assert len(train) + len(held_out) == len(cases) and not {case.group for case in train} & {case.group for case in held_out}
        assert abs(len(held_out) - len(cases) / k) <= 4


def test_split_by_source_and_what_it_refuses():
    cases = [Case("forged", str(i), Path("x.png"), Path("x.npy"), (9, 9), events=1) for i in range(40)]
    sources = {str(i): f"slide {i % 8}" for i in range(40)}
    train, validation = split_cases(with_groups(cases, sources), .25)
    assert len(validation) == 10 and len({sources[case.case_id] for case in validation}) == 2
    assert not {sources[case.case_id] for case in train} & {sources[case.case_id] for case in validation}
    assert cases[0].group == "0" # the cases that were passed stay as they are
    test = [Case("test", "99", Path("x.png"), None, (9, 9))]
    assert all(case.split == "forged" for side in split_cases(cases + test) for case in side)
    for wrong in (lambda: split_cases(cases, 0), lambda: split_cases(cases, 1.), lambda: split_cases(cases[:2], .2),
                  lambda: split_cases(test), lambda: fold_cases(cases, 1), lambda: fold_cases(cases[:3], 5),
                  lambda: with_groups(cases, {"1": "a"})):
        with pytest.raises(BadConfig): wrong()


# ---- masks

@settings(max_examples=200, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_resized_regions_are_area_means_that_never_vanish(height, width, longest, seed):
    rng = np.random.default_rng(seed)
    mask = cv2.GaussianBlur(rng.random((height, width)), (0, 0), 2) > rng.uniform(.45, .55)
    mask[rng.integers(height), rng.integers(width)] = True
    shape, region = fit_size((height, width), longest), Region.from_mask(mask)
    small = resize_region(region, mask.shape, shape).full_mask(shape) # raises where it leaves the frame
    if max(shape) > max(mask.shape): return # on the way up INTER_AREA is another thing in OpenCV
    covered = cv2.resize(mask.astype(np.float32), shape[::-1], interpolation=cv2.INTER_AREA)
    level = min(.5, covered.max() / 2)
    clear = np.abs(covered - level) > 1e-4
    assert (small == (covered >= level))[clear].all()


def test_single_pixels_survive_everywhere():
    for y, x in np.random.default_rng(0).integers(0, 3000, (300, 2)).tolist():
        region = Region((x, y, x + 1, y + 1), np.ones((1, 1), bool))
        small = resize_region(region, (3000, 3000), (256, 256))
        assert abs((small.box[0] + small.box[2]) / 2 - (x + .5) * 256 / 3000) <= 1 and small.area <= 4


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40), st.integers(0, 3))
def test_components_are_scipys(seed, height, width, planes):
    masks = (np.random.default_rng(seed).random((planes, height, width)) < .35).astype(np.uint8)
    rebuilt, count = np.zeros_like(masks), Counter()
    for event, region in components(masks):
        rebuilt[event] += region.full_mask((height, width)); count[event] += 1
        assert tight_box(region.full_mask((height, width))) == region.box
    assert np.array_equal(rebuilt, masks) # every pixel in exactly one piece
    assert all(count[event] == ndimage.label(plane, np.ones((3, 3)))[1] for event, plane in enumerate(masks))


# ---- the dataset

def equal(first, second):
    (image, target), (other, other_target) = first, second
    if not torch.equal(image, other) or target.keys() != other_target.keys(): return False
    return all(torch.equal(target[k], other_target[k]) for k in target)


@pytest.mark.parametrize("size", [32, 64, 97])
def test_masks_follow_their_figure_through_augmentation(built, size):
    dataset = ForgeryDataset(index_tree(built).cases, size, augment=True, seed=3)
    shapes = set()
    for epoch in range(6):
        dataset.set_epoch(epoch)
        for index, case in enumerate(dataset.cases):
            image, target = dataset[index]
            shapes.add((case.case_id, image.shape[1] > image.shape[2]))
            assert image.dtype == torch.float32 and image.is_contiguous() and type(image) is torch.Tensor and max(image.shape) <= size
            assert len(target["boxes"]) == len(target["masks"]) == 2 * case.events and target["original_shape"].tolist() == list(case.shape)
            marked = target["masks"].numpy().any(axis=0).astype(np.uint8) if case.events else np.zeros(image.shape[1:], np.uint8)
            grey, kernel = image.mean(dim=0).numpy(), np.ones((3, 3), np.uint8)
            inside = cv2.erode(marked, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0) > 0
            outside = cv2.dilate(marked, kernel) == 0
            assert grey[outside].min() > .45 and (not case.events or grey[inside].max() < .3)
            for box, mask, area in zip(target["boxes"].tolist(), target["masks"], target["area"].tolist(), strict=True):
                assert tuple(box) == tight_box(mask.numpy()) and area == mask.sum() and box[0] < box[2] and box[1] < box[3]
    assert {case_id for case_id, tall in shapes if tall} & {case_id for case_id, tall in shapes if not tall} # quarter turns happen


def test_plain_items_keep_size_and_order(built):
    dataset = ForgeryDataset(index_tree(built).cases, 64)
    for index, case in enumerate(dataset.cases):
        image, target = dataset[index]
        assert max(image.shape[1:]) == 64 and target["image_id"].item() == index and target["image_id"].dtype == torch.int64
        assert target["event"].tolist() == [event for event in range(case.events) for _ in range(2)]
    assert equal(dataset[-1], dataset[len(dataset) - 1])
    with pytest.raises(IndexError): dataset[len(dataset)]


def test_draws_depend_on_seed_epoch_and_index_alone(built):
    cases = index_tree(built).cases
    first, other = ForgeryDataset(cases, 48, True, seed=1), ForgeryDataset(cases, 48, True, seed=2)
    torch.manual_seed(0); before = torch.get_rng_state()
    items = [first[index] for index in range(len(first))]
    assert torch.equal(before, torch.get_rng_state()) # nobody else's generator was touched
    torch.manual_seed(5)
    for index in reversed(range(len(first))): assert equal(first[index], items[index])
    assert not any(equal(other[index], items[index]) for index in range(len(other)))
    first.set_epoch(1)
    assert not any(equal(first[index], items[index]) for index in range(len(first)))
    first.set_epoch(0)
    assert equal(first[3], items[3])


def test_nothing_is_read_before_it_is_asked_for(built, monkeypatch):
    absent = [Case("authentic", str(i), Path(f"nowhere/{i}.png"), None, (100, 100)) for i in range(500)]
    assert len(make_loader(ForgeryDataset(absent), 4, shuffle=True)) == 125 # neither set nor loader touches a file
    with pytest.raises(BadImage, match="nowhere"): ForgeryDataset(absent)[7]
    asked = []
    monkeypatch.setattr(data, "load_image", lambda path: (asked.append(path), np.zeros((40, 60, 3), np.uint8))[1])
    dataset = ForgeryDataset([case for case in index_tree(built).cases if case.shape == (40, 60)], 32)
    dataset[2]; dataset[0]
    assert asked == [dataset.cases[2].image, dataset.cases[0].image]


class Squares(ForgeryDataset):
    "White figures with a black square, whatever the tree holds."
    def read(self, index):
        masks = np.zeros((1, 80, 100), np.uint8)
        masks[0, 20:60, 30:70] = 1
        image = np.repeat(255 * (1 - masks[0])[..., None], 3, axis=2)
        return Reading(image, masks, .5, True, torch.Generator().manual_seed(index), {"square": torch.tensor(True)})


def test_another_reading_goes_the_same_way(built):
    "Scale, turn, draws and entries of the target are those of the reading; size, masks and boxes follow."
    for augment, shape in ((False, (40, 50)), (True, (50, 40))):
        image, target = Squares(index_tree(built).cases, 100, augment)[3]
        assert image.shape[1:] == target["masks"].shape[1:] == shape and target["square"] and target["image_id"] == 3
        assert target["original_shape"].tolist() == [80, 100] and target["area"].item() == 400
        assert (image[0][target["masks"][0] == 1] < .5).all()
    assert equal(Squares(index_tree(built).cases, 100, True)[3], (image, target))


def live_tensors(): return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_nothing_that_was_read_is_kept(built):
    cases = [case for case in index_tree(built).cases if case.mask]
    dataset = ForgeryDataset(cases * 4, 160, augment=True)
    for index in range(len(cases)): dataset[index] # caches of libraries fill
    state, tensors = len(pickle.dumps(dataset)), live_tensors()
    tracemalloc.start()
    try:
        dataset[0]; before = tracemalloc.get_traced_memory()[0]
        for index in range(len(dataset)): dataset[index]
        grown = tracemalloc.get_traced_memory()[0] - before
    finally: tracemalloc.stop()
    assert len(pickle.dumps(dataset)) == state and live_tensors() == tensors
    assert grown < 200_000, grown # the 32 figures that were read hold 1,200,000 bytes decoded


def test_cases_without_truth_and_changed_files_are_refused(tree):
    cases = index_tree(tree).cases
    for wrong in Case("test", "1", Path("x.png"), None, (9, 9)), Case("forged", "1", Path("x.png"), None, (9, 9)):
        with pytest.raises(BadConfig, match="no truth"): ForgeryDataset([*cases, wrong])
    dataset = ForgeryDataset([case for case in cases if case.key == ("forged", "3")], 32)
    Image.new("RGB", (33, 44)).save(tree / FIGURE)
    with pytest.raises(BadMask, match="its figure has"): dataset[0]


# ---- batches and workers

@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4000), st.integers(1, 4000)), max_size=90), st.integers(1, 9), st.booleans(),
       st.integers(0, 99), st.integers(0, 9))
def test_every_index_comes_once_an_epoch(shapes, size, shuffle, seed, epoch):
    sampler = AspectBatchSampler(shapes, size, shuffle, seed)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert sorted(index for batch in batches for index in batch) == list(range(len(shapes))) and len(batches) == len(sampler)
    assert sum(len(batch) < size for batch in batches) <= 1
    assert batches == AspectBatchSampler(shapes, size, shuffle, seed).batches() or epoch > 0
    for start in range(len(batches) + 1):
        sampler.set_epoch(epoch, start)
        assert list(sampler) == batches[start:] and len(sampler) == len(batches) - start
    if not shuffle: assert [index for batch in batches for index in batch] == list(range(len(shapes)))


def test_batches_hold_like_shapes_and_change_with_seed_and_epoch():
    rng = np.random.default_rng(0)
    shapes = [(100, int(width)) for width in 100 * 2 ** rng.uniform(-3, 3, 600)]
    sampler = AspectBatchSampler(shapes, 6, seed=0)
    spread = [np.ptp([data.aspect_bin(shapes[index]) for index in batch]) for batch in sampler]
    assert np.mean(np.array(spread) == 0) > .85 and max(spread) <= 1
    first = sampler.batches()
    sampler.set_epoch(1)
    assert sampler.batches() != first != AspectBatchSampler(shapes, 6, seed=1).batches()


@pytest.mark.parametrize("start,workers", [("fork", 2), pytest.param("spawn", 1, marks=pytest.mark.slow)])
def test_workers_change_nothing_and_see_the_epoch(built, start, workers):
    dataset = ForgeryDataset(index_tree(built).cases, 48, augment=True, seed=4)
    alone, helped = make_loader(dataset, 3, True, workers=0, seed=7), make_loader(dataset, 3, True, workers=workers, seed=7)
    helped.multiprocessing_context = start
    epochs = []
    for epoch in range(2): # the workers of the first epoch live on
        for loader in alone, helped: loader.batch_sampler.set_epoch(epoch)
        dataset.set_epoch(epoch)
        ours, theirs = list(alone), list(helped)
        assert len(ours) == len(theirs) == 5
        for (images, targets), (others, other_targets) in zip(ours, theirs, strict=True):
            assert len(images) == len(others)
            assert all(map(equal, zip(images, targets, strict=True), zip(others, other_targets, strict=True)))
        epochs.append([target["image_id"].item() for _, targets in ours for target in targets])
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(14)) and epochs[0] != epochs[1]


# ---- the benchmark

def test_audit_gives_the_table_of_the_bench(shared):
    tree = index_tree(shared / "bench/dev", strict=True)
    report = audit(tree)
    assert report["figures"] == {"authentic": 120, "forged": 120, "supplemental": 0, "test": 0} and report["twins"] == 120
    assert report["planes"] == {1: 78, 2: 34, 3: 8} and report["modes"] == {"RGB": 166, "RGBA": 60, "L": 14}
    area = [report["forged_area_percent"][name] for name in ("5%", "25%", "50%", "75%", "95%")]
    assert np.allclose(area, [.27, 1.07, 3.84, 9.29, 20.4], rtol=.01)
    assert (report["side_px"]["min"], report["side_px"]["max"]) == (115, 2297) and round(report["aspect"]["max"], 1) == 5.9
    assert report["ids_in_two_splits"] == [] and report["twins_with_alpha_on_one_side"] == 0
    train, validation = split_cases(tree.cases)
    assert len(validation) in range(46, 51) and {case.events for case in validation} == {0, 1, 2, 3}


def test_no_piece_of_the_bench_is_lost_at_training_size(shared):
    cases = [case for case in index_tree(shared / "bench/dev").cases if case.mask][::6]
    dataset = ForgeryDataset(cases, 256)
    for index, case in enumerate(cases):
        image, target = dataset[index]
        assert len(target["boxes"]) == len(components(read_masks(case.mask))) and target["event"].max() == case.events - 1
        assert image.shape[1:] == target["masks"].shape[1:]


def test_bench_as_a_test_folder(shared, tmp_path):
    subprocess.run([sys.executable, str(shared / "bench/link_test_images.py"), str(tmp_path)], check=True, capture_output=True)
    tree = index_tree(tmp_path, strict=True)
    assert [case.case_id for case in tree.cases] == [str(number) for number in range(1, 241)]
    assert all(case.forged is None and case.mask is None for case in tree.cases)
    assert "none" in format_audit(audit(tree))
