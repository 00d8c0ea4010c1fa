"""Sample with gradients on, so that every token is read once: a CPU step takes 13 to 15 % less.

The passes that sample are the passes that learn. train.py and tools/bench.py use it, but not with
few thoughts, whose products become too small (96 thoughts of SmolLM2-135M at a time: 1.3 times the
seconds of sample-then-read, 384: the same), nor with activation checkpointing, which would run a
block again after its context has moved on, nor with FSDP: it would exchange gradients every pass.
"""
import torch

from attention import GrowingContext
from thoughts import QuietSTaR

MANY = 384                            # thoughts in a micro-batch, from which on it pays


class OnePassQuietSTaR(QuietSTaR):
    """Equal to QuietSTaR, to rounding, with another way through steps 1 and 2."""
    def sample_and_read(self, ids_BL, position_BP, uniform_BNPT, thought_BNPT, all_positions: bool):
        # nothing to sample, or nothing to learn
        if thought_BNPT is not None or not torch.is_grad_enabled():
            return super().sample_and_read(
                ids_BL, position_BP, uniform_BNPT, thought_BNPT, all_positions)
        context = GrowingContext(ids_BL.shape[1], position_BP, all_positions)
        base_BLD = self.model(ids_BL, context)
        thought_BNPT, thought_nll_BNP, states = self.sample_thoughts(
            context, uniform_BNPT, self.config.n_thoughts)
        # the last thought token, the end marker and the true tokens are still unread
        rest_BNPmD = self.read_rest(context, ids_BL, position_BP, thought_BNPT,
                                    n_after=self.config.n_true - 1)
        branch_BNPMD = torch.cat([*states, rest_BNPmD], dim=3)
        return base_BLD, branch_BNPMD, thought_BNPT, thought_nll_BNP


def use_one_pass(quiet: QuietSTaR) -> QuietSTaR:
    """Turn `quiet` itself into a OnePassQuietSTaR; its parameters stay the same objects."""
    quiet.__class__ = OnePassQuietSTaR
    return quiet
