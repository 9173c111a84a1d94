"Evaluation by class: what a notebook cell cannot say of it."
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from recodai_forgery.cli import app
from recodai_forgery.evaluate import by_class, class_page, class_tables, classes, describe, format_classes, pick_worst, word, worst_page
from recodai_forgery.metric import LOSSES, bootstrap_interval, score_cases
from recodai_forgery.rle import encode
from recodai_forgery.types import AUTHENTIC, BadTable


def disc(x: int, size: int = 8) -> np.ndarray:
    mask = np.zeros((40, 80), np.uint8)
    mask[10:10 + size, x:x + size] = 1
    return mask


TRUTH = [disc(5) | disc(50)]


@pytest.fixture
def tables() -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    "Solution, submission and description of six pairs; ids 1 to 6 forged, 11 to 16 their twins."
    answers = [TRUTH, [disc(50)], [disc(5), disc(50)], [], [disc(20)], TRUTH]
    solution = pd.DataFrame({"case_id": [*map(str, range(1, 7)), *map(str, range(11, 17))], "annotation": [encode(TRUTH)] * 6 + [AUTHENTIC] * 6, "shape": "[40, 80]"})
    submission = solution[["case_id"]].assign(annotation=[encode(one) for one in answers] + [encode([disc(30)])] + [AUTHENTIC] * 5)
    described = pd.DataFrame({"test_forged": range(1, 7), "test_authentic": range(11, 17), "kind": ["simple", "simple", "pair", "pair", "pair", "simple"],
                              "source_files": ["a", "a;b", "b;a", "c", "c", "d"], "post": ['{"jpeg": 80}', "{}", "{}", "{}", "{}", "{}"]})
    return solution, submission, described


@pytest.fixture
def cases(tables) -> pd.DataFrame: return describe(score_cases(*tables[:2]), tables[2])


def test_every_forged_figure_is_in_one_class_and_its_losses_are_whole(cases):
    for table in class_tables(cases).values():
        assert table["figures"].sum() == 6
        assert np.allclose(table["oF1"] + table[list(LOSSES[1:])].sum(axis=1), 1)


def test_a_class_says_what_the_metric_says_of_its_figures(cases):
    table, part = by_class(cases, "kind"), cases[cases["forged"] & (cases["kind"] == "pair")]
    assert (table.loc["pair", "low"], table.loc["pair", "high"]) == bootstrap_interval(part["score"].to_numpy(), part["group"].to_numpy())
    assert table.loc["pair", "oF1"] == part["score"].mean() and table.loc["pair", "any_hit"] == (part["score"] > 0).mean()
    assert table["flagged"].tolist() == [0, pytest.approx(1 / 3)] # the flagged twin is of a simple figure
    alone = by_class(cases, "post").loc["jpeg"] # one figure says nothing of others
    assert alone["figures"] == 1 and np.isnan(alone["low"]) and "| jpeg          | 1       | 1.000 |             | 1.000" in format_classes(by_class(cases, "post"))
    assert cases.loc["2", "group"] == cases.loc["3", "group"] == cases.loc["12", "group"] # the same sources, in whatever order


def test_descriptions_by_pairs_by_figures_and_with_other_ids_beside_agree(tables, cases):
    solution, submission, described = tables
    scored = score_cases(solution, submission)
    with_train_ids = described.assign(case_id=range(100, 106))
    with_gaps = pd.concat([described, described.assign(test_forged=None, test_authentic=None)]).astype({"test_forged": float, "test_authentic": float})
    by_figure = pd.concat([described.assign(case_id=described[name]) for name in ("test_forged", "test_authentic")]).rename(columns={"test_forged": "x"})
    for table in (with_train_ids, with_gaps, by_figure):
        assert describe(scored, table)[["kind", "post", "group", "score"]].equals(cases[["kind", "post", "group", "score"]])


def test_descriptions_that_do_not_fit_are_refused(tables, cases):
    solution, submission, described = tables
    scored = score_cases(solution, submission)
    for wrong, said in ((described[1:], "2 figures"), (described.drop(columns="test_forged"), "needs case_id"), (described.assign(test_forged=3), "twice")):
        with pytest.raises(BadTable, match=said): describe(scored, wrong)
    with pytest.raises(BadTable, match="no column colour.*kind"): by_class(cases, "colour")
    with pytest.raises(BadTable, match="no forged figure"): class_page(class_tables(cases[~cases["forged"]]))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0, 1), min_size=9, max_size=60))
def test_quartiles_keep_order_and_ties_together(values):
    column = pd.Series(values)
    named = classes(column).astype(str)
    if column.nunique() <= 8: return
    frame = pd.DataFrame({"value": column, "part": named.str[0].astype(int)}).sort_values("value")
    assert frame["part"].is_monotonic_increasing and frame.groupby("value")["part"].nunique().eq(1).all()
    assert frame["part"].between(1, 4).all() and (frame["part"] == 1).mean() >= .25


@settings(deadline=None, max_examples=60)
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda part: st.lists(part) | st.dictionaries(st.text(), part), max_leaves=8))
def test_any_cell_has_a_word(value):
    assert word(value if isinstance(value, str) else json.dumps(value)) != "" and isinstance(word(json.dumps(value)), str)


def test_worst_figures_are_of_each_sort_and_begin_with_the_flagged(cases):
    worst = pick_worst(cases, 4)
    assert worst[0] == "11" and set(worst) == {"11", "4", "3", "2"} # flagged, missed, sent as two, half of it
    assert pick_worst(cases, 99)[-1] == "2" and {"1", "6", "12"}.isdisjoint(pick_worst(cases, 99))


def test_nothing_lost_is_said_and_not_drawn(tables):
    solution = tables[0]
    with pytest.raises(BadTable, match="no figure lost anything"): worst_page({}, solution, solution[["case_id", "annotation"]], score_cases(solution, solution))


def test_score_command_writes_tables_pictures_and_json(tables, cases, tmp_path):
    for name, table in zip(("solution", "submission", "cases"), tables, strict=True): table.to_csv(tmp_path / f"{name}.csv", index=False)
    (tmp_path / "images").mkdir()
    for name in tables[0]["case_id"]: Image.fromarray(np.full((40, 80, 3), 200, np.uint8)).save(tmp_path / "images" / f"{name}.png")
    words = ["score", tmp_path / "submission.csv", tmp_path / "solution.csv", "--cases", tmp_path / "cases.csv"]
    pictures = ["--images", tmp_path / "images", "--page", tmp_path / "worst.png", "--plot", tmp_path / "classes.png"]
    run = lambda *more: CliRunner().invoke(app, [str(one) for one in (*words, *more)])
    text = run(*pictures)
    assert text.exit_code == 0 and format_classes(by_class(cases, "post")) in text.output and str(tmp_path / "worst.png") in text.output
    for name in ("worst", "classes"): assert Image.open(tmp_path / f"{name}.png").width > 500
    told = json.loads(run("--by", "kind", "--json").stdout)
    assert list(told["classes"]) == ["kind"] and told["classes"]["kind"]["pair"]["oF1"] == pytest.approx(by_class(cases, "kind").loc["pair", "oF1"])
    assert run("--page", tmp_path / "worst.png").exit_code == 2
    wrong = run("--by", "colour")
    assert wrong.exit_code == 1 and "there is no column colour" in wrong.output + wrong.stderr
