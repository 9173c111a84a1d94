"""What the way through Kaggle's notebook costs against `recodai-forgery predict`. `make bench` calls it; it also runs alone.

Both run on one core, so that the notebook's second worker gives it no advantage, and both are timed from the start of their process to
its end: the notebook's time holds the sums, the installation, and the start of a worker.
"""
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

FIGURES = 60


def kernel_overhead() -> Iterator[tuple[str, str, float, float, str]]:
    from recodai_forgery.bundle import COMPETITION, build_bundle, read_manifest
    from recodai_forgery.rehearse import draw_ordinary, run_notebook
    cores = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as name:
        folder, kaggle = Path(name), Path(name) / "kaggle"
        images, sample = kaggle / "input" / COMPETITION / "test_images", kaggle / "input" / COMPETITION / "sample_submission.csv"
        for path in images, kaggle / "working": path.mkdir(parents=True)
        for number in range(FIGURES): Image.fromarray(draw_ordinary(number, np.random.default_rng(number))).save(images / f"{number}.png")
        sample.write_text("case_id,annotation\n" + "".join(f"{number},authentic\n" for number in range(FIGURES)))
        clone = folder / "clone" # bundles are made from commits
        subprocess.run(["git", "clone", "-q", str(Path(__file__).parent.parent), str(clone)], check=True)
        bundle = build_bundle(kaggle / "input" / "bundle", "somebody", checkout=clone).path
        packages = [package for package in read_manifest(bundle)["image"] if package != "python"]
        os.sched_setaffinity(0, {max(cores)})
        try:
            began = time.perf_counter()
            subprocess.run([str(Path(sys.executable).parent / "recodai-forgery"), "predict", str(images), "--sample", str(sample),
                            "--out", str(folder / "submission.csv")], check=True, capture_output=True, cwd=clone, env={**os.environ, "PYTHONPATH": str(clone)})
            direct = time.perf_counter() - began
            run = run_notebook(bundle / "submit.ipynb", {}, kaggle, packages, 4)
        finally: os.sched_setaffinity(0, cores)
        if run.problem: raise SystemExit(run.log)
        same = (folder / "submission.csv").read_bytes() == (kaggle / "working" / "submission.csv").read_bytes()
    yield (f"prediction through the notebook, {FIGURES} figures, {'the same bytes' if same else 'OTHER ANSWERS'}", "recodai-forgery predict",
           run.seconds / direct, 1.03, f"{run.seconds:.0f} s against {direct:.0f} s")


if __name__ == "__main__":
    for what, peer, ratio, bar, times in kernel_overhead(): print(f"{what} against {peer}: {ratio:.3f} times the time (bar {bar}); {times}")
