"""What a lesson of 06_correlation cannot say: brute force as the judge, the neck inside the network, batches, figures that are hardly there."""
import json
from collections import Counter
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from recodai_forgery.correlation import (
    WINDOW,
    Cells,
    SelfCorr,
    best_partners,
    field_features,
    figure_extent,
    flip_figures,
    look_at_cells,
    match_cells,
    match_region,
    shallow_stages,
)
from recodai_forgery.infonce import QUERIES, TEMPERATURE, infonce, true_cells
from recodai_forgery.model import ModelConfig, build_model, checksum, detect, detect_batch, load_model, save_model, to_tensor
from recodai_forgery.thresholds import validation_losses
from recodai_forgery.types import BadCheckpoint, BadConfig, Region

PLAIN = ModelConfig("mobilenet_v2", size=256, channels=8, anchor_sizes=(8, 16, 32, 64, 128), samples=32)
WITH = replace(PLAIN, correlation=64)
MIRRORED = replace(WITH, mirrored=True)
LEARNED = replace(MIRRORED, projection=24)


def figure(height=192, width=256, seed=0, side=4):
    "Coloured squares of a few pixels: something to tell apart everywhere."
    small = np.random.default_rng(seed).integers(0, 256, (-(-height // side), -(-width // side), 3), dtype=np.uint8)
    return np.ascontiguousarray(np.kron(small, np.ones((side, side, 1), np.uint8))[:height, :width])


def opened(config=WITH, seed=0):
    "A network whose gates have learned something."
    model = build_model(config, seed)
    with torch.no_grad():
        for gate in model.backbone.correlation.gates: gate.weight.normal_(0, .3, generator=torch.Generator().manual_seed(1))
    return model


def matches(model, images):
    "The field of figures, and the padded batch."
    batch, _ = model.transform([to_tensor(image) for image in images])
    with torch.inference_mode(): return model.backbone.matches(batch.tensors, model.backbone.body(batch.tensors)), batch.tensors


def same(one, other): return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ---------------------------------------------------------------- the comparison

@settings(max_examples=30, deadline=None)
@given(cells=st.integers(10, 20), seed=st.integers(0, 99), blank=st.floats(0, 1), mirrored=st.booleans())
def test_best_partners_by_brute_force(cells, seed, blank, mirrored):
    generator = torch.Generator().manual_seed(seed)
    both = torch.nn.functional.normalize(torch.randn(2, 2, cells ** 2, 6, generator=generator), dim=3)
    both[:, torch.rand(2, cells ** 2, generator=generator) < blank] = 0
    values, partners, turned = best_partners(both[0], cells, 3, both[1] if mirrored else None)
    place = np.stack(np.divmod(np.arange(cells ** 2), cells))
    near = np.abs(place[:, :, None] - place[:, None]).max(axis=0) <= WINDOW
    for number in range(2):
        kinds = [np.where(near, 0, (both[0, number].double() @ other[number].double().T).numpy()) for other in both[:1 + mirrored]]
        likeness = np.maximum(kinds[0], kinds[-1])
        expected = np.sort(likeness, axis=1)[:, ::-1][:, :3].clip(0)
        assert np.allclose(values[number], expected, atol=1e-5)
        found = np.flatnonzero(expected[:, 0] > 0)
        assert np.allclose(likeness[found, partners[number][found]], expected[found, 0], atol=1e-5)
        assert np.array_equal(turned[number][found], (kinds[-1] > kinds[0])[found, partners[number][found]])


def test_rows_come_in_chunks_and_memory_stays_small():
    "128 x 128 cells: one matrix of all pairs would take a gigabyte."
    descriptors = torch.nn.functional.normalize(torch.randn(1, 128 ** 2, 4, generator=torch.Generator().manual_seed(0)), dim=2)
    largest, topk = [], torch.Tensor.topk
    def watched(tensor, *arguments, **options):
        largest.append(tensor.numel() * 4)
        return topk(tensor, *arguments, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "topk", watched)
        values, *_ = best_partners(descriptors, 128, 2)
    assert values.shape == (1, 128 ** 2, 2) and len(largest) == 128 and max(largest) <= 16e6


@pytest.mark.parametrize("shape", [(192, 256), (256, 192), (256, 256)])
@pytest.mark.parametrize("offset", [(96, 64), (61, 90), (-70, 83), (3, 101)])
def test_planted_copy_is_found_within_a_cell(shape, offset):
    "Also where the offset is no multiple of a cell or of a feature's stride."
    image, (dx, dy), size = cv2.GaussianBlur(figure(*shape, side=8), (0, 0), 3), offset, 60
    x, y = (18 if dx > 0 else 76), 22
    image[y + dy:y + dy + size, x + dx:x + dx + size] = image[y:y + size, x:x + size]
    field, _ = matches(build_model(WITH).eval(), [image])
    region = Region.from_mask(np.ones((size, size), bool), offset=(x, y))
    copy = Region.from_mask(region.mask, offset=(x + dx, y + dy))
    found, back = (match_region(field, 0, part, shape) for part in (region, copy))
    assert max(abs(found.offset[0] - dx), abs(found.offset[1] - dy)) <= 4 and found.support > .1
    assert max(abs(back.offset[0] + dx), abs(back.offset[1] + dy)) <= 4


@pytest.mark.parametrize("shape", [(192, 256), (256, 192), (204, 236)])
@pytest.mark.parametrize("offset", [(96, 64), (61, 90), (-70, 83), (3, 101)])
@pytest.mark.parametrize("upside_down", [False, True])
def test_planted_mirrored_copy_is_found_within_a_cell(shape, offset, upside_down):
    "Left-right. What is mirrored up-down as well is turned by half a circle, which nobody seeks; nor does the plain search find either."
    image, (dx, dy), size = cv2.GaussianBlur(figure(*shape, side=8), (0, 0), 3), offset, 60
    x, y = (18 if dx > 0 else 76), 22
    piece = image[y:y + size, x:x + size][:, ::-1]
    image[y + dy:y + dy + size, x + dx:x + dx + size] = piece[::-1] if upside_down else piece
    region = Region.from_mask(np.ones((size, size), bool), offset=(x, y))
    copy = Region.from_mask(region.mask, offset=(x + dx, y + dy))
    for config in (MIRRORED, WITH):
        field, _ = matches(build_model(config).eval(), [image])
        for part, goal in ((region, (dx, dy)), (copy, (-dx, -dy))):
            found = match_region(field, 0, part, shape)
            right = found is not None and np.allclose(found.offset, goal, atol=4) and found.support > .04
            assert right == (config.mirrored and not upside_down) and (not right or found.mirrored)
    assert not field.mirrored.any()


def test_a_plain_copy_is_found_as_a_plain_one_beside_a_mirrored_one():
    "Each cell has the better of both; `mutual` and `agreement` hold for either kind."
    image = cv2.GaussianBlur(figure(256, 256, side=8), (0, 0), 3)
    image[20:80, 180:240], image[168:228, 28:88] = image[20:80, 20:80], image[112:172, 160:220][:, ::-1]
    field, _ = matches(build_model(MIRRORED).eval(), [image])
    for (x, y), goal, kind in (((20, 20), (160, 0), False), ((160, 112), (-132, 56), True), ((28, 168), (132, -56), True)):
        found = match_region(field, 0, Region.from_mask(np.ones((60, 60), bool), offset=(x, y)), (256, 256))
        assert found.mirrored == kind and np.allclose(found.offset, goal, atol=4) and found.support > .5
        inside = slice(y // 4 + 3, y // 4 + 12), slice(x // 4 + 3, x // 4 + 12)
        assert (field.mirrored[0][inside] == kind).float().mean() > .9
        assert field.mutual[0][inside].mean() > .7 and field.agreement[0][inside].mean() > .7


def test_a_region_that_reaches_beyond_its_mirrored_copy():
    "The offset leads from the middle of the region, wherever in it the cells lie that have a like."
    image = cv2.GaussianBlur(figure(256, 256, side=8), (0, 0), 3)
    image[152:212, 152:212] = image[20:80, 20:80][:, ::-1] # x + x' = 231
    field, _ = matches(build_model(MIRRORED).eval(), [image])
    found = match_region(field, 0, Region.from_mask(np.ones((60, 100), bool), offset=(20, 20)), (256, 256))
    assert found.mirrored and np.allclose(found.offset, (231 - 2 * 69.5, 132), atol=4) and .3 < found.support < .7


def test_a_larger_figure_has_the_same_cells():
    "The grid is fixed relative to the figure: offsets in its own pixels whatever the network's size."
    large = cv2.GaussianBlur(figure(768, 1024, side=32), (0, 0), 12)
    large[400:720, 560:880] = large[40:360, 80:400]
    region = Region.from_mask(np.ones((320, 320), bool), offset=(80, 40))
    for size in (256, 512):
        model = build_model(replace(WITH, size=size)).eval()
        small = np.ascontiguousarray(large[::1024 // size, ::1024 // size])
        field, _ = matches(model, [small])
        assert np.isclose(field.side[0], 1 / 64)
        match = match_region(field, 0, region, large.shape[:2])
        assert np.allclose(match.offset, (480, 360), atol=16) and match.support > .4, size


# ---------------------------------------------------------------- batches

def test_padding_is_never_read():
    "A figure alone, and in a larger batch whose padding holds rubbish in its features."
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, 96, 128, generator=generator)
    stages = [torch.randn(1, 12, 24, 32, generator=generator), torch.randn(1, 16, 12, 16, generator=generator)]
    padded = torch.zeros(2, 3, 160, 192)
    padded[0, :, :96, :128], padded[1] = image[0], torch.randn(3, 160, 192, generator=generator)
    rubbish = [100 * torch.randn(2, 12, 40, 48, generator=generator), 100 * torch.randn(2, 16, 20, 24, generator=generator)]
    for more, stage in zip(rubbish, stages, strict=True): more[0, :, :stage.shape[2], :stage.shape[3]] = stage[0]
    flipped = [[values.roll(1, dims=1) for values in some] for some in (stages, rubbish)] # other features of the same places
    assert figure_extent(padded).tolist() == [[96, 128], [160, 192]]
    for mirrored in (False, True):
        alone = match_cells(look_at_cells(image, stages, 32, flipped[0] if mirrored else None))
        together = match_cells(look_at_cells(padded, rubbish, 32, flipped[1] if mirrored else None))
        assert all(torch.allclose(a[0], b[0], atol=1e-4) for a, b in zip(alone, together, strict=True)) and alone.similarity.max() > .5
        assert alone.mirrored.any() == mirrored
        torch.manual_seed(0)
        neck = SelfCorr(8, 32, mirrored=mirrored)
        for gate in neck.gates: torch.nn.init.constant_(gate.weight, 1 / 6) # what is added stays of the order of one
        for a, b in zip(neck(image, alone), neck(padded, together), strict=True):
            assert torch.allclose(a[0], b[0, :, :a.shape[2], :a.shape[3]], atol=1e-5) and a.abs().max() > 0


def test_figures_are_flipped_within_themselves():
    "Every figure by itself, padded or not, and twice is once too often."
    images = torch.zeros(3, 3, 64, 96)
    for number, (height, width) in enumerate(((64, 96), (40, 33), (64, 1))): images[number, :, :height, :width] = torch.rand(3, height, width) + .1
    extent = figure_extent(images)
    flipped = flip_figures(images, extent)
    assert torch.equal(figure_extent(flipped), extent) and torch.equal(flip_figures(flipped, extent), images)
    for image, other, (height, width) in zip(images, flipped, extent.int().tolist(), strict=True):
        assert torch.equal(other[:, :height, :width], image[:, :height, :width].flip(2))


def test_the_second_look_takes_the_first_stages_alone_and_counts_nothing():
    model, batch = build_model(replace(MIRRORED, norm="batch")).train(), torch.randn(2, 3, 64, 96)
    before, body = {name: value.clone() for name, value in model.state_dict().items()}, model.backbone.body
    stages = shallow_stages(body, batch)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items()) and not any(part.requires_grad for part in stages)
    whole = body(batch)
    assert len(stages) == 2 and torch.equal(stages[0], whole["0"]) and torch.equal(stages[1], whole["1"])
    assert not torch.equal(before["backbone.body.0.1.running_mean"], model.state_dict()["backbone.body.0.1.running_mean"])


@pytest.mark.parametrize("config", [WITH, MIRRORED, LEARNED])
def test_permuted_images_permute_the_output(config):
    model, images, order = opened(config).eval(), [figure(192, 256), figure(256, 160, 1), figure(224, 224, 2)], [2, 0, 1]
    batches = [model.transform([to_tensor(images[number]) for number in numbers])[0].tensors for numbers in (range(3), order)]
    with torch.inference_mode(): one, other = (model.backbone(batch) for batch in batches)
    assert all(torch.equal(one[level][order], other[level]) for level in one)


@pytest.mark.parametrize("config", [WITH, MIRRORED, LEARNED])
def test_white_and_flat_images_give_zero(config):
    model, plain = opened(config).eval(), build_model(PLAIN).eval()
    flat = [np.full((192, 256, 3), value, np.uint8) for value in (255, 0, 124, (10, 200, 30))]
    flat[1] = (flat[1] + np.random.default_rng(0).integers(0, 2, flat[1].shape)).astype(np.uint8) # the noise of one grey level
    for images in ([image] for image in flat):
        field, batch = matches(model, images)
        assert all((values == 0).all() for values in field[:-1])
        with torch.inference_mode(): assert same(list(model.backbone(batch).values()), list(plain.backbone(batch).values()))


@pytest.mark.parametrize("shape", [(1, 1), (3, 256), (256, 5), (36, 256)])
def test_figures_that_are_hardly_there(shape):
    for config in (WITH, MIRRORED, LEARNED):
        field, batch = matches(opened(config), [figure(*shape, side=1)])
        assert all(values.isfinite().all() for values in field) and field_features(field, config.mirrored).isfinite().all()
        assert detect(opened(config), [figure(*shape)], 256) is not None


# ---------------------------------------------------------------- inside the network

@pytest.mark.parametrize("options", [{"correlation": 64}, {"correlation": 128}, {"correlation": 64, "mirrored": True},
                                     {"correlation": 64, "mirrored": True, "projection": 24}])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_step_zero_is_the_network_without(options, norm):
    bare = replace(PLAIN, norm=norm)
    plain, model = build_model(bare, seed=5), build_model(replace(bare, **options), seed=5)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.state_dict().items())
    images, masks = [to_tensor(figure()), to_tensor(figure(128, 256, 1))], torch.zeros(1, 192, 256, dtype=torch.uint8)
    masks[0, 20:60, 30:80] = 1
    boxes = torch.tensor([[30., 20, 80, 60]])
    targets = [{"boxes": boxes, "labels": torch.ones(1, dtype=torch.int64), "masks": masks, "event": torch.zeros(1, dtype=torch.int64)},
               {"boxes": boxes[:0], "labels": torch.ones(0, dtype=torch.int64), "masks": masks[:0, :128], "event": torch.zeros(0, dtype=torch.int64)}]
    parts = []
    for network in (plain, model):
        torch.manual_seed(0)
        parts.append(network(images, targets))
    assert all(torch.equal(parts[0][name], parts[1][name]) for name in parts[0])
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.state_dict().items()) # statistics of the batch as well
    plain.eval(), model.eval()
    with torch.inference_mode(): found = plain(images), model(images)
    for one, other in zip(*found, strict=True): assert len(one["scores"]) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", ["backbone.body.0.0.weight", "backbone.correlation.mix.0.weight", "backbone.correlation.gates.0.weight"])
def test_not_finite_gives_no_detections(layer, value):
    model, faults = opened(), Counter()
    with torch.no_grad(): model.get_parameter(layer).view(-1)[0] = value
    assert detect(model, [figure(), figure(160, 256)], 256, faults=faults) == [[], []] and faults == {"not finite": 2}


def test_one_broken_figure_leaves_its_neighbour_alone():
    model, faults = opened().eval(), Counter()
    images = [to_tensor(figure(seed=seed)) for seed in range(2)]
    alone = detect_batch(model, images, [(192, 256)] * 2)
    images[0] = torch.full_like(images[0], float("nan"))
    nothing, beside = detect_batch(model, images, [(192, 256)] * 2, faults=faults)
    assert nothing == [] and faults == {"not finite": 1}
    assert beside and [(region.box, region.score) for region in beside] == [(region.box, region.score) for region in alone[1]]


def test_half_empty_and_empty_batches_train():
    model, image = opened(), to_tensor(figure())
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": torch.zeros(0, 192, 256, dtype=torch.uint8)}
    masks = torch.zeros(1, 192, 256, dtype=torch.uint8)
    masks[0, 5:40, 7:60] = 1
    one = {"boxes": torch.tensor([[7., 5, 60, 40]]), "labels": torch.ones(1, dtype=torch.int64), "masks": masks}
    for targets in ([empty, empty], [one, empty], [one, one]):
        loss = sum(model([image, image], targets).values())
        model.zero_grad()
        loss.backward()
        assert loss.isfinite() and all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)
        assert all(weight.grad.abs().sum() > 0 for weight in model.backbone.correlation.parameters())


# ---------------------------------------------------------------- the learned projection

def some_cells(seed, cells, mirrored, channels=6):
    "Cells as a projection leaves them, some not in play, and pieces of two events."
    generator = torch.Generator().manual_seed(seed)
    both = torch.nn.functional.normalize(torch.randn(2, 2, cells ** 2, channels, generator=generator), dim=3)
    both[:, torch.rand(2, cells ** 2, generator=generator) < .2] = 0
    piece = torch.randint(-3, 5, (2, cells ** 2), generator=generator).clamp(min=-1)
    event = torch.tensor([3, 3, 8, 8, 3, -1])[piece]
    return Cells(both[0], both[1] if mirrored else None, torch.full((2, 2), 4. * cells), torch.full((2,), 4.)), piece, event


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), cells=st.integers(10, 14), mirrored=st.booleans())
def test_infonce_by_brute_force(seed, cells, mirrored):
    seen, piece, event = some_cells(seed, cells, mirrored)
    assert cells ** 2 <= QUERIES # all are asked
    losses = []
    for number, cell in np.ndindex(2, cells ** 2):
        if piece[number, cell] < 0 or not seen.plain[number, cell].any(): continue
        right = total = 0.
        for other in range(cells ** 2):
            if not seen.plain[number, other].any() or max(abs(a - b) for a, b in zip(divmod(cell, cells), divmod(other, cells), strict=True)) <= WINDOW: continue
            like = sum(float(torch.exp(seen.plain[number, cell] @ keys[number, other] / TEMPERATURE)) for keys in seen[:1 + mirrored])
            total += like
            right += like * bool(event[number, cell] == event[number, other] and piece[number, cell] != piece[number, other])
        if right: losses.append(np.log(total / right))
    assert losses and np.isclose(infonce(seen, piece, event), np.mean(losses), rtol=1e-4)


def test_no_more_cells_are_asked_than_can_be_paid_for_and_they_are_spread():
    seen, piece, event = some_cells(0, 64, False)
    seen = seen._replace(plain=seen.plain.requires_grad_())
    infonce(seen, (piece > 1).long(), event * 0).backward() # the gradient of a cell that was asked is larger than that of one that was not
    asked = seen.plain.grad[0].norm(dim=1).topk(QUERIES).indices
    assert seen.plain.grad.isfinite().all()
    counts = torch.zeros(4, 4).index_put_((asked // 64 // 16, asked % 64 // 16), torch.ones(()), accumulate=True)
    assert counts.min() >= QUERIES / 16 / 2


def pair(seed=0, empty=False):
    "A figure with a planted copy that lies between cells, and its target."
    image = cv2.GaussianBlur(figure(192, 256, seed, side=8), (0, 0), 3)
    image[101:161, 143:203] = image[20:80, 20:80]
    image = (image + np.random.default_rng(seed).normal(0, 8, image.shape)).clip(0, 255).astype(np.uint8)
    masks = torch.zeros(2, 192, 256, dtype=torch.uint8)
    masks[0, 20:80, 20:80], masks[1, 101:161, 143:203] = 1, 1
    boxes, kept = torch.tensor([[20., 20, 80, 80], [143, 101, 203, 161]]), slice(0 if empty else None)
    return to_tensor(image), {"boxes": boxes[kept], "labels": torch.ones(2, dtype=torch.int64)[kept], "masks": masks[kept],
                              "event": torch.zeros(2, dtype=torch.int64)[kept]}


@pytest.mark.parametrize("empty", [(False, False), (False, True), (True, True)])
def test_the_loss_reaches_the_projection_and_nothing_else(empty):
    model = build_model(replace(LEARNED, norm="batch"))
    images, targets = map(list, zip(*(pair(seed, none) for seed, none in enumerate(empty)), strict=True))
    parts = model(images, targets)
    assert all(loss.isfinite() for loss in parts.values()) and (parts["loss_infonce"] > 0) == (not all(empty))
    parts["loss_infonce"].backward(retain_graph=True)
    reached = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert reached == {"backbone.correlation.projection.weight"} # with an empty batch as well: processes that learn together wait for it
    assert model.backbone.correlation.projection.weight.grad.any() == (not all(empty))
    model.zero_grad()
    sum(loss for name, loss in parts.items() if name != "loss_infonce").backward()
    assert model.backbone.correlation.projection.weight.grad is None # which cell is the best is not a matter of degree


def test_truth_at_cells_does_not_depend_on_the_batch():
    model, alone, other = build_model(LEARNED), pair(), pair(1)
    wide = torch.zeros(3, 256, 256), {**other[1], "masks": torch.zeros(0, 256, 256, dtype=torch.uint8), "event": torch.zeros(0, dtype=torch.int64)}
    truths = []
    for some in ([alone], [alone, wide]):
        batch, targets = model.transform([image for image, _ in some], [target for _, target in some])
        truths.append(true_cells(targets, model.backbone.pyramid_and_cells(batch.tensors)[1]))
    for one, both in zip(*truths, strict=True): assert torch.equal(one[0], both[0]) and (both[1] == -1).all()
    piece = truths[0][0][0].reshape(64, 64)
    assert (piece[5:20, 5:20] == 0).all() and (piece[26:40, 36:50] == 1).all() and (piece >= 0).sum() == 450


def test_the_loss_falls_and_more_of_the_copy_is_found():
    model, (image, target) = build_model(replace(LEARNED, mirrored=False)), pair()
    batch, targets = model.transform([image], [target])
    optimizer, losses, found = torch.optim.SGD(model.backbone.correlation.projection.parameters(), lr=.1, momentum=.9), [], []
    with torch.no_grad(): stages = model.backbone.body(batch.tensors)
    for _ in range(30):
        seen = model.backbone.look(batch.tensors, stages)
        found.append(match_region(match_cells(seen), 0, Region.from_mask(np.ones((60, 60), bool), offset=(20, 20)), (192, 256)))
        loss = infonce(seen, *true_cells(targets, seen))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < .7 * losses[0] and np.allclose(found[-1].offset, (123, 81), atol=4) and found[-1].support > found[0].support


def test_evaluation_computes_no_loss_and_validation_does(monkeypatch):
    model, (image, target) = build_model(LEARNED), pair()
    parts = validation_losses(model, image, target)
    assert list(parts) == [*validation_losses(build_model(MIRRORED), image, target), "loss_infonce"] and parts["loss_infonce"] > 0
    assert parts == validation_losses(model, image, target)
    monkeypatch.setattr("recodai_forgery.infonce.infonce", lambda *_: pytest.fail("nobody asked"))
    assert len(detect_batch(model.eval(), [image], [(192, 256)])) == 1 and len(model([image])) == 1


def test_a_network_with_the_neck_goes_on_with_a_projection(tmp_path):
    path = tmp_path / "neck.safetensors"
    save_model(path, opened(replace(MIRRORED, norm="frozen")), replace(MIRRORED, norm="frozen"))
    model = build_model(replace(LEARNED, weights=str(path)), seed=3)
    assert model.backbone.correlation.gates[0].weight.any() and model.backbone.correlation.projection.weight.any()


# ---------------------------------------------------------------- checkpoints

@pytest.mark.parametrize("given", [WITH, MIRRORED, LEARNED])
def test_checkpoint_with_the_neck(tmp_path, given):
    model = opened(given)
    save_model(tmp_path / "best.safetensors", model, given)
    loaded, config, _ = load_model(tmp_path / "best.safetensors")
    assert (config.correlation, config.mirrored, config.projection) == (64, given.mirrored, given.projection) and same(list(model.state_dict().values()), list(loaded.state_dict().values()))


@pytest.mark.parametrize("options", [{"mirrored": True}, {"correlation": 64, "mirrored": 1}, {"projection": 8}, {"correlation": 64, "projection": -1}])
def test_options_of_a_neck_that_is_not_there_are_refused(options):
    with pytest.raises(BadConfig, match=f"{list(options)[-1]} is"): replace(PLAIN, **options)


def test_a_plain_network_goes_on_with_the_neck(tmp_path):
    plain, path = build_model(replace(PLAIN, norm="frozen"), seed=3), tmp_path / "plain.safetensors"
    save_model(path, plain, replace(PLAIN, norm="frozen"))
    with_neck = build_model(replace(WITH, weights=str(path)), seed=9)
    assert all(torch.equal(value, with_neck.state_dict()[name]) for name, value in plain.state_dict().items())
    assert with_neck.backbone.correlation.mix[0].weight.abs().sum() > 0
    save_model(path, with_neck, WITH)
    with pytest.raises(BadCheckpoint, match="has 4 tensors .*correlation"): build_model(replace(PLAIN, weights=str(path)))


def test_checkpoints_of_before_the_neck_still_load(tmp_path):
    path, plain = tmp_path / "best.safetensors", build_model(PLAIN)
    save_model(path, plain, PLAIN, {"score_threshold": .4})
    with safe_open(path, framework="pt") as file:
        state, metadata = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())
    options = json.loads(metadata["config"])
    assert options.pop("correlation") == 0 and options.pop("mirrored") is False and options.pop("projection") == 0
    metadata["config"] = json.dumps(options)
    save_file(state, path, metadata | {"checksum": checksum(state, metadata["config"], metadata["extra"])})
    loaded, config, extra = load_model(path)
    assert config.correlation == 0 and extra == {"score_threshold": .4}
    assert same(list(plain.state_dict().values()), list(loaded.state_dict().values()))


def test_a_checkpoint_without_its_neck_is_refused(tmp_path):
    save_model(tmp_path / "best.safetensors", build_model(PLAIN), WITH)
    with pytest.raises(BadCheckpoint, match="lacks 4 tensors"): load_model(tmp_path / "best.safetensors")
