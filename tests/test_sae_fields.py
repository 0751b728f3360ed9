"""What would make an SAE compute something else in silence: fields of its config, edited files, a
save that was cut off, a model or texts that are not the ones it was made for."""

import copy
import json
import multiprocessing
import os
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_sae_pretrained import HOOK, edit_config, shaken_folder, tiny_sae  # noqa: F401  (a fixture)

from lenslab.circuits.interventions import splice
from lenslab.features.activations import encode_features
from lenslab.files import data_path
from lenslab.models import load_model, model_key, model_name, random_twin
from lenslab.sae import find, load, save
from lenslab.sae.evaluate import evaluate_sae
from lenslab.sae.inputs import (
    SAEMismatch,
    check_sae,
    encode,
    input_transform,
    neuronpedia_link,
    sae_key,
)
from lenslab.sae.load import bundled_saes, finish, load_sae
from lenslab.sae.registry import NotAnSAE
from lenslab.sae.save import save_sae
from lenslab.tokens import TokenBatch, tokenize

REFUSED = (ValueError, TypeError)  # by the code, or before it by the types that tests check

TEXTS = ["A cat sat on the mat.", "2 + 2 = 4"]


@pytest.fixture
def x():
    return torch.randn(7, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def batch(model):
    return tokenize(model, TEXTS)


def written_by_hand(model, folder, architecture="standard", remove=(), about=(), **fields):
    """A folder without hashes, as other tools write it, with some fields set or removed."""

    def change(config):
        config.update(fields)
        config["metadata"] |= dict(about)
        for name in ("weights_sha256", "config_key"):
            config["metadata"].pop(name, None)
        for name in remove:
            config.pop(name)

    save_sae(tiny_sae(model, architecture=architecture), folder)
    edit_config(folder, change)
    return folder


@pytest.mark.parametrize(
    "architecture, change, named",
    [
        (
            "standard",
            dict(normalize_activations="expected_average_only_in"),
            "fold_activation_norm",
        ),
        ("standard", dict(normalize_activations="covariance_whitening"), "covariance_whitening"),
        ("standard", dict(normalize_activations="some_new_mode"), "some_new_mode"),
        ("topk", dict(remove=["k"]), "k is None"),
        ("topk", dict(k=0), "k is 0"),
        ("topk", dict(k=49), "k is 49"),
        ("topk", dict(k=2.5), "k is 2.5"),
        ("standard", dict(activation_fn="topk"), "activation_fn 'topk'"),
        ("jumprelu", dict(activation_fn_str="tanh-relu"), "activation_fn 'tanh-relu'"),
        ("topk", dict(topk_k=16), "topk_k"),
        ("standard", dict(prepend_bos=False), "prepend_bos"),  # its place is metadata
    ],
)
def test_a_field_that_would_be_ignored_is_refused_by_name(
    model, tmp_path, architecture, change, named
):
    folder = written_by_hand(model, tmp_path / "sae", architecture, **change)
    with pytest.raises(NotAnSAE, match=named):
        load_sae(folder, device="cpu")


@pytest.mark.parametrize(
    "architecture, field",
    [("standard", "apply_b_dec_to_input"), ("topk", "rescale_acts_by_decoder_norm")],
)
@pytest.mark.parametrize("value", ["false", 0, None])
def test_what_is_neither_true_nor_false_is_not_taken_for_true(
    model, tmp_path, architecture, field, value
):
    folder = written_by_hand(model, tmp_path / "sae", architecture, **{field: value})
    with pytest.raises(NotAnSAE, match=f"{field} is {value!r}, not true or false"):
        load_sae(folder, device="cpu")


@pytest.mark.parametrize(
    "about",
    [
        dict(prepend_bos="false"),
        dict(prepend_bos=0),
        dict(model_from_pretrained_kwargs=["center_writing_weights"]),
        dict(model_key=813541),
        dict(context_size="12"),
        dict(hook_name=[HOOK]),
    ],
)
def test_metadata_of_another_kind_are_refused_by_name(model, tmp_path, about):
    folder = written_by_hand(model, tmp_path / "sae", about=about)
    with pytest.raises(NotAnSAE, match=f"sae: {next(iter(about))} is .*, not "):
        load_sae(folder, device="cpu")


def test_metadata_that_are_a_list_are_no_saes(model, tmp_path):
    folder = written_by_hand(model, tmp_path / "sae")
    edit_config(folder, lambda config: config.update(metadata=[1]))
    with pytest.raises(NotAnSAE, match="does not fit"):
        load_sae(folder, device="cpu")


def test_weights_that_are_integers_are_refused(model, tmp_path):
    file = written_by_hand(model, tmp_path / "sae") / "sae_weights.safetensors"
    save_file({k: (10 * v).to(torch.int8) for k, v in load_file(file).items()}, file)
    with pytest.raises(NotAnSAE, match="holds integers"):
        load_sae(tmp_path / "sae", device="cpu")


def test_an_sae_that_reads_several_tokens_at_a_time_is_refused(model):
    from sae_lens import SAE

    config = tiny_sae(model).cfg.to_dict() | dict(
        architecture="temporal", kval_topk=3, n_heads=4, bottleneck_factor=1
    )
    with pytest.raises(NotAnSAE, match="several tokens"):
        finish(SAE.from_dict(config), "mine")


def old_config(model, folder, **fields):
    """The flat cfg.json of SAELens before version 6, options of its training included."""
    save_sae(tiny_sae(model), folder)
    config = dict(model_name=model_name(model), hook_point=HOOK, d_in=32, d_sae=48)
    config |= dict(dtype="torch.float32", device="cpu", l1_coefficient=1e-3, lp_norm=1.0)
    (folder / "cfg.json").write_text(json.dumps(config | fields))
    return folder


def test_fields_of_older_versions_are_honoured_or_refused(model, tmp_path, x):
    topk = dict(activation_fn_str="topk", activation_fn_kwargs={"k": 3})
    sae = load_sae(old_config(model, tmp_path / "sae", **topk), device="cpu")
    assert int((sae.encode(x) != 0).sum(-1).max()) <= 3
    assert load_sae(old_config(model, tmp_path / "sae", activation_fn_str="relu"), device="cpu")
    for fields in (dict(activation_fn_str="topk"), dict(normalize_activations=True)):
        with pytest.raises(NotAnSAE, match=r"'topk'|expected_average_only_in"):
            load_sae(old_config(model, tmp_path / "sae", **fields), device="cpu")


def test_an_sae_opened_by_saelens_is_refused_where_its_inputs_must_be_scaled(model, batch):
    sae = tiny_sae(model)
    sae.cfg.normalize_activations = "expected_average_only_in"
    with pytest.raises(NotAnSAE, match="expected_average_only_in"):
        evaluate_sae(model, sae, batch)


@pytest.mark.parametrize("scaling", ["constant_norm_rescale", "layer_norm"])
def test_norms_of_tokens_are_remembered_for_their_features(model, tmp_path, x, scaling):
    from sae_lens import SAE

    folder = written_by_hand(model, tmp_path / "sae", normalize_activations=scaling)
    sae, theirs = load_sae(folder, device="cpu"), SAE.load_from_disk(folder)
    assert torch.allclose(sae.encode(x), theirs.encode(x), atol=1e-5)
    once = theirs.decode(theirs.encode(x))
    first, second = sae.encode(x), sae.encode(10 * x + 1)
    for _ in range(2):
        assert torch.allclose(sae.decode(first), once, atol=1e-5)
    assert not torch.allclose(sae.decode(second), once, atol=1e-1)
    edited = sae.decode(sae.encode(x) * 1)  # another tensor: of the tokens encoded last
    assert torch.allclose(edited, once, atol=1e-5)
    with pytest.raises(ValueError, match="encoded last"):
        sae.decode(torch.zeros(3, 48))
    padded = torch.cat([x, torch.zeros(2, 32)])
    assert sae(padded).isfinite().all()
    twin = copy.deepcopy(sae)
    twin.W_enc.zero_()
    assert not torch.equal(twin.encode(x), sae.encode(x)) and isinstance(sae, type(theirs))
    again = load_sae(save_sae(sae, tmp_path / "again"), device="cpu")
    assert torch.equal(again(x), sae(x)) and sae_key(again) == sae_key(sae)


@pytest.mark.parametrize("kind", ["transcoder", "skip_transcoder", "jumprelu_skip_transcoder"])
@pytest.mark.parametrize("hook_name_out", [None, HOOK])
def test_a_transcoder_is_known_without_the_hook_that_it_writes(model, batch, kind, hook_name_out):
    from sae_lens import SAE

    config = tiny_sae(model).cfg.to_dict() | dict(architecture=kind, d_out=32)
    config["metadata"] |= dict(hook_name_out=hook_name_out)
    sae = SAE.from_dict(config | dict(apply_b_dec_to_input=False)).eval()
    with pytest.raises(ValueError, match="transcoder"):
        evaluate_sae(model, sae, batch)
    with pytest.raises(ValueError, match="transcoder"), splice(model, sae):
        pass


def test_an_sae_trained_without_bos_does_not_read_texts_that_begin_with_it(model, batch):
    sae = tiny_sae(model, prepend_bos=False)
    with pytest.raises(SAEMismatch, match="bos=False"):
        evaluate_sae(model, sae, batch)
    with pytest.raises(SAEMismatch, match="bos=False"):
        encode_features(model, sae, batch)
    rows = (batch.tokens[:, 1:], batch.real[:, 1:], batch.attention[:, 1:])
    assert evaluate_sae(model, sae, TokenBatch(*rows, batch.texts)).l0 > 0
    assert evaluate_sae(model, tiny_sae(model, prepend_bos=True), batch).l0 > 0


def test_arguments_that_only_say_how_to_load_are_no_processing(model, x):
    harmless = dict(n_ctx=64, trust_remote_code=True, device_map="auto", torch_dtype="float16")
    transform = input_transform(tiny_sae(model, model_from_pretrained_kwargs=harmless), model)
    assert torch.equal(transform(x), x)
    with pytest.raises(SAEMismatch, match="checkpoint_value"):
        processing = dict(checkpoint_value=1000)
        check_sae(tiny_sae(model, model_from_pretrained_kwargs=processing), model)


@pytest.mark.parametrize(
    "hook", ["blocks.1.hook_out", "blocks.1.hook_in", "blocks.0.attn.hook_out"]
)
def test_a_stream_is_centred_under_its_newer_name_too(model, hook):
    sae = tiny_sae(model, hook, model_from_pretrained_kwargs=dict(center_writing_weights=True))
    assert input_transform(sae, model).centred


def test_an_sae_is_used_on_a_copy_or_a_fine_tune_when_one_says_so(model, batch):
    tuned = random_twin(model, label="snapshots-0f3a")
    sae = tiny_sae(model, model_key=model_key(model))
    with pytest.raises(SAEMismatch, match=r"metadata\.model_name = 'snapshots-0f3a'"):
        check_sae(sae, tuned)
    sae.cfg.metadata.model_name = "snapshots-0f3a"
    with pytest.raises(SAEMismatch, match=r"metadata\.model_key = None"):
        check_sae(sae, tuned)
    sae.cfg.metadata.model_key = None
    assert evaluate_sae(tuned, sae, batch).model == "snapshots-0f3a"
    with pytest.raises(SAEMismatch, match="width"):
        check_sae(tiny_sae(model, "blocks.1.mlp.hook_post"), model)


def test_the_same_weights_in_another_dtype_are_accepted_with_a_word(model, gpt2_folder, tmp_path):
    half = load_model(gpt2_folder, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match=r"bfloat16: not compared"):
        check_sae(tiny_sae(model, model_key=model_key(model)), half)
    word = r"these weights in another dtype than torch\.float32"
    with pytest.warns(UserWarning, match=word):
        check_sae(tiny_sae(model, model_key=model_key(half)), model)
    shutil.copytree(gpt2_folder, tmp_path / "half")
    file = tmp_path / "half" / "model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file, {"format": "pt"})
    whole, half = (load_model(tmp_path / "half", dtype=d) for d in (torch.float32, torch.bfloat16))
    for whole.cfg.model_name in [model_name(half)]:
        with pytest.warns(UserWarning, match=word):
            check_sae(tiny_sae(half, model_key=model_key(half)), whole)
        with pytest.warns(UserWarning, match=word.replace("float32", "bfloat16")):
            check_sae(tiny_sae(half, model_key=model_key(whole)), half)
    other = random_twin(model, label=model_name(model))
    with pytest.raises(SAEMismatch, match="has others"):
        check_sae(tiny_sae(model, model_key=model_key(half)), other)


def test_processing_in_words_is_refused_because_false_would_count_as_true(model):
    sae = tiny_sae(model, model_from_pretrained_kwargs=dict(center_writing_weights="false"))
    with pytest.raises(SAEMismatch, match="center_writing_weights is 'false'"):
        check_sae(sae, model)


def test_decoder_rows_of_several_lengths_are_told_with_how_to_fold_them(model, tmp_path, x):
    folder = save_sae(tiny_sae(model), tmp_path / "sae")
    with pytest.warns(UserWarning, match=r"fold_W_dec_norm"):
        sae = load_sae(folder, device="cpu")
    before = sae(x)
    sae.fold_W_dec_norm()
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(48)) and torch.allclose(sae(x), before)


# Files


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["metadata"].update(hook_name="blocks.0.hook_resid_post"),
        lambda c: c["metadata"].update(model_name="gpt2"),
        lambda c: c["metadata"].update(prepend_bos=False),
        lambda c: c["metadata"].update(
            model_from_pretrained_kwargs={"center_writing_weights": True}
        ),
        lambda c: c.update(apply_b_dec_to_input=False),
        lambda c: c["metadata"].pop("config_key"),
        lambda c: c["metadata"].update(config_key=None, prepend_bos=False),
        lambda c: c["metadata"].pop("weights_sha256"),
    ],
)
def test_a_config_that_was_edited_is_refused_also_where_it_ships(model, tmp_path, change):
    shutil.copytree(data_path("saes", bundled_saes()[0]), tmp_path / "bundled")
    for folder in (save_sae(tiny_sae(model), tmp_path / "own"), tmp_path / "bundled"):
        assert load_sae(folder, device="cpu")
        edit_config(folder, lambda c: None)  # another layout of the same
        assert load_sae(folder, device="cpu")
        edit_config(folder, change)
        with pytest.raises(NotAnSAE, match="hash"):
            load_sae(folder, device="cpu")


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(k=6),
        lambda c: c.pop("k"),
        lambda c: c.update(rescale_acts_by_decoder_norm=True),
    ],
)
def test_an_edited_number_of_active_latents_is_refused(model, tmp_path, change):
    folder = save_sae(tiny_sae(model, architecture="topk"), tmp_path / "own")
    edit_config(folder, change)
    with pytest.raises(NotAnSAE, match=r"hash|k is None"):
        load_sae(folder, device="cpu")


def test_a_bundled_sae_is_never_without_its_hashes(tmp_path, monkeypatch):
    """Of other tools' SAEs there are none; of ours someone took them away."""
    folder = tmp_path / "saes" / "bundled"
    shutil.copytree(data_path("saes", bundled_saes()[0]), folder)
    edit_config(folder, lambda c: [c["metadata"].pop(name) for name in load.HASHES])
    assert load_sae(folder, device="cpu")
    monkeypatch.setattr(load, "data_path", lambda *parts: tmp_path.joinpath(*parts))
    with pytest.raises(NotAnSAE, match="hash"):
        load_sae(folder, device="cpu")


def test_weights_of_another_sae_are_refused(model, tmp_path):
    one, other = (save_sae(tiny_sae(model, seed=i), tmp_path / str(i)) for i in range(2))
    shutil.copy(other / "sae_weights.safetensors", one)
    with pytest.raises(NotAnSAE, match="hash"):
        load_sae(one)


def test_a_loaded_sae_may_be_changed_and_saved(model, tmp_path):
    sae = load_sae(save_sae(tiny_sae(model), tmp_path / "sae"), device="cpu")
    sae.cfg.metadata.model_name = "mine"
    assert load_sae(save_sae(sae, tmp_path / "sae"), device="cpu").cfg.metadata.model_name == "mine"


def save_until_killed(sae, folder, at):
    """In another process, which ends without a word at its renaming number `at`."""
    renamed, rename = [], os.replace

    def killed(*places):
        renamed.append(places)
        if len(renamed) == at:
            os._exit(9)
        rename(*places)

    os.replace = killed
    save_sae(sae, folder)


@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize("there", [True, False])
def test_a_save_killed_at_any_renaming_leaves_one_whole_sae(model, tmp_path, x, there, at):
    first, second = tiny_sae(model, seed=1), tiny_sae(model, seed=2)
    folder = tmp_path / "sae"
    if there:
        save_sae(first, folder)
    process = multiprocessing.get_context("fork").Process(
        target=save_until_killed, args=(second, folder, at)
    )
    process.start()
    process.join()
    if there or at > 1:  # else there is none yet
        loaded = load_sae(folder, device="cpu")(x)
        assert torch.equal(loaded, second(x)) or (there and torch.equal(loaded, first(x)))
    third = tiny_sae(model, seed=3)
    save_sae(third, folder)
    assert torch.equal(load_sae(folder, device="cpu")(x), third(x))
    assert [file.name for file in tmp_path.iterdir()] == ["sae"]


def test_left_over_folders_of_another_name_are_left(model, tmp_path):
    (tmp_path / ".my-sae-new-12").mkdir()
    (tmp_path / ".sae-new-of-ours").mkdir()
    save_sae(tiny_sae(model), tmp_path / "sae")
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("step", ["save_file", "write_json", "replace"])
def test_a_full_disk_is_said_in_a_sentence_and_the_old_one_stays(
    model, tmp_path, x, monkeypatch, step
):
    save_sae(sae := tiny_sae(model, seed=1), tmp_path / "sae")
    full = SafetensorError if step == "save_file" else OSError

    def fail(*given, **options):
        raise full("No space left on device")

    rename = os.replace
    if step == "replace":  # the second of folders
        swaps = iter([rename, rename, fail, rename])
        monkeypatch.setattr(os, "replace", lambda *places: next(swaps)(*places))
    else:
        monkeypatch.setattr(save, step, fail)
    with pytest.raises(OSError, match=r"sae was not saved, what was there stays: No space"):
        save_sae(tiny_sae(model, seed=2), tmp_path / "sae")
    monkeypatch.setattr(os, "replace", rename)
    assert torch.equal(load_sae(tmp_path / "sae", device="cpu")(x), sae(x))
    assert [file.name for file in tmp_path.iterdir()] == ["sae"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool])
def test_weights_are_not_saved_as_integers(model, tmp_path, dtype):
    with pytest.raises(TypeError, match="integers"):
        save_sae(tiny_sae(model), tmp_path / "sae", dtype=dtype)
    assert not (tmp_path / "sae").exists()


def test_weights_that_do_not_fit_the_dtype_are_not_saved_over_others(model, tmp_path):
    sae = tiny_sae(model)
    save_sae(sae, tmp_path / "sae")
    sae.W_dec[0, 0] = 1e6
    with pytest.raises(NotAnSAE, match="W_dec holds NaN or Inf"):
        save_sae(sae, tmp_path / "sae", dtype=torch.float16)
    assert load_sae(tmp_path / "sae", device="cpu")


def test_a_path_from_home_is_one(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert save_sae(tiny_sae(model), "~/sae") == tmp_path / "sae"


# Keys and inputs


def test_the_key_of_an_sae_covers_all_that_changes_a_number(model):
    base = tiny_sae(model, architecture="topk")
    keys = {sae_key(base)}
    for change in (
        dict(k=4),
        dict(apply_b_dec_to_input=False),
        dict(rescale_acts_by_decoder_norm=True),
        dict(normalize_activations="layer_norm"),
        dict(dtype="bfloat16"),
        dict(
            metadata=base.cfg.metadata.to_dict() | {"model_from_pretrained_kwargs": {"fold": True}}
        ),
    ):
        other = type(base).from_dict(base.cfg.to_dict() | change)
        other.load_state_dict(base.state_dict())
        keys.add(sae_key(other))
    base.W_dec[0, 0] += 1
    assert len(keys | {sae_key(base)}) == 8
    assert sae_key(base) == sae_key(copy.deepcopy(base))


def test_the_key_of_an_sae_covers_an_activation_function_that_was_put_in(model):
    sae = tiny_sae(model, architecture="topk")
    keys = [sae_key(sae), sae_key(sae.train()), sae_key(copy.deepcopy(sae))]
    assert len(set(keys)) == 1
    sae.activation_fn.k = 2
    keys.append(sae_key(sae))
    for sae.activation_fn in (torch.nn.ReLU(), torch.nn.LeakyReLU(0.1), torch.nn.LeakyReLU(0.2)):
        keys.append(sae_key(sae))
    assert len(set(keys)) == 5


def test_arguments_that_are_swapped_are_named(model, batch):
    for function in (check_sae, input_transform):
        with pytest.raises(TypeError, match=r"is no SAE: .*\(sae, model\)|parameter 'sae'"):
            function(model, tiny_sae(model))


def test_keys_of_what_ships_stay(model):
    known = {
        "pocket-gpt-resid-3": "b3b6159482e4380c",
        "pocket-gpt-random-twin-resid-3": "5148a59b9062aa87",
    }
    assert {name: sae_key(load_sae(name, device="cpu")) for name in known} == known


def test_what_is_no_value_of_the_hook_is_refused(model):
    transform = input_transform(tiny_sae(model), model)
    heads = input_transform(tiny_sae(model, "blocks.1.attn.hook_z"), model)
    for prepare, value in (
        (transform, torch.zeros(7, 31)),
        (transform, torch.zeros(32, 7)),
        (transform, torch.zeros(2, 7, 4, 8)),
        (heads, torch.zeros(7, 32)),  # joined already
    ):
        with pytest.raises(SAEMismatch, match="as at the hook"):
            prepare(value)
    assert transform(torch.zeros(32)).shape == (32,)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_tokens_and_masks_are_no_activations(model, dtype):
    x = torch.ones(7, 32, dtype=dtype)
    with pytest.raises(REFUSED, match=r"activations|parameter"):
        input_transform(tiny_sae(model), model)(x)


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_nan_is_refused_whatever_the_architecture(model, x, architecture):
    x[3, 4] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        encode(tiny_sae(model, architecture=architecture), x)


@pytest.mark.parametrize("index", [2.9, -1, 48, "3", None])
def test_a_latent_that_is_not_there_has_no_page(model, index):
    with pytest.raises(REFUSED, match=r"0 to 47|index"):
        neuronpedia_link(tiny_sae(model, neuronpedia_id="gpt2-small/6-res-jb"), index)


def test_on_a_model_of_long_context_an_sae_is_trained_on_short_windows(model, monkeypatch):
    seen = []
    monkeypatch.setattr(model.cfg, "n_ctx", 131_072)
    monkeypatch.setattr(
        find, "small_sae", lambda model, hook, batch, steps: seen.append(batch) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        find.find_sae(model)
    assert seen[0].tokens.shape == (128, 1024)  # as many as one pool holds
