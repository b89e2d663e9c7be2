"""The command line: one file a command; each parses, calls, prints, and computes nothing."""

from __future__ import annotations

import sys

from limbeck.errors import Fault, UserError, conceal, of_system, printable
from limbeck.processes import Told, asked, number


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0: done. 1: our fault, with the path of a saved traceback. 2: the user can mend it (`error:` and `hint:` lines).
    130: interrupted, after the state was saved.
    """
    from limbeck.cli.app import app

    try:
        code = app(args=arguments, standalone_mode=False)
    except SystemExit as error:
        return int(error.code or 0)
    except UserError as error:
        return 2 if isinstance(error, Told) else _complain(error.message, error.hint)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away (`| head`); that is no fault of anybody's
        return 0
    except Exception as error:
        return _other(error)
    return code if isinstance(code, int) else 0  # a command that raised typer.Exit gives its code back


def _complain(message: str, hint: str) -> int:
    who = f"process {number()}: " if number() else ""
    print(f"error: {who}{message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return 2


def _other(error: Exception) -> int:
    """Typer's own complaints about usage, a full disk, or a mistake of ours."""
    kinds = {base.__name__ for base in type(error).__mro__}
    if "Exit" in kinds:
        return int(getattr(error, "exit_code", 0))
    if "Abort" in kinds:
        print("interrupted", file=sys.stderr)
        return 130
    if "ClickException" in kinds:
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "limbeck"
        return _complain(printable(error.format_message()), f"`{path} --help` explains the command")  # type: ignore[attr-defined]
    if (known := of_system(error)) is not None:
        return _complain(known.message, known.hint)
    lost = ("closed by peer", "reset by peer", "Broken pipe")
    if asked() > 1 and isinstance(error, RuntimeError) and any(word in str(error) for word in lost):
        print(f"error: process {number()} stops, because another process stopped; see what that one said", file=sys.stderr)
        return 1
    return _our_fault(error)


def _our_fault(error: Exception) -> int:
    import tempfile
    import traceback

    if isinstance(error, Fault):
        print(f"error: something went wrong inside limbeck: {error}", file=sys.stderr)
        print(f"hint: this is our fault; the traceback is in {error.trace}", file=sys.stderr)
        return 1
    with tempfile.NamedTemporaryFile("w", prefix="limbeck-", suffix=".traceback.txt", delete=False) as file:
        file.write(conceal("".join(traceback.format_exception(error))))
    said = printable(conceal(str(error)))[:300]
    print(f"error: something went wrong inside limbeck: {type(error).__name__}: {said}", file=sys.stderr)
    print(f"hint: this is our fault; the traceback is in {file.name}", file=sys.stderr)
    return 1


def entry() -> None:
    """The console script."""
    sys.exit(main())
