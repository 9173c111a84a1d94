"""What lessons of 07_state, 07_thresholds and 07_train cannot say: resuming to the last bit, runs that die, thresholds by brute force, a network that learns."""
import copy
import csv
import itertools
import json
import math
import multiprocessing
import pickle
import shutil
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from typer.testing import CliRunner

import recodai_forgery.compiled as compiled
import recodai_forgery.train as training
from recodai_forgery.cases import index_tree
from recodai_forgery.cli import app
from recodai_forgery.data import ForgeryDataset, make_loader
from recodai_forgery.image import load_image, resize_image
from recodai_forgery.metric import image_score
from recodai_forgery.model import ModelConfig, build_model, detect, group_regions, load_model, to_tensor
from recodai_forgery.rle import encode
from recodai_forgery.state import PARTS, random_state, read_run, save_run
from recodai_forgery.thresholds import (
    THRESHOLDS,
    annotation,
    fixed_draws,
    judge,
    score_at,
    tune_thresholds,
    validate,
    validation_losses,
)
from recodai_forgery.train import (
    PRESETS,
    SHORTEST_WARMUP,
    LossWatch,
    Run,
    TrainConfig,
    follow,
    learning_rate,
    make_optimizer,
    train,
    train_epoch,
    train_step,
)
from recodai_forgery.types import AUTHENTIC, BadCheckpoint, BadConfig, BadTree, NotFinite, Region

MODEL = ModelConfig("mobilenet_v2", size=64, channels=8, anchor_sizes=(8, 16, 32, 64, 128), detections=20, samples=16)
TIMES = {"seconds": 0, "validation_seconds": 0}
TRAIN = TrainConfig(epochs=2, batch_size=2, learning_rate=.04, workers=0, validation_fraction=.34)


def write_tree(root, figures, shape=(96, 128), seed=0):
    "Nuclei on a pink ground; in the forged twin a disc shows twice."
    rng, (row, column) = np.random.default_rng(seed), np.mgrid[:shape[0], :shape[1]]
    for part in ("train_images/authentic", "train_images/forged", "train_masks"): (root / part).mkdir(parents=True)
    for number in range(figures):
        figure = np.tile(np.uint8([236, 196, 218]), (*shape, 1))
        for y, x, r in zip(rng.integers(4, shape[0] - 4, 40), rng.integers(4, shape[1] - 4, 40), rng.uniform(2, 6, 40), strict=True):
            figure[np.hypot(row - y, column - x) < r] = np.array([110, 80, 160]) + rng.integers(-30, 30, 3)
        cv2.imwrite(str(root / f"train_images/authentic/{number}.png"), figure[..., ::-1])
        disc, mask = np.hypot(*np.mgrid[-14:15, -14:15]) < 14, np.zeros((1, *shape), np.uint8)
        figure[40:69, 80:109][disc] = figure[30:59, 20:49][disc].copy()
        for y, x in ((30, 20), (40, 80)): mask[0, y:y + 29, x:x + 29] |= disc
        cv2.imwrite(str(root / f"train_images/forged/{number}.png"), figure[..., ::-1])
        np.save(root / f"train_masks/{number}.npy", mask)
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory): return write_tree(tmp_path_factory.mktemp("data") / "tree", 3)


@pytest.fixture(scope="module")
def straight(tree, tmp_path_factory):
    "A run that was never stopped."
    out = tmp_path_factory.mktemp("runs") / "straight"
    assert train(tree, out, MODEL, TRAIN, progress=False) == out / "best.safetensors"
    return out


def equal(one, other):
    "Whether two states are the same, to the last bit of every tensor."
    if isinstance(one, torch.Tensor): return torch.equal(one, other)
    if isinstance(one, dict): return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)): return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def last(run):
    state = torch.load(run / "last.pt", weights_only=True)
    for row in state["history"]: row.pop("seconds"), row.pop("validation_seconds")
    state["position"].pop("seconds")
    return state


# ---------------------------------------------------------------- resume

def test_two_epochs_are_one_and_resume_and_one(tree, straight, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "agreed", lambda late: (tmp_path / "last.pt").exists()) # the time is over once an epoch is saved
        train(tree, tmp_path, MODEL, replace(TRAIN, max_hours=1), progress=False)
    assert len(last(tmp_path)["history"]) == 1 and last(tmp_path)["position"]["batches"] == 0
    torch.rand(7), np.random.rand(7) # another process would not stand where this one stands
    train(tree, tmp_path, MODEL, TRAIN, resume=True, progress=False)
    one, other = last(straight), last(tmp_path)
    assert one["optimizer"]["state"] and one.keys() == set(PARTS)
    for part in one: assert equal(one[part], other[part]), part
    (a, *rest), (b, *others) = load_model(straight / "best.safetensors"), load_model(tmp_path / "best.safetensors")
    assert equal(a.state_dict(), b.state_dict()) and rest[0] == others[0] and rest[1] | TIMES == others[1] | TIMES
    train(tree, tmp_path, MODEL, TRAIN, resume=True, progress=False) # nothing is left to do
    assert equal(last(tmp_path), other)


def test_a_run_that_dies_goes_on(tree, straight, tmp_path, monkeypatch):
    "Stopped between two updates of the second epoch, with workers, which change nothing."
    steps, step = [], train_step
    def dying(*arguments):
        if len(steps) == 3: raise KeyboardInterrupt
        steps.append(0)
        return step(*arguments)
    monkeypatch.setattr(training, "train_step", dying)
    with pytest.raises(KeyboardInterrupt): train(tree, tmp_path, MODEL, replace(TRAIN, workers=1), progress=False)
    monkeypatch.setattr(training, "train_step", step)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "tensorboard") == ["best.safetensors", "config.json", "curves.png", "last.pt", "log.csv"]
    train(tree, tmp_path, MODEL, TRAIN, resume=True, progress=False)
    assert equal(last(straight), last(tmp_path))


def test_another_seed_is_another_run(tree, straight, tmp_path):
    train(tree, tmp_path, MODEL, replace(TRAIN, seed=1, epochs=1), progress=False)
    assert not equal(last(straight)["model"], last(tmp_path)["model"])


def test_resume_with_other_options_is_refused(tree, straight):
    before = (straight / "last.pt").read_bytes()
    with pytest.raises(BadConfig, match="resume it, or choose another folder"): train(tree, straight, MODEL, TRAIN, progress=False)
    for change, name in (({"epochs": 3}, "train.epochs was 2 and is 3"), ({"learning_rate": .1}, "learning_rate"), ({"seed": 5}, "seed")):
        with pytest.raises(BadConfig, match=name): train(tree, straight, MODEL, replace(TRAIN, **change), resume=True, progress=False)
    with pytest.raises(BadConfig, match="model.channels was 8 and is 16"):
        train(tree, straight, replace(MODEL, channels=16), TRAIN, resume=True, progress=False)
    cases = index_tree(tree).cases
    with pytest.raises(BadConfig, match="figures was"): train((cases, cases), straight, MODEL, TRAIN, resume=True, progress=False)
    assert (straight / "last.pt").read_bytes() == before


def test_a_run_of_before_an_option_goes_on_with_its_default(tree, straight, tmp_path):
    "Options that a state or a checkpoint does not name stand as they were when there was nothing to choose."
    state = torch.load(straight / "last.pt", weights_only=True)
    for name in ("model.mirrored", "model.projection", "train.compile"): assert state["options"].pop(name) is not None
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(BadConfig, match="model.mirrored was False and is True"):
        train(tree, tmp_path, replace(MODEL, correlation=16, mirrored=True), TRAIN, resume=True, progress=False)
    assert train(tree, tmp_path, MODEL, TRAIN, resume=True, progress=False) == tmp_path / "best.safetensors" # nothing is left to do


def test_damaged_state_is_refused(tree, straight, tmp_path):
    whole = (straight / "last.pt").read_bytes()
    other = (straight / "best.safetensors").read_bytes(), pickle.dumps({"model": {}}, 2)
    for damaged in (b"", whole[:1000], whole[:-1000], b"x" * 1000, *other):
        (tmp_path / "last.pt").write_bytes(damaged)
        with pytest.raises(BadCheckpoint, match="last.pt"): train(tree, tmp_path, MODEL, TRAIN, resume=True, progress=False)


def test_stopped_within_an_epoch(tree, tmp_path, monkeypatch):
    "6 steps = 3 + resume + 3: three epochs of two steps, stopped in the second, again in the third, and at its end before the validation."
    config, stops = replace(TRAIN, epochs=3, batch_size=2), []
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train(tree, straight, MODEL, config, progress=False)
    for steps, position in ((3, (1, 1)), (2, (2, 1)), (1, (2, 2))):
        def counted(*arguments):
            stops.append(0)
            return train_step(*arguments)
        monkeypatch.setattr(training, "train_step", counted)
        monkeypatch.setattr(training, "agreed", lambda late, steps=steps: len(stops) >= steps)
        stops.clear()
        torch.rand(7), np.random.rand(7)
        train(tree, stopped, MODEL, replace(config, max_hours=1), resume=True, progress=False)
        state = last(stopped)
        assert (len(state["history"]), state["position"]["batches"]) == position
    monkeypatch.undo()
    train(tree, stopped, MODEL, config, resume=True, progress=False)
    one, other = last(straight), last(stopped)
    for part in one: assert equal(one[part], other[part]), part
    assert equal(dict(load_model(straight / "best.safetensors")[0].state_dict()), dict(load_model(stopped / "best.safetensors")[0].state_dict()))


def test_sessions_without_time_do_one_thing_each(tree, straight, tmp_path):
    "A step or a validation, the first epoch's as well, so that every session comes further; together they are the run that was never stopped."
    stops = []
    for _ in range(6):
        torch.rand(7), np.random.rand(7)
        best = train(tree, tmp_path, MODEL, replace(TRAIN, max_hours=0), resume=True, progress=False)
        state = last(tmp_path)
        stops.append((len(state["history"]), state["position"]["batches"], best is not None))
        assert best == (tmp_path / "best.safetensors" if best else None) and (tmp_path / "best.safetensors").exists() == bool(best)
    assert stops == [(0, 1, False), (0, 2, False), (1, 0, True), (1, 1, True), (1, 2, True), (2, 0, True)]
    for part in state: assert equal(last(straight)[part], state[part]), part
    assert equal(dict(load_model(straight / "best.safetensors")[0].state_dict()), dict(load_model(best)[0].state_dict()))


def test_a_first_validation_that_would_come_too_late_is_left_to_the_next_session(tree, tmp_path, monkeypatch):
    "It is taken to need as long for a figure as training did."
    cases, began, clock = index_tree(tree).cases, time.perf_counter(), [0.]
    def hour_long(*arguments):
        clock[0] += 3600
        return train_step(*arguments)
    monkeypatch.setattr(training, "train_step", hour_long)
    monkeypatch.setattr(training.time, "perf_counter", lambda: began + clock[0])
    folds = cases[:4], cases[:2] # two steps of an hour each, and an hour for the validation
    for hours, rows in ((2.5, 0), (3.5, 1)):
        best = train(folds, tmp_path / str(hours), MODEL, replace(TRAIN, epochs=1, max_hours=hours), progress=False)
        assert len(last(tmp_path / str(hours))["history"]) == rows and (best is None) == (rows == 0)


def test_the_command_line_says_that_there_is_no_checkpoint_yet(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "train", lambda *arguments, **options: None)
    for flags, words in (([], "there is no checkpoint yet; go on with --resume"), (["--json"], '"checkpoint": null')):
        said = CliRunner().invoke(app, ["train", str(tree), "--out", str(tmp_path), *flags])
        assert said.exit_code == 0 and words in said.output and "last.pt" in said.output


def save_forever(path):
    "States whose every number says which state it is."
    for number in itertools.count():
        weight = torch.from_numpy(np.full(500_000, number)) # by numpy: torch's threads do not survive a fork
        save_run(path, dict.fromkeys(PARTS, 0) | {"model": {"weight": weight}, "history": [number]})


def test_killed_while_saving(tmp_path):
    "kill -9 at any moment leaves a whole state, the one before or the new one."
    path, seen, unfinished = tmp_path / "last.pt", [], 0
    for attempt in range(20):
        path.unlink(missing_ok=True)
        saver = multiprocessing.get_context("fork").Process(target=save_forever, args=(path,))
        saver.start()
        try:
            while not path.exists(): time.sleep(.001)
            time.sleep(.005 * attempt)
        finally:
            saver.kill()
            saver.join()
        state = read_run(path)
        seen.append(state["history"][0])
        assert torch.equal(state["model"]["weight"], torch.full((500_000,), seen[-1]))
        unfinished += len([*tmp_path.iterdir()]) > 1
        for left in tmp_path.glob(".*"): left.unlink()
    assert max(seen) > 2 and unfinished > 2 # some died in the middle of a file


def test_a_state_that_lacks_a_part_is_not_saved(tmp_path):
    with pytest.raises(BadCheckpoint, match="has the parts"): save_run(tmp_path / "last.pt", {"model": {}})
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- what a run leaves behind

def test_best_file_scores_what_the_log_says(tree, straight):
    "From the files alone, by the way a prediction goes: same thresholds, same score."
    rows = list(csv.DictReader((straight / "log.csv").open()))
    model, config, extra = load_model(straight / "best.safetensors")
    assert len(rows) == 2 and all(float(row["validation_loss"]) > 0 and float(row["train_loss_mask"]) >= 0 for row in rows)
    assert float(rows[int(extra["epoch"]) - 1]["oF1"]) == extra["oF1"] == max(float(row["oF1"]) for row in rows)
    _, held_out = training.pick_folds(tree, TRAIN)
    scores, halves = [], []
    for case in held_out:
        regions, = detect(model, [load_image(case.image)], config.size)
        for answers, thresholds in ((scores, (extra["score_threshold"], extra["figure_threshold"])), (halves, (.5, .5))):
            answer = encode([event.region for event in group_regions(regions, *thresholds)], case.shape)
            answers.append(image_score(annotation(case), answer, case.shape))
    assert np.isclose(np.mean(scores), extra["oF1"], atol=1e-12) and np.isclose(np.mean(halves), extra["oF1_at_half"], atol=1e-12)
    assert extra["all_authentic"] == .5 and extra["oF1"] >= .5 and extra["weights"] == "none" and config.weights == "none"
    assert json.loads((straight / "config.json").read_text())["train"]["epochs"] == 2
    assert load_image(straight / "curves.png").std() > 0


def test_groups_stay_on_one_side(tree):
    learned, held_out = training.pick_folds(tree, TRAIN)
    assert {case.case_id for case in learned} | {case.case_id for case in held_out} == {"0", "1", "2"}
    assert not {case.case_id for case in learned} & {case.case_id for case in held_out}


def test_a_run_with_a_projection_logs_its_loss(tree, tmp_path):
    "A column for itself beside the others, in training and in validation, and a part of their sums; figures without a copy have none of it."
    best = train(tree, tmp_path, replace(MODEL, correlation=16, mirrored=True, projection=8), replace(TRAIN, epochs=1, synthetic=.3), progress=False)
    row, = last(tmp_path)["history"]
    assert 0 < row["train_loss_infonce"] < 1 and 0 < row["validation_loss_infonce"] < 1
    for fold in ("train", "validation"):
        assert np.isclose(row[f"{fold}_loss"], sum(value for name, value in row.items() if name.startswith(f"{fold}_loss_")))
    assert load_model(best)[1].projection == 8


def test_the_same_figure_in_training_and_prediction(tree):
    "Resized once, divided by 255 once, normalised once (inside the model)."
    case = index_tree(tree).cases[0]
    image, _ = ForgeryDataset([case], 64)[0]
    assert torch.equal(image, to_tensor(resize_image(load_image(case.image), 64)))
    inside = build_model(MODEL).transform([image])[0].tensors[0, :, :image.shape[1], :image.shape[2]]
    mean, std = (torch.tensor(values)[:, None, None] for values in ([.485, .456, .406], [.229, .224, .225]))
    assert torch.equal(inside, (image - mean) / std)


def test_every_option_of_the_command_reaches_the_run(tree, tmp_path, monkeypatch):
    asked, given = [], {"backbone": "resnet18", "weights": "none", "size": "96", "correlation": "16", "projection": "8", "epochs": "3", "batch-size": "2",
                        "accumulate": "5", "synthetic": "0.25", "workers": "0", "seed": "7", "max-hours": "1.5"}
    monkeypatch.setattr(training, "train", lambda *words, **more: asked.append(words))
    flags = ["--mirrored", "--compile", *(word for name, value in given.items() for word in (f"--{name}", value))]
    for some in flags, []:
        said = CliRunner().invoke(app, ["train", str(tree), "--out", str(tmp_path), *some])
        assert said.exit_code == 0, said.output
    model, plan = PRESETS["default"]
    assert asked[0][2:] == (replace(model, backbone="resnet18", weights="none", size=96, correlation=16, mirrored=True, projection=8),
                            replace(plan, epochs=3, batch_size=2, accumulate=5, synthetic=.25, workers=0, compile=True, seed=7, max_hours=1.5))
    assert asked[1][2:] == (model, plan)


def test_nothing_to_train_on(tree, tmp_path):
    cases = index_tree(tree).cases
    for folds in ((cases, []), ([], cases)):
        with pytest.raises(BadConfig, match="and 0 to validate|: 0 figures to train"): train(folds, tmp_path, MODEL, TRAIN, progress=False)
    broken = write_tree(tmp_path / "broken", 2)
    (broken / "train_masks/1.npy").write_bytes(b"no mask")
    with pytest.raises(BadTree, match="1.npy"): train(broken, tmp_path / "run", MODEL, TRAIN, progress=False)


# ---------------------------------------------------------------- the step

def state_of(run): return copy.deepcopy({"model": run.model.state_dict(), "average": run.average.state_dict(),
                                         "optimizer": run.optimizer.state_dict()["state"]})


def a_run(model, config=TRAIN):
    return Run(model, copy.deepcopy(model), make_optimizer(model, config), torch.amp.GradScaler("cpu", enabled=False), {})


def test_loss_that_is_not_finite_stops_before_the_update(tree, tmp_path, monkeypatch):
    cases, seen, step = index_tree(tree).cases, [], train_step
    def poisoned(model, optimizer, scaler, batches):
        if len(seen) == 1: batches[0][0][0][:] = math.inf
        seen.append(copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"])))
        done = step(model, optimizer, scaler, batches)
        seen[-1] += ([cases[int(target["image_id"])] for target in batches[0][1]], (model.state_dict(), optimizer.state_dict()["state"]))
        return done
    monkeypatch.setattr(training, "train_step", poisoned)
    with pytest.raises(NotFinite, match="were not changed") as caught: train((cases, cases), tmp_path, MODEL, TRAIN, progress=False)
    *before, batch, after = seen[1]
    assert len(seen) == 2 and equal(before, list(after)) and not equal(seen[0][:2], before)
    assert all(str(case.image) in str(caught.value) for case in batch) and not (tmp_path / "last.pt").exists()


def test_an_update_that_is_left_out_first_leaves_no_rubbish(tree):
    "The momentum of a first step that does not happen; and the next step is the first."
    (image, target), model, other = ForgeryDataset(index_tree(tree).cases, 64)[4], build_model(MODEL), build_model(MODEL)
    runs = a_run(model), a_run(other)
    step = lambda run, picture: train_step(run.model, run.optimizer, run.scaler, [([picture], [target])])[1].item()
    assert step(runs[0], torch.full_like(image, math.nan)) == 1
    assert not any(state["momentum_buffer"].any() for state in runs[0].optimizer.state.values())
    for run in runs:
        torch.manual_seed(0)
        assert step(run, image) == 0
    assert equal(*map(state_of, runs)) and not equal(dict(model.state_dict()), dict(build_model(MODEL).state_dict()))


def test_two_batches_of_one_are_one_step(tree):
    "Accumulated gradients are the mean of those of the batches."
    dataset, model = ForgeryDataset(index_tree(tree).cases, 64), build_model(MODEL)
    batches, gradients = [tuple(map(list, zip(dataset[place], strict=True))) for place in (3, 4)], []
    for some in ([batches[0]], [batches[1]], batches):
        optimizer = make_optimizer(model, TRAIN)
        for group in optimizer.param_groups: group["lr"] = 0
        torch.manual_seed(0)
        if some[0] is batches[1]: # draws what it will draw as the second
            with torch.no_grad(): model(*batches[0])
        train_step(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), some)
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    assert all(torch.allclose((one + other) / 2, both, atol=1e-6) for one, other, both in zip(*gradients, strict=True))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_accumulated_steps_have_their_own_rate(tree, tmp_path, batch_size):
    cases = index_tree(tree).cases # 6 figures
    config = replace(TRAIN, batch_size=batch_size, accumulate=4 // batch_size, epochs=1)
    train((cases, cases[:1]), tmp_path, MODEL, config, progress=False)
    row = last(tmp_path)["history"][0]
    assert row["steps"] == 2 and row["learning_rate"] == learning_rate(1, 2, config) and learning_rate(0, 2, config) == .04 * 4 / 16 / SHORTEST_WARMUP


def test_every_epoch_draws_anew(tree, monkeypatch):
    "Another order and another augmentation each epoch; the same epoch is the same, whoever comes to it."
    seen, cases = [], index_tree(tree).cases
    def look(model, optimizer, scaler, batches):
        seen.append({cases[int(target["image_id"])].key: image for images, targets in batches for image, target in zip(images, targets, strict=True)})
        return [{"loss": torch.ones(())} for _ in batches], torch.zeros(())
    monkeypatch.setattr(training, "train_step", look)
    loader, run = make_loader(ForgeryDataset(cases, 64, augment=True), 2, shuffle=True), a_run(torch.nn.Linear(1, 1))
    for epoch in (0, 1, 1):
        run.history, run.done = [{}] * epoch, 0
        train_epoch(run, run.model, loader, TRAIN)
    first, second, again = ({key: image for batch in seen[start:start + 3] for key, image in batch.items()} for start in (0, 3, 6))
    assert list(first) != list(second) == list(again) and set(first) == set(second)
    assert equal(second, again) and not any(equal(first[key], second[key]) for key in first)


def test_the_average_is_what_is_kept(tree, tmp_path):
    train(tree, tmp_path, MODEL, TRAIN, progress=False)
    state, plain = last(tmp_path), tmp_path / "plain"
    assert not equal(state["model"], state["average"])
    train(tree, plain, MODEL, replace(TRAIN, average=0), progress=False)
    other = last(plain)
    assert equal(other["model"], other["average"]) and equal(other["model"], state["model"]) # it follows, and leads nowhere
    one_epoch = tmp_path / "one"
    train(tree, one_epoch, MODEL, replace(TRAIN, epochs=1), progress=False)
    assert equal(dict(load_model(one_epoch / "best.safetensors")[0].state_dict()), last(one_epoch)["average"])


def test_losses_are_summed_in_order_and_checked():
    watch = LossWatch(Counter())
    parts = lambda value: {"a": torch.tensor(value), "b": torch.tensor(.5)}
    for value in (1., 2.): watch.add([parts(value), parts(0.)], torch.tensor(0.), [["one"], ["two"]])
    assert watch.look() == .5 and watch.sums == {"a": 3., "b": 2.} and watch.look(wait=True) is None
    watch.add([parts(1.)], torch.tensor(1.), [["one"]])
    with pytest.raises(NotFinite, match="another process"): watch.look()
    watch.add([parts(1.), parts(math.inf)], torch.tensor(1.), [["one"], ["two", "three"]])
    with pytest.raises(NotFinite, match="^two, three: a is inf"): watch.look()


def test_optimizer_as_the_plan_says():
    model = build_model(replace(MODEL, norm="batch"))
    decayed, left = make_optimizer(model, TRAIN).param_groups
    assert (decayed["momentum"], decayed["weight_decay"], left["weight_decay"]) == (.9, 1e-4, 0)
    plain = {id(weight) for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm2d) for weight in layer.parameters()}
    plain |= {id(weight) for name, weight in model.named_parameters() if name.endswith(".bias")}
    assert {id(weight) for weight in left["params"]} == plain
    assert len(decayed["params"]) + len(left["params"]) == sum(weight.requires_grad for weight in model.parameters())

    _, neck, _ = make_optimizer(build_model(replace(MODEL, correlation=16, projection=8)), TRAIN).param_groups
    assert neck["faster"] == 10 and len(neck["params"]) == 5 and neck["weight_decay"] == 1e-4


@settings(max_examples=100, deadline=None)
@given(steps=st.integers(1, 500), batch=st.integers(1, 64), warmup=st.floats(0, 1))
def test_learning_rate_rises_and_falls(steps, batch, warmup):
    config = TrainConfig(batch_size=batch, warmup=warmup)
    rates, peak = [learning_rate(step, steps, config) for step in range(steps)], .02 * batch / 16
    top = int(np.argmax(rates))
    rising = max(round(warmup * steps), SHORTEST_WARMUP) if warmup else 1
    assert np.isclose(max(rates), peak * min(1, steps / rising)) and np.isclose(rates[0], peak / rising) and all(rate > 0 for rate in rates)
    assert all(np.diff(rates[:top + 1]) > 0) and all(np.diff(rates[top:]) <= 0)


def test_presets():
    model, train_config = PRESETS["baseline"]
    assert (model.backbone, model.size, train_config.batch_size, train_config.epochs) == ("resnet50", 256, 4, 10)
    assert (train_config.validation_fraction, train_config.momentum, train_config.tune) == (.2, .9, False)
    assert PRESETS["default"].model.size == 512 and PRESETS["default"].train.tune


@pytest.mark.parametrize("options", [
    {"epochs": 0}, {"batch_size": 0}, {"learning_rate": -1}, {"learning_rate": float("nan")}, {"workers": -1}, {"momentum": 2},
    {"validation_fraction": 0}, {"validation_fraction": 1}, {"seed": -1}, {"max_hours": -1},
    {"accumulate": 0}, {"average": 1}, {"synthetic": 1.5}, {"compile": 1}])
def test_refused_options(options):
    with pytest.raises(BadConfig, match=next(iter(options))): TrainConfig(**options)


# ---------------------------------------------------------------- compiled

@pytest.fixture
def backend(monkeypatch):
    "Set the compiler's backend; what it has compiled is forgotten before and afterwards."
    before = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    yield lambda name: monkeypatch.setattr(compiled, "BACKEND", name)
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = before


def compiled_and_not(config):
    "The same network twice, both padding to buckets."
    models = [build_model(config) for _ in range(2)]
    compiled.compile_backbone(models[0], config.size)
    models[1].transform.size_divisible = compiled.BUCKET
    return models


def losses_and_gradients(model, images, targets):
    torch.manual_seed(0)
    parts = model(images, targets)
    sum(parts.values()).backward()
    return {name: value.item() for name, value in parts.items()}, [weight.grad for weight in model.parameters()]


@pytest.mark.parametrize("name", ["eager", "aot_eager"])
def test_a_compiled_network_computes_the_same(tree, backend, name):
    backend(name)
    config = replace(MODEL, backbone="resnet18", correlation=16, mirrored=True, projection=8, norm="batch")
    images, targets = map(list, zip(*(ForgeryDataset(index_tree(tree).cases, 64)[place] for place in (1, 3)), strict=True))
    (losses, gradients), (expected, others) = (losses_and_gradients(model, images, targets) for model in compiled_and_not(config))
    assert losses.keys() == expected.keys() and all(np.isclose(losses[part], expected[part], rtol=1e-4) for part in losses)
    for one, other in zip(gradients, others, strict=True):
        assert (one is None) == (other is None)
        if one is not None: assert torch.equal(one, other) if name == "eager" else (one - other).norm() <= .01 * other.norm() + 1e-6


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_the_usual_backend_trains_a_small_body(backend):
    "Machine code for four layers and a pyramid; for a whole body it takes over a minute."
    def small():
        torch.manual_seed(0)
        layers = [torch.nn.Sequential(torch.nn.Conv2d(there, here, 3, stride, 1), torch.nn.ReLU()) for there, here, stride in ((3, 8, 4), (8, 8, 2))]
        return SimpleNamespace(transform=SimpleNamespace(), backbone=BackboneWithFPN(torch.nn.Sequential(*layers), {"0": "0", "1": "1"}, [8, 8], 8))
    machine, usual = small(), small()
    compiled.compile_backbone(machine, 128)
    pyramids = [model.backbone(torch.ones(1, 3, 128, 128).cumsum(3) / 128) for model in (machine, usual)]
    for levels in pyramids: sum(level.square().sum() for level in levels.values()).backward()
    assert all(torch.allclose(pyramids[0][level], pyramids[1][level], atol=1e-4) for level in pyramids[1])
    for one, other in zip(machine.backbone.parameters(), usual.backbone.parameters(), strict=True):
        assert (one.grad - other.grad).norm() <= .01 * other.grad.norm() + 1e-6
    assert machine.backbone.state_dict().keys() == usual.backbone.state_dict().keys() and machine.transform.size_divisible == 128


@pytest.mark.slow
def test_a_compiler_is_asked_once_for_a_size(backend):
    "Of many sizes, in two sizes of batch, in training; the limit of torch, 8, is not what bounds it."
    asked = []
    def counting(graph, inputs):
        asked.append(tuple(next(each.shape for each in inputs if each.ndim == 4 and not isinstance(each, torch.nn.Parameter))))
        return graph.forward
    backend(counting)
    config, rng = replace(MODEL, backbone="resnet18", size=512), np.random.default_rng(0)
    model, _ = compiled_and_not(config)
    with torch.no_grad():
        for number in range(40):
            shape = rng.permutation((512, int(rng.integers(40, 513))))
            model.backbone(model.transform([torch.rand(3, *shape)] * (1 + number % 2))[0].tensors)
    bodies = [size for size in asked if size[1] == 3]
    assert len(asked) == len(set(asked)) == 2 * len(bodies) and 10 <= len(bodies) <= 14 # 7 sizes have a side of 512
    assert all(size[2] % 128 == size[3] % 128 == 0 for size in bodies)


def test_a_compiled_run_resumes_and_leaves_what_others_leave(tree, straight, tmp_path, backend):
    "Under the same names, readable without a compiler; whether it is compiled is part of the run."
    backend("eager")
    config, whole, stopped = replace(TRAIN, compile=True), tmp_path / "whole", tmp_path / "stopped"
    best = train(tree, whole, MODEL, config, progress=False)
    for _ in range(3): train(tree, stopped, MODEL, replace(config, max_hours=0), resume=True, progress=False)
    train(tree, stopped, MODEL, config, resume=True, progress=False)
    assert all(equal(last(whole)[part], last(stopped)[part]) for part in PARTS)
    model, _, _ = load_model(best)
    assert model.state_dict().keys() == last(whole)["model"].keys() == last(straight)["model"].keys()
    assert model.transform.size_divisible == 32
    with pytest.raises(BadConfig, match="train.compile was True and is False"): train(tree, whole, MODEL, TRAIN, resume=True, progress=False)


# ---------------------------------------------------------------- validation

@pytest.mark.parametrize("norm", ["batch", "group", "frozen"])
def test_validation_loss_changes_nothing_and_repeats(tree, norm):
    model, cases = build_model(replace(MODEL, norm=norm)), index_tree(tree).cases
    before, draws = {name: value.clone() for name, value in model.state_dict().items()}, random_state()
    rows = [validate(model, make_loader(ForgeryDataset(cases, 64), 1), seed=TRAIN.seed) for _ in range(2)]
    assert rows[0] == rows[1] and equal(before, dict(model.state_dict())) and equal(draws, random_state())
    alone = [validation_losses(model, *ForgeryDataset(cases, 64)[place], TRAIN.seed + place) for place in range(len(cases))]
    assert np.isclose(rows[0]["validation_loss"], np.mean([sum(losses.values()) for losses in alone]))


def test_validation_loss_is_the_training_loss(tree):
    "Same draws, same figure: what torchvision returns in training mode."
    model, (image, target) = build_model(MODEL), ForgeryDataset(index_tree(tree).cases, 64)[4]
    with fixed_draws(3): expected = {name: loss.item() for name, loss in model([image], [target]).items()}
    assert validation_losses(model, image, target, 3) == expected and expected["loss_mask"] > 0


def boxes(most):
    return st.lists(st.tuples(*(st.integers(low, high) for low, high in ((0, 20), (0, 20), (1, 9), (1, 9), (1, 100)))), max_size=most)


def made(drawn): return [Region((x, y, x + w, y + h), np.ones((h, w), bool), score / 100) for x, y, w, h, score in drawn]


@settings(max_examples=60, deadline=None)
@given(figures=st.lists(st.tuples(boxes(2), boxes(5)), min_size=1, max_size=3))
def test_tuned_thresholds_by_brute_force(figures):
    shape, labels, found = (30, 30), [], []
    for true, regions in figures:
        labels.append(encode([group_regions(made(true), 0)[0].region], shape) if true else AUTHENTIC)
        found.append(made(regions))
    judged = [judge(regions, label, shape) for regions, label in zip(found, labels, strict=True)]

    def score(region, figure):
        answers = [encode([event.region for event in group_regions(regions, region, figure)], shape) for regions in found]
        return np.mean([image_score(label, answer, shape) for label, answer in zip(labels, answers, strict=True)])
    table = {(region, figure): score(region, figure) for region in THRESHOLDS[::2] for figure in THRESHOLDS[::2] if figure >= region}
    assert all(np.isclose(score_at(judged, *pair), value) for pair, value in table.items())
    best, region, figure = tune_thresholds(judged)
    assert best >= max(table.values()) - 1e-12 and np.isclose(best, score(region, figure)) and best >= score_at(judged, .5, .5)


def test_thresholds_stay_at_half_when_nothing_is_gained(): assert tune_thresholds([judge([], AUTHENTIC, (9, 9))]) == (1., .5, .5)


# ---------------------------------------------------------------- does it learn?

@pytest.mark.slow
def test_a_network_learns_one_forged_figure(tmp_path):
    "80 steps from random weights on the CPU; the source and its copy, answered as one event."
    case, = (case for case in index_tree(write_tree(tmp_path / "tree", 1)).cases if case.forged)
    model_config = ModelConfig("mobilenet_v2", size=128, channels=32, anchor_sizes=(8, 16, 32, 64, 128), detections=20, samples=64)
    config = TrainConfig(epochs=1, batch_size=2, learning_rate=.04, augment=False, workers=0)
    best = train(([case] * 160, [case]), tmp_path / "run", model_config, config, progress=False)
    model, _, extra = load_model(best)
    regions, = detect(model, [load_image(case.image)], 128)
    answer = encode([event.region for event in group_regions(regions, extra["score_threshold"], extra["figure_threshold"])], case.shape)
    assert image_score(annotation(case), answer, case.shape) >= .9 and extra["oF1_at_half"] >= .9


def test_benchmark_figures_train(shared, tmp_path):
    "Real figures of every mode and size, from the folder to a checkpoint."
    cases = [case for case in index_tree(shared / "bench" / "dev").cases if case.forged is not None][::40]
    best = train((cases, cases[:2]), tmp_path, MODEL, replace(TRAIN, epochs=1), progress=False)
    assert 0 < load_model(best)[2]["validation_loss"] < 20


# ---------------------------------------------------------------- on a GPU

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("correlation", [0, 64])
def test_a_run_on_a_gpu(tree, tmp_path, correlation):
    "Half precision, channels last, the device's own guard against losses that are not finite; stopped and resumed."
    model = replace(MODEL, correlation=correlation)
    for config in replace(TRAIN, device="cuda", max_hours=0), replace(TRAIN, device="cuda"):
        best = train(tree, tmp_path, model, config, resume=True, progress=False)
    rows = last(tmp_path)["history"]
    assert len(rows) == 2 and all(math.isfinite(row["train_loss"]) and row["not_finite"] == 0 for row in rows)
    regions, = detect(load_model(best)[0].cuda(), [load_image(index_tree(tree).cases[0].image)], 64)
    assert all(0 < region.score <= 1 for region in regions)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_our_part_of_a_step_does_not_wait_for_the_gpu():
    "Everything but torchvision's own network: the guard, the update, the average, the losses on their way."
    class Network(torch.nn.Linear):
        def forward(self, images, targets): return {"loss": super().forward(torch.stack(images)).square().mean()}
    network = Network(4, 4).cuda()
    run, watch = a_run(network), LossWatch(Counter())
    batch = [torch.ones(4, device="cuda")] * 2, [{"boxes": torch.ones(1, device="cuda")}] * 2
    train_step(network, run.optimizer, run.scaler, [batch])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(5):
            found, broken = train_step(network, run.optimizer, run.scaler, [batch])
            watch.add(found, broken, [[]])
            watch.look()
            follow(run.average, run.model, step, .9)
    finally: torch.cuda.set_sync_debug_mode("default")
    assert watch.look(wait=True) >= 0
