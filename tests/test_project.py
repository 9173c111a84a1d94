"""The house rules that a machine can check: notebooks and package in step, layers, sizes, README, kernel imports."""
import ast
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

KERNEL_PACKAGES = {"torch", "torchvision", "cv2", "numpy", "pandas", "sklearn", "scipy", "PIL", "tqdm", "matplotlib", "safetensors"}
BEYOND_THE_KERNEL = {"typer", "skimage", "tensorboard", "packaging"} # behind cli and extras, imported inside functions


def notebooks(root: Path) -> list[Path]: return sorted((root / "nbs").glob("*.ipynb"))


def modules(root: Path) -> list[Path]: return sorted(path for path in (root / "recodai_forgery").glob("*.py") if path.name != "_modidx.py")


def run_nbdev(command: str, folder: Path) -> None:
    "An nbdev command in a copy; with IN_TEST set, as nbdev_test does, the export would silently do nothing."
    environment = {name: value for name, value in os.environ.items() if name != "IN_TEST"}
    result = subprocess.run([Path(sys.executable).parent / command], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def copy(root, tmp_path_factory) -> Path:
    "A copy of the sources without the package."
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(root / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name in ("settings.ini", "pyproject.toml"): shutil.copy(root / name, folder)
    return folder


def test_package_is_the_export_of_the_notebooks(root, copy):
    run_nbdev("nbdev_export", copy)
    fresh = {path.name: path.read_text() for path in (copy / "recodai_forgery").glob("*.py")}
    here = {path.name: path.read_text() for path in (root / "recodai_forgery").glob("*.py")}
    assert sorted(fresh) == sorted(here), "stale or missing modules: run nbdev_export and delete what no notebook makes"
    assert [name for name in fresh if fresh[name] != here[name]] == [], "edited by hand, or not exported: run nbdev_export"
    assert (copy / "pyproject.toml").read_text() == (root / "pyproject.toml").read_text()


def test_notebooks_are_clean(root, copy):
    run_nbdev("nbdev_clean", copy)
    changed = [path.name for path in notebooks(root) if json.loads(path.read_text()) != json.loads((copy / "nbs" / path.name).read_text())]
    assert changed == [], "run nbdev_clean"


def test_readme_is_the_rendered_index(root):
    namespace = runpy.run_path(str(root / "nbs" / "render_readme.py"))
    assert (root / "README.md").read_text() == namespace["render"](), "run make export"


def test_tests_that_the_readme_names_exist(root):
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (root / "README.md").read_text())
    assert len({row for row in named}) >= 19
    assert [f"{file}::{test}" for file, test in named if f"def {test}(" not in (root / "tests" / file).read_text()] == []


def imported(path: Path) -> list[tuple[str, ast.AST]]:
    "Every module that a file imports, with its place; nbdev writes imports of our own rooms as relative ones."
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import): found += [(alias.name, node) for alias in node.names]
        if isinstance(node, ast.ImportFrom): found.append(("recodai_forgery." * bool(node.level) + (node.module or ""), node))
    return found


def test_modules_import_only_from_lower_rooms(root):
    place = {path.stem[3:]: path.stem for path in notebooks(root)} # notebooks sort in import order
    links = [(place.get(path.stem, "99"), place[name.split(".")[1]]) for path in modules(root) if path.name != "__init__.py"
             for name, _ in imported(path) if name.startswith("recodai_forgery.") and name != "recodai_forgery."]
    assert len(links) > 10
    assert [(own, other) for own, other in links if other >= own] == []


def test_modules_import_only_what_the_kernel_holds(root):
    allowed = KERNEL_PACKAGES | set(sys.stdlib_module_names) | {"recodai_forgery"}
    for path in modules(root):
        foreign = [(name.split(".")[0], node) for name, node in imported(path) if name.split(".")[0] not in allowed]
        assert {name for name, _ in foreign} <= BEYOND_THE_KERNEL, f"{path.name} imports {foreign}"
        assert path.stem == "cli" or all(node.col_offset for _, node in foreign), f"{path.name} imports {foreign} for everybody"


def test_rooms_stay_rooms(root):
    for path in modules(root): assert len(path.read_text().splitlines()) <= 450, f"{path.name}: two rooms?"
    for path in notebooks(root):
        cells = json.loads(path.read_text())["cells"]
        assert path.stat().st_size <= 500_000, f"{path.name} is too large"
        outputs = [len(json.dumps(cell["outputs"])) for cell in cells if cell["cell_type"] == "code"]
        assert max(outputs, default=0) <= 70_000, f"{path.name} stores an output of {max(outputs)} bytes" # 50 kB of picture in base64
        assert not any("eval: false" in "".join(cell["source"]) for cell in cells), f"{path.name} hides a cell from the tests"


def test_version_stands_in_one_place(root):
    import recodai_forgery
    assert f"version = {recodai_forgery.__version__}\n" in (root / "settings.ini").read_text()
    assert f"## {recodai_forgery.__version__}" in (root / "CHANGELOG.md").read_text()


def test_top_level_holds_no_more_than_the_plan(root):
    tracked = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True)
    if tracked.returncode: pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    plan = {"README.md", "settings.ini", "pyproject.toml", "constraints.txt", "Makefile", "nbs", "recodai_forgery", "kaggle", "tests", ".ci", "LICENSE", "CHANGELOG.md"}
    assert {name for name in top if not name.startswith(".")} <= plan


def test_kernel_imports_need_no_extra(root):
    "Every room of the kernel's way, imported with the extras blocked, in a process of its own."
    rooms = [path.stem[3:] for path in notebooks(root) if path.stem[:2].isdigit() and path.stem < "13"]
    blocked = "import sys\nfor name in ('typer', 'skimage', 'nbdev', 'fastcore', 'IPython', 'numba', 'tensorboard'): sys.modules[name] = None\n"
    imports = "\n".join(f"import recodai_forgery.{room}" for room in rooms)
    result = subprocess.run([sys.executable, "-c", blocked + imports], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
