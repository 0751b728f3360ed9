"""Every release that SAELens's registry lists is placed by its names, or refused by name; nothing
is fetched."""

from collections import Counter
from functools import cache

import pytest

from lenslab.sae.registry import NotAnSAE, Place, is_safe, paths_of, place_of, releases


@cache
def placed(release):
    """(the places of all SAEs of a release, the sentences of those that are refused)."""
    places, refused = {}, set()
    for sae_id in paths_of(release):
        try:
            places[sae_id] = place_of(release, sae_id)
        except NotAnSAE as error:
            refused.add(str(error))
    return places, refused


def test_every_release_is_placed_or_refused_by_name():
    reasons = Counter()
    for release in releases():
        places, refused = placed(release)
        assert not (places and refused), f"{release} is refused in part: {refused}"
        assert all(release in sentence for sentence in refused)
        whole = next(iter(refused), "placed")
        kinds = ("pickles", "transcoders", "several tokens", "placed")
        reasons[next(kind for kind in kinds if kind in whole)] += 1
        if "clt" in release or "transcoder" in release:
            assert "transcoders" in whole
        assert ("pickles" in whole) == (not is_safe(release))
    assert sum(reasons.values()) == len(releases()) >= 170
    assert all(reasons.values()) and reasons["placed"] > 80, reasons


def test_places_agree_with_what_ids_and_paths_say():
    for release in releases():
        for sae_id, place in placed(release)[0].items():
            path = paths_of(release)[sae_id]
            for word, stream in {"resid_post": "residual", "mlp_out": "mlp"}.items():
                if word in f"{sae_id} {path}":
                    assert place.stream == stream, (release, sae_id)
            if "blocks." in sae_id:
                assert sae_id.startswith(f"blocks.{place.layer}.")
            assert 0 <= place.layer < 100


KNOWN = """
gpt2-small-res-jb blocks.8.hook_resid_pre  residual_pre 8  mean over d_model removed
gpt2-small-attn-out-v5-32k blocks.10.hook_attn_out  attention 10  as it stands
gpt2-small-mlp-out-v5-32k blocks.6.hook_mlp_out  mlp 6  as it stands
gemma-scope-2-1b-pt-att layer_13_width_16k_l0_small  heads 13  as it stands
llama_scope_lxm_8x l31m_8x  mlp 31  scaled to a mean norm of sqrt(d_in)
mistral-7b-res-wg blocks.16.hook_resid_pre  residual_pre 16  constant_norm_rescale
gemma-scope-2b-pt-res embedding/width_4k/average_l0_6  embedding 0  as it stands
""".strip().splitlines()


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.split()[0])
def test_some_places_that_are_known(known):
    release, sae_id, stream, layer, processing = known.split(maxsplit=4)
    assert place_of(release, sae_id) == Place(stream, int(layer), processing)


def test_names_that_say_no_place_are_refused(monkeypatch):
    entry = {"model": "m", "repo_id": "r", "saes": [{"id": "nameless", "path": "p"}]}
    monkeypatch.setattr("lenslab.sae.registry.releases", lambda: {"new-release": entry})
    with pytest.raises(NotAnSAE, match="new-release nameless does not say"):
        place_of("new-release", "nameless")
