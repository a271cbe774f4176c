"""Render the SVG drawings of an Iconify package as RGB images on white."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import resvg_py
from PIL import Image

from starter.data.packages import load_json


@dataclass(frozen=True)
class IconSet:
    """One unpacked Iconify package: drawings by slug, slugs by code point sequence."""

    icons: dict[str, dict[str, Any]]
    aliases: dict[str, dict[str, Any]]
    slugs: dict[str, str]
    width: int
    height: int

    @classmethod
    def load(cls, folder: Path) -> "IconSet":
        data = load_json(folder / "icons.json")
        chars = folder / "chars.json"
        slugs: dict[str, str] = load_json(chars) if chars.exists() else {}
        return cls(
            icons=data["icons"],
            aliases=data.get("aliases", {}),
            slugs={key.replace("-fe0f", ""): slug for key, slug in slugs.items()},
            width=data.get("width", 16),
            height=data.get("height", 16),
        )

    def find_svg(self, slug: str) -> str | None:
        """Return the drawing as an SVG document; aliases are followed.

        None if the set does not have the slug, or the slug is a flipped or rotated alias.
        """
        alias = self.aliases.get(slug)
        if alias is not None:
            is_transformed = bool({"hFlip", "vFlip", "rotate"} & alias.keys())
            return None if is_transformed else self.find_svg(alias["parent"])
        icon = self.icons.get(slug)
        if icon is None:
            return None
        left, top = icon.get("left", 0), icon.get("top", 0)
        width, height = icon.get("width", self.width), icon.get("height", self.height)
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
        )


def render_on_white(svg: str, *, size: int, margin: float = 0.04) -> Image.Image:
    """Return an RGB image of `size` x `size` pixels with the drawing centred on white, with its aspect ratio."""
    inner = round(size * (1 - 2 * margin))
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=inner * 2))
    drawing = Image.open(io.BytesIO(png)).convert("RGBA")
    drawing.thumbnail((inner, inner), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size, size), "white")
    canvas.alpha_composite(drawing, ((size - drawing.width) // 2, (size - drawing.height) // 2))
    return canvas.convert("RGB")
