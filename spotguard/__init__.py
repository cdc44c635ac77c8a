"""SpotGuard: moves running containers off interrupted Spot nodes."""
