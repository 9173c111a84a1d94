"""What every test may ask for. Tests need no network and no GPU."""
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    "The repository."
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    "The folder of shared test data, found by RECODAI_SHARED; the test is skipped where it is absent."
    folder = Path(os.environ.get("RECODAI_SHARED") or ROOT.parent / "shared").resolve()
    if not folder.is_dir(): pytest.skip("no shared test data: set RECODAI_SHARED to the folder that holds golden/ and bench/")
    return folder


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    "A clone of the project as it lies here, committed: bundles are made from commits."
    folder = tmp_path_factory.mktemp("checkout") / "project"
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode: pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if not (ROOT / name).is_file(): continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    who = ["-c", "user.name=tester", "-c", "user.email=tester@example.org", "-c", "commit.gpgsign=false"]
    for words in ["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "-m", "as it lies here"]:
        subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    "A network that has learned nothing and answers all the same."
    from recodai_forgery.model import ModelConfig, build_model, save_model
    path, config = tmp_path_factory.mktemp("weights") / "best.safetensors", ModelConfig("mobilenet_v2", size=64, channels=16, norm="batch")
    save_model(path, build_model(config), config, {"score_threshold": .1, "figure_threshold": .1})
    return path
