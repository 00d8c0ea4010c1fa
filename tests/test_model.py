"""The language model alone: caches, windows, the chunked loss."""
import pytest
import torch

from lm_head import chunked_cross_entropy, entropy_of, logits_of, sample_tokens
from model import CausalContext, KVCache, ModelConfig, may_see, rope
from thoughts import PlainObjective
from toys import DenseContext, texts, tiny_mistral


def positions(ids_BL):
    return torch.arange(ids_BL.shape[1]).expand_as(ids_BL)


@pytest.mark.parametrize("windows", [(), (1,), (4,), (3, 0)])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_attention_equals_a_dense_mask(windows, n_kv_heads):
    model, ids_BL = tiny_mistral(windows=windows, n_kv_heads=n_kv_heads), texts(2, 9)

    def mask_of_window(window):
        i = torch.arange(9)
        return torch.tensor([[0 <= q - k and (window is None or q - k < window) for k in i]
                             for q in i])
    oracle = model(ids_BL, DenseContext(positions(ids_BL), mask_of_window))
    ours = model(ids_BL, CausalContext(positions(ids_BL)))
    torch.testing.assert_close(ours, oracle, rtol=1e-5, atol=1e-5)


def test_a_window_of_w_sees_itself_and_w_minus_1_before():
    assert [bool(may_see(torch.tensor(9), torch.tensor(k), 3)) for k in (5, 6, 7, 8, 9, 10)] == [
        False, False, True, True, True, False]


@pytest.mark.parametrize("windows", [(), (4,)])
def test_cached_decoding_equals_prefill_for_right_padded_rows(windows):
    model, ids_BL = tiny_mistral(windows=windows), texts(3, 12)
    whole_BLD = model(ids_BL, CausalContext(positions(ids_BL)))
    length_B = torch.tensor([7, 4, 1])
    cache = KVCache(model.config, 3, 12)
    prompt_BL = torch.where(torch.arange(7) < length_B[:, None], ids_BL[:, :7], 0)
    prefill_BLD = model(prompt_BL, CausalContext(positions(prompt_BL), cache, 7))
    for b, n in enumerate(length_B.tolist()):
        torch.testing.assert_close(prefill_BLD[b, :n], whole_BLD[b, :n], rtol=1e-5, atol=1e-5)
    for t in range(5):                                # every row goes on from its own length
        position_B1 = (length_B + t)[:, None]
        context = CausalContext(position_B1, cache, 7 + t + 1)
        state_B1D = model(ids_BL.gather(1, position_B1), context)
        expected = whole_BLD[torch.arange(3)[:, None], position_B1]
        torch.testing.assert_close(state_B1D, expected, rtol=1e-5, atol=1e-5)


def test_what_lies_beyond_a_query_in_the_cache_is_never_seen():
    model, ids_BL = tiny_mistral(), texts(1, 6)
    clean, dirty = (KVCache(model.config, 1, 9) for _ in range(2))
    dirty.k_BKLE.normal_()
    dirty.v_BKLE.normal_()
    a, b = (model(ids_BL, CausalContext(positions(ids_BL), cache)) for cache in (clean, dirty))
    assert torch.equal(a, b)


def test_attention_depends_on_distances_alone():
    """Rotary positions: the same text, begun later."""
    model, ids_BL = tiny_mistral(), texts(1, 6)
    a = model(ids_BL, CausalContext(positions(ids_BL)))
    b = model(ids_BL, CausalContext(positions(ids_BL) + 40))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_rope_turns_the_slowest_pair_least():
    cos, _ = rope(torch.tensor([[1]]), ModelConfig(head_dim=8))
    turn = 10000.0 ** -torch.tensor([0, 0.25, 0.5, 0.75])
    torch.testing.assert_close(cos[0, 0, 0], torch.cos(turn))


@pytest.mark.parametrize("rows", [1, 1023, 1024, 1025, 2500])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_chunked_loss_equals_cross_entropy_and_its_gradients(rows, temperature, monkeypatch):
    monkeypatch.setattr("lm_head.chunk_rows", lambda head_VD: 1024)
    generator = torch.Generator().manual_seed(0)
    hidden_RD, head_VD, weight_R = (torch.randn(shape, generator=generator, dtype=torch.float64)
                                    for shape in ((rows, 5), (7, 5), (rows,)))
    target_R = torch.randint(5, (rows,), generator=generator)
    pairs = []
    for chunked in (True, False):
        h, w = (t.clone().requires_grad_() for t in (hidden_RD, head_VD))
        if chunked:
            loss, nll_R = chunked_cross_entropy(h, w, target_R, weight_R, temperature,
                                                masked_ids=(5, 6))
        else:
            nll_R = torch.nn.functional.cross_entropy((h @ w[:5].T) / temperature, target_R,
                                                      reduction="none")
            loss = (nll_R * weight_R).sum()
        (loss * 1.5).backward()
        pairs.append((loss.detach(), nll_R.detach(), h.grad, w.grad))
    for ours, oracle in zip(*pairs):
        torch.testing.assert_close(ours.double(), oracle, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_never_rounds_logits_or_what_is_made_of_them(autocast):
    """States of bf16, or of fp32 under autocast: as if the product had been exact."""
    R, D, V = 40, 64, 500
    hidden_RD, head_VD = torch.randn(R, D), torch.randn(V, D)
    if not autocast:
        hidden_RD, head_VD = hidden_RD.bfloat16(), head_VD.bfloat16()
    target_R, uniform_R = torch.arange(R), torch.rand(R)
    exact_RV = (hidden_RD.double() @ head_VD.double().T)
    logp_RV = exact_RV.log_softmax(-1)
    nll_R = -logp_RV[torch.arange(R), target_R]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found_RV = logits_of(hidden_RD, head_VD)
        _, found_R = chunked_cross_entropy(hidden_RD, head_VD, target_R, torch.ones(R))
        token_R, sampled_nll_R = sample_tokens(hidden_RD, head_VD, uniform_R)
        entropy_R = entropy_of(hidden_RD, head_VD)
    assert found_RV.dtype == torch.float32
    assert (found_RV - exact_RV).abs().max() < 1e-4 and (found_R - nll_R).abs().max() < 1e-4
    assert (sampled_nll_R + logp_RV[torch.arange(R), token_R]).abs().max() < 1e-4
    assert (entropy_R - torch.special.entr(logp_RV.exp()).sum(-1)).abs().max() < 1e-4


def test_the_loss_never_holds_more_than_a_chunk_of_logits(monkeypatch):
    monkeypatch.setattr("lm_head.chunk_rows", lambda head_VD: 4)
    seen, linear = [], torch.nn.functional.linear

    def spy(x, w):
        seen.append(len(x))
        return linear(x, w)
    monkeypatch.setattr("lm_head.F.linear", spy)
    chunked_cross_entropy(torch.randn(10, 5, requires_grad=True), torch.randn(7, 5), torch.zeros(10).long(),
                          torch.ones(10))
    assert seen == [4, 4, 2]


def test_the_plain_objective_ignores_padding_by_its_mask_and_not_by_token_ids():
    objective, ids_BL = PlainObjective(tiny_mistral()), texts(2, 8)
    ids_BL[:, 2:4] = 0                                        # token 0 is an ordinary token
    valid_BL = torch.arange(8) < torch.tensor([8, 5])[:, None]
    logits_BLV = objective.model.head(objective.model(ids_BL, CausalContext(positions(ids_BL))))
    nll_BL = torch.nn.functional.cross_entropy(logits_BLV[:, :-1].transpose(1, 2), ids_BL[:, 1:],
                                               reduction="none")
    expected = (nll_BL * valid_BL[:, 1:]).sum() / 11
    torch.testing.assert_close(objective(ids_BL, valid_BL).loss, expected)


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for recompute in (0, 1, 2):
        objective = PlainObjective(tiny_mistral())
        objective.model.recompute = recompute
        objective(texts(2, 8), torch.ones(2, 8).bool()).loss.backward()
        gradients.append([p.grad for p in objective.parameters()])
    for none, all_blocks, every_second in zip(*gradients):
        torch.testing.assert_close(all_blocks, none)
        torch.testing.assert_close(every_second, none)


def test_a_feed_forward_layer_in_chunks_is_the_same_layer(monkeypatch):
    gradients = []
    for piece in (1000, 3, 1):
        monkeypatch.setattr("model.CHUNK_TOKENS", piece)
        objective = PlainObjective(tiny_mistral())
        objective(texts(2, 8), torch.ones(2, 8).bool()).loss.backward()
        gradients.append([p.grad for p in objective.parameters()])
    for whole, threes, ones in zip(*gradients):
        torch.testing.assert_close(threes, whole)
        torch.testing.assert_close(ones, whole)


def test_numbers_that_make_no_model_are_refused():
    with pytest.raises(ValueError, match="n_heads=4: no multiple of n_kv_heads=3"):
        ModelConfig(n_heads=4, n_kv_heads=3, dim=16)
    with pytest.raises(ValueError, match="rope_type 'yarn' is not supported"):
        ModelConfig(rope_type="yarn")
