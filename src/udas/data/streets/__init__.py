"""The embedded world `streets`: procedural street pictures with exact street11 labels, in two looks.

`render` makes one picture; `ensure` writes a data set into a folder. A picture is made in these steps: `street` draws
the measures of a street and a camera, `layout` furnishes it (`plots`, `buildings`, `vehicles`, `figures`, `furniture`),
`canvas` paints the polygons as surface numbers, `shading` (with `ground` and `texture`) turns these into colour and
class, and `sensor` photographs the result. `looks` holds all that differs between the two domains.
"""

from udas.data.streets.files import as_rendered, ensure
from udas.data.streets.renderer import render

__all__ = ["as_rendered", "ensure", "render"]
