"""docs/cli.md, written from the live commands: `python -m tests.cli_reference` prints it."""

from __future__ import annotations

import click

from mirror.cli import main

HEAD = """# The command line

Written from the commands themselves by `make docs`; a test fails when it no longer fits them.

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 failed (`error:` says what was
found, `hint:` what to do), 2 wrong usage, 130 Ctrl-C.
"""


def reference() -> str:
    """Return the whole page."""
    context = click.Context(main)
    commands = [(name, main.get_command(context, name)) for name in main.list_commands(context)]
    pages = [page(name, command) for name, command in commands if command is not None]
    return "\n".join([HEAD, *pages])


def page(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=f"mirror {name}")
    usage = f"mirror {name} " + " ".join(command.collect_usage_pieces(context))
    rows = [row(option) for option in command.params if isinstance(option, click.Option)]
    lines = [f"## mirror {name}", "", f"    {usage}", "", paragraphs(command.help or ""), ""]
    return "\n".join([*lines, "| option | default | |", "|---|---|---|", *rows, ""])


def paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def row(option: click.Option) -> str:
    flags = ", ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts))
    value = kind(option)
    return (
        f"| {flags}{f' {value}' if value else ''} | {default(option)} | {(option.help or '').split('  [default')[0]} |"
    )


def kind(option: click.Option) -> str:
    if option.is_flag:
        return ""
    if isinstance(option.type, click.Choice):
        return " \\| ".join(map(str, option.type.choices))
    return (option.metavar or option.type.name.split()[0].upper()).strip()


def default(option: click.Option) -> str:
    told = (option.help or "").partition("[default: ")[2].rstrip("]")
    if told:
        return told
    if option.is_flag:
        return f"`{option.opts[0]}`" if option.secondary_opts and option.default else ""
    if option.required:
        return "required"
    return f"`{option.default}`" if isinstance(option.default, str | int | float) else ""


if __name__ == "__main__":
    click.echo(reference(), nl=False)
