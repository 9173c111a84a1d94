"""Train the network that comes with the package (`crosscheck`): python tests/train_crosscheck.py --cache runs/candidates --out runs/crosscheck [--folds 0 1 2 3 4 all] [--write].

Finds images and benchmark by RECODAI_SHARED. Examples are the candidates of the benchmark's figures, of figures made from the same images (single sources, so that they
can be held out), of drawings, and pairs checked where the truth says they are. For each of five folds of the benchmark's figures a network is trained on
nothing that shares a source group with them: out/0.safetensors to 4.safetensors, which tests/evaluate_match.py --crosscheck judges. all.safetensors learns from everything;
--write puts it into the package. With the candidates and the examples there, some seven minutes a network on a core.
"""
import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import cv2
import numpy as np
from evaluate_match import bench_cases, drawing_cases, made_cases, search, source_pool, synth_cases

from recodai_forgery.align import Budget, Keypoints, MatchConfig, Planes, invert_affine
from recodai_forgery.check import Overlap, carry_mask, depth
from recodai_forgery.crosscheck import CROSSCHECK, Examples, save_crosscheck, see, train_crosscheck, truth_of
from recodai_forgery.evidence import Candidate, Search, no_matches, verify
from recodai_forgery.image import load_image
from recodai_forgery.match import judge, pieces_of, read_truth, sources
from recodai_forgery.synth import NoPlace, draw_figure, overlap
from recodai_forgery.types import Box, Case, Region

FOLDS = 5
MORE = range(1000, 1838) # numbers of made figures whose candidates are learned from
CHECKED = range(900)     # numbers of made figures whose copies are checked where the truth says they are

Row = tuple[np.ndarray, np.ndarray, bool, str] # view, truth, copied, source groups


def fold_of(cases: list[Case]) -> np.ndarray: # (n,) 0 to FOLDS - 1
    "Folds of equal size whose figures have few sources in all, so that much is left to learn from; figures with the most sources first."
    most, held, count, fold = -(-len(cases) // FOLDS), [frozenset()] * FOLDS, [0] * FOLDS, np.zeros(len(cases), int)
    for n in sorted(range(len(cases)), key=lambda n: (-len(sources(cases[n])), sorted(sources(cases[n])), n)):
        own = sources(cases[n])
        home = min((k for k in range(FOLDS) if count[k] < most), key=lambda k: (len(held[k] | own) - len(held[k]), len(held[k]) + .3 * count[k]))
        fold[n], held[home], count[home] = home, held[home] | own, count[home] + 1
    return fold


def held_sources(cases: list[Case], groups: set[str]) -> list[frozenset[str]]: # groups: all that there are
    "The sources that each fold's network may not see: those of its figures, and a share of those that no figure has; none for the last, which is for all."
    fold = fold_of(cases)
    held = [frozenset().union(*(sources(cases[n]) for n in np.flatnonzero(fold == k))) for k in range(FOLDS)]
    for n, group in enumerate(sorted(groups - frozenset().union(*held))): held[n % FOLDS] |= {group}
    return [*held, frozenset()]


def all_groups(out: Path) -> frozenset[str]:
    "The source groups of all examples."
    return frozenset(group for groups in np.unique(np.load(out / "examples.npz")["group"]) for group in groups.split(";"))


def row_of(planes: Planes, candidate: Candidate, masks: np.ndarray, pieces: list[list[Region]], group: str) -> Row | None:
    "An example of a candidate; None where it is true and yet no piece of the truth lies under its source."
    true, _, under = judge(candidate, masks, pieces) if len(masks) else (False, 0., None)
    if true and under is None: return None
    view = see(planes, candidate.core)
    return view.planes.astype(np.float16), truth_of(under if true else None, view.window, planes.shape).astype(np.float16), true, group


def found_rows(case: Case, cache: Path, config: MatchConfig) -> list[Row]:
    "Examples of what the search finds in a figure."
    candidates = search(case, cache, config)[0].candidates
    if not candidates: return []
    planes = Planes(load_image(case.image), config.check_pixels)
    masks = read_truth(case, planes.shape)
    pieces = [pieces_of(mask) for mask in masks]
    return [row for row in (row_of(planes, candidate, masks, pieces, case.group) for candidate in candidates) if row]


def more_cases(folder: Path) -> list[Case]:
    "Made figures beyond those that the gate learns from; a twin for every second one."
    folder.mkdir(parents=True, exist_ok=True)
    cases = made_cases(((number, number % 8 == 7) for number in MORE), 11, "more", folder)
    return [case for case in cases if case.forged or int(case.case_id.removeprefix("more")) % 2 == 0]


def shared_area(one: Box, other: Box) -> int:
    "Pixels that two boxes share."
    x0, y0, x1, y1 = overlap(one, other) or (0, 0, 0, 0)
    return (x1 - x0) * (y1 - y0)


def checked_rows(number: int, config: MatchConfig) -> list[Row]:
    "Examples of the copies of a made figure, checked under their true maps, moved by some tenths of a pixel; both ways."
    group, files, kind = source_pool(number, number % 10 == 9)
    try: made = draw_figure(files, 17, number, kind)
    except NoPlace: return []
    rng, planes, rows = np.random.default_rng(number), Planes(made.image, config.check_pixels, Budget(config.work, 60)), []
    if planes.scale < 1: return []
    place = Search(planes, Keypoints(np.zeros((0, 2)), np.zeros(0), np.zeros(0), np.zeros((0, 128), np.float32), 1.), no_matches(), None)
    masks = made.masks > 0
    pieces = [pieces_of(mask) for mask in masks]
    for event, own in zip(made.record["events"], pieces, strict=True):
        source = max(own, key=lambda piece: shared_area(piece.box, event["source_box"]))
        for affine in (np.array(copy["affine"]) for copy in event["copies"]):
            copy = carry_mask(Overlap(affine, source.box, source.mask), planes.shape)
            for region, way in (((source, affine), (Region(*copy), invert_affine(affine))) if copy else ((source, affine),)):
                y, x = np.unravel_index(depth(region.mask).argmax(), region.mask.shape)
                moved = np.column_stack([way[:, :2], way[:, 2] + rng.normal(0, .4, 2)])
                candidate = verify(place, moved, np.array([x + region.box[0], y + region.box[1]], float))
                row = candidate and row_of(planes, candidate, masks, pieces, group)
                if row and row[2]: rows.append(row)
    return rows


def all_rows(cache: Path, out: Path) -> dict[str, np.ndarray]:
    "Every example with its source groups, kept as one file."
    path, config = out / "examples.npz", MatchConfig(budget=60)
    if not path.exists():
        learned = bench_cases()[0] + synth_cases(250, cache) + drawing_cases(4, cache)
        rows = [row for case in learned for row in found_rows(case, cache, config)]
        rows += [row for case in more_cases(out / "figures") for row in found_rows(case, out / "figures", config)]
        rows += [row for number in CHECKED for row in checked_rows(number, config)]
        np.savez(path, **{name: np.array(part) for name, part in zip(("views", "truths", "copied", "group"), zip(*rows, strict=True), strict=True)})
    return dict(np.load(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="folder of the candidates, as for evaluate_match.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folds", nargs="*", default=[*map(str, range(FOLDS)), "all"], help="which networks to train")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--write", action="store_true", help="put all.safetensors into the package")
    options = parser.parse_args()
    for folder in (options.cache, options.out): folder.mkdir(parents=True, exist_ok=True)
    cv2.setNumThreads(1)
    rows = all_rows(options.cache, options.out)
    groups = [frozenset(group.split(";")) for group in rows["group"]]
    held = held_sources(bench_cases()[0][::2], frozenset().union(*groups))
    for name in options.folds:
        away = held[FOLDS if name == "all" else int(name)]
        kept = np.array([not own & away for own in groups])
        print(f"{name}: {len(away)} groups held out, {kept.sum()} examples, {rows['copied'][kept].sum()} true", flush=True)
        net = train_crosscheck(Examples(*(rows[part][kept] for part in ("views", "truths", "copied"))), options.steps, progress=sys.stderr.isatty())
        save_crosscheck(net, options.out / f"{name}.safetensors")
        if name == "all" and options.write: save_crosscheck(net, CROSSCHECK)


if __name__ == "__main__":
    main()
