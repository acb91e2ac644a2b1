"""The estimator laboratory: bias and variance of gradient estimators where everything is known."""
