"""The interfaces of OpenAI and LMDeploy over HTTP."""
