"""That what is trained is Quiet-STaR: properties, on toys, against slow and obvious oracles."""
import itertools
from dataclasses import replace

import pytest
import torch

import thoughts

from inference import Generator
from lm_head import sample_tokens
from model import CausalContext
from attention import GrowingContext
from thoughts import denominators, every_position, true_tokens
from toys import assert_one_pass_loses_no_more, texts, tiny_quiet, uniforms


def plain_pass(quiet, embeddings_SD):
    """Hidden states of one plain causal pass over one sequence of embeddings."""
    position_BS = torch.arange(len(embeddings_SD))[None]
    return quiet.model.transform(embeddings_SD[None], CausalContext(position_BS))[0]


def serial(quiet, text, uniform_T=None, thought=None):
    """One thought after one text, token by token, each by a plain pass over all so far.

    Returns the thought, and the states at `end` and after each true token that may follow.
    """
    embed, c = quiet.model.embed, quiet.config
    said = [*embed(text), quiet.start_thought]
    tokens = [] if thought is None else thought.tolist()
    for t in range(c.thought_len):
        if thought is None:
            state = plain_pass(quiet, torch.stack(said))[-1:]
            uniform_R = None if uniform_T is None else uniform_T[t:t + 1]
            token_R, _ = sample_tokens(state, quiet.model.head.weight, uniform_R, c.marker_ids)
            tokens.append(int(token_R[0]))
        said.append(embed(torch.tensor(tokens[t])))
    return tokens, [*said, quiet.end_thought]


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("window", [(), (5,)])
def test_parallel_thoughts_equal_serial_thoughts(greedy, window):
    quiet, ids_BL = tiny_quiet(model=dict(windows=window)), texts(2, 7)
    uniform_BNPT = None if greedy else uniforms(2, 2, 6, 3)
    context = GrowingContext(7, every_position(ids_BL), True)
    quiet.model(ids_BL, context)
    thought_BNPT, _, _ = quiet.sample_thoughts(context, uniform_BNPT, 2)
    for b in range(2):
        for j in range(6):
            for n in range(2):
                draws = None if greedy else uniform_BNPT[b, n, j]
                tokens, _ = serial(quiet, ids_BL[b, :j + 1], draws)
                assert thought_BNPT[b, n, j].tolist() == tokens


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("thought", [dict(n_thoughts=1), dict(n_thoughts=3), dict(thought_len=0),
                                     dict(thought_len=1, n_true=1), dict(filler=True)], ids=str)
@pytest.mark.parametrize("model", [dict(), dict(windows=(5, 0)), dict(tied=True, qkv_bias=True)],
                         ids=str)
def test_one_pass_gives_the_loss_and_gradients_of_sample_then_read(model, thought, every):
    ids_BL, config = texts(2, 9), tiny_quiet(model=model, **thought).config
    valid_BL = torch.arange(9) < torch.tensor([[9], [6]])
    position_BP = None if every else torch.tensor([[0, 3, 4], [2, 5, 7]])
    uniform_BNPT = uniforms(2, config.n_thoughts, 8 if every else 3, config.thought_len)
    found = []
    for one_pass in (True, False):
        quiet = tiny_quiet(model=model, one_pass=one_pass, **thought)
        outcome = quiet(ids_BL, valid_BL, position_BP, uniform_BNPT)
        outcome.loss.backward()
        found.append((outcome, [p.grad for p in quiet.parameters()]))
    (ours, gradients), (theirs, their_gradients) = found
    assert torch.equal(ours.thought_BNPT, theirs.thought_BNPT)
    torch.testing.assert_close(ours.thought_nll_BNP, theirs.thought_nll_BNP, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients, their_gradients):
        assert (a is None) == (b is None)
        assert a is None or (a - b).norm() <= 1e-4 * b.norm()


def test_in_bfloat16_one_pass_loses_no_more_than_sample_then_read():
    assert_one_pass_loses_no_more(tiny_quiet(n_thoughts=3), texts(2, 24), uniforms(2, 3, 23, 3))


@pytest.mark.parametrize("every", [True, False])
def test_the_read_pass_equals_a_plain_pass_over_text_thought_and_true_tokens(every):
    quiet, ids_BL = tiny_quiet(n_true=3), texts(2, 8)
    position_BP = every_position(ids_BL) if every else torch.tensor([[0, 4], [3, 6]])
    thought_BNPT = texts(2 * 2 * position_BP.shape[1], 3, seed=3).view(2, 2, -1, 3)
    base_BLD, branch_BNPMD = quiet.read(ids_BL, position_BP, thought_BNPT, every, n_after=quiet.config.n_true - 1)
    for b in range(2):
        torch.testing.assert_close(base_BLD[b], plain_pass(quiet, quiet.model.embed(ids_BL[b])),
                                   rtol=1e-5, atol=1e-5)
        for p, j in enumerate(position_BP[b].tolist()):
            for n in range(2):
                _, said = serial(quiet, ids_BL[b, :j + 1], thought=thought_BNPT[b, n, p])
                true = quiet.model.embed(ids_BL[b, j + 1:j + 3])
                states = plain_pass(quiet, torch.stack([*said, *true]))[j + 1:]
                torch.testing.assert_close(branch_BNPMD[b, n, p, :len(states)], states,
                                           rtol=1e-5, atol=1e-5)


def test_training_evaluation_and_generation_insert_the_same_tokens_at_the_same_positions():
    """Their states after one and the same thought agree: packed, cached, and generated."""
    quiet, ids_BL = tiny_quiet(n_thoughts=1), texts(3, 8)
    base_BPD, mixed_BNPD, weight_BNP, thought_BNPT = quiet.predict(ids_BL)
    position_BP = every_position(ids_BL, last=True)
    base_BLD, branch_BNPMD = quiet.read(ids_BL, position_BP, thought_BNPT, True, n_after=quiet.config.n_true - 1)
    mixed_BNPAD, weight_BNPA = quiet.mix(base_BLD[:, None, :, None], branch_BNPMD[..., 4:5, :])
    torch.testing.assert_close(mixed_BNPAD[..., 0, :], mixed_BNPD, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight_BNPA[..., 0], weight_BNP, rtol=1e-5, atol=1e-5)

    length_B = torch.tensor([8, 5, 2])                            # right-padded prompts
    emitted = Generator(quiet, ids_BL, length_B, max_new_tokens=2).step()
    for b, j in enumerate((length_B - 1).tolist()):
        assert emitted.thought_BT[b].tolist() == thought_BNPT[b, 0, j].tolist()
        torch.testing.assert_close(emitted.mixing_weight_B[b], weight_BNP[b, 0, j],
                                   rtol=1e-5, atol=1e-5)
        logp_V = quiet.model.head(mixed_BNPD[b, 0, j]).log_softmax(-1)
        assert int(emitted.token_B[b]) == int(logp_V.argmax())
        gain = logp_V.max() - quiet.model.head(base_BPD[b, j]).log_softmax(-1)[emitted.token_B[b]]
        found_V = emitted.mixed_logp_BV[b] - emitted.base_logp_BV[b]
        torch.testing.assert_close(found_V[emitted.token_B[b]], gain, rtol=1e-4, atol=1e-4)


def test_generation_with_a_cache_equals_thinking_anew_after_every_token():
    quiet, ids_BL = tiny_quiet(n_thoughts=1), texts(2, 5)
    stream, text = Generator(quiet, ids_BL, torch.tensor([5, 5]), max_new_tokens=6), ids_BL
    for _ in range(6):
        _, mixed_BNPD, _, thought_BNPT = quiet.predict(text)
        emitted = stream.step()
        assert emitted.thought_BT.tolist() == thought_BNPT[:, 0, -1].tolist()
        best_B = quiet.model.head(mixed_BNPD[:, 0, -1]).argmax(-1)
        assert emitted.token_B.tolist() == best_B.tolist()
        text = torch.cat((text, emitted.token_B[:, None]), dim=1)


def test_mixing_weight_0_is_the_base_and_1_is_the_thought():
    quiet, base, thought = tiny_quiet(), torch.randn(3, 16), torch.randn(3, 16)
    quiet.mixing_head = torch.nn.Linear(32, 1)
    with torch.no_grad():
        for weight, expected in ((0.0, base), (1.0, thought)):
            quiet.mixing_head.weight.zero_()
            quiet.mixing_head.bias.fill_(weight)
            mixed, found = quiet.mix(base, thought)
            assert torch.equal(mixed, expected) and (found == weight).all()


def test_a_fresh_quiet_star_predicts_exactly_like_its_base():
    quiet, ids_BL = tiny_quiet(), texts(2, 7)
    quiet.init_thoughts(quiet.model.embed.weight[3].detach(), torch.Generator().manual_seed(0))
    base_BPD, mixed_BNPD, weight_BNP, _ = quiet.predict(ids_BL)
    assert torch.equal(mixed_BNPD[:, 0], base_BPD) and not weight_BNP.any()
    out = quiet(ids_BL, torch.ones_like(ids_BL).bool(), uniform_BNPT=uniforms(2, 2, 6, 3))
    assert out.reward_BNP.abs().max() < 1e-5 and out.mixing_weight_BNPA.abs().max() == 0


def test_the_last_position_thinks_too():
    quiet, ids_BL = tiny_quiet(n_thoughts=1), texts(2, 6)
    _, mixed_BNPD, _, thought_BNPT = quiet.predict(ids_BL)
    assert thought_BNPT.shape[2] == ids_BL.shape[1]
    tokens, said = serial(quiet, ids_BL[0])
    assert thought_BNPT[0, 0, -1].tolist() == tokens
    state = plain_pass(quiet, torch.stack(said))[-1]
    base = plain_pass(quiet, quiet.model.embed(ids_BL[0]))[-1]
    mixed, _ = quiet.mix(base, state)
    torch.testing.assert_close(mixed_BNPD[0, 0, -1], mixed, rtol=1e-5, atol=1e-5)


def test_thoughts_see_the_text():
    quiet, ids_BL = tiny_quiet(), texts(1, 7)
    changed_BL = ids_BL.clone()
    changed_BL[0, 0] = (changed_BL[0, 0] + 1) % 23
    thought_BNPT = torch.zeros(1, 2, 6, 3, dtype=torch.long)
    before, after = (quiet.read(x, every_position(x), thought_BNPT, True, n_after=quiet.config.n_true - 1)[1]
                     for x in (ids_BL, changed_BL))
    assert (before - after).abs().amax(-1).min() > 1e-6     # every branch token of every position


def test_thoughts_do_not_see_each_other_nor_the_future():
    quiet, ids_BL = tiny_quiet(), texts(1, 7)
    thought_BNPT = texts(12, 3, seed=5).view(1, 2, 6, 3)
    _, before = quiet.read(ids_BL, every_position(ids_BL), thought_BNPT, True, n_after=quiet.config.n_true - 1)
    changed_BNPT = thought_BNPT.clone()
    changed_BNPT[0, 1, 2] = (changed_BNPT[0, 1, 2] + 1) % 23
    _, after = quiet.read(ids_BL, every_position(ids_BL), changed_BNPT, True, n_after=quiet.config.n_true - 1)
    moved = (before - after).abs().amax(-1)[0] > 1e-6                                    # [N, P, M]
    assert moved[1, 2, 1:].all() and moved.sum() == moved[1, 2].sum() and not moved[1, 2, 0]


def test_look_ahead_never_sees_its_target():
    """Perturb x[j+a+1]: the prediction of it does not move, and the next one (a+1) does."""
    quiet, ids_BL, A, j = tiny_quiet(n_true=3), texts(1, 9), 3, 2
    thought_BNPT = texts(16, 3, seed=5).view(1, 2, 8, 3)

    def predictions(x_BL):
        base_BLD, branch_BNPMD = quiet.read(x_BL, every_position(x_BL), thought_BNPT, True, n_after=quiet.config.n_true - 1)
        base_AD = base_BLD[0, j:j + A]
        return quiet.mix(base_AD, branch_BNPMD[0, :, j, 4:])[0]
    before = predictions(ids_BL)
    for a in range(A):
        changed_BL = ids_BL.clone()
        changed_BL[0, j + a + 1] = (changed_BL[0, j + a + 1] + 1) % 23
        moved = (predictions(changed_BL) - before).abs().amax((0, 2)) > 1e-6                  # [A]
        assert moved.tolist() == [k > a for k in range(A)]


def test_true_tokens_are_the_next_ones_and_are_scored_where_they_exist():
    ids_BL = torch.arange(10, 16)[None]
    valid_BL = torch.tensor([[True] * 5 + [False]])
    target_BPA, target_mask_BPA = true_tokens(ids_BL, valid_BL, torch.tensor([[0, 3, 4]]), 2)
    assert target_BPA[0, :2].tolist() == [[11, 12], [14, 15]]
    assert target_mask_BPA[0].tolist() == [[True, True], [True, False], [False, False]]


def test_markers_are_never_sampled():
    hidden_RD, head_VD = torch.randn(500, 4), torch.randn(6, 4)
    markers = (2, 5)
    for uniform_R in (torch.rand(500), torch.ones(500) - 2**-24, torch.zeros(500), None):
        token_R, thought_nll_R = sample_tokens(hidden_RD, head_VD, uniform_R, markers)
        assert not torch.isin(token_R, torch.tensor(markers)).any()
        assert torch.isfinite(thought_nll_R).all()


def test_uniform_numbers_choose_tokens_with_the_models_probabilities():
    generator = torch.Generator().manual_seed(0)
    hidden_D, head_VD = torch.randn(4, generator=generator), torch.randn(7, 4, generator=generator)
    uniform_R = (torch.arange(20000) + 0.5) / 20000              # a grid: frequencies become exact
    token_R, thought_nll_R = sample_tokens(hidden_D.expand(20000, 4), head_VD, uniform_R)
    p_V = (head_VD @ hidden_D).softmax(-1)
    frequency_V = torch.bincount(token_R, minlength=7) / 20000
    torch.testing.assert_close(frequency_V, p_V, rtol=0, atol=1e-4)
    torch.testing.assert_close(thought_nll_R, -p_V.log()[token_R], rtol=1e-4, atol=1e-4)


def test_greedy_thoughts_are_a_true_argmax():
    hidden_RD, head_VD = torch.randn(50, 4), torch.randn(7, 4)
    assert torch.equal(sample_tokens(hidden_RD, head_VD)[0], (hidden_RD @ head_VD.T).argmax(-1))


def test_thoughts_in_training_differ_within_a_position():
    """Greedy thoughts would be identical, and their advantage zero everywhere."""
    quiet, ids_BL = tiny_quiet(), texts(2, 12)
    out = quiet(ids_BL, torch.ones_like(ids_BL).bool(), uniform_BNPT=uniforms(2, 2, 11, 3))
    assert (out.thought_BNPT[:, 0] != out.thought_BNPT[:, 1]).any(-1).float().mean() > 0.5
    assert (out.advantage_BNP > 0).any()


def test_advantage_is_reward_above_the_mean_of_the_same_position_alone():
    quiet, ids_BL = tiny_quiet(n_thoughts=3), texts(2, 8)
    valid_BL = torch.ones_like(ids_BL).bool()
    thought_BNPT = texts(2 * 3 * 7, 3, seed=4).view(2, 3, 7, 3)
    out = quiet(ids_BL, valid_BL, thought_BNPT=thought_BNPT)
    for b, j in ((0, 0), (1, 4)):
        reward_N = out.reward_BNP[b, :, j]
        expected = [max(0.0, float(r - sum(reward_N) / 3)) for r in reward_N]
        torch.testing.assert_close(out.advantage_BNP[b, :, j], torch.tensor(expected))
    other_BL = torch.cat((ids_BL[:1], texts(1, 8, seed=9)))
    again = quiet(other_BL, valid_BL, thought_BNPT=thought_BNPT)
    torch.testing.assert_close(again.advantage_BNP[0], out.advantage_BNP[0])
    assert not torch.allclose(again.advantage_BNP[1], out.advantage_BNP[1])


def gradient(quiet, *args, **kwargs):
    quiet.zero_grad()
    quiet(*args, **kwargs).loss.backward()
    return {name: p.grad.clone() for name, p in quiet.named_parameters()}


@pytest.mark.parametrize("advantage, n_true", [("clamped", 1), ("leave_one_out", 1),
                                               ("clamped", 2), ("leave_one_out", 2)])
def test_the_policy_gradient_equals_exact_enumeration(advantage, n_true):
    """All pairs of one-token thoughts over a vocabulary of 4, each with its probability; the
    sampler reaches a token by the uniform number in the middle of its stretch. Signed and against
    the other thought alone, it is minus the gradient of the expected reward: unbiased."""
    V = 4
    quiet = tiny_quiet(model=dict(vocab_size=V), thought_len=1, n_true=n_true,
                       policy_temperature=1.0, advantage=advantage, discount=0.6)
    ids_BL = texts(1, 2 + n_true, vocab_size=V)             # REINFORCE looks at position 0 alone
    valid_BL = torch.ones_like(ids_BL).bool()
    said_SD = torch.stack([*quiet.model.embed(ids_BL[0, :1]), quiet.start_thought])
    state = plain_pass(quiet, said_SD)[-1]
    logp_V = quiet.model.head(state).log_softmax(-1)
    p_V = logp_V.exp().detach()

    def reward(token):
        _, said = serial(quiet, ids_BL[0, :1], thought=torch.tensor([token]))
        total = 0
        for a in range(n_true):
            true_aD = quiet.model.embed(ids_BL[0, 1:1 + a])
            after = plain_pass(quiet, torch.cat((torch.stack(said), true_aD)))[-1]
            base = plain_pass(quiet, torch.cat((torch.stack(said[:1]), true_aD)))[-1]
            mixed, _ = quiet.mix(base, after)
            logp = [quiet.model.head(x).log_softmax(-1)[ids_BL[0, 1 + a]] for x in (mixed, base)]
            total += 0.6 ** a * (logp[0] - logp[1]).item()
        return total
    reward_V = [reward(token) for token in range(V)]
    expected_loss = 0
    for y in range(V):
        for z in range(V):
            gain = abs(reward_V[y] - reward_V[z]) / 2             # of the better one over the mean
            better = y if reward_V[y] > reward_V[z] else z
            expected_loss += p_V[y] * p_V[z] * gain * -logp_V[better] / 2          # mean over N = 2
    if advantage == "leave_one_out":
        expected_loss = -(logp_V.exp() * torch.tensor(reward_V)).sum()
    quiet.zero_grad()
    expected_loss.backward()
    expected = {name: p.grad.clone() for name, p in quiet.named_parameters() if p.grad is not None}

    middle_V, sums = p_V.cumsum(0) - p_V / 2, {}
    for y in range(V):
        for z in range(V):
            uniform_BNPT = middle_V[[y, z]].view(1, 2, 1, 1).expand(1, 2, 1 + n_true, 1)
            grads = []
            for policy_weight in (1.0, 0.0):
                quiet.config = replace(quiet.config, policy_weight=policy_weight)
                grads.append(gradient(quiet, ids_BL, valid_BL, uniform_BNPT=uniform_BNPT))
            for name in grads[0]:
                part = p_V[y] * p_V[z] * (grads[0][name] - grads[1][name])
                sums[name] = sums.get(name, 0) + part
    for name, total in sums.items():
        torch.testing.assert_close(total, expected.get(name, torch.zeros_like(total)),
                                   rtol=1e-3, atol=1e-6)


def test_how_far_the_clamped_advantage_is_from_unbiased():
    """N = 2: the clamped gradient points to where the unbiased one does only roughly."""
    p_V = torch.tensor([0.6, 0.3, 0.1])
    reward_V = torch.tensor([0.0, 1.0, 2.0])
    score_VV = torch.eye(3) - p_V                            # d log p[y] / d logits
    unbiased = (p_V * (reward_V - (p_V * reward_V).sum())) @ score_VV
    clamped = sum(p_V[y] * p_V[z] * (reward_V[y] - reward_V[z]).clamp(min=0) / 2 * score_VV[y]
                  for y in range(3) for z in range(3))
    cosine = torch.cosine_similarity(unbiased, clamped, dim=0)
    assert float(cosine) == pytest.approx(0.994, abs=1e-3)
    assert float(clamped.norm() / unbiased.norm()) == pytest.approx(0.33, abs=5e-3)


def test_the_reward_of_tokens_further_ahead_is_discounted():
    ids_BL, uniform_BNPT = texts(2, 9), uniforms(2, 2, 8, 3)
    out = tiny_quiet(n_true=3, discount=0.7)(ids_BL, ids_BL >= 0, uniform_BNPT=uniform_BNPT)
    for j in range(5):
        gain_BNA = out.base_nll_BL[:, None, j:j + 3] - out.mixed_nll_BNPA[:, :, j]
        expected_BN = gain_BNA @ torch.tensor([1.0, 0.7, 0.49])
        torch.testing.assert_close(out.reward_BNP[:, :, j], expected_BN, rtol=1e-4, atol=1e-5)


def test_micro_batches_with_unequal_padding_equal_one_batch():
    quiet, ids_BL = tiny_quiet(), texts(4, 9)
    valid_BL = torch.arange(9) < torch.tensor([9, 3, 6, 2])[:, None]
    uniform_BNPT = uniforms(4, 2, 8, 3)
    whole = gradient(quiet, ids_BL, valid_BL, uniform_BNPT=uniform_BNPT)
    counts = denominators(valid_BL, quiet.config)
    quiet.zero_grad()
    loss = 0
    for rows in (slice(0, 1), slice(1, 4)):
        out = quiet(ids_BL[rows], valid_BL[rows], uniform_BNPT=uniform_BNPT[rows], counts=counts)
        out.loss.backward()
        loss += out.metrics()["nll/mixed"]
    for name, p in quiet.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-4, atol=1e-6)
    expected = quiet(ids_BL, valid_BL, uniform_BNPT=uniform_BNPT).metrics()["nll/mixed"]
    torch.testing.assert_close(loss, expected)


def test_padding_changes_nothing():
    """A text alone, and again in a wider batch, where the policy's denominator counts padding."""
    quiet, ids_BL = tiny_quiet(policy_weight=0.0), texts(1, 6)
    uniform_BNPT = uniforms(1, 2, 8, 3)
    alone = gradient(quiet, ids_BL, torch.ones_like(ids_BL).bool(),
                     uniform_BNPT=uniform_BNPT[:, :, :5])
    padded_BL = torch.cat((ids_BL, texts(1, 3, seed=8)), dim=1)
    wide = gradient(quiet, padded_BL, (torch.arange(9) < 6)[None], uniform_BNPT=uniform_BNPT)
    for name in alone:
        torch.testing.assert_close(alone[name], wide[name], rtol=1e-4, atol=1e-6)


def test_every_average_names_its_denominator():
    quiet = tiny_quiet(n_true=2)
    valid_BL = torch.arange(7) < torch.tensor([7, 4])[:, None]
    counts = denominators(valid_BL, quiet.config).tolist()
    assert counts == [6 + 3,                       # base: next tokens that exist
                     (6 + 3) * 2, (5 + 2) * 2,    # mixed, at a = 0 and 1, times N
                     2 * 4 * 2]                   # rewards: B * (L - 1 - A) * N, padding counted


def test_the_mean_reward_is_a_mean_for_every_length_of_thought():
    """It was a sum where T = 0: the divisor was the number of thought tokens."""
    ids_BL = texts(2, 9)
    for thought_len in (0, 3):
        out = tiny_quiet(thought_len=thought_len)(ids_BL, ids_BL >= 0)
        mean = out.reward_BNP[:, :, :9 - 1 - 2].mean()              # positions 0 .. L-2-A
        torch.testing.assert_close(out.metrics()["thought/reward"].float(), mean)


def test_thinking_at_a_random_share_of_the_positions_estimates_the_same_gradient():
    """The mean over all choices of 2 of the 4 positions is the gradient of thinking at all 4."""
    quiet, ids_BL = tiny_quiet(n_true=2), texts(1, 5)
    valid_BL = torch.ones_like(ids_BL).bool()
    uniform_BNPT = uniforms(1, 2, 4, 3)
    whole = gradient(quiet, ids_BL, valid_BL, uniform_BNPT=uniform_BNPT)
    choices = list(itertools.combinations(range(4), 2))
    mean = {name: 0 for name in whole}
    for choice in choices:
        part = gradient(quiet, ids_BL, valid_BL, torch.tensor([choice]), uniform_BNPT[:, :, choice])
        mean = {name: mean[name] + part[name] / len(choices) for name in mean}
    for name in whole:
        torch.testing.assert_close(mean[name], whole[name], rtol=1e-4, atol=1e-6)


def test_log_probabilities_that_the_loss_does_not_need_are_not_computed(monkeypatch):
    """Thoughts without an advantage never see the head for REINFORCE."""
    quiet, ids_BL, rows = tiny_quiet(), texts(2, 9), []
    compute = thoughts.chunked_cross_entropy

    def spy(hidden_RD, *args, **options):
        rows.append(len(hidden_RD))
        return compute(hidden_RD, *args, **options)
    monkeypatch.setattr(thoughts, "chunked_cross_entropy", spy)
    out = quiet(ids_BL, torch.ones_like(ids_BL).bool(), uniform_BNPT=uniforms(2, 2, 8, 3))
    assert rows[-1] == 3 * int((out.advantage_BNP > 0).sum()) < out.thought_BNPT.numel()


def test_filler_tokens_are_the_start_marker_and_teach_no_policy():
    quiet, ids_BL = tiny_quiet(filler=True), texts(2, 6)
    thought_BNPT = torch.zeros(1, 1, 1, 3, dtype=torch.long)
    x_BNPMD = quiet.embed_branch(ids_BL[:1], torch.zeros(1, 1).long(), thought_BNPT, 0)
    assert (x_BNPMD[0, 0, 0, :4] == quiet.start_thought).all()
    out = quiet(ids_BL, torch.ones_like(ids_BL).bool(), uniform_BNPT=uniforms(2, 2, 5, 3))
    assert float(out.policy_loss) == 0.0


def test_bfloat16_autocast_stays_near_float32():
    quiet, ids_BL = tiny_quiet(), texts(2, 9)
    valid_BL, thought_BNPT = torch.ones_like(ids_BL).bool(), texts(32, 3, seed=2).view(2, 2, 8, 3)
    exact = quiet(ids_BL, valid_BL, thought_BNPT=thought_BNPT).loss
    with torch.autocast("cpu", torch.bfloat16):
        rounded = quiet(ids_BL, valid_BL, thought_BNPT=thought_BNPT).loss
    rounded.backward()
    torch.testing.assert_close(rounded.detach(), exact.detach(), rtol=0.02, atol=0)


def test_predicting_reads_on_from_the_sampling_as_reading_anew_does():
    quiet, ids_BL = tiny_quiet(), texts(2, 9)
    for position_BP in (None, every_position(ids_BL, last=True), torch.tensor([[0, 3], [2, 8]])):
        sampled = quiet.predict(ids_BL, position_BP, uniforms(2, 2, 9 if position_BP is None
                                                              else position_BP.shape[1], 3))
        given = quiet.predict(ids_BL, position_BP, thought_BNPT=sampled[3])
        for ours, theirs in zip(sampled, given):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_one_pass_without_gradients_gives_the_same_loss():
    ids_BL, losses = texts(2, 9), []
    for one_pass in (True, False):
        with torch.no_grad():
            losses.append(tiny_quiet(one_pass=one_pass)(ids_BL, ids_BL >= 0).loss)
    assert torch.equal(*losses)


def test_the_mean_weight_is_over_the_true_tokens_that_exist():
    quiet, ids_BL = tiny_quiet(n_true=4), texts(2, 3)
    losses = quiet(ids_BL, ids_BL >= 0)
    exists = losses.target_mask_BPA[:, None].expand_as(losses.mixing_weight_BNPA)
    mean = losses.mixing_weight_BNPA[exists].mean()
    torch.testing.assert_close(losses.metrics()["thought/mixing_weight"].float(), mean)


@pytest.mark.parametrize("by", ["entropy", "probe"])
def test_chosen_positions_are_those_of_the_highest_score_and_padding_comes_last(by):
    quiet, ids_BL = tiny_quiet(), texts(3, 9)
    probe_D = torch.randn(16, generator=torch.Generator().manual_seed(3)) if by == "probe" else None
    valid_BL = torch.arange(9) < torch.tensor([9, 6, 3])[:, None]
    found_BP = quiet.choose_positions(ids_BL, valid_BL, 4, probe_D)
    hidden_BLD = quiet.model(ids_BL, CausalContext(torch.arange(9).expand(3, 9)))
    score_BL = torch.distributions.Categorical(logits=quiet.model.head(hidden_BLD)).entropy()
    if by == "probe":
        score_BL = hidden_BLD @ probe_D
    for ids, positions, length, score_L in zip(ids_BL, found_BP.tolist(), (9, 6, 3), score_BL):
        assert positions == sorted(positions) and len(set(positions)) == 4
        n = min(4, length - 1)
        assert set(score_L[:length - 1].topk(n).indices.tolist()) == {
            j for j in positions if j < length - 1}
    # the objective thinks there, and nowhere else
    uniform_BNPT = uniforms(3, 2, 4, 3)
    ours = quiet(ids_BL, valid_BL, uniform_BNPT=uniform_BNPT, n_chosen=4, probe_D=probe_D)
    theirs = quiet(ids_BL, valid_BL, found_BP, uniform_BNPT)
    assert torch.equal(ours.loss, theirs.loss)
    assert torch.equal(ours.reward_BNP, theirs.reward_BNP)


def test_a_step_with_few_thoughts_is_not_weighed_down():
    """2 of 40 positions think in a text of one valid target: fewer than one term is expected."""
    valid_BL = torch.zeros(1, 41, dtype=torch.bool)
    valid_BL[0, :2] = True
    counts = denominators(valid_BL, tiny_quiet(n_thoughts=1, n_true=1).config, n_positions=2)
    _, n_mixed_A, _ = thoughts.split_denominators(counts)
    assert float(n_mixed_A[0]) == pytest.approx(2 / 40)
    assert all((count == 1).all() for count in thoughts.split_denominators(torch.zeros(3)))
