"""What a step of training costs, ours against a bare loop, and what SelfCorr adds to it. `make bench` calls it; it also runs alone."""
import copy
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from recodai_forgery.data import make_loader, make_target
from recodai_forgery.model import ModelConfig, build_model
from recodai_forgery.train import Run, TrainConfig, make_optimizer, train_epoch
from recodai_forgery.types import Case

CONFIG = TrainConfig(epochs=1, batch_size=2, workers=0)


class Figures:
    "Figures in memory: nothing is read from a disk, each with a rectangle and its copy."
    def __init__(self, count: int, size: int):
        shape, draw = (size * 3 // 4, size), np.random.default_rng(0)
        self.cases = [Case("forged", str(number), f"{number}.png", None, shape) for number in range(count)]
        self.items = []
        for number in range(count):
            small = torch.from_numpy(draw.random((1, 3, shape[0] // 8, shape[1] // 8), np.float32))
            image, masks = torch.nn.functional.interpolate(small, shape, mode="bilinear")[0], np.zeros((2, *shape), np.uint8)
            y, x, side = size // 8, size // 8, size // 6
            for mask, column in zip(masks, (x, x + size // 2), strict=True):
                image[:, y:y + side, column:column + side] = image[:, y:y + side, x:x + side]
                mask[y:y + side, column:column + side] = 1
            self.items.append((image, make_target(masks, [0, 0], number, shape)))

    def __len__(self): return len(self.items)

    def __getitem__(self, index: int): return self.items[index]

    def set_epoch(self, epoch: int) -> None: pass


def ours(network, figures: Figures) -> Callable[[], object]:
    "An epoch of our loop, ready to go."
    run = Run(network, copy.deepcopy(network), make_optimizer(network, CONFIG), torch.amp.GradScaler("cpu", enabled=False), {})
    loader = make_loader(figures, CONFIG.batch_size)
    def epoch():
        run.done = 0
        assert train_epoch(run, run.model, loader, CONFIG)
    return epoch


def bare(network, figures: Figures) -> Callable[[], object]:
    "The least that trains a torchvision detector."
    optimizer, loader = torch.optim.SGD(network.parameters(), lr=.001, momentum=.9, weight_decay=1e-4), make_loader(figures, CONFIG.batch_size)
    def epoch():
        network.train()
        for images, targets in loader:
            loss = sum(network(images, targets).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return epoch


def seconds(epochs: list[Callable[[], object]], repetitions: int) -> list[float]:
    "Least time of each, in turn, so that a slow spell hits all of them."
    least = [float("inf")] * len(epochs)
    for _ in range(repetitions):
        for place, epoch in enumerate(epochs):
            torch.manual_seed(0)
            began = time.perf_counter()
            epoch()
            least[place] = min(least[place], time.perf_counter() - began)
    return least


def training_steps(repetitions: int = 4) -> Iterator[tuple[str, str, float, float, str]]:
    "Rows of the bench: what, against what, ratio, bar, ours. Less is better."
    model, figures = ModelConfig("mobilenet_v2", size=384, channels=64), Figures(6, 384)
    networks = [build_model(model) for _ in range(2)]
    one, other = seconds([ours(networks[0], figures), bare(networks[1], figures)], repetitions)
    steps = len(figures) // CONFIG.batch_size
    yield "training step, MobileNetV2, 64 channels, 384 px, batch 2", "bare torchvision loop", one / other, 1.05, f"{one / steps * 1e3:.0f} ms"
    figures = Figures(4, 512)
    networks = [build_model(ModelConfig("mobilenet_v2", channels=64, correlation=cells)) for cells in (64, 0)]
    one, other = seconds([bare(network, figures) for network in networks], repetitions)
    what = "training step with SelfCorr, 64 x 64 cells, 64 channels, 512 px, batch 2"
    yield what, "without", one / other, 1.25, f"{one / len(figures) * CONFIG.batch_size * 1e3:.0f} ms"


if __name__ == "__main__":
    for row in training_steps(): print(*row, sep="   ", flush=True)
