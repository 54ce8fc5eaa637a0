"""The command line: simlm run | plan | init | <stage> | search | serve | evaluate | report | compare-objectives."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from simlm.errors import SimlmError

app = typer.Typer(
    name="simlm",
    help="Train, measure and search the best single-vector retriever for your own corpus (SimLM, arXiv 2207.02578).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a .toml file.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one setting; may be repeated.")]
StepOption = Annotated[list[str] | None, typer.Option("--step", help="Only this step of the stage; may be repeated.")]
StartOverOption = Annotated[
    list[str] | None,
    typer.Option("--start-over", metavar="STEP", help="Delete the interrupted work of this step first; may be repeated."),
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run (runs/NAME).")]


def main() -> None:
    """Entry point: allocator first, then the command; a SimlmError is one message and exit code 2."""
    from simlm.runtime import leave_processes, tune_allocator

    tune_allocator()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    # They print tracebacks of what they then raise, or do without.
    for name in ("pymilvus", "grpc._server"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        app()
    except SystemExit as done:
        if not done.code:
            leave_processes()
        raise
    except SimlmError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.secho("stopped; the same command goes on where it was", fg="yellow", err=True)
        sys.exit(130)


def _refuse(context: typer.Context, names: str, why: str) -> None:
    """SimlmError for the first of these options that was given; names: of parameters, separated by blanks."""
    for parameter in context.command.params:
        if parameter.name in names.split() and _is_given(context, parameter.name):
            raise SimlmError(f"{parameter.opts[0]} {why}; leave it out")


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option stands in the command."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _version(value: bool) -> None:
    if value:
        from simlm import __version__

        typer.echo(f"simlm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


@app.command()
def run(recipe: RecipeArgument, changes: SetOption = None, start_over: StartOverOption = None) -> None:
    """Do everything a recipe says; finished steps are skipped, interrupted ones go on."""
    from simlm.pipeline import run_recipe

    folder = run_recipe(recipe, overrides=changes, start_over=start_over)
    if int(os.environ.get("RANK", "0")) == 0:
        _print_report(folder)
        _print_next(folder)


@app.command()
def plan(recipe: RecipeArgument, changes: SetOption = None) -> None:
    """Show every step with its inputs, state and an estimate of time, memory and disk."""
    from rich.console import Console
    from rich.table import Table

    from simlm.artifacts import read_manifest
    from simlm.estimates import estimate_step
    from simlm.pipeline import make_plan
    from simlm.recipe import load_recipe

    the_plan = make_plan(load_recipe(recipe, changes))
    table = Table(title=f"{the_plan.recipe.name} -> {the_plan.folder}", title_justify="left")
    console = Console(width=None if sys.stdout.isatty() else 140)
    wide = console.width >= 120
    for column in ("step", "stage", "reads", "state") if wide else ("step", "stage", "state"):
        table.add_column(column, overflow="fold", no_wrap=column in ("step", "stage"))
    for column in ("time", "memory", "disk"):
        table.add_column(column, justify="right", no_wrap=True)
    seconds_left = peak = disk_left = 0.0
    for step in the_plan.steps:
        state, why = the_plan.state(step)
        if state == "done":
            manifest = read_manifest(the_plan.path(step.name))
            disk = sum(entry["bytes"] for entry in manifest.files.values())
            figures = (_seconds(manifest.seconds), _bytes(manifest.peak_memory_bytes), _bytes(disk))
        else:
            estimate = estimate_step(the_plan, step)
            seconds_left += estimate.seconds
            disk_left += estimate.disk_bytes
            peak = max(peak, estimate.memory_bytes)
            figures = (f"~{_seconds(estimate.seconds)}", f"~{_bytes(estimate.memory_bytes)}", f"~{_bytes(estimate.disk_bytes)}")
        reads = ", ".join(step.inputs.values()) if len(step.inputs) <= 4 else f"{len(step.inputs)} artifacts"
        colour = {"done": "green", "stale": "yellow", "to do": ""}[state]
        shown = f"[{colour}]{state}[/]" if colour else state
        table.add_row(step.name, step.stage, *([reads] if wide else []), shown + (f" ({why})" if why else ""), *figures)
    console.print(table)
    for note in the_plan.notes:
        console.print(f"note: {note}")
    console.print(
        f"left: about {_seconds(seconds_left)}, {_bytes(peak)} of memory, {_bytes(disk_left)} of disk "
        "(~ marks estimates, good to a factor of two)"
    )


@app.command("compare-objectives")
def compare_objectives(
    recipe: RecipeArgument,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help="Only this row, or this table, of the grid; may be repeated.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show the grid and what is left of it; do nothing.")] = False,
    changes: SetOption = None,
) -> None:
    """Compare pre-trainings on your corpus: objectives, replace rates, generators, corpora, over seeds."""
    from simlm import compare
    from simlm.recipe import load_recipe

    loaded = load_recipe(recipe, changes)
    if plan:
        _print_grid(compare.make_grid(loaded), only)
        return
    folder = compare.compare_objectives(loaded, only=only)
    if int(os.environ.get("RANK", "0")) == 0:
        results = compare.read_results(folder)
        _print_comparison(results, folder)
        if results["cells"]["failed"]:
            raise typer.Exit(1)


@app.command()
def init(
    source: Annotated[Path, typer.Argument(metavar="FOLDER", help="BEIR folder, MS MARCO TSV, JSONL, CSV, Parquet, or texts.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Recipe to write; default NAME.toml.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over an existing recipe.")] = False,
) -> None:
    """Look at your data and at this machine, and write a commented recipe."""
    from simlm.scaffold import write_recipe

    path, summary = write_recipe(source, output, force=force)
    typer.echo(summary)
    typer.echo(f"\nwrote {path}. Next:\n  simlm plan {path}\n  simlm run {path}")


@app.command()
def search(
    context: typer.Context,
    run_or_recipe: Annotated[
        Path, typer.Argument(metavar="RUN|RECIPE", help="The folder of a run, to ask it a query; or a recipe, to do its search steps.")
    ],
    query: Annotated[str | None, typer.Argument(metavar="QUERY")] = None,
    depth: Annotated[int, typer.Option("--depth", "-k", min=1, help="Passages shown.")] = 10,
    bm25: Annotated[bool, typer.Option("--bm25", help="BM25 alone.")] = False,
    hybrid: Annotated[bool, typer.Option("--hybrid", help="Dense and BM25, fused as the recipe says.")] = False,
    rerank: Annotated[bool, typer.Option("--rerank", help="Re-rank the top passages with the cross-encoder.")] = False,
    retriever: Annotated[
        str | None, typer.Option("--retriever", help="Which trained retriever: distilled, retriever2, retriever1, start.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    step: StepOption = None,
    changes: SetOption = None,
) -> None:
    """Search the corpus of a run; or, given a recipe, do its `search` steps."""
    if run_or_recipe.suffix == ".toml":
        if query is not None:
            raise SimlmError(f"{run_or_recipe}: a recipe does its search steps and takes no query; to ask one, give the folder of the run")
        _refuse(context, "depth bm25 hybrid rerank retriever as_json", "is about a query to a finished run, and this is a recipe")
        _stage_command("search", run_or_recipe, changes, step)
        return
    _refuse(context, "step changes", f"is about a recipe, and {run_or_recipe} is a run")
    if query is None:
        raise SimlmError(f'no query given; ask one: simlm search {run_or_recipe} "how are vectors normalised"')
    if bm25 and hybrid:
        raise SimlmError("--bm25 and --hybrid exclude each other; leave both out for dense search")
    from simlm.searcher import Mode, open_run

    if bm25 and retriever:
        raise SimlmError("--retriever chooses a dense retriever, --bm25 uses none; leave one of them out")
    mode: Mode = "bm25" if bm25 else "hybrid" if hybrid else "dense"
    results = open_run(run_or_recipe, retriever=retriever, mode=mode, rerank=rerank).search(query, depth=depth)
    if as_json:
        import json
        from dataclasses import asdict

        for result in results:
            typer.echo(json.dumps(asdict(result), ensure_ascii=False))
        return
    _print_results(query, results)


@app.command()
def serve(
    context: typer.Context,
    folder: RunArgument,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; the default is for this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 = any free one.")] = 8080,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help="File with the bearer token to ask for; else $SIMLM_TOKEN, else none.")
    ] = None,
    block_list: Annotated[
        Path | None, typer.Option("--block-list", help="File of passage ids and rules whose passages are never shown.")
    ] = None,
    mcp: Annotated[bool, typer.Option("--mcp", help="Tools for agents on standard input and output, in place of HTTP.")] = False,
    mcp_http: Annotated[bool, typer.Option("--mcp-http", help="Tools for agents at /mcp too.")] = False,
    retriever: Annotated[str | None, typer.Option("--retriever", help="Which trained retriever; the best one if left out.")] = None,
    precision: Annotated[
        str | None,
        typer.Option("--precision", help="Of the model that encodes queries: fp32, fp16, bf16, int8; fp16 on x86 processors if left out."),
    ] = None,
    max_waiting: Annotated[int, typer.Option("--max-waiting", min=1, help="Requests that may wait; more are refused with 429.")] = 64,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, max=86_400, help="Seconds from a request to 504.")] = 30.0,
    log_level: Annotated[str, typer.Option("--log-level", help="debug, info, warning or error.")] = "info",
    log_queries: Annotated[bool, typer.Option("--log-queries", help="Write what people search for into the log.")] = False,
) -> None:
    """Answer searches of a run over HTTP, with a page, or as tools for agents (--mcp)."""
    from simlm.models.precision import checked_precision
    from simlm.serve.launch import EngineSettings, ServeOptions, serve_http, serve_tools

    if log_level not in ("debug", "info", "warning", "error"):
        raise SimlmError(f"--log-level {log_level!r}: debug, info, warning or error was expected")
    settings = EngineSettings(
        retriever=retriever,
        block_list=block_list,
        max_waiting=max_waiting,
        timeout_seconds=timeout,
        precision=None if precision is None else checked_precision(precision, "--precision"),
    )
    if mcp:
        if mcp_http:
            raise SimlmError("--mcp is standard input and output alone; for tools beside HTTP give --mcp-http without it")
        _refuse(context, "host port token_file log_queries", "is about HTTP, and --mcp answers on standard input and output")
        serve_tools(folder, settings, log_level=log_level if _is_given(context, "log_level") else "warning")
        return
    options = ServeOptions(host, port, token_file, mcp_http, log_level, log_queries, settings)
    serve_http(folder, options, announce=lambda line: typer.echo(line, err=True))


@app.command()
def evaluate(
    context: typer.Context,
    run_or_recipe: Annotated[Path, typer.Argument(metavar="RECIPE|RUN.TREC", help="A recipe, or a TREC run file.")],
    qrels: Annotated[Path | None, typer.Argument(metavar="QRELS", help="Judgements (TREC or BEIR TSV), with a run file.")] = None,
    measures: Annotated[
        str, typer.Option("--measures", "-m", help="As ir_measures writes them, separated by spaces.")
    ] = "RR@10 nDCG@10 R@50 R@100 R@1000",
    changes: SetOption = None,
) -> None:
    """Measure a TREC run file against judgements; or, given a recipe, do its report."""
    if run_or_recipe.suffix == ".toml":
        _refuse(context, "qrels measures", "goes with a run file; a recipe has its own data and [evaluate]")
        _stage_command("evaluate", run_or_recipe, changes, None)
        return
    _refuse(context, "changes", f"is about a recipe, and {run_or_recipe} is a run file")
    if qrels is None:
        raise SimlmError(f"{run_or_recipe}: judgements are needed too: simlm evaluate RUN.TREC QRELS")
    from simlm.evaluation.measures import evaluate_run

    for name, value in evaluate_run(run_or_recipe, qrels, measures.split()).items():
        typer.echo(f"{name}\t{value:.4f}")


@app.command()
def report(folder: RunArgument) -> None:
    """Print the result table of a finished run again."""
    _print_report(folder)


@app.command()
def encode(
    context: typer.Context,
    recipe_or_corpus: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|CORPUS",
            help="A recipe, to do its encode steps; or Parquet or JSONL: a file, a folder, or s3://, gs://, hdfs://.",
        ),
    ],
    model: Annotated[
        str | None, typer.Option("--model", metavar="RUN|MODEL", help="Of a corpus: the run, model folder or hub id that encodes it.")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", metavar="FOLDER", help="Of a corpus: where the vectors go.")] = None,
    engine: Annotated[str, typer.Option("--engine", help="Of a corpus: local, or ray (Ray Data, on many machines).")] = "local",
    retriever: Annotated[str | None, typer.Option("--retriever", help="Which retriever of the run.")] = None,
    precision: Annotated[str, typer.Option("--precision", help="auto, fp32, fp16, bf16, int8 or fast.")] = "auto",
    storage: Annotated[str, typer.Option("--storage", help="fp32 or fp16: of the vectors in the files.")] = "fp32",
    shard_passages: Annotated[int, typer.Option("--shard-passages", min=1, help="About how many passages a file has.")] = 50_000,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave bad records out instead of stopping.")] = False,
    address: Annotated[
        str | None, typer.Option("--address", help="Of a running Ray cluster; default RAY_ADDRESS, else this machine alone.")
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Ray workers; default as many as fit.")] = None,
    cpus: Annotated[float, typer.Option("--cpus", min=0.1, help="CPUs of a Ray worker.")] = 1,
    gpus: Annotated[float, typer.Option("--gpus", min=0, help="GPUs of a Ray worker.")] = 0,
    step: StepOption = None,
    changes: SetOption = None,
    start_over: StartOverOption = None,
) -> None:
    """Encode the corpus with each model of a recipe (and what that needs); or any corpus with one model, on one machine or many."""
    if recipe_or_corpus.endswith(".toml"):
        of_corpus = "model output engine retriever precision storage shard_passages skip_bad address workers cpus gpus"
        _refuse(context, of_corpus, "goes with a corpus; a recipe says itself what is encoded, and how")
        _stage_command("encode", Path(recipe_or_corpus), changes, step, start_over)
        return
    _refuse(context, "step changes start_over", f"is about a recipe, and {recipe_or_corpus} is a corpus")
    if engine == "local":
        _refuse(context, "address workers cpus gpus", "is for --engine ray")
    if model is None or output is None:
        raise SimlmError(f"{recipe_or_corpus}: to encode a corpus, say with what and where to: --model RUN --output FOLDER")
    if storage not in ("fp32", "fp16"):
        raise SimlmError(f"--storage: found {storage!r}; fp32 or fp16 was expected")
    from simlm.corpus_encoding import encode_corpus, make_job

    job = make_job(
        model,
        output,
        retriever=retriever,
        precision=precision,
        dtype="float16" if storage == "fp16" else "float32",
        on_bad_record="skip" if skip_bad else "error",
    )
    settings: dict[str, Any] = {"address": address, "workers": workers, "cpus": cpus, "gpus": gpus} if engine == "ray" else {}
    info = encode_corpus(recipe_or_corpus, job, engine=engine, shard_passages=shard_passages, **settings)
    typer.echo(f"{output}: {info['count']:,} vectors of {info['dim']} numbers in {len(info['parts']):,} files")


@app.command()
def export(
    run: RunArgument,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="New folder for the export.")],
    to: Annotated[
        list[str],
        typer.Option("--to", metavar="TARGET", help="sentence-transformers, onnx, faiss, parquet or trec; may be repeated."),
    ],
    retriever: Annotated[
        str | None, typer.Option("--retriever", help="Which trained retriever; default the last that the run made.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
) -> None:
    """Write what a run has made as files that other tools read: models, vectors, rankings."""
    from simlm.export import export_run

    info = export_run(run, folder, to, retriever=retriever, overwrite=overwrite)
    for target, facts in info["targets"].items():
        typer.echo(f"{folder / target}: {_bytes(facts['bytes_total'])}")


@app.command("negative-report")
def negative_report(
    run_or_recipe: Annotated[Path, typer.Argument(metavar="RUN|RECIPE", help="The folder of a run, or its recipe.")],
    step: Annotated[list[str] | None, typer.Option("--step", help="Only these groups, such as bm25_groups; may be repeated.")] = None,
) -> None:
    """Say what a run's mined negatives are like: how hard, which may be relevant, which come again; as a table, JSON and a page."""
    from rich.console import Console

    from simlm.evaluation.report.negatives import conclusions, terminal_tables
    from simlm.negative_report import negative_reports

    console = Console(width=None if sys.stdout.isatty() else 140)
    for found in negative_reports(run_or_recipe, step):
        console.print(f"\n{found.content['name']}", style="bold", markup=False)
        for table in terminal_tables(found.content):
            console.print(table)
        for verdict in conclusions(found.content):
            console.print(verdict)
        console.print(f"page: {found.path}.html  (also .json)", markup=False, soft_wrap=True)


@app.command("teacher-scores")
def teacher_scores(
    folder: RunArgument,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a teacher and line.")] = False,
) -> None:
    """Show what the cross-encoders of a run have scored: pairs, bytes, and how the raw logits are spread."""
    from simlm.artifacts import read_manifest
    from simlm.data.teacher_scores import teachers_of

    if not folder.is_dir():
        raise SimlmError(f"{folder}: no such folder; give runs/NAME, made by `simlm run`")
    store = read_manifest(folder / "store", "store").fingerprint if (folder / "store").is_dir() else None
    shares = [0.0, 0.05, 0.5, 0.95, 1.0]
    found = [
        {
            "teacher": scores.teacher.name,
            "key": scores.folder.name,
            "of_this_store": scores.teacher.store == store,
            "precision": scores.teacher.precision,
            "max_pair_tokens": scores.teacher.max_pair_tokens,
            "own_tokenizer": bool(scores.teacher.tokenizer),
            "queries": scores.num_queries(),
            "pairs": len(scores),
            "bytes": scores.num_bytes,
            "segments": scores.num_segments,
            "damaged": scores.dropped,
            "quantiles": dict(zip(("least", "5%", "median", "95%", "most"), scores.quantiles(shares), strict=False)),
        }
        for scores in teachers_of(folder / "pair_scores")
    ]
    if as_json:
        import json

        for row in found:
            typer.echo(json.dumps(row, ensure_ascii=False))
        return
    _print_teachers(folder, found)


@app.command("build-index")
def build_index(
    context: typer.Context,
    run_or_recipe: Annotated[
        Path, typer.Argument(metavar="RUN|RECIPE", help="A run, to choose an index for a budget; or a recipe, to do its steps.")
    ],
    budget: Annotated[str | None, typer.Option("--budget", metavar="SIZE", help="Memory the index may take: 800MB, 1GB, 1GiB.")] = None,
    min_quality: Annotated[
        float, typer.Option("--min-quality", metavar="SHARE", help="Of exact search's RR@10 and R@100 on the dev queries.")
    ] = 0.99,
    retriever: Annotated[str | None, typer.Option("--retriever", help="Whose passages; default: the one that searches use.")] = None,
    step: StepOption = None,
    changes: SetOption = None,
    start_over: StartOverOption = None,
) -> None:
    """Build the indexes of a recipe; or, given a run and a budget, measure many and keep the smallest that is good."""
    if run_or_recipe.suffix == ".toml":
        if budget is not None:
            raise SimlmError(f"{run_or_recipe}: a budget is for a finished run; do the recipe first, then give the folder of its run")
        _refuse(context, "min_quality retriever", "goes with --budget and a finished run")
        _stage_command("build_index", run_or_recipe, changes, step, start_over)
        return
    _refuse(context, "step changes start_over", f"is about a recipe, and {run_or_recipe} is a run")
    if budget is None:
        raise SimlmError(f"{run_or_recipe}: say how much memory the index may take: simlm build-index {run_or_recipe} --budget 1GB")
    from rich.console import Console

    from simlm.evaluation.report.index_choice import conclusion, terminal_table
    from simlm.index_choice import choose_index, parse_bytes
    from simlm.progress import Progress

    choice = choose_index(run_or_recipe, budget=parse_bytes(budget), min_quality=min_quality, retriever=retriever, progress=Progress())
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(terminal_table(choice.content))
    console.print(f"table and plot: {choice.report}/choice.md", markup=False, soft_wrap=True)
    if choice.folder is None:
        raise SimlmError(conclusion(choice.content))
    console.print(conclusion(choice.content), markup=False, soft_wrap=True)
    console.print(f"searches of this run use it now; delete {choice.folder} to go back", markup=False, soft_wrap=True)


@app.command("add-passages")
def add_passages(
    folder: RunArgument,
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="JSONL, CSV or Parquet; without it earlier additions are encoded anew if needed.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Passages whose ids are there already take the place of those.")] = False,
    retriever: Annotated[str | None, typer.Option("--retriever", help="Whose index they join; default: the one that searches use.")] = None,
) -> None:
    """Add passages to what a finished run finds, without training; only they are encoded."""
    from simlm import additions
    from simlm.progress import Progress

    if file is None:
        if replace:
            raise SimlmError("--replace is for passages of a file; give one, or leave it out")
        _print_change(additions.refresh(folder, retriever=retriever, progress=Progress()))
        return
    _print_change(additions.add_passages(folder, file, retriever=retriever, replace=replace, progress=Progress()))


@app.command("delete-passages")
def delete_passages(
    folder: RunArgument,
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID", help="Ids of passages.")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="A file with an id in each line.")] = None,
) -> None:
    """Let passages of a finished run be found no more."""
    from simlm import additions

    wanted = list(ids or [])
    if file is not None:
        try:
            wanted += [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line]
        except (OSError, UnicodeDecodeError) as error:
            raise SimlmError(f"{file}: not readable as a list of ids ({error}); give a UTF-8 file with an id in each line") from None
    if not wanted:
        raise SimlmError(f"no ids given; name some: simlm delete-passages {folder} ID ..., or --file FILE")
    _print_change(additions.delete_passages(folder, wanted))


def _print_change(change: Any) -> None:
    done = f"added {change.added:,} passages, deleted {change.deleted:,}; {change.encoded:,} were encoded"
    typer.echo(f"{done}; {change.total:,} can be found now")


def _stage_command(
    stage: str, recipe: Path, changes: list[str] | None, names: list[str] | None, start_over: list[str] | None = None
) -> None:
    """Do the steps of one stage (or those named) and whatever they need that is not done yet."""
    from simlm.pipeline import make_plan, run_recipe
    from simlm.recipe import load_recipe
    from simlm.runtime import join_processes

    ranks = join_processes()
    loaded = load_recipe(recipe, changes)
    the_plan = ranks.from_first(lambda: make_plan(loaded))
    steps = [step.name for step in the_plan.steps if step.stage == stage]
    for name in names or []:
        if the_plan.step(name).stage != stage:
            raise SimlmError(
                f"step {name!r} is a {the_plan.step(name).stage} step, not {stage}; "
                f"this recipe's {stage} steps: {', '.join(steps) or 'none'}"
            )
    if not steps:
        raise SimlmError(f"{recipe}: has no {stage} step; `simlm plan {recipe}` shows the steps it has")
    folder = run_recipe(loaded, only=names or steps, start_over=start_over)
    if stage == "evaluate" and ranks.rank == 0:
        _print_report(folder)


def _add_stage(stage: str, description: str) -> None:
    def command(recipe: RecipeArgument, step: StepOption = None, changes: SetOption = None, start_over: StartOverOption = None) -> None:
        _stage_command(stage, recipe, changes, step, start_over)

    command.__doc__ = f"{description} (and what that needs, if it is not done yet)."
    app.command(stage.replace("_", "-"))(command)


for _stage, _description in {
    "prepare": "Tokenise corpus and queries into the store",
    "make_queries": "Make queries from the passages, where there are no labels",
    "filter_queries": "Keep the made queries that find their passage",
    "train_generator": "Train or take over the generator for replaced LM",
    "pretrain": "Pre-train the encoder with the representation bottleneck",
    "train_retriever": "Train the retrievers on hard negatives",
    "fuse": "Fuse dense and BM25 runs",
    "mine_negatives": "Mine hard negatives",
    "select_run": "Choose the run to re-rank on the dev queries",
    "train_reranker": "Train the cross-encoder",
    "rerank": "Re-rank runs, and score training groups for distillation",
    "score_groups": "Score training groups with BM25 and a dense retriever together",
    "check_teacher": "Compare the teacher with the retriever that it is to teach",
    "distill": "Distil the teachers into a retriever",
}.items():
    _add_stage(_stage, _description)


def _print_report(folder: Path) -> None:
    import json

    from rich.console import Console

    from simlm.artifacts import open_artifact

    path = folder / "report"
    open_artifact(path, "report", verify="sizes")
    from simlm.evaluation.report import terminal_table, verdicts

    metrics: dict[str, Any] = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(terminal_table(metrics))
    for verdict in verdicts(metrics):
        console.print(verdict)
    console.print(f"report: {path / 'report.html'}  (also report.md, metrics.json)")


def _print_teachers(folder: Path, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(f"{folder / 'pair_scores'}: raw logits by teacher"), title_justify="left")
    for column in ("teacher", "key", "precision", "tokens", "queries"):
        table.add_column(column, overflow="fold")
    for column in ("pairs", "size", "least", "5%", "median", "95%", "most"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        queries = ", ".join(f"{split} {count:,}" for split, count in row["queries"].items()) or "none"
        spread = [f"{value:.2f}" for value in row["quantiles"].values()] or [""] * 5
        name = escape(row["teacher"]) + ("" if row["of_this_store"] else " (of another store)")
        tokens = str(row["max_pair_tokens"]) + (", own" if row["own_tokenizer"] else "")
        table.add_row(name, row["key"][:8], row["precision"], tokens, queries, f"{row['pairs']:,}", _bytes(row["bytes"]), *spread)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for row in rows:
        for damaged in row["damaged"]:
            console.print(f"damaged, its pairs will be scored again: {row['key']}/{damaged}", markup=False)
    if not all(row["of_this_store"] for row in rows):
        console.print("Scores of another store are not used by this run's steps; their folders may be deleted.")


def _print_grid(grid: Any, only: list[str] | None) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(f"{grid.recipe.name} -> {grid.folder}"), title_justify="left")
    for column in ("row", "table", "state"):
        table.add_column(column, overflow="fold")
    for column in ("seed", "training steps", "pipeline steps left"):
        table.add_column(column, justify="right")
    cells = grid.wanted(only)
    left = 0
    for cell in cells:
        state, why = grid.state(cell)
        steps = grid.training_steps(cell)
        left += state != "done"
        shown = escape(state + (f": {why}" if why else ""))
        table.add_row(escape(cell.row.name), cell.row.table, shown, str(cell.seed), steps, grid.steps_left(cell))
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for note in grid.notes:
        console.print(f"note: {note}", markup=False)
    console.print(f"{left} of {len(cells)} trainings are to be done, each pre-training and retriever 1; equal ones are shared")


def _print_comparison(results: dict[str, Any], folder: Path) -> None:
    from rich.console import Console

    from simlm.evaluation.report import comparison

    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in comparison.terminal_tables(results):
        console.print(table)
    for verdict in comparison.conclusions(results):
        console.print(verdict)
    for table in results["tables"]:
        for row in table["rows"]:
            for seed, error in row["errors"].items():
                console.print(f"{row['name']}, seed {seed}: {error}", style="red", markup=False)
    console.print(comparison.caption(results), markup=False, highlight=False)
    console.print(f"comparison: {folder / 'comparison.html'}  (also comparison.md, comparison.json)", markup=False, soft_wrap=True)


def _print_next(folder: Path) -> None:
    from rich.console import Console

    from simlm.searcher import example_query

    query = example_query(folder)
    console = Console(width=None if sys.stdout.isatty() else 140)
    asked = f"simlm search {shlex.quote(str(folder))} {shlex.quote(query)}"
    console.print("\nNext:", highlight=False)
    for flag in ("", " --hybrid", " --rerank"):
        console.print(f"  {asked}{flag}", highlight=False, markup=False, soft_wrap=True)
    served = f"  simlm serve {shlex.quote(str(folder))}        # a page to search on, and an API"
    console.print(served, highlight=False, markup=False, soft_wrap=True)
    console.print("  simlm init YOUR_DATA_FOLDER        # a recipe for your own corpus", highlight=False, markup=False, soft_wrap=True)


def _print_results(query: str, results: list[Any]) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 140)
    if not results:
        console.print(f"no passage found for {query!r}", markup=False)
    for result in results:
        line = Text(f"{result.rank:>3}  {result.score:8.4f}  ")
        line.append(result.title or result.passage_id, style="bold")
        if result.title and result.title != result.passage_id:
            line.append(f"  [{result.passage_id}]", style="dim")
        console.print(line)
        text = " ".join(result.text.split())
        console.print(Padding(Text(f"{text[:240]}{'...' if len(text) > 240 else ''}", style="dim"), (0, 0, 0, 15)))


def _seconds(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} d"


def _bytes(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"
