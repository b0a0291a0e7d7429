"""What a run records, its page, runs side by side, trackers: on tiny runs, on folders that lack much, on huge ones.

A slow test opens both pages in Chromium, without a network: no console errors, and nothing wider than the window.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import accelerate.tracking
import pytest
import runs_helper
from rich.console import Console

from qtune.cli import main
from qtune.errors import QtuneError
from qtune.report import curves, facts, record
from qtune.report.compare import compare, names, write_comparison
from qtune.report.page import LIMIT, page, write_page
from qtune.report.read import read_run
from qtune.report.trackers import check_trackers
from qtune.screen import Screen
from qtune.sections import TRACKERS
from qtune.trainer import train

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HEADLESS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run`: with everything that a run records; `other`: another rate, no page."""
    root = tmp_path_factory.mktemp("a folder with spaces")
    options = {"train__samples": 2, "train__report": True, "adapter__method": "loftq", "train__eval_every": 4}
    train(runs_helper.recipe(root, **options))
    train(runs_helper.recipe(root, train__lr=1e-3, output=str(root / "other")))
    return root


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    """The run, to be changed."""
    for name in ("recipe.yaml", "metrics.jsonl", "run.json", "adapter.json"):
        shutil.copyfile(root / "run" / name, tmp_path / name)
    return tmp_path


def told(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def change(folder: Path, **values: Any) -> None:
    (folder / "run.json").write_text(json.dumps(told(folder) | values))


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Text(HTMLParser):
    """The text of a page, without style and pictures; and every attribute."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.tags: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.parts).split())


# ---- what is recorded


def test_a_run_records_what_its_page_tells(root: Path) -> None:
    made = told(root / "run")
    (session,) = made["sessions"]
    assert session["versions"]["torch"] and session["hardware"]["cpu"] and session["command"]
    assert made["steps"] == 8 and made["ended"]["steps"] == 8 and not made["ended"]["interrupted"]
    info = json.loads((root / "run" / "adapter.json").read_text())
    assert sum(row["parameters"] for row in made["trained"]) == info["parameters"]
    assert sum(row["layers"] for row in made["trained"]) == len(info["sites"])
    assert made["plan"]["process"] == sum(made["plan"]["groups"].values())
    for row in made["data"].values():
        assert sum(row["bins"]) == row["examples"] and len(row["bins"]) * row["width"] >= row["longest"]
        assert row["told"].endswith("kept") or "examples" in row["told"]
    assert [set(sample) for sample in made["samples"]] == [{"prompt", "expected", "before", "after"}] * 2
    assert all(sample["expected"].strip() in ("w5", "w6") for sample in made["samples"])
    rows = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["memory"] > 0 and row["memory_peak"] >= row["memory"] * 0.9 for row in rows)
    moved = [row["moved"] for row in rows if "loss" in row]
    assert len(moved) == 8 and min(moved) > 0


def test_without_a_report_nothing_is_planned_or_drawn(root: Path) -> None:
    assert "plan" not in told(root / "other") and "samples" not in told(root / "other")
    assert not (root / "other" / "report.html").exists()


def test_a_resumed_run_has_two_sessions_and_its_first_samples(tmp_path: Path) -> None:
    recipe = runs_helper.recipe(tmp_path, train__samples=1, train__steps=4, train__schedule="constant")
    train(recipe)
    before = told(tmp_path / "run")["samples"][0]["before"]
    train(recipe.with_({"train.steps": 6}), resume=True)
    made = told(tmp_path / "run")
    assert len(made["sessions"]) == 2 and made["steps"] == 6
    assert made["samples"][0]["before"] == before and "Session 2 of 2" in page(read_run(tmp_path / "run"))


def test_the_command_is_what_a_shell_takes() -> None:
    assert record.command(["/usr/bin/qtune", "train", "a b.yaml"]) == "qtune train 'a b.yaml'"
    assert record.command(["/x/qtune/__main__.py", "demo"]) == "qtune demo"
    assert record.command(["train.py", "--x"]) == "train.py --x"


def test_an_architecture_without_a_plan_is_a_note(root: Path, monkeypatch: pytest.MonkeyPatch, copy: Path) -> None:
    def refuse(*args: object) -> None:
        raise QtuneError("Q506", "XConfig cannot be planned: it asks for a value")

    monkeypatch.setattr("qtune.planner.request.request_of", refuse)
    screen = Screen()
    screen.console = Console(file=io.StringIO(), width=200)
    found = record.planned_peak(runs_helper.recipe(root), [], screen)
    assert found == {"why": "XConfig cannot be planned: it asks for a value"}
    assert "cannot be planned" in screen.console.file.getvalue()  # type: ignore[attr-defined]
    change(copy, plan=found)
    assert "XConfig cannot be planned" in page(read_run(copy))


def test_prompts_of_examples_end_where_the_answer_begins() -> None:
    from qtune.data import Example

    assert record.halves(Example([1, 2, 3, 4, 5], b"\0\0\1\1\0", "")) == ([1, 2], [3, 4])
    assert record.halves(Example([1, 2, 3, 4], b"\0\1\1\1", "")) == ([1], [2, 3, 4])
    assert record.halves(Example([1, 2, 3, 4], b"\1\1\1\1", "")) == ([1, 2], [3, 4])
    some = [Example([i], b"\1", "") for i in range(10)]
    assert [example.input_ids[0] for example in record.spread(some, 3)] == [0, 3, 6]
    assert record.spread(some[:2], 3) == some[:2]


# ---- the page


def test_the_page_tells_it_all_and_needs_nothing_else(root: Path) -> None:
    html = (root / "run" / "report.html").read_text()
    seen = Text(html)
    for words in (
        "model on task0.jsonl", "loftq, rank 4", "Training loss", "Evaluation loss", "Accuracy", "Peak memory",
        "planned", "Learning rate", "Gradient norm", "Tokens a second", "Parameters", "q_proj", "The start of",
        "Base alone", "Samples, before and after", "Held out", "The memory plan", "max_length: 512", "transformers",
    ):  # fmt: skip
        assert words in seen.text, words
    assert len(html.encode()) < LIMIT / 4
    assert "script" not in seen.tags and "link" in seen.tags
    loaded = [v for _, name, v in seen.attributes if name in ("src", "href", "xlink:href", "action", "srcset")]
    assert all(v and v.startswith(("#", "data:")) for v in loaded), loaded
    assert not re.search(r"@import|url\((?!#)|https?://(?!www\.w3\.org)", html)


def test_pictures_take_the_colours_of_the_page_and_ids_are_unique(root: Path) -> None:
    html = (root / "run" / "report.html").read_text()
    pictures = re.findall(r"<svg.*?</svg>", html, re.S)
    assert len(pictures) == 9
    for picture in pictures:
        ElementTree.fromstring(picture)
        assert "var(--" in picture and not [c for c in curves.STAND_IN.values() if c in picture]
        assert "DejaVu" not in picture and not re.search(r"<svg[^>]* (width|height)=", picture)
    defined = set(re.findall(r"var\(--([\w-]+)\)", html))
    assert defined <= set(re.findall(r"--([\w-]+):", html)), "a colour that style.css does not have"
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    links = re.findall(r'(?:url\(#|href="#)([^")]+)', html)
    assert links and set(links) <= set(ids)


def test_texts_of_the_user_are_text(copy: Path) -> None:
    evil = '<script>alert("1")</script><img src=x>'
    sample = {"prompt": evil, "expected": evil, "before": evil, "after": evil}
    sessions = told(copy)["sessions"]
    sessions[0]["command"] = evil
    change(copy, samples=[sample], sessions=sessions)
    (copy / "recipe.yaml").write_text(f"model: '{evil}'\ndata: {{train: '{evil}'}}\n")
    seen = Text(page(read_run(copy)))
    assert "script" not in seen.tags and "img" not in seen.tags
    assert seen.text.count('alert("1")') >= 6


def test_the_page_of_a_run_that_was_killed(copy: Path) -> None:
    """No run.json, no adapter.json, a line cut off: what is there is shown."""
    for name in ("run.json", "adapter.json"):
        (copy / name).unlink()
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')
    run = read_run(copy)
    text = Text(page(run)).text
    assert run.steps == 8 and "8 steps" in text and "Training loss" in text and "The data" not in text
    write_rows(copy, [{"step": 1, "loss": 2.0}])
    assert "1 step" in Text(page(read_run(copy))).text


def test_a_damaged_record_is_told_and_one_of_another_format_is_left_out(copy: Path) -> None:
    for text in ("{", "[1]", "", '{"format": 1, "sessions": 7}', '{"format": 1}'):
        (copy / "run.json").write_text(text)
        with pytest.raises(QtuneError, match=r"run\.json is damaged: (.|\n)*or remove it") as error:
            read_run(copy)
        assert error.value.code == "Q411"
    (copy / "run.json").write_text('{"format": 99}')
    assert read_run(copy).record == {}
    (copy / "run.json").unlink()
    assert "Training loss" in page(read_run(copy))


def test_a_folder_without_a_run_is_told(copy: Path, tmp_path: Path) -> None:
    (copy / "metrics.jsonl").write_text("")
    with pytest.raises(QtuneError, match="holds no row yet"):
        read_run(copy)
    (copy / "recipe.yaml").write_text("- a\n")
    with pytest.raises(QtuneError, match="is no recipe"):
        read_run(copy)
    with pytest.raises(QtuneError, match=r"lacks recipe\.yaml and metrics\.jsonl; give the `output` folder"):
        read_run(tmp_path / "nowhere")


def test_a_long_run_of_a_huge_model_stays_small(copy: Path) -> None:
    rows = [
        {"step": s, "loss": 1 + (s * 7919 % 100) / 99, "lr": 1e-4, "grad_norm": 1.0, "memory": 10**9 + s, "tokens": s,
         "tokens_per_s": s % 97, "seconds": s}
        for s in range(1, 5_001)
    ]  # fmt: skip
    write_rows(copy, rows)
    start = {"before": 0.1, "after": 0.09, "weighted": False}
    sites = {f"model.layers.{i}.mlp.experts.{j}.down_proj": {"start": start} for i in range(60) for j in range(50)}
    (copy / "adapter.json").write_text(json.dumps({"sites": sites}))
    long = dict.fromkeys(("prompt", "expected", "before", "after"), "long " * 10000)
    change(copy, samples=[long] * 3)
    html = page(read_run(copy))
    assert len(html.encode()) < LIMIT and "but 2,700 that gained more" in html


def test_thinning_keeps_the_extremes_and_smoothing_the_level() -> None:
    ys = [1.0] * 5000
    ys[1234], ys[4321] = 9.0, -3.0
    xs, kept = curves.thin(list(range(5000)), ys)
    assert len(xs) <= curves.POINTS and {9.0, -3.0} <= set(kept) and xs[0] == 0 and xs[-1] == 4999 and xs == sorted(xs)
    assert curves.smooth([2.0] * 50) == pytest.approx([2.0] * 50), "also at the ends"
    assert curves.smooth([1.0, 5.0]) == [1.0, 5.0]
    line = curves.smooth(list(range(200)))
    assert line[50:150] == pytest.approx(range(50, 150))


def test_small_numbers_are_short() -> None:
    assert [curves.short(x) for x in (0, 2.4e-4, 8e-5, 0.5, 12)] == ["0", "2.4e-4", "8e-5", "0.5", "12"]


def test_the_page_says_whose_adapter_it_is(copy: Path) -> None:
    change(copy, ended=told(copy)["ended"] | {"best": 4})
    assert "with the adapter of step 4" in facts.status(read_run(copy))
    change(copy, ended=told(copy)["ended"] | {"best": 8, "interrupted": True})
    assert "interrupted" in facts.status(read_run(copy)) and "adapter of" not in facts.status(read_run(copy))


def test_advice_stands_on_the_page(copy: Path) -> None:
    write_rows(copy, [{"step": s, "loss": 2.5, "lr": 1e-4, "grad_norm": 1.0} for s in range(1, 30)])
    text = Text(page(read_run(copy))).text
    assert "Worth a look" in text and "The loss has been 2.5 for 10 rows" in text


def test_a_missing_library_is_a_note_at_the_end_and_an_error_on_demand(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = train(runs_helper.recipe(tmp_path, train__report=True, train__steps=2), screen=Screen())
    assert result.steps == 2 and "note: no report.html" in capsys.readouterr().out
    assert main(["report", str(root / "run"), "--out", str(tmp_path / "x.html")]) == 1
    assert "pip install 'qtune[report]'" in capsys.readouterr().err and not (tmp_path / "x.html").exists()


def test_report_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "page.html"
    assert main(["report", str(root / "run"), "--out", str(file), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["file"] == str(file) and file.stat().st_size > 50_000 and value["numbers"]["Tokens"]["value"]
    for out, words in ((tmp_path / "page.pdf", "ends in .html"), (tmp_path, "ends in .html")):
        assert main(["report", str(root / "run"), "--out", str(out)]) == 1
        assert words in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nowhere")]) == 1
    assert "is not a run" in capsys.readouterr().err


# ---- side by side


def test_compare(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, file = [str(root / "run"), str(root / "other")], tmp_path / "both.html"
    assert main(["compare", *runs, "--out", str(file)]) == 0
    out = capsys.readouterr().out
    assert "train.lr" in out and "0.01" in out and "0.001" in out and "adapter.method" in out and "output" not in out
    seen = Text(file.read_text())
    assert "run and other" in seen.text and "Where the recipes differ" in seen.text and "script" not in seen.tags
    assert main(["compare", *runs, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in value["runs"]] == ["run", "other"]
    assert value["differences"]["train.lr"] == ["0.01", "0.001"]
    rows = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    assert value["runs"][0]["eval_loss"] == [row["eval_loss"] for row in rows if "eval_loss" in row][-1]


def test_what_cannot_be_compared_is_told(root: Path) -> None:
    run = read_run(root / "run")
    for runs, words in (([run], "1 run to compare"), ([run, run], "one twice"), ([run] * 9, "9 runs")):
        with pytest.raises(QtuneError, match=words):
            compare(runs)


def test_names_tell_runs_apart() -> None:
    assert names([Path("/a/x/run"), Path("/a/y/run")]) == ["x/run", "y/run"]
    assert names([Path("/a/run"), Path("/a/run/second")]) == ["run", "second"]


def test_equal_recipes_are_told_to_be(root: Path, copy: Path, tmp_path: Path) -> None:
    text = (copy / "recipe.yaml").read_text()
    other = re.sub(r"alpha: (\d+)(\.0)?", lambda found: f"alpha: {found[1]}{'' if found[2] else '.0'}", text)
    (copy / "recipe.yaml").write_text(other)
    assert other != text, "one number in two spellings"
    made = compare([read_run(root / "run"), read_run(copy)])
    write_comparison(made, tmp_path / "same.html")
    assert made.differences == {} and "They are the same." in (tmp_path / "same.html").read_text()


# ---- trackers


def test_trackers_are_those_of_accelerate() -> None:
    assert set(TRACKERS) == set(accelerate.tracking.LOGGER_TYPE_TO_CLASS)


def test_a_missing_tracker_is_told_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(QtuneError, match="comet_ml, wandb, which are not installed: pip install comet-ml wandb"):
        train(runs_helper.recipe(tmp_path, train__trackers=["comet_ml", "wandb"]))
    assert not (tmp_path / "run").exists()
    check_trackers(())


class Fake(accelerate.tracking.GeneralTracker):
    """A tracker that keeps what it gets, and fails at a step."""

    name, requires_logging_directory, main_process_only = "trackio", False, False
    fails = 10**9
    made: Fake

    def __init__(self, project: str, **options: Any) -> None:
        super().__init__()
        self.project, self.options = project, options
        self.config: dict[str, Any] = {}
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.ended = False
        type(self).made = self

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        if step is not None and step >= self.fails:
            raise ConnectionError("the network is gone")
        self.rows.append((step or 0, values))

    def finish(self) -> None:
        self.ended = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "trackio", Fake)
    monkeypatch.setattr("accelerate.tracking._available_trackers", ["trackio"])
    monkeypatch.setattr(Fake, "fails", 10**9)
    return Fake


def test_a_tracker_gets_the_recipe_and_every_row(tmp_path: Path, fake: type[Fake]) -> None:
    train(runs_helper.recipe(tmp_path, train__trackers=["trackio"], train__steps=3))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert fake.made.ended and fake.made.options == {"name": "run"}
    assert fake.made.config["train.lr"] == 0.01 and fake.made.config["train.trackers"] == "['trackio']"
    assert [{"step": step, **values} for step, values in fake.made.rows] == rows


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(
    tmp_path: Path, fake: type[Fake], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fake, "fails", 2)
    result = train(runs_helper.recipe(tmp_path, train__trackers=["trackio"], train__steps=4), screen=Screen())
    assert result.steps == 4 and capsys.readouterr().out.count("trackio gets nothing more") == 1
    assert max(step for step, _ in fake.made.rows) == 1


@pytest.mark.slow
def test_tensorboard_writes_what_its_reader_reads(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(runs_helper.recipe(tmp_path, train__trackers=["tensorboard"], train__steps=3))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert len(events.Scalars("eval_loss")) == 2


# ---- in a browser


FRAME = """<!doctype html><body><script>addEventListener("message", e => document.body.dataset.found = e.data)</script>
<iframe src="{file}" width="{width}" height="900" style="border:0"></iframe></body>"""
MEASURE = """<script>addEventListener("load", () => {
const shown = e => e.getBoundingClientRect();
const all = what => [...document.querySelectorAll(what)].filter(e => shown(e).width);
parent.postMessage(JSON.stringify({inner: innerWidth, scroll: document.documentElement.scrollWidth,
pictures: all("svg").length, least: Math.min(...all("svg text").map(e => shown(e).height))}), "*")})</script></body>"""


def browse(file: Path, *options: str) -> tuple[str, str]:
    """What Chromium prints on stdout, and the lines of the page's console."""
    command = [str(CHROMIUM), *HEADLESS, f"--user-data-dir={file.with_suffix('.profile')}", *options, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")
@pytest.mark.parametrize("width", [390, 1280])
def test_pages_in_chromium(root: Path, tmp_path: Path, width: int) -> None:
    """A copy of the page, in a frame of this width (no window is narrower than 500), says what is too wide, how many
    pictures show, and how small letters are."""
    write_page(read_run(root / "run"), tmp_path / "run.html")
    write_comparison(compare([read_run(root / "run"), read_run(root / "other")]), tmp_path / "both.html")
    for name, pictures in (("run", 8), ("both", 2)):
        page_file, image = tmp_path / f"{name}.html", tmp_path / f"{name}.png"
        assert browse(page_file, f"--screenshot={image}", f"--window-size={width},900")[1] == ""
        assert image.stat().st_size > 10_000
        (tmp_path / "measured.html").write_text(page_file.read_text().replace("</body>", MEASURE))
        frame = tmp_path / f"{name}-frame.html"
        frame.write_text(FRAME.format(file="measured.html", width=width))
        out, console = browse(frame, "--dump-dom", "--virtual-time-budget=2000", "--window-size=1400,1000")
        found = json.loads(re.search(r'data-found="([^"]+)"', out)[1].replace("&quot;", '"'))  # type: ignore[index]
        assert console == "" and found["inner"] == width and found["scroll"] <= width, found
        assert found["pictures"] == pictures and found["least"] >= 10, found


def test_facts_of_a_run_without_much(copy: Path) -> None:
    (copy / "recipe.yaml").write_text(
        "model: a/b.gguf\nadapter: dora\nscheme: int8\ndata: {train: [{path: x/y.jsonl}]}\n"
    )
    run = read_run(copy)
    assert (run.model, run.data, run.method, run.scheme) == ("b", "y.jsonl", "dora", "int8")
    assert facts.options(run)["Stored as"] == "int8"
