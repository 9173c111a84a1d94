"""The network that looks at source and copy together: what it is shown, what it keeps to, what the package's own one knows."""
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

import recodai_forgery.crosscheck as room
from recodai_forgery.align import MatchConfig, Planes
from recodai_forgery.check import Overlap
from recodai_forgery.crosscheck import (
    LARGEST,
    SIDE,
    VIEW,
    CrossCheck,
    Examples,
    crosscheck,
    crosscheck_loss,
    draw_mask,
    load_crosscheck,
    save_crosscheck,
    see,
    train_crosscheck,
    truth_of,
    window_around,
)
from recodai_forgery.evidence import find_candidates
from recodai_forgery.gate import trace
from recodai_forgery.match import find_decision, packaged_crosscheck, sources
from recodai_forgery.predict import Detector
from recodai_forgery.types import BadCheckpoint, BadConfig, Region

CONFIG = MatchConfig(budget=120)


def page(seed=0, size=(220, 300)):
    "A textured picture."
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 1.5)

def disc(shape, centre, radius):
    y, x = np.mgrid[:shape[0], :shape[1]]
    return (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius ** 2

def planted(radius=14, shift=(130, 90), seed=0):
    "A picture with a disc copied: its planes, map, mask of the source."
    image = page(seed)
    source = disc(image.shape[:2], (60, 60), radius)
    y, x = np.nonzero(source)
    image[y + shift[1], x + shift[0]] = image[y, x]
    return image, np.array([[1., 0, shift[0]], [0, 1, shift[1]]]), source

def overlap_of(mask, affine, grown=0):
    "A region as the dense check might have found it."
    box = cv2.boundingRect(mask.astype(np.uint8))
    x, y, w, h = (box[0] - 8, box[1] - 8, box[2] + 16, box[3] + 16)
    found = cv2.dilate(mask.astype(np.uint8), cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * grown + 1,) * 2)) > 0
    return Overlap(affine, (x, y, x + w, y + h), found[y:y + h, x:x + w])


@pytest.mark.parametrize("colour", [0, 17, 255])
def test_views_of_flat_figures_are_finite(colour):
    planes = Planes(np.full((90, 120, 3), colour, np.uint8), np.inf)
    view = see(planes, overlap_of(disc((90, 120), (40, 40), 9), np.array([[1., 0, 50], [0, 1, 20]])))
    assert np.isfinite(view.planes).all() and view.planes.shape == (len(VIEW), SIDE, SIDE)

def test_what_lies_beyond_the_figure_is_told_as_such():
    image, affine, _ = planted()
    planes = Planes(image, np.inf)
    mask = disc(planes.shape, (9, 9), 8)
    view = see(planes, Overlap(affine, (0, 0, 20, 20), mask[:20, :20]))
    x0, y0, *_ = view.window
    assert x0 < 0 and y0 < 0
    beyond = view.planes[:, :2, :2]
    assert (beyond == 0).all() and view.planes[-1].max() == 1

def test_an_exact_copy_leaves_nothing_and_looks_alike():
    image, affine, source = planted()
    view = see(Planes(image, np.inf), overlap_of(source, affine)).planes
    heart = view[VIEW.index("distance")] > .9 # more than five pixels inside: windows of nine see nothing else
    assert view[VIEW.index("likeness")][heart].min() > .9 and view[VIEW.index("miss")][heart].max() < 0

def test_truth_and_window_go_together():
    image, affine, source = planted()
    overlap = overlap_of(source, affine)
    view, planes = see(Planes(image, np.inf), overlap), Planes(image, np.inf)
    truth = truth_of(Region.from_mask(source), view.window, planes.shape)
    assert np.abs(truth - view.planes[VIEW.index("found")]).mean() < .01 and truth.max() == 1
    assert not truth_of(None, view.window, planes.shape).any()

@pytest.mark.parametrize("box, longest", [((50, 50, 60, 55), 32), ((0, 0, 100, 20), 140), ((10, 10, 40, 50), 60)])
def test_windows_are_squares_around_their_box(box, longest):
    x0, y0, x1, y1 = window_around(box)
    assert x1 - x0 == y1 - y0 == longest and x0 <= box[0] and y0 <= box[1] and x1 >= box[2] and y1 >= box[3]


def random_examples(count=16, true=.5):
    rng = np.random.default_rng(0)
    return Examples(rng.normal(0, 1, (count, len(VIEW), SIDE, SIDE)).astype(np.float16), (rng.random((count, SIDE, SIDE)) > .7).astype(np.float16),
                    np.arange(count) < true * count)

def test_the_loss_is_finite_without_true_examples_and_reaches_every_weight_with_them():
    net, examples = CrossCheck(), random_examples()
    views, truths, copied = (torch.from_numpy(part.astype(np.float32)) for part in examples)
    assert torch.isfinite(crosscheck_loss(net, views, truths, torch.zeros(len(views), dtype=torch.bool)))
    crosscheck_loss(net, views, truths, copied > 0).backward()
    assert [name for name, weight in net.named_parameters() if weight.grad is None or not weight.grad.any()] == []

def test_training_is_seeded_leaves_the_generator_alone_and_refuses_one_kind():
    examples, before = random_examples(), torch.get_rng_state()
    one, other = (train_crosscheck(examples, steps=2, batch=8, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert torch.equal(before, torch.get_rng_state()) and not one.training
    with pytest.raises(BadConfig, match="one kind"): train_crosscheck(random_examples(true=1))

def test_weights_come_back_and_other_files_are_refused(tmp_path):
    net = CrossCheck()
    save_crosscheck(net, tmp_path / "net.safetensors")
    again = load_crosscheck(tmp_path / "net.safetensors")
    assert not again.training and all(torch.allclose(one.float(), other.float(), rtol=1e-3, atol=1e-6)
                                      for one, other in zip(net.state_dict().values(), again.state_dict().values(), strict=True))
    (tmp_path / "bad.safetensors").write_bytes((tmp_path / "net.safetensors").read_bytes()[:-100])
    for name in ("bad.safetensors", "none.safetensors"):
        with pytest.raises(BadCheckpoint, match=name): load_crosscheck(tmp_path / name)


def test_candidates_do_not_depend_on_their_company():
    image, affine, source = planted()
    planes, net = Planes(image, np.inf), packaged_crosscheck()
    some = [overlap_of(source, affine, grown) for grown in (0, 2, 4)]
    together, alone = crosscheck(net, planes, some), [crosscheck(net, planes, [one])[0] for one in some]
    for a, b in zip(together, alone, strict=True):
        assert abs(a.odds - b.odds) < 1e-3 and (a.overlap.mask == b.overlap.mask).mean() > .999
    assert crosscheck(net, planes, []) == []

def test_verdicts_are_of_as_many_true_as_false_ones(monkeypatch):
    "Whatever share of a batch was true: what that alone would make the network say is taken off."
    image, affine, source = planted()
    planes, some = Planes(image, np.inf), [overlap_of(source, affine, 0)]
    def odds(share: float) -> float:
        monkeypatch.setattr(room, "TRUE", share)
        return crosscheck(packaged_crosscheck(), planes, some)[0].odds
    assert np.isclose(odds(.5) - odds(.75), np.log(3)) and np.isclose(odds(.25) - odds(.5), np.log(3))

@pytest.mark.parametrize("radius", [9, 14, 25])
@pytest.mark.parametrize("grown", [0, 3])
def test_the_packages_network_draws_planted_copies_and_knows_them_from_what_is_not(radius, grown):
    image, affine, source = planted(radius, seed=radius)
    planes, net = Planes(image, np.inf), packaged_crosscheck()
    true, false = crosscheck(net, planes, [overlap_of(source, affine, grown), overlap_of(source, affine + [[0, 0, 40], [0, 0, -60]], grown)])
    drawn = Region.from_mask(true.overlap.mask, offset=true.overlap.box[:2]).full_mask(planes.shape)
    assert 2 * (drawn & source).sum() / (drawn.sum() + source.sum()) > .9
    assert true.odds > false.odds + 2

def test_the_largest_regions_keep_their_borders():
    planes = Planes(page(size=(400, 800)), np.inf)
    overlap = Overlap(np.array([[1., 0, 380], [0, 1, 0]]), (20, 20, 320, 320), np.ones((300, 300), bool))
    view = see(planes, overlap)
    assert view.window[2] - view.window[0] > LARGEST
    assert draw_mask(planes, overlap, view, np.ones((SIDE, SIDE))) is None

def test_a_mask_that_misses_the_region_draws_nothing():
    image, affine, source = planted()
    planes, overlap = Planes(image, np.inf), overlap_of(source, affine)
    view = see(planes, overlap)
    assert draw_mask(planes, overlap, view, np.zeros((SIDE, SIDE))) is None
    elsewhere = np.zeros((SIDE, SIDE)); elsewhere[:4, :4] = 1
    assert draw_mask(planes, overlap, view, elsewhere) is None

def test_tracing_redraws_and_leaves_the_given_candidates_alone():
    candidates, planes = find_candidates(planted(20)[0], CONFIG)
    before = [(dict(candidate.features), candidate.source) for candidate in candidates]
    traced = trace(packaged_crosscheck(), candidates, planes)
    assert candidates and [(candidate.features, candidate.source) for candidate in candidates] == before
    assert all(set(new.features) == {*old.features, "crosscheck"} for new, old in zip(traced, candidates, strict=True))
    assert any(new.source != old.source for new, old in zip(traced, candidates, strict=True))
    panels = trace(packaged_crosscheck(), [replace(one, panels=True) for one in candidates], planes)
    assert all(new.source is old.source for new, old in zip(panels, candidates, strict=True))

def test_the_network_draws_but_does_not_decide():
    image, *_ = planted(20)
    alone, drawn = find_decision(image, CONFIG), find_decision(image, CONFIG, net=packaged_crosscheck())
    assert alone.answered == drawn.answered > 0 and alone.p_forged == drawn.p_forged
    assert [event.score for event in alone.events] == [event.score for event in drawn.events]
    assert all("crosscheck" in link.evidence for event in drawn.events for link in event.links)

def test_prediction_asks_the_network_unless_told_otherwise():
    image, *_ = planted(20)
    hybrid, match = Detector(), Detector(method="match")
    assert hybrid.finder.net is packaged_crosscheck() and match.finder.net is None and hybrid.hurried().finder.net is hybrid.finder.net
    assert hybrid(image).annotation == hybrid(image).annotation != "authentic"


def test_no_figure_of_the_benchmark_is_judged_by_a_network_that_saw_its_sources(shared):
    from evaluate_match import bench_cases
    from train_crosscheck import FOLDS, fold_of, held_sources
    cases = bench_cases()[0][::2]
    fold, held = fold_of(cases), held_sources(cases, frozenset({"nobody's", "drawing of something"}))
    assert all(sources(case) <= held[k] for case, k in zip(cases, fold, strict=True)) and np.bincount(fold).tolist() == [len(cases) // FOLDS] * FOLDS
    assert frozenset({"nobody's", "drawing of something"}) <= frozenset().union(*held) and held[FOLDS] == frozenset()
