"""Runners and studies: PyTorch proxies, recorded runs, any program; Optuna keeps the state."""
