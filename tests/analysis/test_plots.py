"""Plots: the drawn coordinates are the data's, colours follow the page, long series are thinned without bias."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from megatron_srft.analysis.plots import MAX_POINTS, Panel, draw, running_mean, thin


def polylines(svg: str) -> dict[str, np.ndarray]:
    """CSS colour -> [points, 2] coordinates of the last line drawn in it."""
    found = {}
    for path in ElementTree.fromstring(svg).iter("path"):
        colour = re.search(r"stroke: var\(--(c\d)\)", path.get("style", ""))
        points = re.findall(r"[ML] (\S+) (\S+)", path.get("d", ""))
        if colour and len(points) > 2:
            found[colour[1]] = np.array(points, dtype=float)
    return found


def test_lines_are_the_data_up_to_one_scale_per_axis():
    """x and -y of the drawing are affine in (step, value), with the same map for both lines."""
    rng = np.random.default_rng(0)
    lines = {name: [(step, float(rng.normal())) for step in range(0, 40, 2)] for name in ("a", "b")}
    drawn = polylines(draw(Panel(title="t", unit="u", lines=lines), 40, []))
    assert set(drawn) == {"c0", "c1"}
    data = np.array(lines["a"] + lines["b"])
    pixels = np.concatenate([drawn["c0"], drawn["c1"]])
    for axis, sign in ((0, 1), (1, -1)):
        slope, offset = np.polyfit(data[:, axis], pixels[:, axis], 1)
        assert slope * sign > 0
        np.testing.assert_allclose(slope * data[:, axis] + offset, pixels[:, axis], atol=1e-3)


@pytest.mark.parametrize("kind", ["lines", "exact", "log", "stacked"])
def test_an_svg_is_well_formed_self_contained_and_has_no_colour_of_its_own(kind):
    lines = {"a_b/$x^2$": [(0, 0.0), (1, 1.0)], "<b>": [(0, 2.0)], "_hidden": []}
    svg = draw(Panel(title="T <i>", unit="$u$ & v", lines=lines, kind=kind), 3, [(0, "sft"), (2, "<grpo>")])
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg" and root.get("aria-label") == "T <i>: a_b/$x^2$, <b>, _hidden"
    assert "http" not in svg and "<style" not in svg and "<script" not in svg
    assert set(re.findall(r"#[0-9a-f]{6}", svg)) == set()
    texts = {"".join(text.itertext()).strip() for text in root.iter("text")}
    assert {"step", "$u$ & v", "sft", "<grpo>"} <= texts
    references = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    assert references <= {node.get("id") for node in root.iter()}


def test_a_log_axis_leaves_out_values_it_cannot_show():
    lines = {"a": [(0, 1e-6), (1, 0.0), (2, 1e-3), (3, 1.0)]}
    points = polylines(draw(Panel(title="t", unit="u", lines=lines, kind="log"), 3, []))["c0"]
    assert len(points) == 3
    np.testing.assert_allclose(np.diff(points[:, 1])[0], np.diff(points[:, 1])[1], atol=1e-3)  # equal decades


def test_thinning_keeps_the_mean_and_the_order():
    rng = np.random.default_rng(1)
    series = [(step, float(value)) for step, value in enumerate(rng.normal(size=MAX_POINTS * 4))]
    thinned = thin(series)
    assert len(thinned) <= MAX_POINTS and thin(series[:MAX_POINTS]) == series[:MAX_POINTS]
    assert np.mean([v for _, v in thinned]) == pytest.approx(np.mean([v for _, v in series]))
    assert [step for step, _ in thinned] == sorted(step for step, _ in thinned)


def test_running_mean_of_a_line_is_the_line():
    values = [0.5 * i for i in range(20)]
    assert running_mean(values, 5)[2:-2] == pytest.approx(values[2:-2])
    assert running_mean(values, 5)[0] == pytest.approx(np.mean(values[:3]))
