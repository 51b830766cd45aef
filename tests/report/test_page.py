"""The page of a report in a browser: what it shows, what it does, and that nothing can run in it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import MEMORY, Models, recipe_of

import streammerge
from streammerge.cli.arguments import main
from streammerge.errors import DependencyError
from streammerge.report import drawing
from streammerge.report.document import Report
from streammerge.report.page import render_page

vl_convert = pytest.importorskip("vl_convert", reason="pip install 'streammerge[report]'")

HOSTILE = (
    "</script><script>window.hurt=1</script>",
    "<img src=x onerror=window.hurt=1>",
    "&lt;b&gt;\"'`${window.hurt=1}",
    "a" * 3000,
    "\u202egnitirw\u202c",
    "javascript:window.hurt=1",
    "<!--",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser without a window; skips where there is none, see scripts/test."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no chromium on PATH: apt-get install chromium")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


class Opened:
    """A page in a browser, and what it said and asked for."""

    def __init__(
        self, browser: Any, path: Path, *, width: int = 1200, scheme: str = "light"
    ) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme
        )
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_function("document.documentElement.dataset.ready === 'yes'")

    def count(self, selector: str) -> int:
        return int(self.page.locator(selector).count())


def make_report(models: Models, *, layers: int = 4, sources: int = 3) -> Report:
    generator = torch.Generator().manual_seed(5)

    def draw() -> dict[str, torch.Tensor]:
        return {
            f"model.layers.{layer}.{module}.weight": torch.randn(32, 16, generator=generator)
            for layer in range(layers)
            for module in ("mlp", "attention")
        } | {"model.embed.weight": torch.randn(50, 16, generator=generator)}

    recipe = recipe_of(
        "ties",
        models.write(draw()),
        [models.write(draw()) for _ in range(sources)],
        parameters={"density": 0.3},
        rules=[{"tensors": "model.embed.weight", "copy": "base"}],
    )
    return streammerge.analyze(recipe, memory=MEMORY)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return make_report(Models(tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def path(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    written = tmp_path_factory.mktemp("page") / "page.html"
    written.write_text(render_page(report), encoding="utf-8")
    return written


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 900, 1400])
def test_a_page_opens_at_any_width_without_a_word_or_a_request(
    width: int, scheme: str, browser: Any, path: Path
) -> None:
    opened = Opened(browser, path, width=width, scheme=scheme)

    assert opened.said == []
    assert opened.asked == [path.as_uri()]
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    paper = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(21, 24, 28)")


def test_charts_have_their_data(browser: Any, path: Path) -> None:
    opened = Opened(browser, path)

    marks = "[class*='role-mark']"
    # Four layers with two modules; a line and a point per layer for each of three sources; a matrix.
    assert opened.count(f"#map {marks}.mark-rect path") == 4 * 2
    assert opened.count(f"#curve {marks}.mark-line path") == 3
    assert opened.count(f"#curve {marks}.mark-symbol path") == 4 * 3
    assert opened.count(f"#cosines {marks}.mark-rect path") == 9
    assert opened.count(f"#histogram {marks}.mark-line path") == 3
    # The largest and the smallest threshold of each source.
    assert opened.count(f"#histogram {marks}.mark-rule line") == 6


def test_another_number_draws_another_map(browser: Any, path: Path) -> None:
    opened = Opened(browser, path)
    before = opened.page.locator("#map").inner_html()

    opened.page.select_option("#map-number", "cosine.0.2")
    opened.page.wait_for_function(
        "document.querySelector('#map svg').getAttribute('aria-label') === null "
        "|| document.querySelector('#map').innerHTML.includes('cosine')"
    )

    assert opened.page.locator("#map").inner_html() != before
    assert opened.said == []


def test_hovering_tells_a_cell_s_numbers(browser: Any, path: Path) -> None:
    opened = Opened(browser, path)

    opened.page.locator("#map .mark-rect path").first.hover()

    tip = opened.page.locator("#vg-tooltip-element.visible")
    tip.wait_for()
    assert re.search(r"model\.layers\.\d", tip.inner_text())


def _first_column(opened: Opened, column: int) -> list[str]:
    return list(opened.page.locator(f"#table tbody tr > :nth-child({column})").all_inner_texts())


def test_the_table_sorts_both_ways_with_the_keyboard_alone(browser: Any, path: Path) -> None:
    opened = Opened(browser, path)
    heads = opened.page.locator("#table thead button").all_inner_texts()
    column = heads.index("conflicts") + 1
    opened.page.locator("#table thead button", has_text=re.compile("^conflicts")).focus()

    opened.page.keyboard.press("Enter")
    down = [float(each) for each in _first_column(opened, column)]
    opened.page.keyboard.press("Enter")
    up = [float(each) for each in _first_column(opened, column)]

    assert down == sorted(down, reverse=True)
    assert up == sorted(up)
    sorts = opened.page.locator("#table th[aria-sort=ascending]").all_inner_texts()
    assert sorts == ["conflicts ↑"]


def test_the_table_filters_by_name(browser: Any, path: Path) -> None:
    opened = Opened(browser, path)

    opened.page.fill("#filter", "layers.2")

    names = _first_column(opened, 1)
    assert names == [
        "model.layers.2.attention.weight",
        "model.layers.2.mlp.weight",
    ]
    assert "2 of 2" in opened.page.locator("#count").inner_text()


def test_what_was_copied_is_shown_with_its_reason(browser: Any, path: Path) -> None:
    opened = Opened(browser, path)

    assert "rules[0] says copy: base" in opened.page.locator("#copied").inner_text()


def test_a_comparison_shows_what_is_equal_and_what_only_some_have(
    browser: Any, models: Models, tmp_path: Path
) -> None:
    one, other = {"a": torch.ones(4), "b": torch.ones(2)}, {"a": torch.ones(4), "c": torch.ones(3)}
    report = streammerge.diff([models.write(one), models.write(other)], memory=MEMORY)
    path = tmp_path / "diff.html"
    path.write_text(streammerge.render_page(report), encoding="utf-8")

    opened = Opened(browser, path)

    shown = opened.page.locator("#copied").inner_text()
    assert "1 tensors are identical, 0 changed" in shown
    assert "models[0]" in shown
    assert opened.said == []
    assert opened.page.locator("#recipe").is_hidden()


def test_hostile_names_are_text(report: Report, browser: Any, tmp_path: Path) -> None:
    document = json.loads(report.as_json())
    tensors = document["tables"]["tensors"]
    for at, name in enumerate(HOSTILE):
        tensors["name"][at] = name
        document["copied"]["name"].append(name)
        document["copied"]["action"].append(name)
        document["copied"]["numel"].append(1)
        document["copied"]["reason"].append(name)
    for table in ("layers", "cells"):
        document["tables"][table]["layer"][1] = HOSTILE[0]
        document["tables"][table]["layer"][2] = HOSTILE[1]
    document["tables"]["cells"]["module"][0] = HOSTILE[1]
    document["tables"]["modules"]["module"][0] = HOSTILE[1]
    for source, name in zip(document["sources"], HOSTILE[:3], strict=True):
        source["path"] = source["adapter"] = name
    document["method"] = document["recipe"] = document["base"] = HOSTILE[0]
    document["notes"] = document["dropped"] = list(HOSTILE)
    document["advice"] = [{"kind": "x", "number": 1.0, "text": each} for each in HOSTILE]
    path = tmp_path / "hostile.html"
    path.write_text(render_page(Report(document)), encoding="utf-8")

    opened = Opened(browser, path, width=390)

    assert opened.page.evaluate("window.hurt") is None
    assert opened.said == []
    assert opened.asked == [path.as_uri()]
    assert opened.count("img") == 0
    assert HOSTILE[0] in opened.page.locator("#table").inner_text()
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 390
    opened.page.locator("#map .mark-rect path").first.hover()
    opened.page.locator("#vg-tooltip-element.visible").wait_for()
    assert opened.page.evaluate("window.hurt") is None
    assert opened.count("img") == 0


def test_a_page_of_eighty_layers_is_below_three_megabytes(models: Models) -> None:
    report = make_report(models, layers=80, sources=4)
    document = json.loads(report.as_json())
    tensors = document["tables"]["tensors"]
    # As many kinds of modules as such models have: nine.
    for name, column in tensors.items():
        tensors[name] = (column * 5)[:720]

    page = render_page(Report(document))

    assert len(page.encode()) < 3_000_000


def test_fifty_thousand_tensors_are_shown_by_and_by(
    report: Report, browser: Any, tmp_path: Path
) -> None:
    document = json.loads(report.as_json())
    tensors = document["tables"]["tensors"]
    times = 50_000 // len(tensors["name"]) + 1
    for name, column in tensors.items():
        tensors[name] = (column * times)[:50_000]
    tensors["name"] = [f"{name}.{at}" for at, name in enumerate(tensors["name"])]
    path = tmp_path / "many.html"
    path.write_text(render_page(Report(document)), encoding="utf-8")

    opened = Opened(browser, path)

    assert opened.page.locator("#count").inner_text() == "200 of 50,000 tensors"
    opened.page.fill("#filter", ".49999")
    assert opened.page.locator("#count").inner_text() == "1 of 1 tensors"


def test_a_merge_writes_its_report_and_vouches_for_it(models: Models) -> None:
    base = {"layer.0.w": torch.randn(8, 8)}
    recipe = recipe_of("linear", None, [models.write(base), models.write(base)])
    out = models.new_output()

    manifest = streammerge.merge(recipe, out, memory=MEMORY, report=True)

    assert {"streammerge_report.json", "streammerge_report.html"} <= set(manifest.files)
    assert not streammerge.verify_files(out).damages
    assert streammerge.read_report(out).document["kind"] == "merge"
    assert (out / "streammerge_report.html").read_text().startswith("<!doctype html>")


def test_a_merge_to_one_file_has_its_report_beside_it(models: Models) -> None:
    base = {"w": torch.randn(8, 8)}
    recipe = recipe_of("linear", None, [models.write(base), models.write(base)])
    out = models.root / "one.safetensors"

    streammerge.merge(recipe, out, memory=MEMORY, report=True)

    beside = sorted(path.name for path in models.root.iterdir() if path.name.startswith("one."))
    assert beside == [
        "one.manifest.json",
        "one.recipe.yaml",
        "one.report.html",
        "one.report.json",
        "one.safetensors",
    ]
    assert streammerge.read_report(out).document["method"] == "linear"


def test_without_the_library_a_report_is_refused_before_anything_is_made(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of("linear", None, [models.write({"w": torch.ones(3)})] * 2)
    monkeypatch.setattr(drawing, "_DISTRIBUTION", "no-such-distribution-of-anything")
    out = models.new_output()

    with pytest.raises(DependencyError, match=r"streammerge\[report\]"):
        streammerge.merge(recipe, out, memory=MEMORY, report=True)
    file = models.root / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    assert main(["plan", str(file), "--report"]) == 1
    assert main(["plan", str(file)]) == 0

    assert not out.exists()
    assert not out.with_name(f"{out.name}.partial").exists()


def test_a_library_that_does_not_work_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(drawing, "_MAKING", "raise SystemExit('it broke')")

    with pytest.raises(streammerge.StreamMergeError, match=r"exit code 1.*it broke"):
        drawing.load_script()

    assert list(tmp_path.rglob("*.js")) == []


def test_the_script_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(drawing, "_MAKING", "print('window.made = 1')")
    first = drawing.load_script()
    monkeypatch.setattr(drawing, "_MAKING", "raise SystemExit('again')")

    assert drawing.load_script() == first == "window.made = 1\n"
