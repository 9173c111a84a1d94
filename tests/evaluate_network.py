"""Mask R-CNN on the benchmark, with whole sources held out: `python tests/evaluate_network.py --out runs/dev`.

Figures whose every source image belongs to a held-out group are scored; figures with any such source are not trained on. Thresholds are
chosen on a validation fold of the training figures, so that nothing is tuned on what is reported. RECODAI_SHARED says where the data lie.
"""
import argparse
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd

from recodai_forgery.cases import index_tree, split_cases
from recodai_forgery.metric import format_summary, score_cases
from recodai_forgery.model import ModelConfig
from recodai_forgery.predict import Detector
from recodai_forgery.report import compare_submission, save_figure
from recodai_forgery.synth import SynthConfig, make_tree
from recodai_forgery.thresholds import annotation
from recodai_forgery.train import TrainConfig, train
from recodai_forgery.types import Case

SHARED = Path(os.environ.get("RECODAI_SHARED") or Path(__file__).resolve().parents[2] / "shared")


def image_groups() -> pd.Series:
    "The source group of each image that figures are made from, by file."
    return pd.read_csv(SHARED / "figures" / "ATTRIBUTION.csv", dtype=str).set_index("file")["group"]


def source_groups() -> dict[str, set[str]]:
    "The source groups of each figure of the benchmark, by id."
    group = image_groups()
    cases = pd.read_csv(SHARED / "bench" / "dev" / "cases.csv", dtype=str).set_index("id")["source_files"]
    return {case_id: set(group[files.split(";")]) for case_id, files in cases.items()}


def hold_out(groups: dict[str, set[str]], share: float, seed: int) -> set[str]:
    "Source groups, drawn one by one until a share of the figures has no other source."
    order, held = np.random.default_rng(seed).permutation(sorted(set().union(*groups.values()))), set()
    for name in order:
        if sum(group <= held for group in groups.values()) >= share * len(groups): break
        held.add(str(name))
    return held


def synthetic_cases(held: set[str], count: int, out: Path, seed: int) -> list[Case]:
    "Pairs made from the benchmark's source images, without those of held-out groups."
    group = image_groups()
    sources = [SHARED / "figures" / file for file in group.index[~group.isin(held)] if (SHARED / "figures" / file).exists()]
    if not out.exists(): make_tree(sources, out, count, seed, SynthConfig(longest_max=800, test=0))
    return list(index_tree(out, strict=True).cases)


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--epochs", type=int, default=12)
    options.add_argument("--size", type=int, default=512)
    options.add_argument("--channels", type=int, default=64)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--synthetic", type=int, default=0, help="pairs made from seen source images, for training as well")
    options.add_argument("--resume", action="store_true")
    chosen = options.parse_args()

    groups = source_groups()
    held = hold_out(groups, .25, chosen.seed)
    cases = index_tree(SHARED / "bench" / "dev", strict=True).cases
    seen = [case for case in cases if not groups[case.case_id] & held]
    unseen = [case for case in cases if groups[case.case_id] <= held]
    folds = split_cases(seen, .15, chosen.seed)
    if chosen.synthetic: folds[0].extend(synthetic_cases(held, chosen.synthetic, chosen.out / "synthetic", chosen.seed))
    print(f"{len(folds[0])} figures to train on, {len(folds[1])} to choose thresholds on, {len(unseen)} of {len(held)} unseen source groups to report on", flush=True)

    model = ModelConfig("mobilenet_v2", size=chosen.size, channels=chosen.channels, weights=str(SHARED / "weights" / "mobilenet_v2_features.safetensors"))
    began = time.perf_counter()
    best = train(folds, chosen.out / "first", model, TrainConfig(epochs=chosen.epochs, seed=chosen.seed), resume=chosen.resume)
    trained = time.perf_counter()
    detector = Detector(best, method="maskrcnn")
    images = {"-".join(case.key): case for case in unseen}
    answers = {name: detector(case.image) for name, case in images.items()}
    seconds = (time.perf_counter() - trained) / len(images)

    solution = pd.DataFrame([{"case_id": name, "annotation": annotation(case), "shape": str(list(case.shape))} for name, case in images.items()])
    submission = pd.DataFrame([{"case_id": name, "annotation": answer.annotation} for name, answer in answers.items()])
    table = score_cases(solution, submission)
    kinds = pd.read_csv(SHARED / "bench" / "dev" / "cases.csv", dtype=str).set_index("id")["kind"]
    table["kind"] = [kinds[images[name].case_id] if images[name].forged else "authentic" for name in table.index]
    print(format_summary(table, groups=np.array([min(groups[images[name].case_id]) for name in table.index])))
    print("\n" + table.groupby("kind")["score"].agg(["size", "mean"]).round(3).to_string())
    print(f"\ntrained in {(trained - began) / 60:.0f} min, predicted in {seconds:.2f} s a figure")
    page = compare_submission({name: case.image for name, case in images.items()}, solution, submission, count=6)
    print(save_figure(page, chosen.out / "unseen.png"))


if __name__ == "__main__":
    main()
