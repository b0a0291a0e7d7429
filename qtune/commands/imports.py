"""`qtune import`: an adapter that PEFT wrote becomes the folder of a run. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import QtuneError, listed

if TYPE_CHECKING:
    from ..peft_import import PeftFolder
    from ..recipe import Recipe
    from ..screen import Screen
    from ..sections import TokenKeys
    from ..vocabulary import Token


def options(sub: argparse.ArgumentParser) -> None:
    """Declare the options of `qtune import`."""
    sub.add_argument("folder", metavar="FOLDER", help="a folder that PEFT wrote, or a hub id of one")
    sub.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="other keys of the run's recipe, such as dtype=float32"
    )
    sub.add_argument(
        "--base", metavar="MODEL", help="checkpoint folder, .gguf file or hub id; default: what PEFT names"
    )
    sub.add_argument("--scheme", default="nf4", help="how the base is quantized while loading; default nf4")
    sub.add_argument("--out", metavar="RUN", required=True, help="folder of the run to write")


def import_command(args: argparse.Namespace, screen: Screen, emit: Callable[[Any], None]) -> None:
    """Import, and say what is there and what comes next."""
    from ..peft_import import find_peft, read_peft
    from ..recipe import Recipe
    from ..runs import RECIPE, anchored
    from ..safe_io import expanded

    if wrong := [text for text in args.overrides if text.partition("=")[0].split(".")[0] in ("adapter", "tokens")]:
        raise QtuneError("Q103", f"{listed(wrong)}: what the adapter is, its folder says; leave it out")
    found = read_peft(find_peft(args.folder))
    base = args.base or found.base
    if base is None:
        raise QtuneError("Q103", f"{args.folder} does not say what base it is for; give --base MODEL")
    recipe = Recipe.load({"model": base, "scheme": args.scheme}, args.overrides, training=False)
    out = expanded(args.out)
    done = import_peft(found, recipe, out, screen)
    if found.base not in (None, base, anchored(recipe).model):
        screen.line(f"note: PEFT trained it on {found.base}; whether {args.base} is the same, no file says", "yellow")
    run, recipe_of_it = shlex.quote(str(out)), shlex.quote(str(out / RECIPE))
    screen.line(f"wrote {out}: {done.method} on {done.sites} layers, {done.parameters:,} parameters; {done.told}")
    screen.line(f"next:  qtune chat {run}   qtune merge {run}")
    screen.line(f"       qtune train {recipe_of_it} --from {run} data.train=FILE output=FOLDER")
    emit({"run": out, "method": done.method, "sites": done.sites, "parameters": done.parameters, "base": base})


@dataclass(frozen=True)
class Imported:
    """What was taken in."""

    method: str
    sites: int
    parameters: int
    told: str


def import_peft(found: PeftFolder, recipe: Recipe, out: Path, screen: Screen) -> Imported:
    """Write the folder of a run with the adapter of a PEFT folder on the base of `recipe`, which takes its name when
    all is in it. Raises QtuneError for an `out` that exists and for what does not fit the base."""
    from dataclasses import asdict

    from ..adapters.files import is_whole_pair, save_adapter
    from ..peft_import import take_peft
    from ..runs import RECIPE, anchored, load_base
    from ..safe_io import new_folder, write_text

    if out.exists():
        raise QtuneError("Q410", f"{out} exists; choose another --out")
    model, tokenizer = load_base(recipe, screen)
    keys, tokens = tokens_of(found, tokenizer)
    spec, sites = take_peft(model, found)
    _take_rows(model, found, tokens)
    changes = {"adapter": spec.to_dict(), "tokens": {k: v for k, v in asdict(keys).items() if v}, "output": str(out)}
    recipe = anchored(recipe.with_(changes))
    base = {"model": recipe.model, "scheme": recipe.scheme.to_dict()}
    try:
        with new_folder(out) as partial:
            save_adapter(model, recipe.adapter, partial, base)
            write_text(partial / RECIPE, recipe.to_yaml())
            if not is_whole_pair(partial):
                raise QtuneError("Q901", f"what was written to {partial} reads back otherwise")
    except OSError as error:
        raise QtuneError("Q901", f"cannot write {out}: {error.strerror or error}") from error
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    told = f"every tensor of {found.folder} is in it"
    return Imported(spec.method, len(sites), count, told)


def tokens_of(found: PeftFolder, tokenizer: Any) -> tuple[TokenKeys, tuple[Token, ...]]:
    """The key `tokens` of a recipe for the rows of tokens that a PEFT folder holds, and the tokens, in order of their
    ids; new ones are added to `tokenizer`. Raises QtuneError where they have no name."""
    from ..data.words import add_words
    from ..model import load_tokenizer
    from ..sections import TokenKeys

    ids = ids_of(found)
    if not ids:
        return TokenKeys(), ()
    known, new = [i for i in ids if i < len(tokenizer)], [i for i in ids if i >= len(tokenizer)]
    special = False
    texts: list[str] = []
    if new:
        own = load_tokenizer(str(found.folder)).added_tokens_decoder
        if missing := [i for i in new if i not in own]:
            raise QtuneError(
                "Q418", f"the base's tokenizer has no tokens {listed(missing)}, and {found.folder} has none that does"
            )
        kinds = {bool(own[i].special) for i in new}
        if len(kinds) > 1:
            raise QtuneError("Q418", "of the new tokens some are special and some are not; a recipe adds one kind")
        special, texts = kinds.pop(), [own[i].content for i in sorted(new)]
    keys = TokenKeys(add=tuple(texts), train=tuple(tokenizer.convert_ids_to_tokens(known)), special=special)
    tokens = add_words(tokenizer, keys)
    if sorted(t.id for t in tokens) != sorted(ids):
        raise QtuneError("Q418", f"tokens with rows of their own get other ids here: {listed(t.id for t in tokens)}")
    return keys, tokens


def ids_of(found: PeftFolder) -> list[int]:
    """The ids of the tokens with rows of their own, in the order of the rows. Raises QtuneError where config and
    tensors contradict each other."""
    given: Any = found.config.get("trainable_token_indices") or []
    tables = list(given.values()) if isinstance(given, dict) else [given]
    numbers = all(isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids) for ids in tables)
    ids = tables[0] if numbers and tables else []
    if not numbers or any(other != ids for other in tables) or len({*ids}) < len(ids):
        raise QtuneError(
            "Q418", "trainable_token_indices must be one list of different token ids, the same for each table"
        )
    if bool(ids) != bool(found.rows) or any(rows.dim() != 2 or len(rows) != len(ids) for rows in found.rows.values()):
        told = ", ".join(f"{name} {tuple(rows.shape)}" for name, rows in found.rows.items()) or "none"
        raise QtuneError("Q404", f"trainable_token_indices names {len(ids)} tokens, the rows in the file are {told}")
    return ids


def _take_rows(model: Any, found: PeftFolder, tokens: tuple[Token, ...]) -> None:
    """Give the model the rows of tokens that a PEFT folder holds, in place."""
    from ..vocabulary import give_rows, rows_of

    give_rows(model, tokens, "mean")
    own = rows_of(model)
    if own is None:
        return
    order, faults = ids_of(found), []
    for name, rows in zip(own.names, own.tensors().values(), strict=False):
        given = found.rows.get(name)
        if given is None and (name == own.names[0] or own.head.within < len(tokens)):
            faults.append(f"{name}: the file has no rows of its tokens")
        elif given is not None and given.shape != rows.shape:
            faults.append(f"{name}: rows {tuple(given.shape)} in the file, {tuple(rows.shape)} in the base")
        elif given is not None:
            rows.data = given[[order.index(token.id) for token in own.table.tokens]].to(rows.device)
    names = own.names[: len(own.tensors())]
    faults += [f"{name}: rows in the file, the base has no such table" for name in found.rows if name not in names]
    if faults:
        raise QtuneError("Q404", f"the rows of tokens in {found.folder} do not fit this base: {'; '.join(faults)}")
