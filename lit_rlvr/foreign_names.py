"""What options and commands of other frameworks (TRL, verl) are called here."""

from __future__ import annotations

BATCH, SAMPLING, ROOT = "model.batch", "model.sampling", "trainer.default_root_dir"

OPTIONS = {
    "num_generations": f"{BATCH}.responses", "n": f"{BATCH}.responses", "group_size": f"{BATCH}.responses",
    "train_batch_size": f"{BATCH}.prompts", "generation_batch_size": f"{BATCH}.prompts",
    "ppo_mini_batch_size": f"{BATCH}.minibatch_prompts", "mini_batch_size": f"{BATCH}.minibatch_prompts",
    "per_device_train_batch_size": f"{BATCH}.micro_tokens", "micro_batch_size": f"{BATCH}.micro_tokens",
    "ppo_micro_batch_size_per_gpu": f"{BATCH}.micro_tokens", "gradient_accumulation_steps": f"{BATCH}.micro_tokens",
    "num_iterations": f"{BATCH}.epochs", "ppo_epochs": f"{BATCH}.epochs",
    "max_completion_length": f"{SAMPLING}.max_new_tokens", "max_response_length": f"{SAMPLING}.max_new_tokens",
    "max_new_tokens": f"{SAMPLING}.max_new_tokens", "max_tokens": f"{SAMPLING}.max_new_tokens",
    "temperature": f"{SAMPLING}.temperature", "max_prompt_length": "data.max_prompt_tokens",
    "train_files": "data.task", "dataset": "data.task", "dataset_name": "data.task", "reward_funcs": "data.task",
    "learning_rate": "model.optimizer.lr", "lr": "model.optimizer.lr", "lr_scheduler_type": "model.scheduler",
    "weight_decay": "model.optimizer.weight_decay", "max_grad_norm": "trainer.gradient_clip_val",
    "beta": "model.kl.beta", "kl_coef": "model.kl.beta", "kl_loss_coef": "model.kl.beta",
    "epsilon": "model.loss.clip_low", "clip_ratio": "model.loss.clip_low", "cliprange": "model.loss.clip_low",
    "epsilon_high": "model.loss.clip_high", "clip_ratio_high": "model.loss.clip_high",
    "adv_estimator": "model.advantage", "loss_type": "model.aggregation", "loss_agg_mode": "model.aggregation",
    "use_peft": "model.lora.r", "lora_r": "model.lora.r", "lora_rank": "model.lora.r",
    "model_name_or_path": "model.model", "model_path": "model.model", "seed": "seed_everything",
    "output_dir": ROOT, "default_local_dir": ROOT, "report_to": "trainer.logger",
    "total_epochs": "trainer.max_steps", "num_train_epochs": "trainer.max_steps", "bf16": "trainer.precision",
    "total_training_steps": "trainer.max_steps", "eval_steps": "trainer.val_check_interval",
    "test_freq": "trainer.val_check_interval", "n_gpus_per_node": "trainer.devices", "nnodes": "trainer.num_nodes",
    "gpus": "trainer.devices", "num_gpus": "trainer.devices", "system_prompt": "data.template.system",
    "chat_template": "data.template.kind", "reward": "data.task", "reward_function": "data.task",
    "resume_from_checkpoint": "ckpt_path",
}  # fmt: skip
"""By the last part of the other framework's option."""

FILES = {
    "algorithm": "algorithm/grpo.yaml", "use_vllm": "engine/vllm.yaml", "vllm_mode": "engine/vllm_colocated.yaml",
    "mask_truncated_completions": "callbacks/mask_truncated.yaml",
    "top_entropy_quantile": "callbacks/entropy_topk_trl.yaml", "fsdp": "strategy/fsdp.yaml",
    "wandb_project": "logger/wandb.yaml",
}  # fmt: skip
"""What is not one option here, by the fragment below ``configs`` that does it."""

COMMANDS = {
    "train": "fit", "grpo": "fit", "eval": "validate", "evaluate": "validate", "sft": "warmup", "check": "doctor",
    "vllm-serve": "serve", "merge": "export",
}  # fmt: skip

ALGORITHMS = ("cispo", "dapo", "dr_grpo", "grpo", "gspo", "gspo_token", "ppo", "reinforce_pp", "rloo")
"""The files in ``configs/algorithm``."""


def option_here(option: str) -> str:
    """The end of a sentence about an unknown ``option`` that another framework has, or nothing.

    >>> option_here("model.num_generations"), option_here("use_vllm"), option_here("nope")
    ('; here it is model.batch.responses', '; here it is --config configs/engine/vllm.yaml', '')
    """
    last = option.rpartition(".")[2].replace("-", "_")
    if last in FILES:
        return f"; here it is --config configs/{FILES[last]}"
    return f"; here it is {OPTIONS[last]}" if last in OPTIONS else ""


def algorithm_here(name: str) -> str:
    """The end of a sentence about a ``name`` that is an algorithm's, or nothing: here that is several options.

    >>> algorithm_here("GRPO")
    '; grpo is several options: --config configs/algorithm/grpo.yaml'
    """
    plain = name.lower().replace("-", "_").replace("reinforce++", "reinforce_pp").replace("drgrpo", "dr_grpo")
    known = plain in ALGORITHMS
    return f"; {plain} is several options: --config configs/algorithm/{plain}.yaml" if known else ""
