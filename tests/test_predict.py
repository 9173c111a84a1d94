"Predict: bounded memory, figures that fail, the same answer in any company. The network is untrained: it sees regions everywhere."
import gc
import weakref
from dataclasses import replace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import recodai_forgery.predict as predict_room
from recodai_forgery.image import load_image
from recodai_forgery.match import packaged_gate
from recodai_forgery.metric import image_score
from recodai_forgery.model import ModelConfig, build_model, load_model, pick_device, save_model, to_tensor
from recodai_forgery.predict import Detector, PredictConfig, padded_size
from recodai_forgery.regions import worth
from recodai_forgery.rle import decode_regions, encode
from recodai_forgery.submission import predict_folder, read_table, validate_submission
from recodai_forgery.types import AUTHENTIC, BadCheckpoint, BadConfig, BadImage, NotFinite, Region, union

SIZE = 96
SHAPES = [(96, 96), (64, 96), (70, 96), (96, 64), (140, 190), (33, 200), (200, 33), (1, 50), (8, 8), (300, 400), (96, 93)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = ModelConfig("resnet18", size=SIZE, channels=16, anchor_sizes=(8, 16, 32, 48, 64))
    path = tmp_path_factory.mktemp("run") / "best.safetensors"
    save_model(path, build_model(config), config, {"score_threshold": .3, "figure_threshold": .4})
    return path


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    "Figures of all shapes, two of each, numbered from 0."
    folder, rng = tmp_path_factory.mktemp("figures"), np.random.default_rng(0)
    for place, shape in enumerate(2 * SHAPES):
        image = cv2.resize(rng.integers(0, 256, (9, 9, 3)).astype(np.uint8), shape[::-1], interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f"{place}.png"), image)
    return folder


@pytest.fixture
def detector(checkpoint): return Detector(checkpoint, PredictConfig(max_detections=20), device="cpu", method="maskrcnn")


def facts(prediction):
    "Everything that must be the same in a second run."
    return (prediction.shape, prediction.p_forged, prediction.annotation, prediction.note,
            [(region.box, region.score, region.mask.tobytes()) for event in prediction.events for region in event.regions])


def by_id(predictions): return {prediction.case_id: prediction for prediction in predictions}


# ---- the answer ----

def test_every_figure_is_answered_at_its_own_resolution(detector, figures):
    answers = by_id(detector.predict(figures))
    assert sorted(answers, key=int) == [str(place) for place in range(2 * len(SHAPES))]
    assert sum(prediction.annotation != AUTHENTIC for prediction in answers.values()) > len(SHAPES) # or the test sees nothing
    for place, shape in enumerate(2 * SHAPES):
        prediction = answers[str(place)]
        assert prediction.shape == shape and not prediction.failed and prediction.seconds > 0
        regions = decode_regions(prediction.annotation, shape) # strict: refuses what a correct submission would never hold
        assert len(regions) == len(prediction.events) <= 1
        for region, event in zip(regions, prediction.events, strict=True):
            assert (region.full_mask(shape) == union(list(event.regions)).full_mask(shape)).all()
            assert min(part.score for part in event.regions) >= detector.config.score_threshold
            assert prediction.p_forged == max(part.score for part in event.regions)


def test_thresholds_come_from_the_checkpoint_unless_given(checkpoint):
    assert Detector(checkpoint).config == PredictConfig(.3, .4)
    assert Detector(checkpoint, PredictConfig(figure_threshold=.9, batch_size=2)).config == PredictConfig(.3, .9, batch_size=2)


def test_the_gate_holds_back_the_answer_and_keeps_the_events(detector, figures):
    free = detector(figures / "0.png")
    assert free.events and free.annotation != AUTHENTIC
    detector.config = replace(detector.config, figure_threshold=min(1., free.p_forged + .01))
    held = detector(figures / "0.png")
    assert held.annotation == AUTHENTIC and held.p_forged == free.p_forged and len(held.events[0].regions) == len(free.events[0].regions)
    detector.config = replace(detector.config, figure_threshold=free.p_forged)
    assert detector(figures / "0.png").annotation == free.annotation


def test_regions_are_bounded(checkpoint, figures):
    few = Detector(checkpoint, PredictConfig(score_threshold=.1, figure_threshold=.1, max_detections=3), method="maskrcnn")
    assert max(len(prediction.events[0].regions) for prediction in few.predict(figures) if prediction.events) == 3


def test_path_array_and_folder_agree(detector, figures):
    path = figures / "4.png"
    one, array = detector(str(path)), detector(load_image(path))
    assert (one.case_id, array.case_id) == ("4", "") and facts(one) == facts(array)


@pytest.mark.parametrize("array", [np.zeros((9, 9), np.uint8), np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9, 3)),
                                   np.zeros((0, 9, 3), np.uint8)])
def test_arrays_that_are_no_figures(detector, array):
    with pytest.raises(BadImage, match=r"pass \(H, W, 3\) uint8 RGB"): detector(array)


@pytest.mark.parametrize("options", [{"score_threshold": 1.1}, {"figure_threshold": -.1}, {"mask_threshold": "0.5"},
                                     {"mask_threshold": float("nan")},
                                     {"batch_size": 0}, {"batch_size": 2.}, {"max_detections": -1}])
def test_options_outside_of_their_range(options):
    with pytest.raises(BadConfig, match=next(iter(options))): PredictConfig(**options)


def test_damaged_or_missing_checkpoints(tmp_path):
    (tmp_path / "best.safetensors").write_bytes(b"half")
    for path in (tmp_path / "best.safetensors", tmp_path / "none.safetensors"):
        with pytest.raises(BadCheckpoint): Detector(path)


# ---- without a network ----

def test_the_matcher_answers_where_there_is_no_checkpoint(tmp_path):
    "A copied piece of texture is found from a file, as one instance; its twin is authentic; an odd file falls alone."
    texture = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (200, 320, 3), dtype=np.uint8), (0, 0), 1.5)
    texture = cv2.normalize(texture, None, 0, 255, cv2.NORM_MINMAX)
    forged = texture.copy()
    forged[120:180, 220:290] = forged[20:80, 30:100]
    for name, image in (("1", forged), ("2", texture)): Image.fromarray(image).save(tmp_path / f"{name}.png")
    (tmp_path / "3.png").write_text("no image")
    answers = {answer.case_id: answer for answer in Detector().predict(tmp_path)}
    truth = np.zeros((200, 320), bool)
    truth[120:180, 220:290] = truth[20:80, 30:100] = True
    assert image_score(encode([truth]), answers["1"].annotation, (200, 320)) > .9
    assert answers["2"].annotation == "authentic" and answers["2"].p_forged < answers["1"].p_forged
    assert answers["3"].failed and answers["3"].annotation == "authentic"


# ---- the same answer in any company ----

@settings(max_examples=300, deadline=None)
@given(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), st.sampled_from([96, 512, 1000]))
def test_padded_size_is_that_of_the_network(shape, longest):
    height, width = padded_size(shape, longest)
    assert height % 32 == width % 32 == 0 and max(height, width) == -(-longest // 32) * 32


def test_figures_that_share_a_batch_get_the_padding_they_have_alone(detector):
    model, longest = detector.finder.model, detector.finder.config.size
    for shape in SHAPES:
        resized = predict_room.fit_size(shape, longest)
        assert tuple(model.transform([torch.zeros(3, *resized)])[0].tensors.shape[2:]) == detector.finder.batch_key(shape)


def test_the_order_of_files_changes_no_bit(detector, figures):
    files = sorted(figures.iterdir())
    first = [(prediction.case_id, *facts(prediction)) for prediction in detector.predict(figures)]
    for seed in range(2):
        shuffled = np.random.default_rng(seed).permutation(files).tolist()
        assert [(prediction.case_id, *facts(prediction)) for prediction in detector.predict(shuffled)] == first


def test_batch_size_and_company_change_no_answer(detector, figures):
    "Scores to 1e-5; masks but for pixels on an edge (none on the machines seen so far, but a library may add up in another order)."
    reference = None
    for batch_size in (1, 3, 16):
        detector.config = replace(detector.config, batch_size=batch_size)
        answers = by_id(detector.predict(figures))
        reference = reference or answers
        for name, prediction in answers.items():
            other = reference[name]
            assert abs(prediction.p_forged - other.p_forged) < 1e-5
            assert len(prediction.events) == len(other.events)
            for event, same in zip(prediction.events, other.events, strict=True):
                ours, theirs = event.region.full_mask(prediction.shape), same.region.full_mask(prediction.shape)
                assert (ours ^ theirs).sum() <= .01 * theirs.sum()


# ---- bounded memory ----

def test_no_more_than_one_batch_of_figures_is_held(detector, figures, monkeypatch):
    alive, most, batch_size = [], 0, 2

    def watched(path):
        nonlocal most
        image = load_image(path)
        alive.append(weakref.ref(image))
        if sum(image() is not None for image in alive) > batch_size: gc.collect()
        most = max(most, sum(image() is not None for image in alive))
        return image

    monkeypatch.setattr(predict_room, "load_image", watched)
    detector.config = replace(detector.config, batch_size=batch_size)
    assert sum(1 for _ in detector.predict(figures)) == len(alive) == 2 * len(SHAPES)
    assert most <= batch_size


# ---- figures that fail ----

def odd_files(folder):
    "Files that are no figures, by name."
    whole = cv2.imencode(".png", np.random.default_rng(0).integers(0, 256, (96, 96, 3)).astype(np.uint8))[1].tobytes()
    odd = {"empty.png": b"", "text.png": b"authentic", "half.png": whole[:len(whole) // 2], "head.png": whole[:40],
           "wrong.jpg": b"\x00" * 500, "flipped.png": whole[:9000] + bytes([whole[9000] ^ 255]) + whole[9001:]}
    for name, data in odd.items(): (folder / name).write_bytes(data)
    (folder / "folder.png").mkdir()
    cv2.imwrite(str(folder / "good.png"), np.full((96, 96, 3), 90, np.uint8))
    return [*(folder / name for name in odd), folder / "folder.png", folder / "missing.png", folder / "good.png"]


def test_odd_files_become_authentic_with_a_note(detector, tmp_path):
    files = odd_files(tmp_path)
    answers = by_id(detector.predict(files))
    assert len(answers) == len(files) and [name for name in answers if not answers[name].failed] == ["good"]
    for path in files[:-1]:
        assert answers[path.stem].annotation == AUTHENTIC and path.name in answers[path.stem].note
        with pytest.raises(BadImage): detector(path) # one figure asked for by name is an error


class Sabotage:
    "Fails on figures of one colour, in the middle of the network, as real faults do."
    def __init__(self, detector, fail):
        self.calls = []
        self.handle = detector.finder.model.backbone.register_forward_hook(self.hook)
        self.fail = fail

    def hook(self, backbone, inputs, levels):
        red = (inputs[0][:, 0] > 2.1).flatten(1).all(dim=1) # normalised: figures that are all red
        self.calls.append(len(red))
        if red.any(): self.fail(levels, red)
        return levels


def overflow(levels, which):
    for level in levels.values(): level[which] = float("inf")


def cpu_memory(levels, which): torch.empty(1 << 55)


def cuda_memory(levels, which): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def python_memory(levels, which): raise MemoryError


@pytest.mark.parametrize("fail, words", [(overflow, "NotFinite"), (cpu_memory, "MemoryError: out of memory on cpu"),
                                         (cuda_memory, "Tried to allocate 20.00 GiB"), (python_memory, "MemoryError")])
def test_only_the_culprit_of_a_batch_falls(detector, tmp_path, fail, words):
    colours = {"0": (40, 90, 160), "1": (200, 90, 60), "2": (0, 0, 255), "3": (90, 90, 90), "4": (10, 200, 100)} # BGR: figure 2 is red
    for name, colour in colours.items(): cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((96, 96, 3), colour, np.uint8))
    detector.config = replace(detector.config, batch_size=5)
    before = by_id(detector.predict(tmp_path))
    assert not any(prediction.failed for prediction in before.values())
    sabotage = Sabotage(detector, fail)
    after = by_id(detector.predict(tmp_path))
    assert sabotage.calls == [5, 1, 1, 1, 1, 1]
    assert [name for name in after if after[name].failed] == ["2"]
    assert words in after["2"].note and "2.png" in after["2"].note
    assert after["2"].annotation == AUTHENTIC and after["2"].shape == (96, 96)
    for name in set(colours) - {"2"}: assert abs(after[name].p_forged - before[name].p_forged) < 1e-5
    with pytest.raises((NotFinite, MemoryError)): detector(tmp_path / "2.png")


def test_a_fault_of_the_program_is_not_a_figure_that_fails(detector, tmp_path):
    def bug(levels, which): raise RuntimeError("shape mismatch")
    for name in ("0", "1"): cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((96, 96, 3), (0, 0, 255), np.uint8))
    Sabotage(detector, bug)
    with pytest.raises(RuntimeError, match="shape mismatch"): list(detector.predict(tmp_path))


# ---- the device ----

@pytest.mark.parametrize("gpu, capability, device", [
    (False, None, "cpu"), (True, (7, 5), "cuda"), (True, (6, 0), "cpu"), (True, (9, 0), "cuda")])
def test_a_gpu_that_torch_was_not_built_for_is_left_alone(monkeypatch, recwarn, gpu, capability, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla P100-PCIE-16GB")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"])
    assert pick_device().type == device
    assert [("P100" in str(warning.message)) for warning in recwarn] == ([True] if gpu and device == "cpu" else [])


# ---- from a folder to a submission ----

def test_folder_to_submission(detector, figures, tmp_path):
    folder = tmp_path / "figures"
    folder.mkdir()
    files = odd_files(folder)[:-2] # without the one that is missing
    for name in ("007", "8"): (folder / f"{name}.png").write_bytes((figures / "0.png").read_bytes())
    ids = ["8", "half", "empty", "007", "100", "text"]
    sample = pd.DataFrame({"case_id": ids, "annotation": AUTHENTIC})
    summary = predict_folder(folder, tmp_path / "submission.csv", detector, sample, progress=False)
    assert (summary.figures, summary.forged, sorted(summary.failed)) == (5, 2, ["empty", "half", "text"])
    assert summary.without_figure == ("100",) and "good" in summary.not_in_sample and len(summary.not_in_sample) == len(files) - 4 + 1
    table = read_table(tmp_path / "submission.csv")
    assert table.case_id.tolist() == ids
    assert (table.annotation == AUTHENTIC).tolist() == [False, True, True, False, True, True]
    problems = validate_submission(tmp_path / "submission.csv", sample, folder)
    assert problems == [] and problems.notes == []


def test_figures_of_the_benchmark(detector, shared, tmp_path):
    bench = shared / "bench" / "dev"
    files = sorted((bench / "train_images" / "forged").iterdir())[:12]
    summary = predict_folder(files, tmp_path / "submission.csv", detector, progress=False)
    assert summary.figures == 12 and summary.failed == {} and summary.forged > 0
    assert validate_submission(tmp_path / "submission.csv", None, (bench / "train_images" / "forged")) == []


# ---- methods ----

def test_hybrid_asks_the_network_where_the_matcher_has_no_answer(checkpoint, figures, tmp_path):
    rng = np.random.default_rng(0)
    photograph = cv2.GaussianBlur(rng.integers(0, 256, (240, 320, 3)).astype(np.uint8), (0, 0), 1.2)
    photograph[150:210, 200:290] = photograph[20:80, 30:120]
    hybrid = Detector(checkpoint, PredictConfig(max_detections=20), "cpu")
    alone = {method: Detector(checkpoint if method == "maskrcnn" else None, PredictConfig(max_detections=20), "cpu", method) for method in ("match", "maskrcnn")}
    assert hybrid(photograph).annotation == Detector()(photograph).annotation != AUTHENTIC
    image = load_image(figures / "0.png")
    assert alone["match"](image).annotation == AUTHENTIC # smooth: nothing to match
    assert hybrid(image).annotation == alone["maskrcnn"](image).annotation != AUTHENTIC
    look, = hybrid.finder.network.look([image], hybrid.config)
    assert hybrid(image).p_forged == worth(packaged_gate(), look, alone["maskrcnn"](image).p_forged) > .5
    assert hybrid.hurried()(photograph).annotation == alone["maskrcnn"](photograph).annotation and alone["maskrcnn"].hurried() is None


def test_a_network_that_compares_says_where_the_like_of_each_region_is(tmp_path):
    config = ModelConfig("resnet18", size=128, channels=16, anchor_sizes=(8, 16, 32, 48, 64), correlation=32)
    save_model(tmp_path / "best.safetensors", build_model(config), config)
    rng, options = np.random.default_rng(0), PredictConfig(.5, .5, max_detections=5)
    image = cv2.GaussianBlur(rng.integers(0, 256, (128, 96, 3)).astype(np.uint8), (0, 0), 1.2)
    image[70:110, 50:90] = image[10:50, 6:46]
    hybrid = Detector(tmp_path / "best.safetensors", device="cpu")
    images = [image[:, ::-1].copy(), image]
    hybrid.finder.network.regions = lambda *_: hybrid.finder.network.model.eval()([to_tensor(one) for one in images]) and [[Region((6, 10, 46, 50), np.ones((40, 40)))]] * 2
    with torch.inference_mode(): mirrored, plain = hybrid.finder.network.look(images, options)
    assert np.allclose(plain.matches[0].offset, (44, 60), atol=6) and plain.matches[0].support > .5
    assert mirrored.matches[0] is None or mirrored.matches[0].support < .5 # the other figure's own field
    assert not any(part._forward_pre_hooks for part in hybrid.finder.network.model.modules())


def test_a_gate_of_ones_own_decides(checkpoint, tmp_path):
    from recodai_forgery.gate import load_gate, save_gate
    rng = np.random.default_rng(0)
    photograph = cv2.GaussianBlur(rng.integers(0, 256, (240, 320, 3)).astype(np.uint8), (0, 0), 1.2)
    photograph[150:210, 200:290] = photograph[20:80, 30:120]
    gate = load_gate()
    save_gate(replace(gate, figure=(gate.figure[0], -50.)), tmp_path / "never.json") # P(forged) is zero, whatever there is
    assert Detector()(photograph).annotation != AUTHENTIC
    assert Detector(gate=tmp_path / "never.json")(photograph).annotation == AUTHENTIC
    with pytest.raises(BadConfig, match="has no gate"): Detector(checkpoint, method="maskrcnn", gate=tmp_path / "never.json")
    with pytest.raises(BadConfig, match="holds no gate"): Detector(gate=checkpoint.parent)
    for method, weights in ("match", checkpoint), ("maskrcnn", None), ("guess", None):
        with pytest.raises(BadConfig): Detector(weights, method=method)


@pytest.mark.parametrize(("gain", "counts"), [(.05, False), (.15, True)])
def test_a_network_that_gained_little_in_validation_is_no_answer_by_itself(tiny_checkpoint, tmp_path, gain, counts):
    model, config, extra = load_model(tiny_checkpoint)
    save_model(tmp_path / "best.safetensors", model, config, extra | {"score_threshold": .01, "figure_threshold": .01, "oF1": .5 + gain, "all_authentic": .5})
    image = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (120, 160, 3)).astype(np.uint8), (0, 0), 1.5)
    both, alone = (Detector(tmp_path / "best.safetensors", device="cpu", method=method) for method in ("hybrid", "maskrcnn"))
    assert Detector()(image).annotation == "authentic" != alone(image).annotation
    assert (both(image).annotation != "authentic") == counts
    assert isinstance(both.hurried().finder, type(alone.finder) if counts else type(Detector().finder))
    told = Detector(tmp_path / "best.safetensors", PredictConfig(figure_threshold=.01), "cpu", "hybrid")
    assert told(image).annotation != "authentic"
