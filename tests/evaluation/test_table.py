"""Tables as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io

from recformer.evaluation.table import csv_table, latex_table, markdown_table

ROWS = [["a|b_c", "1 %"], ["d & e", "x ± y"]]


def test_markdown():
    assert markdown_table(["", "N@10"], ROWS) == (
        "| |N@10|\n|---|---|\n|a\\|b_c|1 %|\n|d & e|x ± y|\n"
    )
    assert markdown_table(["pair", "p"], []) == "|pair|p|\n|---|---|\n"
    # In every column and in heads; a backslash must not take the sign after it for itself.
    text = markdown_table(["a|b", "c\nd"], [["e\\|f", "|g|"], ["h\\", "i\r\n j\\k"]])
    assert text == ("|a\\|b|c d|\n|---|---|\n|e\\\\\\|f|\\|g\\||\n|h\\\\|i j\\k|\n")


def test_latex_means_no_more_than_the_text():
    assert latex_table(["", "N@10"], ROWS) == (
        "\\begin{tabular}{lr}\n\\toprule\n & N@10 \\\\\n\\midrule\na\\textbar{}b\\_c & 1 \\% \\\\\n"
        "d \\& e & x $\\pm$ y \\\\\n\\bottomrule\n\\end{tabular}\n"
    )
    rows = [["[a]", "[0, 1]"], ["*b", "<c>"], ["d\ne", ""]]
    assert latex_table(["[x", "y"], rows).splitlines()[2:7] == [
        "{[}x & y \\\\",
        "\\midrule",
        "{[}a] & [0, 1] \\\\",
        "{*}b & \\textless{}c\\textgreater{} \\\\",
        "d e &  \\\\",
    ]


def test_csv_of_rows_with_different_columns():
    text = csv_table([{"name": 'a "b", c', "x": 0.1}, {"name": "d", "y": None}])
    rows = list(csv.DictReader(io.StringIO(text)))
    assert rows == [{"name": 'a "b", c', "x": "0.1", "y": ""}, {"name": "d", "x": "", "y": ""}]
