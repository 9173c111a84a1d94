"""What a lesson of 07_stream cannot say: workers, real sources, the mixture, and training on it."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_train import MODEL, TRAIN, equal, last, write_tree

from recodai_forgery.cases import index_tree
from recodai_forgery.data import ForgeryDataset, make_loader
from recodai_forgery.image import load_image
from recodai_forgery.model import load_model
from recodai_forgery.stream import ForgeryStream
from recodai_forgery.train import figure_name, train
from recodai_forgery.types import BadConfig


@pytest.fixture(scope="module")
def tree(tmp_path_factory): return write_tree(tmp_path_factory.mktemp("data") / "tree", 4, (192, 256))


def test_without_a_share_it_is_the_dataset(tree):
    cases = index_tree(tree).cases
    stream, plain = ForgeryStream(cases, 96, True, 3, share=0), ForgeryDataset(cases, 96, True, 3)
    assert all(equal(list(stream[place]), list(plain[place])) for place in range(len(cases)))


def test_workers_change_nothing_and_epochs_do(tree):
    cases, epochs = index_tree(tree).cases, []
    for workers, epoch in ((0, 0), (1, 0), (0, 1)):
        loader = make_loader(ForgeryStream(cases, 96, True, share=.6), 2, shuffle=True, workers=workers)
        loader.dataset.set_epoch(epoch)
        loader.batch_sampler.set_epoch(0)
        before = torch.get_rng_state()
        epochs.append([item for images, targets in loader for item in zip(images, targets, strict=True)])
        assert torch.equal(before, torch.get_rng_state())
    assert equal(epochs[0], epochs[1]) and not equal(epochs[0], epochs[2])


def test_share_and_twins(tree):
    "As many made as asked for, half of them authentic; truth that fits the image's size."
    stream = ForgeryStream(index_tree(tree).cases, 64, share=.7)
    targets = []
    for epoch in range(16):
        stream.set_epoch(epoch)
        targets += [target | {"shape": image.shape} for image, target in map(stream.__getitem__, range(len(stream)))]
    made = [target for target in targets if "synthetic" in target]
    assert abs(len(made) / len(targets) - .7) < .15 and abs(np.mean([len(target["boxes"]) == 0 for target in made]) - .5) < .15
    for target in made:
        assert target["masks"].shape[1:] == target["shape"][1:] and max(target["shape"]) == 64
        assert all(mask.any() for mask in target["masks"]) and target["labels"].eq(1).all()


def test_real_sources(shared):
    "Of every mode and size: forgeries and twins, as the network takes them."
    cases = [case for case in index_tree(shared / "bench" / "dev").cases if not case.forged][::12]
    stream = ForgeryStream(cases, 256, share=1)
    found = [stream[place] for place in range(len(cases))]
    assert {bool(len(target["boxes"])) for _, target in found} == {True, False}
    assert all(image.min() >= 0 and image.max() <= 1 and image.std() > 0 for image, _ in found)


def test_sources_of_ones_own(tree):
    cases = index_tree(tree).cases
    forged = [case for case in cases if case.forged]
    with pytest.raises(BadConfig, match="no authentic figure"): ForgeryStream(forged, 64)
    with pytest.raises(BadConfig, match="share 2"): ForgeryStream(cases, 64, share=2)
    image, target = ForgeryStream(forged, 64, share=1, sources=[case.image for case in cases if not case.forged])[0]
    assert "synthetic" in target and "made for epoch 3 in place of" in figure_name(forged[0], target, 3)
    assert load_image(forged[0].image).shape[:2] == (192, 256)


def test_a_run_on_the_stream_resumes_to_the_bit(tree, tmp_path):
    config = replace(TRAIN, synthetic=.5, epochs=2)
    for name in "straight", "stopped": train(tree, tmp_path / name, MODEL, replace(config, max_hours=0 if name == "stopped" else None), progress=False)
    train(tree, tmp_path / "stopped", MODEL, config, resume=True, progress=False)
    one, other = last(tmp_path / "straight"), last(tmp_path / "stopped")
    for part in one: assert equal(one[part], other[part]), part
    plain = tmp_path / "plain"
    train(tree, plain, MODEL, replace(config, synthetic=0), progress=False)
    assert not equal(last(plain)["model"], one["model"]) and load_model(plain / "best.safetensors")[2]["epoch"] in (1, 2)
