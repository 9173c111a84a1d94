"""What the matcher must do on figures whose truth is exact, and on figures that are odd."""
from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from skimage import data

from recodai_forgery.align import MIRROR, MatchConfig, find_keypoints
from recodai_forgery.contour import fit_border
from recodai_forgery.evidence import find_candidates
from recodai_forgery.gate import choice_loss, draw, load_gate
from recodai_forgery.image import load_image
from recodai_forgery.match import find_decision, find_events, fit_gate, label, packaged_gate
from recodai_forgery.types import BadConfig, BadMask, Case, Region, iou

SIZE = 360, 300


def texture(name: str = "immunohistochemistry") -> np.ndarray:
    return np.ascontiguousarray(getattr(data, name)()[:SIZE[1], :SIZE[0], :3])


def plant(image: np.ndarray, angle: float = 0, scale: float = 1, mirrored: bool = False, start=(90, 90), goal=(250, 190), axes=(48, 36)):
    "The image with an ellipse copied, and the mask of both."
    size, centre = image.shape[1::-1], (float(start[0]), float(start[1]))
    source = cv2.ellipse(np.zeros(image.shape[:2], np.uint8), start, axes, 0, 0, 360, 1, -1)
    affine = np.vstack([cv2.getRotationMatrix2D(centre, angle, scale), [0, 0, 1]])
    if mirrored: affine = affine @ np.array([[-1, 0, 2 * start[0]], [0, 1, 0], [0, 0, 1]])
    affine[:2, 2] += np.subtract(goal, start)
    copy = cv2.warpAffine(image, affine[:2], size, flags=cv2.INTER_CUBIC)
    there = cv2.warpAffine(source, affine[:2], size, flags=cv2.INTER_NEAREST)
    forged = image.copy()
    forged[there > 0] = copy[there > 0]
    return forged, (source | there) > 0


def f1(region: Region, truth: np.ndarray) -> float:
    mask = region.full_mask(truth.shape)
    return 2 * (mask & truth).sum() / (mask.sum() + truth.sum())


@pytest.mark.parametrize("change", [{}, {"mirrored": True}, {"angle": 90}, {"angle": 37}, {"scale": .8}, {"scale": 1.25}], ids=str)
def test_planted_copy_is_found(change):
    forged, truth = plant(texture(), **change)
    found = find_decision(forged)
    assert found.answered == 1
    assert f1(found.events[0].region, truth) >= .9
    assert len(found.events[0].regions) == 2 and found.events[0].links


@pytest.mark.slow
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["immunohistochemistry", "coffee", "astronaut"]), st.floats(0, 360), st.floats(.82, 1.22), st.booleans())
def test_any_similarity_is_found(name, angle, scale, mirrored):
    forged, truth = plant(texture(name), angle, scale, mirrored)
    assert max((f1(event.region, truth) for event in find_events(forged)), default=0) >= .85


@pytest.mark.slow
def test_form_of_the_file_changes_nothing(tmp_path):
    forged, _ = plant(cv2.cvtColor(cv2.cvtColor(texture(), cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB), angle=15)
    region = find_decision(forged).events[0].region
    rgba = np.dstack([forged, np.full(forged.shape[:2], 255, np.uint8)])
    cv2.imwrite(str(tmp_path / "rgba.png"), rgba[..., [2, 1, 0, 3]])
    cv2.imwrite(str(tmp_path / "grey.png"), forged[..., 0])
    for name in ("rgba", "grey"):
        assert iou(find_decision(load_image(tmp_path / f"{name}.png")).events[0].region, region) == 1


@pytest.mark.slow
def test_permuted_channels_and_padding_change_little():
    forged, _ = plant(texture(), angle=15)
    region = find_decision(forged).events[0].region
    permuted = find_decision(np.ascontiguousarray(forged[..., ::-1]))
    padded = find_decision(cv2.copyMakeBorder(forged, 20, 10, 30, 5, cv2.BORDER_CONSTANT, value=(255,) * 3))
    assert permuted.answered == padded.answered == 1
    assert iou(permuted.events[0].region, region) > .85
    back = padded.events[0].region
    x0, y0, x1, y1 = back.box
    assert iou(Region((x0 - 30, y0 - 20, x1 - 30, y1 - 20), back.mask), region) > .85


@pytest.mark.parametrize("name", ["blank", "one pixel", "one row", "strip", "gradient"])
def test_odd_figures_are_authentic(name):
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 255, 200).astype(np.uint8)
    figure = {"blank": np.full((300, 200, 3), 255, np.uint8), "one pixel": np.zeros((1, 1, 3), np.uint8),
              "one row": rng.integers(0, 256, (1, 500, 3), np.uint8), "strip": rng.integers(0, 256, (40, 720, 3), np.uint8),
              "gradient": np.ascontiguousarray(np.broadcast_to(ramp[None, :, None], (150, 200, 3)))}[name]
    assert find_decision(figure).answered == 0


def test_noise_is_authentic():
    noise = np.random.default_rng(1).integers(0, 256, (300, 300, 3), np.uint8)
    assert find_decision(noise).answered == 0


def test_a_checkerboard_is_authentic():
    board = np.kron(np.indices((12, 12)).sum(axis=0) % 2, np.ones((25, 25))).astype(np.uint8) * 200 + 20
    assert find_decision(cv2.cvtColor(board, cv2.COLOR_GRAY2RGB)).answered == 0


def test_same_figure_same_answer():
    forged, _ = plant(texture(), angle=33)
    first, second = (find_candidates(forged, MatchConfig(keypoints=1500, checks=15))[0] for _ in range(2))
    assert len(first) == len(second) > 0
    assert all(a.features == b.features and iou(a.source, b.source) == 1 for a, b in zip(first, second, strict=True))


def test_spent_budget_ends_the_search():
    forged, _ = plant(texture())
    assert find_candidates(forged, MatchConfig(budget=1e-9))[0] == []


def test_work_is_bounded_by_a_count():
    unit = cv2.resize(np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8), (40, 40), interpolation=cv2.INTER_CUBIC)
    tiled = np.tile(unit, (20, 25, 1))
    config = MatchConfig(keypoints=1500, work=3e6)
    candidates, planes = find_candidates(tiled, config)
    assert planes.budget.pixels > -5 * tiled.shape[0] * tiled.shape[1] # the check that spends the last pixels may end
    again, _ = find_candidates(tiled, config)
    assert [candidate.source.box for candidate in candidates] == [candidate.source.box for candidate in again]


def test_border_is_learned_from_true_candidates(tmp_path):
    forged, truth = plant(texture(), angle=20, axes=(20, 15))
    np.save(tmp_path / "mask.npy", truth[None].astype(np.uint8))
    candidates, planes = find_candidates(forged, MatchConfig(checks=8))
    one = label(Case("forged", "1", tmp_path / "figure.png", tmp_path / "mask.npy", truth.shape), candidates, planes)
    assert one.true.any() and len(one.rows) == len(one.copied) > 100
    best = candidates[int(one.true.argmax())]
    gate = replace(load_gate(), border=fit_border(one.rows, one.copied))
    drawn = draw(gate, best, planes)
    masks = [region.full_mask(truth.shape) for region in drawn.regions]
    both = masks[0] | masks[1]
    assert 2 * (both & truth).sum() / (both.sum() + truth.sum()) > .9


def test_mirrored_descriptors_are_a_permutation():
    gray = cv2.cvtColor(texture(), cv2.COLOR_RGB2GRAY)
    config = MatchConfig(enlarge=1, keypoints=4000)
    plain, mirrored = find_keypoints(gray, config), find_keypoints(np.ascontiguousarray(gray[:, ::-1]), config)
    there = mirrored.xy * [-1, 1] + [SIZE[0] - 1, 0]
    turn = np.exp(1j * plain.angle)[:, None] * np.exp(1j * (mirrored.angle - np.pi))[None]
    near = np.linalg.norm(plain.xy[:, None] - there[None], axis=2) < .8 # SIFT counts from a quarter pixel beside
    near &= (np.abs(np.angle(turn)) < .05) & (np.abs(np.log(plain.size[:, None] / mirrored.size)) < .05)
    one, other = np.nonzero(near)
    assert len(one) > 200
    assert np.median((plain.descriptors[one][:, MIRROR] * mirrored.descriptors[other]).sum(axis=1)) > .98


def test_gate_of_the_package_fits_its_features():
    forged, _ = plant(texture())
    candidates, _ = find_candidates(forged, MatchConfig(checks=4))
    assert set(load_gate().names) == set(candidates[0].features)


def test_gate_needs_both_kinds(tmp_path):
    forged, truth = plant(texture())
    np.save(tmp_path / "mask.npy", truth[None].astype(np.uint8))
    candidates, planes = find_candidates(forged, MatchConfig(checks=6))
    one = label(Case("forged", "1", tmp_path / "figure.png", tmp_path / "mask.npy", truth.shape), candidates, planes)
    assert one.true[0] and one.f1[0] > .9
    with pytest.raises(BadConfig, match="fit on"): fit_gate([one])
    with pytest.raises(BadMask, match="must be"):
        label(Case("forged", "1", tmp_path / "figure.png", tmp_path / "mask.npy", (9, 9)), candidates, planes)


def test_the_slope_of_the_choices_is_that_of_their_loss():
    rng = np.random.default_rng(0)
    table, figure, numbers = rng.normal(size=(40, 3)), np.sort(rng.integers(0, 9, 40)), rng.normal(size=4)
    true = rng.random(40) < .2
    _, slope = choice_loss(numbers, table, figure, true)
    step = 1e-5 * np.eye(4)
    measured = [(choice_loss(numbers + one, table, figure, true)[0] - choice_loss(numbers - one, table, figure, true)[0]) / 2e-5 for one in step]
    assert np.allclose(slope, measured, atol=1e-6) and np.abs(slope).min() > .01
    assert choice_loss(numbers, table, figure, np.zeros(40, bool))[0] > choice_loss(numbers, table, figure, np.ones(40, bool))[0] > 0


def test_a_candidates_probability_does_not_depend_on_how_many_there_are():
    gate, rng = packaged_gate(), np.random.default_rng(0)
    rows = [dict(zip(gate.names, np.array(gate.mean) + rng.normal(size=len(gate.names)) * gate.deviation, strict=True)) for _ in range(40)]
    assert all((gate(rows[:count]) == gate(rows)[:count]).all() for count in (1, 2, 7, 33))
