"What a network's regions may change in the matcher's answer, and what they may not."
import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

import recodai_forgery.regions as room
from recodai_forgery.align import Budget, MatchConfig, apply_affine
from recodai_forgery.cli import app
from recodai_forgery.correlation import RegionMatch
from recodai_forgery.evidence import search_figure
from recodai_forgery.gate import Rated, load_gate, save_gate
from recodai_forgery.match import Examined, find_decision, fit_seen, packaged_gate
from recodai_forgery.regions import Look, ask_network, find_partners, find_together, join, joins
from recodai_forgery.types import Event, Link, Region

QUICK = MatchConfig(keypoint_pixels=.3e6, keypoints=1200, hypotheses=300, checks=10, budget=120)


def texture(seed: int, shape=(180, 240), blur=1.3) -> np.ndarray:
    return cv2.GaussianBlur(np.random.default_rng(seed).integers(0, 256, (*shape, 3)).astype(np.uint8), (0, 0), blur)


def page() -> np.ndarray:
    "Letters, which repeat by design."
    image = np.full((180, 240, 3), 255, np.uint8)
    for row in range(5): cv2.putText(image, "copy cop", (8, 34 + 32 * row), 0, 1.1, (20, 20, 20), 2, cv2.LINE_AA)
    return image


def copied(image: np.ndarray) -> np.ndarray:
    image[110:160, 150:210] = image[15:65, 20:80]
    return image


def blobs(angle=70, mirrored=False):
    "Smooth blobs of which one was copied, which the matcher alone does not find: image, map, source, copy."
    rng, (row, column) = np.random.default_rng(0), np.mgrid[:200, :280]
    def blob(x, y, wide, high, turn, bright):
        u, v = (column - x) * np.cos(turn) + (row - y) * np.sin(turn), (row - y) * np.cos(turn) - (column - x) * np.sin(turn)
        return bright * np.exp(-(u / wide) ** 2 / 2 - (v / high) ** 2 / 2)
    image = 40 + blob(66, 62, 7, 5, 0, 90) + blob(77, 56, 4, 4, 0, 60)
    for x, y in rng.uniform((12, 12), (268, 188), (40, 2)):
        image += blob(x, y, rng.uniform(4, 8), rng.uniform(3, 6), rng.uniform(0, np.pi), rng.uniform(40, 120))
    image = cv2.GaussianBlur((image + rng.normal(0, 3, image.shape)).clip(0, 255).astype(np.float32), (0, 0), 2)
    source = cv2.ellipse(np.zeros((200, 280), np.uint8), (70, 60), (15, 12), 0, 0, 360, 1, -1)
    affine = cv2.getRotationMatrix2D((70, 60), angle, 1)
    if mirrored: affine = affine @ np.array([[-1, 0, 140], [0, 1, 0], [0, 0, 1.]])
    affine = affine + [[0, 0, 130], [0, 0, 80]]
    copy, there = (cv2.warpAffine(part, affine, (280, 200), flags=cv2.INTER_CUBIC) for part in (image, source))
    image[there > 0] = copy[there > 0]
    return cv2.cvtColor(image.clip(0, 255).astype(np.uint8), cv2.COLOR_GRAY2RGB), affine, Region.from_mask(source, .9), Region.from_mask(there, .8)


def random_look(seed: int, shape: tuple[int, int], low: float, high: float, threshold=.5) -> Look:
    rng = np.random.default_rng(seed)
    regions = []
    for _ in range(8):
        mask = np.zeros(shape, np.uint8)
        centre, sides = tuple(int(rng.integers(20, side - 20)) for side in shape[::-1]), tuple(rng.integers(8, 40, 2).tolist())
        cv2.ellipse(mask, centre, sides, int(rng.integers(180)), 0, 360, 1, -1)
        regions.append(Region.from_mask(mask, float(rng.uniform(low, high))))
    return Look(sorted(regions, key=lambda region: -region.score), [None] * 8, min(threshold, .3), threshold)


def answer(decision):
    "What must not change."
    return [(event.score, [(region.box, region.mask.tobytes()) for region in event.regions]) for event in decision.events[:decision.answered]]


# ---- a network of no worth ----

@pytest.mark.parametrize("scores", [(.05, .25), (.4, .4)], ids=["low", "rubbish"])
@pytest.mark.parametrize("make", [lambda: copied(texture(1)), lambda: texture(2), page, lambda: np.full((90, 120, 3), 255, np.uint8), lambda: blobs()[0]],
                         ids=["forged", "honest", "page", "blank", "blobs"])
def test_a_network_of_no_worth_changes_no_answer(make, scores):
    image = make()
    alone, both = find_decision(image, QUICK), find_together(image, random_look(1, image.shape[:2], *scores), QUICK)
    assert answer(both) == answer(alone) and abs(both.p_forged - alone.p_forged) < .05


def test_the_matchers_own_candidates_stay_as_they_are():
    image, _, source, there = blobs()
    search = search_figure(image, QUICK)
    before = [(candidate, dict(candidate.features)) for candidate in search.found]
    seen = ask_network(search, Look([source, there], [None, None], .5, .5), QUICK)
    assert len(search.found) > len(before) == sum(not candidate.asked for candidate in search.found) and len(seen) == len(search.found)
    assert all(one is other and one.features == features for one, (other, features) in zip(search.found, before, strict=False))
    assert all(candidate.features.keys() == before[0][1].keys() and np.isfinite(list(candidate.features.values())).all() for candidate in search.found)


# ---- partners ----

@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("keypoints", [True, False])
def test_regions_find_what_the_matcher_does_not(mirrored, keypoints, monkeypatch):
    image, affine, source, there = blobs(115, mirrored)
    if not keypoints: monkeypatch.setattr(room, "ask_regions", lambda *_: room.no_matches())
    search = search_figure(image, QUICK)
    assert not any(joins(candidate, source, there) for candidate in search.found)
    fresh = [candidate for candidate in find_partners(search, [there, source], config=QUICK) if joins(candidate, source, there)]
    points = np.argwhere(source.mask)[:, ::-1] + np.array(source.box[:2], float)
    def miss(candidate):
        forth, back = (np.abs(apply_affine(candidate.affine, some) - other).max() for some, other in
                       ((points, apply_affine(affine, points)), (apply_affine(affine, points), points)))
        return min(forth, back)
    assert min(map(miss, fresh)) < 1.5 and fresh[0].asked


def copies_found(offset: tuple[float, float] | None, said: bool = False, mirrored: bool = False) -> int:
    "How many candidates say where the copy lies, 130 to the right and 80 down, when the network has only seen the source and says whether it is mirrored."
    image, affine, source, _ = blobs(0, mirrored)
    search, corners = search_figure(image, QUICK), np.array([[60., 55], [80, 55], [70, 65]])
    seen = ask_network(search, Look([source], [offset and RegionMatch(offset, .8, .5, said)], .5, .5), QUICK)
    assert (seen == 0).all() # it has not seen both
    return sum(np.abs(apply_affine(candidate.affine, corners) - apply_affine(affine, corners)).max() < 1 for candidate in search.found if candidate.asked)


def test_a_match_inside_the_network_is_one_more_guess(monkeypatch):
    monkeypatch.setattr(room, "ask_regions", lambda *_: room.no_matches())
    monkeypatch.setattr(room, "look_around", lambda *_: np.zeros((0, 2, 3)))
    assert [copies_found(offset) for offset in (None, (128., 83.), (-40., 20.))] == [0, 1, 0]
    assert [copies_found((128., 83.), said, mirrored) for said, mirrored in ((True, True), (False, True), (True, False))] == [1, 0, 0]


def test_a_region_alone_is_sought_everywhere(monkeypatch):
    monkeypatch.setattr(room, "ask_regions", lambda *_: room.no_matches())
    assert copies_found(None) == 1


def test_large_figures_are_shrunk_and_the_answer_is_not():
    image, config = texture(1, (720, 960), 5.), replace(QUICK, check_pixels=.2e6)
    image[440:640, 600:840] = image[60:260, 80:320]
    boxes = (80, 60, 320, 260), (600, 440, 840, 640)
    look = Look([Region(box, np.ones((200, 240)), .9) for box in boxes], [None, None], .5, .5)
    search = search_figure(image, config)
    chosen = [region.box for _, region in room.choose_regions(look.regions, search.planes)]
    assert search.planes.scale < .6 and np.abs(np.divide(chosen, search.planes.scale) - boxes).max() < 3
    found = find_together(image, look, config)
    assert found.answered == 1 and found.events[0].links[0].evidence["seen"] == .9
    assert np.abs(np.array(sorted(region.box for region in found.events[0].regions)) - boxes).max() < 20


def test_a_spent_budget_is_kept():
    image, _, source, there = blobs()
    search = search_figure(image, QUICK)
    search.planes.budget = Budget(-1)
    assert find_partners(search, [source, there]) == [] and find_partners(search, []) == []
    search.planes.budget = Budget(2e5)
    find_partners(search, [source, there])
    assert search.planes.budget.pixels > -3e5


# ---- the decision ----

def square(x: int, y: int, score: float) -> Region: return Region((x, y, x + 20, y + 20), np.ones((20, 20)), score)


PAIR = Event((square(0, 0, 1.), square(50, 50, 1.)), (Link(0, 1, np.eye(2, 3)),), .6)


def test_what_a_score_earns():
    gate = packaged_gate()
    def said(rated, *regions, least=.3, figure=.7): return join(gate, rated, Look([*regions], [None] * len(regions), least, figure))
    empty = Rated((), (), .01)
    alone = said(empty, square(100, 0, .9), square(100, 60, .4), square(0, 100, .2))
    assert alone.answered == 1 and [region.box[:2] for region in alone.events[0].regions] == [(100, 0), (100, 60)] and alone.p_forged > .5
    silent = said(empty, square(100, 0, .6), square(100, 60, .4))
    assert silent.answered == 0 and len(silent.events) == 1 and silent.p_forged == .01
    rated = Rated((PAIR,), (.9,), .6)
    same = said(rated, square(2, 2, .6)) # on the event, and below the threshold: nothing changes
    assert answer(same) == answer(said(rated)) and same.p_forged == .6 and len(same.events) == 1
    raised = said(rated, square(2, 2, .95))
    second = said(Rated((replace(PAIR, score=.95),), (.9,), .95), square(100, 0, .9))
    assert second.answered == 1 and second.events[0].regions == PAIR.regions and second.events[1].score < alone.events[0].score / 2
    assert len(raised.events) == 1 and raised.events[0].regions == PAIR.regions and raised.events[0].score > .7 and raised.p_forged > .7


def test_what_a_networks_word_is_worth_is_learned(tmp_path):
    rng, gate = np.random.default_rng(0), replace(packaged_gate(), names=("x",), mean=(0.,), deviation=(1.,), weights=(1., 0.), bias=-1.)
    class Row(dict): features = property(lambda self: self)
    def figures(knows):
        for _ in range(60):
            true = rng.random(8) < .3
            rows = [Row(x=float(rng.normal(yes))) for yes in true]
            yield Examined(None, rows, 1., true, true * .8, 1, None, None, np.where(rng.random(8) < .8, true, ~true) * .9 if knows else rng.random(8))
    useful, idle = list(figures(True)), list(figures(False))
    assert fit_seen([gate] * 60, useful) > 1 and fit_seen([gate] * 60, idle) < .5
    assert fit_seen([gate] * 60, [one._replace(seen=None) for one in useful]) == 0
    rows = useful[0].candidates
    assert (gate(rows, useful[0].seen) == gate(rows)).all() # without a fit it has no say
    save_gate(replace(gate, seen=2.5), tmp_path / "gate.json")
    loud = load_gate(tmp_path / "gate.json")
    assert loud.seen == 2.5 and load_gate().seen == 0 and ((loud(rows, useful[0].seen) > gate(rows) + 1e-4) == (useful[0].seen > 0)).all()


def write_pages(root, count):
    "A tree of pages, and of textures in which a piece shows twice."
    for part in ("train_images/authentic", "train_images/forged", "train_masks"): (root / part).mkdir(parents=True)
    mask = np.zeros((1, 180, 240), np.uint8)
    mask[0, 15:65, 20:80] = mask[0, 110:160, 150:210] = 1
    for number in range(count):
        cv2.imwrite(str(root / f"train_images/authentic/{number}.png"), page())
        cv2.imwrite(str(root / f"train_images/forged/{number}.png"), copied(texture(number)))
        np.save(root / f"train_masks/{number}.npy", mask)
    return root


def test_fit_gate_learns_what_the_word_of_a_network_is_worth(tmp_path, monkeypatch):
    def look(image):
        "Sees the copies, not the letters."
        regions = [Region(box, np.ones((50, 60)), .9) for box in ((20, 15, 80, 65), (150, 110, 210, 160))] if image.std() < 60 else []
        return Look(regions, [None] * len(regions), .5, .5)
    monkeypatch.setattr("recodai_forgery.predict.look_with", lambda checkpoint: look)
    said = CliRunner().invoke(app, ["fit-gate", str(write_pages(tmp_path / "tree", 5)), "--out", str(tmp_path / "gate.json"), "--json", "--checkpoint", "any"])
    assert said.exit_code == 0, said.output
    assert json.loads(said.stdout)["figures"] == 10 and json.loads(said.stdout)["score"] > .6
    assert load_gate(tmp_path / "gate.json").seen > 0


def test_fit_gate_with_a_checkpoint_that_is_none(tmp_path):
    said = CliRunner().invoke(app, ["fit-gate", str(write_pages(tmp_path / "tree", 5)), "--checkpoint", str(tmp_path / "none.safetensors")])
    assert said.exit_code == 1 and "none.safetensors" in said.output
