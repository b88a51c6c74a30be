"""Pages from Jinja2 templates. Pictures in them are data URLs, so that a page opens anywhere and loads nothing."""

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image


def render_page(template: str, **values) -> str:
    """Fill a template, named relative to this package; in HTML every value is escaped, and one that is missing is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=template.endswith(".html.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(values)


def image_url(pixels: np.ndarray, kind: str = "png", **options) -> str:
    """uint8 [H, W, 3 or 4] => data URL; options are Pillow's for this kind of file."""
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, format=kind, **options)
        return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
