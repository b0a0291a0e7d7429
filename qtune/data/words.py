"""Tokens that a recipe adds to a tokenizer, and those whose rows it trains: checked, added, found in the data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import AddedToken

from ..errors import QtuneError
from ..sections import TokenKeys
from ..vocabulary import Token
from .report import Example

MARK = re.compile(r"<\|[^|<>\s{}]+\|>")  # how templates write their special tokens: <|im_start|>


def add_words(tokenizer: Any, keys: TokenKeys) -> tuple[Token, ...]:
    """Add the tokens of a recipe to its tokenizer, in place. Returns those that get rows of their own.

    Raises QtuneError with every token that is there already, is not there, or is not read as one token.
    """
    if not (keys.add or keys.train):
        return ()
    known = tokenizer.get_vocab()
    faults = [
        f"tokens.add: {t!r} is a token already (id {known[t]}); tokens.train trains it" for t in keys.add if t in known
    ]
    trained = {text: _id_of(text, tokenizer, known) for text in keys.train}
    faults += [f"tokens.train: {t!r} is no token; tokens.add adds it" for t, id in trained.items() if id is None]
    if faults:
        raise QtuneError("Q223", "; ".join(faults))
    pieces = {text: tuple(i for i in _ids(text, tokenizer) if i != tokenizer.unk_token_id) for text in keys.add}
    words = [AddedToken(text, special=keys.special, normalized=False) for text in keys.add]
    tokenizer.add_tokens(words, special_tokens=keys.special)
    tokens = [Token(text, tokenizer.convert_tokens_to_ids(text), True, pieces[text]) for text in keys.add]
    split = [token for token in tokens if _ids(token.text, tokenizer) != [token.id]]
    if split:
        listed = ", ".join(f"{token.text!r} ({len(_ids(token.text, tokenizer))} tokens)" for token in split)
        raise QtuneError("Q223", f"tokens.add: this tokenizer does not read as one token: {listed}")
    tokens += [Token(text, id, False) for text, id in trained.items() if id is not None]
    if len({token.id for token in tokens}) < len(tokens):
        raise QtuneError("Q223", "tokens.train names one token twice, by its text and by its name")
    return tuple(tokens)


def ids_of(tokenizer: Any, keys: TokenKeys, texts: Iterable[str] | None = None) -> dict[str, int]:
    """Text -> id of a recipe's tokens, or of some of them, as far as the tokenizer has them."""
    wanted = (*keys.add, *keys.train) if texts is None else tuple(texts)
    known = tokenizer.get_vocab() if wanted else {}
    found = {text: _id_of(text, tokenizer, known) for text in wanted}
    return {text: id for text, id in found.items() if id is not None}


def _ids(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _id_of(text: str, tokenizer: Any, known: dict[str, int]) -> int | None:
    """The id of a token by its name in the vocabulary, or by a text that is one token."""
    if text in known:
        return known[text]
    ids = _ids(text, tokenizer)
    return ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None


def unseen(tokens: Sequence[Token], examples: Iterable[Example]) -> list[str]:
    """The tokens that no example holds."""
    left = {token.id: token.text for token in tokens}
    for example in examples:
        if not left:
            break
        for id in left.keys() & set(example.input_ids):
            del left[id]
    return list(left.values())


def split_marks(template: str, tokenizer: Any) -> list[str]:
    """What looks like a special token in a chat template, and is none of the tokenizer's."""
    known = tokenizer.get_vocab()
    return [mark for mark in dict.fromkeys(MARK.findall(template)) if mark not in known]
