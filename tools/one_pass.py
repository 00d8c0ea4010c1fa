"""Sample with gradients on, so that every token is read once: a CPU step takes 13 to 15 % less.

The passes that sample are the passes that learn. train.py and tools/bench.py use it by themselves,
but not with activation checkpointing, which would run a block again after its context has moved on,
and not with FSDP, which would exchange gradients after every pass.
"""
import torch

from attention import GrowingContext
from thoughts import QuietSTaR


class OnePassQuietSTaR(QuietSTaR):
    """Equal to QuietSTaR, to rounding, with another way through steps 1 and 2."""
    def sample_and_read(self, ids_BL, position_BP, uniform_BNPT, thought_BNPT, all_positions: bool):
        if thought_BNPT is not None:                     # nothing to sample
            return super().sample_and_read(
                ids_BL, position_BP, uniform_BNPT, thought_BNPT, all_positions)
        context = GrowingContext(ids_BL.shape[1], position_BP, all_positions)
        base_BLD = self.model(ids_BL, context)
        thought_BNPT, thought_nll_BNP, states = self.sample_thoughts(
            context, uniform_BNPT, self.config.n_thoughts)
        # the last thought token, the end marker and the true tokens are still unread
        n_after = self.config.n_true - 1
        branch_BNPMD = self.embed_branch(ids_BL, position_BP, thought_BNPT, n_after)
        rest_BNPmD = branch_BNPMD[:, :, :, context.n_cached:]
        _, n_thoughts, _, n_new, _ = rest_BNPmD.shape
        context.begin_pass(n_new, n_thoughts)
        hidden_BSD = self.model.transform(rest_BNPmD.flatten(1, 3), context)
        hidden_BNPmD = hidden_BSD.view(rest_BNPmD.shape)
        states_BNPsD = [state_BNPD[:, :, :, None] for state_BNPD in states]
        branch_BNPMD = torch.cat([*states_BNPsD, hidden_BNPmD], dim=3)
        return base_BLD, branch_BNPMD, thought_BNPT, thought_nll_BNP


def use_one_pass(quiet: QuietSTaR) -> QuietSTaR:
    """Turn `quiet` itself into a OnePassQuietSTaR; its parameters stay the same objects."""
    quiet.__class__ = OnePassQuietSTaR
    return quiet
