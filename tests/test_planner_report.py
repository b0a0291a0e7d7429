"""`qtune plan` as a user meets it: what is asked, what is told, every fault in one paragraph; the picture."""

from __future__ import annotations

import builtins
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runs_helper
import tiny
from rich.console import Console

from qtune.batches import Capacity
from qtune.cli import main
from qtune.errors import QtuneError
from qtune.planner import layout, report, request, sweep
from qtune.planner.devices import find_device
from qtune.planner.fit import Fit, Row
from qtune.planner.plan import Phase, Plan
from qtune.planner.request import Lengths, Request, read_request, request_of
from qtune.planner.roofline import Speed
from qtune.recipe import Recipe
from qtune.screen import Screen, size

GB = 10**9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config.json of a tiny Llama: a legal model, without a weight."""
    made = tmp_path_factory.mktemp("a model")
    tiny.model("llama").config.save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Recipe:
    return Recipe.load(
        {"model": str(folder), "scheme": {"name": "nf4", "block": 32}}, ["data.max_length=32"], training=False
    )


@pytest.fixture(scope="module")
def asked(recipe: Recipe) -> Request:
    return request_of(recipe, find_device("rtx4090"), find_device("rtx4090").memory)


@pytest.fixture(scope="module")
def plan(asked: Request) -> Plan:
    return asked.plan()


@pytest.fixture
def file(recipe: Recipe, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    return path


def run(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main(["plan", *map(str, argv)]) == code
    out = capsys.readouterr()
    return out.out, out.err


def fault(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    err = run(capsys, *argv, code=1)[1]
    assert err.startswith("error Q") and "Traceback" not in err and "not foreseen" not in err
    return err


def text_of(show: Any, *args: Any, colour: bool = False, encoding: str = "utf-8") -> str:
    """What `show(*args, screen)` prints on a console of 80 columns."""
    screen = Screen()
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    system = "truecolor" if colour else None
    screen.console = Console(file=out, width=80, force_terminal=colour, color_system=system, highlight=False)  # type: ignore[arg-type]
    show(*args, screen)
    return raw.getvalue().decode(encoding)


def with_budget(plan: Plan, budget: int) -> Plan:
    return replace(plan, budget=budget)


# ---- the answer


def test_the_answer_says_what_where_and_when(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, file, "--device", "4090")
    words = (
        "lora, rank 16", "4 examples of 32 tokens in a micro-batch", "NVIDIA GeForce RTX 4090, 23.61 GiB", "Fits:",
        "weights", "nf4 codes", "optimizer", "CUDA context", "= peak of a training step", "allocated", "reserved",
        "Its peak comes in:", "tokens/s", "TFLOPS",
    )  # fmt: skip
    assert err == "" and [word for word in words if word not in out] == []


def in_bytes(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit]


def test_the_rows_shown_add_up_to_their_group_and_the_groups_to_the_peak(plan: Plan, asked: Request) -> None:
    out = text_of(report.show_plan, plan, asked)
    rows = [
        re.fullmatch(r"(\S |    |= )(.*?)\s{2,}(\S+ \w+B|\d+ B)\s+(\S+)%", line.rstrip()) for line in out.splitlines()
    ]
    groups: list[float] = []
    inside: list[float] = []
    for row in filter(None, rows):
        nbytes = in_bytes(row[3])
        if row[1] == "    ":
            inside.append(nbytes)
            continue
        if inside:
            assert sum(inside) == pytest.approx(groups[-1], rel=2e-3, abs=3e4)
        inside = []
        if row[1] == "= ":
            assert sum(groups) == pytest.approx(nbytes, rel=2e-3) and row[4] == "100"
        groups.append(nbytes)
    assert len(groups) > 5 and sum(item.nbytes for item in plan.items) == plan.process == sum(plan.groups.values())


def test_the_verdict_in_its_three_cases(plan: Plan) -> None:
    peak = plan.process
    assert report.verdict(with_budget(plan, 2 * peak)).plain == (
        f"Fits: {size(peak)} at the peak, {size(peak)} of {size(2 * peak)} stay free (50%)."
    )
    barely = report.verdict(with_budget(plan, int(1.02 * peak))).plain
    assert barely.startswith("Fits barely:") and "Less than 5% is left" in barely
    no = report.verdict(with_budget(plan, peak - 2**20)).plain
    assert no == f"Does not fit: {size(peak)} at the peak, 1.0 MiB more than {size(peak - 2**20)}."


def test_a_phase_that_takes_more_than_the_step_decides_and_is_named(plan: Plan, asked: Request) -> None:
    large = replace(plan, phases=(Phase("evaluation", plan.process + GB, host=GB, disk=0, note="all logits"),))
    assert f"{size(plan.process + GB)} at the peak" in report.verdict(large).plain
    assert report.verdict(large).plain.endswith("it is: evaluation.")
    shown = text_of(report.show_plan, large, asked)
    merging = replace(plan, budget=2 * plan.process, phases=(Phase("merge", 3 * plan.process),))
    assert report.verdict(merging).plain.startswith("Fits") and "--device cpu" in report.verdict(merging).plain
    assert "merg" not in report.verdict(with_budget(merging, 4 * plan.process)).plain.lower()
    assert re.search(r"evaluation +\S+ GiB +\S+ MiB +- +all logits", shown)


@pytest.mark.parametrize("share", [0.3, 1.5, 40.0])
def test_the_bar_is_to_scale(plan: Plan, share: float) -> None:
    some = with_budget(plan, int(plan.process * share))
    console = Console(file=io.StringIO(), width=80, color_system=None)
    bar, label = (line.plain for line in layout.bar(some, console))
    assert len(bar.rstrip()) <= 80 and size(some.budget) in label
    edge, used = bar.index("│"), len(re.sub("[│·]", "", bar))
    scale = max(plan.process, some.budget)
    assert abs(edge - 78 * some.budget / scale) <= 1 and abs(used - 78 * plan.process / scale) <= 1
    for group, sign in layout.SIGNS.items():
        assert abs(bar.count(sign) - 78 * plan.groups[group] / scale) <= 1, group


def test_a_terminal_without_unicode_gets_plain_signs(plan: Plan, asked: Request) -> None:
    shown = text_of(report.show_plan, plan, asked, encoding="ascii")
    assert "|" in shown and "# weights" in shown


def test_nothing_is_wider_than_80_columns_on_a_terminal(plan: Plan, asked: Request) -> None:
    shown = text_of(report.show_plan, plan, asked, colour=True)
    assert "\x1b[" in shown
    assert max(len(re.sub(r"\x1b\[[\d;]*m", "", line)) for line in shown.splitlines()) <= 80


def test_json_is_the_whole_plan(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, file, "--device", "4090", "--json")
    value = json.loads(out)
    assert "peak of a training step" in err, "a person still sees the answer"
    assert all(type(item["nbytes"]) is int for item in value["items"])
    assert sum(item["nbytes"] for item in value["items"]) == value["process"] == sum(value["groups"].values())
    assert value["verdict"] == "fits" and value["left"] == value["budget"] - value["peak"]
    again = Recipe.load(value["recipe"], training=False)
    assert again.scheme.name == "nf4" and value["shape"]["length"] == 32


@pytest.mark.slow
def test_what_does_not_fit_comes_with_the_smallest_change(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [file, "--device", "4090", "data.max_length=64", "train.checkpointing=false", "--batch"]
    most, least = (json.loads(run(capsys, *options, rows, "--json")[0])["peak"] for rows in (512, 1))
    limit = ["--budget", f"{(most + least) // 2}B"]
    out, _ = run(capsys, *options, 512, *limit)
    assert "Does not fit" in out and "The smallest change that fits" in out
    assert f"qtune train {file} data.max_length=64 " in out, "what was asked for is kept"
    value = json.loads(run(capsys, *options, 512, *limit, "--json")[0])
    assert value["verdict"] == "no" and value["change"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0384, "38 ms"), (1.72, "1.7 s"), (115, "115 s"), (850, "14 min"), (12000, "3 h 20 min"), (432000, "5.0 days")],
)
def test_durations(seconds: float, words: str) -> None:
    assert report.duration(seconds) == words


def test_the_time_of_the_run_needs_its_steps(asked: Request) -> None:
    speed = Speed(2.0, 1000.0, None, {}, "compute", ["assumed"])
    assert "steps" not in report.speed_lines(speed, asked)[0].plain
    known = replace(
        asked, recipe=asked.recipe.with_(["train.epochs=2", "train.accumulate=2"]), lengths=Lengths(((9, 4),) * 81)
    )
    line, assumed = report.speed_lines(speed, known)
    assert known.steps() == 21, "2 epochs of ceil(81 / 4) micro-batches, two a step, as the trainer counts"
    assert "21 steps in 42 s" in line.plain and assumed == ["assumed"]
    assert report.speed_lines(Speed(reason="the speed is not known"), asked)[0].plain == "Time: the speed is not known."


@pytest.mark.parametrize(
    ("n", "words"),
    [(6738415616, "6.74 B"), (39976960, "40.0 M"), (405853388800, "406 B"), (99_970, "100 K"), (12, "12")],
)
def test_counts(n: int, words: str) -> None:
    assert report.count(n) == words


# ---- what is asked


def test_a_model_without_a_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--method",
        "dora",
        "--rank",
        4,
        "--batch",
        2,
        "--seq",
        16,
        "--scheme",
        "int8",
        "--device",
        "8GB",
        "--json",
    ]
    value = json.loads(run(capsys, "--model", folder, *options)[0])
    recipe = value["recipe"]
    assert recipe["adapter"]["method"] == "dora" and recipe["adapter"]["rank"] == 4
    assert recipe["scheme"]["name"] == "int8" and value["budget"] == 8 * GB
    assert (value["shape"]["rows"], value["shape"]["length"]) == (2, 16)


def test_changes_stand_anywhere_and_options_keep_the_rest_of_the_recipe(
    file: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [file, "train.micro_batch=2", "--device", "4090", "scheme.embeddings=int8", "--scheme", "dense", "--json"]
    recipe = json.loads(run(capsys, *argv)[0])["recipe"]
    assert recipe["train"]["micro_batch"] == 2 and recipe["scheme"]["name"] == "dense"
    assert recipe["scheme"]["embeddings"]["name"] == "int8"
    value = json.loads(
        run(capsys, "train.micro_batch=3", "--model", folder, "--seq", 8, "--device", "4090", "--json")[0]
    )
    assert value["shape"]["rows"] == 3, "the first word is a change where there is no recipe"


def test_a_budget_is_the_limit_from_the_options_or_the_recipe(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = json.loads(run(capsys, file, "--device", "4090", "--budget", "20GB", "--json")[0])
    assert value["budget"] == 20 * GB
    value = json.loads(run(capsys, file, "--device", "4090", "budget=8GiB", "--json")[0])
    assert value["budget"] == 8 * 2**30, "the recipe's own"
    assert "beyond the 7.78 GiB" in run(capsys, file, "--device", "rtx3070", "--budget", "20GB")[0]


def test_the_default_device_is_named(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    notes: list[str] = []
    assert request._device(None, Recipe.load(file, training=False), notes).kind == "cpu"
    assert notes == ["planned for cpu (this machine has no GPU); --device rtx4090 plans for a card that is not here"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    seen = find_device("rtx3090")
    monkeypatch.setattr(request, "find_device", lambda name: replace(seen, key=name))
    for device, expected in (("auto", "cuda"), ("cuda:1", "cuda:1")):
        assert request._device(None, Recipe.load(file, [f"device={device}"], training=False), []).key == expected


def test_data_with_a_tokenizer_gives_the_worst_micro_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = runs_helper.recipe(tmp_path)  # data.max_length is 512, beyond the 64 positions: the data is what counts
    path = tmp_path / "recipe.yaml"
    path.write_text(made.to_yaml())
    value = json.loads(run(capsys, path, "--device", "4090", "--json")[0])
    assert value["shape"]["rows"] == 4 and value["shape"]["padded"] in (True, False)
    assert re.fullmatch(
        r"data: longest example 1\d tokens \(of 24 examples\), the 4 longest in one micro-batch",
        value["shape"]["source"],
    )
    assert value["shape"]["trained"] == 8, "the answer and the end of each"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).unlink()
    out, _ = run(capsys, path, "--device", "4090", "data.max_length=32")
    assert "no tokenizer of" in out and "4 examples of 32 tokens" in out
    out, _ = run(capsys, path, "--device", "4090", "data.max_length=32", "data.train=gone.jsonl")
    assert "gone.jsonl: no such file here" in out


def test_the_worst_micro_batch_of_lengths() -> None:
    lengths = Lengths(((50, 40), (20, 19), (10, 2)))
    shape = lengths.worst(Capacity(2), 512)[0]
    assert (shape.rows, shape.length, shape.trained, shape.padded) == (2, 50, 59, True)
    assert "longest example 50 tokens (of 3 examples), the 2 longest" in shape.source
    cut = lengths.worst(Capacity(2), 16)[0]
    assert (cut.length, cut.trained, cut.padded) == (16, 30, True), "cut to 16, of which the first is never trained"
    assert Lengths(((50, 4), (50, 4), (40, 4))).worst(Capacity(2), 512)[0].padded, "another micro-batch of these is"
    assert not Lengths(((50, 4), (50, 4))).worst(Capacity(2), 512)[0].padded
    alone = Lengths(((500, 4), (400, 300))).worst(Capacity(1), 512)[0]
    assert alone.trained == 300, "the longest example need not train the most"
    assert lengths.worst(Capacity(8), 512)[0].rows == 3, "there are no more examples"


# ---- faults


def test_every_fault_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "rtx9999", "--fit", "24gbs", "--stack", "peft", "--batch", 0, "--seq", 1, "--scheme", "nf5"]
    err = fault(capsys, "--model", "gpt2", *options)
    for words in (
        "6 faults",
        "--batch is 0; legal: 1 or more",
        "--seq is 1",
        "nf5",
        "'rtx9999'",
        "rtx4090",
        "'gbs'",
        "hf:installed",
    ):
        assert words in err, words


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "one of RECIPE and --model is needed"),
        (["no-such.yaml"], "no-such.yaml"),
        (["configs/first.yaml", "--model", "gpt2"], "given: configs/first.yaml and --model gpt2"),
        (["--model", "llama-9"], "unknown model 'llama-9'"),
        (["--model", "gpt2", "--method", "lore"], "did you mean 'lora'?"),
        (["--model", "gpt2", "--method", "ia3", "--rank", "4"], "adapter method ia3 has no option 'rank'"),
        (["--model", "gpt2", "--seq", "2048"], "beyond the 1,024 positions of gpt2; legal: 2 to 1,024"),
        (["--model", "gpt2", "train.batch=2"], "unknown key 'batch'"),
        (["--model", "gpt2", "--budget", "8GB", "--fit", "8GB"], "both say the limit"),
        (["--model", "gpt2", "--batch", "1000000000"], "legal: up to 4,194,304 tokens"),
        (["--model", "gpt2", "--budget", ""], "--budget is empty"),
        (["--model", "gpt2", "--budget", "8"], "'8' has no unit"),
        (["--model", "gpt2", "--stack", "hf", "--explain"], "--stack hf can be planned and swept"),
    ],
)  # fmt: skip
def test_a_fault_names_what_was_given_and_what_is_legal(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in fault(capsys, *argv, "--device", "rtx4090")


def test_wrong_use_is_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--explain", "--measure"], ["--batch", "many"], ["r.yaml", "--no-such-option"]):
        with pytest.raises(SystemExit) as error:
            main(["plan", *argv])
        assert error.value.code == 2


# ---- the picture


@pytest.mark.slow
def test_the_sweep_draws_what_it_planned(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "BATCHES", (1, 64))
    picture = tmp_path / "out.png"
    value = json.loads(run(capsys, file, "--device", "4090", "--sweep", picture, "--json")[0])
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []
    lengths = [point["length"] for point in value["lines"][0]["points"]]
    assert lengths == [8, 16, 32, 64], "up to the model's positions"
    few, many = ({p["length"]: p["peak"] for p in line["points"]} for line in value["lines"])
    assert all(many[n] >= few[n] for n in lengths) and many[64] > many[8]
    alone = json.loads(run(capsys, file, "--device", "4090", "--batch", 64, "--seq", 64, "--json")[0])
    assert many[64] == alone["peak"]
    assert "replaced" in run(capsys, file, "--device", "4090", "--sweep", picture)[0]


def test_a_line_ends_soon_beyond_the_limit(asked: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "BATCHES", (1, 4))
    monkeypatch.setattr(sweep, "peak", lambda plan: 100 * plan.shape.rows * plan.shape.length)
    made = sweep.sweep(replace(asked, budget=1700), Screen(quiet=True))
    assert [n for n, _ in made.lines[1]] == [8, 16, 32]
    assert [n for n, _ in made.lines[4]] == [8], "3,200 is beyond 1.4 times 1,700"


@pytest.mark.parametrize("suffix", ["svg", "pdf"])
def test_other_suffixes_and_a_limit_far_away(asked: Request, tmp_path: Path, suffix: str) -> None:
    lines = {rows: [(n, rows * n * 2**20) for n in (256, 512)] for rows in (1, 2, 4, 8)}
    made = sweep.Sweep(asked, lines, (1, 512, 512 * 2**20))
    sweep.draw(made, tmp_path / f"a.{suffix}")
    assert (tmp_path / f"a.{suffix}").read_bytes()[:4] in (b"%PDF", b"<?xm")
    words = [text.get_text() for text in sweep.picture(made).axes[0].texts]
    assert {"batch 1", "batch 8", "this recipe: 1 x 512, 512.0 MiB", "NVIDIA GeForce RTX 4090: 23.61 GiB"} <= set(words)


def test_names_in_a_picture_lie_beside_each_other_and_none_is_cut(asked: Request) -> None:
    long = replace(asked, device=replace(asked.device, name="Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz " * 2))
    lines = {rows: [(n, 2**30 + rows * n * 2**10) for n in (256, 512)] for rows in (1, 2, 4, 8)}
    made = sweep.picture(sweep.Sweep(long, lines, (1, 512, 2**30)))
    title = made.texts[0].get_text().splitlines()
    assert len(title) == 2 and max(map(len, title)) <= sweep.WIDE
    heights = [text.xy[1] for text in made.axes[0].texts if text.get_text().startswith("batch")]
    top = made.axes[0].get_ylim()[1]
    gaps = [after - before for before, after in zip(heights, heights[1:], strict=False)]
    assert min(gaps) >= 0.99 * sweep.APART * top


def test_pictures_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.png").mkdir()
    for name, words in (
        ("out.jpg", "legal: .pdf, .png, .svg"), ("out", "suffix"), (f"{tmp_path}/no/out.png", "no folder"),
        (f"{tmp_path}/folder.png", "is a folder"),
    ):  # fmt: skip
        with pytest.raises(QtuneError, match=re.escape(words)):
            sweep.check_file(name)
    real = builtins.__import__

    def missing(name: str, *args: Any) -> Any:
        if name == "matplotlib":
            raise ImportError
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(QtuneError, match=r"pip install 'qtune\[report\]'"):
        sweep.check_file(str(tmp_path / "out.png"))


# ---- what is measured, other stacks


def test_measured_stands_beside_planned(plan: Plan, asked: Request) -> None:
    class Found:
        weights, notes = "random", ("as it was",)

        def __init__(self) -> None:
            self.plan = plan

        def rows(self) -> list[dict[str, Any]]:
            return [{"tier": "process", "planned": 2**30, "measured": 2**31, "error": -0.5, "how": "resident memory"}]

    shown = text_of(report.show_measured, Found(), asked)
    assert re.search(r"process +1\.00 GiB +2\.00 GiB +-50\.0% +resident memory", shown) and "as it was" in shown


def test_another_stack_is_set_beside_ours(plan: Plan) -> None:
    larger = replace(plan, stack="hf", process=plan.process + GB, items=plan.items)
    assert report.beside(larger, plan).plain.endswith(f"{size(plan.process)} at the peak, {size(GB)} less.")


def test_another_stacks_time_is_a_bound_and_its_release_is_said(plan: Plan, asked: Request) -> None:
    speed = replace(plan, stack="hf:installed").speed
    assert not isinstance(speed, str) and speed.seconds is not None
    assert "at most" in report.speed_lines(speed, asked, own=False)[0].plain
    assert "at most" not in report.speed_lines(speed, asked)[0].plain
    assert "as installed" in report.head(replace(plan, stack="hf:installed"))[1].plain
    assert "up to 5.8" in report.head(replace(plan, stack="hf:published"))[1].plain


def test_no_color_on_a_terminal_gives_each_group_its_sign() -> None:
    for no_color, signs in ((True, layout.SIGNS), (False, dict.fromkeys(layout.SIGNS, "█"))):
        console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", no_color=no_color)
        assert not console.options.ascii_only and layout.signs_of(console) == signs


def test_merging_on_a_cpu_is_not_sent_to_the_cpu(plan: Plan) -> None:
    merge = replace(plan, phases=(Phase("merge", plan.budget + GB),))
    assert "--device cpu" in report.verdict(merge).plain
    here = replace(merge, device=replace(plan.device, kind="cpu"))
    assert "Merging afterwards" in report.verdict(here).plain and "--device cpu" not in report.verdict(here).plain


def test_without_colours_a_table_says_in_words_what_fits(plan: Plan, asked: Request) -> None:
    row = Row("scheme dense", "not rounded", with_budget(plan, plan.process - 1), GB)
    shown = text_of(lambda *rest: report.show_explained(plan, [row], *rest), asked)
    assert re.search(r"the recipe as it is .* GiB|MiB +(yes|barely)", shown)
    assert re.search(r"scheme dense .*iB +no +\+", shown)


def test_a_search_that_found_nothing_says_what_is_missing(plan: Plan, asked: Request) -> None:
    short = with_budget(plan, plan.process - 2**20)
    shown = text_of(report.show_way_out, Fit(short, short, (), {}), asked)
    assert "No change of the recipe makes it fit" in shown and "1.0 MiB too much" in " ".join(shown.split())


def test_the_command_to_paste_holds_each_key_once(plan: Plan, asked: Request) -> None:
    found = Fit(plan, plan, (), {"train.micro_batch": 1, "train.accumulate": 8})
    request = replace(asked, source="a recipe.yaml", changes=("train.micro_batch=8", "adapter.rank=4"))
    expected = "qtune train 'a recipe.yaml' adapter.rank=4 train.micro_batch=1 train.accumulate=8"
    assert report.paste(found, request) == expected
    bare = report.paste(found, replace(asked, source=None, budget=12 * GB))  # a mere model has no recipe to train
    assert bare.startswith(
        f"qtune plan --model '{asked.recipe.model}' --device {asked.device.key} --budget {12 * GB}B "
    )
    shown = text_of(report.show_fit, found, asked)
    assert "Fits" in shown and "train.accumulate=8" in shown
    evaluation = replace(plan, budget=plan.process, phases=(Phase("evaluate", plan.process + GB),))
    shown = text_of(report.show_fit, replace(found, plan=evaluation), asked)
    assert "it is: evaluate." in " ".join(shown.split()) and "No change of the recipe" not in shown


def test_the_examples_can_be_read() -> None:
    configs = Path(__file__).parent.parent / "configs"
    found = sorted(configs.glob("*.yaml"))
    assert len(found) >= 5
    for path in found:
        made = Recipe.load(path, training=False)
        assert made.output and made.data.train and path.name in path.read_text()


def test_the_reader_takes_parsed_arguments() -> None:
    from qtune.cli import parse

    made = read_request(parse(["plan", "--model", "gpt2", "--device", "rtx4090", "--fit"]))
    assert made.budget == find_device("rtx4090").memory and made.model.name == "gpt2"
