"""The HTTP side of the stand-in for LMDeploy; only its parsers are here."""
