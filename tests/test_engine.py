"""Generation in this process: against Hugging Face's generate, a plain forward pass, and itself in other batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import CONTEXT, EOS, FAMILIES, build, char_tokenizer, random_prompts
from torch.testing import assert_close
from transformers import GenerationConfig

from lit_rlvr.engines import Generation, InProcessEngine, Sampling
from lit_rlvr.policy import Policy

TOKENIZER = char_tokenizer()
CONFIGURATION: Any = GenerationConfig
PROMPTS = random_prompts([5, 2, 9, 5])
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def make_policy(family: str = "qwen3", **overrides: Any) -> Policy:
    """A random model with several ends, so that responses stop at different lengths."""
    return Policy(build(family, **{"eos_token_id": [EOS, 3, 14, 15, 40], **overrides})).eval()


def make_uid(prompts: int, samples: int) -> torch.Tensor:
    """(phase, draw, sample) of each row."""
    return torch.tensor([(2, 100 + draw, sample) for draw in range(prompts) for sample in range(samples)])


def generate(
    policy: Policy,
    sampling: Sampling,
    samples: int = 3,
    max_rows: int = 64,
    prompts: list[list[int]] = PROMPTS,
    uid: torch.Tensor | None = None,
    seed: int = 7,
) -> Generation:
    """A generation with defaults for what a test does not vary."""
    uid = make_uid(len(prompts), samples) if uid is None else uid
    return InProcessEngine(max_rows).generate(policy, TOKENIZER, prompts, uid, sampling, seed)


def responses(out: Generation) -> list[list[int]]:
    """The tokens of each row, without padding."""
    return [row[mask].tolist() for row, mask in zip(out.ids, out.mask, strict=True)]


def text(tokens: list[int]) -> str:
    """What the tokens spell."""
    return str(TOKENIZER.decode(tokens))


def ends(policy: Policy) -> set[int]:
    """The token ids that end a response."""
    config: Any = policy.hf.config
    return set(config.eos_token_id)


@EVERY_FAMILY
def test_greedy_equals_hugging_face(family: str) -> None:
    """Prompts of different lengths, left-padded there and here; several end tokens; beyond the sliding window."""
    policy, sampling = make_policy(family, eos_token_id=EOS), Sampling(temperature=0, max_new_tokens=20)
    hf: Any = policy.hf
    free = responses(generate(policy, sampling, samples=1))
    hf.config.eos_token_id = hf.generation_config.eos_token_id = [row[len(row) // 2] for row in free[:2]]
    width = max(len(p) for p in PROMPTS)
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    theirs = hf.generate(
        input_ids=ids,
        attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS]),
        do_sample=False,
        max_new_tokens=20,
        pad_token_id=0,
    )[:, width:]
    out = generate(policy, sampling, samples=1)
    wanted = []
    for row in theirs.tolist():
        stop = next((i for i, token in enumerate(row) if token in ends(policy)), len(row) - 1)
        wanted.append(row[: stop + 1])
    assert responses(out) == wanted
    assert len({len(row) for row in wanted}) > 1
    assert out.truncated.tolist() == [row[-1] not in ends(policy) for row in wanted]


@EVERY_FAMILY
@pytest.mark.parametrize("temperature", [1.0, 1.4])
def test_scores_equal_a_plain_forward_pass(family: str, temperature: float) -> None:
    """Log-probabilities and entropies of sampled responses, teacher-forced without padding on the left."""
    policy = make_policy(family)
    out = generate(policy, Sampling(temperature, max_new_tokens=16))
    assert out.entropies is not None
    assert int(out.mask.sum(-1).max()) > 4
    for row, response in enumerate(responses(out)):
        prompt, length = PROMPTS[row // 3], len(response)
        places = torch.arange(len(prompt) - 1, len(prompt) + length - 1)
        with torch.no_grad():
            logp, entropy = policy(torch.tensor([prompt + response]), places, torch.tensor(response), temperature)
        assert_close(out.logprobs[row, :length], logp)
        assert_close(out.entropies[row, :length], entropy)


@EVERY_FAMILY
@pytest.mark.parametrize("max_rows", [3, 7])
def test_responses_do_not_depend_on_the_batch(family: str, max_rows: int) -> None:
    """One prompt at a time, or some at a time, without or with other padding: the same tokens and numbers."""
    policy, sampling = make_policy(family), Sampling(max_new_tokens=12)
    together, apart = generate(policy, sampling), generate(policy, sampling, max_rows=max_rows)
    assert responses(apart) == responses(together)
    assert torch.equal(apart.truncated, together.truncated)
    assert_close(apart.logprobs * apart.mask, together.logprobs * together.mask)
    assert apart.entropies is not None
    assert together.entropies is not None
    assert_close(apart.entropies * apart.mask, together.entropies * together.mask)


def test_responses_belong_to_their_uid() -> None:
    """Other orders of prompts and samples, and a part of them alone, give each uid the same response."""
    policy, sampling = make_policy(), Sampling(max_new_tokens=12)
    uid = make_uid(4, 3)
    wanted = dict(zip(map(tuple, uid.tolist()), responses(generate(policy, sampling)), strict=True))
    assert len({tuple(r) for r in wanted.values()}) > 8
    for order, samples in (([2, 0, 3, 1], [2, 0, 1]), ([3], [1]), ([1, 2], [0, 2])):
        rows = torch.tensor([3 * p + s for p in order for s in samples])
        out = generate(policy, sampling, prompts=[PROMPTS[p] for p in order], uid=uid[rows])
        assert responses(out) == [wanted[tuple(u)] for u in uid[rows].tolist()]


def test_seed_phase_draw_and_sample_all_matter() -> None:
    """Changing any one of them changes the response to the same prompt."""
    policy, sampling = make_policy(eos_token_id=EOS), Sampling(max_new_tokens=12)
    prompt = [PROMPTS[0]]
    seen = [
        responses(generate(policy, sampling, prompts=prompt, uid=torch.tensor([uid]), seed=seed))[0]
        for seed, uid in ((7, (0, 0, 0)), (8, (0, 0, 0)), (7, (1, 0, 0)), (7, (0, 1, 0)), (7, (0, 0, 1)))
    ]
    assert len({tuple(r) for r in seen}) == 5


def test_end_token_is_part_of_the_response_and_the_limit_truncates() -> None:
    """A row ends with its first end token, or is as long as the limit and marked; padding is 0 and unmasked."""
    policy, limit = make_policy(), 8
    out = generate(policy, Sampling(max_new_tokens=limit), samples=8)
    finished = 0
    for row, response in enumerate(responses(out)):
        ended = response[-1] in ends(policy)
        finished += ended
        assert not ends(policy) & set(response[:-1])
        assert ended or len(response) == limit
        assert bool(out.truncated[row]) == (not ended)
        assert out.mask[row].tolist() == [True] * len(response) + [False] * (out.mask.shape[1] - len(response))
        assert not out.ids[row, len(response) :].any()
    assert 0 < finished < len(out.ids)


def test_an_end_on_the_last_token_is_no_truncation() -> None:
    """A response that ends exactly at the limit is whole; one token less and it is cut."""
    policy = make_policy()
    free = generate(policy, Sampling(max_new_tokens=20))
    row = next(i for i, r in enumerate(responses(free)) if len(r) > 2 and not free.truncated[i])
    length = int(free.mask[row].sum())
    exact = generate(policy, Sampling(max_new_tokens=length))
    assert responses(exact)[row] == responses(free)[row]
    assert not exact.truncated[row]
    cut = generate(policy, Sampling(max_new_tokens=length - 1))
    assert responses(cut)[row] == responses(free)[row][:-1]
    assert cut.truncated[row]


def test_every_source_of_end_tokens_counts() -> None:
    """Those of the tokenizer, the configuration and the generation configuration, single or in a list."""
    policy = make_policy(eos_token_id=40)
    policy.hf.generation_config = CONFIGURATION(eos_token_id=[14, 15])
    rows = responses(generate(policy, Sampling(max_new_tokens=30), samples=30))
    last, middle = {r[-1] for r in rows}, {token for r in rows for token in r[:-1]}
    assert {EOS, 14, 15, 40} <= last
    assert not {EOS, 14, 15, 40} & middle


def test_stop_strings_end_a_response() -> None:
    """Each response is the free one up to the token that completes a stop string; the seed decides the rest."""
    policy = make_policy(eos_token_id=EOS)
    free = responses(generate(policy, Sampling(max_new_tokens=16)))
    texts = [text(r) for r in free]
    stop = [texts[0][3:5], texts[4][6:9]]
    stopped = generate(policy, Sampling(max_new_tokens=16, stop=stop))
    shorter = 0
    for row, response in enumerate(responses(stopped)):
        length = next((n for n in range(1, 17) if any(s in text(free[row][:n]) for s in stop)), len(free[row]))
        assert response == free[row][:length]
        hit = any(s in text(response) for s in stop)
        assert bool(stopped.truncated[row]) == (not hit and response[-1] != EOS)
        shorter += length < len(free[row])
    assert shorter >= 2


def test_a_stop_string_of_several_tokens_per_character_ends_a_response() -> None:
    """Byte-level tokens can take four for one character; the text then grows at every fourth."""

    class Wide:
        """A tokenizer of which four tokens make one character."""

        eos_token_id = EOS

        def batch_decode(self, ids: torch.Tensor) -> list[str]:
            return ["x" * (len(row) // 4) for row in ids]

    policy = make_policy(eos_token_id=EOS)
    sampling = Sampling(max_new_tokens=30, stop=["x" * 5])
    tokenizer: Any = Wide()
    out = InProcessEngine().generate(policy, tokenizer, PROMPTS[:1], make_uid(1, 1), sampling, 3)
    assert int(out.mask.sum()) == 20
    assert not out.truncated.any()


def test_a_generation_configuration_changes_nothing() -> None:
    """Its temperature, top-k, top-p and length penalties do not leak into sampling."""
    policy, sampling = make_policy(), Sampling(max_new_tokens=12)
    wanted = generate(policy, sampling)
    policy.hf.generation_config = CONFIGURATION(
        do_sample=True, temperature=0.1, top_k=1, top_p=0.1, repetition_penalty=9.0, max_new_tokens=2, max_length=3
    )
    got = generate(policy, sampling)
    assert responses(got) == responses(wanted)
    assert torch.equal(got.logprobs, wanted.logprobs)


def test_truncated_sampling_reports_the_full_distribution() -> None:
    """Top-k of 1 draws the greedy tokens, with the log-probabilities and entropies of the untruncated policy."""
    policy = make_policy()
    greedy = generate(policy, Sampling(temperature=0, max_new_tokens=12))
    top1 = generate(policy, Sampling(temperature=1, top_k=1, max_new_tokens=12))
    assert responses(top1) == responses(greedy)
    assert_close(top1.logprobs, greedy.logprobs)
    assert float(top1.logprobs[top1.mask].max()) < 0


def test_context_is_not_exceeded() -> None:
    """The longest prompt decides; exactly filling the context is allowed."""
    policy = make_policy()
    sampling = Sampling(max_new_tokens=CONTEXT - 9 + 1)
    with pytest.raises(ValueError, match=f"a prompt of 9 tokens and max_new_tokens=56 exceed .* context of {CONTEXT}"):
        generate(policy, sampling)
    out = generate(policy, replace(sampling, max_new_tokens=CONTEXT - 9), samples=1)
    assert bool(out.mask.any(-1).all())


@pytest.mark.parametrize("samples", [3, 4, 8])
def test_max_rows_bounds_what_is_decoded_at_a_time(samples: int) -> None:
    """Also where one prompt has more samples than that."""
    policy = make_policy()
    rows: list[int] = []
    hf: Any = policy.hf
    hf.base_model.register_forward_hook(lambda module, inputs, output: rows.append(len(output.last_hidden_state)))
    generate(policy, Sampling(max_new_tokens=4), samples=samples, max_rows=6)
    assert 1 < max(rows) <= 6


def test_max_rows_must_be_positive() -> None:
    """The message names the setting."""
    with pytest.raises(ValueError, match="max_rows must be at least 1, got 0"):
        InProcessEngine(0)


def test_diverged_weights_are_an_error() -> None:
    """NaN logits stop the run instead of drawing something."""
    policy = make_policy()
    with torch.no_grad():
        next(policy.parameters())[3] = float("nan")
    with pytest.raises(FloatingPointError, match="the weights have diverged"):
        generate(policy, Sampling(max_new_tokens=4), prompts=[[3, 4]])


@pytest.mark.parametrize("mode", [True, False, None])
def test_modes_and_gradients_are_left_alone(mode: bool | None) -> None:
    """Generation needs no graph, and gives every module back in the mode that it found, mixed as they may be."""
    policy = Policy(build("gpt2"))
    if mode is not None:
        policy.train(mode)
    modes = {name: module.training for name, module in policy.named_modules()}
    out = generate(policy, Sampling(max_new_tokens=3))
    assert {name: module.training for name, module in policy.named_modules()} == modes
    assert not out.logprobs.requires_grad
