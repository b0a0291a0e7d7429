"""Recipe: a whole run as one YAML file or mapping, with `key=value` overrides on top.

Every fault is reported at once: unknown, doubled and missing keys, wrong types, values out of range, each with what was
given and what is legal.
What a key means and may hold stands once, in its dataclass field; `Recipe.keys()` lists them for the docs.
Relative paths are relative to the current folder; a file that is only found beside the recipe is taken from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from .adapters import METHODS, AdapterSpec
from .errors import QtuneError, one_of
from .keys import DATA_FILE, HUB, READERS, key, legal, read, shown
from .quant import Scheme, Storage, scheme_from, storage_from
from .quant.calibrate import refuses
from .sections import CalibrateKeys, DataKeys, MemoryKeys, Sources, TokenKeys, TrainKeys, entries, moved
from .yaml_text import dump_yaml, load_yaml

SCHEME, METHOD = "nf4", "lora"  # the defaults
Overrides = Iterable[str] | Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Recipe:
    """A run. `scheme` and `adapter` are the very objects that quantize and adapt."""

    model: str = key("text", "hub id, folder, or .gguf file")
    dtype: str = key("choice", "dtype of all that is not packed", "bfloat16", legal=("bfloat16", "float16", "float32"))
    device: str = key("device", "where to run; auto takes cuda, then mps, then cpu", "auto")
    scheme: Storage = key("storage", "how frozen weights are stored", factory=lambda: scheme_from(SCHEME))  # noqa: RUF009
    embeddings: Scheme | None = key("scheme", "embeddings and lm_head; null: dense", None, null=True)  # noqa: RUF009
    adapter: AdapterSpec = key("adapter", "what is trained", factory=lambda: _resolved(AdapterSpec(METHOD)))  # noqa: RUF009
    data: DataKeys = field(default_factory=DataKeys)
    tokens: TokenKeys = field(default_factory=TokenKeys)
    calibrate: CalibrateKeys = field(default_factory=CalibrateKeys)
    train: TrainKeys = field(default_factory=TrainKeys)
    memory: MemoryKeys = field(default_factory=MemoryKeys)
    budget: str | None = key(
        "size", "bytes that the run may take on its device; beyond it `train` does not start", None, null=True
    )
    output: str | None = key("text", "folder of the run; required for training", None, null=True)

    @classmethod
    def load(
        cls, source: str | Path | Mapping[str, Any], overrides: Overrides = (), *, training: bool = True
    ) -> Recipe:
        """A recipe from a YAML file, YAML text (a string with a line break) or a mapping, changed by `overrides`.

        overrides: "train.lr=1e-4" strings, values parsed as YAML, or a mapping {"train.lr": 1e-4}. `training`: also ask
        for what training needs (data.train, output, data files that exist). Raises one QtuneError with every fault.
        """
        faults: list[str] = []
        name, folder, tree = _tree(source, faults)
        if tree is not None:
            _override(tree, overrides, faults)
            recipe = _Reader(faults, folder, training).recipe(tree)
            if recipe is not None:
                return recipe
        raise QtuneError(
            "Q105", f"{name} has {len(faults)} fault{'s' * (len(faults) > 1)}:" + "".join(f"\n  {f}" for f in faults)
        )

    def with_(self, overrides: Overrides, *, training: bool = False) -> Recipe:
        """This recipe with `overrides` (as in `load`), checked again."""
        return Recipe.load(self.to_dict(), overrides, training=training)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every key present: `Recipe.load` reads it back as an equal recipe."""
        embeddings = self.embeddings.to_dict() if self.embeddings else None
        return {
            "model": self.model,
            "dtype": self.dtype,
            "device": self.device,
            "scheme": {**self.scheme.to_dict(), "embeddings": embeddings},
            "adapter": self.adapter.to_dict(),
            "data": asdict(self.data),
            "tokens": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.tokens).items()},
            "calibrate": asdict(self.calibrate),
            "train": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.train).items()},
            "memory": asdict(self.memory),
            "budget": self.budget,
            "output": self.output,
        }

    def to_yaml(self) -> str:
        """The resolved recipe as YAML text."""
        return dump_yaml(self.to_dict())

    @classmethod
    def keys(cls) -> list[KeyRow]:
        """Every key with its default, legal values and meaning, in the order of `to_yaml`."""
        rows = []
        for f in fields(cls):
            prefix = f"{f.name}." if f.name in SECTIONS else "scheme." if f.name == "embeddings" else ""
            for k in fields(SECTIONS[f.name]) if f.name in SECTIONS else (f,):
                default = (
                    "required" if k.name == "model" else {"scheme": SCHEME, "adapter": METHOD}.get(k.name, k.default)
                )
                rows.append(KeyRow(prefix + k.name, default, legal(k.metadata), k.metadata["doc"]))
        return rows


class KeyRow(NamedTuple):
    """One key as the docs show it."""

    name: str
    default: Any
    legal: str
    doc: str


SECTIONS: dict[str, type[Any]] = {
    "data": DataKeys, "tokens": TokenKeys, "calibrate": CalibrateKeys, "train": TrainKeys, "memory": MemoryKeys,
}  # fmt: skip
TOP = [f.name for f in fields(Recipe) if f.name != "embeddings"]
EITHER = (("steps", "epochs"), ("micro_batch", "micro_tokens"))  # of `train`, not both
_SHORT = {("scheme",): "name", ("scheme", "embeddings"): "name", ("adapter",): "method"}  # what a mere name stands for


def _tree(source: str | Path | Mapping[str, Any], faults: list[str]) -> tuple[str, Path | None, dict[str, Any] | None]:
    """(what to call the source, its folder, its plain values or None)."""
    if isinstance(source, Mapping):
        return "recipe", None, _copied(source)
    name, folder = "recipe", None
    if isinstance(source, Path) or "\n" not in source:
        name = str(source)
        try:
            path = Path(source).expanduser()
            folder, source = path.parent, path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError, RuntimeError) as error:  # RuntimeError: ~user without a home
            why = "no text in UTF-8" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", None)
            raise QtuneError("Q104", f"cannot read the recipe {name}: {why or error}") from error
    count = len(faults)
    value = load_yaml(source, faults)
    if value is None and len(faults) == count:
        value = {}
    if value is not None and not isinstance(value, dict):
        faults.append(f"is {shown(value)}; legal: a mapping with the keys {', '.join(TOP)}")
    return name, folder, value if isinstance(value, dict) else None


def _copied(value: Any) -> Any:
    """Mappings as new dicts, so that overrides do not reach the caller's."""
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _override(tree: dict[str, Any], overrides: Overrides, faults: list[str]) -> None:
    """Write `overrides` into `tree`. One of two keys that exclude each other clears the other, if only it is given."""
    pairs: list[tuple[str, Any]] = list(overrides.items()) if isinstance(overrides, Mapping) else []
    for text in () if isinstance(overrides, Mapping) else overrides:
        name, sign, value = text.partition("=")
        if not sign or not name.strip():
            faults.append(f"override {text!r} is not of the form key=value, as in train.lr=1e-4")
            continue
        wrong: list[str] = []
        parsed = load_yaml(value, wrong)
        faults += [f"override {text!r}: {fault}" for fault in wrong]
        pairs += [] if wrong else [(name.strip(), parsed)]
    for name, value in sorted(pairs, key=lambda pair: pair[0].count(".")):  # a whole section before keys inside it
        _put(tree, tuple(name.split(".")), value, faults)
    given = {name for name, value in pairs if value is not None}
    for one, other in (*EITHER, *(pair[::-1] for pair in EITHER)):
        if f"train.{one}" in given and f"train.{other}" not in given and isinstance(tree.get("train"), dict):
            tree["train"].pop(other, None)


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any, faults: list[str]) -> None:
    """Set one dotted key, making sections on the way: `scheme: int8` becomes {name: int8} when scheme.block is set."""
    for depth, part in enumerate(path[:-1], 1):
        inner = tree.get(part)
        if isinstance(inner, str) and path[:depth] in _SHORT:
            inner = {_SHORT[path[:depth]]: inner}
        if inner is not None and not isinstance(inner, dict):
            faults.append(
                f"override {'.'.join(path)}: {'.'.join(path[:depth])} is {shown(inner)}, not a section with keys"
            )
            return
        tree[part] = tree = inner if inner is not None else {}
    tree[path[-1]] = _copied(value)


class _Reader:
    """Turns a tree of plain values into a Recipe, collecting faults."""

    def __init__(self, faults: list[str], folder: Path | None, training: bool) -> None:
        self.faults, self.folder, self.training = faults, folder, training

    def recipe(self, tree: dict[str, Any]) -> Recipe | None:
        """None if there are faults."""
        self._known("", tree, TOP)
        plain = {f.name: f for f in fields(Recipe) if f.metadata.get("kind") in READERS}
        values = {name: read(f, name, tree[name], self.faults) for name, f in plain.items() if name in tree}
        if "model" not in tree:
            self.faults.append(f"model is missing; legal: {plain['model'].metadata['doc']}")
        values["model"] = self._beside(values.get("model"))
        values["scheme"], values["embeddings"] = self._schemes(tree.get("scheme"))
        values["adapter"] = self._adapter(tree.get("adapter"))
        if isinstance(tokens := tree.get("tokens"), dict):  # files of tokens
            tree["tokens"] = {name: self._beside(value) for name, value in tokens.items()}
        data, tokens, calibrate, train, memory = (
            self._section(name, section, tree.get(name)) for name, section in SECTIONS.items()
        )
        values["data"], values["memory"] = self._data(data), memory
        values["tokens"] = self._tokens(tokens, str(values["model"]))
        values["train"] = self._train(train, data, tree.get("train"))
        values["calibrate"] = replace(calibrate, data=self._beside(calibrate.data))
        self._together(values["scheme"], values["adapter"], calibrate.codes)
        for name, place, why in (
            ("weights", memory.weights, "streamed weights come back in the backward pass with the recomputation of"),
            ("boundaries", memory.boundaries, "only where layers are recomputed are there inputs that wait, those of"),
        ):
            if place != "device" and not train.checkpointing:
                self.faults.append(
                    f"memory.{name} is {place}, train.checkpointing is false: {why} their layer; legal: "
                    "train.checkpointing true"
                )
        self._file("calibrate.data", values["calibrate"].data)
        if self.training and values.get("output") is None and tree.get("output") is None:
            self.faults.append("output is missing; legal: the folder that the run is written to")
        return None if self.faults else Recipe(**values)

    def _section(self, name: str, section: type[Any], tree: Any) -> Any:
        tree = {} if tree is None else tree
        names = [f.name for f in fields(section)]
        if not isinstance(tree, dict):
            self.faults.append(f"{name} is {shown(tree)}; legal: a mapping with the keys {', '.join(names)}")
            tree = {}
        self._known(f"{name}: ", tree, names)
        given = [f for f in fields(section) if f.name in tree]
        return section(**{f.name: read(f, f"{name}.{f.name}", tree[f.name], self.faults) for f in given})

    def _known(self, prefix: str, tree: dict[str, Any], names: list[str]) -> None:
        """A fault for each key that does not exist, with the section that it belongs to, if any."""
        for given in tree:
            if given in names:
                continue
            homes = [f"{s}.{given}" for s, cls in SECTIONS.items() if given in {f.name for f in fields(cls)}]
            homes += [f"{given} at the top"] * (given in TOP) + ["scheme.embeddings"] * (given == "embeddings")
            hint = "".join(f"; it is called {home}" for home in homes)
            self.faults.append(f"{prefix}{one_of('key', given, names)}{hint}")

    def _schemes(self, value: Any) -> tuple[Storage | None, Scheme | None]:
        value = dict(value) if isinstance(value, dict) else SCHEME if value is None else value
        embeddings = value.pop("embeddings", None) if isinstance(value, dict) else None
        if isinstance(value, dict) and not {"default", "bits"} & set(value):
            value = {"name": SCHEME, **value}
        table = None if embeddings is None else self._scheme("scheme.embeddings", embeddings, scheme_from)
        return self._scheme("scheme", value, storage_from), table

    def _scheme(self, name: str, value: Any, reader: Callable[[Any], T]) -> T | None:
        try:
            return reader(value)
        except (QtuneError, TypeError) as error:  # TypeError: a name that is a list, say
            self.faults.append(f"{name}: {error}")
            return None

    def _adapter(self, value: Any) -> AdapterSpec | None:
        tree = {"method": value} if isinstance(value, str) else {} if value is None else value
        if not isinstance(tree, dict):
            self.faults.append(
                f"adapter is {shown(value)}; legal: a method's name or {{method: ..., targets: ..., options}}"
            )
            return None
        targets, method = tree.get("targets"), tree.get("method", METHOD)
        many = isinstance(targets, (list, tuple)) and all(isinstance(t, str) and t for t in targets)
        if not (targets is None or isinstance(targets, str) or many):
            self.faults.append(
                f"adapter.targets is {shown(targets)}; legal: all-linear, a name pattern, or a list of patterns"
            )
        if not isinstance(method, str):
            self.faults.append(str(one_of("adapter method", method, METHODS)))
            return None
        spec = AdapterSpec.from_dict({k: v for k, v in tree.items() if k != "targets" or many or isinstance(v, str)})
        faults = spec.faults()
        self.faults += [fault if fault.startswith("adapter") else f"adapter: {fault}" for fault in faults]
        return None if faults else _resolved(spec)

    def _together(self, scheme: Storage | None, adapter: AdapterSpec | None, codes: str) -> None:
        """For training, what makes no sense on a scheme; of a mixture the model's layers tell."""
        if self.training and isinstance(scheme, Scheme):
            if adapter is not None and (why := METHODS[adapter.method].refuses(scheme, adapter.resolved())):
                self.faults.append(f"adapter.method is {adapter.method}, scheme is {scheme}: {why}")
            if why := refuses(scheme, codes):
                self.faults.append(f"calibrate.codes is {codes}: {why}")

    def _data(self, data: DataKeys) -> DataKeys:
        """Paths found; for training, also that there are such files."""
        template = self._beside(data.template) if data.template and "{" not in data.template else data.template
        train, held_out = moved(data.train, self._beside), moved(data.eval, self._beside)
        data = replace(data, train=train, eval=held_out, template=template)
        if data.eval is not None and data.split is not None:
            self.faults.append(
                f"data.split is {data.split:g}, but data.eval says what is held out; legal: one of the two, the other "
                "null"
            )
        if data.split_seed is not None and data.split is None:
            self.faults.append(f"data.split_seed is {data.split_seed}, but data.split is null; legal: null, or both")
        if data.eval is not None and any(source.weight != 1 for source in entries(data.eval)):
            self.faults.append("data.eval gives weights, but each held-out record counts once; legal: without weight")
        if not self.training:
            return data
        if data.train is None and not any(fault.startswith(("data.train is", "data is")) for fault in self.faults):
            self.faults.append(f"data.train is missing; legal: {DATA_FILE}")
        self._file("data.train", data.train)
        self._file("data.eval", data.eval)
        return data

    def _tokens(self, tokens: TokenKeys, model: str) -> TokenKeys:
        without = {"special": (tokens.special, False), "start": (tokens.start, "mean")} if not tokens.add else {}
        self.faults += [
            f"tokens.{name} is {str(given).lower()}, and tokens.add names no new token; legal: {str(only).lower()}, "
            "or give tokens.add"
            for name, (given, only) in without.items()
            if given != only
        ]
        self.faults += [f"{word!r} is in tokens.add and in tokens.train" for word in tokens.add if word in tokens.train]
        if tokens and model.lower().endswith(".gguf"):
            self.faults.append(f"tokens are given, and {model} holds its tokenizer itself; legal: the original model")
        return tokens

    def _file(self, name: str, given: Sources | None) -> None:
        """For training, a fault where there is no such file or folder."""
        for source in entries(given) if self.training and given is not None else ():
            if source.file.startswith(HUB) or Path(source.file).expanduser().exists():
                continue
            beside = f" nor beside the recipe in {self.folder.resolve()}" if self.folder is not None else ""
            self.faults.append(f"{name} is {source.file!r}: no such file in {Path.cwd()}{beside}; legal: {DATA_FILE}")

    def _train(self, train: TrainKeys, data: DataKeys, given: Any) -> TrainKeys:
        """What concerns several keys of `train`. given: the section as it was written."""
        train = self._micro_batch(train, data.max_length, given if isinstance(given, dict) else {})
        if train.steps is not None and train.epochs is not None:
            self.faults.append(
                f"train.steps is {train.steps} and train.epochs is {train.epochs:g}; "
                "legal: one of the two, the other null"
            )
        if train.steps is not None and train.warmup >= max(train.steps, 1):
            self.faults.append(
                f"train.warmup is {train.warmup:g} steps of train.steps = {train.steps}; legal: fewer than that"
            )
        if train.eval_every is not None and data.eval is None and data.split is None:
            self.faults.append(
                f"train.eval_every is {train.eval_every}, but data.eval is null; legal: null, or give data.eval or "
                "data.split"
            )
        for name, given, what in (
            ("patience", train.patience, "no evaluation to wait for"),
            ("keep_best", train.keep_best, "nothing to choose from"),
        ):
            if given and train.eval_every is None:
                self.faults.append(
                    f"train.{name} is {str(given).lower()}, but train.eval_every is null: there is {what}; "
                    f"legal: {'false' if given is True else 'null'}, or give train.eval_every"
                )
        self.faults += train.faults()
        return replace(train, epochs=1.0) if train.steps is None and train.epochs is None else train

    def _micro_batch(self, train: TrainKeys, length: int, given: dict[str, Any]) -> TrainKeys:
        """micro_batch is there by default; where micro_tokens is given it must not be, and is null. Packed rows are
        counted in tokens alone."""
        if train.micro_tokens is None:
            if train.micro_batch is None:
                self.faults.append("train.micro_batch and train.micro_tokens are both null; legal: a number for one")
            rows = train.micro_batch or 1
            packed = train.packing
            return replace(train, micro_tokens=rows * length if packed else None, micro_batch=None if packed else rows)
        if given.get("micro_batch") is not None:
            self.faults.append(
                f"train.micro_batch is {given['micro_batch']} and train.micro_tokens is {train.micro_tokens}; "
                "legal: one of the two, the other null"
            )
        return replace(train, micro_batch=None)

    def _beside(self, value: Any) -> Any:
        """A path that exists only beside the recipe, as the path from here; anything else as it is."""
        if isinstance(value, str) and self.folder is not None and not Path(value).expanduser().exists():
            beside = self.folder / value
            return str(beside) if beside.exists() else value
        return value


def _resolved(spec: AdapterSpec) -> AdapterSpec:
    """The spec with everything written out that was left to the method's defaults."""
    method = METHODS[spec.method]
    defaults = {name: parameter.default for name, parameter in method.options().items()}
    return replace(spec, targets=spec.targets or method.targets, options={**defaults, **spec.options})
