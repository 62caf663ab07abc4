"""``lit-rlvr``: a thin dispatcher, so that ``--help`` and ``--version`` do not wait for torch."""

from __future__ import annotations

import sys

HELP = """usage: lit-rlvr <command> [options]

Reinforcement learning with verifiable rewards, where choosing which tokens learn is a callback.

commands:
  fit        train a policy           lit-rlvr fit --config configs/quickstart.yaml
  validate   evaluate on held-out validation problems
  test       evaluate on held-out test problems
  explain    what a run would do: steps, tokens, algorithm, credit, memory
  doctor     is everything ready? checks the machine, and with --config the configuration, model, task and verifier
  export     a Hugging Face folder from a checkpoint    lit-rlvr export CHECKPOINT FOLDER
  warmup     supervised warm start on a task's demonstrations, kept in a cache
  serve      start a vLLM server to sample rollouts from
  compare    runs arms and seeds from one file, and says in a table what the differences are worth

lit-rlvr <command> --help lists a command's options; --print_config prints the configuration that they make.
Several --config files are layered; options on the command line come last:

  lit-rlvr fit --config configs/quickstart.yaml --config configs/callbacks/position.yaml --model.seed=1
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if arguments[0] in ("-V", "--version"):
        from lit_rlvr import __version__

        print(f"lit-rlvr {__version__}")
        return 0
    if arguments == ["doctor"]:
        from lit_rlvr.doctor import main as doctor

        return doctor()
    if arguments[0] == "serve":
        from lit_rlvr.engines.vllm_launch import main as serve

        return serve(arguments[1:])
    if arguments[0] == "compare":
        from lit_rlvr.compare.command import main as compare

        return compare(arguments[1:])
    if arguments[0] == "export":
        from lit_rlvr.export import main as export

        return export(arguments[1:])
    from lit_rlvr.cli import run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
