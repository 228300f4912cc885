"""What LMDeploy does with pictures."""
