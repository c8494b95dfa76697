"""Command lines made from dataclasses, and errors a user can act on."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import signal
import sys
import typing
import warnings
from pathlib import Path
from typing import Any, Callable, Sequence, TypeVar

import torch
from tqdm import tqdm

from equimini.config import Checked
from equimini.utils.errors import UserError, first_line, in_words

Config = TypeVar("Config", bound=Checked)


def add_flags(parser: argparse.ArgumentParser, defaults: Checked, title: str) -> None:
    """One flag per field of the dataclass instance `defaults`, in a group called `title`."""
    group = parser.add_argument_group(title)
    types = typing.get_type_hints(type(defaults))
    for f in dataclasses.fields(defaults):
        value = getattr(defaults, f.name)
        if types[f.name] is bool:
            group.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                               action=argparse.BooleanOptionalAction,
                               help=f"{f.metadata['help']} [{'yes' if value else 'no'}]")
            continue
        text = f.metadata["help"].replace("%", "%%")
        group.add_argument(
            "--" + f.name.replace("_", "-"), dest=f.name, default=argparse.SUPPRESS,
            type=_int_tuple if isinstance(value, tuple) else types[f.name],
            choices=f.metadata.get("choices"), metavar=None if "choices" in f.metadata else
            {int: "N", float: "X", str: "TEXT"}.get(types[f.name], "N,N"),
            help=f"{text} [{spelled(value) or 'none'}]")


def spelled(value: Any) -> str:
    """A value as on the command line: lists with commas."""
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def command(program: str, doc: str, defaults: Checked | None = None,
            **more: Any) -> argparse.ArgumentParser:
    """The parser of `python -m program`: the first line of its module's docstring, and one flag
    per field of `defaults`; more: of ArgumentParser."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=doc.split("\n")[0],
                                     allow_abbrev=False, **more)
    if defaults:
        add_flags(parser, defaults, "options")
    return parser


def parse(program: str, doc: str, defaults: Config, argv: Sequence[str] | None = None) -> Config:
    """The options that were given to `python -m program`; see `command`."""
    return override(defaults, command(program, doc, defaults).parse_args(argv))


def _int_tuple(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


_int_tuple.__name__ = "list of whole numbers such as 1,2,4"  # argparse names it in its errors


def override(config: Config, args: argparse.Namespace) -> Config:
    """`config` with every field replaced that was given on the command line."""
    names = {f.name for f in dataclasses.fields(config)}
    given = {name: value for name, value in vars(args).items() if name in names}
    try:
        return dataclasses.replace(config, **given)
    except ValueError as error:  # it begins with a field's name, and may name others
        raise UserError(re.sub(r"[\w-]+", lambda word: "--" + word[0] if (
            word[0].replace("-", "_") in names and (word.start() == 0 or "-" in word[0]))
            else word[0], str(error))) from None


def config_from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
    """A configuration from a checkpoint's plain dict.

    A field that the dict lacks is younger than the checkpoint and gets what was done before there
    was a choice: its flag's `before`, or its default.
    """
    before = {f.name: f.metadata["before"] for f in dataclasses.fields(cls)
              if "before" in f.metadata}
    unknown = sorted(map(str, set(values) - {f.name for f in dataclasses.fields(cls)}))
    if unknown:
        raise UserError(f"the checkpoint's {cls.__name__} has settings that this version does not "
                        f"know ({', '.join(unknown)}); it is from a newer version, or an old one "
                        "whose settings have been renamed")
    try:
        return cls(**{k: tuple(v) if isinstance(v, (list, tuple)) else v
                      for k, v in {**before, **values}.items()})
    except (ValueError, TypeError) as error:
        raise UserError(f"the checkpoint's {cls.__name__} is not valid: {error}") from None


def pick_device(name: str) -> torch.device:
    """The torch device for --device; 'auto' takes CUDA, then MPS, then the CPU.

    A GPU becomes CUDA's current one; its float32 keeps all its digits, also in convolutions (until
    `set_float32` says otherwise), and products of bfloat16 are summed in float32.
    """
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} cannot be used here ({first_line(error)}); try "
                        "--device auto") from None
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return device


def output_folder(path: Path | str) -> Path:
    """Create the folder `path`; raises UserError if it cannot be written."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may also probe
    except OSError as error:
        raise UserError(f"cannot write to the output folder {path}: {error.strerror}") from None
    return folder


def subcommand(package: str, names: Sequence[str], argv: list[str] | None = None) -> None:
    """`python -m package NAME …`: call main(argv) of the module package.NAME.

    Each module's docstring begins with the line that the list of commands shows.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in names:
        asked = [] if not argv or argv[0] in ("-h", "--help") else argv[:1]
        lines = [f"usage: python -m {package} WHAT [options]", ""]
        longest = max(map(len, names))
        for name in names:
            about = _module(package, name).__doc__.splitlines()[0]
            lines.append(f"  {name:{longest}}  {about}")
        print("\n".join([*lines, "", f"python -m {package} WHAT --help explains each."]),
              file=sys.stderr if asked or not argv else sys.stdout)
        if asked:
            raise UserError(f"unknown command {asked[0]!r}; there are {', '.join(names)}")
        sys.exit(0 if argv else 2)
    _module(package, argv[0]).main(argv[1:])


def _module(package: str, name: str) -> Any:
    return importlib.import_module(f"{package}.{name.replace('-', '_')}")


def run(main: Callable[[], None]) -> None:
    """Call a script's main; an error that the user can mend becomes one line and exit code 2.

    Warnings are shown as one line each.
    """
    warnings.showwarning = _show_warning
    try:
        main()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # another one would only cut off the exit
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if (text := in_words(error)) is None:
            raise
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    tqdm.write(f"warning: {message}", file=sys.stderr)
