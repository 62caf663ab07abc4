"""Templates, the cursor over training prompts, the tickets of the loop, and what the data module makes of them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import char_tokenizer

from lit_rlvr.data import EvalTicket, PromptCursor, RLVRDataModule, Template, Ticket, TicketLoader
from lit_rlvr.settings import Batch
from lit_rlvr.tasks import Prompt, Score, Split, Task

few = settings(max_examples=40, deadline=None, derandomize=True)
CHAT = (
    "{% for m in messages %}{{ m['role'] }}= {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant= {% endif %}"
)


@pytest.fixture
def tokenizer() -> Any:
    """One token per character, with a chat template."""
    made = char_tokenizer()
    made.chat_template = CHAT
    return made


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (Template(), "1+{2}?"),
        (Template(text="q= {question}\na= "), "q= 1+{2}?\na= "),
        (Template("chat"), "user= 1+{2}?\nassistant= "),
        (Template("chat", "({question})", "be brief."), "system= be brief.\nuser= (1+{2}?)\nassistant= "),
    ],
)
def test_template(template: Template, text: str, tokenizer: Any) -> None:
    """The question may hold braces; the chat template opens the assistant's turn."""
    prompt = Prompt(3, "1+{2}?")
    encoded = template.encode(prompt, tokenizer)
    assert encoded.prompt is prompt
    # The tokenizer has no braces: both sides read them as its unknown token.
    assert list(encoded.tokens) == tokenizer(text)["input_ids"]
    assert tokenizer.decode(encoded.tokens) == text.replace("{", "?").replace("}", "?")


def test_templates_that_cannot_work_are_refused(tokenizer: Any) -> None:
    """Each says what to change."""
    with pytest.raises(ValueError, match=r"template\.text must contain \{question\}, got 'solve:'"):
        Template(text="solve:")
    with pytest.raises(ValueError, match=r"template\.system needs template\.kind: chat"):
        Template(system="be brief.")
    with pytest.raises(ValueError, match=r"the tokenizer has no chat template; use template\.kind: plain"):
        Template("chat").encode(Prompt(0, "1"), char_tokenizer())
    with pytest.raises(ValueError, match="prompt 7 has no tokens"):
        Template().encode(Prompt(7, ""), tokenizer)


@few
@given(st.integers(1, 12), st.integers(-3, 5), st.lists(st.integers(0, 7), max_size=8))
def test_every_epoch_is_a_permutation(size: int, seed: int, counts: list[int]) -> None:
    """However many are drawn at once; the order is a pure function of the seed."""
    cursor = PromptCursor(size, seed)
    drawn = list(itertools.chain.from_iterable(cursor.draw(count) for count in counts))
    assert cursor.position == len(drawn) == sum(counts)
    for start in range(0, len(drawn) - size + 1, size):
        assert sorted(drawn[start : start + size]) == list(range(size))
    assert PromptCursor(size, seed).draw(sum(counts)) == drawn


@few
@given(st.integers(1, 12), st.integers(0, 5), st.integers(0, 40), st.integers(1, 30))
def test_resume_by_position(size: int, seed: int, position: int, more: int) -> None:
    """The position is all of its state."""
    straight = PromptCursor(size, seed).draw(position + more)
    resumed = PromptCursor(size, seed)
    resumed.position = position
    assert resumed.draw(more) == straight[position:]


def test_orders_differ_between_epochs_and_seeds() -> None:
    """40 prompts come in the same order by chance once in 40! runs."""
    cursor = PromptCursor(40, 0)
    orders = [cursor.draw(40), cursor.draw(40), PromptCursor(40, 1).draw(40), list(range(40))]
    assert len(set(map(tuple, orders))) == 4


def test_tickets_of_two_epochs() -> None:
    """Two phases of three steps each; the second epoch goes on counting."""
    loader = TicketLoader(phases=2, steps_per_phase=3)
    assert len(loader) == 6
    assert list(loader) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    second = list(loader)
    assert second == [(2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2)]
    assert second[0] == Ticket(phase=2, minibatch=0)


@few
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 20))
def test_resume_at_any_ticket(phases: int, steps: int, taken: int) -> None:
    """The state is taken between two tickets; an iterator then ends where the epoch would have ended."""

    def run(loader: TicketLoader, count: int) -> list[Ticket]:
        tickets: list[Ticket] = []
        while len(tickets) < count:
            tickets += itertools.islice(loader, count - len(tickets))
        return tickets

    straight = run(TicketLoader(phases, steps), taken + 10)
    stopped = TicketLoader(phases, steps)
    assert run(stopped, taken) == straight[:taken]
    resumed = TicketLoader(phases, steps)
    resumed.load_state_dict(stopped.state_dict())
    rest = list(resumed)
    assert rest[:10] == straight[taken:][: len(rest)]
    assert len(rest) == len(resumed) - taken % len(resumed)


class Counting(Task):
    """Questions 1, 22, 333, ... with as many characters as their number says."""

    isolated = False

    def prompts(self, split: Split) -> Sequence[Prompt]:
        return [Prompt(i, str(i + 1) * (i + 1)) for i in range({"train": 5, "val": 4, "test": 0}[split])]

    def score(self, prompt: Prompt, response: str) -> Score:
        return Score(0.0, False)


def data_module(**options: Any) -> RLVRDataModule:
    """A data module whose trainer has a tokenizer, batches of two prompts and three steps per phase."""
    data = RLVRDataModule(Counting(), **options)
    module = SimpleNamespace(tokenizer=char_tokenizer(), seed=4, batch=Batch(prompts=2, minibatch_prompts=1, epochs=3))
    data.trainer = SimpleNamespace(lightning_module=module)  # type: ignore[assignment]
    return data


def test_long_prompts_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    """The limit itself is allowed."""
    data = data_module(max_prompt_tokens=3)
    with caplog.at_level(logging.WARNING):
        assert [e.prompt.question for e in data.encoded("train")] == ["1", "22", "333"]
    assert "2 of 5 train prompts are longer than max_prompt_tokens=3" in caplog.text


def test_no_prompts_are_refused() -> None:
    """Whether the limit or the task is the reason."""
    with pytest.raises(ValueError, match="there are no test prompts: the task has none"):
        data_module().encoded("test")
    data = data_module(max_prompt_tokens=1, template=Template(text="= {question}"))
    with pytest.raises(ValueError, match="there are no train prompts: all 5 are longer than max_prompt_tokens=1"):
        data.encoded("train")


def test_loaders() -> None:
    """Five prompts in batches of two are three phases of six steps; four held-out prompts, the last batch smaller."""
    data = data_module(eval_batch_prompts=3)
    assert len(data.train_dataloader()) == 3 * 6
    assert list(data.val_dataloader()) == [EvalTicket("val", 0, 3), EvalTicket("val", 3, 4)]
    assert len(data.val_dataloader()) == 2
    assert list(data_module(eval_prompts=1).val_dataloader()) == [EvalTicket("val", 0, 1)]


def test_drawing_goes_on_after_a_resume() -> None:
    """State is loaded before or after the first draw."""
    straight = [e.prompt.index for e in data_module().draw(13)]
    stopped = data_module()
    assert [e.prompt.index for e in stopped.draw(6)] == straight[:6]
    early, late = data_module(), data_module()
    early.load_state_dict(stopped.state_dict())
    assert early.state_dict() == stopped.state_dict()
    late.draw(2)
    late.load_state_dict(stopped.state_dict())
    for resumed in (early, late):
        assert [e.prompt.index for e in resumed.draw(7)] == straight[6:]


@pytest.mark.parametrize("options", [{"eval_prompts": 0}, {"eval_batch_prompts": 0}])
def test_sizes_below_one_are_refused(options: dict[str, int]) -> None:
    """Null means all, 0 means a mistake."""
    with pytest.raises(ValueError, match="eval_prompts and eval_batch_prompts must be at least 1"):
        RLVRDataModule(Counting(), **options)  # type: ignore[arg-type]
