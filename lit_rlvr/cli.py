"""The command line: Lightning's CLI over OmegaConf YAML, with this package's defaults."""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn

from lit_rlvr.terminal import console, quiet_libraries, set_up_logging

quiet_libraries()

import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402
from jsonargparse import Namespace, set_parsing_settings  # noqa: E402
from jsonargparse.typing import lazy_instance  # noqa: E402
from lightning.pytorch.callbacks import Callback  # noqa: E402
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI  # noqa: E402

from lit_rlvr.architectures import reach  # noqa: E402
from lit_rlvr.checkpoint import PhaseCheckpoint, check_resumable  # noqa: E402
from lit_rlvr.checks import check_chain, check_trainer, check_trainer_options  # noqa: E402
from lit_rlvr.cli_classes import names_by_option  # noqa: E402
from lit_rlvr.cli_errors import clear, missing_file  # noqa: E402
from lit_rlvr.cli_failures import sentence_about  # noqa: E402
from lit_rlvr.cli_help import hide_bases, improve  # noqa: E402
from lit_rlvr.cli_names import option_keys  # noqa: E402
from lit_rlvr.config_files import MODE, check_file, keep_comments_as_text, replace_whole_lists  # noqa: E402
from lit_rlvr.credit import all_callbacks, credit_chain  # noqa: E402
from lit_rlvr.data import RLVRDataModule  # noqa: E402
from lit_rlvr.explain import explain  # noqa: E402
from lit_rlvr.facts import Cluster  # noqa: E402
from lit_rlvr.gae import GAE as GAE  # noqa: E402  # imported so that YAML may use its short name
from lit_rlvr.loggers import check_packages  # noqa: E402
from lit_rlvr.machines import Machines  # noqa: E402
from lit_rlvr.models import resolve_model  # noqa: E402
from lit_rlvr.module import RLVRModule  # noqa: E402
from lit_rlvr.nulls import nulls  # noqa: E402
from lit_rlvr.preemption import Preemption  # noqa: E402
from lit_rlvr.progress import RLVRProgress  # noqa: E402
from lit_rlvr.report import Report  # noqa: E402
from lit_rlvr.rollout_pages import RolloutPages  # noqa: E402
from lit_rlvr.saving import SavePolicy  # noqa: E402
from lit_rlvr.tracking import MLflow, RunRecord, SaveConfig  # noqa: E402
from lit_rlvr.trainer import RLVRTrainer  # noqa: E402
from lit_rlvr.waiting import let_ddp_wait  # noqa: E402
from lit_rlvr.warmup import Warmup  # noqa: E402

TRAINER_DEFAULTS: dict[str, Any] = {
    "logger": lazy_instance(MLflow),
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "check_val_every_n_epoch": None,
    "val_check_interval": 100,
    "use_distributed_sampler": False,
    "inference_mode": False,
    "enable_model_summary": False,
    "gradient_clip_val": 1.0,
}

STANDARD_CALLBACKS = (RLVRProgress, RolloutPages, SavePolicy, RunRecord, Report)
"""In every ``fit`` of the command line; one of the same class in the configuration takes its place."""
CHECKPOINT_CALLBACKS = (Preemption, PhaseCheckpoint)
"""In every ``fit`` with checkpoints, before the others: a signal may come while they evaluate."""


class Parser(LightningArgumentParser):
    """Lightning's parser, with errors in a sentence."""

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Namespace:
        """Read a configuration file, unless something is wrong with it."""
        check_file(str(path), option_keys(self))
        parsed: Namespace = super().parse_path(path, *args, **kwargs)
        return parsed

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if os.environ.get("LIT_RLVR_DEBUG") or not self.exit_on_error:
            super().error(message, ex)
        fail(clear(message, every_option(), names_by_option()))
        sys.exit(2)


def fail(sentence: str) -> None:
    """Print an error; for ``doctor`` it is one of the findings."""
    if sys.argv[1:2] == ["doctor"]:
        from lit_rlvr.doctor import refused

        sys.exit(refused(sentence))
    console().print(f"lit-rlvr: error: {sentence}", markup=False)


OWN_COMMANDS = ("explain", "doctor", "warmup")
"""Commands beside Lightning's."""


class CLI(LightningCLI):
    """``fit``, ``validate``, ``test``, ``explain``, ``doctor`` and ``warmup``."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        commands, own = LightningCLI.subcommands(), {"model", "datamodule"}
        return {**{n: commands[n] for n in ("fit", "validate", "test")}, **dict.fromkeys(OWN_COMMANDS, own)}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--warmup", type=Warmup | None, default=None,
            help="Supervised warm start of model.model before fit; kept in a cache. Null: none.",
        )  # fmt: skip
        parser.add_argument(
            "--threads", type=int | None, default=None, help="Threads of CPU math; null: torch's choice."
        )
        parser.add_argument("--quiet", type=bool, default=False, help="Print warnings and results only.")
        improve(parser)

    def _parse_ckpt_path(self) -> None:
        """Nothing: YAML and command line stand above what a checkpoint remembers."""

    def _set_seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed_everything must lie between 0 and {2**32 - 1}, got {seed}")
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        for name, cls in (("model", RLVRModule), ("data", RLVRDataModule), ("trainer", pl.Trainer)):
            for null in nulls(cls, self._get(self.config, name), name):
                raise ValueError(f"{null} cannot be null; leave it out for the default")
        check_packages(self._get(self.config, "trainer.logger"))
        set_up_logging(quiet=self._get(self.config, "quiet"))
        if (threads := self._get(self.config, "threads")) is not None:
            if threads < 1:
                raise ValueError(f"threads must be at least 1, got {threads}; leave it null for torch's choice")
            torch.set_num_threads(threads)

    def instantiate_classes(self) -> None:
        if self.subcommand == "explain":
            self.config.explain.trainer.logger = False  # making one opens its database
        super().instantiate_classes()

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> pl.Trainer:
        check_trainer_options(config, found_here=self.subcommand not in ("explain", "doctor"))
        if self.subcommand in ("explain", "doctor"):  # the machine that explains a run need not be the one that runs it
            self._asked = dict(config)
            config = {**config, "accelerator": "cpu", "devices": 1, "strategy": "auto", "num_nodes": 1, "logger": False}
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        if self.subcommand == "fit":
            saving = CHECKPOINT_CALLBACKS if config.get("enable_checkpointing") is not False else ()
            standard = (*saving, *STANDARD_CALLBACKS)
            given = given + [cls() for cls in standard if not any(isinstance(c, cls) for c in given)]
        elif not any(isinstance(c, RLVRProgress) for c in given):
            given = [*given, RLVRProgress()]
        if self._get(self.config, "quiet"):
            for callback in given:
                if isinstance(callback, RLVRProgress):
                    callback.disable()
        return super()._instantiate_trainer({**config, "callbacks": given}, callbacks)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if "weights_only" in kwargs and kwargs["weights_only"] is None:
            kwargs["weights_only"] = True  # checkpoints hold plain values and tensors alone
        return kwargs

    def before_fit(self) -> None:
        credit_chain(all_callbacks(self.trainer))  # refuses a bad list before anything is trained
        self._reach_model()
        path = self._get(self.config, "ckpt_path")
        if path is not None:
            if not Path(path).exists():
                raise ValueError(missing_file(Path(path)))
            check_resumable(Path(path), self.trainer.strategy)
        if (folder := self._warm_start()) is not None:
            self.model.start_from(folder)

    def before_validate(self) -> None:
        self._reach_model()

    def before_test(self) -> None:
        self._reach_model()

    def _reach_model(self) -> None:
        reach(resolve_model(self.model.model))

    def explain(self, cluster: str | None = None, **_: Any) -> None:
        """The ``explain`` command."""
        module, data, trainer = self._connected()
        check_trainer(module, trainer, self._asked.get("strategy"))
        check_chain(module)
        machines = None if cluster is None else Machines.of(cluster)
        explain(module, data, trainer, Cluster.of(self._asked), self._asked, machines)

    def doctor(self, **_: Any) -> None:
        """The ``doctor`` command."""
        from lit_rlvr.examine import examine

        sys.exit(examine(*self._connected(), self._asked, self._get(self.config_init, "warmup")))

    def _connected(self) -> tuple[RLVRModule, RLVRDataModule, pl.Trainer]:
        """Module, data and trainer, knowing each other as in ``Trainer.fit``."""
        module, data, trainer = self.model, self.datamodule, self.trainer
        trainer.strategy.connect(module)
        module.trainer = data.trainer = trainer
        vars(trainer)["datamodule"] = data
        return module, data, trainer

    def warmup(self, **_: Any) -> None:
        """The ``warmup`` command."""
        folder = self._warm_start()
        if folder is None:
            raise ValueError(
                "there is nothing to do: the configuration has no `warmup` section; add --warmup.steps=700"
            )
        print(folder)

    def _warm_start(self) -> str | None:
        settings: Warmup | None = self._get(self.config_init, "warmup")
        if settings is None:
            return None
        data: RLVRDataModule = self.datamodule
        return str(settings.run(self.model.model, data.task, data.template, self.model.dtype_name))


def every_option() -> list[str]:
    """The options of ``fit``, without a run."""
    parser = Parser()
    parser.add_lightning_class_args(RLVRTrainer, "trainer")
    parser.add_lightning_class_args(RLVRModule, "model")
    parser.add_lightning_class_args(RLVRDataModule, "data")
    return ["seed_everything", *option_keys(parser)]


def load_callbacks() -> None:
    """Import every installed package of callbacks, so that YAML may use their short names."""
    for point in entry_points(group="lit_rlvr.callbacks"):
        point.load()


def run(arguments: list[str], command_line: type[CLI] = CLI) -> int:
    """Run a command; user errors become one sentence. ``LIT_RLVR_DEBUG=1`` shows the traceback instead."""
    quiet_libraries()  # once more: Lightning sets its own log levels on import
    sys.path.insert(0, os.getcwd())  # modules in the current folder can be imported, also by verifier processes
    load_callbacks()
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    keep_comments_as_text()
    replace_whole_lists()
    let_ddp_wait()
    hide_bases()
    usage = {name: {"parser_mode": MODE, "usage": f"lit-rlvr {name} [options]"} for name in CLI.subcommands()}
    sys.argv = [sys.argv[0], *arguments]  # what Lightning's launchers start other ranks with
    try:
        command_line(
            RLVRModule,
            RLVRDataModule,
            save_config_callback=SaveConfig,
            trainer_class=RLVRTrainer,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_kwargs={
                "parser_mode": MODE,
                "allow_abbrev": False,
                "usage": "lit-rlvr <command> [options]",
                **usage,
            },
            auto_configure_optimizers=False,
            parser_class=Parser,
        )
    except Exception as error:
        if os.environ.get("LIT_RLVR_DEBUG"):
            raise
        sentence = sentence_about(error, every_option())
        if sentence is None:
            raise
        fail(sentence)
        return 2
    return 0
