"""Print what the installed LMDeploy's `serve api_server` understands, as JSON.

Run it with the Python of an LMDeploy environment; no GPU is needed:

    PYTHON roles/lmdeploy/files/cli_facts.py >roles/lmdeploy/files/cli/VERSION.json

The JSON lets preflight judge arguments before anything is installed. It holds:

    version                 LMDeploy's version
    flags                   per option: type (a Python type's name, or the name of LMDeploy's own converter), choices or
                            null, nargs or null (0 for switches), default, and every spelling of the option
    chat_templates          names that --chat-template takes (a JSON file's path is the other way)
    tool_call_parsers       names that --tool-call-parser takes
    reasoning_parsers       names that --reasoning-parser takes, old ones included
    backends                names that --backend takes
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from typing import Any


def plain(value: Any) -> Any:
    """Return ``value`` if JSON can hold it, else its text."""
    return value if value is None or isinstance(value, (bool, int, float, str, list)) else str(value)


def flag(action: argparse.Action) -> dict[str, Any]:
    """Describe one option of the parser."""
    kind = "bool" if action.nargs == 0 else getattr(action.type, "__name__", "str")
    return {
        "type": kind,
        "choices": None if action.choices is None else [plain(choice) for choice in action.choices],
        "nargs": action.nargs,
        "default": plain(action.default),
        "names": list(action.option_strings),
    }


def subparser(parser: argparse.ArgumentParser, *names: str) -> argparse.ArgumentParser:
    """Walk down the named commands."""
    for name in names:
        commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        parser = commands.choices[name]
    return parser


def facts() -> dict[str, Any]:
    """Ask the installed package itself."""
    from lmdeploy.cli.cli import CLI
    from lmdeploy.cli.serve import SubCliServe
    from lmdeploy.model import MODELS
    from lmdeploy.serve.parsers.reasoning_parser import LEGACY_REASONING_PARSER_NAMES, ReasoningParserManager
    from lmdeploy.serve.parsers.tool_parser import ToolParserManager

    SubCliServe.add_parsers()
    actions = subparser(CLI.parser, "serve", "api_server")._actions
    flags = {a.option_strings[-1]: flag(a) for a in actions if a.option_strings and a.dest != "help"}
    return {
        "version": version("lmdeploy"),
        "flags": dict(sorted(flags.items())),
        "chat_templates": sorted(MODELS.module_dict),
        "tool_call_parsers": sorted(ToolParserManager.module_dict),
        "reasoning_parsers": sorted({*ReasoningParserManager.module_dict, *LEGACY_REASONING_PARSER_NAMES}),
        "backends": sorted(flags["--backend"]["choices"]),
    }


if __name__ == "__main__":
    json.dump(facts(), sys.stdout, indent=1, sort_keys=True)
    sys.stdout.write("\n")
