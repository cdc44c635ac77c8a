"""Errors of the handlers, split by how the caller must react."""


class HandlerError(Exception):
    """Base of all errors that handlers raise on purpose."""


class Retry(HandlerError):  # noqa: N818 - named after the reaction
    """The neighbour may do it if asked again; nothing has changed."""


class GiveUp(HandlerError):  # noqa: N818 - named after the reaction
    """Asking again does not help: take the next rung or roll back."""


class Ambiguous(HandlerError):  # noqa: N818 - named after the reaction
    """Nobody knows whether the step took effect: keep everything as it is and look again."""
