"""SVG charts: points where the axes say, no surprise from odd numbers."""

import re

import numpy as np
import pytest

from mmrjax.report import charts, pictures


def points_of(svg, css):
    data = re.search(rf'class="line {css}" d="M([^"]*)"', svg).group(1)
    return np.array([[float(v) for v in point.split()] for point in data.split("L")])


def test_line_chart_places_points_on_its_axes_and_cuts_at_the_limit():
    line = charts.Line("a<b", [0.0, 0.2, 0.4], [0.0, 0.6, 0.8], "s0")
    svg = str(charts.line_chart([line], "t", "x", "y", (0, 0.3), (0, 1)))
    places = points_of(svg, "s0")
    right, bottom = charts.WIDTH - charts.RIGHT, charts.PLOT_HEIGHT - charts.BOTTOM
    wanted_y = bottom - (bottom - charts.TOP) * np.array([0.0, 0.6, 0.7])
    np.testing.assert_allclose(places[[0, -1], 0], [charts.LEFT, right], atol=0.06)
    np.testing.assert_allclose(places[:, 1], wanted_y, atol=0.06)
    assert "a&lt;b" in svg


def test_charts_survive_points_that_are_not_numbers():
    line = charts.Line("a", [0, 1, 2, 3], [float("nan"), -1.0, 2.0, None], "s0")
    svg = str(charts.line_chart([line], "t", "x", "y", log_y=True))
    assert "nan" not in svg
    assert "<circle" in svg, "the one good point is a dot"
    empty = str(charts.line_chart([charts.Line("a", [], [], "s0")], "t", "x", "y"))
    assert empty.startswith("<svg")
    constant = np.zeros(5)
    assert "nan" not in str(charts.histogram_chart([("d", constant, constant[:0])], "t", "x"))


def test_long_curves_are_thinned_but_keep_their_ends():
    x = np.linspace(0, 1, 5000)
    svg = str(charts.line_chart([charts.Line("a", x, x, "s0")], "t", "x", "y", (0, 1), (0, 1)))
    places = points_of(svg, "s0")
    assert len(places) <= charts.MAX_POINTS
    assert places[0, 0] == charts.LEFT
    assert places[-1, 0] == charts.WIDTH - charts.RIGHT


@pytest.mark.parametrize(
    ("low", "high", "log", "wanted"),
    [
        (0, 1, False, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (47.0, 103.0, False, [60, 80, 100]),
        (0.3, 3.1, True, [0.5, 1, 2]),
        (0.001, 20, True, [0.001, 0.01, 0.1, 1, 10]),
    ],
)
def test_ticks_are_round_numbers_inside_the_axis(low, high, log, wanted):
    assert charts.Axis(low, high, 0, 1, log).ticks() == pytest.approx(wanted)


def test_colour_bar_shows_the_colours_of_the_overlay():
    svg = str(charts.colour_bar((0.5, 2.0)))
    colours, opacity = pictures.colour_and_opacity(np.array([0.0, 1.0]))
    fills = re.findall(r'fill="(#\w{6})" fill-opacity="([\d.]+)"', svg)
    assert fills[0] == ("#" + bytes(colours[0]).hex(), f"{opacity[0]:.2f}")
    assert fills[-1] == ("#" + bytes(colours[1]).hex(), f"{opacity[1]:.2f}")
    assert ">0.5<" in svg
    assert ">2<" in svg
