"""Registers `optimum-cli export mirror`: optimum looks into this namespace for commands.

The options are those of `mirror export`, read from that command, so the two can't drift apart. No
`__init__.py` may stand beside this file or above it: the namespace is optimum's (PEP 420).
"""

from __future__ import annotations

import argparse
from typing import ClassVar

import click
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from mirror.cli import export, main


class MirrorExportCommand(BaseOptimumCLICommand):
    """`optimum-cli export mirror MODEL -o BUNDLE`."""

    COMMAND: ClassVar[CommandInfo] = CommandInfo(
        name="mirror", help="Export a decoder to a bundle for Mirror Speculative Decoding."
    )

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Give the parser every argument of `mirror export`."""
        for parameter in export.params:
            _add(parser, parameter)

    def run(self) -> None:
        """Export, with the messages and exit codes of `mirror export`."""
        main(["export", *_words(self.args)], prog_name="optimum-cli")


def _add(parser: argparse.ArgumentParser, parameter: click.Parameter) -> None:
    if isinstance(parameter, click.Argument):
        parser.add_argument(str(parameter.name), metavar=parameter.human_readable_name)
    elif isinstance(parameter, click.Option) and parameter.is_flag:
        parser.add_argument(*parameter.opts, dest=str(parameter.name), action="store_true", help=parameter.help)
    elif isinstance(parameter, click.Option):
        parser.add_argument(*parameter.opts, dest=str(parameter.name), required=parameter.required, help=parameter.help)


def _words(args: argparse.Namespace) -> list[str]:
    """Return parsed arguments as a command line for `mirror export`, which checks their values."""
    words: list[str] = []
    for parameter in export.params:
        value = getattr(args, str(parameter.name))
        if isinstance(parameter, click.Option) and value not in (None, False):
            words += [parameter.opts[-1]] if value is True else [parameter.opts[-1], value]
    return [*words, "--", args.model]


REGISTER_COMMANDS = [(MirrorExportCommand, ExportCommand)]
