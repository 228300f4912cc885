"""How LMDeploy gets pictures."""
