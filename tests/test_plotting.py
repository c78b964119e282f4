"""Figures are opaque, shown once, and can be read by a colour-blind reader."""

import io
import itertools

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb, to_rgba

from gradclip import plotting


@pytest.fixture(autouse=True)
def _book_style():
    with mpl.rc_context():
        mpl.use("Agg")
        plotting.use_style()
        yield


def _pixels(fig, **kw):
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", **kw)
    buffer.seek(0)
    return plt.imread(buffer, format="png")


# Machado, Oliveira and Fernandes (2009), severity 1, acting on linear RGB.
_VISION = {
    "normal": np.eye(3),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
}


def _linear(rgb):
    rgb = np.asarray(rgb)
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def _lab(linear_rgb):
    to_xyz = np.array(
        [[0.412456, 0.357576, 0.180437], [0.212673, 0.715152, 0.072175], [0.019334, 0.119192, 0.950304]]
    )
    xyz = to_xyz @ np.clip(linear_rgb, 0, 1) / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", sorted(_VISION))
def test_palette_colours_stay_apart_for_every_reader(vision):
    # A difference of 2.3 in CIE Lab is just noticeable side by side; five times that can be told apart.
    lab = [_lab(_VISION[vision] @ _linear(to_rgb(entry["color"]))) for entry in plotting.PALETTE]
    distance = min(np.linalg.norm(a - b) for a, b in itertools.combinations(lab, 2))
    assert distance > 5 * 2.3


def test_palette_has_a_second_and_a_third_cue():
    markers = {entry["marker"] for entry in plotting.PALETTE}
    lines = {str(entry["linestyle"]) for entry in plotting.PALETTE}
    assert len(markers) == len(lines) == len(plotting.PALETTE)


def test_colours_are_dark_enough_for_white_paper():
    # WCAG's contrast ratio against white, (1 + 0.05) / (Y + 0.05). Graphics ask for 3; the two light colours
    # of Okabe and Ito miss it and come late, where the marker carries the difference. Text asks for 4.5.
    def contrast(color):
        return 1.05 / (np.array([0.2126, 0.7152, 0.0722]) @ _linear(to_rgb(color)) + 0.05)

    assert min(contrast(entry["color"]) for entry in plotting.PALETTE[:4]) > 2.9
    assert contrast(plotting.GREY) > 4.5
    late = plotting.iteration_cmap()(1.0)[:3]
    assert contrast(late) > 1.8


def test_iteration_colours_are_ordered_by_lightness():
    # Strictly increasing lightness is what a grey print keeps; 64 samples, so no plateau hides.
    lightness = [_lab(_linear(rgba[:3]))[0] for rgba in plotting.iteration_cmap()(np.linspace(0, 1, 64))]
    assert np.all(np.diff(lightness) > 0)


def test_style_returns_a_copy():
    plotting.style(0)["color"] = "red"
    assert plotting.style(0)["color"] == plotting.PALETTE[0]["color"]


@pytest.mark.parametrize("i", [-1, len(plotting.PALETTE)])
def test_style_names_the_index_it_does_not_have(i):
    with pytest.raises(ValueError, match=f"got {i}$"):
        plotting.style(i)


def test_every_saved_pixel_is_opaque():
    fig, axes = plotting.figure(1, 2, width="wide", height=2)
    axes[0].plot([1, 2], [1, 2], **plotting.style(0))
    for kw in ({}, {"bbox_inches": "tight"}):
        image = _pixels(fig, dpi=40, **kw)
        assert image.shape[-1] == 3 or np.all(image[..., 3] == 1)
        assert np.all(image[0, 0, :3] == 1)


def test_figure_is_opaque_even_under_a_dark_user_style():
    plt.style.use("dark_background")
    fig, ax = plotting.figure()
    assert fig.get_facecolor() == to_rgba("white") == ax.get_facecolor()


def test_figure_is_not_in_the_registry_that_the_inline_backend_displays():
    before = plt.get_fignums()
    figures = [plotting.figure()[0] for _ in range(25)]  # 20 open figures would warn, an error here
    assert plt.get_fignums() == before
    assert all(_pixels(fig, dpi=20).size for fig in figures[:1])


def test_figure_is_sharp_and_fits_the_column():
    for width, inches in (("text", 7.0), ("wide", 8.5)):
        fig, _ = plotting.figure(width=width)
        assert fig.get_figwidth() == inches
        assert fig.dpi * inches >= 1.5 * 700  # at least 1.5 dots for each pixel of the column


def test_figure_passes_options_on():
    fig, axes = plotting.figure(2, 2, height=3.5, sharex=True)
    assert axes.shape == (2, 2)
    assert fig.get_figheight() == 3.5
    assert axes[0, 0].get_shared_x_axes().joined(axes[0, 0], axes[1, 1])


def test_figure_rejects_what_it_does_not_know():
    with pytest.raises(ValueError, match="got 'huge'"):
        plotting.figure(width="huge")
    with pytest.raises(ValueError, match="height must be positive, got 0"):
        plotting.figure(height=0)


def test_no_top_or_right_spine():
    _, ax = plotting.figure()
    assert not ax.spines["top"].get_visible()
    assert not ax.spines["right"].get_visible()


def test_scatter_keeps_every_point_with_its_own_iteration():
    fig, ax = plotting.figure()
    x, y, iteration = np.array([1.0, 10.0, 100.0]), np.array([3.0, 2.0, 1.0]), np.array([5, 0, 9])
    points = plotting.scatter_by_iteration(ax, x, y, iteration)
    drawn = sorted((*xy, k) for xy, k in zip(points.get_offsets().tolist(), points.get_array(), strict=True))
    assert drawn == [(1.0, 3.0, 5), (10.0, 2.0, 0), (100.0, 1.0, 9)]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert [a.get_ylabel() for a in fig.axes] == ["", "iteration"]
    assert points.get_array()[-1] == 0  # the first iteration is drawn last, on top
    assert _pixels(fig, dpi=30).size


def test_scatter_without_a_colour_bar():
    fig, ax = plotting.figure()
    plotting.scatter_by_iteration(ax, [1.0], [1.0], [0], colorbar=False)
    assert fig.axes == [ax]


@pytest.mark.parametrize("bad", [0.0, -2.0, np.nan, np.inf])
@pytest.mark.parametrize("name", ["x", "y"])
def test_scatter_refuses_what_a_log_axis_would_drop(bad, name):
    _, ax = plotting.figure()
    data = {"x": [1.0, 2.0, 3.0], "y": [1.0, 2.0, 3.0]}
    data[name][1] = bad
    with pytest.raises(ValueError, match=f"^{name} must be positive and finite .* got {bad} at index 1$"):
        plotting.scatter_by_iteration(ax, data["x"], data["y"], [0, 1, 2])


@pytest.mark.parametrize(
    ("x", "message"), [([1.0, 2.0], r"one length, got \(2,\), \(1,\), \(1,\)"), ([[1.0]], r"got \(1, 1\)")]
)
def test_scatter_refuses_unequal_lengths(x, message):
    _, ax = plotting.figure()
    with pytest.raises(ValueError, match=message):
        plotting.scatter_by_iteration(ax, x, [1.0], [0])


def test_scatter_refuses_no_points():
    _, ax = plotting.figure()
    with pytest.raises(ValueError, match="got 0"):
        plotting.scatter_by_iteration(ax, [], [], [])


def test_plain_numbers_label_a_decade_without_powers_of_ten():
    fig, ax = plotting.figure()
    ax.loglog([0.3, 4.0], [20.0, 900.0])
    plotting.plain_numbers(ax)
    fig.canvas.draw()
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert {"0.5", "1", "2"} <= set(labels)
    assert {"50", "100", "200", "500"} <= {label.get_text() for label in ax.get_yticklabels()}
    assert not any(label.get_text() for label in ax.get_xticklabels(minor=True))


def test_plain_numbers_leave_a_linear_axis_alone():
    _, ax = plotting.figure()
    ax.semilogy([0, 1], [1.0, 3.0])
    locator = ax.xaxis.get_major_locator()
    plotting.plain_numbers(ax)
    assert ax.xaxis.get_major_locator() is locator


def test_label_stands_beside_its_point():
    fig, ax = plotting.figure()
    label = plotting.label_point(ax, 0.5, 0.5, "here", dx=10, dy=0, va="center")
    fig.draw_without_rendering()
    point = ax.transData.transform((0.5, 0.5))
    # 10 printer's points are 10/72 in; matplotlib pads a text's box by less than a pixel.
    assert label.get_window_extent().x0 - point[0] == pytest.approx(10 / 72 * fig.dpi, abs=2.5)
