"""`qtune eval`: its options, what is asked of the model, and what is told. All that can be refused is refused before
the model loads. Nothing heavy is imported before the command runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..together import folders_of, mixture_of, open_together
from ..together import options as adapter_options

if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..screen import Screen
    from .asked import Held
    from .generation import Sampling
    from .measuring import Job

GENERATING = ("max_new_tokens", "stop", "temperature", "seed")  # options of texts
ESCAPES = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}


def options(sub: argparse.ArgumentParser) -> None:
    """Declare the options of `qtune eval`."""
    add = sub.add_argument
    add("run", metavar="RUN|MODEL", help="folder of a run, of one of its checkpoints, or of a merged one; or a MODEL")
    add("--data", metavar="FILE", help="records to evaluate on; default: data.eval of the run's recipe")
    add("--base", action="store_true", help="also evaluate the base without its adapter")
    adapter_options(
        sub,
        "with --adapter: evaluate this, such as law or law=0.7,code=0.3; may be given several times; default: "
        "each adapter by itself",
        "with --adapter: also evaluate all of them together, each example by the adapter whose training data is most "
        "like its prompt",
    )
    add("--parts", type=int, metavar="N", help="with --adapter: keep only the N rank-one parts that a token moves most")
    add(
        "--metric",
        action="append",
        metavar="NAME",
        help="perplexity, choice, exact-match, or a Python FILE.py with metric(prompt, answer, expected); may be given "
        "several times; default: perplexity, and choice where the answers are few",
    )
    add(
        "--max-new-tokens", type=int, metavar="N", help="longest generated answer (256, or what the model has room for)"
    )
    add("--stop", action="append", metavar="TEXT", help=r"an answer ends before this text; \n is a new line")
    add("--temperature", type=float, metavar="T", help="0 (default) takes the likeliest token")
    add("--seed", type=int, metavar="N", help="of what is drawn with --temperature (0)")
    add("--tasks", metavar="NAME,..", help="tasks of EleutherAI's lm-eval, by name or as a YAML file")
    add("--num-fewshot", type=int, metavar="N", help="with --tasks: examples in the prompt; default: the task's")
    add("--limit", type=int, metavar="N", help="only the first N examples (with --tasks, of each task)")
    add("--batch", type=int, metavar="N", help="examples at a time; default: as in training")
    add("--out", metavar="FILE.jsonl", help="write prompt, answer, expected answer and score of each example")
    add("--scheme", help="how a MODEL is quantized while loading; default: as it is stored")
    add("--device", help="auto, cuda, mps or cpu; default: the recipe's, for a MODEL auto")


def evaluate_command(args: argparse.Namespace, screen: Screen, emit: Callable[[Any], None]) -> None:
    """Run the command. emit: takes the value for a program."""
    import sys
    from contextlib import nullcontext, redirect_stdout

    from ..safe_io import claimed, write_text

    out = Path(args.out).expanduser() if args.out else None
    loud = redirect_stdout(sys.stderr) if args.json else nullcontext()  # a user's metric may print
    with claimed(out.absolute().parent) if out else nullcontext(), loud:
        job = _job(args, screen)
        results, rows = _evaluate(args, job, screen)
        if out:
            import json

            write_text(out, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))
            screen.line(f"wrote {out}: {len(rows):,} rows")
    emit(results)


# ---- before the model loads


def _job(args: argparse.Namespace, screen: Screen) -> Job:
    from ..errors import QtuneError
    from ..runs import tokenizer_of
    from .asked import longest
    from .generation import Sampling
    from .harness import load_tasks
    from .measuring import Job
    from .metrics import CHOICE, text_metrics, try_on

    if faults := _faults(args):
        raise QtuneError("Q102", "\n".join(faults))
    names = tuple(dict.fromkeys(args.metric or ()))
    metrics = text_metrics(names)
    given = {key: getattr(args, key) for key in GENERATING if getattr(args, key) is not None}
    if "stop" in given:
        given["stop"] = tuple(_unescaped(text) for text in given["stop"])
    how = Sampling(**given)
    faults = [*how.faults(), *_without_effect(args, names, bool(metrics), how)]
    if faults:
        raise QtuneError("Q103", "\n".join(faults))
    folders = folders_of(args.run, args.adapter)
    if (args.use or args.parts is not None) and not folders:
        raise QtuneError("Q103", "--use and --parts choose among several adapters; legal with --adapter NAME=RUN")
    if args.route and (fault := _route_fault(args, folders)):
        raise QtuneError("Q103", f"--route: {fault}")
    uses = [mixture_of(text, list(folders)) for text in args.use or folders]
    recipe, is_run, stored = _subject(args)
    if args.route and recipe.data.loss_on == "all":
        raise QtuneError(
            "Q809", f"--route: the recipe of {args.run} learns all tokens (data.loss_on all), so that nothing tells "
            "prompts, by which adapters are chosen, from answers; legal: a RUN that learns answers"
        )  # fmt: skip
    tokenizer, _ = tokenizer_of(recipe)
    job = Job(recipe, folders, uses, is_run, stored, names, metrics, how, None, None)
    if args.tasks:
        return replace(job, tasks=load_tasks([name for name in args.tasks.split(",") if name]))
    held = _held(args, job, tokenizer, screen)
    if CHOICE in names and not held.questions:
        raise QtuneError(
            "Q809",
            "--metric choice: the records have no `choices`, and their answers are not 2 to 8 that each come twice or "
            'more; legal: {"prompt", "choices": [...], "answer": index or text}, or another metric',
        )
    if metrics:
        try_on(metrics, held.asked[0])
        how = _within(recipe, [one.ids for one in held.asked], how, args.max_new_tokens is None)
        if (most := longest(held.asked)) > how.max_new_tokens:
            screen.line(
                f"note: the longest expected answer has {most:,} tokens, more than --max-new-tokens "
                f"{how.max_new_tokens:,}",
                "yellow",
            )
    return replace(job, held=held, how=how)


def _within(recipe: Recipe, prompts: Sequence[Sequence[int]], how: Sampling, free: bool) -> Sampling:
    """Checked against the positions of the model; free: no length was asked for, so that it may be less."""
    from ..model.source import open_source
    from .generation import check, room

    config = open_source(recipe.model).config
    left = room(config, prompts)
    if free and left is not None and left > 0:
        how = replace(how, max_new_tokens=min(how.max_new_tokens, left))
    check(config, prompts, how)
    return how


def _faults(args: argparse.Namespace) -> list[str]:
    """Of the options alone."""
    small = (("batch", 1), ("limit", 1), ("parts", 1), ("num_fewshot", 0), ("seed", 0))
    faults = [
        f"--{name.replace('_', '-')} is {value}; legal: {least} or more"
        for name, least in small
        if (value := getattr(args, name)) is not None and value < least
    ]
    if args.tasks is not None and not args.tasks.strip(","):
        faults.append("--tasks is empty; legal: names of tasks or YAML files, with commas between them")
    if args.tasks and (args.metric or args.data):
        faults.append("--tasks bring data and metrics of their own; legal: without --metric and --data")
    if args.num_fewshot is not None and not args.tasks:
        faults.append("--num-fewshot is of --tasks, and there are none")
    return faults


def _without_effect(args: argparse.Namespace, names: tuple[str, ...], texts: bool, how: Sampling) -> list[str]:
    """Options that nothing would look at."""
    faults = []
    given = [f"--{key.replace('_', '-')}" for key in GENERATING if getattr(args, key) is not None]
    if given and not texts:
        why = "the tasks say it themselves" if args.tasks else "no metric looks at generated answers"
        faults.append(f"{', '.join(given)}: {why}; legal with --metric exact-match or a Python file")
    elif args.seed is not None and how.temperature == 0:
        faults.append("--seed has no effect on the likeliest tokens; legal with --temperature above 0")
    if args.out and not (texts or args.tasks or "choice" in names):
        faults.append("--out writes answers, and none are given; legal with --metric choice, exact-match or FILE.py")
    return faults


def _route_fault(args: argparse.Namespace, folders: Mapping[str, Path]) -> str:
    """What keeps prompts from choosing adapters; empty where nothing does."""
    if not folders:
        return "prompts choose among several adapters; legal with --adapter NAME=RUN"
    if args.tasks:
        return "the prompts of --tasks are lm-eval's, one after another; legal: without --tasks"
    return "an adapter has this name already; give it another one by NAME=RUN" if "route" in folders else ""


def _unescaped(text: str) -> str:
    r"""\n, \t and \\ as what they stand for."""
    import re

    return re.sub(r"\\[nt\\]", lambda match: ESCAPES[match[0]], text)


def _subject(args: argparse.Namespace) -> tuple[Recipe, bool, bool]:
    """The recipe of a run, or one for a model alone (with the data of the run whose merged folder it is); whether it is
    a run, and whether the model is kept as it is packed."""
    from ..errors import QtuneError
    from ..model.source import looks_like_hub_id, open_source
    from ..recipe import Recipe
    from ..runs import is_run, read_recipe

    path = Path(args.run).expanduser()
    is_model = path.is_file() or (path / "config.json").is_file() or (not path.exists() and looks_like_hub_id(args.run))
    if is_run(path) or not is_model:
        recipe = read_recipe(path)
        if args.scheme is not None:
            raise QtuneError(
                "Q103", f"--scheme {args.scheme}: {args.run} is a run, whose base is stored as its recipe says"
            )
        return replace(recipe, device=args.device or recipe.device), True, False
    if args.base:
        raise QtuneError("Q103", f"--base: {args.run} is no run, but a model without adapter; legal: without --base")
    source = open_source(args.run)
    dtype = str(getattr(source.config, "dtype", None) or "bfloat16").removeprefix("torch.")
    tree: dict[str, Any] = {"model": args.run, "device": args.device or "auto", "dtype": dtype}
    tree["scheme"] = args.scheme or {"name": "dense", "dtype": dtype}
    recipe = Recipe.load(tree, training=False)
    if is_run(path.parent):  # RUN/merged
        run = read_recipe(path.parent)
        recipe = replace(recipe, data=run.data, train=run.train)
    return recipe, False, args.scheme is None and source.kind == "qtune"


def _held(args: argparse.Namespace, job: Job, tokenizer: Any, screen: Screen) -> Held:
    from ..errors import QtuneError
    from .asked import held_out
    from .choice import questions_of

    keys = replace(job.recipe.data, eval=args.data, split=None) if args.data else job.recipe.data
    texts, seed = bool(job.metrics), job.recipe.train.seed
    held = held_out(keys, tokenizer, seed=seed, screen=screen, texts=texts, limit=args.limit)
    if held is None:
        what = f"the recipe of {args.run} has neither data.eval nor data.split" if job.is_run else "there is no data"
        raise QtuneError("Q106", f"{what}; give --data FILE")
    screen.line(held.told)
    if args.limit is not None:
        screen.line(f"the first {len(held.examples):,} of them")
    if "choice" in job.names and not held.questions:
        held = replace(held, questions=questions_of(held.examples, tokenizer))
    return held


# ---- with the model


def _evaluate(args: argparse.Namespace, job: Job, screen: Screen) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Results by what was evaluated (base, adapter; model), and the rows of --out."""
    from ..batches import Capacity
    from ..routing import load_router
    from ..runs import load_base, open_run
    from ..step import LanguageModel
    from .harness import run_tasks, shown
    from .measuring import measure
    from .subjects import subjects

    adapters = None
    if job.folders:
        run, adapters = open_together(job.folders, screen, device=args.device)
        model, tokenizer = run.model, run.tokenizer
    elif job.is_run:
        run = open_run(Path(args.run), screen, device=args.device)
        model, tokenizer = run.model, run.tokenizer
    else:
        model, tokenizer = load_base(job.recipe, screen, stored=job.stored)
    language, keys = LanguageModel(model), job.recipe.train
    if not job.is_run:
        language.check()
    elif job.held is not None and job.held.examples:  # as in training, whose figures these are then
        language.choose_attention(max(len(example.input_ids) for example in job.held.examples))
    capacity = Capacity(args.batch) if args.batch else replace(Capacity.of(keys), packed=False)
    results: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    router = load_router(adapters, screen=screen) if args.route and adapters is not None else None
    asked = subjects(model, adapters, job.uses, base=args.base, is_run=job.is_run, parts=args.parts, router=router)
    for subject in asked:
        name = subject.name
        if job.tasks is not None:
            subject.switch()
            batch = capacity.rows(job.recipe.data.max_length)
            found, some = run_tasks(
                model, tokenizer, job.tasks, batch=batch, limit=args.limit, num_fewshot=args.num_fewshot
            )
            for line in shown(found):
                screen.line(f"{name:8} {line}")
        else:
            found, some = measure(job, subject, language, tokenizer, capacity, args.batch is not None, screen)
        results[name] = found
        rows += [{"model": name, **row} for row in some]
    return results, rows
