"""`limbeck cache`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from limbeck.errors import visible


def cache(
    recipe: Annotated[str, typer.Argument(help="An embedded recipe's name (`limbeck recipes`) or a YAML file.")],
    out: Annotated[Path, typer.Option(help="The folder to write: a new or empty one, or one that this command began.")],
    set: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one value of the recipe. May be repeated.")
    ] = None,
    form: Annotated[
        str, typer.Option(help="float16 (half the bytes), float32 (every bit), or topk (the K largest logits and the mass of the rest).")
    ] = "float16",
    top_k: Annotated[int | None, typer.Option("--top-k", "--k", help="How many logits the form topk keeps.")] = None,
    signals: Annotated[
        str | None,
        typer.Option(
            help="What to store, with commas: logits, embedding, stages, or module paths. By default what the recipe's method reads."
        ),
    ] = None,
    shard_rows: Annotated[
        int | None, typer.Option(min=1, help="Rows a file; by default 1024 samples or 16384 tokens, and more for large sets.")
    ] = None,
    engine: Annotated[str, typer.Option(help="local (this process), or ray (many workers, also on many machines).")] = "local",
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --engine ray: how many; by default as many as there is room for.")
    ] = None,
    worker_cpus: Annotated[float | None, typer.Option(help="With --engine ray: processors for each worker.")] = None,
    worker_gpus: Annotated[float | None, typer.Option(help="With --engine ray: GPUs for each worker, also parts of one.")] = None,
    address: Annotated[
        str | None, typer.Option(help="With --engine ray: a running cluster, auto or HOST:PORT; without it one is started here.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress line.")] = False,
) -> None:
    """Store a teacher's outputs once, to train from them many times without running it.

    The teacher and the data are those of the recipe (a teacher that the recipe trains is trained once and kept). The size is told
    before anything is written. The store is bound to this teacher and this data by fingerprints: a run with others refuses it.
    Ctrl-C is safe: the same command goes on.

    Of a language model a row is a scored token, and the form topk is the one to take: 64 of a vocabulary of 32,000 are 260 bytes.

    Examples: limbeck cache digits --out stores/digits | limbeck cache lm --out stores/lm --form topk --top-k 64

    limbeck cache digits --out stores/digits --engine ray --workers 4   (docs/scale-ray.md)

    limbeck run digits --set teacher.store=stores/digits   (trains from what was stored)
    """
    from limbeck import processes
    from limbeck import recipe as schema
    from limbeck.errors import UserError, unknown
    from limbeck.scaling.sizing import Sizing

    processes.check_alone("cache", "start it without one; --engine ray has many workers")
    changes = list(set or [])
    checked = schema.load(recipe, changes)
    if form not in ("float16", "float32", "topk"):
        raise unknown("form", form, ("float16", "float32", "topk"))
    if (form == "topk") != (top_k is not None):
        raise UserError("--form topk and --top-k go together", "for example --form topk --top-k 8")

    sizing = Sizing(engine, workers, worker_cpus, worker_gpus, address)
    if engine == "local" and workers is not None:
        raise UserError("--workers is for --engine ray", "add --engine ray, or leave it away")
    if engine == "ray":
        from limbeck.scaling.cluster import ready

        ready(sizing)

    from limbeck.cli.progress import Progress
    from limbeck.engine.loop import Interrupted
    from limbeck.knowledge.caching import Written, store_teacher
    from limbeck.knowledge.surroundings import surroundings
    from limbeck.report.tables import human

    def say(planned: Written) -> None:
        what = f"{planned.samples} {planned.rows}, {planned.bytes_per_sample} bytes each ({planned.form}: {', '.join(planned.signals)})"
        typer.echo(f"to store: {what}, at most {human(planned.bytes, 'B')} in {planned.folder}", err=True)

    callbacks = [] if quiet else [Progress()]
    given = "".join(f" --set {shlex.quote(change)}" for change in changes)
    try:
        session = surroundings(checked, callbacks)
        names = [name.strip() for name in signals.split(",") if name.strip()] if signals is not None else None
        if names == []:
            raise UserError("--signals names nothing", "for example --signals logits,embedding")
        done = store_teacher(
            checked,
            out,
            session,
            form=form,  # type: ignore[arg-type]
            k=top_k,
            signals=names or (),
            shard_rows=shard_rows,
            sizing=sizing,
            callbacks=callbacks,
            announce=say,
            say=lambda line: typer.echo(visible(line), err=True),
        )
    except (Interrupted, KeyboardInterrupt):
        more = [*(["--shard-rows", str(shard_rows)] if shard_rows else []), *sizing.words()]
        options = f" --form {form}" + (f" --top-k {top_k}" if top_k else "") + (f" --signals {shlex.quote(signals)}" if signals else "")
        options += "".join(f" {shlex.quote(word)}" for word in more)
        typer.echo("interrupted; what was finished is kept", err=True)
        typer.echo(f"go on with: limbeck cache {shlex.quote(recipe)}{given} --out {shlex.quote(str(out))}{options}", err=True)
        raise typer.Exit(130) from None
    finally:
        for callback in callbacks:
            callback.close()
    mark = "already complete: " if done.found else ""
    size = f"{done.samples} {done.rows}, {done.bytes_per_sample} bytes a {done.rows[:-1]}"
    print(visible(f"{mark}{size}, {human(done.bytes, 'B')} in {done.folder}"))
    print(visible(f"train from it: limbeck run {shlex.quote(recipe)}{given} --set teacher.store={shlex.quote(str(done.folder))}"))
