"""Colour maps of evenly rising lightness, in the forms that a page and its SVG filters need.

Source: viridis and magma by Stéfan van der Walt and Nathaniel Smith (CC0), ten stops of each, linear in between.
"""

from __future__ import annotations

Ramp = tuple[str, ...]
"""Colours `#rrggbb` at equal steps from 0 to 1."""

VIRIDIS: Ramp = (
    *("#440154", "#482878", "#3e4989", "#31688e", "#26828e"),
    *("#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"),
)
MAGMA: Ramp = (
    *("#000004", "#180f3d", "#440f76", "#721f81", "#9e2f7f"),
    *("#cd4071", "#f1605d", "#fd9668", "#feca8d", "#fcfdbf"),
)


def css_gradient(ramp: Ramp) -> str:
    """Return a CSS gradient that runs along a ramp from left to right."""
    return f"linear-gradient(90deg, {', '.join(ramp)})"


def svg_component_filter(name: str, channel: int, ramp: Ramp) -> str:
    """Return an SVG filter that maps one channel of a picture (0, 1, 2: red, green, blue) to a ramp; alpha is kept."""
    picked = " ".join("1" if i == channel else "0" for i in range(5))
    levels = zip(*(bytes.fromhex(stop[1:]) for stop in ramp), strict=True)
    tables = "".join(
        f'<feFunc{letter} type="table" tableValues="{" ".join(f"{level / 255:.4f}" for level in of_channel)}"/>'
        for letter, of_channel in zip("RGB", levels, strict=True)
    )
    return (
        f'<filter id="{name}" x="0" y="0" width="1" height="1" color-interpolation-filters="sRGB">'
        f'<feColorMatrix values="{picked} {picked} {picked} 0 0 0 1 0"/>'
        f"<feComponentTransfer>{tables}</feComponentTransfer></filter>"
    )
