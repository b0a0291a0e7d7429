"""What a run needs beside its device: host memory, disk, the budget; told before training, and compared where known."""

from __future__ import annotations

import shutil
from argparse import ArgumentParser
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runs_helper
import tiny
import torch

from qtune import headroom
from qtune.data import Example
from qtune.errors import QtuneError
from qtune.memory.files import MappedFile
from qtune.planner import command, knobs, report, room
from qtune.planner.devices import find_device
from qtune.planner.fit import Fit, explain, fit, peak, refuse_beyond
from qtune.planner.layout import table
from qtune.planner.phases import phases_of
from qtune.planner.plan import Phase, Plan
from qtune.planner.request import Request, lengths_of, read_request, request_of
from qtune.planner.roofline import DISK as SPEED
from qtune.planner.roofline import Cost, estimate
from qtune.planner.room import Room
from qtune.recipe import Recipe
from qtune.runs import check_files, told_of_memory
from qtune.screen import Screen, size
from qtune.trainer import train

CPU, GPU = find_device("cpu"), find_device("rtx4090")
LAYERS, PAGE = 8, 4096


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    tiny.model("llama", max_position_embeddings=2048, num_hidden_layers=LAYERS).config.save_pretrained(made)
    return made


def asked(folder: Path, *changes: str, device: Any = GPU, there: Room | None = None) -> Request:
    tree = {"model": str(folder), "data": {"max_length": 64}, "train": {"micro_batch": 4}}
    request = request_of(Recipe.load(tree, changes, training=False), device, device.memory)
    return replace(request, room=there) if there else request


@pytest.fixture(scope="module")
def planned(folder: Path) -> Callable[..., Plan]:
    known: dict[Any, Plan] = {}

    def plan(*changes: str, device: Any = GPU) -> Plan:
        key = changes, device.key
        if key not in known:
            known[key] = asked(folder, *changes, device=device).plan()
        return known[key]

    return plan


def boundary(plan: Plan) -> int:
    return int(plan.shape.tokens * plan.model.config.hidden_size * 2)


# ---- what is planned


@pytest.mark.parametrize("device", [CPU, GPU], ids=["cpu", "cuda"])
def test_files_and_what_they_move_are_planned(planned: Callable[..., Plan], device: Any) -> None:
    """A layer's packed weights are read in each pass; beside a GPU the last two are in their slots between the two."""
    inputs = planned("memory.boundaries=disk", device=device)
    assert inputs.files == inputs.speed.read == inputs.speed.written == LAYERS * boundary(inputs)
    weights, whole = planned("memory.weights=disk", device=device), planned(device=device)
    packed = sum(item.nbytes for item in whole.items if item.name in ("nf4 codes", "scales and alignment"))
    passes = 2 * LAYERS - (2 if device is GPU else 0)
    assert weights.speed.read == packed // LAYERS * passes and weights.speed.written == 0
    assert packed <= weights.files <= packed + 7 * LAYERS * PAGE, "each tensor begins at a page"
    assert whole.files == whole.speed.read == 0


def test_the_optimizer_and_the_table_on_the_host_are_counted_there(planned: Callable[..., Plan]) -> None:
    """On a CPU the keys change nothing, so a run there cannot tell whether they do what they say: a GPU's plan can."""
    whole, states = planned("memory.boundaries=device"), planned("memory.optimizer=host")
    held, left = (plan.groups["optimizer"] for plan in (whole, states))
    assert whole.waiting == 0 and states.waiting >= 12 * whole.trained
    assert held >= 12 * whole.trained > 1000 * left, "but for counters"
    table_there, config = planned("memory.embeddings=host"), whole.model.config
    assert table_there.waiting >= 2 * config.vocab_size * config.hidden_size
    assert not [item for item in table_there.items if item.name == "embeddings"]
    for key in ("optimizer", "embeddings", "boundaries", "weights"):
        assert planned(f"memory.{key}=host", device=CPU).waiting == 0, "on a CPU it is the device's"


def test_a_slow_disk_makes_the_step_wait() -> None:
    work = Cost("mm", "bfloat16", 10**12, 10**9, 10)
    alone = estimate([work], GPU, 100)
    read = estimate([work, Cost("read from files", "", 0, 10**10, 0)], GPU, 100)
    assert alone.seconds is not None and alone.seconds < 1 and alone.read == 0
    assert (read.seconds, read.bound, read.read) == (10**10 / SPEED, "disk", 10**10)
    little = estimate([work, Cost("written to files", "", 0, 10**6, 0)], GPU, 100)
    assert little.seconds == alone.seconds and little.written == 10**6
    assert any(line.startswith("files: 0 B read and 976.6 KiB written a step") for line in little.assumptions)


def test_the_train_row_names_its_files(planned: Callable[..., Plan]) -> None:
    plan = planned("memory.boundaries=disk")
    row = next(phase for phase in phases_of(plan) if phase.name == "train")
    assert row.disk == plan.files and f"files: {size(plan.speed.read)} read" in row.note
    streamed = {item.name for item in planned("memory.weights=host").items}
    assert "slots of streamed layers" in streamed


# ---- what is compared


def text_of(show: Any, *args: Any) -> str:
    screen = Screen()
    with screen.console.capture() as shown:
        show(*args, screen)
    return " ".join(shown.get().split())


def test_host_memory_and_disk_decide_as_the_device_does(planned: Callable[..., Plan]) -> None:
    plan = planned("memory.weights=host", "memory.boundaries=disk")
    assert plan.verdict == "fits" and plan.host > plan.waiting > 0
    told = text_of(report.show_plan, plan, request_of(plan.recipe, GPU, GPU.memory))
    assert "--host 32GB" in told and f"files of {size(plan.files)}" in told, "what is not known is said"
    enough = replace(plan, room=Room(plan.host, plan.files))
    assert enough.verdict == "fits" and not report.unknown_room(enough)
    for there, what in ((Room(plan.host - 2**20, plan.files), "host memory"), (Room(plan.host, 2**16), "disk")):
        short = replace(plan, room=there)
        assert short.verdict == "no" and short.missing == sum(one.need - one.there for one in short.short)
        assert report.verdict(short).plain.startswith("Does not fit: ") and f"of {what}" in report.verdict(short).plain
        missing = text_of(report.show_way_out, Fit(short, short, (), {}), asked(Path(plan.recipe.model)))
        assert f"of {what}" in missing


def test_a_search_leaves_what_the_host_cannot_hold(
    planned: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights on the host are too many for it: they go to the disk; a table there would make it worse."""
    held = planned("memory.weights=host")
    there = Room(held.host - held.waiting + 1, 2**40)
    monkeypatch.setattr("qtune.planner.request.room_of", lambda recipe, device: there)
    monkeypatch.setattr("qtune.planner.fit.KNOBS", (knobs.table, knobs.optimizer, knobs.to_disk))
    with pytest.raises(QtuneError, match=r"the plan takes .* of host memory, .* more than .*: memory.weights=disk$"):
        refuse_beyond(held.recipe, GPU.memory, GPU)
    monkeypatch.setattr("qtune.planner.fit.KNOBS", (knobs.home, knobs.to_disk))
    with pytest.raises(QtuneError, match="memory.weights=device$"):  # which has room
        refuse_beyond(held.recipe, GPU.memory, GPU)


def arguments(*argv: str) -> Any:
    parser = ArgumentParser()
    command.options(parser)
    return parser.parse_args(list(argv))


def test_the_options_say_what_there_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ["--model", str(folder), "--seq", "16"]
    here = read_request(arguments(*model, "--device", "4090", "--host", "16GB", "--disk", "1 GiB"))
    assert (here.room.host, here.room.disk) == (16 * 10**9, 2**30)
    assert read_request(arguments(*model, "--device", "4090")).room == room.UNKNOWN
    cpu = read_request(arguments(*model, "--device", "cpu")).room
    assert cpu.host is None and cpu.disk and cpu.disk > 0, "of a CPU the disk is this machine's"
    with pytest.raises(QtuneError, match="--host 16GB is the memory beside a GPU, and the device is cpu"):
        read_request(arguments(*model, "--device", "cpu", "--host", "16GB"))
    typed = read_request(arguments(*model, "--device", "4090", "--fit", "4 GB", "--host", "16GB"))
    pasted = report.paste(Fit(*[None] * 3, change={}), typed)  # type: ignore[arg-type]
    assert pasted.endswith("--budget '4 GB' --host 16GB data.max_length=16"), "as the user wrote it"
    with pytest.raises(QtuneError, match="--batch is 2 and train.micro_tokens is 64; legal: one of the two"):
        read_request(arguments(*model, "--device", "4090", "--batch", "2", "train.micro_tokens=64"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    first = read_request(arguments(*model))
    assert "this machine has no GPU" in first.first_note and first.first_note not in first.late_notes


def test_this_machine_s_gpu_is_held_to_this_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = replace(GPU, source="this machine's cuda:0; and so on")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9, 4, 5))
    recipe = asked(folder, "memory.folder=/no/such/place").recipe
    assert room.room_of(recipe, mine) == Room(CPU.memory, 5, "/") and room.room_of(recipe, GPU) == room.UNKNOWN


# ---- what each change costs


def test_every_row_says_what_time_it_takes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("A frozen (LoRA-FA)", "layers' inputs on disk")
    some = [level for level in knobs.both_ways(asked(folder)) if level.words in words]
    monkeypatch.setattr("qtune.planner.fit.both_ways", lambda request: some)
    start, rows = explain(asked(folder))
    frozen, filed = (row.plan for row in rows)
    assert [row.words for row in rows] == list(words) and frozen is not None and filed is not None
    assert max(frozen.allocated, filed.allocated) < start.allocated, "no states of A; of the inputs few at a time"
    shown = text_of(report.show_explained, start, rows, asked(folder))
    assert f"+{size(LAYERS * boundary(start))} disk" in shown and f"{report.seconds(start)} a step" in shown
    half = replace(start, speed=replace(start.speed, tokens_per_second=start.speed.tokens_per_second / 2))
    assert report.slower(start, start) == "same" and report.slower(half, start) == "+100%"
    unknown = replace(start, speed="who knows")
    assert report.slower(unknown, start) == report.seconds(unknown) == "unknown"


def test_a_recipe_that_fits_barely_is_not_streamed_for_it(planned: Callable[..., Plan], folder: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Streaming would give room, at twice the time."""
    some = planned()
    assert not isinstance(some.speed, str)

    def made(self: Request, recipe: Recipe | None = None, stack: str | None = None) -> Plan:
        recipe = recipe or self.recipe
        away = recipe.memory.weights != "device"
        speed = replace(some.speed, tokens_per_second=(50.0 if away else 100.0) * factor[0] ** away)  # type: ignore[type-var]
        return replace(some, recipe=recipe, process=500 if away else 980, budget=1000, speed=speed)  # type: ignore[arg-type]

    factor = [1.0]
    monkeypatch.setattr(Request, "plan", made)
    found = fit(asked(folder))
    assert found.plan.verdict == "barely" and found.change == {}
    factor[0] = 2.0  # where it costs nothing it is taken
    assert fit(asked(folder)).change == {"memory.weights": "host"}


def test_the_table_is_of_a_step_and_says_so(planned: Callable[..., Plan]) -> None:
    screen = Screen()
    with screen.console.capture() as shown:
        screen.console.print(table(planned(), screen.console))
    assert "= peak of a training step" in shown.get()


# ---- before and while it trains


def recipe_of(tmp_path: Path, **changes: Any) -> Recipe:
    return runs_helper.recipe(tmp_path, train__steps=2, train__report=False, **changes)


def test_folders_of_files_that_cannot_be_are_told_before_loading(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for place, why in (("/proc", "no file can be made there"), (str(tmp_path / "file"), "it is no folder")):
        made = recipe_of(tmp_path, memory__boundaries="disk", memory__folder=place)
        with pytest.raises(QtuneError, match=f"cannot write what waits on the disk to {place}: {why}.*memory.folder"):
            train(made, screen=Screen())
        assert "Load" not in capsys.readouterr().out


def test_what_is_made_for_files_goes_with_them(tmp_path: Path) -> None:
    file = MappedFile(tmp_path / "a" / "b", "test")
    file.empty(3)
    assert (tmp_path / "a" / "b").is_dir()
    del file
    assert list(tmp_path.iterdir()) == []
    kept = MappedFile(tmp_path / "c", "test")
    (tmp_path / "c" / "mine").write_text("")
    del kept
    assert (tmp_path / "c" / "mine").exists()


def test_a_run_tells_where_things_wait_and_what_has_no_effect(tmp_path: Path) -> None:
    made = recipe_of(tmp_path, memory__boundaries="disk", memory__folder=str(tmp_path / "files"))
    assert (
        check_files(made, "cpu") == []
        and told_of_memory(made, "cpu") == f"layers' inputs in a file in {tmp_path}/files"
    )
    idle = recipe_of(tmp_path, memory__boundaries="host", memory__folder=str(tmp_path / "files"))
    folder, host = check_files(idle, "cpu")
    assert "is not used" in folder and host == "memory.boundaries: on a CPU host is the same as device"
    assert told_of_memory(idle, "cpu") == "" and told_of_memory(idle, "cuda") == "layers' inputs in host memory"
    assert not (tmp_path / "files").exists()


def test_too_little_disk_is_told_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qtune.planner.request.room_of", lambda recipe, device: Room(None, 4096))
    monkeypatch.setattr("qtune.planner.fit.KNOBS", (knobs.optimizer,))
    with pytest.raises(QtuneError, match=r"the plan takes .* of disk, .* more than the 4.0 KiB that are there; "):
        train(recipe_of(tmp_path, memory__boundaries="disk"), screen=Screen())
    assert "Load" not in capsys.readouterr().out
    monkeypatch.setattr("qtune.planner.request.room_of", lambda recipe, device: Room(None, 2**30))
    assert train(recipe_of(tmp_path, memory__boundaries="disk")).steps == 2


def test_the_number_of_the_budget_is_the_plan_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a stage takes more than the step, that is what is told, and what is held to the budget."""
    made = replace(recipe_of(tmp_path), budget="1TB")
    real = headroom._planned_for(torch.device("cpu"))
    examples = [Example(list(range(8)), [True] * 8, "here")]
    plan = request_of(made, real, 10**12, lengths_of(examples)).plan()
    more = replace(plan, phases=(Phase("load and quantize", plan.process + 2**20),))
    monkeypatch.setattr("qtune.planner.fit.with_phases", lambda plan: more)
    told: list[str] = []
    screen = Screen(quiet=True)
    monkeypatch.setattr(screen, "line", lambda text="", style=None: told.append(str(text)))
    headroom.check_room(made, examples, screen)
    assert f"plan  {size(peak(more))} of the budget of 1TB" in told[0] and told[0].endswith("stage: load and quantize")


def test_a_run_beyond_its_budget_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(headroom, "check_room", lambda *rest: None)
    monkeypatch.setattr("qtune.trainer.check_room", lambda *rest: None)
    train(replace(recipe_of(tmp_path), budget="1MB"), screen=Screen())
    assert capsys.readouterr().out.count("more than the budget of 1MB") == 1
    assert headroom.over_budget(replace(recipe_of(tmp_path), budget="1TB"), torch.device("cpu")) == ""


def test_the_longest_example_is_refused_before_padding_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = recipe_of(tmp_path, train__micro_batch=None, train__micro_tokens=2)
    with pytest.raises(QtuneError):
        train(made, screen=Screen())
    assert "padding" not in capsys.readouterr().out
