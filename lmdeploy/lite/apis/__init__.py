"""The methods as functions, under LMDeploy's paths and with its keyword arguments."""
