"""What the command lmdeploy calls: parse, then run what was asked for."""

from .cli import CLI
from .serve import SubCliServe


def run() -> None:
    """Parse sys.argv and run the command."""
    CLI.add_parsers()
    SubCliServe.add_parsers()
    args = CLI.parser.parse_args()
    args.run(args)
