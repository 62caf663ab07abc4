"""The built-in model and its tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_rlvr.models import BUILTIN, TINY, cache_folder, character_tokenizer, resolve_model, tiny_qwen3
from lit_rlvr.tasks.last_digit import ALPHABET, LastDigitArithmetic


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("LIT_RLVR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_tiny_model_has_the_size_that_its_name_says(cache: Path) -> None:
    """Counted on what transformers opens from the folder: embeddings and head are one matrix."""
    folder = resolve_model(BUILTIN + TINY)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() == 75_520
    assert model.dtype == torch.float32
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.vocab_size == 22


def test_every_token_of_the_model_has_a_text(cache: Path) -> None:
    """The policy can sample every row of its head."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(BUILTIN + TINY))
    assert len(tokenizer) == 22
    assert all(tokenizer.decode([i]) for i in range(22))


def test_the_tokenizer_gives_back_what_it_reads(cache: Path) -> None:
    """Every character is one token, pad and end are tokens of their own, and nothing is added."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(BUILTIN + TINY))
    text = ALPHABET + ALPHABET[::-1]
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert len(set(ids)) == len(ALPHABET)
    assert 2 <= min(ids) <= max(ids) < 22
    assert tokenizer.decode(ids) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.decode([ids[3], 1, 0, 0], skip_special_tokens=True) == ALPHABET[3]


def test_the_vocabulary_covers_its_task() -> None:
    """No question and no demonstration holds a character that the tokenizer does not know."""
    import random

    tokenizer, task, rng = character_tokenizer(ALPHABET), LastDigitArithmetic(), random.Random(0)
    prompts = task.prompts("val")
    texts = [p.question for p in prompts] + [task.demonstrate(p, rng) for p in prompts]
    assert tokenizer.batch_decode(tokenizer(texts)["input_ids"]) == texts
    assert tokenizer("a")["input_ids"] == [tokenizer.unk_token_id]


def test_the_weights_are_always_the_same() -> None:
    """Whatever the process has drawn before, and without drawing from its generator; another seed gives others."""
    torch.manual_seed(3)
    first, drawn = tiny_qwen3().state_dict(), torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(2))
    second, other = tiny_qwen3().state_dict(), tiny_qwen3(seed=1).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_the_folder_holds_these_weights_and_is_built_once(cache: Path) -> None:
    folder = Path(resolve_model(BUILTIN + TINY))
    assert folder.parent == cache == cache_folder()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(BUILTIN + TINY) == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    opened = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(opened[name], value) for name, value in tiny_qwen3().state_dict().items())


def test_a_folder_that_was_cut_short_is_built_again(cache: Path) -> None:
    """The weights are written last; without them nothing else in the folder counts."""
    folder = Path(resolve_model(BUILTIN + TINY))
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text("{")
    assert AutoModelForCausalLM.from_pretrained(resolve_model(BUILTIN + TINY)).num_parameters() == 75_520


def test_other_names_are_left_to_transformers() -> None:
    assert resolve_model("Qwen/Qwen3-8B-Base") == "Qwen/Qwen3-8B-Base"


def test_an_unknown_builtin_model_is_refused(cache: Path) -> None:
    with pytest.raises(ValueError, match="no built-in model 'big'; the only one is builtin:tiny-qwen3-75k"):
        resolve_model("builtin:big")
    assert not cache.exists()


def test_the_cache_is_in_the_home_folder_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_RLVR_CACHE", "")
    assert cache_folder() == Path.home() / ".cache/lit-rlvr"
