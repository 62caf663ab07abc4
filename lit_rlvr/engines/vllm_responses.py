"""What is asked of vLLM for a prompt, and its answers as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_rlvr.engines.base import Generation, Sampling
from lit_rlvr.hashing import hash_integers

SEEDS = 1 << 62
"""Seeds lie below this, which leaves room above for a group's samples."""


def request(
    model: str, prompt: Sequence[int], uid: Tensor, sampling: Sampling, seed: int, ends: Sequence[int]
) -> dict[str, Any]:
    """The body of a request to a server for the responses ``uid`` [n, 3] to a prompt."""
    return {
        "model": model,
        "token_ids": list(prompt),
        "sampling_params": sampling_parameters(uid, sampling, seed, ends),
    }


def sampling_parameters(uid: Tensor, sampling: Sampling, seed: int, ends: Sequence[int]) -> dict[str, Any]:
    """The fields of vLLM's SamplingParams for the responses ``uid`` [n, 3] to a prompt.

    Everything that shapes the distribution is said, and nothing is left to the model folder's generation_config.json.
    vLLM draws the i-th response with the request's seed plus i, so a response's seed depends on its own
    (phase, draw, sample) alone.
    """
    phase, draw, first = uid[0].tolist()
    assert uid[:, 2].tolist() == list(range(first, first + len(uid))), "a prompt's samples are numbered in order"
    return {
        "n": len(uid),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_new_tokens,
        "seed": int(hash_integers(seed, phase, draw)) % SEEDS + first,
        "stop_token_ids": list(ends),
        "stop": list(sampling.stop),
        "detokenize": bool(sampling.stop),
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "logprobs": 0,
    }


def to_generation(choices: Sequence[dict[str, Any]]) -> Generation:
    """A server's responses as tensors on the CPU, in the order of ``choices``; see :func:`response_tensors`."""
    tokens = [choice["token_ids"] for choice in choices]
    scores = [[(s["token_id"], s["logprob"]) for s in choice["logprobs"]["content"]] for choice in choices]
    return response_tensors(tokens, scores, [choice["finish_reason"] == "length" for choice in choices])


def response_tensors(
    tokens: Sequence[list[int]], scores: Sequence[list[tuple[int, float]]], truncated: Sequence[bool]
) -> Generation:
    """Responses as tensors on the CPU.

    Log-probabilities belong to the distribution that was sampled from: at the sampling temperature (at 1 when greedy),
    and after top-p and top-k where an evaluation truncates.

    Args:
        tokens: Of each response.
        scores: Token and log-probability of each place of each response.
        truncated: Whether the length limit ended the response.

    Raises:
        RuntimeError: When a token has no log-probability.
    """
    for row, scored in zip(tokens, scores, strict=True):
        if row != [token for token, _ in scored]:
            raise RuntimeError("vLLM's log-probabilities are not those of the tokens that it sampled")
    width = max(map(len, tokens), default=0)
    lengths = torch.tensor([len(row) for row in tokens], dtype=torch.int64)
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in tokens], dtype=torch.int64)
    logprobs = torch.tensor([[*(p for _, p in row), *[0.0] * (width - len(row))] for row in scores])
    return Generation(
        ids=ids.view(len(tokens), width),
        mask=torch.arange(width)[None, :] < lengths[:, None],
        logprobs=logprobs.view(len(tokens), width),
        entropies=None,
        truncated=torch.tensor(truncated, dtype=torch.bool),
    )
