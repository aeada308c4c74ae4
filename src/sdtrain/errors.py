"""The one exception that means: the input is at fault, and its message says what to do."""


class InputError(ValueError):
    """A fault in what the user gave: params, data, a model or the environment.

    Stages and the command line print its message alone, without a traceback.
    """
