"""Looking at a run's influence in a browser: a local server over its stores, or one self-contained page.

Needs the ``report`` extra; the server also needs ``explore``.
"""

from stepinfluence.app.view.explore.answers import Explorer
from stepinfluence.app.view.explore.page import render_page, write_page

__all__ = ["Explorer", "render_page", "write_page"]
