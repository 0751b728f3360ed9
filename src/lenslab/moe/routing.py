"""Which experts a mixture of experts sends each token to, read where it is decided.

How `capture_routing` works:
1. find the routers: modules of a family in `SCORES`, beside a module of experts. A dense model and
   a router of another family are refused by name;
2. run the texts, the longest first, padded on the right whatever the batch says: neither other
   texts nor padding change what a token gets, even where an expert takes only so many tokens of a
   text (Switch);
3. catch what each router gives, by PyTorch's hooks on Hugging Face's own module: TransformerLens's
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
from transformer_lens.model_bridge import TransformerBridge

from lenslab.capture import check_batch, texts_per_pass
from lenslab.files import atomic_write
from lenslab.hooks import check_unhooked
from lenslab.models import check_eval, model_name
from lenslab.runtime import progress_bar
from lenslab.tokens import TokenBatch, token_string

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


Model = TransformerBridge
Codes = Int[np.ndarray, " token"]  # numbers from 0
Ranks = Int[np.ndarray, "token rank"]  # ids of experts, of one layer


class NoRouting(ValueError):
    """A model without routers, with some that are unknown here, or without what was asked for."""


@dataclass(frozen=True, eq=False)
class Routing:
    """The experts of every real token at every layer that has some; rows by text, then position."""

    ids: Int[np.ndarray, "token layer rank"]  # -1: none, since the expert was full (Switch)
    weights: Float[np.ndarray, "token layer rank"]  # as they are used, the largest first
    layers: tuple[int, ...]  # numbers of the layers
    n_experts: int
    text: Codes
    position: Codes  # within the text, BOS included
    token: Codes  # its id
    dense: tuple[int, ...] = ()  # layers without a router
    logits: Float[np.ndarray, "token layer expert"] | None = None
    inputs: Float[np.ndarray, "token layer d_model"] | None = None  # what the routers read
    model: str = ""
    tokenizer: Any = field(default=None, repr=False)

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
        largest weight), `expert` (-1 where it was full) and `weight`."""
        token, layer, rank = (index.ravel() for index in np.indices(self.ids.shape))
        table = pd.DataFrame({name: getattr(self, name)[token] for name in ORIGIN})
        table = table.assign(layer=np.array(self.layers)[layer], rank=rank + 1)
        return table.assign(expert=self.ids.ravel(), weight=self.weights.ravel())

    def vocabulary(self) -> pd.DataFrame:
        """One row per layer and token that occurs: `layer`, `token`, `string`, `count`, and the
        shares of its slots at each expert, in columns 0 to n_experts - 1."""
        ids, codes, counts = np.unique(self.token, return_inverse=True, return_counts=True)
        names = [token_string(self.tokenizer, i) for i in ids.tolist()] if self.tokenizer else ""
        tables = []
        for index, layer in enumerate(self.layers):
            slots = slot_counts(self.ids[:, index], codes, len(ids), self.n_experts)
            facts = pd.DataFrame({"layer": layer, "token": ids, "string": names, "count": counts})
            shares = pd.DataFrame(slots / np.maximum(slots.sum(1, keepdims=True), 1))
            tables.append(pd.concat([facts, shares], axis=1))
        return pd.concat(tables, ignore_index=True)

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> dict[str, float]:
        """Write `.parquet` (`to_frame`, for any program) or `.safetensors` (everything, for
        `load_routing`), floats as `dtype`. Returns the largest error that this makes in each array,
        in its units, which the file's metadata states too.

        ValueError for another suffix, and values that the dtype cannot hold.
        """
        path, table = Path(path), Path(path).suffix == ".parquet"
        if path.suffix not in (".parquet", ".safetensors"):
            raise ValueError(f"A routing is saved as .parquet or .safetensors, not {path.name}.")
        names = FLOATS[:1] if table else FLOATS
        arrays = {n: torch.as_tensor(v) for n in names if (v := getattr(self, n)) is not None}
        stored = {name: value.to(dtype) for name, value in arrays.items()}
        if wrong := [name for name, value in stored.items() if not bool(value.isfinite().all())]:
            raise ValueError(f"{wrong[0]} are too large for {dtype}: take bfloat16 or float32.")
        error = {n: float((v.double() - arrays[n].double()).abs().max()) for n, v in stored.items()}
        facts = {name: getattr(self, name) for name in ("layers", "dense", "n_experts", "model")}
        told = {"facts": json.dumps(facts), "error": json.dumps(error), "dtype": str(dtype)}
        with atomic_write(path) as temporary:
            if table:
                frame = self.to_frame().assign(weight=stored["weights"].numpy().ravel())
                frame.attrs = told
                frame.to_parquet(temporary, compression="zstd", index=False)
            else:
                whole = {n: torch.as_tensor(getattr(self, n)) for n in ("ids", *ORIGIN)} | stored
                save_file({n: v.contiguous() for n, v in whole.items()}, temporary, told)
        return error


def load_routing(path: str | Path) -> Routing:
    """What `Routing.save` wrote as `.safetensors`, floats as float32; without a tokenizer."""
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
        arrays = {name: file.get_tensor(name) for name in file.offset_keys()}
    facts |= {name: tuple(facts[name]) for name in ("layers", "dense")}
    values = {n: (v.float() if v.is_floating_point() else v).numpy() for n, v in arrays.items()}
    return Routing(**values, **facts)


def training_routing(path: str | Path, batch: TokenBatch) -> dict[int, Routing]:
    """The routing of the batch's texts at every checkpoint that a table such as
    `data/models/pocket-moe/routing.parquet` holds, by step.

    ValueError where the table is of other texts, or of another tokenizer.
    """
    table = pd.read_parquet(path).rename(columns={"token_id": "token"})
    table = table.sort_values(["step", "text", "position", "layer", "slot"], ignore_index=True)
    here, real = pd.DataFrame(_origin(batch, batch.attention)), batch.real[batch.attention].numpy()
    layers, found = np.unique(table["layer"]).tolist(), {}
    shape = (len(here), len(layers), table["slot"].max() + 1)
    for step, rows in table.groupby("step"):
        tokens = rows[[*ORIGIN]].to_numpy()[:: shape[1] * shape[2]]
        if not np.array_equal(tokens, here):
            told = f"({len(tokens)} tokens of {rows['text'].nunique()} texts)"
            raise ValueError(f"{Path(path).name} is a trace of other texts {told} than the batch.")
        found[int(step)] = Routing(
            ids=rows["expert"].to_numpy().reshape(shape)[real],
            weights=rows["weight"].to_numpy().reshape(shape)[real],
            layers=tuple(layers),
            n_experts=int(table["expert"].max()) + 1,
            tokenizer=batch.tokenizer,
            **_origin(batch, batch.real),
        )
    return found


def _origin(batch: TokenBatch, mask: Tensor) -> dict[str, np.ndarray]:
    """Text, position and id of the tokens of a mask `[text, pos]`."""
    text, column = mask.nonzero(as_tuple=True)
    position = column - batch.attention.int().argmax(1)[text]  # padding on the left does not count
    values = (text.numpy(), position.numpy(), batch.tokens[mask].numpy())
    return dict(zip(ORIGIN, values, strict=True))


def slot_counts(ids: Ranks, codes: Codes, n: int, n_experts: int) -> Int[np.ndarray, "code e"]:
    """How many slots the tokens of each code, 0 to n - 1, have at each expert."""
    slots = codes[:, None] * (n_experts + 1) + ids + 1  # the first is that of no expert
    counts = np.bincount(slots.ravel(), minlength=n * (n_experts + 1))
    return counts.reshape(n, n_experts + 1)[:, 1:]


class SparseLayer(NamedTuple):
    """A layer with experts: its modules, as Hugging Face has them inside the bridge."""

    router: nn.Module
    projection: nn.Module  # of the router: its weight is [expert, d_model], its output has logits
    experts: nn.Module
    family: str


def sparse_layers(model: Model, stack: str = "") -> dict[int, SparseLayer]:
    """The layers with experts, by number; `stack` is "encoder" or "decoder" of a model that has
    both.

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
    modules = {(n, "router"): layer.router for n, layer in layers.items()}
    modules |= {(n, "projection"): layer.projection for n, layer in layers.items()}
    names, kept = ("ids", *FLOATS), {}
    wanted = [*names[:2], *["logits"] * logits, *["inputs"] * inputs]
    for rows, places, caught in passes(model, batch, modules, stack):
        for index, (number, layer) in enumerate(layers.items()):
            args, output = caught[number, "router"]
            read = read_router(layer, output, caught[number, "projection"][1])
            read = (read[2].short(), read[1], read[0], args[0].float())
            values = dict(zip(names, read, strict=True))
            for name in wanted:
                value = values[name].flatten(0, -2)[places].cpu().numpy()
                if name not in kept:
                    kept[name] = np.empty((batch.n_real, len(layers), value.shape[1]), value.dtype)
                kept[name][rows, index] = value
    own = (LAYER.search(n) for n, _ in model.original_model.named_modules() if n.startswith(stack))
    return Routing(
        **kept,
        **_origin(batch, batch.real),
        layers=tuple(layers),
        n_experts=read[2].shape[1],
        dense=tuple(sorted({int(place[1]) for place in own if place} - set(layers))),
        model=model_name(model),
        tokenizer=batch.tokenizer,
    )


def read_router(layer: SparseLayer, output: tuple, projected: Any) -> tuple[Tensor, ...]:
    """Logits [token, expert], weights and ids [token, rank] of what a router gave, the largest
    weight first. Raises NoRouting where a version of transformers gives something else under these
    names."""
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
    return logits, weights, ids


Pass = tuple[Tensor, Tensor, dict[Any, tuple]]


def passes(model: Model, batch: TokenBatch, modules: dict, stack: str) -> Iterator[Pass]:
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
    comes after it, NaN where none does.

    Raises as `check_batch` and `check_eval`.
    """
    check_batch(model, batch)
    check_eval(model)
    tables, device = [], model.cfg.device
    for text in range(len(batch)):
        few = batch[[text]]
        tokens, real = few.tokens[0], few.real[0]
        with torch.inference_mode():
            logits = model(few.tokens.to(device), attention_mask=few.attention.long().to(device))
        log_p = logits[0].float().log_softmax(-1).cpu()  # [pos, vocabulary]
        best, loss = log_p.max(-1), torch.full(tokens.shape, torch.nan)
        loss[:-1] = -log_p[:-1].gather(1, tokens[1:, None])[:, 0].where(real[1:], torch.nan)
        columns = {"token": tokens, "predicted": best.indices, "probability": best.values.exp()}
        columns = {name: value[real] for name, value in (columns | {"loss": loss}).items()}
        tables.append(pd.DataFrame({"text": text} | columns))
    return pd.concat(tables, ignore_index=True)
