"""Training in two processes that torchrun starts, against the same in one. This file is the test and what torchrun runs."""
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train import MODEL, TRAIN, equal, last, write_tree

import recodai_forgery.compiled as compiled
import recodai_forgery.train as training
from recodai_forgery.cases import index_tree
from recodai_forgery.data import ForgeryDataset, make_loader
from recodai_forgery.model import build_model, load_model
from recodai_forgery.state import Process, Share, agreed, gather, joined, this_process
from recodai_forgery.thresholds import validate
from recodai_forgery.train import make_optimizer, train, train_step
from recodai_forgery.types import BadConfig, NotFinite

pytestmark = pytest.mark.slow
CONFIG = replace(TRAIN, epochs=3, batch_size=1, validation_fraction=.34)


def no_lots(patch) -> None:
    "The samplers take what comes first instead of drawing, so that a figure's losses do not depend on who else is there."
    patch.setattr(torch, "randperm", lambda count, **options: torch.arange(count, **options))


def four_each(dataset) -> list[tuple]:
    """Two figures with equal numbers of regions: as many samples of either, so that the mean of all is the mean of their means.

    In double precision, where a difference is a difference and not rounding.
    """
    figures = []
    for place in (3, 4):
        image, target = dataset[place]
        twice = {name: target[name].repeat((2,) + (1,) * (target[name].ndim - 1)) for name in ("boxes", "labels", "masks")}
        figures.append((image.double(), {**target, **twice, "boxes": twice["boxes"].double()}))
    return figures


def gradients(batches, model) -> list[torch.Tensor]:
    optimizer = make_optimizer(model, TRAIN)
    for group in optimizer.param_groups: group["lr"] = 0
    train_step(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), batches)
    return [weight.grad for weight in model.parameters()]


def held_out(cases, count, process) -> dict[str, float]:
    figures = (cases * 2)[:count]
    loader = make_loader(ForgeryDataset(figures[process.rank::process.size], 64), 1)
    return validate(build_model(MODEL), loader, seed=5)


def worker(folder: Path) -> None:
    "What each of two processes does."
    cases, found = index_tree(folder / "tree").cases, {}
    with joined(torch.device("cpu")) as (process, _), pytest.MonkeyPatch.context() as patch:
        found["process"], found["together"] = tuple(process), (gather(process.rank), agreed(process.rank == 0), agreed(process.rank == 1))
        with pytest.MonkeyPatch.context() as still:
            no_lots(still)
            figure = four_each(ForgeryDataset(cases, 64))[process.rank]
            model = torch.nn.parallel.DistributedDataParallel(build_model(MODEL).double())
            found["gradients"] = gradients([([figure[0]], [figure[1]])], model)
        found["rows"] = [held_out(cases, count, process) for count in (5, 7)]

        with pytest.MonkeyPatch.context() as uncompiled: # torch's machinery, and no machine code
            uncompiled.setattr(compiled, "BACKEND", "eager")
            contrast = replace(MODEL, correlation=16, projection=8), replace(CONFIG, epochs=1, compile=True)
            train(folder / "tree", folder / "contrast", *contrast, progress=False)
        train(folder / "tree", folder / "straight", MODEL, CONFIG, progress=False)
        steps = []
        def counted(*arguments):
            steps.append(0)
            return train_step(*arguments)
        patch.setattr(training, "train_step", counted)
        patch.setattr(training, "agreed", lambda late: len(steps) >= 3)
        train(folder / "tree", folder / "stopped", MODEL, replace(CONFIG, max_hours=1), progress=False)
        patch.undo()
        found["stopped"] = len(last(folder / "stopped")["history"]), last(folder / "stopped")["position"]["batches"]
        torch.rand(5 + process.rank)
        train(folder / "tree", folder / "stopped", MODEL, CONFIG, resume=True, progress=False)

        def poisoned(model, optimizer, scaler, batches):
            if process.rank == 1: batches[0][0][0][:] = torch.nan
            before = [weight.clone() for weight in model.parameters()]
            done = train_step(model, optimizer, scaler, batches)
            found["unchanged"] = equal(before, list(model.parameters()))
            return done
        patch.setattr(training, "train_step", poisoned)
        try: train(folder / "tree", folder / "poisoned", MODEL, CONFIG, progress=False)
        except NotFinite as problem: found["problem"] = str(problem)
    torch.save(found, folder / f"{process.rank}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "A folder in which two processes have worked, and what each has found."
    folder = tmp_path_factory.mktemp("two")
    write_tree(folder / "tree", 3)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "localhost:0", __file__, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-5000:]
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(autouse=True)
def one_thread():
    "As in the processes: another number of threads adds up in another order."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_two_processes_of_one_figure_are_one_of_two(two, monkeypatch):
    folder, found = two
    no_lots(monkeypatch)
    figures, model = four_each(ForgeryDataset(index_tree(folder / "tree").cases, 64)), build_model(MODEL).double()
    expected = gradients([tuple(map(list, zip(*figures, strict=True)))], model)
    assert [one["process"][:2] for one in found] == [(0, 2), (1, 2)] and found[0]["together"] == found[1]["together"] == ([0, 1], True, False)
    assert len({float(weight.abs().max()) for weight in expected}) > 10
    for one in found: assert all(torch.allclose(a, b, atol=1e-6, rtol=0) for a, b in zip(one["gradients"], expected, strict=True))
    alone = gradients([([figures[0][0]], [figures[0][1]])], model)
    assert not all(torch.allclose(a, b, atol=1e-6, rtol=0) for a, b in zip(alone, expected, strict=True))


def test_validation_in_two_processes_is_that_of_one(two):
    "5 and 7 figures: one process has one more, and nobody sees a figure twice."
    folder, found = two
    cases = index_tree(folder / "tree").cases
    assert found[0]["rows"] == found[1]["rows"] == [held_out(cases, count, Process()) for count in (5, 7)]


def test_six_steps_in_two_processes_are_three_and_resume_and_three(two):
    folder, found = two
    one, other = last(folder / "straight"), last(folder / "stopped")
    assert found[0]["stopped"] == found[1]["stopped"] == (1, 1) and one["history"][-1]["steps"] == 6
    for part in one: assert equal(one[part], other[part]), part
    first, second = one["processes"]
    assert not equal(first["random"]["torch"], second["random"]["torch"])
    assert equal(*(dict(load_model(folder / run / "best.safetensors")[0].state_dict()) for run in ("straight", "stopped")))


def test_a_projection_learns_where_one_process_has_nothing_to_learn_from(two):
    "Authentic figures have no pieces: their process takes part in every step all the same."
    run = last(two[0] / "contrast")
    start = build_model(replace(MODEL, correlation=16, projection=8)).backbone.correlation.projection.weight
    assert not torch.equal(run["model"]["backbone.correlation.projection.weight"], start) and run["history"][0]["train_loss_infonce"] > 0


def test_another_number_of_processes_is_another_run(two):
    folder, _ = two
    with pytest.raises(BadConfig, match="processes was 2 and is 1"):
        train(folder / "tree", folder / "straight", MODEL, CONFIG, resume=True, progress=False)


def test_a_loss_that_is_not_finite_stops_all_processes(two):
    "The process that has the figure names it; the other one stops as well, and nothing was changed in either."
    folder, (first, second) = two
    assert first["unchanged"] and second["unchanged"]
    assert "another process" in first["problem"] and "train_images" in second["problem"] and "is nan" in second["problem"]


def test_half_of_what_torchrun_sets(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(BadConfig, match="torchrun"): this_process()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert this_process() == Process(0, 2, 0)


def test_every_figure_is_read_by_one_process():
    class Numbers:
        cases = range(11)
        def __getitem__(self, index): return index
    batches = [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9], [10]]
    read = [[Share(Numbers(), Process(rank, 3)).__getitems__(batch) for batch in batches] for rank in range(3)]
    assert sorted(sum((share[0] for share in read), [])) == batches[0] and sorted(sum((share[1] for share in read), [])) == batches[1]
    assert [share[2] for share in read] == [[10]] * 3


if __name__ == "__main__": worker(Path(sys.argv[1]))
