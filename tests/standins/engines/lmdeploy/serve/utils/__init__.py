"""As in LMDeploy: what the server is made of."""
