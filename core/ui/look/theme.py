"""The page's theme (no remote fonts), style sheet and script."""

from pathlib import Path
from typing import Any

import gradio as gr

from core.ui.look.colours import STAGE_COLOURS, scale_gradient, scale_hex, signed_gradient

_ASSETS = Path(__file__).parents[1] / "assets"
_SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Ubuntu", "Helvetica Neue", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def page_theme() -> gr.themes.Base:
    """The Gradio theme, in light and dark; its accent is taken from the scale of bits."""
    paper, card, line, ink, soft, accent = "#f8f4ed", "#fffdf9", "#e3dacb", "#1f1926", "#6a6072", "#7b3c66"
    dark = ("#15111b", "#1e1926", "#382f42", "#f4eef6", "#aba1b5", "#f0b08e")
    theme = gr.themes.Base(font=_SANS, font_mono=_MONO, radius_size=gr.themes.sizes.radius_md)
    light_and_dark = {
        "body_background_fill": (paper, dark[0]),
        "body_text_color": (ink, dark[3]),
        "body_text_color_subdued": (soft, dark[4]),
        "background_fill_primary": (card, dark[1]),
        "background_fill_secondary": (paper, dark[0]),
        "block_background_fill": (card, dark[1]),
        "block_border_color": (line, dark[2]),
        "block_info_text_color": (soft, dark[4]),
        "block_label_text_color": (soft, dark[4]),
        "block_label_background_fill": (card, dark[1]),
        "block_title_text_color": (ink, dark[3]),
        "border_color_primary": (line, dark[2]),
        "border_color_accent": (accent, dark[5]),
        "color_accent": (accent, dark[5]),
        "color_accent_soft": ("#f3e6ea", "#33283a"),
        "input_background_fill": ("#ffffff", "#151019"),
        "input_border_color": ("#cfc3b2", "#4a3f56"),
        "input_border_color_focus": (accent, dark[5]),
        "input_placeholder_color": ("#8d8394", "#857a90"),
        "button_primary_background_fill": (accent, dark[5]),
        "button_primary_background_fill_hover": ("#642f52", "#f7c4a5"),
        "button_primary_text_color": ("#ffffff", "#1e1420"),
        "button_secondary_background_fill": ("#efe7da", "#2c2535"),
        "button_secondary_background_fill_hover": ("#e6dccb", "#3a3145"),
        "button_secondary_text_color": (ink, dark[3]),
        "checkbox_label_background_fill": ("#f4eee4", "#2a2333"),
        "checkbox_label_background_fill_hover": ("#ece3d5", "#352c40"),
        "checkbox_label_background_fill_selected": ("#f3e6ea", "#3d2c3c"),
        "checkbox_background_color_selected": (accent, dark[5]),
        "checkbox_border_color_selected": (accent, dark[5]),
        "slider_color": (accent, dark[5]),
        "link_text_color": (accent, dark[5]),
        "error_background_fill": ("#fdecea", "#3b1d1f"),
        "error_text_color": ("#8c1d18", "#ffb4ab"),
        "error_border_color": ("#e3a29d", "#7d3a37"),
    }
    settings = {"block_shadow": "none", "block_shadow_dark": "none", "block_border_width": "1px"}
    # Gradio has no dark variant of `color_accent`; the style sheet sets it.
    for name, (light, dark_value) in light_and_dark.items():
        settings[name] = light
        if name != "color_accent":
            settings[f"{name}_dark"] = dark_value
    return theme.set(**settings)


def page_css() -> str:
    """The style sheet, with the fixed colours as variables."""
    fixed = "".join(f"--id-{name}:{colour};" for name, colour in STAGE_COLOURS.items())
    scale = f"--id-scale:{scale_gradient()};--id-scale-0:{scale_hex(0)};--id-scale-1:{scale_hex(1)};"
    scale += f"--id-signed:{signed_gradient()};"
    return f":root{{{fixed}{scale}}}\n" + _assets("css")


def launch_options() -> dict[str, Any]:
    """Options of `Blocks.launch` for the page's look; nothing is fetched from other hosts."""
    return {
        "theme": page_theme(),
        "css": page_css(),
        "head": f"<script>{_assets('js')}</script>",
        "max_file_size": "40mb",
        "show_error": True,
        "ssr_mode": False,
        "footer_links": ["api"],
    }


def _assets(kind: str) -> str:
    """All style sheets or scripts in one: the page's own first, then those of the tabs."""
    paths = sorted(_ASSETS.glob(f"*.{kind}"), key=lambda path: (path.stem != "page", path.name))
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)
