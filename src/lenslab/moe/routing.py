"""Which experts a mixture of experts sends each token to, read where it is decided.

How `capture_routing` works:
1. find the routers: modules of a family in `SCORES` beside a module of experts;
2. run the texts, padded on the right whatever the batch says: neither other texts nor padding
   change what a token gets, even where an expert takes only so many tokens of a text (Switch);
3. catch what each router gives by PyTorch's hooks on Hugging Face's own module: TransformerLens's
   hooks there hold other things in other families, and cannot be edited;
4. sort the ranks, the largest weight first, and check on every pass that logits are logits and that
   the weights follow from them (`read_router`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, Shaped
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformer_lens.model_bridge import TransformerBridge as Model

from lenslab.capture import check_batch, texts_per_pass
from lenslab.files import atomic_write
from lenslab.hooks import check_unhooked
from lenslab.models import check_eval, model_name
from lenslab.runtime import progress_bar
from lenslab.tokens import TokenBatch

SOFTMAX = "Olmoe Mixtral Qwen2Moe Qwen3Moe Qwen3_5Moe DeepseekV2 GptOss GraniteMoe GraniteMoeHybrid"
SOFTMAX += " Ernie4_5_Moe Gemma4Text SwitchTransformers"
SIGMOID = "DeepseekV3 Glm4Moe Glm4MoeLite Lfm2Moe NemotronH"
# Family -> the weights of a token's experts are to each other as these, of their logits
SCORES = dict.fromkeys(SOFTMAX.split(), torch.exp) | dict.fromkeys(SIGMOID.split(), torch.sigmoid)
PROJECTIONS = {"Gemma4Text": "proj", "SwitchTransformers": "classifier"}  # else the router
FAMILY = re.compile(r"(\w+?)(?:Top[kK1])?Router")
LAYER = re.compile(r"(?:^|\.)(?:layers|block)\.(\d+)\.")
TOLERANCE = 0.02  # of weights against logits: bfloat16 rounds each by up to .004
PASS = 16  # texts per forward pass at most
ORIGIN = ("text", "position", "token")
FLOATS = ("weights", "logits", "inputs")

Codes = Int[np.ndarray, " token"]  # numbers from 0


class NoRouting(ValueError):
    """A model without routers, with some that are unknown here, or without what was asked for."""


@dataclass(frozen=True, eq=False)
class Routing:
    """The experts of every real token at every layer that has some; rows by text, then position."""

    # -1: none, since the expert was full (Switch)
    ids: Int[np.ndarray, "token layer rank"] = field(repr=False)
    # as they are used, the largest first
    weights: Float[np.ndarray, "token layer rank"] = field(repr=False)
    layers: tuple[int, ...]  # numbers of the layers
    n_experts: int
    text: Codes = field(repr=False)
    position: Codes = field(repr=False)  # within the text, BOS included
    token: Codes = field(repr=False)  # its id
    logits: Float[np.ndarray, "token layer expert"] | None = field(default=None, repr=False)
    # what the routers read
    inputs: Float[np.ndarray, "token layer d_model"] | None = field(default=None, repr=False)
    model: str = ""

    def __post_init__(self) -> None:
        shape = (len(self.token), len(self.layers), self.ids.shape[2])
        if not shape == self.ids.shape == self.weights.shape or not len(self.token):
            raise ValueError("Ids and weights are [token, layer, rank], of one token or more.")
        if len(beyond := self.ids[(self.ids < -1) | (self.ids >= self.n_experts)]):
            raise ValueError(f"Expert {beyond[0]} is out of range: 0 to {self.n_experts - 1}.")

    def __getitem__(self, rows: slice | Shaped[np.ndarray, " row"]) -> Routing:
        """The routing of some tokens, by slice, indices or a mask."""
        values = {name: getattr(self, name) for name in ("ids", *ORIGIN, *FLOATS)}
        return replace(self, **{name: v[rows] for name, v in values.items() if v is not None})

    def to_frame(self) -> pd.DataFrame:
        """One row per token, layer and rank: `text`, `position`, `token`, `layer`, `rank` (1 is the
        largest weight), `expert` (-1 where it was full) and `weight`. Of its columns,
        `pd.crosstab([layer, token], expert)` are the slots of every token of the vocabulary."""
        token, layer, rank = (index.ravel() for index in np.indices(self.ids.shape))
        table = pd.DataFrame({name: getattr(self, name)[token] for name in ORIGIN})
        table = table.assign(layer=np.array(self.layers)[layer], rank=rank + 1)
        return table.assign(expert=self.ids.ravel(), weight=self.weights.ravel())

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> dict[str, float]:
        """Write everything as safetensors, for `load_routing`, floats as `dtype`. Returns the
        largest error that this makes in each array, in its units; the file's metadata states it
        too. ValueError for values that the dtype cannot hold. As Parquet, for any program:
        `to_frame().to_parquet(path)`, which keeps float32."""
        held, error = {n: getattr(self, n) for n in ("ids", *ORIGIN, *FLOATS)}, {}
        stored = {n: torch.as_tensor(v).contiguous() for n, v in held.items() if v is not None}
        for name in (name for name in FLOATS if name in stored):
            exact, stored[name] = stored[name], stored[name].to(dtype)
            error[name] = float((stored[name].double() - exact.double()).abs().max())
            if not np.isfinite(error[name]):
                raise ValueError(f"{name} are too large for {dtype}: take bfloat16 or float32.")
        facts = {name: getattr(self, name) for name in ("layers", "n_experts", "model")}
        told = {"facts": json.dumps(facts), "error": json.dumps(error), "dtype": str(dtype)}
        with atomic_write(path) as temporary:
            save_file(stored, temporary, told)
        return error


def load_routing(path: str | Path) -> Routing:
    """What `Routing.save` wrote as `.safetensors`, floats as float32."""
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
        arrays = {name: file.get_tensor(name) for name in file.offset_keys()}
    values = {n: (v.float() if v.is_floating_point() else v).numpy() for n, v in arrays.items()}
    return Routing(**values | facts | {"layers": tuple(facts["layers"])})


def training_routing(path: str | Path, batch: TokenBatch) -> dict[int, Routing]:
    """The routing of the batch's texts at every checkpoint, by step, of a table such as
    `data/models/pocket-moe/routing.parquet`. ValueError where that is of other texts or tokens."""
    table = pd.read_parquet(path).rename(columns={"token_id": "token"})
    table = table.sort_values(["step", "text", "position", "layer", "slot"], ignore_index=True)
    layers, n_experts = np.unique(table["layer"]).tolist(), int(table["expert"].max()) + 1
    here, found = _origin(batch, batch.attention), {}
    shape = (-1, len(layers), table["slot"].max() + 1)
    for step, rows in table.groupby("step"):
        values = {name: rows[name].to_numpy().reshape(shape) for name in rows}
        if not all(np.array_equal(values[name][:, 0, 0], here[name]) for name in ORIGIN):
            raise ValueError(f"{Path(path).name} is a trace of other texts than the batch.")
        whole = Routing(values["expert"], values["weight"], tuple(layers), n_experts, **here)
        found[int(step)] = whole[batch.real[batch.attention].numpy()]
    return found


def _origin(batch: TokenBatch, mask: Tensor) -> dict[str, np.ndarray]:
    """Text, position and id of the tokens of a mask `[text, pos]`."""
    text, column = mask.nonzero(as_tuple=True)
    position = column - batch.attention.int().argmax(1)[text]  # padding on the left does not count
    return {"text": text.numpy(), "position": position.numpy(), "token": batch.tokens[mask].numpy()}


class SparseLayer(NamedTuple):
    """A layer with experts: its modules, as Hugging Face has them inside the bridge."""

    router: nn.Module
    projection: nn.Module  # of the router: its weight is [expert, d_model], its output has logits
    experts: nn.Module
    family: str


def sparse_layers(model: Model, stack: str = "") -> dict[int, SparseLayer]:
    """The layers with experts, by number; `stack` is "encoder" or "decoder" of a model with both.

    Raises NoRouting for a dense model and for a router of an unknown family, with what was found;
    ValueError for a stack that is not there.
    """
    name, whole = model_name(model), model.original_model
    stacks = ("encoder", "decoder") if whole.config.is_encoder_decoder else ("",)
    if stack not in stacks:
        raise ValueError(f"`stack` of {name} is one of {stacks}, not {stack!r}.")
    modules = {n.replace("._original_component", ""): m for n, m in whole.named_modules()}
    layers = {}
    for where, experts in modules.items():
        place = LAYER.search(where)
        if not place or not where.startswith(stack) or not where.endswith(".experts"):
            continue
        beside = [modules.get(where.removesuffix("experts") + n) for n in ("router", "gate")]
        router = beside[0] or beside[1]
        family = FAMILY.fullmatch(type(router).__name__)
        if not family or family[1] not in SCORES:
            told = f"{name} has {type(experts).__name__} and, as router, {type(router).__name__}"
            raise NoRouting(f"{told}: unknown here. Known families: {', '.join(SCORES)}.")
        projection = getattr(router, PROJECTIONS.get(family[1], ""), router)
        layers[int(place[1])] = SparseLayer(router, projection, experts, family[1])
    if not layers:
        raise NoRouting(f"{name} ({type(whole).__name__}) is dense: it has no layer with experts.")
    return layers


def router_weights(model: Model, stack: str = "") -> Float[np.ndarray, "layer e d"]:
    """The routers' matrices `[layer, expert, d_model]` of `sparse_layers`, which may raise."""
    weights = [layer.projection.weight for layer in sparse_layers(model, stack).values()]
    return torch.stack(weights).detach().float().cpu().numpy()


def capture_routing(
    model: Model, batch: TokenBatch, *, stack: str = "", logits: bool = True, inputs: bool = False
) -> Routing:
    """The routing of every real token of a batch.

    Args:
        stack: "encoder" or "decoder" of an encoder-decoder; both read the batch's tokens.
        logits: keep what softmax or sigmoid is taken of, for all experts.
        inputs: keep what the routers read.

    Raises NoRouting as `sparse_layers` and `read_router`, ValueError for a model in train mode or
    with hooks left on it, and as `check_batch`.
    """
    layers = sparse_layers(model, stack)
    modules = {(n, p): getattr(x, p) for n, x in layers.items() for p in ("router", "projection")}
    kept, wanted = {}, ("ids", "weights", *["logits"] * logits, *["inputs"] * inputs)
    for rows, places, caught in passes(model, batch, modules, stack):
        for index, (number, layer) in enumerate(layers.items()):
            args, output = caught[number, "router"]
            read = read_router(layer, output, caught[number, "projection"][1])
            values = dict(zip(("ids", *FLOATS), (*read, args[0].float()), strict=True))
            for name in wanted:
                value = values[name].flatten(0, -2)[places].cpu().numpy()
                if name not in kept:
                    kept[name] = np.empty((batch.n_real, len(layers), value.shape[1]), value.dtype)
                kept[name][rows, index] = value
    facts = {"layers": tuple(layers), "n_experts": read[2].shape[1], "model": model_name(model)}
    return Routing(**kept, **facts, **_origin(batch, batch.real))


def read_router(layer: SparseLayer, output: tuple, projected: Any) -> tuple[Tensor, ...]:
    """Ids and weights [token, rank], the largest first, logits [token, expert]. Raises NoRouting
    where a version of transformers gives something else under these names."""
    logits, weights, ids = output
    if layer.family == "SwitchTransformers":  # a mask, empty where the expert was full
        taken, weights, logits = (value.flatten(0, -2) for value in output)
        ids = taken.argmax(-1, keepdim=True).where(taken.any(-1, keepdim=True), -1)
        weights = weights.where(ids >= 0, 0)
    if layer.family == "Gemma4Text":  # what it gives first are probabilities
        logits = projected
    logits, weights, kind = logits.float(), weights.float(), type(layer.router).__name__
    order = weights.argsort(dim=-1, descending=True, stable=True)
    weights, ids = weights.gather(-1, order), ids.gather(-1, order)
    if float(logits.min()) >= 0 and bool(((logits.sum(-1) - 1).abs() < 1e-3).all()):
        raise NoRouting(f"{kind} gives probabilities where it says logits: not supported.")
    chosen = logits.gather(-1, ids.clamp(min=0))
    if SCORES[layer.family] is torch.exp:
        chosen = chosen - chosen[:, :1]
    ratio = SCORES[layer.family](chosen) / weights  # the same for all experts of a token
    if layer.family == "Gemma4Text":
        ratio = ratio * layer.router.per_expert_scale[ids]
    if bool(((ratio / ratio[:, :1] - 1).abs() > TOLERANCE)[weights > 1e-6].any()):
        raise NoRouting(f"{kind}: its weights do not follow from its logits: not supported.")
    return ids.short(), weights, logits


def passes(model: Model, batch: TokenBatch, modules: dict, stack: str) -> Iterator[tuple]:
    """Forward passes: which real tokens they have, where these stand among the pass's tokens, and
    of each module (arguments, output)."""
    check_batch(model, batch)
    check_unhooked(model)
    if model.training:
        raise ValueError(f"{model_name(model)} is in train mode (dropout): call model.eval().")
    # before a text, padding would take places at Switch's experts
    right = batch.attention.int().argsort(dim=1, descending=True, stable=True)
    tokens, real = batch.tokens.gather(1, right), batch.real.gather(1, right)
    number, lengths = (real.flatten().cumsum(0) - 1).view_as(real), batch.attention.sum(1)
    whole, caught = model.original_model, {}
    reader = whole.get_encoder() if stack == "encoder" else whole.base_model
    size = PASS if stack else texts_per_pass(model, batch, limit=PASS)
    with ExitStack() as hooks, progress_bar(total=batch.n_real, unit="tok", desc="routing") as bar:
        for key, module in modules.items():
            catch = lambda _, args, output, key=key: caught.update({key: (args, output)})  # noqa: E731
            hooks.callback(module.register_forward_hook(catch).remove)
        for texts in lengths.argsort(descending=True, stable=True).split(size):
            span = slice(int(lengths[texts[0]]))
            mask = torch.arange(span.stop) < lengths[texts, None]
            read = {"input_ids": tokens[texts, span], "attention_mask": mask.long()}
            read |= {f"decoder_{name}": v for name, v in read.items()} if stack == "decoder" else {}
            with torch.inference_mode():
                reader(**{name: value.to(model.cfg.device) for name, value in read.items()})
            keep = real[texts, span]
            yield number[texts, span][keep], keep.flatten().nonzero()[:, 0], caught
            bar.update(int(keep.sum()))


def predictions(model: Model, batch: TokenBatch) -> pd.DataFrame:
    """One row per real token, in the rows of `capture_routing`: `text`, `token`; `predicted`, the
    id that is most probable after it, and its `probability`; `loss`, in nats, of the token that
    comes after it, NaN where none does, or only a separator.

    Raises as `check_batch` and `check_eval`.
    """
    check_batch(model, batch)
    check_eval(model)
    tables, device = [], model.cfg.device
    for text in range(len(batch)):
        few = batch[[text]]
        with torch.inference_mode():
            logits = model(few.tokens.to(device), attention_mask=few.attention.long().to(device))
        logits, token = logits[0].cpu()[few.real[0]].float(), few.tokens[few.real]
        probability, predicted = logits.softmax(-1).max(-1)
        loss = functional.cross_entropy(logits[:-1], token[1:], reduction="none")
        table = pd.DataFrame({"text": text, "token": token, "predicted": predicted})
        apart = few.real[0].nonzero()[:, 0].diff() > 1  # between documents
        loss = pd.Series(loss.numpy()).mask(apart.numpy())  # none after the last
        tables.append(table.assign(probability=probability.numpy(), loss=loss))
    return pd.concat(tables, ignore_index=True)
