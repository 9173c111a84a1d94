"""The metric against the recorded answers of the official one, and against decoding on every small shape."""
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.optimize import linear_sum_assignment

from recodai_forgery.metric import image_losses, image_score, score_cases, summarize, table_score
from recodai_forgery.rle import encode
from recodai_forgery.types import BadAnnotation, BadTable

SIDES = st.one_of(st.just(1), st.integers(1, 64))
many = settings(max_examples=500, deadline=None)


@st.composite
def answers(draw):
    "Two stacks of masks of one shape: true and predicted, some instances shared."
    shape = draw(st.tuples(SIDES, SIDES))
    density = draw(st.sampled_from([.05, .3, .9]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    true = rng.random((draw(st.integers(1, 4)), *shape)) < density
    predicted = rng.random((draw(st.integers(1, 4)), *shape)) < density
    if draw(st.booleans()): predicted[0] = true[-1]
    return true.astype(np.uint8), predicted.astype(np.uint8)


def decode_and_compare(true, predicted) -> float:
    "The metric as it is written down: masks, precision, recall, F1, Hungarian method."
    f1 = np.zeros((len(predicted), len(true)))
    for row, one in enumerate(predicted):
        for column, other in enumerate(true):
            hit = (one & other).sum()
            precision, recall = hit / max(one.sum(), 1), hit / max(other.sum(), 1)
            f1[row, column] = 2 * precision * recall / (precision + recall) if hit else 0
    return f1[linear_sum_assignment(-f1)].sum() / max(f1.shape)


@many
@given(answers())
def test_runs_give_what_masks_give(pair):
    true, predicted = pair
    score = image_score(encode(true), encode(predicted), true.shape[1:])
    assert score == pytest.approx(decode_and_compare(true, predicted), abs=1e-12)
    losses = image_losses(encode(true), encode(predicted), true.shape[1:])
    assert min(losses.values()) >= 0 and sum(losses.values()) == pytest.approx(1 - score, abs=1e-9)


@many
@given(arrays.arrays(np.uint8, st.tuples(SIDES, SIDES), elements=st.integers(0, 1)))
def test_truth_scores_one_and_order_of_instances_is_nothing(mask):
    if not mask.any() or mask.all(): return
    both = [mask, 1 - mask]
    assert image_score(encode(both), encode(both[::-1]), mask.shape) == 1
    assert image_score(encode(both), encode([mask]), mask.shape) == pytest.approx(.5)
    assert image_score(encode([mask]), encode(both), mask.shape) == pytest.approx(.5)


def test_image_score_is_the_official_one(shared):
    rows = [json.loads(line) for line in (shared / "golden" / "image_score.jsonl").open()]
    assert len(rows) == 600
    for row in rows: assert image_score(row["label"], row["prediction"], row["shape"]) == pytest.approx(row["score"], abs=1e-12)


def test_table_score_is_the_official_one_in_any_order(shared):
    rows = [json.loads(line) for line in (shared / "golden" / "table_score.jsonl").open()]
    assert len(rows) == 30
    for seed, row in enumerate(rows):
        ids = [str(number) for number in range(len(row["label"]))]
        solution = pd.DataFrame({"case_id": ids, "annotation": row["label"], "shape": row["shape"]})
        submission = pd.DataFrame({"case_id": ids, "annotation": row["prediction"]}).sample(frac=1, random_state=seed)
        assert table_score(solution, submission) == pytest.approx(row["score"], abs=1e-12)
        cases = score_cases(solution, submission)
        assert cases["score"].mean() == pytest.approx(row["score"], abs=1e-12)
        parts = summarize(cases)
        assert parts["score"] + sum(parts[loss] for loss in ("false_alarm", "too_many_instances", "wrong_merges", "missed_forgery", "inaccurate_masks")) == pytest.approx(1)


def test_losses_name_the_fault():
    left, right, dust = np.zeros((3, 20, 40), np.uint8)
    left[5:15, 5:15] = right[5:15, 25:35] = 1
    dust[0, 0] = 1
    both = left | right
    lost = lambda label, prediction: {name: round(value, 3) for name, value in image_losses(encode(label), encode(prediction), (20, 40)).items() if value > 1e-9}
    assert lost([both], [left, right]) == {"wrong_merges": .667}
    assert lost([left, right], [both]) == {"wrong_merges": .667}
    assert lost([both], [both, dust]) == {"too_many_instances": .5}
    assert lost([both], [left]) == {"inaccurate_masks": .333}
    assert lost([left, right], [left]) == {"missed_forgery": .5}
    assert lost([both], [dust]) == lost([both], []) == {"missed_forgery": 1}
    assert lost([], [dust]) == {"false_alarm": 1}


def test_tables_that_cannot_be_joined_are_refused():
    solution = pd.DataFrame({"case_id": ["1", "2"], "annotation": ["authentic", "[1, 2]"], "shape": ["authentic", "[4, 5]"]})
    right = pd.DataFrame({"case_id": ["2", "1"], "annotation": ["[1, 2]", "authentic"]})
    assert table_score(solution, right) == 1
    for wrong, message in ((right[:1], "lacks 1 ids"), (pd.concat([right, right]), "stand twice"), (right.rename(columns={"annotation": "rle"}), "no column annotation"),
                           (right.assign(annotation=[np.nan, "authentic"]), "row 2"), (right.assign(case_id=["2", "3"]), "lacks 1 ids")):
        with pytest.raises(BadTable, match=message): table_score(solution, wrong)
    with pytest.raises(BadAnnotation, match="case 2: instance 1"): table_score(solution, right.assign(annotation=["-", "authentic"]))
