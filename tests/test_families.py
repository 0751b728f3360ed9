"""Phases 1 and 2 run whole on every family of models, and leave out what a family has not.

The sources are run as VSCode runs them, in this process, so that shapes are checked as in every
test. A family is a random model of two layers in a folder; the SAE that a notebook trains for it
takes 20 steps here instead of 300.
"""

import runpy
from functools import partial

import pytest
import torch
from conftest import make_tokenizer

from lenslab.files import REPOSITORY
from lenslab.sae.find import find_sae
from lenslab.texts import sampled_text

SOURCES = sorted((REPOSITORY / "notebooks" / "interactive").glob("*.py"))
PHASES = [source.stem for source in SOURCES]

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
GROUPED = SMALL | dict(num_key_value_heads=2)
MIXED = GROUPED | dict(num_experts=4, num_experts_per_tok=2, num_local_experts=4)
SLIDING = dict(sliding_window=32, layer_types=["sliding_attention", "full_attention"])
FAMILIES = {  # as transformers calls them
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64),  # shorter than the texts
    "llama": GROUPED,
    "gemma2": GROUPED | SLIDING | dict(head_dim=8),
    "gemma3_text": GROUPED | SLIDING | dict(head_dim=8),
    "qwen2": GROUPED,
    "qwen3": GROUPED | dict(head_dim=8),
    "gpt_neox": SMALL,
    "phi": SMALL,
    "olmoe": MIXED,
    "mixtral": MIXED,
}
OTHERS = {  # odd in one way or another: only `make test-all` runs them
    "gpt_oss": MIXED | SLIDING | dict(head_dim=8),  # no hook at the router, attention sinks
    "qwen2_moe": MIXED | dict(moe_intermediate_size=24, decoder_sparse_step=2),  # a dense block
    "falcon": SMALL | dict(parallel_attn=True),  # one key for all heads
    "gptj": dict(n_embd=32, n_layer=2, n_head=4, n_positions=512, rotary_dim=4),
}
PARALLEL = {"gpt_neox", "phi", "falcon", "gptj"}  # attention and MLP side by side


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder of a family's model, made when it is first asked for."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    root = tmp_path_factory.mktemp("families")

    def make(family: str):
        folder = root / family
        if not folder.exists():
            make_tokenizer(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            ids = dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)
            fields = dict(max_position_embeddings=512) | ids | (FAMILIES | OTHERS)[family]
            config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **fields)
            torch.manual_seed(4)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def run_phase(folder_of, tmp_path, monkeypatch, capsys):
    """What a phase prints on a family's model."""
    monkeypatch.setenv("LENSLAB_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("LENSLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PLOTLY_RENDERER", "json")  # none is shown; other tests keep theirs
    quick = partial(find_sae, documents=60, steps=20)
    monkeypatch.setattr("lenslab.sae.find.find_sae", quick)
    monkeypatch.setattr("lenslab.texts.sampled_text", lambda n, model: sampled_text(n // 10))

    def run(family: str, phase: str) -> str:
        monkeypatch.setenv("LENSLAB_MODEL", str(folder_of(family)))
        monkeypatch.chdir(tmp_path)
        runpy.run_path(str(SOURCES[PHASES.index(phase)]))
        return capsys.readouterr().out

    return run


def cases():
    """Family and phase: those of every test run, then the rest as `slow`."""
    for family in FAMILIES | OTHERS:
        for number, phase in enumerate(PHASES, 1):
            slow = family in OTHERS or number > 2
            yield pytest.param(
                family, phase, marks=[pytest.mark.slow] * slow, id=f"{family}-{number}"
            )


@pytest.mark.families
@pytest.mark.parametrize(("family", "phase"), cases())
def test_a_phase_runs_whole_on_a_family(run_phase, family, phase):
    printed = run_phase(family, phase)
    assert family in printed
    if phase == "phase_1_loading":
        parallel = "residual_mid  is not there" in printed
        assert parallel == (family in PARALLEL)
        assert parallel != ("hook_resid_mid" in printed)
        assert "after in all 2 blocks: True" in printed
