"""The embedded world `streets`: procedural street pictures with exact street11 labels, in two looks.

`render` makes one picture; `ensure` writes a data set into a folder.
"""

from udas.data.streets.renderer import render

__all__ = ["render"]
