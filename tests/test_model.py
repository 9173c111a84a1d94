"""What a lesson of 06_model cannot say: every backbone offline as in training, torchvision as the judge, damaged files in bulk."""
import json
import pickle
import socket
from collections import Counter
from dataclasses import replace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchvision.models.detection import maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.roi_heads import paste_masks_in_image

from recodai_forgery.image import resize_image
from recodai_forgery.model import (
    BACKBONES,
    ModelConfig,
    build_model,
    checksum,
    detect,
    detect_batch,
    load_model,
    make_backbone,
    paste_masks,
    pick_device,
    save_model,
    settle,
    to_tensor,
)
from recodai_forgery.types import BadCheckpoint, BadConfig, ForgeryError, WeightsUnavailable

HUB = "load_state_dict_from_url"
SMALL = ModelConfig("resnet18", size=128, channels=8, anchor_sizes=(8, 16, 32, 64, 128))
SLIM = replace(SMALL, backbone="mobilenet_v2")


def figure(height=96, width=128, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def some_statistics(state, seed=0):
    "Batch statistics as a trained network has them, so that a wrong epsilon or a skipped layer shows."
    generator = torch.Generator().manual_seed(seed)
    variance = lambda value: torch.rand(value.shape, generator=generator) * .2 + .05
    return {name: variance(value) if name.endswith("running_var") else value for name, value in state.items()}


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs): raise URLError("no network")
    monkeypatch.setattr(torchvision.models._api, HUB, refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.fixture
def hub(monkeypatch):
    "What torchvision's hub would send, made here: a trained-looking state dict for each published file."
    def send(url, **options):
        assert options["check_hash"]
        with torch.random.fork_rng():
            torch.manual_seed(1)
            if "maskrcnn_resnet50_fpn_v2" in url: network = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None)
            elif "maskrcnn" in url: network = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
            else: network = torchvision.models.get_model(url.split("/")[-1].rsplit("-", 1)[0], weights=None)
        return some_statistics(network.state_dict())
    monkeypatch.setattr(torchvision.models._api, HUB, send)


# ---------------------------------------------------------------- one function for training and for the machine without a network

@pytest.mark.parametrize(("backbone", "heads", "weights"), [
    *((name, "v1", "imagenet") for name in BACKBONES), *((name, "v1", "none") for name in BACKBONES if name != "resnet50"),
    ("resnet50", "v1", "coco"), ("resnet50", "v2", "coco"), ("mobilenet_v2", "v2", "none")])
def test_offline_build_is_the_training_build(backbone, heads, weights, hub, monkeypatch, tmp_path):
    config = ModelConfig(backbone, 96, weights, heads, channels=256 if weights == "coco" else 8)
    trained = build_model(config, seed=3)
    learns = [weight.requires_grad for weight in trained.parameters()]
    with torch.no_grad(): # a step of training: nothing is at its first value any more
        for weight in trained.parameters(): weight += .001 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    save_model(tmp_path / "best.safetensors", trained, config, {"score_threshold": .3})

    def refuse(*args, **kwargs): raise AssertionError("the hub was asked")
    monkeypatch.setattr(torchvision.models._api, HUB, refuse)
    random_state = torch.get_rng_state()
    offline, saved, extra = load_model(tmp_path / "best.safetensors")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert saved == replace(settle(config), weights="none") and extra == {"score_threshold": .3} and not offline.training
    assert [weight.requires_grad for weight in offline.parameters()] == learns
    ours, theirs = offline.state_dict(), trained.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    trained.eval()
    with torch.inference_mode():
        pyramids = [network.backbone(to_tensor(figure(96, 64))[None]) for network in (trained, offline)]
        found = [network([to_tensor(figure(96, 64))])[0] for network in (trained, offline)]
    assert all(torch.equal(pyramids[0][level], pyramids[1][level]) for level in pyramids[0])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(("heads", "factory"), [("v1", maskrcnn_resnet50_fpn), ("v2", maskrcnn_resnet50_fpn_v2)])
def test_coco_weights_give_the_features_of_torchvision(heads, factory, hub):
    "The first weights need epsilon 0 in every frozen layer, which is in no state dict."
    ours, theirs = build_model(ModelConfig("resnet50", weights="coco", heads=heads)).eval(), factory(weights="COCO_V1").eval()
    picture = torch.rand(1, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        one, other = ours.backbone(picture), theirs.backbone(picture)
        proposed = [network.rpn.head(list(pyramid.values())) for network, pyramid in ((ours, one), (theirs, other))]
    equal = torch.equal if heads == "v1" else lambda a, b: torch.allclose(a, b, rtol=1e-3, atol=1e-4) # frozen or batch norm: rounding
    assert all(equal(one[level], other[level]) for level in one)
    assert all(equal(a, b) for half in range(2) for a, b in zip(proposed[0][half], proposed[1][half], strict=True))
    assert torch.equal(ours.roi_heads.mask_head[0][0].weight, theirs.roi_heads.mask_head[0][0].weight)
    assert ours.roi_heads.box_predictor.cls_score.out_features == 2


@pytest.mark.parametrize("backbone", BACKBONES)
def test_frozen_body_is_the_published_classifier(backbone, hub):
    config = ModelConfig(backbone, weights="imagenet", channels=8)
    body = build_model(config).backbone.body
    published = torchvision.models.get_model(backbone, weights=None)
    published.load_state_dict(torchvision.models._api.load_state_dict_from_url(f"{backbone}-0.pth", check_hash=True))
    published.eval()
    layers, picture = getattr(published, "features", published), torch.rand(1, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        levels, expected = body(picture), picture
        for name in body: expected = layers.get_submodule(name)(expected)
    assert torch.allclose(levels["3"], expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(("heads", "factory"), [("v1", maskrcnn_resnet50_fpn), ("v2", maskrcnn_resnet50_fpn_v2)])
def test_same_layers_as_torchvision(heads, factory):
    "Names and shapes, so that published weights fit; only what knows the classes is smaller."
    theirs = {name: value.shape for name, value in factory(weights=None, weights_backbone=None, num_classes=2).state_dict().items()}
    ours = {name: value.shape for name, value in build_model(ModelConfig("resnet50", heads=heads, norm="batch")).state_dict().items()}
    assert ours == theirs


def test_trainable_layers_as_in_torchvision():
    for layers in range(6):
        theirs = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=layers)
        ours = make_backbone(settle(replace(SMALL, norm="frozen", trainable_layers=layers)))
        frozen = {name for name, weight in theirs.body.named_parameters() if not weight.requires_grad}
        assert {name for name, weight in ours.body.named_parameters() if not weight.requires_grad} == frozen


# ---------------------------------------------------------------- weights

def test_shared_backbone_loads_strictly(shared, no_network):
    path = shared / "weights" / "mobilenet_v2_features.safetensors"
    body = build_model(ModelConfig(weights=str(path), channels=8)).backbone.body
    state = {name: value for name, value in load_file(path).items() if not name.endswith("num_batches_tracked")}
    assert body.state_dict().keys() == state.keys() and all(torch.equal(body.state_dict()[name], state[name]) for name in state)
    with torch.inference_mode(): # trained, not only loaded: the last features of a picture are neither flat nor huge
        deep = body(torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0)))["3"]
    assert .01 < deep.std() < 10


@pytest.mark.parametrize("config", [ModelConfig(backbone, weights=weights) for backbone, weights in
                                    [("mobilenet_v2", "imagenet"), ("resnet50", "imagenet"), ("resnet50", "coco")]])
def test_hub_out_of_reach(config, no_network):
    message = r"-[0-9a-f]{8}\.pth: .*download https://.* pass its path .* weights=\"none\""
    with pytest.raises(WeightsUnavailable, match=message): build_model(config)


def test_file_of_every_kind(tmp_path, hub):
    "A body, a classifier, a detector with other classes, one of our own: all give the same body."
    classifier = some_statistics(torchvision.models.resnet18(weights=None).state_dict())
    body = {name: value for name, value in classifier.items() if not name.startswith("fc.")}
    own = build_model(replace(SMALL, norm="frozen"))
    own.backbone.body.load_state_dict(body)
    detector = dict(own.state_dict())
    detector["roi_heads.box_predictor.cls_score.weight"] = torch.zeros(91, 32)
    torch.save(classifier, tmp_path / "classifier.pth")
    save_file({name: value.contiguous() for name, value in body.items()}, tmp_path / "body.safetensors")
    torch.save(detector, tmp_path / "detector.pth")
    save_model(tmp_path / "own.safetensors", own, SMALL)
    for path in tmp_path.iterdir():
        model = build_model(replace(SMALL, weights=str(path)), seed=9)
        assert all(torch.equal(value, body[name]) for name, value in model.backbone.body.state_dict().items()), path
        whole = path.name in ("detector.pth", "own.safetensors")
        assert torch.equal(model.rpn.head.cls_logits.weight, own.rpn.head.cls_logits.weight) == whole
        classes = model.roi_heads.box_predictor.cls_score.weight
        assert torch.equal(classes, own.roi_heads.box_predictor.cls_score.weight) == (path.name == "own.safetensors")


def test_files_that_are_no_weights(tmp_path):
    class Code:
        def __reduce__(self): return (open, (str(tmp_path / "written"), "w"))
    good = tmp_path / "good.pth"
    torch.save({"conv1.weight": torch.zeros(3)}, good)
    bad = {"empty.pth": b"", "text.pth": b"not a checkpoint", "truncated.pth": good.read_bytes()[:-50], "code.pth": pickle.dumps(Code()),
           "list.pth": pickle.dumps([1, 2]), "text.safetensors": b"x" * 100, "shape.pth": good.read_bytes()}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadCheckpoint, match=name): build_model(replace(SMALL, weights=str(tmp_path / name)))
    assert not (tmp_path / "written").exists()
    with pytest.raises(WeightsUnavailable, match="no such file"): build_model(replace(SMALL, weights=str(tmp_path / "missing.pth")))


@pytest.mark.parametrize("options", [
    {"backbone": "vgg"}, {"size": 0}, {"size": "512"}, {"size": True}, {"heads": "v3"}, {"norm": "instance"}, {"weights": ""},
    {"anchor_sizes": (16, 32)}, {"anchor_sizes": (16, 32, 64, 128, 0)}, {"detections": 0}, {"trainable_layers": 6}, {"channels": 10 ** 9},
    {"norm_eps": -1}, {"norm_eps": "0"}, {"weights": "coco"},
    {"backbone": "resnet50", "weights": "coco", "channels": 64}, {"weights": "imagenet", "norm": "group"}])
def test_refused_options(options):
    with pytest.raises(BadConfig): ModelConfig(**options)


# ---------------------------------------------------------------- checkpoints

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "best.safetensors"
    save_model(path, build_model(SLIM), SLIM, {"score": .5})
    return path


def rewritten(source, path, change):
    "A checkpoint with other tensors or metadata, and the checksum right."
    with safe_open(source, framework="pt") as file:
        state, metadata = change({name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata()))
    if "checksum" in metadata: metadata["checksum"] = checksum(state, metadata["config"], metadata["extra"])
    save_file(state, path, metadata)
    return path


def with_option(metadata, **options): return metadata | {"config": json.dumps(json.loads(metadata["config"]) | options)}


CHANGES = {
    "lacks 1 tensors": lambda state, metadata: ({name: state[name] for name in state if name != "rpn.head.cls_logits.bias"}, metadata),
    "has 1 tensors": lambda state, metadata: (state | {"left.over": torch.zeros(1)}, metadata),
    "of another shape": lambda state, metadata: (state | {"rpn.head.cls_logits.bias": torch.zeros(4)}, metadata),
    "or type": lambda state, metadata: (state | {"rpn.head.cls_logits.bias": torch.zeros(3, dtype=torch.int32)}, metadata),
    "no options": lambda state, metadata: (state, {"format": "pt"}),
    "has no option depth": lambda state, metadata: (state, with_option(metadata, depth=3)),
    "size is 'big'": lambda state, metadata: (state, with_option(metadata, size="big")),
    "is not JSON": lambda state, metadata: (state, metadata | {"config": "{"}),
    "cannot be read": lambda state, metadata: (state, metadata | {"extra": "{"}),
}


@pytest.mark.parametrize("message", CHANGES)
def test_checkpoint_of_another_model(checkpoint, tmp_path, message):
    path = rewritten(checkpoint, tmp_path / "other.safetensors", CHANGES[message])
    with pytest.raises(BadCheckpoint, match=message) as caught: load_model(path)
    assert "other.safetensors" in str(caught.value)


def test_damaged_checkpoints_in_bulk(checkpoint, tmp_path):
    "Cut anywhere, or any bit of it flipped: an error that names the file. Bits that JSON leaves free leave the very same network."
    whole, rng, path = checkpoint.read_bytes(), np.random.default_rng(0), tmp_path / "damaged.safetensors"
    header = 8 + int.from_bytes(whole[:8], "little")
    model, *reference = load_model(checkpoint)
    damages = [whole[:size] for size in [0, 1, 7, 8, 100, header - 1, header, len(whole) - 1, *rng.integers(0, len(whole), 5)]]
    damages.append(whole + b"\0")
    for position in [*range(8), *rng.integers(8, 1000, 30), *rng.integers(8, header, 60), *rng.integers(header, len(whole), 20)]:
        flipped = bytearray(whole)
        flipped[position] ^= 1 << int(rng.integers(8))
        damages.append(bytes(flipped))
    refused = 0
    for damaged in damages:
        path.write_bytes(damaged)
        try: loaded, *rest = load_model(path)
        except BadCheckpoint as problem: refused += "damaged.safetensors" in str(problem)
        else:
            assert rest == reference and checksum(loaded.state_dict()) == checksum(model.state_dict())
            refused += 1
    assert refused == len(damages)
    with pytest.raises(BadCheckpoint, match="missing.safetensors"): load_model(tmp_path / "missing.safetensors")
    with pytest.raises(BadCheckpoint): load_model(tmp_path)


def test_no_pickle_on_the_way_in(checkpoint, monkeypatch):
    def refuse(*args, **kwargs): raise AssertionError("pickle was used")
    for name in ("load", "loads", "Unpickler"): monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    load_model(checkpoint)


# ---------------------------------------------------------------- detection

sides = st.floats(-40, 160, width=32)


@settings(max_examples=200, deadline=None)
@given(corners=st.tuples(sides, sides, sides, sides), shape=st.tuples(st.integers(1, 90), st.integers(1, 90)), seed=st.integers(0, 99),
       threshold=st.sampled_from([.3, .5, .7]))
def test_pasted_masks_are_those_of_torchvision(corners, shape, seed, threshold):
    x0, x1, y0, y1 = *sorted(corners[:2]), *sorted(corners[2:])
    boxes, grid = torch.tensor([[x0, y0, x1, y1]]), torch.rand(1, 28, 28, generator=torch.Generator().manual_seed(seed))
    if x0 >= shape[1] or y0 >= shape[0] or x1 + 3 < 0 or y1 + 3 < 0: return # torchvision cannot paste what lies outside
    try: theirs = paste_masks_in_image(grid[:, None], boxes, shape)[0, 0].numpy() >= threshold
    except RuntimeError: return
    ours = paste_masks(grid, boxes, torch.ones(1), shape, threshold)
    assert len(ours) == theirs.any()
    if ours: assert np.array_equal(ours[0].full_mask(shape), theirs)


def test_detections_are_those_of_torchvision():
    "Two figures of unlike shape in one batch, at the network's own size: boxes, scores and masks of torchvision's forward, bit for bit."
    model, images = build_model(SMALL, seed=2).eval(), [figure(96, 128), figure(128, 80, 1)]
    with torch.inference_mode(): theirs = model([to_tensor(image) for image in images])
    faults = Counter()
    ours = detect(model, images, 128, score_threshold=0, max_detections=100, faults=faults)
    assert faults["not finite"] == 0
    for regions, expected, image in zip(ours, theirs, images, strict=True):
        masks = expected["masks"][:, 0].numpy() >= .5
        drawn = masks.any((1, 2))
        assert [region.score for region in regions] == expected["scores"][drawn].tolist() and len(regions) > 3
        assert all(np.array_equal(region.full_mask(image.shape[:2]), mask) for region, mask in zip(regions, masks[drawn], strict=True))


def test_detections_at_the_figures_own_resolution():
    model, image = build_model(SMALL, seed=2), figure(300, 410)
    regions, = detect(model, [image], 128, max_detections=20)
    assert model.training and 10 < len(regions) <= 20 and max(region.box[2] for region in regions) > 128
    assert [region.score for region in regions] == sorted((region.score for region in regions), reverse=True)
    again, = detect_batch(model.eval(), [to_tensor(resize_image(image, 128))], [(300, 410)], max_detections=20)
    assert [(region.box, region.score) for region in again] == [(region.box, region.score) for region in regions]
    few, = detect(model, [image], 128, score_threshold=regions[4].score)
    assert [region.box for region in few] == [region.box for region in regions if region.score >= regions[4].score]
    assert detect(model, [], 128) == []


def test_figures_that_are_hardly_there():
    model = build_model(SMALL)
    for shape in [(1, 1), (1, 128), (128, 1), (2000, 3), (128, 36)]:
        regions, = detect(model, [figure(*shape)], 128)
        assert all(0 <= region.box[0] < region.box[2] <= shape[1] and 0 <= region.box[1] < region.box[3] <= shape[0] for region in regions)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", ["backbone.body.conv1.weight", "backbone.fpn.layer_blocks.3.0.bias",
                                   "roi_heads.box_predictor.cls_score.bias", "roi_heads.box_predictor.bbox_pred.weight"])
def test_not_finite_gives_no_detections(layer, value):
    model, faults = build_model(SMALL), Counter()
    with torch.no_grad(): model.get_parameter(layer).flatten()[-1] = value
    assert detect(model, [figure(), figure(80, 128)], 128, faults=faults) == [[], []]
    assert faults == {"not finite": 2}


def test_one_broken_figure_leaves_its_neighbour_alone():
    model, faults = build_model(SMALL).eval(), Counter()
    images = [to_tensor(figure(seed=seed)) for seed in range(2)]
    alone = detect_batch(model, images, [(96, 128)] * 2)
    images[0] = torch.full_like(images[0], float("nan"))
    nothing, beside = detect_batch(model, images, [(96, 128)] * 2, faults=faults)
    assert nothing == [] and faults == {"not finite": 1}
    assert [(region.box, region.score) for region in beside] == [(region.box, region.score) for region in alone[1]]


def test_narrow_figures_do_not_move_the_strides():
    "torchvision reads the strides from the height of the first batch and keeps them."
    model, fresh, image = build_model(SMALL), build_model(SMALL), figure(128, 128)
    detect(model, [figure(36, 128)], 128)
    one, other = detect(model, [image], 128)[0], detect(fresh, [image], 128)[0]
    assert [(region.box, region.score) for region in one] == [(region.box, region.score) for region in other]


def test_half_empty_and_empty_batches_train():
    model, image = build_model(SMALL), to_tensor(figure())
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": torch.zeros(0, 96, 128, dtype=torch.uint8)}
    masks = torch.zeros(1, 96, 128, dtype=torch.uint8)
    masks[0, 5, 7] = 1
    pixel = {"boxes": torch.tensor([[7., 5, 8, 6]]), "labels": torch.ones(1, dtype=torch.int64), "masks": masks}
    for targets in ([empty, empty], [pixel, empty], [pixel, pixel]):
        loss = sum(model([image, image], targets).values())
        model.zero_grad()
        loss.backward()
        assert loss.isfinite() and all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)


def test_gpu_without_kernels_falls_back_aloud(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla P100")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_70", "sm_75", "compute_90"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 0))
    with pytest.warns(UserWarning, match="Tesla P100"): assert pick_device().type == "cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert pick_device().type == "cuda" and pick_device("cpu").type == "cpu"


def test_every_error_is_ours(): assert issubclass(BadCheckpoint, ForgeryError) and issubclass(WeightsUnavailable, ForgeryError)
