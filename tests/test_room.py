"""How many rows fit into memory: against the memory that rollouts really take, and what the engine makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_scheduler import LONG, PROMPTS, SAMPLES, TOKENIZER, UID, generate, make_policy, passes, plainly, same
from tiny_models import FAMILIES
from torch import Tensor
from transformers import BambaConfig, BambaForCausalLM, DynamicCache

from lit_rlvr.engines import InProcessEngine, Sampling, in_process, room
from lit_rlvr.engines.decoding import Output
from lit_rlvr.engines.room import DRAW_COPIES, SHARE, Needs, needs
from lit_rlvr.engines.scheduler import Scheduler
from lit_rlvr.engines.slots import SPARE, widest, windows
from lit_rlvr.policy import Policy

NEW = 40
LOGITS = DRAW_COPIES * 4 * 50


def per_token(heads: int = 1, size: int = 8, dtype: int = 4) -> int:
    """Bytes of a key and a value of a layer of the tiny models."""
    return 2 * heads * size * dtype


@pytest.mark.parametrize("family", ["qwen3", "llama", "granite"])
def test_a_row_by_hand(family: str) -> None:
    """Two layers of one key head of 8 numbers, one of them three times more: two query heads, and while it grows."""
    columns = widest(9 + NEW, SPARE)
    layer = columns * per_token()
    needed = needs(make_policy(family), PROMPTS, SAMPLES, NEW, SPARE, slots=True)
    assert needed.row == 2 * layer + 3 * layer + LOGITS
    assert needed.aside == sum(map(len, PROMPTS)) * ((3 * 24 + 8 * 16) * 4 + 2 * per_token())


def test_a_narrower_type_and_a_longer_prompt() -> None:
    """Half the bytes; a prompt that is prefilled alone is taken whole."""
    policy, long = make_policy(), [[3] * 20_000, [4] * 20_000]
    with torch.autocast("cpu", torch.bfloat16):
        cast = needs(policy, PROMPTS, SAMPLES, NEW, SPARE, slots=True)
    assert cast.row == 5 * widest(9 + NEW, SPARE) * per_token(dtype=2) + LOGITS
    assert needs(policy.bfloat16(), PROMPTS, SAMPLES, NEW, SPARE, slots=True).row == cast.row
    assert needs(policy, long, 1, NEW, SPARE, slots=True).aside == 20_000 * (
        (3 * 24 + 8 * 16) * 2 + 2 * per_token(1, 8, 2)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_no_rollout_takes_more(family: str) -> None:
    """Many rows after one another, windows included: what the storage takes for each slot in the end, at most."""
    policy, prompts = make_policy(family), PROMPTS * 6
    uid = torch.tensor([(0, draw, 0) for draw in range(len(prompts))])
    reach = windows(policy.hf.config)
    assert reach is not None
    out = Output(TOKENIZER, torch.tensor([1, 3]), uid, LONG, 7)
    scheduler = Scheduler(policy, reach, prompts, 1, 4, out)
    with torch.no_grad():
        scheduler.run()
    taken = sum(storage.nbytes for layer in scheduler.cache.slots for storage in layer.storage)
    sizes = [room._bytes(layer, 9 + NEW, SPARE, True) for layer in room._of_one_token(policy)]
    assert 0.7 * 4 * sum(sizes) <= taken <= 4 * sum(sizes)


def test_rows_by_hand() -> None:
    """A tenth is left, then what does not depend on rows; one row is always tried."""
    assert SHARE == 0.9
    assert [Needs(100, 50).rows(free) for free in (0, 100, 1000, 10_000)] == [1, 1, 8, 89]


def bamba() -> Policy:
    """A state-space layer, and one that attends."""
    config = BambaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4,
        mamba_chunk_size=8, max_position_embeddings=64,
    )  # fmt: skip
    return Policy(BambaForCausalLM(config)).eval()


def test_states_count_once() -> None:
    """However long a row is; prompts of all rows are prefilled at once."""
    policy = bamba()
    cache = DynamicCache(config=policy.hf.config)
    ids = torch.arange(5)[None]
    with torch.no_grad():
        policy.next_logits(ids, None, ids, cache)
    states = [*cache.layers[0].conv_states.values(), *cache.layers[0].recurrent_states.values()]
    state, attended = sum(s.nbytes for s in states if isinstance(s, Tensor)), widest(9 + NEW, SPARE) * per_token()
    assert state
    needed = needs(policy, PROMPTS, SAMPLES, NEW, SPARE, slots=False)
    activations = 9 * (3 * 24 + 8 * 16) * 4 // SAMPLES
    assert needed.row == state + attended + 3 * max(state, attended) + LOGITS + activations
    assert needed.aside == 0


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A device with so many bytes free, room for four rows and what is beside them."""
    needed = needs(make_policy(), PROMPTS, SAMPLES, NEW, SPARE, slots=True)
    found = [int((4.5 * needed.row + needed.aside) / SHARE)]
    monkeypatch.setattr(room, "free_memory", lambda device: found[0])
    return found


def test_no_more_rows_than_fit(free: list[int], caplog: pytest.LogCaptureFixture) -> None:
    """The same responses, said once; with more memory it is ``max_rows`` again, and without any one at a time."""
    policy, engine = make_policy(), InProcessEngine(64)
    wanted = plainly(policy, LONG)
    for bytes_free, most in ((free[0], 4), (0, 1), (10**9, 21)):
        free[0] = bytes_free
        out: list[Any] = []
        rows = passes(policy, lambda: out.append(engine.generate(policy, TOKENIZER, PROMPTS, UID, LONG, 7)))  # noqa: B023
        assert max(rows) <= most
        assert max(rows) > most / 2
        same(out[0], wanted)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert said[0].startswith("4 rows at a time fit into the free memory of cpu, not 21: the longest may take 0.00 GiB")


def test_max_rows_is_still_the_most(free: list[int], caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is said where all fit."""
    policy = make_policy()
    assert max(passes(policy, lambda: generate(policy, LONG, 3))) == 3
    free[0] = 10**9
    assert max(passes(policy, lambda: generate(policy, LONG))) > 10
    assert not caplog.records


def test_architectures_that_slots_do_not_serve(free: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Are decoded in smaller batches too."""
    monkeypatch.setattr(in_process, "windows", lambda config: None)
    policy = make_policy()
    got = generate(policy, LONG)
    assert 3 <= max(passes(policy, lambda: generate(policy, LONG))) <= 5
    same(got, plainly(policy, LONG))


def test_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the device has, and what PyTorch holds of it unused; on a CPU nobody says, and nothing is run to know."""
    assert room.free_memory(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert room.free_memory(torch.device("cuda", 0)) == 1400
    monkeypatch.setattr(room, "needs", lambda *args: pytest.fail("asked"))
    InProcessEngine().generate(make_policy(), TOKENIZER, PROMPTS, UID, Sampling(max_new_tokens=2), 7)
