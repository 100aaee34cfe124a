"""A script or module as `__main__`, under the hook, as the interpreter itself would run it.

Not `runpy`: it puts the old `__main__` back when the code ends, while threads and exit handlers of the program may go
on, and it stands in every traceback.
"""

from __future__ import annotations

import builtins
import io
import os
import sys
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import find_spec
from types import CodeType, ModuleType, TracebackType
from typing import Any, Final, NoReturn

from shoal.compat import settings
from shoal.compat.hook import install

USAGE: Final = "usage: shoal run [-m MODULE | SCRIPT] [ARGUMENT ...]"
PRELOAD: Final = "shoal.compat.preload"


def main(arguments: list[str]) -> None:
    """Run what the command line says; returns when it has ended, or raises SystemExit with its exit code.

    Args:
        arguments: what stands after `shoal run`.
    """
    settings.adopt(os.environ)
    others = [name for name in os.environ.get("SHOAL_PRELOAD", "").split(",") if name and name != PRELOAD]
    os.environ["SHOAL_PRELOAD"] = ",".join([PRELOAD, *others])
    install()
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"{USAGE}\n\nRun a program that says `import ray` on shoal, unchanged.")
        return
    if arguments[:1] == ["-m"]:
        if len(arguments) < 2:
            _refuse("-m needs the name of a module")
        sys.argv = ["-m", *arguments[2:]]
        _put_first(os.getcwd())
        spec, code = _find_module(arguments[1])
        sys.argv[0] = spec.origin or arguments[1]
        _execute(
            code, {"__file__": spec.origin, "__loader__": spec.loader, "__spec__": spec, "__package__": spec.parent}
        )
    elif arguments and not arguments[0].startswith("-"):
        script = arguments[0]
        sys.argv = list(arguments)
        _put_first(os.path.dirname(os.path.realpath(script)))
        code = _read_script(script)
        loader = SourceFileLoader("__main__", script)
        _execute(code, {"__file__": script, "__loader__": loader, "__spec__": None, "__package__": None})
    else:
        _refuse("give a script" if not arguments else f"there is no option {arguments[0]}")


def _put_first(folder: str) -> None:
    """In the place where `python -m shoal.compat` has put the working directory."""
    if not sys.flags.safe_path:
        sys.path[0] = folder


def _read_script(path: str) -> CodeType:
    try:
        with io.open_code(os.path.abspath(path)) as file:
            source = file.read()
    except OSError as exc:
        _refuse(f"cannot read {path}: {exc.strerror or exc}")
    try:
        return compile(source, path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as exc:  # bad syntax, or a file that is no text
        _show_and_exit(exc, None)


def _find_module(name: str) -> tuple[ModuleSpec, CodeType]:
    try:
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = find_spec(f"{name}.__main__")
        code: CodeType | None = spec.loader.get_code(spec.name) if spec is not None and spec.loader else None  # type: ignore[attr-defined]
    except ImportError as exc:
        _refuse(f"cannot import {name}: {exc}")
    if spec is None or code is None:
        _refuse(f"there is no module {name} that can be run")
    return spec, code


def _execute(code: CodeType, attributes: dict[str, Any]) -> None:
    main_module = ModuleType("__main__")
    main_module.__dict__.update(attributes, __builtins__=builtins, __cached__=None)
    main_module.__dict__.pop("__doc__")  # the code sets it
    sys.modules["__main__"] = main_module
    try:
        exec(code, main_module.__dict__)  # noqa: S102
    except SystemExit:
        raise
    except BaseException as exc:  # noqa: BLE001 - the boundary to the program: shown as the interpreter shows it
        trace = exc.__traceback__
        _show_and_exit(exc, trace.tb_next if trace is not None else None)


def _show_and_exit(exc: BaseException, trace: TracebackType | None) -> NoReturn:
    """As the interpreter ends for what nobody caught, without the frames of this package."""
    sys.excepthook(type(exc), exc.with_traceback(trace), trace)
    raise SystemExit(130 if isinstance(exc, KeyboardInterrupt) else 1)


def _refuse(text: str) -> NoReturn:
    print(f"shoal run: {text}\n{USAGE}", file=sys.stderr)
    raise SystemExit(2)
