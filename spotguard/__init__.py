"""SpotGuard: moves running containers off interrupted Spot nodes."""

__version__ = "0.1.0"
