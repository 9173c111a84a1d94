"""How well the matcher does on bench/dev, cross-validated by source: python tests/evaluate_match.py [--cache FOLDER] [--budget SECONDS] [--figures N] [--synth N] [--drawings N] [--write-gate FILE].

Finds the test data by RECODAI_SHARED (default ../shared). The first run searches all 240 figures; with --cache the candidates are kept.
"""
import argparse
import json
import os
import pickle
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import cv2
import numpy as np
import pandas as pd
from made_negatives import made_negatives

from recodai_forgery.align import MatchConfig
from recodai_forgery.evidence import find_candidates
from recodai_forgery.gate import save_gate
from recodai_forgery.image import load_image
from recodai_forgery.match import annotate, cross_validate, fit_gate, label
from recodai_forgery.metric import bootstrap_interval, image_score
from recodai_forgery.rle import encode
from recodai_forgery.synth import NoPlace, SynthConfig, draw_figure
from recodai_forgery.types import Case

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

def synth_cases(count: int, folder: Path) -> list[Case]:
    "Figures made to learn from, each of a single group of sources, so that it can be left out with its group."
    group = pd.read_csv(SHARED / "bench" / "ATTRIBUTION.csv").groupby("group")["file"].apply(list)
    cases, many = [], group[group.map(len) >= 4]
    for number in range(count):
        pairs = number >= .88 * count # the last eighth: figures with a panel used twice
        pool = many if pairs else group
        name, files = pool.index[number % len(pool)], pool.iloc[number % len(pool)]
        config = PAIRS if pairs else SYNTH if len(files) >= 4 else replace(SYNTH, kinds=(1, 0, 0, 0))
        try: made = draw_figure([SHARED / "figures" / file for file in files], 7, number, config)
        except NoPlace: continue
        for split, image in (("forged", made.image), ("authentic", made.authentic)):
            path = folder / f"{split}_{number}.png"
            if not path.exists(): cv2.imwrite(str(path), image[..., ::-1])
            mask = path.with_suffix(".npy") if split == "forged" else None
            if mask: np.save(mask, made.masks)
            cases.append(Case(split, f"synth{number}", path, mask, image.shape[:2], events=len(made.masks) if mask else 0, group=name))
    return cases


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


def lines(frame: pd.DataFrame, by: str) -> str:
    "Scores of the forged figures by a column, with bootstrap intervals by source group."
    rows = []
    for value, part in frame.groupby(by, observed=True):
        low, high = bootstrap_interval(part.score.to_numpy(), part.group.to_numpy())
        rows.append(f"| {value} | {len(part)} | {part.score.mean():.3f} | {low:.3f}-{high:.3f} | {(part.score > 0).mean():.2f} |")
    return "\n".join([f"| {by} | figures | oF1 | 95 % | any hit |", "|---|---|---|---|---|", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--budget", type=float, default=MatchConfig().budget, help="seconds a figure; raise it on a busy machine")
    parser.add_argument("--figures", type=int, help="only the first N pairs")
    parser.add_argument("--write-gate", type=Path, help="fit on all figures and write the gate here")
    parser.add_argument("--synth", type=int, default=0, help="also learn from N pairs of made figures (with --cache)")
    parser.add_argument("--drawings", type=int, default=0, help="also learn from N authentic drawings of each kind (with --cache)")
    options = parser.parse_args()
    if (options.synth or options.drawings) and not options.cache: parser.error("--synth and --drawings need --cache")
    if options.cache: options.cache.mkdir(parents=True, exist_ok=True)
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
    decisions = cross_validate(examined, config, extra)
    rows = []
    for case, decision, one in zip(cases, decisions, examined, strict=True):
        truth = np.load(case.mask) if case.mask else None
        score = image_score(encode(list(truth)) if truth is not None else "authentic", annotate(decision, case.shape), f"[{case.shape[0]}, {case.shape[1]}]")
        rows.append({"id": int(case.case_id), "forged": case.split == "forged", "score": score, "group": case.group, "answered": decision.answered,
                     "p_forged": decision.p_forged, "oracle": max([f1 for f1, yes in zip(one.f1, one.true, strict=True) if yes], default=0.)})
    result = pd.DataFrame(rows).join(table, on="id")
    low, high = bootstrap_interval(result.score.to_numpy(), result.group.to_numpy())
    forged = result[result.forged].copy()
    print(f"score {result.score.mean():.4f} ({low:.3f}-{high:.3f}), forged {forged.score.mean():.4f}, authentic {result[~result.forged].score.mean():.4f}, "
          f"figures with a true candidate {(forged.oracle > 0).mean():.3f}")
    brier = ((result.p_forged - result.forged) ** 2).mean()
    print(f"Brier score of P(forged) {brier:.3f}\n")
    forged["area quartile"] = pd.qcut(forged.area_fraction, 4, labels=["1 (smallest)", "2", "3", "4"])
    forged["transform"] = ["mixed" if len(kinds) > 1 else kinds[0] for kinds in
                           ([*{part.split('"')[0] for part in text.split('"t": "')[1:]}] for text in forged.transforms)]
    forged["after forging"] = ["+".join(sorted(json.loads(text))) or "nothing" for text in forged.post]
    for column in ("kind", "area quartile", "transform", "after forging", "n_instances"): print(lines(forged, column), "\n")
    wall, processor = np.array(times).T
    print(f"seconds a figure: wall clock mean {wall.mean():.2f} max {wall.max():.2f}, processor mean {processor.mean():.2f} max {processor.max():.2f}")
    print("steps:", pd.DataFrame(steps).fillna(0).mean().round(3).to_dict())
    if options.write_gate: save_gate(fit_gate(examined, extra), options.write_gate)


if __name__ == "__main__":
    main()
