"""One training step: forward, loss, backward, clip, optimizer. What a plan traces is what training runs.

The loss of a step is the sum over all trained tokens of all its micro-batches divided by their number, so that two
micro-batches of one sample equal one of two, whatever their lengths (transformers' trainer had this wrong until
4.46).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .adapters import METHODS, adapted_sites
from .errors import QtuneError
from .loss import LossOptions, Transform, cross_entropy_sum, logit_transform, trained_tokens
from .memory import keep_freed_memory, return_freed_memory
from .memory.boundaries import Away, Boundaries, boundaries_of
from .memory.layers import device_of, layers_of, leave_layers, run_layers
from .memory.tiles import tile_mlps, whole_mlps
from .model import dropping
from .model.apart import keep_apart, positions, told
from .model.fused import fuse, use_own_attention
from .optim import Optimizer
from .sections import MemoryKeys, TrainKeys

SHORT = 128  # tokens: up to here plain attention is faster on a CPU than the fused kernel


class NonFinite(QtuneError):
    """The loss or a gradient is NaN or infinite; the weights are still those before the step. (With an optimizer that
    updates in the backward pass: of the layers below the one where the gradient is not finite.)"""


class BatchLike(Protocol):
    """input_ids, attention_mask, labels: int64 [batch, seq]; labels -100 where not trained. One that is packed also
    has `lengths`, of the examples in its one row."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def attention_mask(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...


@dataclass(frozen=True)
class StepResult:
    """loss: mean over trained tokens; grad_norm: before clipping; tokens: padding left out; factor: on the learning
    rate, the method's own part included."""

    loss: float
    grad_norm: float
    tokens: int
    trained: int
    factor: float


class LanguageModel:
    """A transformers causal model seen as body and head, so that the loss can be taken in chunks; its norms, gated
    MLPs and rotary embeddings become our faster twins (`model.fused`). loss: how it is taken in training."""

    def __init__(self, model: Any, loss: LossOptions = LossOptions()) -> None:  # noqa: B008  (frozen)
        self.model, self.loss = model, loss
        self.config = model.config
        self.fused = fuse(model)
        self.transform: Transform = logit_transform(model.config.get_text_config())

    @property
    def head(self) -> nn.Module:
        """The output embedding: whatever stands there now, adapted or not."""
        return self.model.get_output_embeddings()

    def hidden(self, input_ids: Tensor, attention_mask: Tensor, lengths: Sequence[int] = ()) -> Tensor:
        """Last hidden states [batch, seq, hidden], after the final norm. lengths: of the examples that lie end to end
        in the one row, none of which sees another (after `keep_apart`)."""
        given = {"attention_mask": attention_mask}
        if lengths:
            given = {"attention_mask": told(lengths), "position_ids": positions(lengths, input_ids.device)}
        return self.model.base_model(input_ids=input_ids, use_cache=False, **given).last_hidden_state

    def logits(self, input_ids: Tensor, attention_mask: Tensor, lengths: Sequence[int] = ()) -> Tensor:
        """Full logits [batch, seq, vocabulary], as the loss sees them."""
        return self.transform(self.head(self.hidden(input_ids, attention_mask, lengths)))

    def loss_sum(self, batch: BatchLike, *, plain: bool = False) -> Tensor:
        """Summed loss over the trained positions of a batch, fp32 scalar. plain: the likelihood alone, without label
        smoothing and z-loss, as evaluation reports it."""
        given = batch.input_ids, batch.attention_mask, getattr(batch, "lengths", ())
        options = self.loss.plain() if plain else self.loss
        vocabulary = self.config.get_text_config().vocab_size
        other = None
        if options.consistency and torch.is_grad_enabled():
            with torch.no_grad():  # other keys and values are left out, and nothing is kept
                other = self.hidden(*given)
        return cross_entropy_sum(
            self.hidden(*given), batch.labels, self.head, vocabulary, self.transform, options, other
        )  # fmt: skip

    def choose_attention(
        self, longest: int, device: torch.device | None = None, *, packed: bool = False, dropped: bool = False
    ) -> str:
        """On a CPU: our kernel where it runs; else, where no sequence is longer than SHORT, plain products. device:
        where the model will run, if it is not there yet. packed: rows may hold several examples. dropped: keys will be
        left out, which plain products, inside of a model, cannot.

        torch's fused CPU kernel has a slow backward, and for short sequences the scores that the plain form keeps are
        small. Returns what was chosen, in words; '' where the model keeps what it has.
        """
        device = device or device_of(self.model)
        own = use_own_attention(self.model, device)
        if packed:
            keep_apart(self.model)
            return f"{'qtune' if own else 'torch'}'s kernel, on each example of a row by itself"
        if own:
            return "qtune's kernel"
        if device.type != "cpu" or longest > SHORT or dropped or self.model.config._attn_implementation != "sdpa":
            return ""
        self.model.set_attn_implementation("eager")
        return f"plain products, no example has more than {SHORT} tokens"

    def arrange(self, train: TrainKeys, memory: MemoryKeys, folder: Path, kind: str | None = None) -> None:
        """Train as the keys of a recipe ask: layers recomputed or not, their inputs kept where told, MLPs in tiles.
        folder: of files; kind: of the device that it stands for, if it is on meta. Raises QtuneError for a key that
        cannot be done with this model."""
        device = device_of(self.model)
        away = boundaries_of(memory.boundaries, kind or device.type, device, folder)
        self.checkpointing(away if train.checkpointing else None)
        if train.drop_backward:
            self.drop_backward(train.drop_backward)
        dropping.begin(self.model, train.drop_keys, train.drop_hidden)
        if memory.mlp_tile is not None and not tile_mlps(self.model, memory.mlp_tile):
            raise QtuneError(
                "Q505",
                f"memory.mlp_tile is {memory.mlp_tile:,}, and {type(self.model).__name__} has no gated MLP that could "
                "run in tiles; legal: null",
            )

    def restore(self) -> None:
        """Undo `arrange`."""
        if (layers := layers_of(self.model)) is not None:
            layers.drop = 0.0
        self.checkpointing(None)
        dropping.end(self.model)
        whole_mlps(self.model)

    def drop_backward(self, chance: float) -> None:
        """In training mode, leave each layer by this chance out of a backward; on meta none is: a plan is of the whole.
        Raises QtuneError where layers cannot be run one by one, and for a method that reads every gradient."""
        method = METHODS[next(iter(adapted_sites(self.model).values())).adapter.method]
        if method.has_own("see_gradients"):
            raise QtuneError(
                "Q103",
                f"train.drop_backward is {chance:g}, and adapter method {method.method} reads the gradients of all "
                "layers at each step; legal: train.drop_backward 0, or another method",
            )
        layers = layers_of(self.model) or run_layers(self.model)
        layers.drop = 0.0 if device_of(self.model).type == "meta" else chance

    def checkpointing(self, boundaries: Boundaries | None) -> None:
        """In training mode, recompute each layer in the backward pass, its input kept by `boundaries`; None: do not.
        A model whose layers cannot be run one by one is left to transformers' own checkpointing; raises QtuneError
        where its boundaries should wait elsewhere."""
        model = self.model
        try:
            layers = layers_of(model) or run_layers(model)
        except QtuneError:
            if isinstance(boundaries, Away):
                raise
            if boundaries is not None:  # renamed in transformers 5.2x; the older name warns there
                enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
                enable({"use_reentrant": False})
            else:
                disable = getattr(model, "activation_checkpointing_disable", None)
                (disable or model.gradient_checkpointing_disable)()
            return
        layers.recompute(boundaries)
        if boundaries is None and not layers.streams:
            leave_layers(model)

    @torch.no_grad()
    def check(self) -> None:
        """Raises QtuneError where body, head and transform do not give the model's own logits: an architecture that
        does more after its head."""
        device = device_of(self.model)
        ids = torch.arange(8, device=device).unsqueeze(0)
        mode = self.model.training
        self.model.eval()
        own = self.model(input_ids=ids, use_cache=False).logits
        ours = self.logits(ids, torch.ones_like(ids))
        self.model.train(mode)
        if not torch.allclose(own.float(), ours.float(), rtol=1e-2, atol=1e-2 * float(own.abs().max())):
            raise QtuneError(
                "Q709",
                f"{type(self.model).__name__} changes its logits in a way that qtune does not know; "
                "training it would be wrong",
            )

    @torch.no_grad()
    def check_apart(self) -> None:
        """Raises QtuneError where an example in a packed row does not compute what it computes alone."""
        ids = torch.arange(8, 20, device=device_of(self.model)).unsqueeze(0)
        lengths = (7, 5)
        mode = self.model.training
        self.model.eval()
        packed = self.logits(ids, torch.ones_like(ids), lengths)
        parts = ids.split(lengths, 1)
        alone = torch.cat([self.logits(part, torch.ones_like(part)) for part in parts], 1)
        self.model.train(mode)
        if not torch.allclose(packed.float(), alone.float(), rtol=1e-2, atol=2e-2 * float(alone.abs().max())):
            raise QtuneError(
                "Q703",
                f"{type(self.model).__name__} lets examples of a packed row see each other; set train.packing to false",
            )


class TrainStep:
    """Runs optimizer steps over micro-batches. Holds no data and no schedule.

    On a CPU the process keeps from then on what it frees, for time, or where weights are streamed gives it back.
    """

    def __init__(self, model: LanguageModel, optimizer: Optimizer, *, clip: float | None) -> None:
        self.model, self.optimizer, self.clip = model, optimizer, clip
        self.sites = {name: site.adapter for name, site in adapted_sites(model.model).items()}
        self.method = METHODS[next(iter(self.sites.values())).method]
        late = {"penalty": "a penalty, whose gradient comes after the loss's",
                "see_gradients": "to see all gradients before the update"}  # fmt: skip
        if optimizer.early and (why := [text for name, text in late.items() if self.method.has_own(name)]):
            raise QtuneError(
                "Q708",
                f"adapter method {self.method.method} has {' and '.join(why)}; set train.update_in_backward to false",
            )
        if device_of(model.model).type == "cpu":
            layers = layers_of(model.model)
            (return_freed_memory if layers is not None and layers.streams else keep_freed_memory)()

    def __call__(self, batches: Sequence[BatchLike], step: int, steps: int, factor: float) -> StepResult:
        """One optimizer step, 1-based `step` of `steps`, at `factor` times the learning rate. Raises NonFinite before
        any weight changes."""
        factor *= self.method.warmth(self.sites, step, steps)
        self.optimizer.follow(self.method.before_step(self.sites, step, steps))
        total, tokens, trained = self.gradients(batches, factor)
        total += self.penalty()
        norm = self.update(total, step, steps, factor)
        return StepResult(total, norm, tokens, trained, factor)

    def gradients(self, batches: Sequence[BatchLike], factor: float | None = None) -> tuple[float, int, int]:
        """First half of a step: the gradients of all micro-batches. Returns loss, tokens and trained tokens.

        factor: of the learning rate, for an optimizer that updates in the backward pass; None: nothing is updated.
        """
        self.optimizer.begin(factor)
        trained = sum(trained_tokens(batch.labels) for batch in batches)
        tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
        losses = []
        for batch in batches:
            loss = self.model.loss_sum(batch) / max(1, trained)
            losses.append(loss.detach())
            if self.optimizer.early and not math.isfinite(loss.item()):
                break  # before any weight changes
            loss.backward()
        return sum(loss.item() for loss in losses), tokens, trained  # reading waits for a GPU

    def update(self, total: float, step: int, steps: int, factor: float) -> float:
        """Second half: clip, optimizer, the method's own part. total: the loss. Returns the gradient's norm."""
        norm = self.optimizer.norm(math.inf if self.clip is None else self.clip)
        if not (math.isfinite(total) and math.isfinite(norm)):
            self.optimizer.drop_gradients()
            raise NonFinite("Q701", f"step {step}: loss is {total}, gradient norm is {norm}")
        self.method.see_gradients(self.sites, step, steps)
        self.optimizer.step(factor)
        self.optimizer.follow(self.method.after_step(self.sites, step, steps))
        return norm

    def penalty(self) -> float:
        """Behind the gradients of all micro-batches: those of the adapters' penalties, added. Returns their sum."""
        terms = [term for adapter in self.sites.values() if (term := adapter.penalty()) is not None]
        if not terms:
            return 0.0
        penalty = torch.stack(terms).sum()
        penalty.backward()
        return penalty.item()
