"""SAEs from disk and hub: what they need travels with them, and what does not belong together is
refused."""

import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lenslab.files import data_path
from lenslab.hooks import UnknownHook
from lenslab.models import load_model, model_name, random_twin
from lenslab.sae import hub as hub_commands
from lenslab.sae import registry, save
from lenslab.sae.find import TRAIN_BATCH, find_sae, small_sae
from lenslab.sae.inputs import SAEMismatch, check_sae, input_transform, neuronpedia_link, sae_hook
from lenslab.sae.load import load_sae
from lenslab.sae.registry import NotAnSAE, SAENotHere
from lenslab.sae.save import save_sae
from lenslab.tokens import pack

HOOK = "blocks.1.hook_resid_post"
RELEASE, SAE_ID = "gpt2-small-res-jb", "blocks.1.hook_resid_pre"
REPOSITORY = "jbloom/GPT2-Small-SAEs-Reformatted"


def tiny_sae(model, hook=HOOK, architecture="standard", d_sae=48, seed=0, options=None, **metadata):
    """A random SAE for a model, as SAELens builds it; metadata as a trained one has it."""
    from sae_lens import SAE

    torch.manual_seed(seed)
    config = dict(
        architecture=architecture,
        d_in=model.cfg.d_model,
        d_sae=d_sae,
        dtype="float32",
        device="cpu",
    )
    config |= dict(
        apply_b_dec_to_input="transcoder" not in architecture,
        normalize_activations="none",
        reshape_activations="none",
    )
    config |= dict(topk=dict(k=5)).get(architecture, {}) | (options or {})
    config["metadata"] = dict(hook_name=hook, model_name=model_name(model), **metadata)
    sae = SAE.from_dict(config)
    for name, value in sae.state_dict().items():
        noise = torch.randn(value.shape) * 0.2
        value.copy_(noise.abs() * 0.1 if name == "threshold" else noise)
    return sae.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def x():
    return torch.randn(7, 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_a_saved_sae_comes_back_equal_and_with_its_hook(model, tmp_path, x, architecture):
    sae = tiny_sae(model, architecture=architecture)
    folder = save_sae(sae, tmp_path / "sae", card={"l0": 5})
    loaded = load_sae(folder, device="cpu")
    assert torch.equal(loaded.encode(x), sae.encode(x)) and torch.equal(loaded(x), sae(x))
    assert (sae_hook(loaded), loaded.cfg.metadata.model_name) == (HOOK, model_name(model))
    assert json.loads((folder / "card.json").read_text()) == {"l0": 5}
    from sae_lens import SAE

    assert torch.equal(
        SAE.load_from_disk(folder).encode(x), sae.encode(x)
    )  # SAELens's own loader reads it too


def test_weights_stored_in_bf16_come_back_as_float32_and_close(model, tmp_path, x):
    sae = tiny_sae(model)
    folder = save_sae(sae, tmp_path / "sae", dtype=torch.bfloat16)
    assert load_file(folder / "sae_weights.safetensors")["W_dec"].dtype == torch.bfloat16
    loaded = load_sae(folder, device="cpu")
    assert loaded.W_dec.dtype == torch.float32
    assert torch.equal(loaded.W_dec, sae.W_dec.bfloat16().float())


def test_saving_again_replaces_the_folder_and_a_failed_save_leaves_the_old_one(
    model, tmp_path, x, monkeypatch
):
    first, second = tiny_sae(model, seed=1), tiny_sae(model, seed=2)
    save_sae(first, tmp_path / "sae")
    save_sae(second, tmp_path / "sae")
    assert torch.equal(load_sae(tmp_path / "sae", device="cpu")(x), second(x))
    monkeypatch.setattr(save, "write_json", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_sae(first, tmp_path / "sae")
    assert torch.equal(load_sae(tmp_path / "sae", device="cpu")(x), second(x))
    assert [f.name for f in tmp_path.iterdir()] == ["sae"]


def test_a_folder_that_is_no_sae_is_not_overwritten(model, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(NotAnSAE, match="choose another folder"):
        save_sae(tiny_sae(model), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def edit_config(folder, change):
    config = json.loads((folder / "cfg.json").read_text())
    change(config)
    (folder / "cfg.json").write_text(json.dumps(config))


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: edit_config(f, lambda c: c.pop("metadata")), "hook"),
        (
            lambda f: edit_config(
                f, lambda c: c.update(metadata=dict(hook_name=HOOK))
            ),  # as written by hand, without hashes
            "sae_lens_version",
        ),
        (lambda f: edit_config(f, lambda c: c["metadata"].pop("sae_lens_version")), "hash"),
        (lambda f: edit_config(f, lambda c: c.update(architecture="nonesuch")), "nonesuch"),
        (lambda f: edit_config(f, lambda c: c.update(d_in=31)), "fit"),
        (lambda f: (f / "cfg.json").write_text("{"), "JSON"),
        (lambda f: os.truncate(f / "sae_weights.safetensors", 4000), "cut off"),
        (lambda f: flip_a_byte(f / "sae_weights.safetensors"), "hash"),
        (lambda f: (f / "sae_weights.safetensors").unlink(), "needs cfg.json and sae_weights"),
        (lambda f: (f / "sae_weights.safetensors").rename(f / "sae.pt"), "pickle"),
    ],
)
def test_a_damaged_folder_is_refused_with_the_reason(model, tmp_path, damage, message):
    folder = save_sae(tiny_sae(model), tmp_path / "sae")
    damage(folder)
    with pytest.raises(NotAnSAE, match=message):
        load_sae(folder)


def test_weights_with_nan_are_refused(model, tmp_path):
    sae = tiny_sae(model)
    sae.W_dec[3, 4] = float("nan")
    with pytest.raises(NotAnSAE, match="W_dec holds NaN"):
        load_sae(save_sae(sae, tmp_path / "sae"))


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(SAENotHere, match="gpt2-small-res-jb"):
        load_sae("gpt2-small-res-jbb")
    with pytest.raises(NotAnSAE, match="gpt2-small-res-jb"):
        load_sae("gpt2-small-res-jbb", "blocks.1.hook_resid_pre")
    with pytest.raises(NotAnSAE, match=r"blocks\.11\.hook_resid_pre"):
        load_sae(RELEASE, "blocks.111.hook_resid_pre")


@pytest.mark.parametrize("missing", ["hook_name", "model_name"])
def test_an_sae_without_a_hook_or_a_model_is_not_saved(model, tmp_path, missing):
    sae = tiny_sae(model)
    setattr(sae.cfg.metadata, missing, None)
    with pytest.raises(NotAnSAE, match=missing):
        save_sae(sae, tmp_path / "sae")


def test_what_is_still_in_training_form_is_not_saved(tmp_path):
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=8, d_sae=16, k=2))
    with pytest.raises(TypeError, match="TopKTrainingSAE"):
        save_sae(sae, tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


def test_an_sae_of_another_width_model_hook_or_state_is_refused_naming_both(model, tmp_path):
    check_sae(tiny_sae(model), model)
    wide = tiny_sae(model, hook="blocks.1.mlp.hook_post")
    with pytest.raises(SAEMismatch, match=r"width 32, blocks\.1\.mlp\.hook_post .*128"):
        check_sae(wide, model)
    with pytest.raises(UnknownHook, match="resid_post"):
        check_sae(tiny_sae(model, hook="blocks.1.hook_resid_pots"), model)
    other = tiny_sae(model)
    other.cfg.metadata.model_name = "gpt2-small"
    with pytest.raises(SAEMismatch, match=f"gpt2-small, the model is {model_name(model)}"):
        check_sae(other, model)
    twin = random_twin(model)
    with pytest.raises(SAEMismatch, match="random twin"):
        check_sae(tiny_sae(model), twin)
    try:
        model.train()
        with pytest.raises(ValueError, match="train mode"):
            check_sae(tiny_sae(model), model)
    finally:
        model.eval()


def test_gpt2_has_three_names_and_one_identity():
    assert (
        registry.plain_name("gpt2-small")
        == registry.plain_name("openai-community/gpt2")
        == registry.plain_name("gpt2")
    )
    assert registry.plain_name("gpt2-small") != registry.plain_name("gpt2-medium")


def test_an_sae_trained_on_other_weights_of_the_same_name_is_refused(model):
    from lenslab.models import model_key

    check_sae(tiny_sae(model, model_key=model_key(model)), model)
    with pytest.raises(SAEMismatch, match="0123456789abcdef"):
        check_sae(tiny_sae(model, model_key="0123456789abcdef"), model)


@pytest.fixture(scope="session")
def shaken_folder(gpt2_folder, tmp_path_factory):
    """GPT-2 with every parameter moved, so that norms, biases and means over d_model all matter."""
    from transformers import GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("shaken")
    shutil.copytree(gpt2_folder, folder, dirs_exist_ok=True)
    hf, generator = GPT2LMHeadModel.from_pretrained(gpt2_folder), torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    hf.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "hook", ["blocks.1.hook_resid_pre", "blocks.0.hook_mlp_out", "blocks.2.hook_resid_post"]
)
def test_centred_writing_weights_equal_the_transform_of_the_unprocessed_stream(shaken_folder, hook):
    raw, processed = load_model(shaken_folder), load_model(shaken_folder)
    processed.enable_compatibility_mode()
    tokens = torch.tensor([[0, 40, 50, 60, 70, 80]])
    _, ours = raw.run_with_cache(tokens)
    _, theirs = processed.run_with_cache(tokens)
    sae = tiny_sae(
        raw,
        hook=hook,
        model_from_pretrained_kwargs={"center_writing_weights": True, "fold_ln": True},
    )
    transform = input_transform(sae, raw)
    assert (ours[hook] - theirs[hook]).abs().max() > 0.05  # else there is nothing to test
    assert (transform(ours[hook]) - theirs[hook]).abs().max() < 1e-5
    assert (transform.inverse(transform(ours[hook]), ours[hook]) - ours[hook]).abs().max() < 1e-5


def test_the_transform_of_most_saes_is_the_identity(model, x):
    for kwargs in (None, {}, {"center_writing_weights": False}, {"fold_ln": True, "device": "cpu"}):
        transform = input_transform(tiny_sae(model, model_from_pretrained_kwargs=kwargs), model)
        assert torch.equal(transform(x), x)


def test_an_rms_model_is_not_centred_because_transformer_lens_leaves_it(shared):
    llama = load_model(shared / "fixtures" / "tinystories-656k")
    sae = tiny_sae(
        llama,
        hook="blocks.0.hook_resid_post",
        model_from_pretrained_kwargs={"center_writing_weights": True},
    )
    assert not input_transform(sae, llama).centred


def test_processing_that_cannot_be_expressed_is_refused_by_name(model):
    odd = tiny_sae(model, model_from_pretrained_kwargs={"divide_by_pi": True, "fold_ln": True})
    with pytest.raises(SAEMismatch, match="divide_by_pi"):
        check_sae(odd, model)
    heads = tiny_sae(
        model, hook="blocks.1.attn.hook_z", model_from_pretrained_kwargs={"fold_value_biases": True}
    )
    with pytest.raises(SAEMismatch, match="fold_value_biases"):
        check_sae(heads, model)


def test_heads_are_joined_for_an_sae_on_hook_z(model):
    sae = tiny_sae(model, hook="blocks.1.attn.hook_z")
    _, cache = model.run_with_cache(torch.tensor([[0, 40, 50]]))
    z = cache["blocks.1.attn.hook_z"]
    transform = input_transform(sae, model)
    assert z.ndim == 4 and torch.equal(transform(z), z.flatten(-2))
    assert torch.equal(transform.inverse(transform(z), z), z)


def test_neuronpedia_links_exist_where_the_sae_names_its_page(model):
    assert neuronpedia_link(tiny_sae(model), 3) is None
    sae = tiny_sae(model, neuronpedia_id="gpt2-small/6-res-jb")
    assert neuronpedia_link(sae, 17) == "https://www.neuronpedia.org/gpt2-small/6-res-jb/17"


def git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def fill_cache(hub, repository, files):
    """A hub cache as huggingface_hub leaves it: blobs named by their hash, a snapshot of links to
    them."""
    root, commit = hub / f"models--{repository.replace('/', '--')}", "a" * 40
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    for path, content in files.items():
        etag = git_hash(content) if path.endswith("json") else hashlib.sha256(content).hexdigest()
        (root / "blobs" / etag).write_bytes(content)
        place = root / "snapshots" / commit / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(root / "blobs" / etag, place.parent))
    return root


def twin_of_res_jb(folder):
    """gpt2-small-res-jb in small: a standard SAE with the flat config of SAELens before version
    6."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(5)
    sizes = dict(W_enc=(32, 64), W_dec=(64, 32), b_enc=(64,), b_dec=(32,))
    save_file(
        {k: torch.randn(s, generator=generator) for k, s in sizes.items()},
        folder / "sae_weights.safetensors",
    )
    config = dict(
        model_name="gpt2-small",
        hook_point=SAE_ID,
        d_in=32,
        d_sae=64,
        dtype="torch.float32",
        device="cpu",
    )
    (folder / "cfg.json").write_text(json.dumps(config))
    return {
        f"{SAE_ID}/{name}": (folder / name).read_bytes()
        for name in ("cfg.json", "sae_weights.safetensors")
    }


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub cache, offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_cached_release_loads_offline_with_hook_model_and_processing(hub, tmp_path):
    files = twin_of_res_jb(tmp_path / "twin")
    fill_cache(hub, REPOSITORY, files)
    sae = load_sae(RELEASE, SAE_ID, device="cpu")
    weights = load_file(tmp_path / "twin" / "sae_weights.safetensors")
    assert torch.equal(sae.W_enc, weights["W_enc"])
    assert (sae_hook(sae), sae.cfg.metadata.model_name) == (SAE_ID, "gpt2-small")
    assert sae.cfg.metadata.model_from_pretrained_kwargs == {"center_writing_weights": True}
    assert neuronpedia_link(sae, 5) == "https://www.neuronpedia.org/gpt2-small/1-res-jb/5"
    x = torch.randn(3, 32)
    by_hand = torch.relu((x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"])
    assert torch.allclose(sae.encode(x), by_hand, atol=1e-5)


def test_a_gemma_scope_release_in_npz_loads_offline(hub, tmp_path):
    path, file = "embedding/width_4k/average_l0_6", tmp_path / "params.npz"
    arrays = dict(
        w_enc=np.zeros((2304, 4096), np.float32), w_dec=np.zeros((4096, 2304), np.float32)
    )
    arrays |= dict(
        b_enc=np.zeros(4096, np.float32),
        b_dec=np.zeros(2304, np.float32),
        threshold=np.ones(4096, np.float32),
    )
    np.savez_compressed(file, **{k.replace("w_", "W_"): v for k, v in arrays.items()})
    fill_cache(hub, "google/gemma-scope-2b-pt-res", {f"{path}/params.npz": file.read_bytes()})
    sae = load_sae("gemma-scope-2b-pt-res", path, device="cpu")
    assert (sae.cfg.architecture(), sae_hook(sae), sae.cfg.d_sae) == (
        "jumprelu",
        "hook_embed",
        4096,
    )
    blob = next((hub / "models--google--gemma-scope-2b-pt-res" / "blobs").iterdir())
    os.truncate(blob, 5000)
    with pytest.raises(NotAnSAE, match=r"gemma-scope-2b-pt-res .*cut off"):
        load_sae("gemma-scope-2b-pt-res", path, device="cpu")


def test_an_sae_that_is_not_cached_gives_the_command_to_fetch_it(hub, capsys):
    command = f"python -m lenslab.sae.hub download {RELEASE} {SAE_ID}"
    with pytest.raises(SAENotHere, match=command.replace(".", r"\.")):
        load_sae(RELEASE, SAE_ID)
    assert hub_commands.main(["check", RELEASE, SAE_ID]) == 1
    assert command in capsys.readouterr().err


def test_a_release_without_an_id_says_how_to_name_one(hub, capsys):
    with pytest.raises(NotAnSAE, match=rf"load_sae\('{RELEASE}', 'blocks"):
        load_sae(RELEASE)
    assert hub_commands.main(["check", RELEASE]) == 1
    assert "blocks.0.hook_resid_pre" in capsys.readouterr().err


def test_a_list_of_nothing_says_so_with_the_nearest_models(hub, capsys):
    assert hub_commands.main(["list", "--model", "gpt2-smal"]) == 1
    shown = capsys.readouterr()
    assert not shown.out and re.search(r"Nearest: gpt2-small", shown.err)


def test_what_the_commands_advise_are_commands(hub, capsys):
    assert hub_commands.main(["download", "gpt2-small-res-jbb", SAE_ID]) == 1
    assert ".venv/bin/python -m lenslab.sae.hub list shows all" in capsys.readouterr().err


def test_a_bundled_sae_or_a_folder_is_not_taken_for_a_release(model, tmp_path, capsys):
    folder = save_sae(tiny_sae(model), tmp_path / "sae")
    for name in ("pocket-gpt-resid-3", str(folder)):
        for command in (["check", name, HOOK], ["download", name, HOOK], ["list", name]):
            assert hub_commands.main(command) == 1
            assert f"No release {name!r}" in capsys.readouterr().err
    assert hub_commands.main(["check", "pocket-gpt-resid-3"]) == 0


def test_the_list_of_a_release_names_its_saes_and_which_are_here(hub, tmp_path, capsys):
    fill_cache(hub, REPOSITORY, twin_of_res_jb(tmp_path / "twin"))
    assert hub_commands.main(["list", RELEASE]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(registry.paths_of(RELEASE))
    assert [line for line in lines if "cached" in line] == [f"{SAE_ID}  (cached)"]
    assert hub_commands.main(["list", "gpt2-small-res-jbb"]) == 1
    assert RELEASE in capsys.readouterr().err


def test_the_list_is_printed_without_importing_transformer_lens():
    code = """
import sys
from lenslab.sae.hub import main
assert main(["list", "--model", "gpt2"]) == main(["list", "gpt2-small-res-jb"]) == 0
print([name for name in ("transformer_lens", "sae_lens", "transformers") if name in sys.modules])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert RELEASE in ran.stdout and SAE_ID in ran.stdout and ran.stdout.splitlines()[-1] == "[]"


def test_the_list_is_the_one_that_saelens_loads_from():
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    theirs = get_pretrained_saes_directory()
    assert set(registry.releases()) == set(theirs)
    for name, release in theirs.items():
        assert registry.paths_of(name) == release.saes_map
        entry = registry.releases()[name]
        assert (entry["model"], entry["repo_id"]) == (release.model, release.repo_id)


def test_check_finds_a_cut_off_file_and_says_so(hub, tmp_path, capsys):
    root = fill_cache(hub, REPOSITORY, twin_of_res_jb(tmp_path / "twin"))
    assert hub_commands.main(["check", RELEASE, SAE_ID]) == 0
    assert f"{SAE_ID} of gpt2-small: 32 -> 64, standard" in capsys.readouterr().out
    weights = next(f for f in (root / "blobs").iterdir() if f.stat().st_size > 2000)
    os.truncate(weights, 1000)
    assert hub_commands.main(["check", RELEASE, SAE_ID]) == 1
    assert re.search(r"sae_weights.safetensors is damaged.* download ", capsys.readouterr().err)


def test_the_list_counts_what_is_cached_and_marks_pickles(hub, tmp_path, capsys):
    table = registry.list_releases("gpt2").set_index("release")
    assert (
        table.loc[RELEASE, "cached"] == 0
        and table.loc["gpt2-small-hook-z-kk", "format"] == "pickle, refused"
    )
    assert set(table["model"]) == {"gpt2-small"}
    fill_cache(hub, REPOSITORY, twin_of_res_jb(tmp_path / "twin"))
    assert registry.list_releases("gpt2-small").set_index("release").loc[RELEASE, "cached"] == 1
    assert hub_commands.main(["list", "--model", "gpt2"]) == 0
    assert RELEASE in capsys.readouterr().out


def test_a_published_sae_in_the_cache_is_used_before_one_is_trained(hub, tmp_path, model):
    gpt2 = random_twin(model, label="gpt2")
    fill_cache(hub, REPOSITORY, twin_of_res_jb(tmp_path / "twin"))
    found = find_sae(gpt2)
    assert (found.name, found.origin) == (
        f"{RELEASE} {SAE_ID}",
        "published, from the cache of the hub",
    )
    check_sae(found.sae, gpt2)
    assert neuronpedia_link(found.sae, 3).endswith("/gpt2-small/1-res-jb/3")


def test_releases_stored_as_pickles_are_refused_and_every_reader_of_pickles_is_known(hub):
    with pytest.raises(NotAnSAE, match=r"pickles.*list --model gpt2-small"):
        load_sae("gpt2-small-hook-z-kk", "blocks.1.hook_z")
    import inspect

    from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS as readers

    unsafe = {name for name, reader in readers.items() if "torch.load" in inspect.getsource(reader)}
    assert unsafe == registry.PICKLED


class FakeHub(BaseHTTPRequestHandler):
    """Serves files as the hub does; the first transfer of the weights breaks off half-way."""

    files, requests, broken = {}, [], []
    protocol_version = "HTTP/1.1"

    def answer(self, body):
        path = self.path.split("/resolve/main/")[-1]
        content = self.files.get(path)
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", "b" * 40)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        self.requests.append((self.command, path, start))
        self.send_response(206 if wanted else 200)
        self.send_header("X-Repo-Commit", "b" * 40)
        json_file = path.endswith("json")
        etag = git_hash(content) if json_file else hashlib.sha256(content).hexdigest()
        self.send_header("ETag", f'"{etag}"')
        self.send_header("Content-Length", str(len(content) - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if body and path.endswith("safetensors") and not self.broken:
            self.broken.append(path)
            self.wfile.write(content[start : len(content) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
        elif body:
            self.wfile.write(content[start:])

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def log_message(self, *args):
        pass


SESSION = """
import os, pathlib, sys
from lenslab.sae.hub import main
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 1000  # whole chunks are kept of a broken transfer; 10 MB by default
command = ["download", {release!r}, {sae_id!r}]
assert main(command) == 0
print("FETCHED"); sys.stderr.flush()
weights = max(pathlib.Path(constants.HF_HUB_CACHE).rglob("blobs/*"), key=lambda f: f.stat().st_size)
assert main(command) == 0
print("AGAIN")
os.truncate(weights, 3000)
assert main(["check", *command[1:]]) == 1
assert main(command) == 0
assert main(["check", *command[1:]]) == 0
"""


def test_a_broken_download_goes_on_where_it_stopped_and_a_cut_off_file_is_fetched_anew(tmp_path):
    files = twin_of_res_jb(tmp_path / "twin")
    FakeHub.files, FakeHub.requests, FakeHub.broken = files, [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    online = {
        k: v
        for k, v in os.environ.items()
        if not k.endswith("_OFFLINE") and "proxy" not in k.lower()
    }
    online |= dict(
        HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=str(tmp_path / "home")
    )
    online |= dict(HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1")
    code = SESSION.format(release=RELEASE, sae_id=SAE_ID)
    try:
        ran = subprocess.run(
            [sys.executable, "-c", code], env=online, capture_output=True, text=True, timeout=300
        )
    finally:
        server.shutdown()
    assert ran.returncode == 0, ran.stderr[-3000:]
    weights = f"{SAE_ID}/sae_weights.safetensors"
    fetched = [
        start for command, path, start in FakeHub.requests if command == "GET" and path == weights
    ]
    half = len(files[weights]) // 2
    assert half - 1000 <= fetched[1] <= half
    assert [fetched[0], *fetched[2:]] == [
        0,
        0,
    ]  # broken off, resumed; not fetched again while whole; fetched anew once cut off


@pytest.fixture(scope="module")
def text_batch(model):
    return pack(
        model,
        [
            f"{a} and {b} make {a + b}, said the cat on mat {b}."
            for a in range(20)
            for b in range(20)
        ],
    )


def test_a_small_sae_is_trained_the_same_again_and_knows_its_model(
    model, text_batch, tmp_path, monkeypatch
):
    from lenslab.models import model_key

    made = []
    for name in ("first", "again"):
        monkeypatch.setenv("LENSLAB_CACHE", str(tmp_path / name))
        made.append(small_sae(model, HOOK, text_batch, 6))
    kept = small_sae(model, HOOK, text_batch, 6)
    assert all(torch.equal(made[0].W_dec, other.W_dec) for other in (made[1], kept))
    check_sae(kept, model)
    about = kept.cfg.metadata
    assert (sae_hook(kept), kept.cfg.k, about.model_key) == (HOOK, 16, model_key(model))
    x = torch.randn(9, 32)
    assert torch.equal(kept(x), made[0](x)) and int((kept.encode(x) != 0).sum(-1).max()) <= 16
    assert torch.allclose(kept.W_dec.norm(dim=1), torch.ones(1024), atol=1e-5)


def test_training_refuses_an_unknown_hook_and_too_little_text(model, text_batch):
    with pytest.raises(UnknownHook):
        small_sae(model, "blocks.9.hook_resid_post", text_batch, 6)
    with pytest.raises(ValueError, match="vectors"):
        small_sae(model, HOOK, text_batch[:2], 6)


def test_a_small_sae_is_trained_on_real_tokens_that_the_model_gave_once(
    model, text_batch, tmp_path, monkeypatch
):
    from lenslab.sae.train import sources

    monkeypatch.setenv("LENSLAB_CACHE", str(tmp_path))

    seen, kept = [], sources.harvest
    monkeypatch.setattr(
        sources,
        "harvest",
        lambda *given, **options: seen.append(given[1]) or kept(*given, **options),
    )
    sae = small_sae(model, HOOK, text_batch, 12)  # more than an epoch
    assert [part.n_real for part in seen] == [
        text_batch.n_real
    ] and text_batch.n_real < 12 * TRAIN_BATCH
    assert sae.cfg.metadata.training_vectors == 12 * TRAIN_BATCH
    assert sae.cfg.metadata.distinct_training_vectors == text_batch.n_real


def test_the_script_saves_an_sae_that_loads_with_its_measures_and_its_null(
    gpt2_folder, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(str(data_path().parent / "scripts"))
    import pocket_corpus
    import train_pocket_saes

    monkeypatch.setattr(
        pocket_corpus, "read_python", lambda: ["def add(a, b):\n    return a + b\n" * 9] * 20
    )
    # so short are the windows, and so much alike the texts, that ends of sentences are shared
    monkeypatch.setattr("lenslab.sae.train.trainer.SHARED", 0.2)
    (tmp_path / "corpus" / "narrative").mkdir(parents=True)
    lines = [
        f"The cat number {i} sat on mat {i * 7 % 13}. It was said to be {i % 5} years old. " * 6
        for i in range(500)
    ]
    with gzip.open(tmp_path / "corpus" / "narrative" / "cats.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": line}) + "\n" for line in lines)
    options = [
        "--corpus",
        str(tmp_path / "corpus"),
        "--model",
        str(gpt2_folder),
        "--sites",
        "resid-1",
        "--smoke",
    ]
    where = ["--out", str(tmp_path / "saes"), "--work", str(tmp_path / "work")]
    (out,) = train_pocket_saes.main([*options, *where])
    model, sae, card = (
        load_model(gpt2_folder),
        load_sae(out, device="cpu"),
        json.loads((out / "card.json").read_text()),
    )
    check_sae(sae, model)
    assert load_file(out / "sae_weights.safetensors")["W_enc"].dtype == torch.bfloat16
    assert (
        card["sae"]["hook"] == HOOK
        and card["sae"]["l0"] <= 8
        and card["trained_on"]["distinct_vectors"] > 3e4
    )
    assert card["sae"]["variance_explained"] > 0 and card["null"]["variance_explained"] > 0
    assert 1000 < card["sae"]["n_tokens"] <= 4100
    assert {k: level["ships"] for k, level in card["at_l0"].items()} == {"8": True, "4": False}
    assert card["at_l0"]["8"]["sae"] == card["sae"] and card["at_l0"]["4"]["sae"]["l0"] <= 4
