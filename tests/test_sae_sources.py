"""Vectors for training: every one once an epoch, well mixed, decided by the seed, and only those of
real tokens."""

import pytest
import torch

from lenslab.capture import harvest
from lenslab.hooks import UnknownHook
from lenslab.models import model_key
from lenslab.runtime import derive_generator
from lenslab.sae.train import sources
from lenslab.sae.train.sources import ModelSource, StoreSource, TensorSource
from lenslab.store import ActivationStore, DamagedShard
from lenslab.tokens import pack, tokenize

HOOK, NEXT, HEADS = "blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", "blocks.1.attn.hook_z"


def documents(n, seed=0):
    """Texts of letters in random order: no two share a run of tokens."""
    letters = torch.randint(97, 123, (n, 90), generator=derive_generator(seed, "documents"))
    return ["".join(map(chr, row)) for row in letters.tolist()]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setenv("LENSLAB_COMPUTE", "float32")


@pytest.fixture(scope="module")
def batch(model):
    return pack(model, documents(30), length=64)


@pytest.fixture(scope="module")
def store(model, batch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "activations"
    store = ActivationStore.open(
        model,
        batch,
        [HOOK, HEADS],
        folder=folder,
        dtype=torch.float32,
        compute="float32",
        texts_per_shard=7,
    )
    return harvest(model, batch, [HOOK, HEADS], store=store, progress=False)


def numbered(n, width=3):
    """Row i holds i, so that it is known again."""
    return torch.arange(n).float()[:, None].expand(n, width).contiguous()


def rows(source, epoch=0):
    return [source.pool(epoch, i)["vectors"][:, 0].long() for i in range(len(source.sizes(epoch)))]


def ordered(vectors):
    """The same vectors in an order that their values decide."""
    return vectors[vectors.double().sum(1).argsort()]


# pools


def test_every_vector_comes_once_an_epoch_and_no_pool_is_larger_than_asked():
    source = TensorSource(numbered(5003), pool=1000)
    for epoch in (0, 1):
        pools = rows(source, epoch)
        assert [len(p) for p in pools] == source.sizes(epoch) and max(map(len, pools)) <= 1000
        assert torch.equal(torch.cat(pools).sort().values, torch.arange(5003))


def test_pools_depend_on_seed_epoch_and_number_and_on_nothing_asked_before():
    first, other = (TensorSource(numbered(3000), pool=600, seed=3) for _ in range(2))
    in_order = [first.pool(epoch, i)["vectors"] for epoch in (0, 1) for i in range(3)]
    backwards = [other.pool(epoch, i)["vectors"] for epoch in (1, 0) for i in (2, 1, 0)][::-1]
    assert all(map(torch.equal, in_order, backwards))
    assert not torch.equal(in_order[0], in_order[3])
    assert not torch.equal(
        in_order[0], TensorSource(numbered(3000), pool=600, seed=4).pool(0, 0)["vectors"]
    )


def test_a_pool_holds_rows_of_all_parts_in_no_order():
    pool = rows(TensorSource(numbered(40_000), pool=10_000))[0]
    quarters = torch.bincount(pool // 10_000, minlength=4)
    assert int(quarters.min()) > 1000
    assert (
        float((pool.diff().abs() == 1).float().mean()) < 0.01
    )  # neighbours do not stay neighbours
    halves = pool[:5000].double().mean(), pool[5000:].double().mean()
    assert (
        abs(float(halves[0] - halves[1])) < 1500
    )  # of 40,000; runs of rows, kept together, would differ by more


def test_two_hooks_are_shuffled_alike_and_must_be_of_one_length():
    both = TensorSource({"a": numbered(900), "b": numbered(900, 5).double() * 2}, pool=300)
    assert both.widths == {"a": 3, "b": 5}
    pool = both.pool(0, 1)
    assert torch.equal(pool["a"][:, 0] * 2, pool["b"][:, 0]) and pool["b"].dtype == torch.float32
    broken = numbered(9)
    broken[7, 1] = float("nan")
    for other in (numbered(8), broken):
        with pytest.raises(ValueError, match="at b"):
            TensorSource({"a": numbered(9), "b": other})


def test_the_key_is_of_values_pool_and_seed():
    x = torch.randn(50, 4, generator=derive_generator(0, "key"))
    changed = x.clone()
    changed[49, 3] += 1e-6
    keys = [
        TensorSource(x).key,
        TensorSource(changed).key,
        TensorSource(x, seed=1).key,
        TensorSource(x, pool=9).key,
    ]
    assert len(set(keys)) == 4 and TensorSource(x.clone()).key == keys[0]


# a model and a store


@pytest.mark.parametrize(
    "values",
    [
        torch.arange(40).view(20, 2),  # token ids
        torch.arange(40).view(20, 2) > 3,  # a mask
        torch.zeros(20),
        torch.zeros(5, 4, 2),  # [text, pos, d_in]
        torch.full((20, 2), 1e5).half(),  # Inf
        torch.full((20, 2), 1e300, dtype=torch.float64),  # Inf in float32
        torch.full((20, 2), float("nan"), dtype=torch.bfloat16),
    ],
)
def test_what_holds_no_vectors_of_numbers_is_refused(values):
    with pytest.raises(ValueError, match="at vectors"):
        TensorSource(values)


def test_half_precision_gives_its_values_in_float32():
    """A row's sum may be too large for float16 where no number is."""
    values = torch.full((20, 40), 6e4).half()
    pool = TensorSource(values).pool(0, 0)["vectors"]
    assert pool.dtype == torch.float32 and torch.equal(pool, values.float())


def test_a_model_that_was_changed_since_is_refused(model, batch):
    """The SAE would say that it was trained on the weights of before."""
    source = ModelSource(model, batch, HOOK)
    weights = model.original_model.get_parameter(
        next(name for name, _ in model.original_model.named_parameters())
    )
    before = weights.detach().clone()
    try:
        with torch.no_grad():
            weights.add_(1.0)
        with pytest.raises(ValueError, match="changed"):
            source.pool(0, 0)
    finally:
        with torch.no_grad():
            weights.copy_(before)
    source.pool(0, 0)


@pytest.mark.parametrize("pool", [300, 1 << 17])
def test_the_model_gives_the_vectors_of_real_tokens_once_an_epoch(model, batch, pool):
    source = ModelSource(model, batch, HOOK, pool=pool)
    expected = harvest(model, batch, HOOK, progress=False)[HOOK]
    for epoch in (0, 2):
        pools = [source.pool(epoch, i)[HOOK] for i in range(len(source.sizes(epoch)))]
        assert [len(p) for p in pools] == source.sizes(epoch) and max(map(len, pools)) <= pool
        found = torch.cat(pools)
        assert found.shape == (batch.n_real, 32) and found.dtype == torch.float32
        assert torch.allclose(ordered(found), ordered(expected[batch.real]), atol=1e-4)
    assert len(pools) == (1 if pool > 300 else len(source.groups(2))) and not found.is_inference()
    special = expected[batch.attention & ~batch.real]  # BOS, and EOS between documents
    assert len(special) > len(batch) and float(torch.cdist(found, special).min()) > 0.1


def test_padding_gives_no_vector(model):
    batch = tokenize(model, ["A cat.", "A cat sat on a mat and on a river."], pad_side="left")
    source = ModelSource(model, batch, HOOK)
    assert source.sizes(0) == [batch.n_real] and batch.n_real < batch.tokens.numel() - 2
    expected = harvest(model, batch, HOOK, progress=False)[HOOK][batch.real]
    assert torch.allclose(ordered(source.pool(0, 0)[HOOK]), ordered(expected), atol=1e-4)


def test_several_hooks_are_of_one_token_row_by_row_and_heads_lie_side_by_side(model, batch):
    source = ModelSource(model, batch, [HOOK, NEXT, HEADS], pool=500)
    assert source.widths == {HOOK: 32, NEXT: 32, HEADS: 32}
    pool = source.pool(0, 1)
    assert torch.equal(pool[HOOK], pool[NEXT]) and pool[HEADS].shape == pool[HOOK].shape
    z = harvest(model, batch, [HOOK, HEADS], progress=False)
    whole = torch.cat([z[HOOK][batch.real], z[HEADS][batch.real].flatten(1)], 1)
    found = torch.cat([pool[HOOK], pool[HEADS]], 1)
    assert float(torch.cdist(found, whole).min(1).values.max()) < 1e-3


def test_what_fits_one_pool_is_computed_once(model, batch, monkeypatch):
    calls = []
    kept = sources.harvest
    monkeypatch.setattr(
        sources, "harvest", lambda *a, **o: calls.append(len(a[1])) or kept(*a, **o)
    )
    source = ModelSource(model, batch, HOOK)
    first, second = (source.pool(epoch, 0)[HOOK] for epoch in (0, 1))
    assert calls == [len(batch)] and not torch.equal(first, second)
    source = ModelSource(model, batch, HOOK, pool=batch.n_real // 2)
    source.pool(0, 0)
    assert len(calls) == 2 and calls[1] < 0.6 * len(batch)


def test_a_model_source_says_what_it_is_of(model, batch, monkeypatch):
    source = ModelSource(model, batch, HOOK)
    assert (
        source.metadata["model_key"] == model_key(model) and source.metadata["context_size"] == 64
    )
    assert source.metadata["distinct_training_vectors"] == batch.n_real
    others = [
        ModelSource(model, batch[:20], HOOK),
        ModelSource(model, batch, NEXT),
        ModelSource(model, batch, HOOK, seed=1),
    ]
    monkeypatch.setenv("LENSLAB_COMPUTE", "bfloat16")
    others.append(ModelSource(model, batch, HOOK))
    assert len({source.key, *(other.key for other in others)}) == 5
    with pytest.raises(UnknownHook):
        ModelSource(model, batch, "blocks.7.hook_resid_post")


def test_a_store_gives_what_the_model_gives(model, batch, store):
    source = StoreSource(store, pool=700)
    assert source.widths == {HOOK: 32, HEADS: 32}
    pools = [source.pool(0, i) for i in range(len(source.sizes(0)))]
    assert max(source.sizes(0)) <= 700 < sum(source.sizes(0)) == batch.n_real
    of_model = ModelSource(model, batch, [HOOK, HEADS])
    for hook in (HOOK, HEADS):
        found, wanted = torch.cat([p[hook] for p in pools]), of_model.pool(0, 0)[hook]
        assert torch.allclose(ordered(found), ordered(wanted), atol=1e-4)
    assert source.metadata == of_model.metadata
    assert source.key != StoreSource(store, pool=700, seed=1).key


def test_an_unfinished_and_a_damaged_store_are_refused(model, batch, store, tmp_path):
    begun = ActivationStore.open(model, batch, HOOK, folder=tmp_path / "begun")
    with pytest.raises(ValueError, match="not complete"):
        StoreSource(begun)
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in store.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    shard = folder / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(DamagedShard, match="shard-00001"):
        StoreSource(ActivationStore(folder))


# documents


def share(theirs, mine):
    return len(theirs & mine) / len(theirs)


def test_the_same_text_has_the_same_documents_through_model_and_store(model, batch, store):
    assert ModelSource(model, batch, HOOK).documents() == StoreSource(store).documents()


@pytest.mark.parametrize("length", [20, 57, 64])
def test_documents_are_known_again_however_they_are_packed_and_others_are_not(model, batch, length):
    """Windows of 64 tokens hold about one document, those of 20 a fifth of one."""
    mine = ModelSource(model, batch, HOOK).documents()
    again = ModelSource(model, pack(model, documents(30)[10:20], length=length), HOOK)
    other = ModelSource(model, pack(model, documents(30, seed=1), length=length), HOOK)
    assert share(again.documents(), mine) > 0.1 and share(other.documents(), mine) == 0
    assert share(ModelSource(model, batch[3:5], HOOK).documents(), mine) > 0.5


def test_texts_that_were_not_packed_are_documents_too(model):
    texts = ["A cat.", "A dog sat on a mat."]
    for side in ("left", "right"):
        mine = ModelSource(model, tokenize(model, texts, pad_side=side), HOOK).documents()
        one = ModelSource(model, tokenize(model, texts[1:]), HOOK).documents()
        assert one <= mine
    assert not ModelSource(model, tokenize(model, ["A dog"]), HOOK).documents() & mine


def test_rows_are_known_again_too():
    x = torch.randn(2000, 8, generator=derive_generator(0, "rows"))
    mine = TensorSource(x[:1500]).documents()
    assert len(mine) == 1500 and TensorSource(x[700:705]).documents() <= mine
    assert not TensorSource(x[1500:]).documents() & mine
    assert share(TensorSource(x[1250:1750].double()).documents(), mine) == 0.5


def test_massive_vectors_give_their_place_to_others():
    """At every hook: what a transcoder reads and writes stays together."""
    read = torch.nn.functional.normalize(torch.randn(1000, 8, generator=derive_generator(0, "v")))
    written = 3 * read
    read[[7, 500]] *= 200
    written[600] *= 200
    source = TensorSource({"read": read, "written": written})
    pool = source.pool(0, 0)
    assert source.sizes(0) == [1000] == [len(pool["read"])]
    assert pool["read"].norm(dim=1).max() < 1.001 and pool["written"].norm(dim=1).max() < 3.001
    assert torch.allclose(pool["written"], 3 * pool["read"])
    distinct = pool["read"].unique(dim=0)
    assert len(distinct) == 997
    assert torch.equal(source.pool(0, 0)["read"], pool["read"])


def test_where_no_vector_is_massive_all_are_dealt_out():
    values = numbered(1000)
    assert torch.equal(rows(TensorSource(values))[0].sort().values, torch.arange(1000))


def test_where_most_vectors_are_zero_the_others_are_dealt_out():
    values = torch.zeros(1000, 8)
    values[:400] = torch.nn.functional.normalize(torch.rand(400, 8) + 0.1)
    values[0] *= 200
    pool = TensorSource(values).pool(0, 0)["vectors"]
    assert 399 <= int((pool.norm(dim=1) > 0).sum()) <= 400 and pool.norm(dim=1).max() < 1.001
    assert torch.equal(TensorSource(0 * values).pool(0, 0)["vectors"], 0 * values)
