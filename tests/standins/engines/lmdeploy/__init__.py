"""Stands in for LMDeploy: the same names, an argparse like its own, and no engine."""
