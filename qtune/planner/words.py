"""Tokens with rows of their own, as a plan needs them: how many, and which lie behind the model's last row."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from ..data.words import add_words
from ..model import load_tokenizer
from ..recipe import Recipe
from ..sections import TokenKeys
from ..vocabulary import Token

GUESSED = "no tokenizer of {} is at hand: its new tokens were taken to lie behind the last row of the model"


def words_of(recipe: Recipe, config: Any) -> tuple[tuple[Token, ...], str]:
    """The tokens of a recipe, and a note where their ids are not known: then new ones make the vocabulary longer, which
    takes the most."""
    if not recipe.tokens:
        return (), ""
    if (known := _known(recipe.model, recipe.tokens)) is not None:
        return known, ""
    count = config.get_text_config().vocab_size
    new = [Token(text, count + number) for number, text in enumerate(recipe.tokens.add)]
    there = [Token(text, number, False) for number, text in enumerate(recipe.tokens.train)]
    return (*new, *there), GUESSED.format(recipe.model) if new else ""


@lru_cache(maxsize=8)  # a search for what fits asks for each plan
def _known(model: str, keys: TokenKeys) -> tuple[Token, ...] | None:
    place = tokenizer_at(model)
    return None if place is None else add_words(load_tokenizer(place), keys)


def tokenizer_at(name: str) -> Path | None:
    """A file or folder on this machine that holds the tokenizer; nothing is fetched."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    folder = path if path.is_dir() else _cached(name)
    if folder is None or not (folder / "config.json").is_file():
        return None
    return folder if any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model")) else None


def _cached(name: str) -> Path | None:
    """The folder of a hub id in the local cache."""
    if name.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "tokenizer_config.json")
    return Path(found).parent if isinstance(found, str) else None
