"""The bundle: the same bytes from the same commit, every damaged byte found, nothing that Kaggle would refuse."""
import json
import shutil
import subprocess
import zipfile

import pytest

from recodai_forgery import __version__
from recodai_forgery.bundle import (
    METADATA,
    SUMS,
    WEIGHTS,
    add_wheels,
    build_bundle,
    check_sums,
    dataset_faults,
    fill,
    kernel_faults,
    lacking,
    read_image,
    read_manifest,
    upload_faults,
    wheel_metadata,
)
from recodai_forgery.types import BadBundle, BadCheckpoint, BadConfig


@pytest.fixture(scope="module")
def bundle(checkout, tiny_checkpoint, tmp_path_factory):
    return build_bundle(tmp_path_factory.mktemp("bundle") / "upload", "somebody", tiny_checkpoint, checkout=checkout)


@pytest.fixture
def copied(bundle, tmp_path):
    return shutil.copytree(bundle.path, tmp_path / "copied")


def wheel_of(folder): return next(folder.glob("*.whl"))


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_all_that_the_kernel_needs_in_one_flat_folder(bundle):
    assert sorted(path.name for path in bundle.path.iterdir()) == sorted(
        [f"recodai_forgery-{__version__}-py3-none-any.whl", WEIGHTS, "manifest.json", "submit.ipynb", "train.ipynb", SUMS, METADATA])
    manifest = read_manifest(bundle.path)
    assert (manifest["method"], manifest["version"], manifest["model"]["size"]) == ("hybrid", __version__, 64)
    assert manifest["thresholds"] == {"score_threshold": .1, "figure_threshold": .1} and manifest["image"]["torch"] == "2.10.0"
    assert len(manifest["commit"]) == 40 and "the image lacks nothing" in str(bundle) and bundle.added == ()
    listed = (bundle.path / SUMS).read_text()
    assert METADATA not in listed and WEIGHTS in listed # the metadata is not uploaded
    with zipfile.ZipFile(wheel_of(bundle.path)) as wheel:
        names = wheel.namelist()
    assert {"recodai_forgery/gate.json", "recodai_forgery/kernel.py", "recodai_forgery/weights/crosscheck.safetensors", "recodai_forgery/weights/crosscheck.md"} <= set(names) and not [name for name in names if name.startswith(("nbs", "tests", "kaggle"))]


def test_the_same_commit_gives_the_same_bytes(bundle, checkout, tiny_checkpoint, tmp_path):
    clone = tmp_path / "a clone somewhere else"
    subprocess.run(["git", "clone", "-q", str(checkout), str(clone)], check=True)
    (clone / "recodai_forgery" / "left_over.py").write_text("1 / 0") # not committed, so not bundled
    again = build_bundle(tmp_path / "again", "somebody", tiny_checkpoint, checkout=clone)
    assert {path.name: path.read_bytes() for path in bundle.path.iterdir()} == {path.name: path.read_bytes() for path in again.path.iterdir()}


def test_a_gate_of_ones_own_travels(checkout, tmp_path):
    from recodai_forgery.gate import load_gate, save_gate
    save_gate(load_gate(), tmp_path / "mine.json")
    made = build_bundle(tmp_path / "out", "somebody", gate=tmp_path / "mine.json", checkout=checkout)
    assert read_manifest(made.path)["gate"] == "gate.json" and (made.path / "gate.json").read_bytes() == (tmp_path / "mine.json").read_bytes()
    assert "gate.json" in (made.path / SUMS).read_text() and made.method == "hybrid"
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(BadConfig, match="mine.json: holds no gate"): build_bundle(tmp_path / "other", "somebody", gate=tmp_path / "mine.json", checkout=checkout)


def test_every_flipped_byte_is_found(copied):
    for name in wheel_of(copied).name, WEIGHTS, "manifest.json", "submit.ipynb":
        for place in 0, -1, (copied / name).stat().st_size // 2:
            flip(copied / name, place)
            with pytest.raises(BadBundle, match=f"{name} is not what was bundled"): check_sums(copied)
            flip(copied / name, place)
    check_sums(copied)


def test_what_is_missing_is_named(copied):
    (copied / WEIGHTS).unlink()
    with pytest.raises(BadBundle, match=f"{WEIGHTS} is missing"): check_sums(copied)
    (copied / SUMS).write_text("")
    with pytest.raises(BadBundle, match="does not list manifest.json"): check_sums(copied)
    (copied / SUMS).unlink()
    with pytest.raises(BadBundle, match="cannot be read"): check_sums(copied)
    (copied / "manifest.json").write_text('{"bundle": "of flowers"}')
    with pytest.raises(BadBundle, match="not the manifest of a bundle of ours"): read_manifest(copied)


def test_changes_that_are_not_committed_are_refused(checkout, tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(checkout), str(clone)], check=True)
    (clone / "README.md").write_text("changed")
    with pytest.raises(BadBundle, match="README.md; commit them first"): build_bundle(tmp_path / "out", "somebody", checkout=clone)
    with pytest.raises(BadBundle, match="no git checkout"): build_bundle(tmp_path / "out", "somebody", checkout=tmp_path)
    assert not (tmp_path / "out").exists()


def test_metadata_that_the_user_has_added_stays(bundle, checkout, tmp_path):
    shutil.copytree(bundle.path, tmp_path / "out")
    (tmp_path / "out" / "model-instance-metadata.json").write_text("filled in by hand")
    made = build_bundle(tmp_path / "out", "somebody", checkout=checkout)
    assert (made.path / "model-instance-metadata.json").read_text() == "filled in by hand" and not (made.path / WEIGHTS).exists()
    assert "model-instance" not in (made.path / SUMS).read_text()


def test_nothing_is_lost_where_a_bundle_cannot_be_made(bundle, checkout, tmp_path):
    before = {path.name: path.read_bytes() for path in bundle.path.iterdir()}
    (tmp_path / "weights").write_bytes(b"no weights")
    with pytest.raises(BadCheckpoint): build_bundle(bundle.path, "somebody", tmp_path / "weights", checkout=checkout)
    with pytest.raises(BadBundle, match="placeholder"): build_bundle(bundle.path, "OWNER", checkout=checkout)
    with pytest.raises(BadBundle, match="letters, digits and dashes"): build_bundle(bundle.path, "some body", checkout=checkout)
    with pytest.raises(BadConfig, match="needs a checkpoint"): build_bundle(bundle.path, "somebody", None, "maskrcnn", checkout=checkout)
    assert before == {path.name: path.read_bytes() for path in bundle.path.iterdir()}
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(BadBundle, match="is no bundle"): build_bundle(tmp_path / "thesis", "somebody", checkout=checkout)
    assert (tmp_path / "thesis" / "chapter1.tex").exists()


GOOD = {"id": "somebody/recodai-forgery", "title": "recodai_forgery", "subtitle": "x" * 20, "licenses": [{"name": "apache-2.0"}]}


@pytest.mark.parametrize("change, refused", [
    ({"title": "x" * 5}, True), ({"title": "x" * 6}, False), ({"title": "x" * 50}, False), ({"title": "x" * 51}, True), ({"title": None}, True),
    ({"subtitle": "x" * 19}, True), ({"subtitle": "x" * 80}, False), ({"subtitle": "x" * 81}, True), ({"subtitle": None}, True),
    ({"id": "somebody/" + "x" * 5}, True), ({"id": "somebody/" + "x" * 50}, False), ({"id": "somebody/" + "x" * 51}, True),
    ({"id": "somebody"}, True), ({"id": "some body/recodai"}, True), ({"id": "OWNER/recodai-forgery"}, True), ({"id": None}, True),
    ({"licenses": []}, True), ({"licenses": [{"name": "apache-2.0"}, {"name": "CC0-1.0"}]}, True), ({"licenses": [{"name": "Apache 2"}]}, True),
    ({"licenses": "apache-2.0"}, True), ({"licenses": ["apache-2.0"]}, True), ({}, False)])
def test_kaggles_rules_for_datasets(change, refused): assert bool(dataset_faults(GOOD | change)) == refused


@pytest.mark.parametrize("change, fault", [
    ({"enable_internet": True}, "enable_internet"), ({"enable_internet": None}, "enable_internet"), ({"enable_internet": "false"}, "enable_internet"),
    ({"machine_shape": "NvidiaTeslaP100"}, "machine_shape"), ({"enable_gpu": False}, "enable_gpu"), ({"title": "another"}, "another slug"),
    ({"competition_sources": []}, "competition_sources"), ({"dataset_sources": []}, "neither a dataset nor a model"),
    ({"dataset_sources": ["OWNER/recodai-forgery"]}, "only a placeholder"),
    ({"model_sources": ["somebody/recodai/pyTorch/default"]}, "has no version"), ({"model_sources": ["somebody/recodai/pyTorch/default/1"]}, None)])
def test_kaggles_rules_for_notebooks(root, change, fault):
    for name in "submit", "train":
        filled = fill(root / "kaggle" / name / "kernel-metadata.json", "somebody")
        assert kernel_faults(filled) == [] and filled["code_file"] == f"{name}.ipynb"
        found = kernel_faults({key: value for key, value in (filled | change).items() if value is not None})
        assert found == [] if fault is None else any(fault in one for one in found)


def test_what_an_upload_would_leave_out_or_unpack(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in "weights.tar.gz", "a.zip", "b.whl", "c.safetensors": (tmp_path / name).touch()
    assert upload_faults(sorted(tmp_path.iterdir())) == ["a.zip would be unpacked", "folder is a folder, which is not uploaded", "weights.tar.gz would be unpacked"]


def test_notebooks_hold_no_logic_of_their_own(root):
    cells = {name: [cell for cell in json.loads((root / "kaggle" / name / f"{name}.ipynb").read_text())["cells"] if cell["cell_type"] == "code"]
             for name in ("submit", "train")}
    source = {name: ["".join(cell["source"]) for cell in found] for name, found in cells.items()}
    assert source["submit"][1] == source["train"][1] # finds, checks and installs the bundle
    assert source["submit"][2] == "from recodai_forgery.kernel import submit\n\nprint(submit(HOURS))"
    assert source["train"][2] == "from recodai_forgery.kernel import train\n\nprint(train(HOURS, PRESET, MODEL, TRAINING))"
    for found in cells.values():
        assert len(found) == 3 and found[0]["metadata"]["tags"] == ["parameters"] and not any(cell["outputs"] for cell in found)


# ---- what the image holds ----

def make_wheel(folder, name, version, *requires):
    path = folder / f"{name}-{version}-py3-none-any.whl"
    metadata = "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {one}" for one in requires)]) + "\n"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", f"version = {version!r}\n")
        wheel.writestr(f"{name}-{version}.dist-info/METADATA", metadata)
        wheel.writestr(f"{name}-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}-{version}.dist-info/RECORD", "")
    return path


def test_the_image_fulfils_what_the_wheel_requires(root, bundle):
    requirements = wheel_metadata(wheel_of(bundle.path)).get_all("Requires-Dist")
    assert len(requirements) > 10 and lacking(requirements, read_image(root / "kaggle" / "image.txt")) == []


def test_wheels_for_what_the_image_lacks(tmp_path, monkeypatch):
    shop, out = tmp_path / "shop", tmp_path / "out"
    shop.mkdir(), out.mkdir()
    make_wheel(shop, "needed", "1.5", "numpy>=1.26", "deeper>=2")
    make_wheel(shop, "needed", "2.0")
    make_wheel(shop, "deeper", "2.1", "needed>=1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop))
    ours, image = make_wheel(out, "ours", "0.1", "numpy>=1.26", "needed<2", "typer; extra == 'cli'"), {"python": "3.12", "numpy": "2.0.2"}
    assert [path.name for path in add_wheels(ours, image)] == ["deeper-2.1-py3-none-any.whl", "needed-1.5-py3-none-any.whl"]
    with pytest.raises(BadBundle, match="absent>=3: the image lacks it"): add_wheels(make_wheel(out, "others", "0.1", "absent>=3"), image)


@pytest.mark.parametrize("text, fault", [("numpy==2.0.2\n", "which Python"), ("python==3.12\nnumpy>=2\n", "line 2"), ("python==3.12\nnumpy 2\n", "line 2")])
def test_lists_of_an_image_that_are_none(tmp_path, text, fault):
    (tmp_path / "image.txt").write_text(text)
    with pytest.raises(BadConfig, match=fault): read_image(tmp_path / "image.txt")
