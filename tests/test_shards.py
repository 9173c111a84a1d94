"""Workers: what one end of a pipe tells the other, crashes, time, and answers that do not depend on how many share the work."""
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from recodai_forgery import shards
from recodai_forgery.image import find_images
from recodai_forgery.model import ModelConfig, build_model, save_model
from recodai_forgery.predict import Detector, PredictConfig
from recodai_forgery.shards import Clock, Job, predict_shards, share_jobs, usable_devices
from recodai_forgery.types import BadConfig

# A worker of a few lines that needs no torch: what it does to a figure stands in the figure's name.
STUB = """
import json, os, sys, time
full, cheap, job = float(sys.argv[1]), float(sys.argv[2]), json.loads(sys.argv[3])
print(json.dumps({"ways": ["full", "cheap"] if cheap >= 0 else ["full"]}), flush=True)
for line in sys.stdin:
    task, told = json.loads(line), []
    for path in task["paths"]:
        name = os.path.splitext(os.path.basename(path))[0]
        if name.startswith("exit") or name.startswith("once") and task["way"] == "full": os._exit(7)
        if name.startswith("hang"): time.sleep(600)
        time.sleep(full if task["way"] == "full" else cheap)
        told.append({"case_id": name, "shape": [8, 8], "p_forged": 0.5, "annotation": "[1, 2]", "seconds": full, "note": ""})
    print("no JSON" if name.startswith("odd") else json.dumps({"predictions": told}), flush=True)
"""


def stub(full=0., cheap=-1.): return [sys.executable, "-c", STUB, str(full), str(cheap)]


@pytest.fixture
def figures(tmp_path):
    def make(*names):
        for name in names: cv2.imwrite(str(tmp_path / f"{name}.png"), np.zeros((8, 8, 3), np.uint8))
        return find_images(tmp_path)
    return make


def collect(answers): return {prediction.case_id: (way, prediction.note) for prediction, way in answers}


def test_every_figure_is_answered_once_whatever_happens_to_the_workers(figures):
    paths = figures("exit1", "once2", "hang3", "odd4", *map(str, range(10, 30)))
    answers = list(predict_shards(paths, [Job()] * 2, 60, figure_seconds=1, command=stub(0, 0)))
    told = {prediction.case_id: (way, prediction.note) for prediction, way in answers}
    assert len(answers) == len(told) == len(paths)
    assert {name: way for name, (way, _) in told.items() if way != "full"} == {"exit1": "lost", "once2": "cheap", "hang3": "lost", "odd4": "lost"}
    assert "status 7" in told["exit1"][1] and "no answer within 1 s" in told["hang3"][1]


def test_a_batch_that_loses_its_worker_loses_one_figure(figures):
    paths = figures("1", "2", "exit3", "4")
    told = collect(predict_shards(paths, [Job(size=64)], 60, batch_size=4, command=stub()))
    assert {name: way for name, (way, _) in told.items()} == {"1": "full", "2": "full", "exit3": "lost", "4": "full"}


def test_time_is_kept_and_as_many_as_possible_get_the_full_look(figures):
    paths, began = figures(*map(str, range(60))), time.monotonic()
    told = collect(predict_shards(paths, [Job()] * 2, 9, command=stub(.5, .02)))
    assert time.monotonic() - began < 12
    ways = [way for way, _ in told.values()]
    assert len(told) == 60 and ways.count("full") >= 4 and ways.count("cheap") >= 24 and set(ways) == {"full", "cheap"}


def test_no_time_no_answer(figures):
    told = collect(predict_shards(figures("1", "2"), [Job()], 0, command=stub()))
    assert told.keys() == {"1", "2"} and all(way == "unanswered" and "no time was left" in note for way, note in told.values())


def test_workers_that_cannot_start_are_given_up_and_their_last_words_told(figures):
    told = collect(predict_shards(figures("1", "2"), [Job()] * 2, 60, command=[sys.executable, "-c", "raise ImportError('no torch here')"]))
    assert all(way == "unanswered" and "ImportError: no torch here" in note for way, note in told.values()) and len(told) == 2


def test_no_worker_outlives_its_owner(figures):
    answers = predict_shards(figures("1", "hang2"), [Job()] * 2, 600, command=stub())
    next(answers)
    answers.close() # as an interrupted notebook would
    time.sleep(.5)
    commands = [(Path(folder) / "cmdline").read_bytes() for folder in Path("/proc").glob("[0-9]*") if (folder / "cmdline").exists()]
    assert not [command for command in commands if STUB.encode() in command]


def test_workers_that_start_nowhere_leave_the_time_to_the_others(figures):
    "Only one of four can start; the clock must not count on the rest."
    paths = figures(*map(str, range(40)))
    starter = ("import os, sys\n" + f"folder = {str(paths[0].parent)!r}\n"
               "try: os.mkdir(folder + '/taken')\nexcept FileExistsError:\n    sys.exit('no more memory')\n")
    told = collect(predict_shards(paths, [Job()] * 4, 14, command=[sys.executable, "-c", starter + STUB, ".5", ".02"]))
    assert {way for way, _ in told.values()} == {"full", "cheap"} and len(told) == 40


def test_a_gpu_on_which_no_worker_starts_is_exchanged_for_the_cpu(figures):
    code = "import json, sys\nif json.loads(sys.argv[3])['device'] != 'cpu': sys.exit('CUDA driver is too old')\n"
    faults = []
    told = collect(predict_shards(figures("1", "2"), [Job(device="cuda:0")], 60, command=[sys.executable, "-c", code + STUB, "0", "0"], faults=faults))
    assert told == {"1": ("full", ""), "2": ("full", "")} and "cuda:0 given up" in faults[0] and "CUDA driver is too old" in faults[0]


def test_a_worker_whose_pipe_stays_open_does_not_keep_the_others_waiting(figures, monkeypatch):
    "As a process in the driver's hands, which cannot be killed: here its child holds the pipe."
    monkeypatch.setattr(shards, "GRACE", 1.)
    code = "import subprocess, sys\nsubprocess.Popen(['sleep', '30'])\n"
    began = time.monotonic()
    told = collect(predict_shards(figures("1", "hang2"), [Job()], 3, command=[sys.executable, "-c", code + STUB, "0", "-1"]))
    assert time.monotonic() - began < 10 and told["1"] == ("full", "") and told["hang2"][0] == "unanswered"


def test_a_fault_of_ours_costs_the_figure_and_the_worker_no_more(figures):
    "In a real worker: exceptions that no figure should cause, after which nothing works in that process, as after a CUDA assert."
    paths = figures("1", "13", "3")
    code = ("import sys\nfrom recodai_forgery.shards import serve\nfrom recodai_forgery.types import Prediction\n"
            "class Faulty:\n    dead = False\n    def hurried(self): return None\n    def predict_batch(self, paths):\n        for path in paths:\n"
            "            self.dead |= path.stem == '13'\n            if self.dead: raise RuntimeError('device-side assert')\n"
            "            yield Prediction(path.stem, (8, 8))\n"
            "serve(Faulty(), sys.stdin, sys.stdout)")
    told = collect(predict_shards(paths, [Job(size=64)], 60, batch_size=3, command=[sys.executable, "-c", code]))
    assert "RuntimeError: device-side assert" in told.pop("13")[1] and all(note == "" for _, note in told.values()) and len(told) == 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["maskrcnn", "match"]) # hybrid: in test_kernel.py
def test_two_workers_answer_what_one_does_and_what_the_detector_does(tmp_path, method):
    rng, folder, checkpoint = np.random.default_rng(0), tmp_path / "figures", None
    folder.mkdir()
    for number, shape in enumerate([(60, 80), (80, 60), (64, 64), (60, 80), (70, 75), (90, 40)]):
        image = cv2.resize(rng.integers(0, 256, (9, 9, 3)).astype(np.uint8), shape[::-1], interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f"{number}.png"), image)
    config = ModelConfig("mobilenet_v2", size=64, channels=16, norm="batch")
    if method != "match":
        checkpoint = str(tmp_path / "best.safetensors")
        save_model(checkpoint, build_model(config), config, {"score_threshold": .1, "figure_threshold": .1})
    job, paths = Job(checkpoint, method, size=config.size if checkpoint else 0), find_images(folder)
    rows = [{prediction.case_id: (prediction.annotation, prediction.p_forged, prediction.note)
             for prediction, _ in predict_shards(paths, [job] * workers, 300, batch_size=2)} for workers in (1, 2)]
    assert rows[0] == rows[1] and len(rows[0]) == 6
    alone = Detector(checkpoint, PredictConfig(batch_size=2), "cpu", method)
    assert {one.case_id: one.annotation for one in alone.predict(paths)} == {name: row[0] for name, row in rows[0].items()}
    if method == "maskrcnn": assert any(row[0] != "authentic" for row in rows[0].values()) # or the test sees nothing


def test_clock_never_leaves_too_little_for_the_rest():
    for costs in ({"full": 4., "cheap": .5}, {"full": 1., "cheap": .9}, {"full": .1, "cheap": .05}):
        for seconds in (50., 500., 5000.):
            clock, now, figures = Clock(seconds, workers=2), 0., 1000
            while figures and (way := clock.way(now, figures, 1)):
                clock.note(way, 2 * costs[way], 2)
                now, figures = now + costs[way], figures - 2
            assert now <= seconds + costs["full"]
            if seconds > 500 * max(1., costs["cheap"]) * clock.margin: assert figures <= 0 # the first guess of the cheap look is 1 s


def test_jobs_are_shared_out():
    with pytest.raises(BadConfig): next(predict_shards([], [], 1))
    for devices, cores, method, expected in ((["cpu"], 1, "match", 1), (["cpu"], 4, "maskrcnn", 4), (["cuda:0"], 4, "maskrcnn", 1),
                                             (["cuda:0", "cuda:1"], 4, "maskrcnn", 2), (["cuda:0", "cuda:1"], 4, "hybrid", 4)):
        jobs = share_jobs(Job("weights", method), devices, cores)
        assert len(jobs) == expected and {job.device for job in jobs} == set(devices) and sum(job.threads for job in jobs) <= max(cores, expected)


def test_gpus_without_code_are_left_idle_and_said_so(monkeypatch):
    "As on Kaggle's P100, for which the image's torch has no code."
    monkeypatch.setattr(shards.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(shards.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(shards.torch.cuda, "get_device_capability", lambda place: [(6, 0), (7, 5)][place])
    monkeypatch.setattr(shards.torch.cuda, "get_device_name", lambda place: ["Tesla P100", "Tesla T4"][place])
    monkeypatch.setattr(shards.torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90"])
    devices, told = usable_devices()
    assert devices == ["cuda:1"] and "Tesla P100" in told and "T4 accelerator" in told
    monkeypatch.setattr(shards.torch.cuda, "get_device_capability", lambda place: (6, 0))
    assert usable_devices()[0] == ["cpu"]


def test_what_a_library_prints_does_not_spoil_the_answers(figures, tmp_path):
    "The real entry of a worker, whose figure-reading prints to the standard output."
    path, = figures("1")
    code = ("import recodai_forgery.predict as predict\nload = predict.load_image\n"
            "def loud(path): print('warning: on the standard output'); return load(path)\npredict.load_image = loud\n"
            "from recodai_forgery.shards import work; work()")
    told = collect(predict_shards([path], [Job()], 120, command=[sys.executable, "-c", code]))
    assert told == {"1": ("full", "")}


def test_an_answer_in_the_last_moment_costs_no_other_figure(figures, monkeypatch):
    "The timer fires when the answer is there already: the figure is answered, and the next one gets a fresh worker."
    ask = shards.Worker.ask

    def just_in_time(worker, way, paths, seconds):
        told = ask(worker, way, paths, seconds)
        if paths[0].stem == "1": worker.stop_late()
        return told

    monkeypatch.setattr(shards.Worker, "ask", just_in_time)
    told = collect(predict_shards(figures("1", "2", "3"), [Job()], 60, command=stub()))
    assert told == {name: ("full", "") for name in ("1", "2", "3")}
