"""Runs inside vLLM's worker processes and takes in the weights that training pushes.

This one file needs vLLM and nothing else, because a server has an environment of its own, on machines where lit-rlvr
need not be installed. ``lit-rlvr serve`` puts its folder on ``PYTHONPATH``; elsewhere, copy the file to the server and
start vLLM with ``--worker-extension-cls lit_rlvr_worker.WeightReceiver``.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any

PROTOCOL = 1
"""Raised whenever the methods below change; the trainer refuses a server with another number."""


class WeightReceiver:
    """Methods that vLLM adds to its workers; the trainer calls them over ``/collective_rpc``.

    One update is ``lit_rlvr_begin``, then ``lit_rlvr_load`` for every file, then ``lit_rlvr_finish``. Weights are
    loaded into the memory of those that they replace, layer by layer, so that no second copy of the model is made.
    """

    _lit_rlvr_missing: set[str] | None = None
    _lit_rlvr_files: int = 0
    _lit_rlvr_error: str | None = None

    def lit_rlvr_about(self) -> dict[str, Any]:
        """What the server serves, and the protocol of this file."""
        worker: Any = self
        config = worker.vllm_config.model_config
        return {"vocabulary": config.get_vocab_size(), "hidden": config.get_hidden_size(), "protocol": PROTOCOL}

    def lit_rlvr_begin(self) -> dict[str, Any]:
        """Make the model ready to take weights in; an update that was cut short is begun again."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        worker: Any = self
        if self._lit_rlvr_missing is not None:
            self._lit_rlvr_end()
        with set_current_vllm_config(worker.vllm_config):
            model = worker.get_model()
            self._lit_rlvr_missing = {name for name, _ in model.named_parameters()}
            initialize_layerwise_reload(model)
        return {}

    def lit_rlvr_load(self, file: str, number: int) -> dict[str, Any]:
        """Load a safetensors file, whose weights have the names of a Hugging Face checkpoint.

        Args:
            file: Path of the file.
            number: Files of this update before it. One that has been loaded is not loaded again: vLLM counts the
                numbers that it has loaded of a layer, and would take a repeated request's for those that are still to
                come.
        """
        if number < self._lit_rlvr_files:
            return {}
        if self._lit_rlvr_missing is None or number > self._lit_rlvr_files:
            raise RuntimeError(f"file {number} of the new weights comes out of turn; the update must be begun again")
        if self._lit_rlvr_error is None:
            try:
                self._lit_rlvr_read(file)
            except Exception as error:
                self._lit_rlvr_error = f"{type(error).__name__} {error}".strip()
        if self._lit_rlvr_error is not None:
            raise RuntimeError(f"new weights could not be loaded: {self._lit_rlvr_error}")
        self._lit_rlvr_files = number + 1
        return {}

    def lit_rlvr_finish(self) -> dict[str, Any]:
        """Put the new weights into use, and name the model's weights that no file had."""
        if self._lit_rlvr_missing is None:
            return {"missing": []}
        return {"missing": self._lit_rlvr_end()}

    def _lit_rlvr_read(self, file: str) -> None:
        from safetensors import safe_open
        from vllm.config import set_current_vllm_config

        worker: Any = self
        with set_current_vllm_config(worker.vllm_config), safe_open(file, framework="pt") as weights:
            names = list(weights.keys())
            loaded = worker.get_model().load_weights((name, weights.get_tensor(name)) for name in names)
        assert self._lit_rlvr_missing is not None
        # Models that do not say what they loaded cannot be checked.
        self._lit_rlvr_missing -= self._lit_rlvr_missing.copy() if loaded is None else set(loaded)

    def _lit_rlvr_end(self) -> list[str]:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        worker: Any = self
        missing = sorted(self._lit_rlvr_missing or ())
        self._lit_rlvr_missing, self._lit_rlvr_files, self._lit_rlvr_error = None, 0, None
        with set_current_vllm_config(worker.vllm_config):
            model = worker.get_model()
            finalize_layerwise_reload(model, worker.vllm_config.model_config)
            _pack_again(model)
            worker.model_runner.reset_lora_state()
        return missing


def _pack_again(model: Any) -> None:
    """Renew what a layer keeps beside its weight.

    On a CPU vLLM computes with a packed copy. A head that is tied to the embeddings shares their weight but has a
    packed copy of its own, which loading the embeddings leaves as it was: the head would go on with the old weights.
    """
    for layer in model.modules():
        if hasattr(layer, "cpu_linear") and layer.weight.numel():
            layer.quant_method.process_weights_after_loading(layer)
