"""What a choice of tokens looks like, for the log."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_rlvr.reduce import Reduce, extremes


def describe(kept: Tensor, eligible: Tensor, entropies: Tensor, select: str, reduce: Reduce) -> dict[str, float]:
    """Numbers about the ``kept`` among the ``eligible`` tokens [B, T] over all ranks, in two reductions.

    Args:
        kept: The choice.
        eligible: What it was made from.
        entropies: The entropies that were compared.
        select: How tokens were chosen; where it was not by entropy there is no threshold.
        reduce: Reaches the other ranks.

    Returns:
        By name: the share that is kept, mean entropies of kept and dropped tokens, kept tokens per response, the share
        of responses without one, and the entropy of the last token on the threshold; 0.0 where there is nothing.
    """
    dropped, learning = eligible & ~kept, eligible.any(-1)
    sums = [kept, eligible, dropped, learning, learning & ~kept.any(-1), entropies[kept], entropies[dropped]]
    total = reduce.sum(torch.stack([part.double().sum() for part in sums])).tolist()
    n_kept, n_eligible, n_dropped, responses, without, entropy_kept, entropy_dropped = total
    report = {
        "kept_fraction": n_kept / max(n_eligible, 1.0),
        "entropy_kept": entropy_kept / max(n_kept, 1.0),
        "entropy_dropped": entropy_dropped / max(n_dropped, 1.0),
        "kept_per_sequence": n_kept / max(responses, 1.0),
        "sequences_without_kept": without / max(responses, 1.0),
    }
    if select == "random":
        return report
    lowest, highest = extremes(reduce, entropies, kept)
    report["threshold"] = highest if select == "bottom" else lowest
    return report | ({"threshold_high": highest} if select == "band" else {})
