"""The network of a pod: holding and playing frames, addresses, routes."""
