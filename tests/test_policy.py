"""The policy against the plain forward pass of each tiny model family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CONTEXT, FAMILIES, LOGITS_SCALING, ROPE, SOFTCAP, VOCABULARY, build, random_prompts, save
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import HyperCLOVAXConfig, HyperCLOVAXForCausalLM, OPTConfig, OPTForCausalLM

from lit_rlvr.logits import LogitTransform
from lit_rlvr.policy import Policy, check_head, load_policy

LENGTHS = [9, 4, 7]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every family, saved."""
    return {family: save(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


class Batch:
    """Sequences padded on the right with a real character, and where their tokens are predicted, in a mixed order."""

    def __init__(self) -> None:
        self.rows = [torch.tensor(row) for row in random_prompts(LENGTHS)]
        self.ids = nn.utils.rnn.pad_sequence(self.rows, batch_first=True, padding_value=5)
        places = [(r, t) for r, length in enumerate(LENGTHS) for t in range(1, length)]
        order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0)).tolist()
        self.places = [places[i] for i in order]
        self.index = torch.tensor([r * self.ids.shape[1] + t - 1 for r, t in self.places])
        self.targets = torch.tensor([int(self.ids[r, t]) for r, t in self.places])
        self.coefficients = torch.linspace(-1, 1, len(places), dtype=torch.float64)

    def plain(self, hf: Any, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies from the model's own logits, one unpadded row at a time."""
        logits = [hf(input_ids=row[None]).logits[0] for row in self.rows]
        return self.scores(torch.stack([logits[r][t - 1] for r, t in self.places]) / temperature)

    def padded(self, hf: Any, temperature: float) -> tuple[Tensor, Tensor]:
        """The same from all logits of the padded batch, whose layers round as those of the policy do."""
        return self.scores(hf(input_ids=self.ids).logits.flatten(0, 1)[self.index] / temperature)

    def scores(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the targets and entropies of softmax(z)."""
        at = torch.log_softmax(z, -1)
        return at[torch.arange(len(at)), self.targets], -(at.exp() * at).sum(-1)

    def loss(self, logprobs: Tensor, entropies: Tensor, part: slice) -> Tensor:
        """A token loss that uses both."""
        c = self.coefficients[part].to(logprobs.dtype)
        return torch.sum(c * (logprobs + 3).exp() + entropies * logprobs)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_the_models_own_logits(folders: dict[str, str], family: str, temperature: float) -> None:
    """Right padding, the choice of rows and the logits' scaling and cap are all as in the model itself."""
    policy, batch = load_policy(folders[family]), Batch()
    with torch.no_grad():
        got = policy(batch.ids, batch.index, batch.targets, temperature)
        assert_close(got, batch.plain(policy.hf, temperature))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_all_parameters(folders: dict[str, str], family: str) -> None:
    """Both roads give every parameter, tied or not, the gradient of the loss over all logits, in float64."""
    policy, batch = load_policy(folders[family], "float64"), Batch()
    names, parameters = zip(*policy.named_parameters(), strict=True)
    everything = slice(0, len(batch.targets))
    wanted = batch.loss(*batch.padded(policy.hf, 0.8), everything)
    wanted_gradients = torch.autograd.grad(wanted, parameters)
    assert max(float(g.abs().max()) for g in wanted_gradients) > 1e-2
    selected = policy(batch.ids, batch.index, batch.targets, 0.8, batch.loss)
    logprobs, entropies = policy(batch.ids, batch.index, batch.targets, 0.8)
    for loss in (selected, batch.loss(logprobs, entropies, everything)):
        assert_close(loss, wanted)
        gradients = torch.autograd.grad(loss, parameters)
        assert_close(dict(zip(names, gradients, strict=True)), dict(zip(names, wanted_gradients, strict=True)))


@pytest.mark.parametrize(("family", "tied"), [("qwen3", True), ("gpt2", True), ("llama", False)])
def test_tied_families_are_tied(folders: dict[str, str], family: str, tied: bool) -> None:
    """The test above covers both cases."""
    hf: Any = load_policy(folders[family]).hf
    assert (hf.get_input_embeddings().weight is hf.get_output_embeddings().weight) == tied


def test_no_tokens_still_reach_every_parameter(folders: dict[str, str]) -> None:
    """A rank without tokens gets zero gradients, not none: sharded strategies wait for each of them."""
    policy, batch = load_policy(folders["llama"]), Batch()
    none = torch.zeros(0, dtype=torch.int64)
    policy(batch.ids, none, none, 1.0, batch.loss).backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_softcap_and_scale_are_read_and_applied(folders: dict[str, str]) -> None:
    """Logits before the cap go far beyond it, so that leaving it out would show."""
    capped, scaled = load_policy(folders["gemma2"]), load_policy(folders["granite"])
    assert capped.transform == LogitTransform(softcap=SOFTCAP)
    assert capped.hf.config._attn_implementation == "eager"  # sdpa leaves out the soft-cap of attention
    assert scaled.transform == LogitTransform(scale=1 / LOGITS_SCALING)
    assert load_policy(folders["qwen3"]).transform == LogitTransform()
    ids = Batch().ids
    hf: Any = capped.hf
    raw = hf.lm_head(hf.model(input_ids=ids).last_hidden_state).detach()
    assert float(raw.abs().max()) > 2 * SOFTCAP
    assert_close(SOFTCAP * torch.tanh(raw / SOFTCAP), hf(input_ids=ids).logits)


def test_dropout_is_off(folders: dict[str, str]) -> None:
    """GPT-2's configuration says 0.1 three times; in training mode two passes still agree with evaluation."""
    saved = json.loads((Path(folders["gpt2"]) / "config.json").read_text())
    assert [saved[name] for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")] == [0.1, 0.1, 0.1]
    policy, batch = load_policy(folders["gpt2"]), Batch()
    with torch.no_grad():
        policy.train()
        first, second = (policy(batch.ids, batch.index, batch.targets)[0] for _ in range(2))
        policy.eval()
        assert torch.equal(first, second)
        assert_close(first, policy(batch.ids, batch.index, batch.targets)[0])


def test_layers_are_never_skipped(tmp_path: Path) -> None:
    """OPT drops whole layers in training mode where its configuration says so."""
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=16, ffn_dim=24, num_hidden_layers=4, num_attention_heads=2,
        max_position_embeddings=CONTEXT, word_embed_proj_dim=16, layerdrop=0.5, init_std=0.5,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(tmp_path)
    policy, batch = load_policy(str(tmp_path)).train(), Batch()
    with torch.no_grad():
        first, *others = (policy(batch.ids, batch.index, batch.targets)[0] for _ in range(6))
    for other in others:
        assert torch.equal(other, first)


def test_gradient_checkpointing_recomputes_and_changes_no_gradient(folders: dict[str, str]) -> None:
    """As loaded, without a further call: each layer runs once more in the backward pass."""
    calls: list[int] = []
    gradients = []
    for checkpointing in (False, True):
        policy, batch = load_policy(folders["qwen3"], gradient_checkpointing=checkpointing), Batch()
        layers: Any = policy.hf.base_model.layers
        runs: list[int] = []
        # Before the layer's work: the recomputation stops as soon as it has what it needs.
        layers[0].mlp.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        policy(batch.ids, batch.index, batch.targets, 1.0, batch.loss).backward()
        gradients.append({name: p.grad for name, p in policy.named_parameters()})
        calls.append(len(runs))
    assert_close(gradients[1], gradients[0])
    assert calls == [1, 2]


@pytest.mark.parametrize(("name", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_dtype_of_the_weights(folders: dict[str, str], name: str, dtype: torch.dtype) -> None:
    """Every parameter has the dtype that was asked for."""
    assert {p.dtype for p in load_policy(folders["llama"], name).parameters()} == {dtype}


def test_unknown_dtype_is_refused(folders: dict[str, str]) -> None:
    """The message lists the choices."""
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float64, got 'float16'"):
        load_policy(folders["qwen3"], "float16")


@pytest.mark.parametrize("family", FAMILIES)
def test_context_length_is_read(folders: dict[str, str], family: str) -> None:
    """Also where the configuration calls it ``n_positions``."""
    assert load_policy(folders[family]).context_length == CONTEXT


class OddLinear(nn.Linear):
    """A head that may do anything in its forward pass."""


def test_other_heads_are_refused() -> None:
    """Only a plain linear layer is sure to be ``linear(hidden)``."""
    hf: Any = build("llama")
    hf.lm_head = OddLinear(16, VOCABULARY, bias=False)
    with pytest.raises(ValueError, match="LlamaForCausalLM has a OddLinear as its head"):
        Policy(hf)


def test_a_head_with_a_bias_is_applied() -> None:
    """The bias enters values and gradients."""
    hf: Any = build("llama").double()
    hf.lm_head = nn.Linear(16, VOCABULARY, bias=True, dtype=torch.float64)
    policy, batch = Policy(hf), Batch()
    check_head(policy)
    wanted = batch.loss(*batch.plain(hf, 1.0), slice(0, len(batch.targets)))
    got = policy(batch.ids, batch.index, batch.targets, 1.0, batch.loss)
    assert_close(got, wanted)
    assert_close(torch.autograd.grad(got, hf.lm_head.bias), torch.autograd.grad(wanted, hf.lm_head.bias))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", ["scale", "shift", "cap"])
def test_unknown_changes_of_the_logits_are_refused(family: str, change: str) -> None:
    """The model's forward pass does something that its head and configuration do not say."""
    policy = Policy(build(family))
    check_head(policy)

    def altered(module: Any, inputs: Any, output: Any) -> Any:
        z = output.logits
        output.logits = {"scale": 1.1 * z, "shift": z + torch.linspace(0, 0.5, VOCABULARY), "cap": torch.tanh(z)}[
            change
        ]
        return output

    policy.hf.register_forward_hook(altered)
    with pytest.raises(
        ValueError, match=f"{type(policy.hf).__name__} changes its logits in a way that is not reproduced"
    ):
        check_head(policy)


def test_a_family_that_reads_a_known_name_differently_is_refused(tmp_path: Path) -> None:
    """HyperCLOVAX multiplies by ``logits_scaling`` where Granite divides."""
    HyperCLOVAXForCausalLM(HyperCLOVAXConfig(**{**ROPE, "logits_scaling": 0.5})).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="HyperCLOVAXForCausalLM changes its logits"):
        load_policy(str(tmp_path))
