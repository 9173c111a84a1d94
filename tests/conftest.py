"""What every test may ask for. Tests need no network and no GPU."""
import os
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
