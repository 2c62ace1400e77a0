"""audit.html: the figures of an audit on one page that needs no other file.

All of it is made from audit.json; see `recformer.preparation.audit.figures`.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from string import Template
from typing import Any

import numpy as np

# The parts of a split, in plots.
COLOURS = {"train": "#4c78a8", "val": "#eca82c", "test": "#d1495b"}

PAGE = Template(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Audit of $name</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #f6f7f9; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 24px; margin: 0; }
h2 { font-size: 17px; margin: 32px 0 8px; }
.about { color: #666; margin: 4px 0 20px; overflow-wrap: anywhere; }
.box { background: #fff; border: 1px solid #e2e5ea; border-radius: 8px; padding: 12px 16px;
  overflow-x: auto; }
.warnings { border-left: 5px solid #d1495b; }
.clean { border-left: 5px solid #3a8f5c; }
.notes { margin-top: 12px; color: #555; }
ul { margin: 0; padding-left: 20px; }
.plots, .tables { display: grid; gap: 12px; }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); }
.tables { grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); }
.tables { align-items: start; }
.plots img { width: 100%; display: block; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
caption { text-align: left; font-weight: 600; padding-bottom: 4px; }
th, td { text-align: right; padding: 3px 0 3px 12px; border-top: 1px solid #eceef1; }
th { font-weight: 500; color: #666; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td { font-variant-numeric: tabular-nums; white-space: nowrap; }
td:first-child { white-space: normal; }
</style>
</head>
<body>
<main>
<h1>Audit of $name</h1>
<p class="about">$about</p>
$warnings
$notes
<h2>Plots</h2>
<div class="plots">
$plots
</div>
<h2>Figures</h2>
<div class="tables">
$tables
</div>
</main>
</body>
</html>
"""
)


def percent(share: float) -> str:
    """A share as a reader likes it."""
    return f"{100 * share:.1f} %"


def cell(figure: Mapping[str, Any]) -> str:
    """Count and share."""
    return f"{figure['count']:,} ({percent(figure['share'])})"


def page(found: Mapping[str, Any]) -> str:
    """audit.html: one page that needs no other file.

    Args:
        found: what `audit` returned.
    """
    sizes, split = found["sizes"], found["split"]
    about = (
        f"{sizes['users']:,} users, {sizes['items']:,} items, {sizes['interactions']:,} "
        f"interactions: {sizes['train']:,} train, {sizes['val']:,} val, {sizes['test']:,} test. "
        f"Split {split['name'].replace('_', '-')}, {found['split_hash'][:12]}."
    )
    messages = [warning["message"] for warning in found["warnings"]]
    return PAGE.substitute(
        name=html.escape(found["folder"]),
        about=html.escape(about),
        warnings=_list("box warnings", messages)
        if messages
        else '<div class="box clean">Nothing was found that can spoil an evaluation.</div>',
        notes=_list("box notes", found["notes"]) if found["notes"] else "",
        plots="\n".join(_plots(found)),
        tables="\n".join(_table(*table) for table in _tables(found)),
    )


def _list(css_class: str, sentences: Iterable[str]) -> str:
    entries = "".join(f"<li>{html.escape(sentence)}</li>\n" for sentence in sentences)
    return f'<div class="{css_class}"><ul>\n{entries}</ul></div>'


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def row(tag: str, cells: Iterable[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in cells) + "</tr>\n"

    body = "".join(row("td", cells) for cells in rows)
    return (
        f'<div class="box"><table>\n<caption>{html.escape(caption)}</caption>\n'
        f"{row('th', head) if head else ''}{body}</table></div>"
    )


def _tables(
    found: Mapping[str, Any],
) -> Iterable[tuple[str, Sequence[str], Iterable[Sequence[str]]]]:
    """Caption, head and rows of every table."""
    texts, times, tokens = found["texts"], found["times"], found["tokens"]
    val, test = found["targets"]["val"], found["targets"]["test"]
    affected = [
        ("no metadata", texts["without_metadata"]),
        ("no text", texts["empty"]),
        ("next to no text", texts["near_empty"]),
        ("text of another item", texts["identical"]),
    ]
    if tokens is not None:
        affected.append(("tokens of another item, as cut", tokens["identical"]))
    yield (
        "Texts",
        ["", "items", "test targets"],
        [(name, cell(each["items"]), cell(each["test_targets"])) for name, each in affected],
    )
    rows = [
        ("users with a target", f"{val['users']:,}", f"{test['users']:,}"),
        ("… without history, left out", *_cells("without_history", val, test)),
        ("evaluated", f"{val['evaluated']:,}", f"{test['evaluated']:,}"),
        ("… with nothing before this part", *_cells("nothing_before_the_part", val, test)),
        ("target in the history", *_cells("in_history", val, test)),
        ("target is the newest item", *_cells("same_as_newest", val, test)),
        ("target never in train", *_cells("cold", val, test)),
        ("items that no earlier part has", f"{val['new_items']:,}", f"{test['new_items']:,}"),
    ]
    if times is not None:
        rows.append(("target decided by a tie", *_cells("decided_by_ties", val, test)))
    yield "Targets", ["", "val", "test"], rows

    repeats = found["repeats"]
    facts = [
        ("interactions that repeat the one before", cell(repeats["consecutive"])),
        ("interactions with an item met before", cell(repeats["again"])),
    ]
    if times is not None:
        facts += [
            ("same user, item and time as another", cell(times["duplicates"])),
            ("interactions tied in time", cell(times["tied"])),
            ("users whose order ties decide", cell(times["users_ordered_by_ties"])),
            ("users out of order", cell(times["users_out_of_order"])),
            ("odd times, not in the picture", cell(times["odd"])),
        ]
        if "after_the_cut" in times:
            facts += [
                (f"not before the {name} cut at {late['cut']}", cell(late))
                for name, late in times["after_the_cut"].items()
            ]
        else:
            share = times["mean_share_of_train_after_a_target"]
            facts += [
                ("train later than its user's target", cell(times["train_after_own_target"])),
                ("train later than a target, on average", percent(share)),
            ]
        facts += [
            ("commonest first time of a user", cell(times["commonest_start"])),
            ("commonest gap", f"{times['commonest_gap']['gap']}: {cell(times['commonest_gap'])}"),
            ("resolution of times", f"{times['resolution']:,} {times['unit'] or ''}".strip()),
        ]
    yield "Interactions", [], facts

    popularity = found["popularity"]
    top = popularity["top_1_percent"]
    yield (
        "Popularity in train",
        [],
        [
            ("Gini coefficient", f"{popularity['gini']:.3f}"),
            (f"interactions with the top 1 % ({top['items']} items)", cell(top["train"])),
            ("test targets among them", cell(top["test_targets"])),
            ("items never in train", cell(popularity["items_never_in_train"])),
        ],
    )
    distributions = [
        ("items of a training sequence", found["lengths"]["train_sequence"]),
        ("items of a test history", found["lengths"]["test_history"]),
        ("words of an item", texts["words"]),
    ]
    if tokens is not None:
        distributions += [
            ("tokens of an item", tokens["item"]),
            ("tokens of a test history", tokens["test_history"]),
        ]
    yield (
        "Lengths",
        ["", "min", "5 %", "25 %", "median", "75 %", "95 %", "max", "mean"],
        [
            (name, *(f"{v:,.0f}" for v in each["percentiles"].values()), f"{each['mean']:,.1f}")
            for name, each in distributions
            if each is not None
        ],
    )
    if tokens is not None:
        limits = [(name, f"{value:,}") for name, value in tokens["limits"].items()]
        cut = [
            (f"test histories cut by {name}", cell(tokens[f"cut_by_{name}"]))
            for name in ("max_token_num", "max_item_embeddings")
        ]
        yield "Limits", [], limits + cut
    yield (
        "Attributes",
        ["", "items that have it"],
        [(name, cell(figure)) for name, figure in texts["attributes"].items()],
    )


def _cells(key: str, *splits: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(cell(split[key]) for split in splits)


def _plots(found: Mapping[str, Any]) -> Iterable[str]:
    """An <img> with the picture inside for every plot."""
    texts, times, tokens = found["texts"], found["times"], found["tokens"]
    yield _image("What touches test targets", lambda axis: _plot_targets(axis, found))
    if times is not None:
        title = "Interactions in time" + (" (look synthetic)" if times["synthetic"] else "")
        yield _image(title, lambda axis: _plot_times(axis, times))
    lengths = found["lengths"]
    histograms = [
        ("Items of a training sequence", lengths["train_sequence"], "items", "users", None),
        ("Items of a test history", lengths["test_history"], "items", "users", None),
        ("Words of an item's text", texts["words"], "words", "items", None),
    ]
    if tokens is not None:
        limit = tokens["limits"]["max_token_num"]
        histograms += [
            ("Tokens of an item", tokens["item"], "tokens", "items", None),
            ("Tokens of a test history", tokens["test_history"], "tokens", "users", limit),
        ]
    for title, each, of, who, limit in histograms:
        if each is not None:
            yield _image(title, _histogram(each, of, who, limit))
    yield _image("Popularity in train", lambda axis: _plot_popularity(axis, found["popularity"]))


def _image(title: str, plot: Callable[[Any], None]) -> str:
    # Without pyplot: no window system is asked for and no state is left behind.
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(4.6, 3.1), layout="constrained")
    axis = canvas.subplots()
    axis.set_title(title, fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    plot(axis)
    png = io.BytesIO()
    canvas.savefig(png, format="png", dpi=130)
    code = base64.b64encode(png.getvalue()).decode()
    source = f"data:image/png;base64,{code}"
    return f'<div class="box"><img alt="{html.escape(title)}" src="{source}"></div>'


def _plot_targets(axis: Any, found: Mapping[str, Any]) -> None:
    texts, test = found["texts"], found["targets"]["test"]
    bars = {
        "no metadata": texts["without_metadata"]["test_targets"],
        "no text": texts["empty"]["test_targets"],
        "next to no text": texts["near_empty"]["test_targets"],
        "text of another": texts["identical"]["test_targets"],
        "in the history": test["in_history"],
        "never in train": test["cold"],
    }
    if "decided_by_ties" in test:
        bars["decided by a tie"] = test["decided_by_ties"]
    if found["tokens"] is not None:
        bars["tokens of another"] = found["tokens"]["identical"]["test_targets"]
    shares = [100 * figure["share"] for figure in bars.values()]
    shown = axis.barh(list(bars), shares, color=COLOURS["test"])
    axis.bar_label(shown, [f"{share:.1f}" for share in shares], padding=3, fontsize=8)
    axis.set_xlim(0, max(1.0, *shares) * 1.15)
    axis.invert_yaxis()
    axis.set_xlabel("% of test targets", fontsize=8)


def _plot_times(axis: Any, times: Mapping[str, Any]) -> None:
    histogram = times["histogram"]
    edges = np.array(histogram["edges"])
    if times["unit"] is not None:
        edges = edges.astype(np.int64).astype(f"datetime64[{times['unit']}]")
    bottom = np.zeros(len(edges) - 1)
    for name, colour in COLOURS.items():
        counts = histogram[name]
        axis.bar(edges[:-1], counts, np.diff(edges), bottom, align="edge", color=colour, label=name)
        bottom += counts
    if times["unit"] is not None:
        from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

        locator = AutoDateLocator(maxticks=6)
        axis.xaxis.set_major_locator(locator)
        axis.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    axis.set_ylim(0, 1.05 * bottom.max())
    axis.set_ylabel("interactions", fontsize=8)
    axis.legend(fontsize=8, frameon=False)


def _histogram(
    distribution: Mapping[str, Any], of: str, who: str, limit: int | None
) -> Callable[[Any], None]:
    def plot(axis: Any) -> None:
        edges = np.array(distribution["histogram"]["edges"])
        widths = np.diff(edges)
        middles = edges[:-1] + (widths - 1) / 2  # of whole numbers: a bar of 4 and 5 is at 4.5
        counts = distribution["histogram"]["counts"]
        axis.bar(middles, counts, widths * 0.9, color=COLOURS["train"])
        most = distribution["percentiles"]["100"]
        beyond = f" (last bar: up to {most:,.0f})" if most >= edges[-1] else ""
        axis.set_xlabel(of + beyond, fontsize=8)
        axis.set_ylabel(who, fontsize=8)
        if limit is not None and limit < edges[-1]:
            axis.axvline(limit, color=COLOURS["test"], label=f"max_token_num {limit}")
            axis.legend(fontsize=8, frameon=False)

    return plot


def _plot_popularity(axis: Any, popularity: Mapping[str, Any]) -> None:
    axis.plot(range(101), [100 * share for share in popularity["curve"]], color=COLOURS["train"])
    axis.plot([0, 100], [0, 100], color="#bbb", linewidth=1)
    axis.set_xlabel("% of items, most popular first", fontsize=8)
    axis.set_ylabel("% of training interactions", fontsize=8)
    axis.text(96, 6, f"Gini {popularity['gini']:.2f}", ha="right", fontsize=9)
