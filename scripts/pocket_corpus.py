"""The training text of the pocket models: documents by category -> tokenizer -> windows of token
ids.

1. Documents come from a folder `CATEGORY/SOURCE.jsonl.gz` of {"text": ...} lines, or from the hub,
   and, as category `python`, from the standard library of the Python that runs this.
2. A document is held out when the first 32 bits of its SHA-256 fall in the lowest 2 of 100 classes.
3. A byte-level BPE is trained on a sample balanced over categories. Beside it is kept which texts
   it was trained on, and other texts are refused: a run resumed with them would train on ids of
   another meaning.
4. Each category becomes one stream of ids, documents joined by EOS; a window is BOS and the next
   256 ids: 256 inputs and as many targets.
5. Window g of a run depends only on the seed and on g: a resumed run reads what the uninterrupted
   one would.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sysconfig
from pathlib import Path

import numpy as np

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
VOCABULARY, CONTEXT = 8192, 256
# Shares of the mix: roughly the square root of each category's size, so that small ones are heard.
MIX = {
    "narrative": 0.15,
    "expository": 0.16,
    "formal": 0.10,
    "conversational": 0.12,
    "social": 0.10,
    "math": 0.10,
    "non_english": 0.13,
    "web": 0.08,
    "python": 0.06,
}
# windows that repeat a span of themselves: at 0.04 induction had not formed after 10 M tokens
REPEAT_SHARE = 0.12
HUB_SOURCES = {  # the same kinds of text for users with the hub and without a corpus folder
    "narrative": ("roneneldan/TinyStories", None, "text"),
    "expository": ("Salesforce/wikitext", "wikitext-103-raw-v1", "text"),
    "conversational": ("google/Synthetic-Persona-Chat", None, "Best Generated Conversation"),
    "math": ("openai/gsm8k", "main", "question"),
    "web": ("Skylion007/openwebtext", None, "text"),
}


class OtherCorpus(ValueError):
    """A tokenizer that was trained on other texts than those of this run."""


class NoCorpus(FileNotFoundError):
    """No training text at the place named; the message says where text can come from."""


def is_held_out(text: str) -> bool:
    """The hold-out rule: about 2 % of documents, by content, so that no split file is needed."""
    return int(hashlib.sha256(text.encode("utf-8")).hexdigest()[:8], 16) % 100 < 2


def read_folder(folder: Path) -> dict[str, list[str]]:
    documents: dict[str, list[str]] = {}
    for file in sorted(folder.glob("*/*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            documents.setdefault(file.parent.name, []).extend(
                json.loads(line)["text"] for line in lines
            )
    if not documents:
        raise NoCorpus(
            f"No corpus in {folder}: it needs CATEGORY/SOURCE.jsonl.gz files of {{'text': ...}} "
            f"lines. "
            "Point --corpus at such a folder, or use --corpus hub to fetch public texts with "
            "`datasets`."
        )
    return documents


def read_hub(documents_each: int = 20_000) -> dict[str, list[str]]:
    """The same kinds of text from the hub, streamed; needs a network and the `datasets` package."""
    from datasets import load_dataset

    documents = {}
    for category, (name, config, column) in HUB_SOURCES.items():
        rows = load_dataset(name, config, split="train", streaming=True).take(documents_each)
        documents[category] = [row[column] for row in rows if len(row[column]) >= 200]
    return documents


def read_python(limit: int = 8000) -> list[str]:
    """The standard library's sources, cut at blank lines into documents of at most `limit`
    characters."""
    documents = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in file.parts or "test" in file.parts or "idlelib" in file.parts:
            continue
        part = ""
        for block in file.read_text(encoding="utf-8", errors="ignore").split("\n\n"):
            if part and len(part) + len(block) > limit:
                documents.append(part)
                part = ""
            part = f"{part}\n\n{block}" if part else block
        documents.append(part)
    return [text for text in documents if 200 <= len(text) <= 2 * limit]


def load_documents(corpus: str) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """(training, validation) documents by category; `corpus` is a folder or the word 'hub'."""
    documents = read_hub() if corpus == "hub" else read_folder(Path(corpus))
    documents["python"] = read_python()
    train = {c: [t for t in texts if not is_held_out(t)] for c, texts in documents.items()}
    validation = {c: [t for t in texts if is_held_out(t)] for c, texts in documents.items()}
    return train, validation


def corpus_key(train: dict[str, list[str]]) -> str:
    """16 hexadecimal digits that change when any text does."""
    digest = hashlib.sha256()
    for category, texts in sorted(train.items()):
        digest.update(f"{category}:{len(texts)}\n".encode())
        for text in texts:
            raw = text.encode("utf-8")
            digest.update(len(raw).to_bytes(8, "big") + raw)
    return digest.hexdigest()[:16]


def train_tokenizer(
    train: dict[str, list[str]],
    folder: Path,
    vocabulary: int = VOCABULARY,
    characters: int = 2_500_000,
):
    """A byte-level BPE trained on about `characters` characters of each category; saved, then
    reopened.

    One that is there already is used: if it was trained here, only for the same texts
    (`NAME.corpus` beside the folder says which; raises OtherCorpus), and as it is where it was
    copied from a finished model.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    key, known = corpus_key(train), folder.with_name(f"{folder.name}.corpus")
    if (folder / "tokenizer.json").exists():
        if known.exists() and known.read_text() != key:
            raise OtherCorpus(
                f"The tokenizer in {folder} was trained on other texts. Give --work another "
                "folder, or to go on with "
                f"that vocabulary on these texts on purpose, delete {known}."
            )
    else:
        sample = []
        for category, texts in sorted(train.items()):
            order = np.random.default_rng([0, len(texts)]).permutation(len(texts))
            total = 0
            for i in order:
                if (total := total + len(texts[i])) > characters * MIX.get(category, 0.1) * 8:
                    break
                sample.append(texts[i])
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[BOS, EOS, PAD],
            initial_alphabet=alphabet,
            show_progress=False,
        )
        bpe.train_from_iterator(sample, trainer)
        PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            bos_token=BOS,
            eos_token=EOS,
            pad_token=PAD,
            model_max_length=CONTEXT,
            padding_side="right",
        ).save_pretrained(folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        # transformers 5 writes a class name that older versions do not know
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
        known.write_text(key)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def encode_streams(train: dict[str, list[str]], tokenizer, cache: Path) -> dict[str, np.ndarray]:
    """One uint16 stream of ids per category, documents in a fixed shuffled order, each ended by
    EOS.

    Cached by the content of tokenizer and texts. A category without documents has no stream.
    """
    fingerprint = hashlib.sha256(
        tokenizer.backend_tokenizer.to_str().encode() + corpus_key(train).encode()
    )
    folder = cache / f"streams-{fingerprint.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    streams = {}
    for category, texts in sorted(train.items()):
        if not texts:
            continue
        file = folder / f"{category}.npy"
        if not file.exists():
            order = np.random.default_rng([1, len(texts)]).permutation(len(texts))
            parts = []
            for start in range(0, len(order), 1000):
                batch = [texts[i] for i in order[start : start + 1000]]
                for row in tokenizer.backend_tokenizer.encode_batch_fast(
                    batch, add_special_tokens=False
                ):
                    parts.append(np.array([*row.ids, tokenizer.eos_token_id], dtype=np.uint16))
            temporary = file.with_suffix(".tmp.npy")
            np.save(temporary, np.concatenate(parts))
            temporary.rename(file)
        streams[category] = np.load(file, mmap_mode="r")
    return streams


class Windows:
    """Window g of the run, for any g: `[CONTEXT + 1]` ids starting with BOS. Stateless but for a
    cached plan.

    One id more than the context, so that the last position has a target and its embedding is
    trained. `vocabulary` is the tokenizer's: random spans are drawn from the whole of it, special
    ids left out.
    """

    def __init__(
        self,
        streams: dict[str, np.ndarray],
        seed: int,
        bos: int,
        n_special: int = 3,
        vocabulary: int | None = None,
    ):
        self.names = [c for c in sorted(streams) if len(streams[c]) > CONTEXT]
        if not self.names:
            raise NoCorpus(f"No category has the {CONTEXT} tokens of one window: give more text.")
        self.streams, self.seed, self.bos = streams, seed, bos
        self.drawn = (n_special, vocabulary or VOCABULARY)
        self.sizes = {c: len(streams[c]) // CONTEXT for c in self.names}
        shares = np.array([MIX.get(c, 0.1) for c in self.names])
        self.shares = shares / shares.sum()
        self.plan = np.zeros((0, 2), dtype=np.int32)

    def _extend(self, need: int) -> None:
        """Plan in fixed blocks of 2^16 windows, so that the plan's beginning never depends on its
        length."""
        while len(self.plan) < need:
            block = len(self.plan) >> 16
            drawn = np.random.default_rng([self.seed, 2, block]).choice(
                len(self.names), size=1 << 16, p=self.shares
            )
            seen = (
                np.bincount(self.plan[:, 0], minlength=len(self.names))
                if len(self.plan)
                else np.zeros(len(self.names), int)
            )
            rows = np.empty((1 << 16, 2), dtype=np.int32)
            rows[:, 0] = drawn
            for c in range(len(self.names)):
                where = np.flatnonzero(drawn == c)
                rows[where, 1] = seen[c] + np.arange(len(where))
            self.plan = np.concatenate([self.plan, rows])

    def __call__(self, g: int) -> np.ndarray:
        self._extend(g + 1)
        c, k = self.plan[g]
        name = self.names[c]
        epoch, offset = divmod(int(k), self.sizes[name])
        slot = int(
            np.random.default_rng([self.seed, 3, int(c), epoch]).permutation(self.sizes[name])[
                offset
            ]
        )
        window = np.empty(CONTEXT + 1, dtype=np.int64)
        window[0] = self.bos
        window[1:] = self.streams[name][slot * CONTEXT : (slot + 1) * CONTEXT]
        random = np.random.default_rng([self.seed, 4, g])
        if random.random() < REPEAT_SHARE:
            length = int(8 * 16 ** random.random())  # 8 to 128, short spans as common as long ones
            span = window[1 : 1 + length]
            if random.random() < 0.5:
                span = random.integers(*self.drawn, size=length)
            window[1:] = np.resize(span, CONTEXT)
        return window
