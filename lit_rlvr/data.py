"""Prompts on their way to the policy: templates, the cursor over the training prompts, and the tickets of the loop."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningDataModule

from lit_rlvr.tasks import Prompt, Split, Task, resolve_task
from lit_rlvr.types import EncodedPrompt
from lit_rlvr.verify import Verifier

log = logging.getLogger(__name__)


class Ticket(NamedTuple):
    """One optimiser step: which mini-batch of which rollout phase."""

    phase: int
    minibatch: int


class EvalTicket(NamedTuple):
    """One batch of an evaluation: prompts ``start`` to ``stop`` of a split, of which this rank takes its share."""

    split: Split
    start: int
    stop: int


@dataclass(frozen=True)
class Template:
    """How a question becomes the model's input.

    Args:
        kind: ``plain`` fills ``text``; ``chat`` also wraps it with the tokenizer's chat template.
        text: A format string with ``{question}``.
        system: System message, for ``chat`` only.

    Raises:
        ValueError: When ``text`` lacks ``{question}``, or ``system`` is given without a chat template.
    """

    kind: Literal["plain", "chat"] = "plain"
    text: str = "{question}"
    system: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("plain", "chat"):
            raise ValueError(f"template.kind must be plain or chat, got {self.kind!r}")
        if "{question}" not in self.text:
            raise ValueError(f"template.text must contain {{question}}, got {self.text!r}")
        if self.system is not None and self.kind == "plain":
            raise ValueError("template.system needs template.kind: chat; a plain template has no system message")

    def encode(self, prompt: Prompt, tokenizer: Any) -> EncodedPrompt:
        """Tokens of a prompt.

        Raises:
            ValueError: When the tokenizer has no chat template, or the prompt has no tokens.
        """
        text = self.text.replace("{question}", prompt.question)
        if self.kind == "chat":
            if not tokenizer.chat_template:
                raise ValueError("the tokenizer has no chat template; use template.kind: plain")
            system = [] if self.system is None else [{"role": "system", "content": self.system}]
            messages = [*system, {"role": "user", "content": text}]
            tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        else:
            tokens = tokenizer(text)["input_ids"]
        if not tokens:
            raise ValueError(f"prompt {prompt.index} has no tokens")
        return EncodedPrompt(prompt, tuple(tokens))


def first_of_each(prompts: Sequence[Prompt], most: int | None) -> list[Prompt]:
    """At most ``most`` prompts of each held-out set; None: all."""
    if most is None:
        return list(prompts)
    seen: Counter[str | None] = Counter()
    kept = []
    for prompt in prompts:
        seen[prompt.benchmark] += 1
        if seen[prompt.benchmark] <= most:
            kept.append(prompt)
    return kept


class PromptCursor:
    """Walks the training prompts in an order that is a pure function of (seed, epoch); its state is one integer."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.position = size, seed, 0
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def draw(self, count: int) -> list[int]:
        """The next ``count`` prompt indices; a new epoch reshuffles."""
        drawn = []
        for _ in range(count):
            epoch, place = divmod(self.position, self.size)
            if epoch != self._epoch:
                generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % (1 << 63))
                self._epoch, self._order = epoch, torch.randperm(self.size, generator=generator)
            drawn.append(int(self._order[place]))
            self.position += 1
        return drawn


class TicketLoader:
    """Yields one ticket per optimiser step; sized, so that Lightning does not fetch ahead, and resumable."""

    def __init__(self, phases: int, steps_per_phase: int) -> None:
        self.phases, self.steps_per_phase, self.next = phases, steps_per_phase, 0

    def __len__(self) -> int:
        return self.phases * self.steps_per_phase

    def __iter__(self) -> Iterator[Ticket]:
        end = (self.next // len(self) + 1) * len(self)
        while self.next < end:
            ticket = Ticket(*divmod(self.next, self.steps_per_phase))
            self.next += 1
            yield ticket

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.next = state_dict["next"]


class EvalLoader:
    """The batches of an evaluation. A class of its own, because Lightning takes a list for several loaders."""

    def __init__(self, split: Split, total: int, size: int) -> None:
        self.split: Split = split
        self.total, self.size = total, size

    def __len__(self) -> int:
        return -(-self.total // self.size)

    def __iter__(self) -> Iterator[EvalTicket]:
        for start in range(0, self.total, self.size):
            yield EvalTicket(self.split, start, min(start + self.size, self.total))


class RLVRDataModule(LightningDataModule):
    """Problems, their template and their verifier.

    One epoch of the Trainer is one pass over the training prompts, as far as filled groups do not need more.

    Args:
        task: A task, or its short name: ``last_digit_arithmetic``, ``reasoning_gym:NAME``.
        template: How a question becomes the model's input.
        max_prompt_tokens: Longer prompts are left out, and counted in the log; null: no limit.
        eval_prompts: Use this many prompts of a held-out split at most, or of each of its sets; null: all.
        eval_batch_prompts: Prompts per batch of an evaluation, over all ranks.
        verifier_workers: Processes that score answers, for tasks whose verifier is not trusted to be instant.
        verifier_timeout: Seconds that scoring one answer may take.

    Raises:
        ValueError: When a number is out of range.
    """

    def __init__(
        self,
        task: Task | str,
        template: Template = Template(),
        max_prompt_tokens: int | None = None,
        eval_prompts: int | None = None,
        eval_batch_prompts: int = 128,
        verifier_workers: int = 2,
        verifier_timeout: float = 10.0,
    ) -> None:
        super().__init__()
        if eval_batch_prompts < 1 or (eval_prompts is not None and eval_prompts < 1):
            raise ValueError("eval_prompts and eval_batch_prompts must be at least 1")
        if max_prompt_tokens is not None and max_prompt_tokens < 1:
            raise ValueError(f"max_prompt_tokens must be at least 1, got {max_prompt_tokens}; null: no limit")
        self.task = resolve_task(task)
        self.template, self.max_prompt_tokens = template, max_prompt_tokens
        self.eval_prompts, self.eval_batch_prompts = eval_prompts, eval_batch_prompts
        self.verifier = Verifier(self.task, verifier_workers, verifier_timeout)
        self.cursor: PromptCursor | None = None
        self._position = 0
        self._encoded: dict[Split, list[EncodedPrompt]] = {}

    @property
    def module(self) -> Any:
        assert self.trainer is not None
        return self.trainer.lightning_module

    def encoded(self, split: Split) -> list[EncodedPrompt]:
        """The prompts of a split with their tokens; over-long ones are left out and counted.

        Raises:
            ValueError: When nothing is left.
        """
        if split not in self._encoded:
            prompts = self.task.prompts(split)
            if split != "train":
                prompts = first_of_each(prompts, self.eval_prompts)
            self._encoded[split] = self._fitting(
                [self.template.encode(p, self.module.tokenizer) for p in prompts], split
            )
        return self._encoded[split]

    def benchmarks(self, split: Split) -> list[str]:
        """Names of a split's held-out sets, in order; empty where it is one set without a name."""
        return list(dict.fromkeys(e.prompt.benchmark for e in self.encoded(split) if e.prompt.benchmark is not None))

    def _fitting(self, encoded: Sequence[EncodedPrompt], split: Split) -> list[EncodedPrompt]:
        limit = self.max_prompt_tokens
        kept = [e for e in encoded if limit is None or len(e.tokens) <= limit]
        if len(kept) < len(encoded):
            long = [e.prompt for e in encoded if limit is not None and len(e.tokens) > limit]
            named = ", ".join(str(p.meta.get("source", p.index)) for p in long[:5]) + (", ..." if len(long) > 5 else "")
            log.warning(
                "%d of %d %s prompts are longer than max_prompt_tokens=%s and are left out: %s",
                len(long), len(encoded), split, limit, named,
            )  # fmt: skip
        if not kept:
            why = f"all {len(encoded)} are longer than max_prompt_tokens={limit}" if encoded else "the task has none"
            raise ValueError(f"there are no {split} prompts: {why}")
        return kept

    def draw(self, count: int) -> list[EncodedPrompt]:
        """The next ``count`` training prompts; equal on every rank."""
        prompts = self.encoded("train")
        if self.cursor is None:
            self.cursor = PromptCursor(len(prompts), self.module.seed)
            self.cursor.position = self._position
        return [prompts[i] for i in self.cursor.draw(count)]

    def peek(self, count: int) -> list[EncodedPrompt]:
        """The training prompts that :meth:`draw` will give next, which it still does."""
        prompts = self.draw(count)
        assert self.cursor is not None
        self.cursor.position -= count
        return prompts

    def train_dataloader(self) -> TicketLoader:
        batch = self.module.batch
        phases = -(-len(self.encoded("train")) // batch.prompts)
        return TicketLoader(phases, batch.steps_per_phase)

    def val_dataloader(self) -> EvalLoader:
        return EvalLoader("val", len(self.encoded("val")), self.eval_batch_prompts)

    def test_dataloader(self) -> EvalLoader:
        return EvalLoader("test", len(self.encoded("test")), self.eval_batch_prompts)

    def teardown(self, stage: str) -> None:
        self.verifier.close()

    def state_dict(self) -> dict[str, Any]:
        return {"position": self._position if self.cursor is None else self.cursor.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._position = state_dict["position"]
        if self.cursor is not None:
            self.cursor.position = self._position
