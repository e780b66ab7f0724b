"""The `fastpeft` command. Imports are inside the commands, so that --help answers at once."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from fastpeft._version import __version__
from fastpeft.cli.chat_command import chat
from fastpeft.cli.ctrl_c import ctrl_c_ends_at_once, handled
from fastpeft.cli.data_commands import data
from fastpeft.cli.evaluate_command import evaluate
from fastpeft.cli.ranks_launch import end_rank, launch_ranks, refuse_with_ranks, resumes_by_itself
from fastpeft.cli.run_options import load_config, results_option, seeds_of
from fastpeft.cli.runs_commands import Best, ResultsDir, runs, which_weights
from fastpeft.cli.sweep_command import sweep
from fastpeft.errors import UserError, disk_error
from fastpeft.launched import place

EXIT_CANNOT_TRAIN = 1
EXIT_DIVERGED = 4

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Fine-tune with LoRA inside a budget.",
)
app.add_typer(runs, name="runs")
app.add_typer(data, name="data")
app.command()(evaluate)
app.command()(chat)


def main() -> None:
    """Entry point: a UserError becomes a message and an exit code, never a traceback."""
    # OpenMP threads that spin while waiting make a step 100 times slower (measured) as soon as
    # another process wants one of the cores. torch reads the variable when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    cast(io.TextIOWrapper, sys.stdout).reconfigure(errors="backslashreplace")  # names may not be encodable
    try:
        app()
    except Exception as error:
        told = error if isinstance(error, UserError) else disk_error(error)
        if place().size > 1:
            end_rank(told or error)
        if told is None:
            raise
        from fastpeft.cli.safe_console import shown

        print(f"fastpeft: {shown(str(told))}", file=sys.stderr)
        sys.exit(told.exit_code)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if place().size > 1 and context.invoked_subcommand != "train":
        raise UserError(f"fastpeft {context.invoked_subcommand} is one process: only train takes torchrun's ranks")


@app.command()
def train(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings over the file's, such as training.seed=1."),
    ] = None,
    run: Annotated[str | None, typer.Option(help="A preset's name, or the path of a YAML file.")] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="What the run may spend: 90s, 30m, 2h, 2000steps, 5Mtok or 50kJ."),
    ] = None,
    mode: Annotated[str, typer.Option(help="full, or trial: two steps through every code path.")] = "full",
    results_dir: ResultsDir = Path("results"),
    name: Annotated[str | None, typer.Option(help="The run's folder; RUN-YYYYmmdd-HHMMSScc when absent.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same as training.seed=N.")] = None,
    seeds: Annotated[
        str | None, typer.Option(help="0,1,2: one run a seed, one after another, which share the budget.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run --name.")] = False,
    no_stand_in: Annotated[
        bool, typer.Option("--no-stand-in", help="Fail where model or data cannot be reached.")
    ] = False,
    tui: Annotated[bool, typer.Option("--tui", help="Train in a process of its own, and watch it.")] = False,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Processes that share each batch: one on each GPU.", show_default=False)
    ] = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="--ranks: resume so often where a rank was killed or has failed.")
    ] = 0,
) -> None:
    """Train a run to the end of its budget."""
    several = None if seeds is None else seeds_of(seeds, seed)
    refuse_with_ranks(ranks, max_restarts, {"--seeds": seeds is not None, "--tui": tui})
    resume = resume or resumes_by_itself(results_dir, name)
    config = load_config(run, overrides or [], budget, seed, mode, resume, len(several or [0]))
    if tui or (ranks or 1) > 1:
        from fastpeft.runs.store import default_name
        from fastpeft.tui.steer import Order

        if name is None and resume:
            raise UserError("--resume needs --name: which run is to be continued?")
        order = Order(
            run=run,
            overrides=overrides or [],
            budget=budget,
            mode=mode,
            name=name or default_name(config.run_id),
            seed=seed,
            seeds=several,
            resume=resume,
            no_stand_in=no_stand_in,
        )
        if ranks is not None and ranks > 1:
            raise typer.Exit(launch_ranks(order, ranks, max_restarts, results_dir))
        from fastpeft.tui.show import show

        show(results_dir, order)
        return
    if several is not None:
        _train_seeds(config, several, results_dir, name, resume, not no_stand_in)
        return
    _train_one(config, results_dir, name, resume, not no_stand_in)


def _say_first(config: Any) -> None:
    """Print a first line at once. Loading takes seconds, and the imports of the console display a good part of one."""
    behind = "" if config is None else f", then {config.model.name} and {config.dataset.path or config.dataset.name}"
    typer.secho(f"loading torch{behind}", dim=True)


def _train_one(config: Any, results_dir: Path, name: str | None, resume: bool, allow_stand_in: bool) -> None:
    from fastpeft.runs.store import RunFolder

    is_first_rank = place().rank == 0
    if name is not None and not resume and is_first_rank:  # before torch is loaded, which takes seconds
        RunFolder.at(results_dir, name).check_free()
    with ctrl_c_ends_at_once():
        if is_first_rank:
            _say_first(config)
        from fastpeft.cli.console import ConsoleReporter
        from fastpeft.cli.result_tables import closing
        from fastpeft.trainer import StopRequest
        from fastpeft.trainer import train as train_run

    with ConsoleReporter() as reporter:
        stop = StopRequest()
        result = train_run(
            config,
            results_dir=results_dir,
            name=name,
            resume=resume,
            allow_stand_in=allow_stand_in,
            reporter=reporter,
            stop=stop,
        )
    if not is_first_rank:
        raise typer.Exit(_exit_code([result], stop))
    folder = RunFolder.at(results_dir, result.name)
    reporter.console.print(closing(result, folder))
    print(f"\nrun folder   {folder.path}")
    where = results_option(results_dir)
    if result.status == "stopped":
        print(f"resume with  fastpeft train --resume --name {result.name}{where}")
    else:
        _tell_next(result, where)
    _end([result], reporter, stop)


def _tell_next(result: Any, where: str) -> None:
    """Print commands that use a finished run."""
    from fastpeft.config.methods import METHODS
    from fastpeft.tasks import task_class

    print(f"look again   fastpeft runs show {result.name}{where}")
    print(f"watch        fastpeft tui{where.removeprefix(' --results-dir')}")
    print(f"compare      fastpeft evaluate{where}")
    if task_class(result.kind).predicts_tokens and not METHODS[result.method].routes:
        print(f"talk to it   fastpeft chat {result.name}{where}")
    print(f"carry away   fastpeft export {result.name}{where}")


def _train_seeds(
    config: Any, seeds: list[int], results_dir: Path, name: str | None, resume: bool, allow_stand_in: bool
) -> None:
    if config is None or (resume and name is None):
        raise UserError("--seeds needs --run, and with --resume also --name: which group is to be continued?")
    from fastpeft.runs.store import RunFolder, default_name

    group = name or default_name(config.run_id)
    with ctrl_c_ends_at_once():
        _say_first(config)
        from fastpeft.cli.console import ConsoleReporter
        from fastpeft.cli.result_tables import closing, group_table
        from fastpeft.trainer import StopRequest
        from fastpeft.trainer.seeds import train_seeds

    with ConsoleReporter() as reporter:
        stop = StopRequest()
        results = train_seeds(
            config,
            seeds,
            results_dir=results_dir,
            name=group,
            resume=resume,
            stop=stop,
            on_start=lambda seed, folder: reporter.say(f"\nseed {seed}: {results_dir / folder}"),
            allow_stand_in=allow_stand_in,
            reporter=reporter,
        )
    if len(results) == 1:
        reporter.console.print(closing(results[0], RunFolder.at(results_dir, results[0].name)))
    reporter.console.print(group_table(results))
    if stop():
        again = [a for a in sys.argv[1:] if a != "--resume"] + ["--resume"] + ([] if name else ["--name", group])
        print(f"resume with  {shlex.join(['fastpeft', *again])}")
    else:
        print(f"look again   fastpeft runs ls{results_option(results_dir)}")
    _end(results, reporter, stop)


def _end(results: list[Any], reporter: Any, stop: Any) -> None:
    """Print the last line, and exit with the code if it is not 0."""
    if results and results[-1].stand_in:
        reporter.say(f"STAND-IN: these are numbers of {results[-1].model} on {results[-1].dataset}")
    if code := _exit_code(results, stop):
        raise typer.Exit(code)


def _exit_code(results: list[Any], stop: Any) -> int:
    if any(result.status == "diverged" for result in results):
        return EXIT_DIVERGED
    if stop.signal is not None and (not results or results[-1].status == "stopped"):
        return 128 + stop.signal
    return 0


app.command()(sweep)


@app.command()
def transfer(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings over the file's, such as model.name=X."),
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="The UniHyperLoRA file, or the folder that it is in.")] = None,
    run: Annotated[str | None, typer.Option(help="The target: a preset's name, or the path of a YAML file.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps on the adapter's bias.")] = 500,
    lora_rate: Annotated[float, typer.Option(help="Learning rate of the LoRA run that it is compared with.")] = 5e-4,
    mode: Annotated[str, typer.Option(help="full, or trial: two steps through every code path.")] = "full",
    results_dir: ResultsDir = Path("results"),
    name: Annotated[str | None, typer.Option(help="Of the runs: NAME-delta, NAME-head, NAME-lora.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same as training.seed=N.")] = None,
    no_stand_in: Annotated[
        bool, typer.Option("--no-stand-in", help="Fail where model or data cannot be reached.")
    ] = False,
) -> None:
    """Score a UniHyperLoRA adapter on another host, as it is and after a few steps, beside no adapter and LoRA."""
    if adapter is None or run is None:
        raise UserError("transfer needs --adapter FILE and --run RUN: which adapter goes onto which host?")
    if steps < 1 or not lora_rate > 0:
        raise UserError(f"--steps {steps}, --lora-rate {lora_rate:g}: expected numbers over 0")
    config = load_config(run, overrides or [], None, seed, mode, False, 1)
    with ctrl_c_ends_at_once():
        _say_first(config)
        from fastpeft.cli.console import ConsoleReporter
        from fastpeft.cli.safe_console import SafeConsole
        from fastpeft.cli.transfer_console import transfer_table
        from fastpeft.trainer import StopRequest
        from fastpeft.trainer.transferring import transfer as move

    with ConsoleReporter() as reporter:
        stop = StopRequest()
        outcome = move(
            config, adapter, steps=2 if mode == "trial" else steps, lora_rate=lora_rate, results_dir=results_dir,
            name=name, allow_stand_in=not no_stand_in, reporter=reporter, stop=stop, say=reporter.say,
        )  # fmt: skip
    SafeConsole(highlight=False, width=None if sys.stdout.isatty() else 250).print(transfer_table(outcome))
    if outcome.stand_in:
        reporter.say(f"STAND-IN: these are numbers of {outcome.model} on {outcome.dataset}")
    if stop.signal is not None:
        raise typer.Exit(128 + stop.signal)


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's name, or its folder's path.")],
    merge: Annotated[bool, typer.Option("--merge", help="A whole model for transformers, not an adapter.")] = False,
    trim: Annotated[
        float | None,
        typer.Option(help="Keep this share of each update's energy, such as 0.99, at the smallest rank that has it."),
    ] = None,
    reader: Annotated[
        str, typer.Option("--for", help="Who is to read it: peft, vllm, sglang, llama.cpp or mlx.")
    ] = "peft",
    approximate: Annotated[
        int | None,
        typer.Option(help="UniHyperLoRA: the update under mean gates, as a LoRA of this rank.", show_default=False),
    ] = None,
    to: Annotated[Path | None, typer.Option(help="The folder to write; RUN/export when absent.")] = None,
    best: Best = None,
    results_dir: ResultsDir = Path("results"),
) -> None:
    """Write a run's weights as an adapter or a merged model, for the reader that is named, and check that they load."""
    from fastpeft.export.plan import make_plan

    weights = which_weights(best)
    plan = make_plan(
        run, results_dir=results_dir, to=to, merge=merge, trim=trim, weights=weights, reader=reader,
        approximate=approximate is not None,
    )  # fmt: skip
    with ctrl_c_ends_at_once():
        from fastpeft.export.summary import approximated, closing, opening
        from fastpeft.export.write import export as write

    with handled(signal.SIGTERM, lambda number, frame: sys.exit(128 + number)):  # partial output is removed
        for line in opening(plan):
            print(line)
        if approximate is not None:
            from fastpeft.export.approximate import approximate as write_lora

            for line in approximated(write_lora(plan, approximate, print)):
                print(line)
            return
        for line in closing(plan, write(plan, print)):
            print(line)


@app.command()
def doctor(
    results_dir: ResultsDir = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Measure which kernels are fastest on this GPU; keep it.")
    ] = False,
    model: Annotated[
        list[str] | None, typer.Option(help="--tune: a model's name, or shapes such as 768x3072; repeatable.")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="--tune: at most this long; call it again to go on.")] = 15.0,
) -> None:
    """Look at this machine: device, versions, kernels, energy meter, hub, disk; say what to do."""
    if tune:
        with ctrl_c_ends_at_once():
            from fastpeft.doctor.tuning import tune_gpu

        try:
            tune_gpu(model or [], minutes)
        except KeyboardInterrupt:
            print("interrupted; what was measured is kept", file=sys.stderr)
            raise typer.Exit(128 + signal.SIGINT) from None
        return
    from fastpeft.doctor import can_train, examine, to_json
    from fastpeft.doctor.table import print_report

    findings = examine(results_dir)
    if as_json:
        print(json.dumps(to_json(findings), indent=2))
    else:
        print_report(findings)
    if not can_train(findings):
        raise typer.Exit(EXIT_CANNOT_TRAIN)


@app.command()
def tui(
    results_dir: Annotated[Path, typer.Argument(help="Where the runs' folders are.")] = Path("results"),
) -> None:
    """Watch, compare and steer runs in the terminal."""
    from fastpeft.tui.show import show

    show(results_dir)
