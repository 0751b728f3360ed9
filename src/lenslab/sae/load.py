"""Sparse autoencoders from disk and hub, kept with what they need: the one place that touches
SAELens.

An SAE says where it reads (`hook_name`), which model it was made for (`model_name`) and how that
model was processed (`model_from_pretrained_kwargs`). Encoding the activations of another hook gives
numbers that look like features and mean nothing, so nothing here guesses:
1. `load_sae` opens a bundled SAE, a local folder or a release of the hub, and refuses one without a
   hook;
2. `check_sae` compares hook, width and model with the model at hand, and names both sides of a
   mismatch;
3. `input_transform` gives what the SAE was trained on from what the unprocessed model computes, and
   back.

The model itself is never processed. Writing weights centred over d_model, as for
`gpt2-small-res-jb`, equal subtracting the mean over d_model from the captured stream of a LayerNorm
model. Downloading ahead, on the command line, is `lenslab.sae.hub`.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenslab.files import content_key, data_path, sha256_file, write_json
from lenslab.hooks import check_hooks, hook_names
from lenslab.models import check_eval, model_key, model_name
from lenslab.runtime import default_device
from lenslab.sae.registry import (
    COMMAND,
    NotAnSAE,
    SAENotHere,
    plain_name,
    refuse_release_alone,
    registry,
    repository_of,
)

WEIGHTS, CONFIG, CARD = "sae_weights.safetensors", "cfg.json", "card.json"


PICKLES = {".pt", ".pth", ".bin", ".pkl", ".ckpt"}


RESIDUAL = re.compile(r"(hook_resid_(pre|mid|post)|hook_attn_out|hook_mlp_out|hook_(pos_)?embed)$")


# Processing that changes no value at the hooks of SAEs (folding a norm's weights, a constant in the
# logits), and arguments that only say how to load
HARMLESS = {
    "fold_ln",
    "center_unembed",
    "dtype",
    "torch_dtype",
    "device",
    "device_map",
    "n_devices",
    "cache_dir",
}


VALUE_BIASES = {
    "fold_value_biases",
    "refactor_factored_attn_matrices",
}  # change q, k, v and z, not what is written


class SAEMismatch(ValueError):
    """An SAE and a model that do not belong together; the message names both sides."""


@runtime_checkable
class SparseAutoencoder(Protocol):
    """What lenslab needs of an SAE; every SAELens SAE has it. `cfg.metadata` holds `hook_name` and
    `model_name`."""

    cfg: Any  # d_in, d_sae, metadata

    def encode(self, x: Tensor) -> Tensor: ...  # [.., d_in] -> [.., d_sae]

    def decode(self, features: Tensor) -> Tensor: ...  # [.., d_sae] -> [.., d_in]


def sae_hook(sae: SparseAutoencoder) -> str:
    """The hook that the SAE reads, e.g. `blocks.6.hook_resid_pre`. NotAnSAE where it does not
    say."""
    if not sae.cfg.metadata.hook_name:
        raise NotAnSAE("This SAE does not say which hook it reads: set sae.cfg.metadata.hook_name.")
    return sae.cfg.metadata.hook_name


def sae_model(sae: SparseAutoencoder) -> str | None:
    """The name of the model that the SAE was made for, where it says so."""
    return sae.cfg.metadata.model_name


def refuse_transcoder(sae: SparseAutoencoder) -> None:
    """Raise ValueError for an SAE that writes another stream than it reads: its output has no place
    at its hook."""
    if (written := getattr(sae.cfg.metadata, "hook_name_out", None)) not in (None, sae_hook(sae)):
        raise ValueError(
            f"{sae_hook(sae)} -> {written} is a transcoder: it has no place to splice."
        )


def neuronpedia_link(sae: SparseAutoencoder, index: int) -> str | None:
    """The page of one latent, or None where the SAE has none. ValueError for an index outside the
    dictionary."""
    if not 0 <= index < sae.cfg.d_sae:
        raise ValueError(f"Latent {index} is not one of 0 to {sae.cfg.d_sae - 1}.")
    page = sae.cfg.metadata.neuronpedia_id
    return f"https://www.neuronpedia.org/{page}/{index}" if page else None


def bundled_saes(model: TransformerBridge | None = None) -> list[str]:
    """Names of the SAEs that ship with lenslab; with a model, of those that were made for one of
    its name."""
    names = sorted(file.parent.name for file in data_path("saes").glob(f"*/{CONFIG}"))
    if model is None:
        return names
    made_for = {
        name: json.loads(data_path("saes", name, CONFIG).read_text())["metadata"]["model_name"]
        for name in names
    }
    return [name for name in names if plain_name(made_for[name]) == plain_name(model_name(model))]


def load_sae(
    name: str | os.PathLike,
    sae_id: str | None = None,
    *,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> SparseAutoencoder:
    """An SAE as SAELens builds it, in eval mode and without gradients.

    Args: name: a bundled name (`bundled_saes()`), a local folder in SAELens's format, or, with
        `sae_id`, a release
            of the hub (`list_releases()`) or a hub repository `user/name`.
        sae_id: which SAE of the release, usually its hook.

    Raises: SAENotHere: nothing of that name here, and the hub cannot be reached; the message has
        the command to run. NotAnSAE: no hook in the metadata, a cut-off file, weights that do not
        fit the config, are not floating
            point, hold NaN, or do not match their recorded hash; a pickle.
    """
    name = os.fspath(name)
    if not dtype.is_floating_point:
        raise NotAnSAE(f"An SAE has floating-point weights; {dtype} is not such a dtype.")
    folder = data_path("saes", name) if name in bundled_saes() else Path(name).expanduser()
    device = device or default_device()
    if sae_id is None and folder.is_dir():
        return _load_folder(folder, folder.name, device, dtype)
    if sae_id is None:
        refuse_release_alone(name)
        near = difflib.get_close_matches(name, [*bundled_saes(), *registry()], n=3)
        raise SAENotHere(
            f"There is no bundled SAE and no folder {name!r}. Nearest: {', '.join(near) or 'none'}. Bundled: "
            f"{', '.join(bundled_saes()) or 'none'}. A release of the hub needs an id too: load_sae(release, sae_id)."
        )
    return _load_release(name, sae_id, device, dtype)


def save_sae(
    sae: SparseAutoencoder,
    folder: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    card: dict | None = None,
) -> Path:
    """Save in SAELens's format (cfg.json, sae_weights.safetensors), the folder replaced as a whole.

    Args: dtype: of the weights on disk, e.g. torch.bfloat16 for half the size; loaded back as
        float32 all the same. card: saved beside as card.json: what was measured, on what.

    Raises NotAnSAE for an SAE without hook or model name: whoever loads it could not know what to
    feed it; TypeError.
    """
    from sae_lens import __version__

    if hasattr(sae, "save_inference_model"):  # one that is still in training form
        sae = inference_form(sae)
    if not hasattr(sae, "process_state_dict_for_saving"):
        raise TypeError(
            f"A {type(sae).__name__} is no SAE to be saved: give the `.sae` of what `train` returns."
        )
    if not sae_hook(sae) or not sae_model(sae):
        raise NotAnSAE(
            "This SAE does not say which model it reads: set sae.cfg.metadata.model_name."
        )
    state = dict(sae.state_dict())
    sae.process_state_dict_for_saving(state)
    state = {
        key: value.detach().cpu().to(dtype or value.dtype).contiguous()
        for key, value in state.items()
    }
    config = sae.cfg.to_dict() | {"device": "cpu"}
    folder = Path(folder)
    with _replace_folder(folder) as temporary:
        save_file(state, temporary / WEIGHTS)
        # Without a version of 6 or later SAELens drops the metadata on loading, the hook name with
        # it
        written = {
            "sae_lens_version": __version__,
            "weights_sha256": sha256_file(temporary / WEIGHTS),
        }
        config["metadata"] = config["metadata"] | written
        write_json(temporary / CONFIG, config)
        if card is not None:
            write_json(temporary / CARD, card)
    return folder


@contextmanager
def _replace_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside; swapped in on success, so that half an SAE is never seen under its
    name."""
    if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG).is_file():
        raise NotAnSAE(
            f"{folder} exists and holds something that is no SAE: choose another folder."
        )
    temporary, old = (
        folder.with_name(f".{os.getpid()}-{kind}-{folder.name}") for kind in ("new", "old")
    )
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _load_folder(folder: Path, label: str, device: str, dtype: torch.dtype) -> SparseAutoencoder:
    from sae_lens import SAE

    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
        raise NotAnSAE(
            f"{label} holds a pickle ({pickles[0]}), which can run code when it is opened and is never loaded here. "
            "Convert it where you trust it: build the SAE there and call save_sae(sae, folder)."
            if pickles
            else f"{label} needs {CONFIG} and {WEIGHTS} (SAELens's format; save_sae writes it)."
        )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        recorded = (config.get("metadata") or {}).get("weights_sha256")
    except (ValueError, AttributeError) as error:
        raise NotAnSAE(
            f"{label}: {CONFIG} is not a JSON object ({error}): copy the folder again."
        ) from error
    if recorded and recorded != sha256_file(folder / WEIGHTS):
        raise NotAnSAE(
            f"{label}: {WEIGHTS} does not match the hash in {CONFIG}: cut off or changed. Copy it again."
        )
    with _readable(label):
        sae = SAE.load_from_disk(folder, device=device, dtype=str(dtype).removeprefix("torch."))
    return finish(sae, label)


def _load_release(release: str, sae_id: str, device: str, dtype: torch.dtype) -> SparseAutoencoder:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from sae_lens import SAE

    repository_of(release, sae_id)  # refuses unknown names and pickles before anything is fetched
    label = f"{release} {sae_id}"
    try:
        with _readable(label):
            sae = SAE.from_pretrained(
                release, sae_id, device=device, dtype=str(dtype).removeprefix("torch.")
            )
    except (OSError, HfHubHTTPError, OfflineModeIsEnabled) as error:
        offline = (
            " HF_HUB_OFFLINE is set: unset it for that."
            if os.environ.get("HF_HUB_OFFLINE") == "1"
            else ""
        )
        raise SAENotHere(
            f"{label} is not in the cache and could not be fetched ({_first_line(error)}). While online, run: "
            f"{COMMAND} download {release} {sae_id}.{offline} Gated repositories need HF_TOKEN."
        ) from error
    return finish(sae, label)


@contextmanager
def _readable(label: str) -> Iterator[None]:
    """SAELens's and safetensors' errors in terms of what the user can do."""
    try:
        with warnings.catch_warnings():  # the processing it warns of is applied by input_transform
            warnings.filterwarnings(
                "ignore", message=r"\s*This SAE has non-empty model_from_pretrained_kwargs"
            )
            yield
    except (SafetensorError, EOFError, zipfile.BadZipFile) as error:
        raise NotAnSAE(
            f"{label}: the weights are cut off or damaged ({_first_line(error)}). Fetch them again."
        ) from error
    except KeyError as error:
        raise NotAnSAE(
            f"{label}: {CONFIG} lacks or does not know {error} (`architecture`, `dtype`, sizes)."
        ) from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise NotAnSAE(
            f"{label}: weights and config do not fit each other ({_first_line(error, 3)})."
        ) from error


def finish(sae: Any, label: str) -> SparseAutoencoder:
    """What every loaded SAE goes through: refused without a hook or with NaN; eval mode, no
    gradients."""
    if not sae.cfg.metadata.hook_name:
        raise NotAnSAE(
            f"{label} does not say which hook it reads. Add metadata.hook_name to {CONFIG}, and "
            'metadata.sae_lens_version "6.0.0" or later: without it SAELens drops the metadata as it loads.'
        )
    for key, value in sae.state_dict().items():
        if not torch.isfinite(value).all():
            raise NotAnSAE(
                f"{label}: {key} holds NaN or Inf: a damaged file, or a training that diverged."
            )
    vars(sae.cfg.metadata).pop(
        "weights_sha256", None
    )  # true of that file, not of what is made from this object
    sae.turn_off_forward_pass_hook_z_reshaping()  # input_transform joins the heads
    return sae.eval().requires_grad_(False)


def inference_form(trained: Any) -> Any:
    """The SAE that SAELens would load after saving one in training form: decoder norms folded."""
    from sae_lens import SAE

    state = dict(trained.state_dict())
    trained.process_state_dict_for_saving_inference(state)
    sae = SAE.from_dict(trained.cfg.get_inference_sae_cfg_dict())
    sae.load_state_dict({key: value.detach().clone() for key, value in state.items()})
    return sae.eval().requires_grad_(False)


def _first_line(error: BaseException, lines: int = 1) -> str:
    return " ".join((str(error).strip() or type(error).__name__).splitlines()[:lines])


def check_sae(sae: SparseAutoencoder, model: TransformerBridge) -> None:
    """Raise unless the SAE belongs at its hook in this model; returns nothing.

    Raises SAEMismatch for another model (by name, or by weights where the SAE recorded them),
    another width, another device, and processing that cannot be expressed; UnknownHook for a hook
    the model has not; ValueError for a model in train mode.
    """
    hook, made_for, given = sae_hook(sae), sae_model(sae), model_name(model)
    if made_for and plain_name(made_for) != plain_name(given):
        raise SAEMismatch(
            f"The SAE was made for {made_for}, the model is {given}: load_model({made_for!r})."
        )
    check_hooks(model, [hook])
    shape = hook_names(model)[hook]
    if shape[:2] != (1, 2) or math.prod(shape[2:]) != sae.cfg.d_in:
        raise SAEMismatch(
            f"The SAE reads vectors of width {sae.cfg.d_in}, {hook} of {given} gives {' x '.join(map(str, shape[2:]))}."
        )
    # The twin that stands in for whole notebooks must be read by the model's SAE: that is what it
    # is the control of
    recorded = None if os.environ.get("LENSLAB_MODEL_TWIN") == "1" else sae.cfg.metadata.model_key
    if recorded and model.cfg.dtype == torch.float32 and recorded != model_key(model):
        raise SAEMismatch(
            f"The SAE was trained on {made_for} with weights {recorded}, this {given} has {model_key(model)}: other "
            "or processed weights. Load the model that was meant, afresh, or train the SAE again."
        )
    if torch.device(sae.cfg.device).type != torch.device(model.cfg.device).type:
        raise SAEMismatch(
            f"The SAE is on {sae.cfg.device}, the model on {model.cfg.device}: sae.to(...) one of them."
        )
    check_eval(model)
    _centred(sae, model)


def _centred(sae: SparseAutoencoder, model: TransformerBridge) -> bool:
    """Whether the SAE's input has its mean over d_model removed; SAEMismatch for other
    processing."""
    asked = {
        key for key, value in (sae.cfg.metadata.model_from_pretrained_kwargs or {}).items() if value
    }
    writes = bool(RESIDUAL.search(sae_hook(sae)))
    allowed = (
        HARMLESS
        | {"center_writing_weights"}
        | (VALUE_BIASES if writes or ".mlp." in sae_hook(sae) else set())
    )
    if asked - allowed:
        raise SAEMismatch(
            f"The SAE was trained on a model loaded with {', '.join(sorted(asked - allowed))}; at {sae_hook(sae)} that "
            "cannot be had from the unprocessed model, so its features would be others than it learned."
        )
    # RMSNorm reads the mean too, so TransformerLens leaves such models uncentred
    return (
        "center_writing_weights" in asked
        and writes
        and str(model.cfg.normalization_type) in {"LN", "LNPre"}
    )


@dataclass(frozen=True)
class InputTransform:
    """From the value at a hook to the SAE's input and back; exact, and the identity for most SAEs.

    `centred`: subtract the mean over d_model. `width`: the axes after position that make up d_in
    (two for hook_z).
    """

    centred: bool
    width: tuple[int, ...]

    def __call__(self, value: Float[Tensor, "*axes"]) -> Float[Tensor, "... d_in"]:
        """`[.., *width]` -> `[.., d_in]`."""
        x = value.flatten(-len(self.width))
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def inverse(
        self, x: Float[Tensor, "... d_in"], value: Float[Tensor, "*axes"]
    ) -> Float[Tensor, "*axes"]:
        """Put `x` in the place of `value`: its shape, its dtype, and the mean that was taken
        away."""
        if self.centred:
            x = x + value.flatten(-len(self.width)).mean(-1, keepdim=True)
        return x.reshape(value.shape).to(value.dtype)


def input_transform(sae: SparseAutoencoder, model: TransformerBridge) -> InputTransform:
    """What the SAE was trained on from what this model computes. Raises as `check_sae`."""
    check_sae(sae, model)
    return InputTransform(_centred(sae, model), hook_names(model)[sae_hook(sae)][2:])


def sae_key(sae: SparseAutoencoder) -> str:
    """Content key of an SAE: every tensor that it holds."""
    tensors = sae.state_dict() if isinstance(sae, torch.nn.Module) else vars(sae)
    parts = [
        (k, v.detach().cpu().contiguous())
        for k, v in sorted(tensors.items())
        if isinstance(v, Tensor)
    ]
    settings = {
        k: v for k, v in vars(sae.cfg).items() if isinstance(v, int | float | str | bool)
    }  # k of a TopK SAE
    raw = [
        p
        for k, v in parts
        for p in (k, list(v.shape), v.reshape(-1).view(torch.uint8).numpy().tobytes())
    ]
    return content_key(
        type(sae).__name__, {k: v for k, v in settings.items() if k != "device"}, *raw
    )


@torch.inference_mode()
def encode(sae: SparseAutoencoder, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_sae"]:
    """`sae.encode` on the SAE's device and dtype, back on the CPU in float32. ValueError on NaN and
    Inf."""
    own = next(iter(sae.parameters()), None) if isinstance(sae, torch.nn.Module) else None
    features = sae.encode(x if own is None else x.to(own.device, own.dtype)).float().cpu()
    if not bool(features.isfinite().all()):
        raise ValueError("The SAE gives NaN or Inf: check its weights and the model's activations.")
    return features
