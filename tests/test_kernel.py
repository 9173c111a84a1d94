"""What the notebooks on Kaggle call: mounts, a valid file from the first second on, and training that goes on."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from recodai_forgery import kernel, types
from recodai_forgery.bundle import COMPETITION, SUMS, WEIGHTS, build_bundle, write_sums
from recodai_forgery.kernel import find_bundle, find_competition, find_run, submit
from recodai_forgery.model import ModelConfig
from recodai_forgery.rehearse import can_isolate
from recodai_forgery.submission import read_table, validate_submission
from recodai_forgery.types import BadBundle, BadConfig, NotMounted, WeightsUnavailable

STUB = (Path(__file__).parent / "test_shards.py").read_text().split('STUB = """')[1].split('"""')[0]


def stub(full=0., cheap=-1.): return [sys.executable, "-c", STUB, str(full), str(cheap)]


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    "Kaggle's folders, empty."
    for name in "input", "working": (tmp_path / "kaggle" / name).mkdir(parents=True)
    monkeypatch.setenv("RECODAI_KAGGLE", str(tmp_path / "kaggle"))
    for name in "RECODAI_COMPETITION", "RECODAI_BUNDLE": monkeypatch.delenv(name, raising=False)
    return tmp_path / "kaggle"


def mount_competition(kaggle, place=f"competitions/{COMPETITION}", sample=("1", "2", "3"), images=("1", "2", "3")):
    folder = kaggle / "input" / place
    (folder / "test_images").mkdir(parents=True)
    (folder / "sample_submission.csv").write_text("case_id,annotation\n" + "".join(f"{name},authentic\n" for name in sample))
    for name in images: cv2.imwrite(str(folder / "test_images" / f"{name}.png"), np.full((8, 8, 3), 200, np.uint8))
    return folder


def mount_bundle(kaggle, place="datasets/somebody/recodai-forgery", **manifest):
    folder = kaggle / "input" / place
    folder.mkdir(parents=True)
    text = {"bundle": "recodai_forgery", "version": "0.1.0", "commit": "", "method": "match", "weights": None, "model": None, "gate": None, "image": {}} | manifest
    (folder / "manifest.json").write_text(json.dumps(text))
    write_sums(folder)
    return folder


def annotations(path):
    table = read_table(path)
    return dict(zip(table.case_id, table.annotation, strict=True))


# ---- mounts ----

PLACES = "recodai-forgery", "datasets/somebody/recodai-forgery", "models/somebody/recodai/pytorch/default/3", "notebooks/somebody/recodai-train/bundle"


@pytest.mark.parametrize("place", PLACES)
def test_the_bundle_is_found_wherever_kaggle_mounts_it(kaggle, place):
    (kaggle / "input" / "cars").mkdir()
    (kaggle / "input" / "cars" / "manifest.json").write_text("[]")
    (kaggle / "input" / "cars" / SUMS).write_text("")
    folder = mount_bundle(kaggle, place)
    assert find_bundle() == folder


@pytest.mark.parametrize("place", [f"competitions/{COMPETITION}", COMPETITION, "datasets/somebody/a-copy-of-the-data"])
def test_the_competition_is_found_wherever_kaggle_mounts_it(kaggle, place):
    folder = mount_competition(kaggle, place)
    assert find_competition() == folder


def test_a_copy_of_the_data_is_not_mistaken_for_the_hidden_test_set(kaggle):
    mount_competition(kaggle, "datasets/somebody/a-copy-of-the-data", sample=["45"], images=["45"])
    hidden = mount_competition(kaggle)
    assert find_competition() == hidden
    shutil.rmtree(hidden)
    mount_competition(kaggle, "datasets/somebody/b-synthetic", sample=["1"], images=["1"])
    with pytest.raises(NotMounted, match="is there 2 times"): find_competition()


@pytest.mark.parametrize("place", PLACES)
def test_the_notebooks_first_cell_finds_checks_and_installs_the_bundle(kaggle, place, root, checkout):
    "The cell itself, but for pip, whose arguments are looked at."
    source = "".join(json.loads((root / "kaggle" / "submit" / "submit.ipynb").read_text())["cells"][3]["source"])
    cell = source.replace('[sys.executable, "-m", "pip", "install"', '["echo", "install"')
    assert cell != source
    run = lambda: subprocess.run([sys.executable, "-c", cell], capture_output=True, text=True, env={**os.environ, "RECODAI_KAGGLE": str(kaggle)})
    none = run()
    assert none.returncode and "0 bundles in" in none.stderr
    made = build_bundle(kaggle / "input" / place, "somebody", checkout=checkout)
    for folder in Path(f"{made.path}-submit"), Path(f"{made.path}-train"): shutil.rmtree(folder)
    told = run()
    assert told.returncode == 0, told.stderr
    assert "manifest.json: OK" in told.stdout and "install --no-index --no-deps recodai_forgery-" in told.stdout
    again = shutil.copytree(made.path, kaggle / "input" / "twice" / "somebody")
    assert run().returncode == 0 # the same once more
    (again / "SHA256SUMS").write_text("another")
    two = run()
    assert two.returncode and "2 bundles in" in two.stderr
    shutil.rmtree(again)
    wheel, = made.path.glob("*.whl")
    wheel.write_bytes(wheel.read_bytes()[:-1] + b"x")
    damaged = run()
    assert damaged.returncode and f"{wheel.name}: FAILED" in damaged.stderr and "is damaged" in damaged.stderr


def test_a_missing_mount_is_named_with_what_is_there(kaggle):
    mount_competition(kaggle)
    with pytest.raises(NotMounted, match=rf"the bundle: mounted in .*competitions/{COMPETITION}.*set RECODAI_BUNDLE"): find_bundle()
    shutil.rmtree(kaggle / "input")
    with pytest.raises(NotMounted, match="nothing"): find_competition()


def test_the_same_twice_is_one_and_two_are_a_question(kaggle, monkeypatch):
    first, again = (mount_bundle(kaggle, place) for place in PLACES[:2])
    assert find_bundle() in (first, again)
    other = mount_bundle(kaggle, PLACES[2], version="0.2.0")
    with pytest.raises(NotMounted, match="is there 3 times") as found: find_bundle()
    assert str(other) in str(found.value)
    monkeypatch.setenv("RECODAI_BUNDLE", str(other))
    assert find_bundle() == other
    monkeypatch.setenv("RECODAI_BUNDLE", str(kaggle))
    with pytest.raises(NotMounted, match="RECODAI_BUNDLE=.* is not the bundle"): find_bundle()


# ---- the submission ----

def test_the_sample_decides_which_rows_there_are(kaggle):
    competition = mount_competition(kaggle, sample=("10", "9", "007", "45"), images=("9", "45", "007", "8"))
    (competition / "test_images" / "45.png").write_text("no image")
    mount_bundle(kaggle)
    summary = submit(cores=2, command=stub(), progress=False)
    assert annotations(summary.path) == {"10": "authentic", "9": "[1, 2]", "007": "[1, 2]", "45": "authentic"}
    assert list(annotations(summary.path)) == ["10", "9", "007", "45"]
    assert (summary.without_figure, summary.not_in_sample, list(summary.notes)) == (("10",), ("8",), ["45"])
    assert json.loads((kaggle / "working" / "summary.json").read_text())["forged"] == summary.forged == 2
    assert validate_submission(summary.path, competition / "sample_submission.csv", competition / "test_images") == []


def test_a_damaged_bundle_is_refused_and_a_valid_file_stands(kaggle):
    mount_competition(kaggle)
    folder = mount_bundle(kaggle)
    (folder / WEIGHTS).write_bytes(b"weights")
    write_sums(folder)
    (folder / WEIGHTS).write_bytes(b"weightt")
    with pytest.raises(BadBundle, match=f"{WEIGHTS} is not what was bundled"): submit(command=stub(), progress=False)
    assert set(annotations(kaggle / "working" / "submission.csv").values()) == {"authentic"}


def test_an_answer_that_is_not_valid_costs_its_row(kaggle):
    "From a worker, which might be another version; here all its answers end outside of figure 2."
    competition = mount_competition(kaggle)
    cv2.imwrite(str(competition / "test_images" / "2.png"), np.zeros((1, 1, 3), np.uint8))
    mount_bundle(kaggle)
    code = STUB.replace('"shape": [8, 8]', '"shape": [1, 1] if name == "2" else [8, 8]')
    summary = submit(cores=1, command=[sys.executable, "-c", code, "0", "-1"], progress=False)
    assert annotations(summary.path) == {"1": "[1, 2]", "2": "authentic", "3": "[1, 2]"} and "not valid" in summary.notes["2"]


def test_when_time_runs_out_the_rest_gets_a_cheaper_look_and_then_none(kaggle):
    names = [str(number) for number in range(40)]
    mount_competition(kaggle, sample=names, images=names)
    mount_bundle(kaggle)
    summary = submit(8 / 3600, cores=2, command=stub(.5, .02), progress=False)
    assert set(summary.ways) == {"full", "cheap"} and sum(summary.ways.values()) == 40 and summary.seconds < 12
    assert set(annotations(summary.path).values()) == {"[1, 2]"}
    summary = submit(3 / 3600, cores=2, command=stub(.5), progress=False)
    assert summary.ways["unanswered"] > 20 and summary.ways["full"] and summary.seconds < 6
    table = annotations(summary.path)
    assert len(table) == 40 and sum(answer == "[1, 2]" for answer in table.values()) == summary.ways["full"]


def test_workers_that_cannot_start_leave_a_valid_file_and_say_why(kaggle):
    mount_competition(kaggle)
    mount_bundle(kaggle)
    summary = submit(command=[sys.executable, "-c", "raise ImportError('no kernels in here')"], progress=False)
    assert set(annotations(summary.path).values()) == {"authentic"} and "no kernels in here" in str(summary)


SUBMIT = "import sys\nfrom recodai_forgery.kernel import submit\nprint(submit(cores=2, command=sys.argv[1:], progress=False, seconds_between_writes=0))"


def test_killed_in_mid_run(kaggle):
    "The file that stands is valid for what was done; the rest is authentic."
    names = [str(number) for number in range(300)]
    competition = mount_competition(kaggle, sample=names, images=names)
    mount_bundle(kaggle)
    written = kaggle / "working" / "submission.csv"
    process = subprocess.Popen([sys.executable, "-c", SUBMIT, *stub(.02)], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    answered = lambda: sum(answer != "authentic" for answer in annotations(written).values()) if written.exists() else 0
    end = time.monotonic() + 120
    while answered() < 10 and time.monotonic() < end and process.poll() is None: time.sleep(.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and 10 <= answered() < 300
    assert validate_submission(written, competition / "sample_submission.csv", competition / "test_images") == []
    assert set(annotations(written).values()) == {"authentic", "[1, 2]"}


def test_a_disk_that_fills_up_leaves_the_file_that_stands(kaggle, monkeypatch):
    names = [str(number) for number in range(20)]
    mount_competition(kaggle, sample=names, images=names)
    mount_bundle(kaggle)
    synced, real = [], os.fsync

    def full_after_five(handle):
        synced.append(handle)
        if len(synced) > 5: raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(types.os, "fsync", full_after_five)
    summary = submit(cores=1, command=stub(), progress=False, seconds_between_writes=0) # an exception would throw the file away
    assert "ONLY 4 ANSWERS STAND IN THE FILE" in str(summary) and "No space left on device" in str(summary)
    assert "summary.json could not be written" in str(summary)
    stands = annotations(kaggle / "working" / "submission.csv")
    assert len(stands) == 20 and sum(answer != "authentic" for answer in stands.values()) == 4 # the first write had none
    assert [path.name for path in (kaggle / "working").iterdir()] == ["submission.csv"] # and no litter


def test_a_write_that_fails_in_between_is_told_and_made_up_for(kaggle, monkeypatch):
    mount_competition(kaggle)
    mount_bundle(kaggle)
    write, calls = kernel.write_submission, []

    def sometimes(*words):
        calls.append(words)
        if len(calls) == 2: raise OSError(errno.ENOSPC, "No space left on device")
        return write(*words)

    monkeypatch.setattr(kernel, "write_submission", sometimes)
    summary = submit(cores=1, command=stub(), progress=False, seconds_between_writes=0)
    assert set(annotations(summary.path).values()) == {"[1, 2]"} and "a write failed: " in str(summary)


@pytest.mark.skipif(not can_isolate(), reason="this machine makes no namespaces, in which a small disk could be mounted")
def test_a_disk_that_is_really_full(kaggle):
    names = [str(number) for number in range(400)]
    mount_competition(kaggle, sample=names, images=names)
    mount_bundle(kaggle)
    script = 'mount -t tmpfs -o size=12k none "$1"; shift; "$@" 2>&1; cat "$RECODAI_KAGGLE/working/submission.csv"'
    told = subprocess.run(["unshare", "-rm", "/bin/sh", "-c", script, "sh", str(kaggle / "working"), sys.executable, "-c",
                           SUBMIT.replace("seconds_between_writes=0", "seconds_between_writes=.2"), *stub(.002)],
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert "No space left on device" in told.stdout and "ONLY" in told.stdout and "Traceback" not in told.stdout
    rows = told.stdout[told.stdout.index("case_id,annotation"):].splitlines()
    assert len(rows) == 401


@pytest.mark.slow
def test_two_workers_write_the_bytes_of_one(kaggle, tiny_checkpoint, checkout):
    "As two GPUs would, simulated by two processes on the CPU: the real network and the real matcher."
    names, rng = [str(number) for number in range(6)], np.random.default_rng(0)
    competition = mount_competition(kaggle, sample=names, images=())
    for name in names:
        image = cv2.resize(rng.integers(0, 256, (9, 9, 3)).astype(np.uint8), (70 + 4 * int(name), 60), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(competition / "test_images" / f"{name}.png"), image)
    build_bundle(kaggle / "input" / "datasets" / "somebody", "somebody", tiny_checkpoint, checkout=checkout)
    files = []
    for cores in 1, 2:
        summary = submit(cores=cores, progress=False, out=kaggle / "working" / f"{cores}.csv")
        assert len(summary.workers) == cores and summary.ways == {"full": 6} and summary.method == "hybrid"
        files.append(summary.path.read_bytes())
    assert files[0] == files[1] and b"[" in files[0]


# ---- training ----

@pytest.mark.slow
def test_training_stops_in_time_and_goes_on_with_what_is_mounted(kaggle, tmp_path):
    from recodai_forgery.synth import SynthConfig, make_tree
    make_tree("skimage", tmp_path / "tree", 6, 0, SynthConfig(longest_max=96), progress=False)
    (kaggle / "input" / "competitions").mkdir()
    (tmp_path / "tree").rename(kaggle / "input" / "competitions" / COMPETITION)
    options = {"model": {"size": 64, "channels": 16, "weights": "none"}, "training": {"epochs": 2, "workers": 0}}
    assert find_run() is None
    out = kaggle / "working" / "run"
    log, mounted = out / "log.csv", kaggle / "input" / "notebooks" / "somebody" / "recodai-forgery-train"
    with pytest.warns(UserWarning, match="goes on from there"): # within the first epoch
        assert kernel.train(1e-9, **options, progress=False) is None and not log.exists()
    mounted.parent.mkdir(parents=True)
    for _ in range(8): # a step or a validation each, until one epoch of two is validated
        shutil.rmtree(mounted, ignore_errors=True)
        shutil.move(out, mounted)
        assert find_run() == mounted and not out.exists()
        best = kernel.train(1e-9, progress=False)
        if best: break
    assert best == out / "best.safetensors" and len(log.read_text().splitlines()) == 2 # the header, and the epoch
    shutil.rmtree(mounted)
    shutil.move(out, mounted)
    with pytest.raises(BadConfig, match="'epochs'.*cannot be changed"): kernel.train(training={"epochs": 3}, progress=False)
    again = kernel.train(1, progress=False)
    assert again == best and len(log.read_text().splitlines()) == 3


def test_pretrained_weights_are_sought_in_what_is_mounted(kaggle):
    "The kernel has no internet, where torchvision would look."
    mount_competition(kaggle)
    with pytest.raises(WeightsUnavailable, match="mobilenet_v2-b0353104.pth: .*nothing that is mounted.*weights=\"none\""):
        kernel.train(model={"backbone": "mobilenet_v2", "weights": "imagenet"}, progress=False)
    with pytest.raises(WeightsUnavailable, match="maskrcnn_resnet50_fpn_coco"): kernel.train(preset="baseline", progress=False)
    folder = kaggle / "input" / "datasets" / "pytorch" / "torchvision-weights"
    folder.mkdir(parents=True)
    (folder / "mobilenet_v2-b0353104.pth").touch()
    assert kernel.find_weights(ModelConfig("mobilenet_v2", weights="imagenet")).weights == str(folder / "mobilenet_v2-b0353104.pth")
    for weights in "none", "backbone.pth": assert kernel.find_weights(ModelConfig(weights=weights)).weights == weights
