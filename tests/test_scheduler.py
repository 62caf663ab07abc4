"""The scheduler over slots against plain decoding: the same tokens under the same seed, in fewer and fuller passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import CONTEXT, EOS, FAMILIES, build, char_tokenizer, random_prompts
from torch.testing import assert_close
from transformers import BambaConfig, GPT2Config, Llama4TextConfig, LlamaConfig, MistralConfig

from lit_rlvr.engines import Generation, InProcessEngine, Sampling, in_process, plain, prefill
from lit_rlvr.engines.decoding import Output
from lit_rlvr.engines.in_process import end_tokens
from lit_rlvr.engines.scheduler import Scheduler
from lit_rlvr.engines.slots import SPARE, SlotCache, widest, windows
from lit_rlvr.lora import LoRA, add_adapters
from lit_rlvr.policy import Policy
from lit_rlvr.reduce import LocalReduce

TOKENIZER = char_tokenizer()
PROMPTS = random_prompts([5, 2, 9, 5, 1, 7, 3])
SAMPLES = 3
UID = torch.tensor([(2, 100 + draw, sample) for draw in range(len(PROMPTS)) for sample in range(SAMPLES)])
LONG = Sampling(max_new_tokens=40)


def make_policy(family: str = "qwen3", **overrides: Any) -> Policy:
    """A random model with several ends, so that responses stop at different lengths."""
    return Policy(build(family, **{"eos_token_id": [EOS, 3, 14], **overrides})).eval()


def output(policy: Policy, sampling: Sampling) -> Output:
    """An output for three responses to each prompt."""
    return Output(TOKENIZER, end_tokens(policy, TOKENIZER), UID, sampling, 7)


@torch.no_grad()
def plainly(policy: Policy, sampling: Sampling, max_rows: int = 64) -> Generation:
    """The responses by concatenation, in batches of whole prompts."""
    out = output(policy, sampling)
    plain.decode(policy, PROMPTS, SAMPLES, max_rows, out)
    return out.finish()


def generate(policy: Policy, sampling: Sampling, max_rows: int = 64, **engine: Any) -> Generation:
    """The same responses by the engine."""
    return InProcessEngine(max_rows, **engine).generate(policy, TOKENIZER, PROMPTS, UID, sampling, 7)


def same(got: Generation, wanted: Generation) -> None:
    """The same tokens, and numbers that differ by rounding alone."""
    assert torch.equal(got.ids, wanted.ids)
    assert torch.equal(got.mask, wanted.mask)
    assert torch.equal(got.truncated, wanted.truncated)
    assert_close(got.logprobs, wanted.logprobs)
    assert_close(got.entropies, wanted.entropies)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_rows", [1, 2, 7, 64])
def test_the_same_as_plain_decoding(family: str, max_rows: int) -> None:
    """Rows that leave and join, groups that do not fit at once, sliding windows; float32, then float64."""
    # transformers' eager attention, gemma2's, gives NaN in float64 for rows that padding masks out entirely
    for dtype in (torch.float32,) if family == "gemma2" else (torch.float32, torch.float64):
        policy = make_policy(family).to(dtype)
        wanted = plainly(policy, LONG)
        assert len(wanted.mask.sum(-1).unique()) > 5
        assert wanted.truncated.any()
        same(generate(policy, LONG, max_rows), wanted)


@pytest.mark.parametrize("more", [{"temperature": 0.0}, {"top_p": 0.8}, {"top_k": 4}, {"temperature": 0.7}])
def test_the_same_with_every_kind_of_sampling(more: dict[str, Any]) -> None:
    """Greedy, truncated, cold."""
    policy, sampling = make_policy("gemma2"), Sampling(max_new_tokens=20, **more)
    same(generate(policy, sampling, 5), plainly(policy, sampling))


def test_stop_strings_of_rows_at_different_steps() -> None:
    """Each row looks at its own end."""
    policy = make_policy(eos_token_id=EOS)
    free = plainly(policy, Sampling(max_new_tokens=16))
    texts = [str(TOKENIZER.decode(row[mask])) for row, mask in zip(free.ids, free.mask, strict=True)]
    sampling = Sampling(max_new_tokens=16, stop=[texts[0][3:5], texts[4][6:8]])
    wanted = plainly(policy, sampling)
    assert len(wanted.mask.sum(-1).unique()) > 2
    same(generate(policy, sampling, 5), wanted)


def adapted() -> Policy:
    """With adapters that do something."""
    hf = build("qwen3", eos_token_id=[EOS, 3, 14])
    add_adapters(hf, LoRA(r=2))
    for name, parameter in hf.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return Policy(hf).eval()


def test_adapters() -> None:
    """Layers around layers."""
    policy = adapted()
    same(generate(policy, LONG, 5), plainly(policy, LONG))


def test_bfloat16_is_as_exact_as_plain_decoding() -> None:
    """Against float32 of the same weights: tokens may differ after a rounding, errors are of one size."""
    policy, whole = make_policy(eos_token_id=EOS).bfloat16(), make_policy(eos_token_id=EOS).bfloat16().float()
    sampling = Sampling(max_new_tokens=12)
    errors = []
    for out in (generate(policy, sampling, 5), plainly(policy, sampling)):
        error = []
        for row, (ids, mask) in enumerate(zip(out.ids, out.mask, strict=True)):
            prompt, response = PROMPTS[row // SAMPLES], ids[mask]
            places = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
            with torch.no_grad():
                logp, _ = whole(torch.tensor([prompt + response.tolist()]), places, response)
            error.append((logp - out.logprobs[row, : len(response)]).abs())
        errors.append(float(torch.cat(error).mean()))
    assert 0 < errors[0] < 1.5 * errors[1]


def test_new_weights_are_sampled_from() -> None:
    """Nothing of a rollout's weights or cache outlives it."""
    policy, engine = make_policy(), InProcessEngine(5)
    before = engine.generate(policy, TOKENIZER, PROMPTS, UID, LONG, 7)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
    after = engine.generate(policy, TOKENIZER, PROMPTS, UID, LONG, 7)
    same(after, plainly(policy, LONG))
    assert not torch.equal(after.ids, before.ids)


def passes(policy: Policy, run: Callable[[], Any]) -> list[int]:
    """Rows of every decoding pass."""
    rows: list[int] = []
    next_logits = policy.next_logits

    def record(ids: torch.Tensor, mask: Any, positions: torch.Tensor, cache: Any, *last: Any) -> torch.Tensor:
        if cache.get_seq_length():
            rows.append(len(ids))
        return next_logits(ids, mask, positions, cache, *last)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "next_logits", record)
        run()
    return rows


def test_the_batch_is_kept_full() -> None:
    """Waiting rows fill it up: fewer passes, the same number of tokens, and a metric that tells."""
    policy, engine = make_policy(), InProcessEngine(6)
    scheduled = passes(policy, lambda: engine.generate(policy, TOKENIZER, PROMPTS, UID, LONG, 7))
    plain_passes = passes(policy, lambda: plainly(policy, LONG, 6))
    assert max(scheduled) <= 6
    assert sum(scheduled) == sum(plain_passes)
    assert len(scheduled) < 0.8 * len(plain_passes)
    assert 4.5 < engine.metrics(LocalReduce())["engine/rows"] <= 6
    assert engine.metrics(LocalReduce()) == {"engine/rows": 0.0}


@pytest.mark.parametrize(("prompts", "masked"), [(random_prompts([4, 4, 4]), False), (random_prompts([4, 8, 8]), True)])
def test_no_mask_where_rows_are_equally_long(
    prompts: list[list[int]], masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention without a mask takes its fastest way; and each prompt is prefilled once, beside similar ones alone."""
    policy, masks, prefilled = make_policy(eos_token_id=EOS), [], []
    plain_call = policy.next_logits

    def record(ids: torch.Tensor, mask: Any, positions: torch.Tensor, cache: Any, *last: Any) -> torch.Tensor:
        if isinstance(cache, SlotCache):
            masks.append(mask is not None)
        else:
            assert mask is None
            prefilled.extend(ids.tolist())
        return plain_call(ids, mask, positions, cache, *last)

    monkeypatch.setattr(policy, "next_logits", record)
    uid = torch.tensor([(0, draw, sample) for draw in range(3) for sample in range(5)])
    InProcessEngine(64).generate(policy, TOKENIZER, prompts, uid, Sampling(max_new_tokens=6, top_k=2), 7)
    assert masks[0] == masked
    assert sorted(prefilled) == sorted(prompts)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize(
    ("most", "apart"),
    [(4, [1] * 7), (16, [1, 1, 2, 1, 1, 1]), (24, [2, 2, 1, 1, 1]), (prefill.TOKENS, [2, 2, 1, 1, 1])],
)
def test_prompts_are_prefilled_as_far_as_tokens_fit(
    family: str, most: int, apart: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At least one at a time, longer ones first, and never with a mask; the responses are the same."""
    policy, shapes = make_policy(family), []
    wanted = plainly(policy, LONG)
    plain_call = policy.next_logits

    def record(ids: torch.Tensor, mask: Any, positions: torch.Tensor, cache: Any, *last: Any) -> torch.Tensor:
        if not isinstance(cache, SlotCache):
            assert mask is None
            shapes.append(tuple(ids.shape))
        return plain_call(ids, mask, positions, cache, *last)

    monkeypatch.setattr(prefill, "TOKENS", most)
    monkeypatch.setattr(policy, "next_logits", record)
    same(generate(policy, LONG), wanted)
    assert [rows for rows, _ in shapes] == apart
    assert all(rows == 1 or rows * width <= most for rows, width in shapes)


def test_a_group_larger_than_the_batch_is_prefilled_once() -> None:
    """Its rows begin as others finish."""
    policy = make_policy()
    prefilled: list[int] = []
    hf: Any = policy.hf

    def record(module: Any, inputs: Any, output: Any) -> None:
        hidden = output.last_hidden_state
        prefilled.append(len(hidden) if hidden.shape[1] > 1 else 0)

    hf.base_model.register_forward_hook(record)
    uid = torch.tensor([(0, 0, sample) for sample in range(20)])
    InProcessEngine(6).generate(policy, TOKENIZER, [PROMPTS[0]], uid, LONG, 7)
    assert sum(prefilled) == 1


def test_storage_does_not_grow_with_the_queue() -> None:
    """Twenty times as many prompts as fit: columns are used again."""
    policy, prompts = make_policy(), PROMPTS * 20
    uid = torch.tensor([(0, draw, 0) for draw in range(len(prompts))])
    out = Output(TOKENIZER, end_tokens(policy, TOKENIZER), uid, LONG, 7)
    scheduler = Scheduler(policy, [None, None], prompts, 1, 3, out)
    with torch.no_grad():
        scheduler.run()
    assert out.steps > 5 * CONTEXT
    assert scheduler.cache.width <= widest(9 + 40, SPARE)
    assert {len(layer.storage[0]) for layer in scheduler.cache.slots} == {3}


@pytest.mark.parametrize("window", [None, 5])
def test_slots_against_concatenation(window: int | None) -> None:
    """Random writes, moves and shorter rows give what concatenation would, cut to the window."""
    generator = torch.Generator().manual_seed(0)
    cache = SlotCache([window], 4)
    layer = cache.slots[0]
    layer.use(4, 0)
    wanted, kept = torch.zeros(4, 2, 0, 3), 0
    for step in range(400):
        new = torch.randn(len(wanted), 2, 1, 3, generator=generator)
        past = kept if window is None else min(kept, window - 1)
        assert layer.get_mask_sizes(1) == (past + 1, kept - past)
        keys, values = layer.update(new, -new)
        wanted, kept = torch.cat([wanted, new], dim=2), kept + 1
        assert torch.equal(keys, wanted[:, :, -(past + 1) :])
        assert torch.equal(values, -keys)
        assert layer.get_seq_length() == kept
        if step == 50:
            cache.keep(torch.tensor([1]), torch.tensor([3]), 3, kept)
            wanted = wanted[[0, 3, 2]]
        if step % 90 == 60:
            kept = 7
            cache.keep(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 3, kept)
    assert layer.keys is not None
    assert layer.keys.shape[2] < 300


def test_which_architectures_slots_serve() -> None:
    """Own keys and values in every layer; a sliding window is known; states and chunks are not served."""
    assert windows(LlamaConfig(num_hidden_layers=3)) == [None, None, None]
    assert windows(GPT2Config(n_layer=2)) == [None, None]
    assert windows(MistralConfig(num_hidden_layers=2, sliding_window=9)) == [9, 9]
    assert windows(build("gemma2").config) == [4, None]
    assert windows(BambaConfig(num_hidden_layers=2, attn_layer_indices=[1])) is None
    assert windows(Llama4TextConfig(num_hidden_layers=4)) is None


def test_other_architectures_are_decoded_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch after batch, over transformers' own cache."""
    monkeypatch.setattr(in_process, "windows", lambda config: None)
    policy = make_policy()
    same(generate(policy, LONG), plainly(policy, LONG))
    assert passes(policy, lambda: generate(policy, LONG, 6)) == passes(policy, lambda: plainly(policy, LONG, 6))


def test_storage_is_no_wider_than_rows_that_begin_together() -> None:
    """Not a quarter more, nor what would be to spare: the longest prompt and response, and a multiple of 16."""
    policy = make_policy()
    out = output(policy, LONG)
    scheduler = Scheduler(policy, [None, None], PROMPTS, SAMPLES, 64, out)
    with torch.no_grad():
        scheduler.run()
    assert scheduler.cache.width == -(-(9 + 40) // 16) * 16
