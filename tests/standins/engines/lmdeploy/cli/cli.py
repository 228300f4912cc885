"""The top of the command line."""

import argparse


class CLI:
    """As in LMDeploy, the parser is made when the class is."""

    parser = argparse.ArgumentParser(prog="lmdeploy")
    subparsers = parser.add_subparsers(dest="command")

    @staticmethod
    def add_parsers() -> None:
        """Add what `serve` does not need."""
        CLI.subparsers.add_parser("chat")
