"""How well the matcher does on bench/dev, cross-validated by source: python tests/evaluate_match.py [--cache FOLDER] [--budget SECONDS] [--figures N] [--synth N] [--drawings N] [--crosscheck FOLDER] [--write-gate FILE] [--out FOLDER].

Finds the test data by RECODAI_SHARED (default ../shared). The first run searches all 240 figures; with --cache the candidates are kept.
With --crosscheck, the folder of tests/train_crosscheck.py, borders are drawn by networks that have seen none of a figure's sources; without it by the gate's numbers.
Draws worst.png and classes.png into the folder of --out, or into that of --cache.
"""
import argparse
import os
import pickle
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import cv2
import numpy as np
import pandas as pd
from made_negatives import made_negatives

from recodai_forgery.align import MatchConfig
from recodai_forgery.crosscheck import load_crosscheck
from recodai_forgery.evaluate import class_page, class_tables, describe, format_classes, worst_page
from recodai_forgery.evidence import find_candidates
from recodai_forgery.gate import Decision, save_gate
from recodai_forgery.image import load_image
from recodai_forgery.match import Nets, annotate, decide_each, fit_gate, held_out_gates, label, sources
from recodai_forgery.metric import bootstrap_interval, format_summary, score_cases
from recodai_forgery.report import save_figure
from recodai_forgery.rle import encode
from recodai_forgery.synth import NoPlace, SynthConfig, draw_figure
from recodai_forgery.types import AUTHENTIC, Case

SHARED = Path(os.environ.get("RECODAI_SHARED") or Path(__file__).resolve().parent.parent.parent / "shared")

def bench_cases(figures: int | None = None) -> tuple[list[Case], pd.DataFrame]:
    "Forged and authentic twins with their source groups; the table that describes them."
    dev = SHARED / "bench" / "dev"
    table = pd.read_csv(dev / "cases.csv").set_index("id").iloc[:figures]
    group = pd.read_csv(SHARED / "bench" / "ATTRIBUTION.csv").set_index("file")["group"]
    cases = []
    for name, row in table.iterrows():
        sources = ";".join(sorted({group[file] for file in row.source_files.split(";")}))
        for split in ("forged", "authentic"):
            mask = dev / "train_masks" / f"{name}.npy" if split == "forged" else None
            cases.append(Case(split, str(name), dev / "train_images" / split / f"{name}.png", mask, (row.height, row.width), events=row.n_instances * (split == "forged"), group=sources))
    return cases, table


SYNTH = SynthConfig(kinds=(.7, .1, .2, 0), area=(.002, .004, .010, .03, .1), longest_min=256, longest_max=800, aspect_max=3)
PAIRS = replace(SYNTH, kinds=(0, 0, 0, 1), area=(.05, .08, .15, .2, .28))

def source_pool(number: int, pairs: bool) -> tuple[str, list[Path], SynthConfig]: # pairs: a panel used twice
    "A group of sources, its images, and what to make of them: made figure `number` has a single group, so that it can be left out with it."
    group = pd.read_csv(SHARED / "bench" / "ATTRIBUTION.csv").groupby("group")["file"].apply(list)
    pool = group[group.map(len) >= 4] if pairs else group
    name, files = pool.index[number % len(pool)], pool.iloc[number % len(pool)]
    config = PAIRS if pairs else SYNTH if len(files) >= 4 else replace(SYNTH, kinds=(1, 0, 0, 0))
    return name, [SHARED / "figures" / file for file in files], config

def made_cases(drawn: Iterable[tuple[int, bool]], seed: int, name: str, folder: Path) -> list[Case]: # drawn: number of each figure, and whether a panel is used twice
    "Made figures with their authentic twins, each of a single group of sources, written to a folder."
    cases = []
    for number, pairs in drawn:
        group, files, config = source_pool(number, pairs)
        try: made = draw_figure(files, seed, number, config)
        except NoPlace: continue
        for split, image in (("forged", made.image), ("authentic", made.authentic)):
            path = folder / f"{split}_{number}.png"
            if not path.exists(): cv2.imwrite(str(path), image[..., ::-1])
            mask = path.with_suffix(".npy") if split == "forged" else None
            if mask: np.save(mask, made.masks)
            cases.append(Case(split, f"{name}{number}", path, mask, image.shape[:2], events=len(made.masks) if mask else 0, group=group))
    return cases

def synth_cases(count: int, folder: Path) -> list[Case]:
    "Figures made to learn from; in the last eighth a panel is used twice."
    return made_cases(((number, number >= .88 * count) for number in range(count)), 7, "synth", folder)


def drawing_cases(each: int, folder: Path) -> list[Case]:
    "Authentic drawings to learn from, N of each kind of tests/made_negatives.py; a kind is a group."
    cases = []
    for kind, number, figure in made_negatives(each):
        path = folder / f"authentic_{kind}_{number}.png"
        if not path.exists(): cv2.imwrite(str(path), figure[..., ::-1])
        cases.append(Case("authentic", f"{kind}_{number}", path, None, figure.shape[:2], group=f"drawing {kind}"))
    return cases


def search(case: Case, cache: Path | None, config: MatchConfig):
    "Candidates of a figure with their truth, from the cache where they are there; wall-clock and processor seconds and steps of the search."
    path = cache / f"{case.split}_{case.case_id}.pkl" if cache else None
    if path and path.exists(): return pickle.loads(path.read_bytes())
    start, processor, steps = time.perf_counter(), time.process_time(), {}
    candidates, planes = find_candidates(load_image(case.image), config, steps)
    spent = time.perf_counter() - start, time.process_time() - processor
    steps["megapixels"] = (config.work - planes.budget.pixels) / 1e6
    found = label(case, candidates, planes), spent, steps
    if path: path.write_bytes(pickle.dumps(found))
    return found


def blind_nets(folder: Path) -> Nets:
    "For each figure a network that was not trained on any of its sources; of several the one that learned from most."
    from train_crosscheck import FOLDS, all_groups, held_sources
    held = held_sources(bench_cases()[0][::2], all_groups(folder))[:FOLDS]
    nets = [load_crosscheck(folder / f"{k}.safetensors") for k in range(FOLDS)]
    return lambda case: nets[min((k for k in range(FOLDS) if sources(case) <= held[k]), key=lambda k: len(held[k]))]


def tables_of(cases: list[Case], decisions: list[Decision], described: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    "Solution, submission and scored figures with their description; ids are forged_ID and authentic_ID."
    names = ["_".join(case.key) for case in cases]
    truth = [encode(list(np.load(case.mask))) if case.mask else AUTHENTIC for case in cases]
    solution = pd.DataFrame({"case_id": names, "annotation": truth, "shape": [str(list(case.shape)) for case in cases]})
    answers = [annotate(decision, case.shape) for decision, case in zip(decisions, cases, strict=True)]
    submission = pd.DataFrame({"case_id": names, "annotation": answers})
    about = described.loc[[int(case.case_id) for case in cases]].assign(case_id=names, group=[case.group for case in cases])
    return solution, submission, describe(score_cases(solution, submission), about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--budget", type=float, default=MatchConfig().budget, help="seconds a figure; raise it on a busy machine")
    parser.add_argument("--out", type=Path, help="folder for worst.png and classes.png; that of --cache unless given")
    parser.add_argument("--figures", type=int, help="only the first N pairs")
    parser.add_argument("--crosscheck", type=Path, help="folder with the networks of tests/train_crosscheck.py")
    parser.add_argument("--write-gate", type=Path, help="fit on all figures and write the gate here")
    parser.add_argument("--synth", type=int, default=0, help="also learn from N pairs of made figures (with --cache)")
    parser.add_argument("--drawings", type=int, default=0, help="also learn from N authentic drawings of each kind (with --cache)")
    options = parser.parse_args()
    if (options.synth or options.drawings) and not options.cache: parser.error("--synth and --drawings need --cache")
    for folder in filter(None, (options.cache, options.out)): folder.mkdir(parents=True, exist_ok=True)
    cv2.setNumThreads(1)
    cases, table = bench_cases(options.figures)
    examined, times, steps = [], [], []
    for case in cases:
        one, spent, step = search(case, options.cache, MatchConfig(budget=options.budget))
        examined.append(one)
        times.append(spent)
        steps.append(step)
    config = MatchConfig(budget=options.budget)
    learned = synth_cases(options.synth, options.cache) if options.synth else []
    if options.drawings: learned += drawing_cases(options.drawings, options.cache)
    extra = [search(case, options.cache, config)[0] for case in learned]
    nets = blind_nets(options.crosscheck) if options.crosscheck else lambda case: None
    gates = held_out_gates(examined, extra)
    decisions = decide_each(examined, gates, config, nets)
    solution, submission, result = tables_of(cases, decisions, table)
    if options.crosscheck:
        plain = tables_of(cases, decide_each(examined, gates, config), table)[2]
        for name, part in (("score", result), ("forged", result[result["forged"]])):
            more_by = (part["score"] - plain.loc[part.index, "score"]).to_numpy()
            low, high = bootstrap_interval(more_by, part["group"].to_numpy())
            print(f"without the network, {name} {plain.loc[part.index, 'score'].mean():.3f}; it adds {more_by.mean():.3f} ({low:.3f} to {high:.3f})")
    p_forged = np.array([decision.p_forged for decision in decisions])
    found = [one.true.any() for one in examined if one.events]
    print(format_summary(result, result["group"].to_numpy()))
    print(f"\nfigures with a true candidate {np.mean(found):.3f}, Brier score of P(forged) {((p_forged - result['forged']) ** 2).mean():.3f}\n")
    classes = class_tables(result)
    for one in classes.values(): print(format_classes(one), "\n")
    if options.out or options.cache:
        out = options.out or options.cache
        images = {"_".join(case.key): case.image for case in cases}
        print(save_figure(class_page(classes), out / "classes.png"), save_figure(worst_page(images, solution, submission, result), out / "worst.png"), "\n")
    wall, processor = np.array(times).T
    print(f"seconds a figure: wall clock mean {wall.mean():.2f} max {wall.max():.2f}, processor mean {processor.mean():.2f} max {processor.max():.2f}")
    print("steps:", pd.DataFrame(steps).fillna(0).mean().round(3).to_dict())
    if options.write_gate: save_gate(fit_gate(examined, extra), options.write_gate)


if __name__ == "__main__":
    main()
