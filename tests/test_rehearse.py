"""Both notebooks from top to bottom as Kaggle runs them: trained, bundled, rehearsed, without a network."""
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from recodai_forgery import image as image_room
from recodai_forgery.bundle import COMPETITION, SUMS, WEIGHTS, build_bundle, read_image, write_sums
from recodai_forgery.image import find_images, image_info
from recodai_forgery.rehearse import (
    ODD,
    UNREADABLE,
    can_isolate,
    make_environment,
    make_figures,
    notebook_script,
    rehearse,
    required,
    run_notebook,
)
from recodai_forgery.synth import SynthConfig, make_tree
from recodai_forgery.types import BadBundle, BadConfig, BadImage

needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="rehearsals need Linux")
PIP_LOOKS_FOR_IPV6 = "pip._vendor.urllib3.util.connection._has_ipv6" # on import, whether or not there is an index


@pytest.fixture(scope="module")
def packages(root): return [name for name in read_image(root / "kaggle" / "image.txt") if name != "python"]


@pytest.fixture(scope="module")
def trained(checkout, packages, tmp_path_factory):
    "The train notebook, run on a tiny tree with a bundle of the matcher alone; gives the run, and the weights it has made."
    kaggle = tmp_path_factory.mktemp("train") / "kaggle"
    make_tree("skimage", kaggle / "input" / "competitions" / COMPETITION, 6, 0, SynthConfig(longest_max=96), progress=False)
    made = build_bundle(kaggle / "input" / "recodai-forgery", "somebody", checkout=checkout)
    (kaggle / "working").mkdir()
    run = run_notebook(made.path / "train.ipynb", {"HOURS": .1, "MODEL": {"size": 64, "channels": 16, "weights": "none"}, "TRAINING": {"epochs": 1, "workers": 0}},
                       kaggle, packages, .1, isolate=can_isolate())
    return run, kaggle / "working" / "run" / "best.safetensors"


@pytest.fixture(scope="module")
def bundle(trained, checkout, tmp_path_factory):
    return build_bundle(tmp_path_factory.mktemp("bundle") / "upload", "somebody", trained[1], checkout=checkout).path


def no_network(attempts): return all(PIP_LOOKS_FOR_IPV6 in attempt for attempt in attempts)


@needs_linux
@pytest.mark.slow
def test_the_train_notebook_offline(trained):
    run, best = trained
    assert not run.problem, run.log
    assert best.is_file() and str(best.name) in run.log and no_network(run.sockets)


@needs_linux
@pytest.mark.slow
def test_a_rehearsal_with_what_was_trained(bundle):
    "24 figures, hybrid, workers on both cores; from the installation to the submission nothing reaches for the network."
    shown = rehearse(bundle, 24)
    assert shown.valid, f"{shown}\n{shown.log}"
    assert no_network(shown.sockets), shown.sockets
    kinds = [kind for kind in ODD] + ["ordinary"] * 12
    assert set(shown.summary["notes"]) == {str(number) for number, kind in enumerate(kinds, 1) if kind in UNREADABLE}
    assert shown.summary["ways"] == {"full": 24} and shown.summary["method"] == "hybrid"
    assert shown.kinds["ordinary"] == 12 and shown.summary["forged"] >= 2 # of six forged ones; else it has not looked
    assert 0 < shown.figure_seconds < shown.seconds / 10 and 2e8 < shown.peak_bytes < 29e9
    assert re.search(r"2200 such figures: [0-9.]+ h \(4 h: ", str(shown))


@needs_linux
@pytest.mark.slow
def test_a_rehearsal_shows_what_would_fail(bundle, tmp_path):
    "One damaged byte, blocked sockets in place of namespaces, a notebook that calls home, and a limit on memory."
    damaged = shutil.copytree(bundle, tmp_path / "damaged")
    data = bytearray((damaged / WEIGHTS).read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / WEIGHTS).write_bytes(data)
    shown = rehearse(damaged, 1, isolate=False)
    assert not shown.valid and f"{WEIGHTS}: FAILED" in shown.log and "is damaged" in shown.log and "there is no submission.csv" in shown.problems

    silent = shutil.copytree(bundle, tmp_path / "silent") # workers that cannot start
    notebook = json.loads((silent / "submit.ipynb").read_text())
    notebook["cells"][-1]["source"] = ["import sys\n", "from recodai_forgery.kernel import submit\n", "print(submit(HOURS, command=[sys.executable, '-c', 'oh']))\n"]
    (silent / "submit.ipynb").write_text(json.dumps(notebook))
    write_sums(silent)
    shown = rehearse(silent, 1, isolate=False)
    assert not shown.valid and "1 readable figures were not judged" in str(shown) and "NameError" in str(shown)

    curious = shutil.copytree(bundle, tmp_path / "curious")
    notebook = json.loads((curious / "submit.ipynb").read_text())
    notebook["cells"][1]["source"] = ["HOURS = 4.0\n", "import urllib.request\n", "import socket\n", "try: socket.gethostbyname('example.org')\n",
                                       "except OSError: pass\n", "urllib.request.urlopen('https://example.org')\n"]
    (curious / "submit.ipynb").write_text(json.dumps(notebook))
    shown = rehearse(curious, 1, isolate=False)
    assert not shown.valid and not no_network(shown.sockets) and "there is no network in a rehearsal" in shown.log
    assert shown.isolation == "Python's sockets are blocked" and any("gethostbyname" in one for one in shown.sockets)
    assert "2200 such figures: not known" in str(shown)

    shown = rehearse(bundle, 1, memory=5e7)
    assert not shown.valid and "it took more than 0.1 GB" in shown.problems


@needs_linux
@pytest.mark.slow
def test_the_kernels_rooms_with_the_images_packages_alone_and_either_opencv(root, packages, tmp_path):
    "With the installed OpenCV, and with version 4 where `make` has put it beside the environment."
    python = make_environment(tmp_path / "environment", packages)
    assert "skimage" in "".join(os.listdir(next((tmp_path / "environment").glob("lib/python*/site-packages"))))
    rooms = sorted(path.stem[3:] for path in (root / "nbs").glob("[0-9]*.ipynb") if path.stem < "13")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)).save(tmp_path / "1.png")
    code = "\n".join([*(f"import recodai_forgery.{room}" for room in rooms), "from recodai_forgery.predict import Detector", "import cv2, sys",
                      "print(cv2.__version__.split('.')[0], Detector()(sys.argv[1]).annotation)",
                      "for name in 'typer', 'nbdev', 'fastcore', 'IPython', 'numba', 'hypothesis':",
                      "    try: __import__(name)", "    except ImportError: continue", "    sys.exit(f'{name} is here')"])
    said = set()
    for extra in "", str(root / ".venv" / "opencv4"):
        if extra and not os.path.isdir(extra): continue
        path = os.pathsep.join([extra, str(root)]).strip(os.pathsep)
        told = subprocess.run([python, "-c", code, tmp_path / "1.png"], capture_output=True, text=True, env={"PYTHONPATH": path, "PATH": os.environ["PATH"]})
        assert told.returncode == 0, told.stderr
        said.add(told.stdout.strip())
    assert said <= {"4 authentic", "5 authentic"} and (len(said) == 2 or not (root / ".venv" / "opencv4").is_dir())


# ---- its parts ----

def test_awkward_figures_are_what_they_are_called(tmp_path):
    kinds = make_figures(tmp_path / "figures", 14)
    assert list(kinds.values()) == [*ODD, "ordinary", "ordinary"] and len(find_images(tmp_path / "figures")) == 14
    about = {}
    for name, kind in kinds.items():
        try: about[kind] = image_info(tmp_path / "figures" / f"{name}.png")
        except BadImage: about[kind] = None
    assert {kind for kind in about if about[kind] is None} == {"empty", "no image"}
    modes = {"two-dimensional grey": "L", "RGBA": "RGBA", "palette": "P", "16 bits": "I;16", "ordinary": "RGB"}
    assert {kind: about[kind].mode for kind in modes} == modes
    assert about["one pixel"].shape == (1, 1) and about["3888 x 3888"].shape == (3888, 3888)
    assert np.prod(about["13.8 megapixels"].shape) > 13.8e6 and about["strip of 18:1"].shape == (100, 1800)
    with pytest.raises(BadImage): image_room.load_image(tmp_path / "figures" / f"{list(ODD).index('truncated') + 1}.png")


def test_the_same_seed_makes_the_same_figures(tmp_path):
    few = {name: ODD[name] for name in ("RGBA", "truncated", "one pixel")}
    for folder, seed in ("a", 3), ("b", 3), ("c", 4):
        (tmp_path / folder).mkdir()
        for name, make in few.items(): make(tmp_path / folder / f"{name}.png", np.random.default_rng(seed))
    read = lambda folder: [path.read_bytes() for path in sorted((tmp_path / folder).iterdir())]
    assert read("a") == read("b") != read("c")


def test_parameters_are_set_where_they_stand(root):
    notebook = root / "kaggle" / "submit" / "submit.ipynb"
    script = notebook_script(notebook, {"HOURS": .5})
    assert script.index("HOURS = 4.0") < script.index("HOURS = 0.5") < script.index("submit(HOURS)")
    compile(notebook_script(root / "kaggle" / "train" / "train.ipynb"), "train", "exec")
    with pytest.raises(BadConfig, match="has no parameter HOUR"): notebook_script(notebook, {"HOUR": .5})


def test_what_the_image_lists_must_be_here():
    assert {"numpy", "torch", "sympy", "jinja2"} <= set(required(["torch", "NumPy"])) and "typer" not in required(["torch", "scikit-image"])
    with pytest.raises(BadConfig, match="lists no-such-package"): required(["no-such-package"])


def test_no_bundle_no_rehearsal(tmp_path):
    with pytest.raises(BadBundle): rehearse(tmp_path)
    (tmp_path / "manifest.json").write_text('{"bundle": "recodai_forgery", "image": {}}')
    (tmp_path / SUMS).write_text("")
    with pytest.raises(BadBundle, match=r"lacks submit.ipynb"): rehearse(tmp_path)
