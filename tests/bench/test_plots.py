"""Plots are files that programs can open."""

from __future__ import annotations

import importlib.util
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from matplotlib.image import imread

from flashmoe.bench.plots import check_plot, plot_decode
from tests.support.commands import Run, assert_one_line
from tests.support.passes import made_report


def assert_picture(path: Path, least_width: int) -> None:
    if path.suffix == ".png":
        height, width, channels = imread(path).shape
        assert width >= least_width and height > 300 and channels == 4
        assert imread(path).std() > 0.05
    else:
        root = ElementTree.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 50


@pytest.mark.parametrize("name", ["plot.png", "plot.SVG"])
def test_points(tmp_path: Path, name: str) -> None:
    check_plot(tmp_path / name)
    plot_decode(made_report(), tmp_path / name)
    assert_picture(tmp_path / name, 1000)


def test_what_cannot_be_drawn(
    tmp_path: Path, demo_store: Path, run_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, *words: str) -> None:
        assert_one_line(run_cli("bench", "decode", demo_store, "--plot", path), 2, *words)

    refused(tmp_path / "plot.pdf", ".png or .svg", "plot.pdf")
    refused(tmp_path / "nowhere" / "plot.png", "nowhere")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    refused(tmp_path / "plot.png", "pip install matplotlib")
