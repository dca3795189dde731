"""The report: round trips, figures that are right, a page that is safe, whole and legible."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ss_pruning import prune_, synaptic_strength
from ss_pruning.errors import FileFormatError, InputError
from ss_pruning.report.formatting import count, percent, printable
from ss_pruning.report.notes import certainty
from ss_pruning.report.records import (
    QUANTILES,
    Excluded,
    LayerReport,
    Report,
    jsonable,
)
from ss_pruning.report.violin import LogScale, density
from ss_pruning.sources.demo import digits_resnet
from tests.support.attention import EXAMPLE, block

STRENGTH = (0.0, *(0.01 * 1.3**n for n in range(len(QUANTILES) - 2)), 10.0)
EVIL = """<script>alert("1")</script>&'\x1b[31m\udcff"""


def layer(path: str = "layer1.0.conv1", **changes: Any) -> LayerReport:
    values = LayerReport(path, "Conv2d", 16, 8, 32, 20, 512, 160, STRENGTH)
    return replace(values, **{"share_cut": math.nan, **changes})


def example(layers: int = 3, **changes: Any) -> Report:
    report = Report(
        model="timm:resnet50",
        macs_before=4_089_184_256,
        macs_after=2_862_428_979,
        params_before=25_557_032,
        params_after=16_812_004,
        layers=[layer(f"layer{index}.conv") for index in range(layers)],
        excluded=[Excluded(("fc",), 1000, "the outputs of the model")],
        max_error=3.1e-7,
        settings={"macs": 0.7, "ignore": [], "round_to": None, "input": [3, 224, 224]},
        seconds={"trace": 1.25},
        versions={"torch": "2.0"},
        accuracy_before=0.93391,
        accuracy_after=0.912,
        images=10000,
        command="ss-prune prune timm:resnet50 --macs 0.7",
        bytes_before=102_000_000,
        bytes_after=67_000_000,
    )
    return replace(report, **changes)


class Page(HTMLParser):
    """Collects what a browser would build: elements, attributes and text."""

    VOID = frozenset({"meta", "wbr", "br", "img", "link", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


# ---------------------------------------------------------------- records


def test_share_cut_comes_from_the_counts_unless_given() -> None:
    assert layer().share_cut == pytest.approx(1 - 160 / 512)
    assert layer(share_cut=0.25).share_cut == 0.25
    assert layer(synapses_before=0, synapses_after=0).share_cut == 0.0


def test_json_round_trip_is_exact(tmp_path: Path) -> None:
    report = example()
    report.save_json(tmp_path / "report.json")
    assert Report.load_json(tmp_path / "report.json") == report


def test_each_layer_tells_what_it_costs() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )
    report = prune_(net, torch.zeros(2, 3, 9, 9), ratio=0.5)
    # outputs * inputs of each * kernel * positions * images: 7x7 and 5x5 positions of 2 images
    a, b = report.layers[0].outputs_after, report.layers[2].outputs_after
    assert a < 8
    assert b < 12
    found = [(row.macs_before, row.macs_after, row.params_before, row.params_after) for row in report.layers]
    assert found == [
        (8 * 3 * 9 * 49 * 2, a * 3 * 9 * 49 * 2, 8 * 3 * 9, a * 3 * 9),
        (8 * 9 * 25 * 2, a * 9 * 25 * 2, 8 * 9 + 8, a * 9 + a),
        (12 * 8 * 25 * 2, b * a * 25 * 2, 12 * 8 + 12, b * a + b),
        (5 * 12 * 2, 5 * b * 2, 5 * 12 + 5, 5 * b + 5),
    ]
    assert sum(row.macs_after or 0 for row in report.layers) == report.macs_after


def test_groups_that_go_with_a_head_leave_the_others_as_many_inputs() -> None:
    model = block("aggregated")
    report = prune_(model, EXAMPLE, ratio=0.4, allocation="local")
    (row,) = (row for row in report.layers if row.path == "attn.mix")
    mix, patches = model.attn.mix, EXAMPLE.shape[0] * 6
    assert mix.groups < 9
    assert (row.synapses_before, row.synapses_after) == (36 * 4, mix.weight.numel())
    assert (row.macs_before, row.macs_after) == (36 * 4 * patches, mix.weight.numel() * patches)


def test_what_json_lacks_survives_or_becomes_text() -> None:
    report = example(max_error=math.inf, settings={"importance": object, "when": {"deep": (1, math.nan)}})
    values = json.loads(report.to_json())
    again = Report.from_dict(values)
    assert again.max_error == math.inf
    assert again.settings == {"importance": "<class 'object'>", "when": {"deep": [1, "nan"]}}
    assert math.isnan(Report.from_dict(example(max_error=math.nan).to_dict()).max_error)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_anything_becomes_json(value: object) -> None:
    json.dumps(jsonable(value), allow_nan=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "the format reads 'other'"),
        ({"layers": [{"path": "a"}]}, "the report is damaged: .*missing 7 required"),
        ({"layers": None}, "the report is damaged"),
        ({"max_error": "much"}, "the report is damaged: could not convert"),
        ({"surprise": 1}, "the report is damaged: .*surprise"),
        ({"inexact_layers": [1]}, "the report is damaged: inexact_layers is"),
        ({"not_compensated": {"a": 1}}, "the report is damaged: not_compensated is"),
    ],
)
def test_damaged_reports_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FileFormatError, match=message):
        Report.from_dict({**example().to_dict(), **change})


def test_missing_field_is_named() -> None:
    values = example().to_dict()
    del values["max_error"]
    with pytest.raises(FileFormatError, match="max_error"):
        Report.from_dict(values)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with pytest.raises(FileFormatError, match=r"cannot read the report .*No such file"):
        Report.load_json(path)
    path.write_text(example().to_json()[:200])
    with pytest.raises(FileFormatError, match="cannot read the report"):
        Report.load_json(path)
    path.write_text("[" * 100_000)
    with pytest.raises(FileFormatError, match="cannot read the report"):
        Report.load_json(path)
    path.write_text("[]")
    with pytest.raises(FileFormatError, match="holds no report but a list"):
        Report.load_json(path)


@pytest.mark.parametrize("method", ["save_json", "save_html"])
def test_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    path = tmp_path / "report"
    path.write_text("old")

    def interrupt(self: Path, *args: Any, **kwargs: Any) -> int:
        with self.open("w") as file:
            file.write("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupt)
    with pytest.raises(KeyboardInterrupt):
        getattr(example(), method)(path)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report"]


@pytest.mark.parametrize("method", ["save_json", "save_html"])
def test_save_into_a_missing_folder_says_so(tmp_path: Path, method: str) -> None:
    with pytest.raises(InputError, match="does not exist; create it first"):
        getattr(example(), method)(tmp_path / "absent" / "report")


# ---------------------------------------------------------------- figures in words


@pytest.mark.parametrize(
    ("number", "written"),
    [
        *[(0, "0"), (7, "7"), (999, "999"), (1000, "1.00 k"), (999_499, "999 k"), (999_500, "1.00 M")],
        *[(12_345, "12.3 k"), (4_089_184_256, "4.09 G"), (3.2e15, "3200 T"), (1.5, "1.50")],
    ],
)
def test_counts_have_three_digits(number: float, written: str) -> None:
    assert count(number) == written


def test_percent() -> None:
    assert percent(0.93391, 2) == "93.39 %"


def test_it_prints_as_a_table_and_in_one_line() -> None:
    report = example()
    lines = str(report).splitlines()
    assert lines[0] == "timm:resnet50, pruned"
    assert [line.split() for line in lines[1 : 2 + len(report.headline())]] == [
        " ".join(row).split() for row in [("", "dense", "pruned", "kept"), *report.headline()]
    ]
    assert len({len(line) for line in lines[1 : 2 + len(report.headline())]}) == 1  # columns are aligned
    assert lines[-2:] == [report.verification(), "1,000 channels were excluded, see report.excluded"]
    assert repr(report) == (
        "Report('timm:resnet50': top-1 (10,000 images) -2.19 points, multiply-accumulates 70.0 %, "
        "parameters 65.8 %, weights 65.7 %)"
    )


def test_what_a_notebook_shows_leaves_the_rest_of_the_page_alone() -> None:
    html = example(model=EVIL)._repr_html_()
    page = Page(html)
    assert not page.all("script")
    for words in ("-2.19 points", "4.09 G", "3.1e-07", printable(EVIL)):
        assert words in page.text
    selectors = re.findall(r"^([^{\n]+) \{", html, flags=re.MULTILINE)
    assert selectors
    assert all(
        each.strip().startswith(".ss-pruning-report ") for line in selectors for each in line.split(",")
    )


def test_table_says_before_and_after() -> None:
    console = pytest.importorskip("rich.console").Console(width=100, file=io.StringIO(), record=True)
    console.print(example().table())
    text = console.export_text()
    for words in (
        "timm:resnet50",
        "93.39 %",
        "91.20 %",
        "-2.19 points",
        "4.09 G",
        "2.86 G",
        "70.0 %",
        "16.8 M",
    ):
        assert words in text
    assert "Cut equals masked" in text
    assert "3.1e-07" in text


def test_table_leaves_out_what_is_unknown() -> None:
    report = example(accuracy_before=None, bytes_before=None)
    assert [row[0] for row in report.headline()] == ["multiply-accumulates", "parameters"]


def test_table_prints_markup_as_it_is() -> None:
    console = pytest.importorskip("rich.console").Console(width=100, file=io.StringIO(), record=True)
    console.print(example(model="[red]net[/red]").table())
    assert "[red]net[/red]" in console.export_text()


def test_unverified_is_not_called_verified() -> None:
    report = example(max_error=math.nan)
    assert "not compared" in report.verification()
    assert "✓" not in report.to_html()
    assert "✓" in example().to_html()


def test_printable_drops_what_terminals_and_files_choke_on() -> None:
    assert printable(EVIL) == """<script>alert("1")</script>&'\ufffd[31m\ufffd"""
    assert printable("pays émus 猫\n") == "pays émus 猫\n"


# ---------------------------------------------------------------- the page


def test_page_tells_everything() -> None:
    page = Page(example().to_html())
    for words in (
        *("timm:resnet50", "93.39 %", "91.20 %", "-2.19 points", "4.09 G", "16.8 M", "102 MB", "3.1e-07"),
        *("layer2.conv", "32 → 20", "the outputs of the model", "1,000 channels", "68.8 %", "0.1"),
        *("ss-prune prune timm:resnet50 --macs 0.7", "trace", "1.25 s", "torch", "not set", "3, 224, 224"),
    ):
        assert words in page.text, words


def test_page_has_one_row_per_layer_in_each_figure_up_to_hundreds() -> None:
    html = example(layers=200).to_html()
    assert len(Page(html).all("li")) == 3 * 200 + len(Page(html).all("a"))
    assert len(html) < 1_000_000


def test_page_needs_nothing_from_outside() -> None:
    page = Page(example().to_html())
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.elements}
    addresses = [
        value
        for _, attributes in page.elements
        for key, value in attributes.items()
        if key in ("href", "src")
    ]
    assert addresses
    assert all(address is not None and address.startswith("#") for address in addresses)
    assert not re.search(r"url\(|@import|https?:", example().to_html())


def test_page_has_headings_in_order_and_links_that_lead_somewhere() -> None:
    page = Page(example().to_html())
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(levels))
    targets = {attributes.get("id") for _, attributes in page.elements}
    assert {(attributes["href"] or "")[1:] for attributes in page.all("a")} <= targets
    assert page.all("html") == [{"lang": "en"}]


def test_every_picture_is_told_or_hidden_from_those_who_listen() -> None:
    html = example().to_html()
    pictures = [a for a in Page(html).all("svg") if a.get("role") == "img"]
    assert len(pictures) == 3 * 3
    assert all(a["aria-label"] for a in pictures)
    assert html.count("<title>") == 1 + len(pictures)
    told = "layer0.conv: 32 output channels before, 20 after"
    assert told in [a["aria-label"] for a in pictures]


def test_what_each_layer_costs_is_drawn_as_its_share_of_the_dense_model() -> None:
    layers = [
        layer("a", macs_before=300, macs_after=150, params_before=10, params_after=10),
        layer("b", macs_before=100, macs_after=100, params_before=70, params_after=35),
    ]
    html = example().to_html()
    assert "Not recorded." in Page(html).text
    html = replace(example(), layers=layers).to_html()
    page = Page(html)
    assert "37.5 % | 12.5 %" in page.text
    assert "25.0 % | 43.8 %" in page.text
    macs, params = "100 of 100 multiply-accumulates, 25.0 %", "35 of 70 parameters, 43.8 %"
    told = f"b: {macs} of the dense model's; {params} of the dense model's"
    assert told in [a.get("aria-label") for a in page.all("svg")]
    costs = html.partition('id="costs"')[2].partition("</section>")[0]
    largest = 70 / 80
    expected = [300 / 400, 10 / 80, 100 / 400, 70 / 80]
    assert widths(costs, "track") == pytest.approx([100 * share / largest for share in expected], abs=0.01)
    assert widths(costs, "pruned") == pytest.approx([37.5 / largest, 25 / largest], abs=0.01)
    assert widths(costs, "cut") == pytest.approx([12.5 / largest, 43.75 / largest], abs=0.01)


def test_random_weights_are_said_at_the_top() -> None:
    words = "No weights were loaded"
    assert words not in example().to_html()
    header = example(random_weights=True).to_html().partition("</header>")[0]
    assert words in header


@pytest.mark.parametrize("name", ["hrnet_w18_small_v2.gluon_in1k", "a/b:c_d"])
def test_long_names_break_between_their_parts(name: str) -> None:
    heading = re.search(r"<h1>(.*)</h1>", example(model=name).to_html())
    assert heading is not None
    assert heading[1].replace("<wbr>", "") == name
    assert heading[1].split("<wbr>") == re.findall(r"[^._/:]+[._/:]?", name)


@pytest.mark.parametrize(
    "place", ["model", "layer", "kind", "reason", "path", "setting", "key", "version", "command"]
)
def test_text_from_outside_stays_text(place: str) -> None:
    changes: dict[str, dict[str, Any]] = {
        "model": {"model": EVIL},
        "layer": {"layers": [layer(EVIL)]},
        "kind": {"layers": [layer(kind=EVIL)]},
        "reason": {"excluded": [Excluded(("a",), 1, EVIL)]},
        "path": {"excluded": [Excluded((EVIL,) * 9, 1, "because")]},
        "setting": {"settings": {"a": [EVIL, EVIL]}},
        "key": {"settings": {EVIL: 1}, "seconds": {EVIL: 1.0}},
        "version": {"versions": {EVIL: EVIL}},
        "command": {"command": EVIL},
    }
    html = replace(example(), **changes[place]).to_html()
    page = Page(html)
    assert not page.all("script")
    assert html.encode("utf-8").decode("utf-8") == html
    assert printable(EVIL) in page.text or any(
        printable(EVIL) in str(a.get("title")) for _, a in page.elements
    )


def test_many_modules_left_whole_fold_away_but_are_all_there() -> None:
    paths = tuple(f"block{index}.conv" for index in range(40))
    page = Page(example(excluded=[Excluded(paths, 64, "because")]).to_html())
    assert "and 34 more" in page.text
    assert all(path in page.text for path in paths)


def test_empty_report_still_makes_a_page() -> None:
    report = Report("net", 0, 0, 0, 0, [], [], math.nan)
    text = Page(report.to_html()).text
    assert "No layers." in text
    assert "Nothing: every channel could go." in text
    assert "Not recorded." in text
    assert "strengths of this model were not recorded" in text


def test_layers_without_strengths_are_left_out_of_that_figure_only() -> None:
    report = example(layers=0)
    report = replace(report, layers=[layer("known"), layer("unknown", strength=())])
    html = report.to_html()
    assert html.count('"known: weakest') == 1
    assert "unknown: weakest" not in html
    assert "unknown: 32 output channels" in html


def widths(html: str, kind: str) -> list[float]:
    return [float(found) for found in re.findall(rf'<rect class="{kind}" x="0" [^>]*width="([\d.]+)%"', html)]


def test_bars_are_as_long_as_the_numbers() -> None:
    layers = [layer("a"), layer("b", outputs_before=64, outputs_after=16, share_cut=0.75)]
    html = replace(example(), layers=layers).to_html()
    assert widths(html, "dense") == [50.0, 100.0]
    assert widths(html, "pruned") == [31.25, 25.0]
    assert widths(html, "cut") == [68.75, 75.0]


def test_a_wide_whole_layer_does_not_squeeze_the_others() -> None:
    layers = [layer("a"), layer("fc", outputs_before=1000, outputs_after=1000)]
    html = replace(example(), layers=layers).to_html()
    assert widths(html, "dense") == [100.0, 100.0]
    assert html.count('class="gap"') == 1
    assert "A bar with a gap is wider than the scale." in html


def test_log_scale_covers_the_values_in_whole_decades() -> None:
    scale = LogScale([0.02, 3.0])
    assert (scale.low, scale.high) == (-2, 1)
    assert [round(scale.at(value), 6) for value in (0.01, 0.1, 1, 10)] == [0, 0.333333, 0.666667, 1]
    assert [label for _, label in scale.ticks()] == ["10¹", "10⁰", "10⁻¹", "10⁻²"]


def test_log_scale_holds_out_against_extremes() -> None:
    scale = LogScale([1e-300, 1.0])
    assert scale.high - scale.low == 8
    assert scale.at(0.0) == scale.at(1e-300) == 0.0
    one = LogScale([0.5])
    assert 0.0 <= one.at(0.5) <= 1.0
    assert len({label for _, label in one.ticks()}) == len(one.ticks()) >= 2
    exact = LogScale([1.0, 1.0])
    assert exact.high > exact.low


def test_a_violin_is_as_high_as_synapses_are_many() -> None:
    """Half of the synapses in the lowest tenth of the axis, the other half spread over the rest."""
    positions = [0.2 * level if level <= 0.5 else 0.1 + 1.8 * (level - 0.5) for level in QUANTILES]
    heights = density(positions)
    assert max(heights) == 1.0
    assert heights[2] == pytest.approx(1.0, abs=0.01)
    assert heights[30] == pytest.approx(1 / 9, abs=0.01)


def test_a_violin_of_equal_strengths_is_a_spike() -> None:
    heights = density([0.5] * len(QUANTILES))
    assert [n for n, height in enumerate(heights) if height] == [
        28,
        29,
        30,
    ]  # the last bin that it touches, smoothed


@given(st.lists(st.floats(0, 1), min_size=len(QUANTILES), max_size=len(QUANTILES)))
def test_densities_stay_between_none_and_the_highest(positions: list[float]) -> None:
    heights = density(sorted(positions))
    assert max(heights) == 1.0
    assert min(heights) >= 0.0


def test_the_violin_of_a_model_agrees_with_its_strengths() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 40, 3), nn.Flatten()
    )
    nn.init.uniform_(net[1].weight)
    x = torch.zeros(1, 3, 8, 8)
    strengths = synaptic_strength(net, x)["3"].flatten()
    report = prune_(net, x, ratio=0.2)
    recorded = report.layers[1].strength
    assert recorded == pytest.approx(torch.quantile(strengths, torch.tensor(QUANTILES)).tolist(), rel=1e-4)
    assert "not recorded" not in report.to_html()


@given(st.lists(st.floats(min_value=1e-30, max_value=1e30), min_size=len(QUANTILES), max_size=len(QUANTILES)))
def test_boxes_stay_inside_whatever_the_strengths(values: list[float]) -> None:
    html = replace(example(), layers=[layer(strength=tuple(sorted(values)))]).to_html()
    positions = [float(found) for found in re.findall(r'(?:x1|x2|cx|width|x)="([\d.]+)%"', html)]
    assert all(0 <= position <= 100 for position in positions)


def test_strengths_that_are_all_zero_or_infinite_do_not_break_the_page() -> None:
    report = replace(example(), layers=[layer(strength=(0.0,) * len(QUANTILES))])
    assert "strengths of this model were not recorded" in report.to_html()
    report = replace(example(), layers=[layer(strength=(*STRENGTH[:-1], math.inf))])
    Page(report.to_html())


def test_the_verdict_says_that_weights_were_compensated_afterwards() -> None:
    report = Report("net", 2, 1, 2, 1, [], [], 0.0, settings={"compensation": "linear"})
    assert report.verification().endswith("Then the remaining weights were compensated (linear).")


# ---------------------------------------------------------------- how certain


def test_certainty_tells_of_each_number_how_it_was_come_by() -> None:
    said = dict(certainty(example()))
    # sqrt(0.93391 * 0.06609 / 10000) and sqrt(0.912 * 0.088 / 10000), in points
    assert "10,000 images" in said["top-1"]
    assert "0.25 points (dense) and 0.28 points (pruned)" in said["top-1"]
    assert "3.1e-07 of the largest output" in said["cut equals masked"]
    assert said["compensation"].startswith("None")
    assert "100 %" in said["strengths"]
    assert all(words in Page(example().to_html()).text for words in said.values())


NOISY = {"latency_before": 0.05, "latency_after": 0.0495, "latency_ratio": 0.99, "latency_spread": (0.9, 1.1)}


def test_a_latency_that_may_be_more_or_less_is_too_noisy_to_tell() -> None:
    noisy, clear = example(**NOISY), example(**{**NOISY, "latency_spread": (0.98, 0.999)})
    rows = {row[0].partition(" (")[0]: row[1:] for row in noisy.headline()}
    assert rows["latency"] == ("50 ms", "49.5 ms", "too noisy to tell")
    assert {row[0].partition(" (")[0]: row[3] for row in clear.headline()}["latency"] == "99.0 %"
    assert Page(noisy.to_html()).text.count("too noisy to tell") == 2  # the row, and how certain it is
    assert "too noisy to tell" not in Page(clear.to_html()).text
    assert Report.from_dict(noisy.to_dict()).too_noisy
    assert not Report.from_dict(clear.to_dict()).too_noisy


@pytest.mark.parametrize("calibration", [None, "synthetic"])
def test_certainty_of_means_on_noise_tells_what_would_be_better(calibration: str | None) -> None:
    model = digits_resnet().eval()
    report = prune_(model, torch.zeros(1, 1, 8, 8), macs=0.7, compensation="mean", calibration=calibration)
    said = dict(certainty(report))["compensation"]
    assert ("'synthetic' makes" in said) is (calibration is None)


def test_certainty_of_a_latency_tells_of_its_spread_and_what_it_holds_for() -> None:
    assert "latency" not in dict(certainty(example()))
    timed = example(latency_before=0.05, latency_after=0.03, latency_ratio=0.6, latency_spread=(0.58, 0.611))
    said = dict(certainty(timed))["latency"]
    assert "median over the turns" in said
    assert "between 58.0 % and 61.1 %" in said
    assert "inputs that were given" in said
    assert said in Page(timed.to_html()).text
    assert Report.from_dict(json.loads(timed.to_json())) == timed
    batch = replace(timed, settings={"batch": 8}, latency_spread=None)
    assert "a batch of 8," in dict(certainty(batch))["latency"]
    assert "between" not in dict(certainty(batch))["latency"]


def test_it_says_that_norms_were_moved() -> None:
    sentence = "Batch norms behind the cut follow what is left."
    for method in ("none", "mean"):
        left = example(settings={"compensation": method})
        moved = replace(left, settings={"compensation": method, "recalibrate": True})
        assert sentence in dict(certainty(moved))["compensation"]
        assert sentence in moved.verification()
        assert sentence not in dict(certainty(left))["compensation"] + left.verification()
    assert "computes what the masked one does" not in dict(certainty(moved))["compensation"]


def test_certainty_does_not_claim_what_was_not_done() -> None:
    bare = example(accuracy_after=None, max_error=math.inf, layers=0, settings={"compensation": "mean"})
    said = dict(certainty(bare))
    assert said["top-1"].startswith("Not measured")
    assert said["cut equals masked"] == "Not verified."
    assert said["strengths"] == "Not recorded."
    assert "after the check" in said["compensation"]
    assert "not recorded" in dict(certainty(example(images=None)))["top-1"]


class Casts(nn.Module):
    """Runs in single precision only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x.float()).relu()).relu().mean((2, 3)).float())


def test_the_precision_that_is_told_is_that_of_the_check() -> None:
    with pytest.raises(RuntimeError, match=r"dtype|type"):
        Casts().double()(torch.rand(1, 3, 8, 8).double())
    for model, channels, precision in ((Casts(), 3, "the model's own"), (digits_resnet(), 1, "float64")):
        report = prune_(model.eval(), torch.rand(2, channels, 8, 8), ratio=0.4)
        said = dict(certainty(report))["cut equals masked"]
        assert report.precision == precision
        assert ("double" in said) is (precision == "float64") is ("own" not in report.verification())
        assert "own" in said or precision == "float64"
        assert Report.from_dict(json.loads(report.to_json())) == report


def test_norms_that_were_moved_in_vain_are_not_called_none() -> None:
    moved = example(settings={"compensation": "none", "recalibrate": True}, compensation_dropped=True)
    assert "than with recalibration, which" in moved.verification()
    assert dict(certainty(moved))["compensation"].startswith("None: recalibration was tried")
    folded = replace(moved, settings={"compensation": "mean", "recalibrate": True})
    assert "than with mean, which" in folded.verification()


def test_multiply_accumulates_are_of_all_inputs_in_the_batch() -> None:
    one, three = (prune_(digits_resnet().eval(), torch.rand(n, 1, 8, 8), ratio=0.3) for n in (1, 3))
    assert three.macs_before == 3 * one.macs_before
    assert "one input" not in dict(certainty(three))["multiply-accumulates"]


def test_certainty_names_the_layers_that_are_wrong_at_the_border_and_the_variances() -> None:
    settings = {"compensation": "linear", "statistics": "gaussian"}
    said = dict(certainty(example(settings=settings, inexact_layers=["a", "b"])))
    assert said["compensation"].endswith("At zero-padded borders it is inexact in a, b.")
    skipped = example(settings={"compensation": "mean"}, not_compensated={"aux": "it sleeps"})
    assert dict(certainty(skipped))["compensation"].endswith("Not compensated: aux: it sleeps.")
    assert "its own noise" in said["strengths"]
    assert "shrinking it" not in said["strengths"]
    measured = dict(certainty(example(settings={"scope": "sensitivity"})))
    assert "shrinking it, measured on calibration inputs." in measured["strengths"]
    failed = dict(certainty(example(sensitivity_not_measured="it takes one image.")))
    assert failed["strengths"].endswith("no output error was measured: it takes one image.")


# ---------------------------------------------------------------- contrast


def luminance(colour: str) -> float:
    digits = colour.lstrip("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    channels = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    """By WCAG 2: 1 for the same colour, 21 for black on white."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", range(3), ids=["light", "dark", "print"])
def test_text_and_figures_stand_out_from_the_paper(scheme: int) -> None:
    assert contrast("#000", "#fff") == pytest.approx(21)
    style = resources.files("ss_pruning.report").joinpath("templates/style.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", style, flags=re.DOTALL)
    colours = dict(re.findall(r"--(\w+): (#\w+)", blocks[scheme]))
    for name in ("ink", "muted", "link", "good"):  # text
        assert contrast(colours[name], colours["paper"]) >= 4.5, name
    for name in ("dense", "pruned", "cut"):  # figures
        assert contrast(colours[name], colours["paper"]) >= 3, name
    assert contrast(colours["ink"], colours["raised"]) >= 4.5


@pytest.mark.parametrize("value", [None, -1, "x", "1", [], {}, [1], [[1]], {"a": "b"}, True, 1e308])
def test_reports_with_any_field_of_another_type_are_refused_or_render(value: Any) -> None:
    """No field of a file that somebody else wrote may end in a traceback."""
    whole = example(**NOISY, settings={"batch": 8}, model_sha256="0" * 64).to_dict()
    places = [(whole, key) for key in whole]
    places += [(whole[name][0], key) for name in ("layers", "excluded") for key in whole[name][0]]
    for record, key in places:
        before, record[key] = record[key], value
        try:
            report = Report.from_dict(json.loads(json.dumps(whole)))
        except FileFormatError:
            pass
        else:
            assert "<table" in report.to_html()
            report.table()
        record[key] = before
    assert Report.from_dict(whole).to_html()


def test_the_test_of_types_can_fail() -> None:
    with pytest.raises(FileFormatError, match="the report is damaged: macs_after is 'x', not int"):
        Report.from_dict({**example().to_dict(), "macs_after": "x"})


def test_a_table_without_rich_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(InputError, match=r"pip install 'ss-pruning\[cli\]'"):
        example().table()
    assert str(example())
