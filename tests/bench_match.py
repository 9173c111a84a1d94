"""What the matcher costs, with the network that draws its borders, on the development benchmark, on one core: a figure, at most, and step by step. `make bench` calls it; it also runs alone.

Times are wall-clock times, as the budget is. The projection takes figures of the benchmark's sizes for the competition's.
"""
import os
import sys
import time
from collections import Counter
from pathlib import Path

FIGURES, LIMIT_HOURS, CORES = 2200, 4, 2
SHARED = Path(os.environ.get("RECODAI_SHARED") or Path(__file__).resolve().parent.parent.parent / "shared")


def matcher_speed() -> list[str]:
    import cv2
    import torch

    from recodai_forgery.align import MatchConfig
    from recodai_forgery.evidence import find_candidates
    from recodai_forgery.gate import decide
    from recodai_forgery.image import find_images, load_image
    from recodai_forgery.match import packaged_crosscheck, packaged_gate
    folders = [SHARED / "bench" / "dev" / "train_images" / name for name in ("forged", "authentic")]
    if not folders[0].is_dir(): return ["matcher: no shared test data, not measured"]
    cores, threads, config, steps, seconds = os.sched_getaffinity(0), (cv2.getNumThreads(), torch.get_num_threads()), MatchConfig(), Counter(), []
    gate, net = packaged_gate(), packaged_crosscheck()
    os.sched_setaffinity(0, {max(cores)})
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    try:
        for path in [path for folder in folders for path in find_images(folder)]:
            image, began, step = load_image(path), time.perf_counter(), {}
            candidates, planes = find_candidates(image, config, step)
            searched = time.perf_counter()
            decide(gate, candidates, planes, net=net)
            step["gate and borders"] = time.perf_counter() - searched
            seconds.append(time.perf_counter() - began)
            steps.update(step)
    finally:
        os.sched_setaffinity(0, cores)
        cv2.setNumThreads(threads[0])
        torch.set_num_threads(threads[1])
    mean, most = sum(seconds) / len(seconds), max(seconds)
    hours = mean * FIGURES / CORES / 3600
    verdict = lambda fine: "met" if fine else "MISSED"
    return [f"matcher, one core, {len(seconds)} figures of bench/dev: {mean:.2f} s a figure (bar 1.5 {verdict(mean <= 1.5)}), "
            f"at most {most:.1f} s (budget {config.budget:g} {verdict(most <= config.budget)})",
            "of it, ms a figure: " + ", ".join(f"{name} {1e3 * value / len(seconds):.0f}" for name, value in steps.most_common()),
            f"{FIGURES} figures on {CORES} cores: {hours:.2f} h (bar {LIMIT_HOURS} {verdict(hours <= LIMIT_HOURS)})"]


if __name__ == "__main__": sys.stdout.write("\n".join(matcher_speed()) + "\n")
