"""The command line: one file a command; each parses, calls, prints, and computes nothing."""

from __future__ import annotations

import sys

from limbeck.errors import UserError


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
        return _complain(error.message, error.hint)
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
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return 2


def _other(error: Exception) -> int:
    """Typer's own complaints about usage, a full disk, or a mistake of ours."""
    import errno

    kinds = {base.__name__ for base in type(error).__mro__}
    if "Exit" in kinds:
        return int(getattr(error, "exit_code", 0))
    if "Abort" in kinds:
        print("interrupted", file=sys.stderr)
        return 130
    if "ClickException" in kinds:
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "limbeck"
        return _complain(" ".join(str(error.format_message()).split()), f"`{path} --help` explains the command")  # type: ignore[attr-defined]
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _complain(
            f"the disk is full: {error.filename or error.strerror}", "make room and run again with --resume; what was finished is kept"
        )
    if isinstance(error, PermissionError):
        return _complain(f"no permission for {error.filename}", "choose a folder that you may write to")
    return _our_fault(error)


def _our_fault(error: Exception) -> int:
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile("w", prefix="limbeck-", suffix=".traceback.txt", delete=False) as file:
        traceback.print_exception(error, file=file)
    print(f"error: something went wrong inside limbeck: {type(error).__name__}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
    print(f"hint: this is our fault; the traceback is in {file.name}", file=sys.stderr)
    return 1


def entry() -> None:
    """The console script."""
    sys.exit(main())
