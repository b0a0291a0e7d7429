"""A model's name -> its transformers configuration: what planning needs, without a weight.

A name is, in this order: a .gguf file, a folder with config.json, a name of the catalogue or how one alone of them
begins, a hub id (of which config.json alone is fetched). The catalogue is `configs/models/NAME.json`: the keys of a
publisher's config.json that make the architecture, and under `qtune` where they come from, the publisher's count of
parameters, and the other hub ids of the same shape with the keys that differ there. In a wheel it is
`qtune/_configs/models`.

`text_only` entries are the language model of a checkpoint that also holds a vision tower: they answer to their own name
only, as loading the hub id takes more memory than they tell.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from ..errors import QtuneError, one_of
from ..model.source import looks_like_hub_id, read_folder, read_gguf

ALSO_LEGAL = "a folder with config.json, a .gguf file or a hub id (owner/name)"


@dataclass(frozen=True)
class Model:
    """A model to plan for. name: of the catalogue entry, else as given. source: where the configuration lies, for the
    user. parameters: the publisher's count (tied weights once), None outside of the catalogue."""

    name: str
    config: Any
    source: str
    parameters: int | None = None


def find_model(name: str) -> Model:
    """The configuration of `name`. Raises QtuneError: no such model, or one that transformers cannot build."""
    path = Path(os.path.expanduser(name))  # unlike pathlib's, never an error
    if os.path.isfile(path):
        if path.suffix.lower() != ".gguf":
            raise QtuneError("Q302", f"{path} is a file, but no .gguf; legal: {ALSO_LEGAL}, or {_listed()}")
        return Model(name, read_gguf(path).config, str(path))
    if name and os.path.isdir(path) and ((path / "config.json").is_file() or name.lower() not in _entries()):
        return Model(name, read_folder(path, name, weights=False).config, str(path))
    if found := _entries().get(name.lower()):
        return _from_catalogue(*found)
    begin = sorted(one for one in catalogue() if name and one.startswith(name.lower()))
    if len(begin) == 1:
        return _from_catalogue(*_entries()[begin[0]])
    if begin:
        raise QtuneError("Q101", f"model {name!r} begins the names of several; say which: {', '.join(begin)}")
    if looks_like_hub_id(name):
        return Model(name, read_folder(_fetched(name), name, weights=False).config, f"hub id {name} (config.json only)")
    raise QtuneError("Q301", f"{one_of('model', name, known_models())}; also legal: {ALSO_LEGAL}")


def catalogue_hub(name: str) -> str | None:
    """The hub id that a bare name of the catalogue stands for; None for any other name."""
    found = None if "/" in name else _entries().get(name.lower())
    return found[1] if found else None


def known_models() -> list[str]:
    """The names of the catalogue, sorted."""
    return sorted(catalogue())


def catalogue() -> dict[str, Path]:
    """The file of every name of the catalogue."""
    return {path.stem: path for path in sorted(_folder().glob("*.json"))}


def _folder() -> Path:
    package = Path(__file__).resolve().parent.parent
    installed = package / "_configs"
    return (installed if installed.is_dir() else package.parent / "configs") / "models"


@functools.cache
def _entries() -> dict[str, tuple[str, str]]:
    """Everything, in lower case, that an entry answers to -> (its name, the hub id meant).

    An entry answers to its name, to its hub ids, and to what follows the owner in them.
    """
    found: dict[str, tuple[str, str]] = {}
    for name, path in catalogue().items():
        about = json.loads(path.read_text(encoding="utf-8"))["qtune"]
        ids = [] if about.get("text_only") else [about["hub"], *about.get("variants", ())]
        for hub in ids:
            found[hub.lower()] = found[hub.lower().partition("/")[2]] = (name, hub)
        found[name] = (name, about["hub"])
    return found


def _from_catalogue(name: str, hub: str) -> Model:
    raw = json.loads(catalogue()[name].read_text(encoding="utf-8"))
    about = raw.pop("qtune")
    raw.update(about.get("variants", {}).get(hub, {}))
    source = f"configs/models/{name}.json"
    if hub != about["hub"]:
        source += f", as {hub}"
    if about.get("text_only"):
        source += ", without the vision tower"
    config = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    return Model(name, config, source, about["parameters"])


def _fetched(name: str) -> Path:
    """The folder of the hub's cache that holds the config.json of `name`."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    cached = None
    try:
        cached = try_to_load_from_cache(name, "config.json")
        get_hf_file_metadata(hf_hub_url(name, "config.json"))  # one try: the download retries for 20 s
        return Path(hf_hub_download(name, "config.json")).parent
    except Exception as error:  # the hub client raises dozens of types, of three libraries
        if isinstance(cached, str):
            return Path(cached).parent
        reason = " ".join(str(error).split())[:300].rstrip(".")
        close = difflib.get_close_matches(name.lower().partition("/")[2], known_models(), n=1)
        hint = f"did you mean {close[0]!r} of the catalogue? " if close else ""
        raise QtuneError(
            "Q301",
            f"there is no folder {name!r} here, and config.json of the hub id {name!r} could not be fetched nor "
            f"found in the local cache: {type(error).__name__}: {reason}; {hint}legal: {ALSO_LEGAL}, or {_listed()}",
        ) from error


def _listed() -> str:
    return "a name of the catalogue: " + ", ".join(known_models())
