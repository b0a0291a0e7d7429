"""The sections of a recipe: what each key of data, tokens, calibrate, train and memory means and may hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .keys import key, shown
from .quant.calibrate import CODES

TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
PLACES = ("device", "host", "disk")


FORMATS = ("messages", "sharegpt", "glaive", "prompt", "alpaca", "text")
TOO_LONG = ("cut", "drop", "refuse")


@dataclass(frozen=True)
class Source:
    """One of several sources of data.train or data.eval, and how it is read where that is not as data.* says."""

    file: str = key("file", "a file, a folder or hf:owner/name")
    weight: float = key("number", "how often its examples are drawn in an epoch; 0.5: a seeded half", 1.0, above=0)
    format: str | None = key("choice", "in place of data.format", None, legal=FORMATS, null=True)
    columns: dict[str, str] | None = key("columns", "in place of data.columns", None, null=True)  # noqa: RUF009


Sources = str | tuple[Source, ...]  # as a recipe has it: one name, or a list


@dataclass(frozen=True)
class DataKeys:
    """What is learned from."""

    train: Sources | None = key(  # noqa: RUF009
        "sources", "training records; required for training. A list may give each source a weight", None, null=True,
        of=Source,
    )  # fmt: skip
    eval: Sources | None = key(  # noqa: RUF009
        "sources", "held-out records for the evaluation loss", None, null=True, of=Source
    )
    split: float | None = key(
        "number", "in place of data.eval: the part of data.train that is held out, chosen by content and seed", None,
        above=0, below=1, null=True,
    )  # fmt: skip
    split_seed: int | None = key("whole", "seed of the split; null: train.seed", None, low=0, null=True)
    format: str | None = key(
        "choice", "what the records are; null: recognised by their keys", None, legal=FORMATS, null=True
    )
    columns: dict[str, str] | None = key(  # noqa: RUF009
        "columns", "what the file calls the columns of a format, as in {prompt: question, completion: answer}", None,
        null=True,
    )  # fmt: skip
    system: str | None = key("text", "system prompt of conversations that have none", None, null=True)
    max_length: int = key("whole", "longest example in tokens", 512, low=2)
    too_long: str = key(
        "choice", "longer examples: cut on the right and counted, dropped and counted, or refused", "cut",
        legal=TOO_LONG,
    )  # fmt: skip
    loss_on: str = key(
        "choice", "what is learned: the answers, the last one of each conversation, or everything", "answer",
        legal=("answer", "last", "all"),
    )  # fmt: skip
    dedupe: bool = key("flag", "leave out records that are equal to an earlier one", False)
    template: str | None = key(
        "text", "a chat template, or a file with one, in place of the tokenizer's", None, null=True
    )


def entries(given: Sources) -> tuple[Source, ...]:
    """The sources of data.train or data.eval."""
    return (Source(given),) if isinstance(given, str) else given


def named(given: Sources | None) -> str:
    """What messages call them."""
    return ", ".join(source.file for source in entries(given)) if given is not None else ""


def moved(given: Sources | None, place: Callable[[str], str | None]) -> Sources | None:
    """The same sources elsewhere: `place` gives each file's new path."""
    if given is None or isinstance(given, str):
        return None if given is None else place(given)
    return tuple(replace(source, file=place(source.file) or source.file) for source in given)


@dataclass(frozen=True)
class TokenKeys:
    """Tokens whose own rows are trained beside the adapter: in the input table and in the output head."""

    add: tuple[str, ...] = key("words", "new tokens: a list, or a text file with one a line", ())
    train: tuple[str, ...] = key("words", "tokens that are there, whose rows are trained from what they are", ())
    special: bool = key("flag", "new tokens are special ones: left out of the text that chat and samples show", False)
    start: str = key(
        "choice", "first values of a new token's rows: the mean of all rows, or of those that its text was split into",
        "mean", legal=("mean", "text"),
    )  # fmt: skip

    def __bool__(self) -> bool:
        """Is there any?"""
        return bool(self.add or self.train)


@dataclass(frozen=True)
class CalibrateKeys:
    """How codes are chosen, and the text that tells what layers see: for codes and for starts that ask for it."""

    codes: str = key("choice", "how the codes of packed weights are chosen", "nearest", legal=CODES)
    data: str | None = key("file", "text to calibrate on, in a format of data.train; null: data.train", None, null=True)
    samples: int = key("whole", "windows of text", 64, low=1)
    length: int = key("whole", "tokens of a window", 512, low=2)


@dataclass(frozen=True)
class TrainKeys:
    """How it is learned. With neither steps nor epochs: one epoch."""

    steps: int | None = key("whole", "optimizer steps; set this or epochs", None, low=1, null=True)
    epochs: float | None = key(
        "number", "passes over the data, may be a fraction; set this or steps", None, above=0, null=True
    )
    micro_batch: int | None = key(
        "whole", "examples in one forward pass; null where micro_tokens says it", 4, low=1, null=True
    )
    micro_tokens: int | None = key(
        "whole", "in place of micro_batch: as many examples as fit into so many tokens, padding counted", None, low=2,
        null=True,
    )  # fmt: skip
    packing: bool = key(
        "flag", "lay the examples of a micro-batch end to end in one row of micro_tokens (where null: micro_batch x "
        "data.max_length), without padding; none sees another", False,
    )  # fmt: skip
    accumulate: int = key("whole", "micro-batches in one optimizer step", 1, low=1)
    lr: float = key("number", "peak learning rate", 2.0e-4, above=0)
    schedule: str = key("choice", "learning rate after the warmup", "cosine", legal=("constant", "linear", "cosine"))
    warmup: float = key("warmup", "rise of the learning rate: a fraction of the run if below 1, else steps", 0.03)
    weight_decay: float = key("number", "decoupled weight decay, of matrices only", 0.0, low=0)
    betas: tuple[float, float] | None = key(
        "betas", "two decay rates of the optimizer; null: 0.9 and 0.999, of lion 0.9 and 0.99; adafactor has none",
        None, null=True,
    )  # fmt: skip
    clip: float | None = key("number", "largest norm of the gradient; null: no clipping", 1.0, above=0, null=True)
    checkpointing: bool = key("flag", "recompute activations in the backward pass: less memory, more time", True)
    drop_backward: float = key(
        "number", "chance of each decoder layer to be left out of a backward pass (DropBP): less time; a plan counts a "
        "pass without", 0.0, low=0, below=1,
    )  # fmt: skip
    drop_keys: float = key(
        "number", "chance of each key to be hidden from all queries of its head (DropKey), in the upper half of the "
        "layers; 0.01 to 0.2 against overfitting", 0.0, low=0, below=1,
    )  # fmt: skip
    drop_hidden: float = key(
        "number", "chance of each value that an MLP gives to be zero (HiddenCut), in the upper half of the layers; "
        "0.01 to 0.2 against overfitting", 0.0, low=0, below=1,
    )  # fmt: skip
    consistency: float = key(
        "number", "with drop_keys or drop_hidden: a second forward pass, and times the divergence of the two is added "
        "to the loss (HiddenKey); 0.01 to 10", 0.0, low=0,
    )  # fmt: skip
    optimizer: str = key(
        "choice",
        "adamw; adamw8: two bytes of state a value; lion: one state, and wants a third to a tenth of adamw's lr; "
        "adafactor: states of rows and columns. bf16 weights have fp32 masters or, with adamw8, are rounded "
        "stochastically",
        "adamw",
        legal=("adamw", "adamw8", "lion", "adafactor"),
    )
    master_weights: bool = key(
        "flag", "keep bf16 weights in fp32 as well; without, updates below 1/256 of a weight are lost (not by adamw8, "
        "which needs none)", True,
    )  # fmt: skip
    update_in_backward: bool = key(
        "flag", "update each layer as soon as its gradient is whole and release that: no more than a layer's gradients "
        "are there; where a gradient is not finite, the layers above it are updated already",
        False,
    )  # fmt: skip
    max_skipped: int = key(
        "whole", "steps in a row that are skipped because loss or gradient is not finite; one more stops the run", 3,
        low=0,
    )  # fmt: skip
    label_smoothing: float = key(
        "number", "part of each target that is spread evenly over the vocabulary", 0.0, low=0, below=1
    )
    z_loss: float = key(
        "number", "times log(sum(exp(logits)))^2 is added at each trained position, as PaLM did with 1e-4", 0.0, low=0
    )
    seed: int = key("whole", "seed of first values, dropout and the order of the data", 0, low=0)
    eval_every: int | None = key("whole", "steps between evaluations; null: only at the end", None, low=1, null=True)
    eval_at_start: bool = key("flag", "with data.eval: also evaluate before the first step", True)
    save_every: int | None = key(
        "whole", "steps between checkpoints, from which --resume goes on; null: ten in a run", None, low=1, null=True
    )
    keep: int = key("whole", "checkpoints that stay, the newest", 2, low=1)
    keep_best: bool = key(
        "flag", "also keep the checkpoint of the evaluation with the lowest loss, and make it the run's adapter when "
        "the run is done; needs eval_every",
        False,
    )  # fmt: skip
    patience: int | None = key(
        "whole", "stop after so many evaluations in a row without a lower loss than the best before; needs eval_every",
        None, low=1, null=True,
    )  # fmt: skip
    log_every: int = key("whole", "steps between lines of metrics", 1, low=1)
    samples: int = key(
        "whole", "held-out prompts (of data.eval) that are continued before and after training, for the report", 3,
        low=0,
    )  # fmt: skip
    trackers: tuple[str, ...] = key(
        "choices", "who else gets each line of metrics, beside metrics.jsonl", (), legal=TRACKERS
    )
    report: bool = key("flag", "plan the peak, and write report.html into the run at its end", True)
    dry_step: bool | None = key(
        "flag", "before the first step, try the largest micro-batch of the data and forget it; null: on CUDA", None,
        null=True,
    )  # fmt: skip

    def faults(self) -> list[str]:
        """What is wrong with the learning itself, where each key alone is legal."""
        found = []
        if self.optimizer == "adafactor" and self.betas is not None:
            found.append(f"train.betas is {list(self.betas)}, which adafactor has not; legal: null")
        for name, given, only in (("accumulate", self.accumulate, 1), ("clip", self.clip, None)):
            if self.update_in_backward and given != only:
                found.append(
                    f"train.{name} is {given:g} with train.update_in_backward, when the whole gradient is never there; "
                    f"legal: {shown(only)}"
                )
        if self.consistency and not (self.drop_keys or self.drop_hidden):
            found.append(
                f"train.consistency is {self.consistency:g}, but both passes would be the same; legal: 0, or give "
                "train.drop_keys or train.drop_hidden"
            )
        return found


@dataclass(frozen=True)
class MemoryKeys:
    """What waits elsewhere than on the device, and what is done in parts. host: the machine's memory (on a CPU the same
    as device); disk: files in `folder`, mapped into memory and gone when the run ends."""

    weights: str = key(
        "choice", "where the decoder layers' packed weights wait; elsewhere than device: streamed layer by layer",
        "device", legal=PLACES,
    )  # fmt: skip
    boundaries: str = key(
        "choice", "with train.checkpointing: where each layer's input waits for the backward pass", "device",
        legal=PLACES,
    )  # fmt: skip
    embeddings: str = key("choice", "where the input table lies; rows are gathered there", "device", legal=PLACES[:2])
    optimizer: str = key(
        "choice", "where the optimizer's states and fp32 masters wait between updates", "device", legal=PLACES[:2]
    )
    mlp_tile: int | None = key(
        "whole", "tokens that go through a gated MLP at a time, and again in the backward pass; null: all", None,
        low=1, null=True,
    )  # fmt: skip
    loss_chunk: int | None = key(
        "whole", "trained positions whose logits are made at a time; null: by the vocabulary, on CUDA at least 512",
        None, low=1, null=True,
    )  # fmt: skip
    folder: str | None = key("text", "where the files of disk lie; null: output", None, null=True)
