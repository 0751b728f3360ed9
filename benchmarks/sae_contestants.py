"""How each library trains one SAE on the same vectors: its own trainer, its own loop, the same
order of vectors.

1. Vectors are activations of pocket-gpt, harvested once, scaled to a mean norm of sqrt(d_in) and
   saved; every contestant reads that file, whatever environment it runs in.
2. `train(job, vectors)` builds the library's SAE, trains it by the library's own trainer and
   returns it, in the form that is used afterwards, for the check that something was learned.
3. Settings are the library's own, but for what the job says (architecture, sizes, learning rate,
   seed) and for bf16 autocast, which every contestant gets where the machine computes it fast,
   unless it is called "as shipped".

Nothing here imports lenslab at its head: peers run in environments that have it not.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib import (
    import_module,  # peers are no requirements: named by string, never by statement
)
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).parent
CACHE = HERE.parent / ".cache" / "benchmarks"
HOOK, MODEL = "blocks.3.hook_resid_post", "pocket-gpt"
UNSEEN_WINDOWS, CALIBRATION = 32, 8192
PENALISED = ("relu", "jumprelu", "gated")
HELD_OUT = 1 << 14  # vectors at the end of the file that nobody trains on


class Trained(Protocol):
    """What every contestant gives back."""

    def encode(self, x: Tensor) -> Tensor: ...  # [vector, d_in] -> latents [vector, d_sae]

    def decode(self, latents: Tensor) -> Tensor: ...  # and back


Train = Callable[["Job", Tensor], Trained]


@dataclass(frozen=True)
class Job:
    """What every contestant trains: `steps` steps of `batch` vectors."""

    architecture: str = "topk"  # or batchtopk, or one with a penalty: relu, jumprelu, gated
    d_sae: int = 4096
    k: int = 32
    l1: float = 1.0  # weight of the penalty, each library's own
    batch: int = 4096
    steps: int = 100  # enough for AuxK to begin, and for every library to reconstruct
    lr: float | None = 1e-3  # None: lenslab's default
    momentum: float = 0.8  # of Adam: ours
    hold: float = 0.8  # share of the steps before the rate falls: ours, and SAELens's
    seed: int = 0

    @property
    def samples(self) -> int:
        return self.steps * self.batch


def fast_bf16() -> bool:
    """As `lenslab.runtime.has_fast_bf16` on a processor, for environments without lenslab."""
    if asked := os.environ.get("LENSLAB_COMPUTE"):
        return asked == "bfloat16"
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def precision() -> str:
    """In words, for a result."""
    return "bf16 autocast" if fast_bf16() else "float32: this CPU has no bf16 instructions"


def autocast(enabled: bool = True) -> Any:
    """bf16 around a whole training: without the cache of cast weights, which would keep those of
    the first step."""
    return (
        torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)
        if enabled and fast_bf16()
        else nullcontext()
    )


def vectors_file(n: int) -> Path:
    """The file of `n` training vectors and HELD_OUT more, harvested by lenslab if it is not there:
    [vector, d_in]."""
    from lenslab.capture import harvest
    from lenslab.files import atomic_write, content_key
    from lenslab.models import load_model, model_key
    from lenslab.runtime import derive_generator
    from lenslab.texts import sampled_text
    from lenslab.tokens import pack

    model, total = load_model(MODEL), n + HELD_OUT
    file = CACHE / f"vectors-{n}-{content_key(model_key(model), HOOK)}.npy"
    if not file.exists():
        batch = pack(model, sampled_text())
        batch = batch[: math.ceil(total / (batch.n_real / len(batch))) + 8]
        x = harvest(model, batch, HOOK, compute="float32")[HOOK][batch.real][:total]
        if len(x) < total:
            raise ValueError(f"only {len(x)} vectors for {total}: ask for fewer")
        # documents of the held-out vectors, the last ones, are not trained on: only the others are
        # shuffled
        x[:n] = x[torch.randperm(n, generator=derive_generator(0, "benchmark vectors"))]
        x *= math.sqrt(x.shape[1]) / x[:n].norm(dim=1).mean()
        with atomic_write(file) as temporary:
            np.save(temporary, x.numpy())
    return file


def load_vectors(file: str | Path) -> tuple[Tensor, Tensor]:
    """(training vectors, held-out vectors)."""
    x = torch.from_numpy(np.load(file))
    return x[:-HELD_OUT], x[-HELD_OUT:]


def batches(vectors: Tensor, job: Job) -> Iterator[Tensor]:
    """Endless: the vectors in the order of the file, which is shuffled, `job.batch` at a time."""
    while True:
        yield from vectors[: len(vectors) - len(vectors) % job.batch].split(job.batch)


@torch.no_grad()
def held_out(sae: Trained, x: Tensor) -> dict[str, float]:
    """FVU and L0 on held-out vectors, in float64: the same code for every contestant."""
    error, active = 0.0, 0.0
    for part in x.split(2048):
        latents = sae.encode(part)
        guess = sae.decode(latents)
        error += float((part.double() - guess.double()).square().sum())
        active += float((latents != 0).sum())
    spread = float((x.double() - x.double().mean(0)).square().sum())
    return {"fvu": error / spread, "l0": active / len(x)}


@torch.no_grad()
def set_mean_l0(sae: Any, vectors: Tensor, k: int) -> None:
    """One threshold for all latents of a JumpReLU SAE, such that k are active on average on some
    training vectors."""
    sae.threshold.data.zero_()
    active = torch.cat([sae.encode(part) for part in vectors[:CALIBRATION].split(1024)]).flatten()
    sae.threshold.data.fill_(float(active.topk(k * min(CALIBRATION, len(vectors)) + 1).values[-1]))


# --------------------------------------------------------------------------------------------------
# the contestants


class InOrder:
    """A source of lenslab's (`lenslab.sae.train.sources.VectorSource`) that deals vectors out as
    they lie, as `batches`."""

    def __init__(self, vectors: Tensor):
        self.vectors, self.key, self.metadata = (
            vectors,
            f"{len(vectors)} in order",
            {"model_name": MODEL},
        )
        self.widths = {HOOK: vectors.shape[1]}

    def sizes(self, epoch: int) -> list[int]:
        return [len(self.vectors)]

    def pool(self, epoch: int, number: int, enough: int | None = None) -> dict[str, Tensor]:
        return {HOOK: self.vectors}


class Synthetic(InOrder):
    """`n` vectors that are made as they are needed, in pools as lenslab's own sources have them."""

    def __init__(self, n: int, d_in: int = 256):
        from lenslab.runtime import derive_generator
        from lenslab.sae.train.sources import POOL

        self.n, self.largest, self.generator = n, min(n, POOL), derive_generator
        self.directions = torch.randn(
            1024, d_in, generator=derive_generator(0, "synthetic directions")
        )
        self.key, self.metadata, self.widths = f"{n} synthetic", {"model_name": MODEL}, {HOOK: d_in}

    def sizes(self, epoch: int) -> list[int]:
        return [self.largest] * (self.n // self.largest)

    def pool(self, epoch: int, number: int, enough: int | None = None) -> dict[str, Tensor]:
        generator = self.generator(number, "synthetic vectors")
        active = torch.randint(len(self.directions), (self.largest, 8), generator=generator)
        strength = torch.rand(self.largest, 8, generator=generator)
        return {
            HOOK: torch.nn.functional.embedding_bag(
                active, self.directions, per_sample_weights=strength, mode="sum"
            )
        }


def lenslab(job: Job, vectors: Tensor) -> Trained:
    """lenslab's train, the vectors read as they lie."""
    return _lenslab(job, InOrder(vectors), vectors.shape[1])


def lenslab_from_stream(job: Job) -> Trained:
    """lenslab's train on as many synthetic vectors as the job has."""
    source = Synthetic(job.samples)
    return _lenslab(job, source, source.widths[HOOK])


def _lenslab(job: Job, source: Any, d_in: int) -> Trained:
    from lenslab.sae.train import TrainingConfig, build_sae, train
    from lenslab.sae.train.sources import VectorSource

    VectorSource.register(type(source))  # which nothing here can inherit from
    metadata = {"hook_name": HOOK, "model_name": MODEL}
    options = {"sparsity": job.l1} if job.architecture in PENALISED else {"k": job.k}
    sae = build_sae(job.architecture, d_in, job.d_sae, seed=job.seed, metadata=metadata, **options)
    options = dict(lr=job.lr, momentum=job.momentum, hold=job.hold, seed=job.seed)
    config = TrainingConfig(job.samples, batch=job.batch, **options)
    return train({"sae": sae}, source, config, progress=False)["sae"].sae


SAELENS_NAMES = {"topk": "TopK", "relu": "Standard", "batchtopk": "BatchTopK"}
SAELENS_NAMES |= {"jumprelu": "JumpReLU", "gated": "Gated"}


def saelens(job: Job, vectors: Tensor, *, tuned: bool = True) -> Trained:
    """SAELens's SAETrainer; tuned: bf16 autocast. What it computes is not changed."""
    import sae_lens

    name = SAELENS_NAMES[job.architecture]
    options = {"k": job.k}
    if job.architecture in PENALISED:
        weight = "l0_coefficient" if job.architecture == "jumprelu" else "l1_coefficient"
        options = {weight: job.l1}
    options |= dict(d_in=vectors.shape[1], d_sae=job.d_sae, device="cpu")
    torch.manual_seed(job.seed)
    sae_config = getattr(sae_lens, f"{name}TrainingSAEConfig")(**options)
    sae = getattr(sae_lens, f"{name}TrainingSAE")(sae_config)
    config = sae_lens.config.SAETrainerConfig(
        total_training_samples=job.samples,
        train_batch_size_samples=job.batch,
        lr=job.lr,
        # lenslab's schedule: 5 % warm-up, then it stays and falls, or falls along a cosine
        lr_scheduler_name="constant" if job.hold else "cosineannealing",
        lr_end=job.lr / 10,
        lr_warm_up_steps=max(1, job.steps // 20),
        lr_decay_steps=round((1 - job.hold) * job.steps) if job.hold else 0,
        device="cpu",
        autocast=tuned and fast_bf16(),
        logger=sae_lens.LoggingConfig(log_to_wandb=False),
    )
    sae_lens.SAETrainer(cfg=config, sae=sae, data_provider=batches(vectors, job)).fit()
    return _saelens_inference(sae)


def saelens_centred(job: Job, vectors: Tensor) -> Trained:
    """SAELens's trainer on vectors less their mean, which lenslab subtracts by itself; folded into
    the bias after."""
    mean = vectors.mean(0)
    sae = saelens(job, vectors - mean)
    sae.b_dec.data += mean  # the encoder reads x - b_dec
    return sae


def _saelens_inference(sae: Any) -> Trained:
    """As it would be loaded after saving: decoder norms folded, BatchTopK by its threshold."""
    from sae_lens import SAE

    state = dict(sae.state_dict())
    sae.process_state_dict_for_saving_inference(state)
    final = SAE.from_dict(sae.cfg.get_inference_sae_cfg_dict())
    final.load_state_dict({key: value.detach() for key, value in state.items()})
    return final


def saelens_as_shipped(job: Job, vectors: Tensor) -> Trained:
    """SAELens with its defaults: float32, and the allocator of the system."""
    return saelens(job, vectors, tuned=False)


def dictionary_learning(job: Job, vectors: Tensor) -> Trained:
    """dictionary-learning's trainSAE; on a CPU it has no autocast of its own, so it is given one
    from outside."""
    names = {"topk": "TopK", "relu": "Standard", "batchtopk": "BatchTopK"}
    names |= {"jumprelu": "JumpRelu", "gated": "GatedSAE"}
    trainers = import_module("dictionary_learning.trainers")
    training = import_module("dictionary_learning.training")
    trainer = getattr(trainers, f"{names[job.architecture]}Trainer")
    kept = []

    class Kept(
        trainer
    ):  # trainSAE returns nothing: this is how to get at what it trained without a pickle
        def __init__(self, **options: Any):
            super().__init__(**options)
            kept.append(self)

    options = dict(
        steps=job.steps,
        activation_dim=vectors.shape[1],
        dict_size=job.d_sae,
        lr=job.lr,
        seed=job.seed,
    )
    options |= dict(
        warmup_steps=job.steps // 20, decay_start=job.steps - max(1, job.steps // 5), device="cpu"
    )
    if job.architecture == "jumprelu":
        options |= dict(sparsity_penalty=job.l1, target_l0=job.k, sparsity_warmup_steps=None)
    elif job.architecture in PENALISED:
        options |= dict(l1_penalty=job.l1, sparsity_warmup_steps=None)
    else:
        options |= dict(k=job.k, threshold_start_step=job.steps // 2)
    with autocast():
        training.trainSAE(
            data=batches(vectors, job),
            trainer_configs=[{"trainer": Kept, "layer": 3, "lm_name": MODEL, **options}],
            steps=job.steps,
            device="cpu",
        )
    return kept[0].ae


def eai_sparsify(job: Job, vectors: Tensor, lr: float | None = None) -> Trained:
    """sparsify's Trainer, which reads from a model only: its model here looks the saved vectors up
    and does no more.

    TopK alone. Its optimizer is its default (schedule-free sign descent), without a rate at its
    own one.
    """
    os.environ.setdefault(
        "SPARSIFY_DISABLE_TRITON", "1"
    )  # where triton is installed it would be given CPU tensors
    sparsify = import_module("sparsify")
    datasets = import_module("datasets")
    if job.architecture != "topk":
        raise NotImplementedError(f"sparsify has no {job.architecture} SAE")
    window = 256
    rows = torch.arange(job.samples).remainder(len(vectors)).view(-1, window)
    data = datasets.Dataset.from_dict({"input_ids": rows.numpy()}).with_format("torch")
    config = sparsify.TrainConfig(
        sparsify.SparseCoderConfig(num_latents=job.d_sae, k=job.k),
        batch_size=job.batch // window,
        lr=lr,
        hookpoints=["site"],
        init_seeds=[job.seed],
        log_to_wandb=False,
        save_every=10**9,
        save_dir=os.path.join(tempfile.gettempdir(), f"sparsify-{os.getpid()}"),
    )
    with autocast():
        trainer = sparsify.Trainer(config, data, _LookUp(vectors))
        trainer.save = lambda *given, **options: None  # nothing of a speed measurement is kept
        trainer.fit()
    for (
        optimizer
    ) in trainer.optimizers:  # as its own saving does: the averaged weights are the result
        optimizer.eval()
    return _Dense(trainer.saes["site"], job.d_sae)


class _Dense:
    """sparsify's SAE, which speaks of the k largest latents, with latents of full width."""

    def __init__(self, sae: Any, d_sae: int):
        self.sae, self.d_sae = sae, d_sae

    def encode(self, x: Tensor) -> Tensor:
        found = self.sae.encode(x)
        return torch.zeros(len(x), self.d_sae).scatter_(
            1, found.top_indices, found.top_acts.float()
        )

    def decode(self, latents: Tensor) -> Tensor:
        return latents @ self.sae.W_dec + self.sae.b_dec


class _LookUp(torch.nn.Module):
    """The least model that sparsify's Trainer takes: token ids are numbers of vectors."""

    def __init__(self, vectors: Tensor):
        super().__init__()
        self.vectors, self.site = vectors, torch.nn.Identity()
        self.dummy_inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long)}
        self.device, self.base_model_prefix = torch.device("cpu"), ""

    @property
    def base_model(self) -> torch.nn.Module:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        # sparsify's own autocast, meant for GPUs, switches that cache on again
        torch.clear_autocast_cache()
        return self.site(self.vectors[input_ids])


# --------------------------------------------------------------------------------------------- from
# the model itself


def tokens_file(n: int) -> Path:
    """The file of `n` windows of tokens and 32 more that nobody trains on: [window, 256], BOS
    first."""
    from lenslab.files import atomic_write, content_key
    from lenslab.models import load_model, model_key
    from lenslab.texts import sampled_text
    from lenslab.tokens import pack

    model, total = load_model(MODEL), n + UNSEEN_WINDOWS
    file = CACHE / f"tokens-{n}-{content_key(model_key(model))}.npy"
    if not file.exists():
        ids = pack(model, sampled_text()).tokens[:total]
        if len(ids) < total:
            raise ValueError(f"only {len(ids)} windows for {total}: ask for fewer")
        with atomic_write(file) as temporary:
            np.save(temporary, ids.numpy())
    return file


def lenslab_from_model(job: Job, ids: Tensor) -> tuple[Trained, Any]:
    """lenslab's train on what its model computes as it goes -> (SAE, model)."""
    from lenslab.models import load_model
    from lenslab.sae.train.sources import ModelSource
    from lenslab.tokens import TokenBatch

    model = load_model(MODEL, device="cpu")
    real = ~torch.isin(ids, torch.tensor(model.tokenizer.all_special_ids))
    batch = TokenBatch(ids, real, torch.ones_like(real), ("",) * len(ids))
    return _lenslab(job, ModelSource(model, batch, [HOOK]), int(model.cfg.d_model)), model


def saelens_from_model(job: Job, ids: Tensor, *, tuned: bool = True) -> tuple[Trained, Any]:
    """SAELens's LanguageModelSAETrainingRunner on its own kind of data set -> (SAE, model)."""
    from datasets import Dataset
    from sae_lens import (
        LanguageModelSAERunnerConfig,
        LanguageModelSAETrainingRunner,
        LoggingConfig,
        TopKTrainingSAEConfig,
    )
    from transformer_lens.model_bridge import TransformerBridge

    fast = tuned and fast_bf16()
    model = TransformerBridge.boot_transformers(
        str(HERE.parent / "data" / "models" / MODEL), device="cpu"
    ).eval()
    config = LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(
            d_in=int(model.cfg.d_model), d_sae=job.d_sae, k=job.k, device="cpu"
        ),
        model_name=MODEL,
        hook_name=HOOK,
        streaming=False,
        context_size=ids.shape[1],
        training_tokens=job.samples,
        train_batch_size_tokens=job.batch,
        store_batch_size_prompts=16
        if tuned
        else 32,  # 16 is the faster of the two here, 32 the default
        exclude_special_tokens=True,
        autocast=fast,
        autocast_lm=fast,
        lr=job.lr,
        lr_warm_up_steps=job.steps // 20,
        lr_decay_steps=job.steps // 5,
        seed=job.seed,
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=None,
        verbose=False,
    )
    data = Dataset.from_dict({"tokens": ids.tolist()})
    runner = LanguageModelSAETrainingRunner(config, override_dataset=data, override_model=model)
    return _saelens_inference(runner.run()), model


# --------------------------------------------------------------------------------------------------
# timing


def prepare(train: Train, job: Job, file: str, warm: int = 4) -> Callable[[], Any]:
    """For `compare.timed`: warm up with a few steps, then time all of them; FVU and L0 are measured
    afterwards."""

    def make() -> tuple[Callable[[], Any], Callable[[], Any]]:
        vectors, unseen = load_vectors(file)

        def run() -> tuple[int, Callable[[], dict[str, float]]]:
            sae = train(job, vectors)

            def check() -> dict[str, float]:
                # a running threshold needs hundreds of steps to arrive: set it, for all alike
                if job.architecture == "batchtopk":
                    set_mean_l0(sae, vectors, job.k)
                return checked(held_out(sae, unseen))

            return job.samples, check

        return lambda: train(Job(**{**asdict(job), "steps": warm}), vectors), run

    return make


def prepare_end_to_end(
    train: Callable[..., tuple[Trained, Any]], job: Job, file: str
) -> Callable[[], Any]:
    """As `prepare`, from windows of tokens; the check reads the stream of the windows that were
    left out."""

    def make() -> tuple[Callable[[], Any], Callable[[], Any]]:
        ids = torch.from_numpy(np.load(file))
        seen, unseen = ids[:-UNSEEN_WINDOWS], ids[-UNSEEN_WINDOWS:]

        def run() -> tuple[int, Callable[[], dict[str, float]]]:
            sae, model = train(job, seen)
            return job.samples, lambda: checked(held_out(sae, stream(model, unseen)))

        return lambda: train(Job(**{**asdict(job), "steps": 2}), seen), run

    return make


@torch.no_grad()
def stream(model: Any, ids: Tensor) -> Tensor:
    """[vector, d_in]: the hook's value at every token but special ones."""
    _, cache = model.run_with_cache(ids, names_filter=[HOOK])
    special = torch.isin(ids, torch.tensor(model.tokenizer.all_special_ids))
    return cache[HOOK][~special]


def checked(found: dict[str, float]) -> dict[str, float]:
    """Refuse a contestant that did not train: predicting the mean of all vectors has an FVU of
    1."""
    if not found["fvu"] < 0.9:
        raise RuntimeError(
            f"it did not train: held-out FVU {found['fvu']:.3f}, L0 {found['l0']:.1f}"
        )
    return found


def job_from(text: str) -> Job:
    return Job(**json.loads(text))
