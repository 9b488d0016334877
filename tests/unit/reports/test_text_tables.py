"""The results of a study as Markdown and LaTeX to copy."""

from cm3.reports.pages.text_tables import latex, markdown


def distribution(mean, sd=None, best=False):
    return {"mean": mean, "sd": sd, "best": best}


STUDY = {
    "main": "cm3_full",
    "headline": "recall@20",
    "experiments": {
        "cm3_full": {"metrics": {"recall@20": distribution(0.2, 0.01, True), "ndcg@20": distribution(0.1, 0.0)}},
        "a|b & c": {"metrics": {"recall@20": distribution(0.15), "ndcg@20": distribution(0.05)}},
    },
}


def test_markdown_holds_means_spreads_and_the_change_in_percent():
    assert markdown(STUDY, ["recall@20", "ndcg@20"]).splitlines() == [
        r"| Experiment | Recall@20 | NDCG@20 | Recall@20 against cm3\_full |",
        "| --- | ---: | ---: | ---: |",
        r"| cm3\_full | **0.2000** ± 0.0100 | 0.1000 |  |",
        "| a\\|b & c | 0.1500 | 0.0500 | \N{MINUS SIGN}25 % |",
    ]


def test_latex_is_escaped_and_marks_the_best():
    assert latex(STUDY, ["recall@20", "ndcg@20"]).splitlines() == [
        r"\begin{tabular}{lrrr}",
        r"\toprule",
        r"Experiment & Recall@20 & NDCG@20 & Recall@20 against cm3\_full \\",
        r"\midrule",
        r"cm3\_full & \textbf{0.2000} {\scriptsize $\pm$ 0.0100} & 0.1000 &  \\",
        r"a|b \& c & 0.1500 & 0.0500 & $-$25 \% \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
