"""The judge judged.

The float64 loss, the weights of the tiny models, what HF makes of each batch. No ranks.
"""

from __future__ import annotations

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from harness import batches, tiny


@pytest.mark.parametrize("variant", ["plain", "ignored_runs", "num_items", "shift_labels"])
def test_float64_loss_is_hf_loss(variant):
    """Value and gradient agree with HF's to float32 rounding, which is what HF computes in."""
    batch = batches.ignored_runs() if variant != "plain" else batches.plain()
    if variant == "num_items":
        batch = batches.with_num_items(batch)
    if variant == "shift_labels":
        batch = batches.with_shift_labels(batch)
    batch.pop("input_ids")
    results = []
    for loss_function in (ForCausalLMLoss, tiny.float64_loss):
        logits = torch.randn(
            2, 16, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        )
        logits.requires_grad_()
        loss = loss_function(logits=logits, vocab_size=96, **batch)
        loss.backward()
        results.append((loss.double(), logits.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-8)
    assert results[1][0] != 0


def test_float64_loss_is_cross_entropy_to_the_last_digits():
    logits = torch.randn(2, 16, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = batches.ignored_runs()["labels"]
    want = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, 96), labels[:, 1:].reshape(-1)
    )
    assert abs(tiny.float64_loss(logits, labels, 96) - want) < 1e-14


def test_ignored_rows_may_hold_anything():
    logits = torch.full((1, 3, 96), float("nan"), dtype=torch.float64)
    logits[0, 0] = 0.0
    loss = tiny.float64_loss(logits, torch.tensor([[5, 6, -100]]), 96)
    assert torch.isclose(loss, torch.tensor(96.0, dtype=torch.float64).log())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_weights_are_not_trivial_and_do_not_depend_on_the_rng(family):
    torch.manual_seed(1)
    first = tiny.build(family)
    torch.manual_seed(2)
    second = tiny.build(family)
    for (name, one), (_, two) in zip(
        first.named_parameters(), second.named_parameters(), strict=True
    ):
        assert torch.equal(one, two), name
        assert one.dtype == torch.float64
        assert one.std() > 0.05, f"{name} is nearly constant"
    tied = first.get_input_embeddings().weight is first.get_output_embeddings().weight
    assert tied == family.endswith("_tied")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_no_parameter_has_a_negligible_gradient(family):
    """So that each is judged by its own size, not by its block's (parity.FLOOR)."""
    model = tiny.reference(tiny.build(family))
    model(**batches.micro_batches(1, model.config.vocab_size, 0)[0]).loss.backward()
    sizes = {name: float(p.grad.abs().max()) for name, p in model.named_parameters()}
    assert min(sizes.values()) > 1e-3 * max(sizes.values()), sizes


@pytest.mark.parametrize("family", ["llama_bias", "llama_odd_vocab"])
@pytest.mark.parametrize("accum", [1, 3])
def test_the_padding_row_would_have_a_gradient(family, accum):
    """HF leaves it at zero; a model that forgets to must show."""
    model = tiny.reference(tiny.build(family))
    embedding = model.get_input_embeddings()
    row = embedding.padding_idx
    sizes = []
    for padding_idx in (row, None):
        embedding.padding_idx = padding_idx
        model.zero_grad()
        for batch in batches.micro_batches(accum, model.config.vocab_size, 0):
            model(**batch).loss.backward()
        gradient = embedding.weight.grad.abs()
        sizes.append(float(gradient[row].max() / gradient.max()))
    assert sizes[0] == 0
    assert sizes[1] > 1e-2


def test_packed_documents_are_independent_for_hf():
    """The batch builder says what HF understands.

    Packed loss = the documents one by one, also those of length 1.
    """
    model = tiny.reference(tiny.build("llama"))
    documents = (1, 5, 1, 7, 3, 1)
    together = batches.packed(documents)
    logits = model(**together).logits
    start = 0
    for length in documents:
        alone = model(input_ids=together["input_ids"][:, start : start + length]).logits
        torch.testing.assert_close(logits[:, start : start + length], alone, rtol=1e-7, atol=1e-7)
        start += length
    # The trap the builder avoids: with the default cache the same positions mean one long document.
    leaky = model(**{**together, "use_cache": True}).logits
    assert (leaky - logits).abs().max() > 0.1


def test_boundary_labels_are_where_they_should_be():
    assert batches.labels_at_shard_boundaries(4)["labels"][0].ne(-100).nonzero()[:, 0].tolist() == [
        4,
        8,
        12,
    ]
    assert batches.labels_at_shard_boundaries(2, length=7)["labels"][0].ne(-100).nonzero()[
        :, 0
    ].tolist() == [4]
    kept = batches.only_labels_of_shard(1, 4)["labels"][0].ne(-100).nonzero()[:, 0].tolist()
    assert kept == [5, 6, 7, 8]  # predicted from tokens 4..7
