"""Peak memory of prediction with many detections, ours against torchvision's own way. `make bench` calls it; it also runs alone."""
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SIDE, DETECTIONS = 3000, 100


def detections(seed: int = 0):
    "Masks, boxes and scores as the heads return them: a hundred boxes of 30 to 1500 px in a figure of 3000 x 3000, some over its margin."
    import torch
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(shape, generator=generator)
    middles, sides = draw(DETECTIONS, 2) * SIDE, 30 * 50 ** draw(DETECTIONS, 2)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 28), torch.linspace(-1, 1, 28), indexing="ij")
    grids = (torch.exp(-(x ** 2 + y ** 2)) + .3 * draw(DETECTIONS, 28, 28)).clamp(0, 1)
    return grids, torch.cat([middles - sides / 2, middles + sides / 2], 1).clamp(0, SIDE), draw(DETECTIONS)


def torchvision_way(grids, boxes, scores):
    "A mask of the whole figure for each detection, then the threshold."
    from torchvision.models.detection.roi_heads import paste_masks_in_image
    return paste_masks_in_image(grids[:, None], boxes, (SIDE, SIDE))[:, 0] >= .5


def our_way(grids, boxes, scores):
    from recodai_forgery.model import paste_masks
    return paste_masks(grids, boxes, scores, (SIDE, SIDE))


def held(what: str) -> float:
    "MB that this process holds (VmRSS), or held at its highest since that was last forgotten (VmHWM)."
    rows = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
    return int(rows[what].split()[0]) / 1024


def peak(way) -> float:
    "MB that a way takes at its highest, over what the process held before; a fresh process each."
    import torch
    torch.set_num_threads(1)
    inputs = detections()
    way(*(value[:1] for value in inputs)) # what is loaded on first use is no part of it
    Path("/proc/self/clear_refs").write_text("5") # forget the peak that loading torch had
    before = held("VmRSS")
    found = way(*inputs)
    assert len(found) == DETECTIONS
    return held("VmHWM") - before


def equal_masks() -> int:
    "How many of our masks are torchvision's, bit for bit; one at a time, so that it fits into memory."
    import numpy as np
    grids, boxes, scores = detections()
    ours = our_way(grids, boxes, scores)
    return sum(np.array_equal(region.full_mask((SIDE, SIDE)), torchvision_way(grids[n:n + 1], boxes[n:n + 1], None)[0].numpy())
               for n, region in enumerate(ours))


def paste_memory() -> Iterator[tuple[str, str, float, float, str]]:
    "Rows of the bench: what, against what, ratio, bar, ours. Ours may take a third of the peer's memory at most, so the bar is 3."
    run = lambda what: json.loads(subprocess.run([sys.executable, __file__, what], capture_output=True, text=True, check=True,
                                                 cwd=Path(__file__).parent.parent).stdout)
    assert run("equal_masks") == DETECTIONS, "masks differ from torchvision's"
    theirs, ours = run("torchvision_way"), run("our_way")
    what = f"prediction, peak memory, {DETECTIONS} detections on {SIDE} x {SIDE}, same masks"
    yield what, "torchvision full-frame paste", theirs / ours, 3, f"{ours:,.0f} MB, not {theirs:,.0f}"


if __name__ == "__main__":
    if len(sys.argv) == 1: print(*paste_memory(), sep="\n")
    elif sys.argv[1] == "equal_masks": print(json.dumps(equal_masks()))
    else: print(json.dumps(peak({"our_way": our_way, "torchvision_way": torchvision_way}[sys.argv[1]])))
