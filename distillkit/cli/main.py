"""The `distillkit` command."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence

import distillkit
from distillkit.errors import ConfigError, DistillkitError, did_you_mean, problem

__all__ = ["main"]

_HELP = """\
usage: distillkit COMMAND [options] [--debug]

  fit         train a student: distillkit fit --config quickstart
  validate    evaluate on the validation sets of a config
  test        evaluate on its test sets
  predict     write completions for its prompts

  components  list the parts a config can name, or describe one: distillkit components divergence topk
  configs     list the recipes that come with distillkit, print one, or copy it
  rollouts    show the rollouts of a run, tokens coloured by the teacher's opinion: distillkit rollouts RUN
  compare     compare runs: configs, results over seeds, how sure a difference is: distillkit compare RUN RUN...
  plot        draw the curves of runs anew: distillkit plot RUN...
  plan        memory and time of a recipe on N GPUs: distillkit plan --config FILE --gpus 8 --gpu-memory 80
  doctor      look at a recipe's models, data and memory before it runs: distillkit doctor --config FILE
  decompose   take reasoning traces apart into steps, as a training set for a structure reward's decomposer

  --version   print the version
  --debug     show the traceback of an error

distillkit COMMAND --help says more. Every value of a config can be set on the command line:
  distillkit fit --config quickstart --model.divergence topk --model.divergence.k 5 --trainer.max_steps 20
"""

_TRAINING = ("fit", "validate", "test", "predict")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 a config or input that cannot run, 1 anything else.

    An error is printed as its text, to stderr, without a traceback; `--debug` shows the traceback.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in given
    arguments = [argument for argument in given if argument != "--debug"]
    try:
        code = _run(arguments)
        sys.stdout.flush()  # a closed pipe shows here, and not as an error of the interpreter's own exit
        return code
    except DistillkitError as error:
        return _failed(error, f"{type(error).__name__}: {error}", error.exit_code, debug)
    except KeyboardInterrupt as error:
        return _failed(error, "stopped by Ctrl-C", 1, debug)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # whatever it is, the user gets one line and a way to see more
        if (ours := _own_cause(error)) is not None:
            return _failed(error, f"{type(ours).__name__}: {ours}", ours.exit_code, debug)
        text = " ".join(str(error).split())
        return _failed(error, f"{type(error).__name__}: {text}\nrun again with --debug to see where", 1, debug)


def _run(arguments: list[str]) -> int:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help", "help"):
        print(_HELP, end="")
        return 0
    if command == "--version":
        print(f"distillkit {distillkit.__version__}")
        return 0
    if (function := _COMMANDS.get(command)) is not None:
        return function(arguments)
    raise ConfigError(
        problem(
            f"distillkit: no command {command!r}",
            got=command,
            expected=", ".join(_COMMANDS),
            hint=did_you_mean(command, _COMMANDS) or "distillkit --help",
        )
    )


def _own_cause(error: BaseException | None) -> DistillkitError | None:
    """Our own error behind one of jsonargparse's: it wraps what a part's constructor raises."""
    while error is not None and not isinstance(error, DistillkitError):
        error = error.__cause__ or error.__context__
    return error


def _failed(error: BaseException, text: str, code: int, debug: bool) -> int:
    sys.stdout.flush()
    if debug:
        traceback.print_exception(error)
    else:
        print(text, file=sys.stderr, flush=True)
    return code


def _train(arguments: list[str]) -> int:
    if len(arguments) == 1:
        hint = f"distillkit {arguments[0]} --config quickstart"
        raise ConfigError(problem(f"distillkit {arguments[0]}: of which config?", expected="--config FILE", hint=hint))
    if (working_folder := os.getcwd()) not in sys.path:
        sys.path.append(working_folder)  # a reward function in a file beside the config
    from distillkit.cli.lightning import DistillCLI, RunInterrupted
    from distillkit.data import PromptData
    from distillkit.training.on_policy import OnPolicyDistillation

    try:
        DistillCLI(arguments, model_class=OnPolicyDistillation, data_class=PromptData)
    except RunInterrupted as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    return 0


def _components(arguments: list[str]) -> int:
    from distillkit.cli.listing import main as components

    return components(arguments[1:])


def _configs(arguments: list[str]) -> int:
    from distillkit.cli.shipped import main as configs

    return configs(arguments[1:])


def _rollouts(arguments: list[str]) -> int:
    from distillkit.reporting.viewer import main as rollouts

    return rollouts(arguments[1:])


def _compare(arguments: list[str]) -> int:
    from distillkit.cli.compare import main as compare

    return compare(arguments[1:])


def _plot(arguments: list[str]) -> int:
    from distillkit.cli.plot import main as plot

    return plot(arguments[1:])


def _decompose(arguments: list[str]) -> int:
    from distillkit.cli.decompose import main as decompose

    return decompose(arguments[1:])


def _plan(arguments: list[str]) -> int:
    from distillkit.cli.plan import main as plan

    return plan(arguments[1:])


def _doctor(arguments: list[str]) -> int:
    from distillkit.cli.doctor import main as doctor

    return doctor(arguments[1:])


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    **dict.fromkeys(_TRAINING, _train),
    "components": _components,
    "configs": _configs,
    "rollouts": _rollouts,
    "compare": _compare,
    "plot": _plot,
    "plan": _plan,
    "doctor": _doctor,
    "decompose": _decompose,
}
