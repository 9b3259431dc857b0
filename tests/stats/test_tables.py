"""What a report says beyond its cells: budgets, differences from published numbers, LaTeX, and the page of HTML."""

from __future__ import annotations

import csv
import html.parser
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
from test_report import D4RL, cell, make, make_run, markdown, write

from offrl.results import figures, stats, style, tables
from offrl.results import html as page
from offrl.results.budget import expected_best
from offrl.results.published import lookup

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


# ---- published numbers ---------------------------------------------------------------------------------------


def test_difference_is_counted_in_standard_errors_of_both(tmp_path):
    make_run(tmp_path / "runs" / "a", "td3_bc", "halfcheetah-medium-v2", level=46)
    made = make(tmp_path)
    found = cell(made, "td3_bc", "halfcheetah-medium-v2")
    points, errors = found.difference  # CORL: 48.1, deviation 0.18 with ddof 0 over 4 seeds
    assert points == pytest.approx(found.last.mean() - 48.1)
    assert errors == pytest.approx(points / math.sqrt(found.last.var(ddof=1) / 3 + 0.18**2 / 3))
    assert f"{points:+.1f} ({errors:+.1f} s.e.)" in markdown(made)
    made.cells[0].published = [n for n in lookup("prdc", D4RL) if n.seeds is None][
        :1
    ]  # nothing to add to our own error
    assert made.cells[0].difference[1] == pytest.approx(
        made.cells[0].difference[0] / math.sqrt(found.last.var(ddof=1) / 3)
    )


def test_ten_percent_cloning_is_found_under_its_own_name():
    assert lookup("bc+Top-10%", D4RL)[0].method == "10%BC"
    assert lookup("bc+Top-20%", D4RL) == []


# ---- budgets -------------------------------------------------------------------------------------------------


def test_best_checkpoint_is_told_with_its_flag_and_price(tmp_path):
    make_run(tmp_path / "runs" / "a", "bc", spread=15)
    made = write(tmp_path, last_k=3)
    found = cell(made, "bc")
    assert (found.best >= found.last).all()
    assert (found.best >= found.average).all()
    assert found.best.mean() > found.last.mean()
    with open(tmp_path / "out" / "report.csv") as file:
        (line,) = csv.DictReader(file)
    assert float(line["best_mean"]) == pytest.approx(found.best.mean())
    assert (line["best_online_selected"], line["best_online_episodes"], line["checkpoint"]) == ("True", "16", "last")
    assert "online_selected: true" in markdown(made)


def test_several_settings_of_a_method_are_a_tuning(tmp_path):
    """Per dataset, and for the family with each setting averaged over its datasets first."""
    levels = {"hopper-medium-v2": (10, 50, 90), "walker2d-medium-v2": (80, 60, 10)}
    for dataset, scores in levels.items():
        for alpha, level in zip((1.0, 2.5, 5.0), scores):
            make_run(tmp_path / "runs" / f"{dataset}{alpha}", "td3_bc", dataset, level=level, alpha=alpha, episodes=6)
    made = make(tmp_path)
    means = {d: [c.mean for c in made.cells if c.dataset == d] for d in levels}
    found = {t.where: t for t in made.tunings}
    assert set(found) == {*levels, "gym-mujoco"}
    for where, values in {**means, "gym-mujoco": np.mean(list(means.values()), axis=0)}.items():
        best, spread = expected_best(values, [1, 2, 3])
        assert list(found[where].best) == [1, 2, 3]
        np.testing.assert_allclose(list(found[where].best.values()), np.stack([best, spread], 1))
        assert (found[where].method, found[where].configurations) == ("td3_bc", 3)
    bandit = found["hopper-medium-v2"].bandit
    lanes = np.concatenate([c.last for c in made.cells if c.dataset == "hopper-medium-v2"])
    assert bandit.mean[0] == pytest.approx(lanes.mean(), abs=4)  # of 1,000 trials
    assert bandit.limit == pytest.approx(expected_best(lanes, [8], replace=False)[0][0])
    assert found["gym-mujoco"].bandit is None
    assert "Budget of online evaluations" in markdown(made)


def test_profile_band():
    rng = np.random.default_rng(0)
    tasks = [rng.normal(50, 10, 8), rng.normal(30, 10, 5)]
    tau = np.linspace(0, 80, 33)
    profile, (low, high) = stats.performance_profile(tasks, tau), stats.profile_band(tasks, tau)
    assert (low <= profile + 1e-12).all()
    assert (profile <= high + 1e-12).all()
    single = [x[:1] for x in tasks]
    for edge in stats.profile_band(single, tau):
        np.testing.assert_array_equal(edge, stats.performance_profile(single, tau))
    # The share above tau of 8 runs, k of which lie above, is a binomial mean: its deviation is sqrt(p (1 - p) / 8).
    one = [np.arange(8.0)]
    (low,), (high,) = stats.profile_band(one, [3.5], resamples=4000)
    assert (high - low) / (2 * 1.96) == pytest.approx(math.sqrt(0.25 / 8), rel=0.15)
    figure = figures.draw_profiles({"gym": {"bc": tasks}})
    (panel,) = figure.axes
    np.testing.assert_allclose(panel.lines[0].get_ydata()[[0, -1]], [1, 0])


def test_many_methods_with_long_names_leave_the_panels_their_height():
    """And of sixteen no two look alike."""
    tasks = [np.arange(5.0)]
    heights = []
    for methods in (["bc"], [f"method_{i:02d} (coefficient=default)" for i in range(16)]):
        figure = figures.draw_profiles({"gym": dict.fromkeys(methods, tasks)})
        figure.draw_without_rendering()  # applies the layout
        (panel,) = figure.axes
        heights.append(panel.get_window_extent().height / figure.dpi)
        looks = style.looks_of(methods)
        assert len({(colour, style.MARKS[line]) for colour, line in looks.values()}) == len(methods)
    assert heights[1] == pytest.approx(heights[0], rel=0.25)  # in inches; the legend has sixteen lines


# ---- LaTeX and HTML ------------------------------------------------------------------------------------------


def make_several(tmp_path):
    make_run(tmp_path / "runs" / "a", "bc", "hopper-medium-v2", level=9)
    make_run(tmp_path / "runs" / "b", "td3_bc", "hopper-medium-v2", level=100, config={"label": "<i>&_100%"})
    make_run(tmp_path / "runs" / "c", "bc", "walker2d-medium-v2", level=-20)


def test_latex_is_escaped_and_balanced(tmp_path):
    make_several(tmp_path)
    text = tables.latex(make(tmp_path))
    assert r"<i>\&\_100\%" in text
    assert re.search(r"bc & [\d.]+ \$\\pm\$ \d", text)
    assert len(re.findall(r"\\begin\{", text)) == len(re.findall(r"\\end\{", text)) > 2
    for block in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", text, re.S):
        rows = [line for line in block[1].splitlines() if line.endswith(r"\\")]
        assert {len(re.split(r"(?<!\\)&", row)) for row in rows} == {len(block[0])}
    assert not re.search(r"(?<!\\)[%#_](?!.*usepackage)", re.sub(r"^%.*", "", text, flags=re.M))


def test_a_latex_table_beyond_a_page_breaks_over_pages():
    def made(rows):
        return tables.Table("Scores", ["dataset", "score"], [[f"d{i}", str(i)] for i in range(rows)]).latex()

    assert "longtable" not in made(40)
    text = made(41)
    assert r"\begin{table}" not in text
    assert text.index(r"\endhead") < text.index(r"\endfoot") < text.index("d0 & 0") < text.index("d40 & 40")


class Reader(html.parser.HTMLParser):
    """The tags of a page, whether they close in order, and the tables' text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.tables = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if any(tag in self.open for tag in ("td", "th")):
            self.tables[-1][-1][-1] += data


def test_page_holds_the_tables_and_needs_nothing_else(tmp_path):
    make_several(tmp_path)
    made = write(tmp_path)
    text = (tmp_path / "out" / "report.html").read_text()
    found = Reader(text)
    assert found.tables == [[t.columns, *t.rows] for t in tables.full_tables(made)]
    assert len(found.addresses) == 3  # cloning has two datasets, so there is a profile
    assert all(address.startswith("data:image/svg+xml;base64,") for address in found.addresses)
    assert not re.search(r"https?:|@import|url\(|fetch\(", re.sub(r"base64,[\w+/=]+", "", text))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_sorts_the_tables(tmp_path):
    """Headless Chromium runs the page's own script: up, down, numbers by value, empty cells last."""
    rows = [["x", "9.5 ± 1"], ["y", "100.0 ± 2"], ["z", ""], ["B", "-20.1"], ["a", "1,000"]]
    table = tables.Table("t", ["name", "score"], rows, [set(), {1}, set(), set(), set()])
    clicks = {"up": [1], "down": [1, 1], "names": [0]}
    for name, columns in clicks.items():
        script = "".join(f"document.querySelectorAll('th button')[{c}].click();" for c in columns)
        text = page.page("t", [table], [], []).replace("</body>", f"<script>{script}</script></body>")
        (tmp_path / f"{name}.html").write_text(text)
    order = {}
    for name in clicks:
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
        shown = subprocess.run(
            [*command, "--dump-dom", f"file://{tmp_path}/{name}.html"], capture_output=True, text=True, timeout=120
        )
        (found,) = Reader(shown.stdout[shown.stdout.index("<html") :]).tables
        order[name] = [row[0] for row in found[1:]]
    assert order == {
        "up": ["B", "x", "y", "a", "z"],
        "down": ["a", "y", "x", "B", "z"],
        "names": ["a", "B", "x", "y", "z"],
    }
