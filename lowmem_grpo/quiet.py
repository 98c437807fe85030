"""Keeping the libraries' own progress bars and notices off a console that is ours."""

import contextlib
import warnings

__all__ = ["quiet_libraries"]


@contextlib.contextmanager
def quiet_libraries():
    """Within: transformers logs errors only and draws no bars; Python warnings of libraries are not
    shown.
    """
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
