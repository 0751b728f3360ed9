"""Fixtures every test may use: the shared folder, tiny random models in the formats that users
have."""

import os
import signal

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as a shell starts what it runs in the background with `&`
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TQDM_DISABLE", "1")

from jaxtyping import install_import_hook

install_import_hook(
    "lenslab", "beartype.beartype"
)  # shapes in annotations are checked in every test

from pathlib import Path

import pytest
import torch

from lenslab.files import REPOSITORY

TEXTS = [
    "A cat sat on the mat.",
    "def add(a, b):\n    return a + b",
    "Paris is a city on a river, they say.",
    "2 + 2 = 4",
]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared fixtures beside the repository; tests that need it skip where it is
    absent."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the shared fixtures are not beside this checkout")
    return folder


def make_tokenizer(folder: Path, bos_is_eos: bool = False) -> None:
    """A byte-level BPE of 300 entries; BOS has id 0, which `if token_id:` would miss."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|end|>"] if bos_is_eos else ["<|bos|>", "<|eos|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    names = dict(
        bos_token=special[0],
        eos_token=special[-1] if bos_is_eos else special[1],
        pad_token=special[-1],
    )
    PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=64, **names).save_pretrained(
        folder
    )


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory) -> Path:
    """A random GPT-2 of three layers, saved as a Hugging Face folder."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2-twin")
    make_tokenizer(folder)
    torch.manual_seed(0)
    vocabulary = len(AutoTokenizer.from_pretrained(folder))
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=64,
        n_embd=32,
        n_layer=3,
        n_head=4,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gpt2_shared_end_folder(tmp_path_factory) -> Path:
    """As GPT-2 itself: BOS, EOS and PAD are one token."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2-one-end")
    make_tokenizer(folder, bos_is_eos=True)
    torch.manual_seed(1)
    vocabulary = len(AutoTokenizer.from_pretrained(folder))
    GPT2LMHeadModel(
        GPT2Config(vocab_size=vocabulary, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    ).save_pretrained(folder)
    return folder


SMALL = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)


def save_random(folder: Path, kind: str, **config) -> Path:
    """A random model of another architecture (`Llama`, `Olmoe`), saved as a Hugging Face folder."""
    import transformers

    make_tokenizer(folder)
    torch.manual_seed(2)
    vocabulary = len(transformers.AutoTokenizer.from_pretrained(folder))
    built = getattr(transformers, f"{kind}Config")(vocab_size=vocabulary, **SMALL, **config)
    getattr(transformers, f"{kind}ForCausalLM")(built).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    """A random Llama with grouped-query attention."""
    return save_random(tmp_path_factory.mktemp("llama-twin"), "Llama")


@pytest.fixture(scope="session")
def olmoe_folder(tmp_path_factory) -> Path:
    """A random mixture of experts: four, two of them per token."""
    return save_random(
        tmp_path_factory.mktemp("olmoe-twin"), "Olmoe", num_experts=4, num_experts_per_tok=2
    )


@pytest.fixture(scope="session")
def switch_folder(tmp_path_factory) -> Path:
    """A random mixture with Switch routing: one expert per token, weighted by its probability."""
    return save_random(
        tmp_path_factory.mktemp("switch-twin"), "Olmoe", num_experts=4, num_experts_per_tok=1
    )


@pytest.fixture(scope="session")
def model(gpt2_folder):
    """The random GPT-2 as `load_model` gives it."""
    from lenslab.models import load_model

    return load_model(str(gpt2_folder))
