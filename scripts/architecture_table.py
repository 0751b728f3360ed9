"""Which families of models load, and how near TransformerLens comes to Hugging Face: a tiny random
model of each, loaded as users load theirs, in a table that is written into data/README.md.

A family is refused where its adapter fails or computes something else. `difference` is the largest
relative difference at every residual stream and in the logits, over the tokens of one text.

    python scripts/architecture_table.py            # write the table
    python scripts/architecture_table.py --check    # print it only
"""

from __future__ import annotations

import argparse
import re
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from lenslab import loading
from lenslab.files import REPOSITORY
from lenslab.models import summarize

BEGIN, END = "<!-- architectures -->", "<!-- end of architectures -->"
TEXT = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=4)
TEXT |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
TEXT |= dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)
WHOLE = TEXT | dict(num_key_value_heads=4)  # without grouped queries
HEAD = dict(head_dim=8)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
ROUTED = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1)
ROUTED |= dict(topk_group=1, n_shared_experts=1, first_k_dense_replace=1)
GPT2 = dict(vocab_size=300, n_positions=64, n_embd=32, n_layer=4, n_head=4)
GPT2 |= dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)
FAMILIES = {  # class without ForCausalLM, or the whole class -> its config's arguments
    "GPT2LMHeadModel": GPT2,
    "GPTNeo": TEXT
    | dict(num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]], window_size=8),
    "GPTNeoX": WHOLE,
    "GPTJ": GPT2 | dict(rotary_dim=4),
    "GPTBigCode": GPT2,
    "OPT": TEXT | dict(ffn_dim=48, word_embed_proj_dim=32),
    "Bloom": TEXT | dict(n_layer=4, n_head=4),
    "Falcon": TEXT,
    "Mpt": TEXT | dict(d_model=32, n_heads=4, n_layers=4, max_seq_len=64),
    "Llama": TEXT,
    "Mistral": TEXT | dict(sliding_window=8),
    "Ministral3": TEXT | HEAD,
    "SmolLM3": TEXT,
    "Olmo": TEXT,
    "Olmo2": TEXT,
    "Olmo3": TEXT | dict(sliding_window=8),
    "Qwen2": TEXT,
    "Qwen3": TEXT | HEAD,
    "Gemma": TEXT | HEAD,
    "Gemma2": TEXT | HEAD | dict(sliding_window=8, query_pre_attn_scalar=8),
    "Gemma3": TEXT | HEAD | dict(sliding_window=8),
    "Phi": WHOLE,
    "Phi3": TEXT,
    "StableLm": TEXT,
    "Starcoder2": TEXT,
    "Granite": TEXT | dict(embedding_multiplier=12.0, residual_multiplier=0.22, logits_scaling=8.0),
    "Glm": TEXT | HEAD,
    "Glm4": TEXT | HEAD,
    "Nemotron": TEXT,
    "Ernie4_5": TEXT | HEAD,
    "Exaone4": TEXT | dict(sliding_window=8),
    "Cohere": TEXT | dict(logit_scale=0.0625),
    "Cohere2": TEXT | dict(sliding_window=8),
    "SeedOss": TEXT | HEAD,
    "Apertus": TEXT,
    "Arcee": TEXT,
    "Mixtral": TEXT | dict(num_local_experts=4, num_experts_per_tok=2),
    "Olmoe": TEXT | dict(num_experts=4, num_experts_per_tok=2),
    "Qwen2Moe": TEXT | MOE | dict(shared_expert_intermediate_size=16, mlp_only_layers=[0]),
    "Qwen3Moe": TEXT | HEAD | MOE | dict(mlp_only_layers=[0]),
    "GraniteMoe": TEXT | dict(num_local_experts=4, num_experts_per_tok=2),
    "Phimoe": TEXT | dict(num_local_experts=4, num_experts_per_tok=2),
    "GptOss": TEXT | HEAD | dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
    "DeepseekV2": WHOLE | LATENT | ROUTED,
    "DeepseekV3": WHOLE | LATENT | ROUTED,
    "Glm4Moe": TEXT | HEAD | ROUTED,
    "Ernie4_5_Moe": TEXT
    | dict(moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_layer_start_index=1),
    "SwitchTransformersForConditionalGeneration": dict(vocab_size=300, d_model=32, d_kv=8, d_ff=48)
    | dict(num_layers=4, num_decoder_layers=4, num_heads=4, num_experts=4, pad_token_id=2)
    | dict(num_sparse_encoder_layers=2, num_sparse_decoder_layers=2, decoder_start_token_id=2),
}


def make_tokenizer(folder: Path) -> None:
    """A tokenizer of bytes, without merges, with the usual special tokens."""
    special = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
    names = [*special.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    plain = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **special)
    made.save_pretrained(folder)


def make_model(family: str, folder: Path) -> None:
    """A random model of the family in a folder, with matrices of a trained model's size: as they
    begin, norms and attention hide most of what a block computes."""
    whole = family if "LMHead" in family or "For" in family else f"{family}ForCausalLM"
    kind = getattr(transformers, whole)
    torch.manual_seed(0)
    model = kind(kind.config_class(**FAMILIES[family]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    make_tokenizer(folder)


def layers_with_experts(weights) -> tuple[int, int]:
    """(layers with experts, layers without) of a Hugging Face model."""
    layers = {m[0]: False for n, _ in weights.named_parameters() if (m := LAYER.search(n))}
    for name, _ in weights.named_parameters():
        if (found := LAYER.search(name)) and re.search("experts|router|block_sparse", name):
            layers[found[0]] = True
    return sum(layers.values()), len(layers) - sum(layers.values())


LAYER = re.compile(r"^.*?\.\d+\.")


def row(family: str) -> list[str]:
    """Family, whether it loads, difference, layers with experts and without, experts, per token."""
    seen: list[float] = []

    def compared(computed, reference, label, dtype):
        seen.extend(float(loading.disagreement(v, reference[n]).max()) for n, v in computed.items())
        check(computed, reference, label, dtype)

    check, loading.check_agreement = loading.check_agreement, compared
    try:
        with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make_model(family, Path(name))
            model = loading.load_model(name, device="cpu")
        facts, (moe, dense) = summarize(model), layers_with_experts(model.original_model)
        result, experts = "loaded", [str(facts.experts or ""), str(facts.experts_per_token or "")]
        layers = f"{moe} / {dense}" if moe else ""
    except loading.NotAModel as error:
        result, experts, layers = "refused", ["", ""], ""
        print(family, error)
    finally:
        loading.check_agreement = check
    difference = f"{max(seen):.0e}" if seen else ""
    return [
        family.split("For")[0].removesuffix("LMHeadModel"),
        result,
        difference,
        layers,
        *experts,
    ]


def table(families: dict = FAMILIES) -> str:
    """The table in Markdown."""
    head = ["family", "", "difference", "layers with / without experts", "experts", "per token"]
    lines = [head, ["---"] * len(head), *(row(family) for family in families)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="print the table, write nothing")
    made = table()
    if parser.parse_args().check:
        return print(made)
    file = REPOSITORY / "data" / "README.md"
    before, rest = file.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    file.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
