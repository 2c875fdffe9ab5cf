"""load, upgrade, downgrade: an artifact becomes a running torch model, and changes its width."""

from plyweight.loading.verbs import downgrade, load, start_upgrade, upgrade

__all__ = ["downgrade", "load", "start_upgrade", "upgrade"]
